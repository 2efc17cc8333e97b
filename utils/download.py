"""A checkpoint back from the bucket: verified, unpacked, committed as if it had been saved here.

    card, archive in the bucket -> archive (verified) -> files (verified) -> checkpoint directory

The card (`NAME.json`) says what the archive and every file must be; without one the upload never
finished. Nothing is opened before the archive's size and crc32c are the card's, nothing is written
that the card's manifest does not name, no more of it than the manifest says, and nothing is ever
unpickled. All of it happens in a `.saving-*` directory, which the next start removes after a crash;
the rename at the end commits. The journal then has the checkpoint as verified, so that it is not
uploaded again. No torch here.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import google_crc32c
from isal import igzip, igzip_lib

from utils.checkpoint_store import verify_checkpoint
from utils.errors import (
    CheckpointError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from utils.journal import Journal, UploadState
from utils.layout import (
    ARCHIVE_SUFFIX,
    MANIFEST_FILE,
    SAVING_PREFIX,
    FileEntry,
    Manifest,
    archive_object,
    card_object,
    require_checkpoint_name,
)
from utils.storage import (
    Bucket,
    crc32c_of_file,
    encode_crc32c,
    fsync_directory,
    join_uri,
    normalize_uri,
)

MAX_ATTEMPTS = 3
FIRST_BACKOFF_SECONDS = 1.0
BACKOFF_FACTOR = 4.0
READ_BLOCK_BYTES = 16 * 2**20
UNPACK_BLOCK_BYTES = 2**20
MAX_CARD_BYTES = 64 * 2**20
MAX_MANIFEST_BYTES = 16 * 2**20
# A header of ours is 512 bytes, or 1.5 KiB for a file above 8 GiB; the rest is read ahead.
MAX_HEADER_BYTES = 2 * UNPACK_BLOCK_BYTES
_CHOOSE_ANOTHER = "Choose another checkpoint, or upload this one again from where it was written."

log = logging.getLogger(__name__)

T = TypeVar("T")
OnProgress = Callable[[str, int, int], None]
"""Called with the stage (downloading or unpacking), the bytes done, and the bytes in all."""

# What a damaged or hostile tar.gz makes the libraries raise.
_UNPACK_ERRORS = (
    tarfile.TarError,
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
    cast("type[Exception]", igzip_lib.IsalError),  # its stub calls it an instance
    ValueError,
    OverflowError,
)


@dataclass(frozen=True)
class Card:
    """What the bucket says of one uploaded checkpoint.

    Attributes:
        name: The checkpoint's name.
        manifest: Its manifest.
        archive: Bytes and base64 crc32c of its archive.
    """

    name: str
    manifest: Manifest
    archive: FileEntry


def download_checkpoint(
    bucket: Bucket,
    name: str,
    directory: Path,
    journal: Journal,
    on_progress: OnProgress = lambda stage, done, total: None,
    *,
    first_backoff_seconds: float = FIRST_BACKOFF_SECONDS,
) -> Path:
    """Bring a checkpoint from the bucket into `directory`; return where it is.

    One that is there already and is the same is left as it is.

    Args:
        bucket: The run's bucket.
        name: The checkpoint's name.
        directory: The run's checkpoints.
        journal: Takes the entry that it is verified in the bucket.
        on_progress: Told what is done.
        first_backoff_seconds: Wait before the second attempt; the third comes after 4 times that.

    Raises:
        UsageError: `name` is not a checkpoint's name.
        CheckpointError: It is not complete in the bucket, damaged, not the one it should be, or
            cannot be put here; nothing is left behind.
        StorageError: The bucket could not be read.
    """
    require_checkpoint_name(name)
    source = join_uri(bucket.uri, archive_object(name))
    reader = _Retrying(name, source, first_backoff_seconds)
    card = reader.run(lambda: read_card(bucket, name))
    target = directory / name
    if target.is_symlink() or target.exists():
        _require_same(target, card.manifest, source)
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _require_space(directory, card)
        with tempfile.TemporaryDirectory(
            prefix=f"{SAVING_PREFIX}download-", dir=directory, ignore_cleanup_errors=True
        ) as scratch:
            archive = Path(scratch) / f"{name}{ARCHIVE_SUFFIX}"
            with archive.open("wb") as file:
                download = _ArchiveDownload(bucket, card, file, on_progress)
                reader.run(download.run)
            unpacked = Path(scratch) / name
            unpacked.mkdir()
            _Unpacking(card, source, unpacked, on_progress).run(archive)
            unpacked.rename(target)
        fsync_directory(directory)
    except OSError as exc:
        raise CheckpointError(
            f"{name} cannot be written to {directory}: {exc.strerror or exc}. Nothing was left "
            "there; it is still in the bucket."
        ) from exc
    _record(journal, bucket, card, target)
    log.info("Downloaded %s from %s, verified.", name, source)
    return target


def read_card(bucket: Bucket, name: str) -> Card:
    """Return the card of an uploaded checkpoint.

    Raises:
        CheckpointError: There is none, or it cannot be what the uploader wrote.
        StorageError: The bucket could not be read.
    """
    where = join_uri(bucket.uri, card_object(name))
    try:
        data = bucket.read_bytes(card_object(name), 0, MAX_CARD_BYTES + 1)
    except ObjectNotFoundError as exc:
        raise CheckpointError(
            f"{name} is ignored: {where} does not exist, so it was not uploaded to its end. "
            "Choose another checkpoint: python scripts/upload_manager.py status"
        ) from exc
    try:
        if len(data) > MAX_CARD_BYTES:
            raise ValueError(f"it has more than {MAX_CARD_BYTES} bytes")
        value = json.loads(data)
        manifest = Manifest.from_json(value["manifest"], where)
        return Card(name, manifest, _check_card(name, manifest, value["archive"]))
    except CheckpointError as exc:
        raise CheckpointError(f"{name} cannot be used: {exc} {_CHOOSE_ANOTHER}") from exc
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        reason = f"no {exc}" if isinstance(exc, KeyError) else str(exc)
        raise CheckpointError(
            f"{name} cannot be used: {where} is not a usable card ({reason}). {_CHOOSE_ANOTHER}"
        ) from exc


def _check_card(name: str, manifest: Manifest, archive: dict[str, Any]) -> FileEntry:
    """Return the archive's facts, if the card can be of the checkpoint `name`."""
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
    return FileEntry(size, crc32c)


