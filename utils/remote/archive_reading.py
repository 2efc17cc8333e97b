"""A checkpoint's archive on its way back from the bucket, distrusted in every part.

    sidecar, archive in the bucket -> bytes (hashed) -> files (hashed) -> download, verification

The sidecar (`NAME.json`) says what the archive and every file must be. Only files that its manifest
names come out, no more of them than it says, and nothing is ever unpickled. What becomes of the
bytes and files is the caller's affair. No torch here.
"""

from __future__ import annotations

import itertools
import logging
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import google_crc32c

from utils.base.archive_formats import ARCHIVE_FORMATS, ARCHIVE_SUFFIXES, ArchiveFormat
from utils.base.errors import (
    CheckpointError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from utils.base.progress import OnProgress
from utils.base.text import FOREIGN_ERRORS, parse_json
from utils.base.uri import join_uri
from utils.checkpoints.layout import (
    ARCHIVE_SUFFIX,
    MANIFEST_FILE,
    MAX_SIDECAR_BYTES,
    FileEntry,
    Manifest,
    archive_object,
    require_checkpoint_name,
    sidecar_object,
)
from utils.checkpoints.views import find_sidecar_damage
from utils.storage.bucket import Bucket, encode_crc32c
from utils.storage.retrying import ARCHIVE_FACTOR, FIRST_RETRY_SECONDS, backoff, retry

MAX_ATTEMPTS = 3
DOWNLOAD_BLOCK_BYTES = 16 * 2**20
UNPACK_BLOCK_BYTES = 2**20
MAX_MANIFEST_BYTES = 16 * 2**20
# A header of ours is 512 bytes, or 1.5 KiB for a file above 8 GiB; the rest is read ahead.
MAX_HEADER_BYTES = 2 * UNPACK_BLOCK_BYTES
_CHOOSE_ANOTHER = "Choose another checkpoint, or upload this one again from where it was written."
_NO_DIRECTORY = "/nowhere"

log = logging.getLogger(__name__)

T = TypeVar("T")

# What a damaged or hostile archive makes the libraries raise.
_UNPACK_ERRORS = (tarfile.TarError, ValueError, OverflowError)


@dataclass(frozen=True)
class Sidecar:
    """What the bucket says of one uploaded checkpoint and its archive."""

    name: str
    manifest: Manifest
    archive: FileEntry
    format: ArchiveFormat

    @property
    def archive_object(self) -> str:
        """Object name of the archive."""
        return archive_object(self.name, self.format.suffix)

    def find_difference(self, size: int, crc32c: str | None) -> str | None:
        """Say how an archive is not this one, None where it is as far as is known."""
        expected = self.archive
        if size == expected.size and crc32c in (None, expected.crc32c):
            return None
        found = f"{size} bytes" if size != expected.size else f"crc32c {crc32c}"
        return f"it has {found}; its sidecar says {expected.size} bytes, crc32c {expected.crc32c}"


def read_sidecar(bucket: Bucket, name: str) -> Sidecar:
    """Return the sidecar of an uploaded checkpoint.

    Raises:
        CheckpointError: There is none, or it cannot be what the uploader wrote.
        StorageError: The bucket could not be read.
    """
    where = join_uri(bucket.uri, sidecar_object(name))
    try:
        data = bucket.read_bytes(sidecar_object(name), 0, MAX_SIDECAR_BYTES + 1)
    except ObjectNotFoundError as exc:
        reason = f"{where} does not exist, so its upload was not finished"
        raise _unusable(name, reason) from exc
    try:
        if len(data) > MAX_SIDECAR_BYTES:
            raise ValueError(f"it has more than {MAX_SIDECAR_BYTES} bytes")
        value = parse_json(data)
        manifest = Manifest.from_json(value["manifest"], where)
        damage = find_sidecar_damage(value.get("metadata"), manifest)
        if damage is not None:
            raise ValueError(damage)
        return Sidecar(name, manifest, *_check_sidecar(name, manifest, value["archive"]))
    except CheckpointError as exc:
        raise _unusable(name, str(exc)) from exc
    except FOREIGN_ERRORS as exc:
        reason = f"no {exc}" if isinstance(exc, KeyError) else str(exc)
        raise _unusable(name, f"{where} is not a usable sidecar ({reason})") from exc


def _unusable(name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{name} cannot be used: {reason.rstrip('.')}. {_CHOOSE_ANOTHER}")


def _check_sidecar(
    name: str, manifest: Manifest, archive: dict[str, Any]
) -> tuple[FileEntry, ArchiveFormat]:
    """Return the archive's facts, if the sidecar can be of the checkpoint `name`."""
    step = require_checkpoint_name(name).step
    if manifest.step != step:
        raise ValueError(f"it is of step {manifest.step}")
    if not manifest.files:
        raise ValueError("its manifest names no files")
    if MANIFEST_FILE in manifest.files:
        raise ValueError(f"its manifest names {MANIFEST_FILE} itself")
    negative = [file for file, entry in manifest.files.items() if entry.size < 0]
    if negative:
        raise ValueError(f"{negative[0]!r} has a negative size")
    size, crc32c = archive["size"], archive["crc32c"]
    if type(size) is not int or size <= 0 or not isinstance(crc32c, str):
        raise ValueError(f"archive of {size!r} bytes, crc32c {crc32c!r}")
    suffix = archive.get("format", ARCHIVE_SUFFIX)
    if suffix not in ARCHIVE_SUFFIXES:
        raise ValueError(f"archive of the unknown format {suffix!r}")
    return FileEntry(size, crc32c), ARCHIVE_FORMATS[suffix]


def retry_download(name: str, source: str, operation: Callable[[], T]) -> T:
    """Return what `operation` returns, after at most `MAX_ATTEMPTS` attempts.

    Raises:
        StorageError: It failed each time, or in a way that no other attempt mends.
    """
    message = "Download of %s failed, trying again in %.0f s: %s"
    try:
        return retry(
            operation,
            itertools.islice(backoff(FIRST_RETRY_SECONDS, ARCHIVE_FACTOR), MAX_ATTEMPTS - 1),
            lambda delay, exc: log.warning(message, name, delay, exc),
        )
    except TransientStorageError as exc:
        raise StorageError(
            f"{name} could not be downloaded from {source}: {exc} ({MAX_ATTEMPTS} attempts). "
            "Nothing was left here; try again later."
        ) from exc


class ArchiveBytes:
    """An archive's bytes in the bucket, read in order and hashed on the way."""

    def __init__(self, bucket: Bucket, sidecar: Sidecar, on_progress: OnProgress) -> None:
        self._bucket, self._sidecar, self._on_progress = bucket, sidecar, on_progress
        self._object = sidecar.archive_object
        self._size = self._checksum = 0
        self._is_vouched_for = False

    def require_expected_object(self) -> None:
        """Compare what the bucket says of the archive with its sidecar.

        Raises:
            CheckpointError: It is not there, or another one.
        """
        stored = self._bucket.stat(self._object)
        if stored is None:
            raise _unusable(self._sidecar.name, f"its archive is not in {self._bucket.uri}")
        self._require_same(stored.size, stored.crc32c)
        self._is_vouched_for = stored.crc32c is not None

    def read_block(self) -> bytes:
        """Return the next bytes, none at the end; after an error, another call goes on there."""
        length = min(DOWNLOAD_BLOCK_BYTES, self._sidecar.archive.size - self._size)
        if not length:
            return b""
        block = self._bucket.read_bytes(self._object, self._size, length)
        if len(block) != length:
            raise TransientStorageError(f"{len(block)} bytes came instead of {length}.")
        self._size += length
        self._checksum = google_crc32c.extend(self._checksum, block)
        self._on_progress("downloading", self._size, self._sidecar.archive.size)
        return block

    def require_whole(self) -> None:
        """Compare the checksum of all bytes with the sidecar.

        Raises:
            TransientStorageError: The bucket says that it holds the right ones; the next block is
                the first again.
            CheckpointError: It is another one, and the bucket keeps no checksum of its own.
        """
        found = encode_crc32c(self._checksum)
        if found == self._sidecar.archive.crc32c:
            return
        self._size = self._checksum = 0
        if not self._is_vouched_for:
            self._require_same(self._sidecar.archive.size, found)
        raise TransientStorageError("the archive's bytes changed on the way.")

    def _require_same(self, size: int, crc32c: str | None) -> None:
        difference = self._sidecar.find_difference(size, crc32c)
        if difference is not None:
            where = join_uri(self._bucket.uri, self._object)
            raise _unusable(self._sidecar.name, f"{where} is damaged ({difference})")


OpenSink = Callable[[str], AbstractContextManager[Any]]
"""Called with the name of each file, which the manifest has; returns what its bytes go to."""


class _BoundedReader:
    """Passes unpacked bytes on while the budget lasts: a few bytes can unpack to terabytes."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self.budget = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self.budget -= len(data)
        if self.budget < 0:
            raise tarfile.TarError("it unpacks to more than its manifest says")
        return data


class Unpacking:
    """Reads the files of an archive, which messages call `source`, as the manifest has them."""

    def __init__(
        self,
        sidecar: Sidecar,
        source: str,
        open_sink: OpenSink,
        on_progress: OnProgress = lambda stage, done, total: None,
    ) -> None:
        self._sidecar, self._source, self._open_sink = sidecar, source, open_sink
        self._on_progress = on_progress
        self._done = 0
        self._manifest = bytearray()

    def run(self, archive: Path | IO[bytes]) -> None:
        """Read every file into a sink of its own.

        Raises:
            CheckpointError: The archive is not what the sidecar says.
        """
        missing = {*self._sidecar.manifest.files, MANIFEST_FILE}
        try:
            with self._sidecar.format.open_read(archive) as unpacked:
                reader = _BoundedReader(unpacked)
                stream: Any = reader
                with tarfile.open(fileobj=stream, mode="r|", bufsize=UNPACK_BLOCK_BYTES) as members:
                    while (member := members.next()) is not None:
                        name = self._require_expected(member, missing)
                        missing.remove(name)
                        reader.budget = member.size + MAX_HEADER_BYTES
                        self._copy(name, members.extractfile(member))
                        reader.budget = MAX_HEADER_BYTES
        except _UNPACK_ERRORS as exc:
            raise self._refused(f"it cannot be unpacked ({str(exc)[:200]!r})") from exc
        if missing:
            raise self._refused(f"{min(missing)!r} is not in it")
        self._require_manifest()

    def _require_expected(self, member: tarfile.TarInfo, missing: set[str]) -> str:
        """Return the file name of a member that belongs here.

        Raises:
            tarfile.FilterError: It would leave the directory.
            CheckpointError: It is no regular file, not in the manifest, or not of its size.
        """
        tarfile.data_filter(member, _NO_DIRECTORY)
        folder, _, name = member.name.partition("/")
        if folder != self._sidecar.name or name not in missing:
            raise self._refused(f"{member.name!r} does not belong into it")
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise self._refused(f"{member.name!r} is no regular file")
        entry = self._sidecar.manifest.files.get(name)
        if entry is not None and member.size != entry.size:
            raise self._refused(
                f"{member.name!r} has {member.size} bytes, its manifest says {entry.size}"
            )
        if entry is None and member.size > MAX_MANIFEST_BYTES:
            raise self._refused(f"its {MANIFEST_FILE} has {member.size} bytes")
        return name

    def _copy(self, name: str, content: IO[bytes] | None) -> None:
        assert content is not None, "a regular file has content"
        total = self._sidecar.manifest.total_bytes
        entry = self._sidecar.manifest.files.get(name)
        checksum = 0
        with self._open_sink(name) as sink:
            while block := content.read(UNPACK_BLOCK_BYTES):
                checksum = google_crc32c.extend(checksum, block)
                sink.write(block)
                if entry is None:
                    self._manifest += block
                self._done += len(block)
                self._on_progress("unpacking", min(self._done, total), total)
        if entry is not None and encode_crc32c(checksum) != entry.crc32c:
            raise self._refused(f"{name!r} in it is not what its manifest says")

    def _require_manifest(self) -> None:
        try:
            found = Manifest.from_json(parse_json(bytes(self._manifest)), MANIFEST_FILE)
        except (CheckpointError, ValueError) as exc:
            raise self._refused(f"its {MANIFEST_FILE} cannot be read ({exc})") from exc
        if found != self._sidecar.manifest:
            raise self._refused(f"its {MANIFEST_FILE} is not that of its sidecar")

    def _refused(self, reason: str) -> CheckpointError:
        name, source = self._sidecar.name, self._source
        return _unusable(name, f"{source} is not the archive of that checkpoint: {reason}")