class _Retrying:
    """Tries again what may succeed then, in all `MAX_ATTEMPTS` times for each thing to do."""

    def __init__(self, name: str, source: str, first_backoff_seconds: float) -> None:
        self._name, self._source, self._backoff = name, source, first_backoff_seconds

    def run(self, operation: Callable[[], T]) -> T:
        delay = self._backoff
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return operation()
            except TransientStorageError as exc:
                if attempt == MAX_ATTEMPTS:
                    raise StorageError(
                        f"{self._name} could not be downloaded from {self._source}: {exc} "
                        f"({attempt} attempts). Nothing was left here; try again later."
                    ) from exc
                log.warning("Download of %s failed, trying again in %.0f s: %s",
                            self._name, delay, exc)  # fmt: skip
                time.sleep(delay)
                delay *= BACKOFF_FACTOR
        raise AssertionError("unreachable")


def _require_same(target: Path, manifest: Manifest, source: str) -> None:
    problem = "another one"
    try:
        if verify_checkpoint(target) == manifest:
            return
    except CheckpointError as exc:
        problem = f"not a whole one: {exc}"
    raise CheckpointError(
        f"{target} exists and is not what {source} holds, but {problem.rstrip('.')}. Nothing was "
        "changed. Move it away to download it."
    )


def _require_space(directory: Path, card: Card) -> None:
    archive, files = card.archive.size, card.manifest.total_bytes
    free = shutil.disk_usage(directory).free
    if free < archive + files:
        raise CheckpointError(
            f"{card.name} needs {archive + files} bytes in {directory} (archive {archive}, files "
            f"{files}); {free} are free. Free some space, or choose another --set output_dir."
        )


class _ArchiveDownload:
    """The archive's bytes into a file; another `run` goes on where the one before stopped."""

    def __init__(
        self, bucket: Bucket, card: Card, file: IO[bytes], on_progress: OnProgress
    ) -> None:
        self._bucket, self._card, self._file = bucket, card, file
        self._on_progress = on_progress
        self._object = archive_object(card.name)
        self._size = self._checksum = 0

    def run(self) -> None:
        expected = self._card.archive
        is_vouched_for = self._require_expected_object()
        while self._size < expected.size:
            length = min(READ_BLOCK_BYTES, expected.size - self._size)
            block = self._bucket.read_bytes(self._object, self._size, length)
            if len(block) != length:
                raise TransientStorageError(f"{len(block)} bytes came instead of {length}.")
            self._file.write(block)
            self._size += length
            self._checksum = google_crc32c.extend(self._checksum, block)
            self._on_progress("downloading", self._size, expected.size)
        self._file.flush()
        if encode_crc32c(self._checksum) == expected.crc32c:
            return
        if not is_vouched_for:
            raise self._damaged(f"its crc32c is {encode_crc32c(self._checksum)}")
        self._size = self._checksum = 0
        self._file.seek(0)
        self._file.truncate()
        raise TransientStorageError("the archive's bytes changed on the way.")

    def _require_expected_object(self) -> bool:
        """Tell whether the bucket itself says that it holds the archive of the card."""
        stored = self._bucket.stat(self._object)
        if stored is None:
            raise CheckpointError(
                f"{self._card.name} cannot be used: its archive is not in {self._bucket.uri}. "
                f"{_CHOOSE_ANOTHER}"
            )
        if stored.size != self._card.archive.size:
            raise self._damaged(f"it has {stored.size} bytes")
        if stored.crc32c not in (None, self._card.archive.crc32c):
            raise self._damaged(f"its crc32c is {stored.crc32c}")
        return stored.crc32c is not None

    def _damaged(self, found: str) -> CheckpointError:
        expected = self._card.archive
        return CheckpointError(
            f"{self._card.name} cannot be used: {join_uri(self._bucket.uri, self._object)} is "
            f"damaged ({found}; its card says {expected.size} bytes, crc32c {expected.crc32c}). "
            f"{_CHOOSE_ANOTHER}"
        )


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


class _Unpacking:
    """The files of an archive into a directory, each one as the manifest has it or not at all."""

    def __init__(self, card: Card, source: str, directory: Path, on_progress: OnProgress) -> None:
        self._card, self._source, self._directory = card, source, directory
        self._on_progress = on_progress
        self._done = 0

    def run(self, archive: Path) -> None:
        """Unpack.

        Raises:
            CheckpointError: The archive is not what the card says.
            OSError: A file cannot be written.
        """
        manifest = self._card.manifest
        missing = {*manifest.files, MANIFEST_FILE}
        try:
            with igzip.open(archive, "rb") as unpacked:
                reader = _BoundedReader(unpacked)
                stream: Any = reader
                with tarfile.open(fileobj=stream, mode="r|", bufsize=UNPACK_BLOCK_BYTES) as members:
                    while (member := members.next()) is not None:
                        name = self._require_expected(member, missing)
                        missing.remove(name)
                        reader.budget = member.size + MAX_HEADER_BYTES
                        self._write(name, members.extractfile(member))
                        reader.budget = MAX_HEADER_BYTES
        except _UNPACK_ERRORS as exc:
            raise self._refused(f"it cannot be unpacked ({str(exc)[:200]!r})") from exc
        if missing:
            raise self._refused(f"{min(missing)!r} is not in it")
        self._require_manifest()
        fsync_directory(self._directory)

    def _require_expected(self, member: tarfile.TarInfo, missing: set[str]) -> str:
        """Return the file name of a member that belongs here.

        Raises:
            tarfile.FilterError: It would leave the directory.
            CheckpointError: It is no regular file, not in the manifest, or not of its size.
        """
        tarfile.data_filter(member, str(self._directory.parent))
        folder, _, name = member.name.partition("/")
        if folder != self._card.name or name not in missing:
            raise self._refused(f"{member.name!r} does not belong into it")
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise self._refused(f"{member.name!r} is no regular file")
        entry = self._card.manifest.files.get(name)
        if entry is not None and member.size != entry.size:
            raise self._refused(
                f"{member.name!r} has {member.size} bytes, its manifest says {entry.size}"
            )
        if entry is None and member.size > MAX_MANIFEST_BYTES:
            raise self._refused(f"its {MANIFEST_FILE} has {member.size} bytes")
        return name

    def _write(self, name: str, content: IO[bytes] | None) -> None:
        assert content is not None, "a regular file has content"
        total = self._card.manifest.total_bytes
        checksum = 0
        with (self._directory / name).open("xb") as file:
            while block := content.read(UNPACK_BLOCK_BYTES):
                checksum = google_crc32c.extend(checksum, block)
                file.write(block)
                self._done += len(block)
                self._on_progress("unpacking", min(self._done, total), total)
            file.flush()
            os.fsync(file.fileno())
        entry = self._card.manifest.files.get(name)
        if entry is not None and encode_crc32c(checksum) != entry.crc32c:
            raise self._refused(f"{name!r} in it is not what its manifest says")

    def _require_manifest(self) -> None:
        path = self._directory / MANIFEST_FILE
        try:
            found = Manifest.from_json(json.loads(path.read_bytes()), MANIFEST_FILE)
        except (CheckpointError, ValueError, RecursionError) as exc:
            raise self._refused(f"its {MANIFEST_FILE} cannot be read ({exc})") from exc
        if found != self._card.manifest:
            raise self._refused(f"its {MANIFEST_FILE} is not that of its card")

    def _refused(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._card.name} cannot be used: {self._source} is not the archive of that "
            f"checkpoint: {reason}. {_CHOOSE_ANOTHER}"
        )


def _record(journal: Journal, bucket: Bucket, card: Card, checkpoint: Path) -> None:
    """Write what the uploader writes after an upload, so that none follows."""
    try:
        journal.record(
            card.name,
            card.manifest.run_id,
            UploadState.VERIFIED,
            bytes=card.archive.size,
            crc32c=card.archive.crc32c,
            uri=join_uri(bucket.uri, archive_object(card.name)),
            bucket=normalize_uri(bucket.uri),
            manifest_crc32c=crc32c_of_file(checkpoint / MANIFEST_FILE),
        )
    except OSError as exc:
        log.warning("%s cannot be written (%s); %s will be uploaded again.",
                    journal.path, exc.strerror or exc, card.name)  # fmt: skip
