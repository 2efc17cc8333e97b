"""Ways for an archive to reach the bucket: one small protocol, a class for each way.

    python     the bucket's own methods: streams; into gs:// also in parallel parts
    gcloud     the `gcloud storage` command: streams through its standard input
    gsutil     the `gsutil` command: from a local archive, so that it can resume within it
    directory  a directory, also a mounted one: streams into it

A kind of bucket that `TRANSPORTS` does not name is written by `python`. The commands use the user's
own credentials. They run in a session of their own, so that Ctrl-C in the terminal does not reach
them, and are ended when they make no progress: a stall is killed, slowness is not. No shell, no
credentials in arguments; every write names the version that it replaces. No torch here.
"""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

from configs.training_config import TrainingConfig
from utils.base.errors import ObjectNotFoundError, StorageError, TransientStorageError
from utils.base.text import parse_json
from utils.base.uri import join_uri, local_path, require_place, scheme_of
from utils.checkpoints.layout import SAVING_PREFIX
from utils.storage.bucket import (
    Meter,
    ObjectInfo,
    WriteStream,
    mapped_file_errors,
    write_file,
)
from utils.storage.directory import STREAM_SUFFIX, TEMPORARY_PREFIX, DirectoryBucket
from utils.storage.gcs import GcsBucket
from utils.storage.open import open_bucket
from utils.uploads.parallel_upload import PARTS_FOLDER, parts_prefix, put_parallel, remove_parts
from utils.uploads.watched_command import START_SECONDS, WatchedCommand

STALL_SECONDS = 120.0
RETRY_SECONDS = 60.0  # within one request; what fails then is tried again from the start
BYTES_PER_MEGABIT = 125_000
SMALL_BYTES = 8 * 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransportOptions:
    """How to upload; plain values, so that they can be sent to another process.

    Attributes:
        name: auto, or one of `TRANSPORTS` or directory.
        streams: Connections of an upload by `python`; 1 for one resumable upload without parts.
        stall_seconds: A command that makes no progress for so long is ended.
        retry_seconds: How long one request is tried again.
        scratch: Directory for the local archive that gsutil needs, made where it is not there; None
            for the temporary one.
    """

    uri: str
    name: str = "auto"
    user_project: str | None = None
    streams: int = 4
    max_bytes_per_second: float | None = None
    stall_seconds: float = STALL_SECONDS
    retry_seconds: float = RETRY_SECONDS
    scratch: str | None = None

    @classmethod
    def of(cls, config: TrainingConfig, scratch: Path | None = None) -> TransportOptions:
        """Return what a configuration asks for; `name` may be auto."""
        rate, name = config.upload_max_mbps, config.upload_transport
        return cls(
            config.bucket_uri,
            _settle(config.bucket_uri, name),
            config.gcs_user_project,
            config.upload_streams,
            None if rate is None else rate * BYTES_PER_MEGABIT,
            config.upload_stall_seconds,
            scratch=None if scratch is None else str(scratch),
        )


class Transport(Protocol):
    """Puts objects into one bucket URI and says what is there."""

    name: str
    uri: str
    remains: str = ""
    """What interrupted uploads leave in a folder, as a name or a pattern."""

    def put(
        self, object_name: str, write: WriteStream, expected: ObjectInfo | None, max_bytes: int
    ) -> None:
        """Upload what `write` writes, `max_bytes` at most, where the bucket still holds `expected`.

        Raises:
            ConflictError: Another version is there.
            StorageError: It could not be uploaded.
        """

    def stat(self, object_name: str) -> ObjectInfo | None:
        """Return size, crc32c and generation of an object, or None where there is none."""

    def read(self, object_name: str) -> bytes | None:
        """Return a small object's bytes, or None where there is none."""

    def copy(self, object_name: str, target: str) -> None:
        """Copy an object within the bucket."""

    def delete(self, object_name: str, expected: ObjectInfo | None = None) -> None:
        """Remove an object, any version for None; one that does not exist is no error.

        Raises:
            ConflictError: Another version is there.
        """

    def remove_unfinished(
        self, folder: str, keep: frozenset[str] = frozenset(), only: str | None = None
    ) -> None:
        """Remove what interrupted uploads left in a folder; by default they leave nothing.

        The remains of the objects in `keep` stay; `only` names the one object whose remains go.
        """

    def close(self) -> None:
        """Release connections, where there are any."""


def put_bytes(
    transport: Transport, object_name: str, data: bytes, expected: ObjectInfo | None
) -> None:
    """Upload a small object."""
    transport.put(object_name, lambda sink: sink.write(data), expected, len(data))


class BucketTransport(Transport):
    """Through the methods that each bucket has."""

    name = "python"

    def __init__(self, options: TransportOptions, meter: Meter) -> None:
        self._bucket = open_bucket(options.uri, options.user_project, options.retry_seconds, meter)
        self._streams = options.streams
        self.uri = self._bucket.uri

    def put(
        self, object_name: str, write: WriteStream, expected: ObjectInfo | None, max_bytes: int
    ) -> None:
        """Upload as a stream; nothing is stored on the way."""
        if max_bytes <= SMALL_BYTES:
            memory = io.BytesIO()
            write(memory)
            self._bucket.put_bytes_if(object_name, memory.getvalue(), expected)
        else:
            self._put_large(object_name, write, expected)

    def _put_large(self, object_name: str, write: WriteStream, expected: ObjectInfo | None) -> None:
        self._bucket.put_stream(object_name, write, expected)

    def stat(self, object_name: str) -> ObjectInfo | None:
        """Return what is there; a directory's file is read for its checksum."""
        info = self._bucket.stat(object_name)
        if info is None or info.crc32c is not None:
            return info
        return replace(info, crc32c=self._bucket.crc32c(object_name))

    def read(self, object_name: str) -> bytes | None:
        """Return a small object's bytes, or None where there is none."""
        try:
            return self._bucket.read_bytes(object_name)
        except ObjectNotFoundError:
            return None

    def copy(self, object_name: str, target: str) -> None:
        """Copy an object within the bucket."""
        self._bucket.copy(object_name, target)

    def delete(self, object_name: str, expected: ObjectInfo | None = None) -> None:
        """Remove an object."""
        if expected is None:
            self._bucket.delete(object_name)
        else:
            self._bucket.delete_if(object_name, expected)

    def close(self) -> None:
        """Close the bucket."""
        self._bucket.close()


class DirectoryTransport(BucketTransport):
    """Into a directory, through temporary files."""

    name = "directory"
    remains = f"{TEMPORARY_PREFIX}*{STREAM_SUFFIX}"

    def remove_unfinished(
        self, folder: str, keep: frozenset[str] = frozenset(), only: str | None = None
    ) -> None:
        """Remove temporary files."""
        assert isinstance(self._bucket, DirectoryBucket)
        if only is None:
            self._bucket.remove_unfinished(folder, keep)


class GcsTransport(BucketTransport):
    """Through google-cloud-storage, in parallel parts where more than one stream is allowed."""

    remains = PARTS_FOLDER

    def _put_large(self, object_name: str, write: WriteStream, expected: ObjectInfo | None) -> None:
        assert isinstance(self._bucket, GcsBucket)
        if self._streams > 1:
            put_parallel(self._bucket, object_name, write, expected, streams=self._streams)
        else:
            super()._put_large(object_name, write, expected)

    def remove_unfinished(
        self, folder: str, keep: frozenset[str] = frozenset(), only: str | None = None
    ) -> None:
        """Remove parts."""
        assert isinstance(self._bucket, GcsBucket)
        prefix = f"{folder}/{PARTS_FOLDER}/" if only is None else parts_prefix(only)
        remove_parts(self._bucket, prefix, keep)


class _CommandTransport(Transport):
    """What gsutil and gcloud have in common."""

    _quiet: tuple[str, ...] = ()

    def __init__(self, words: list[str], options: TransportOptions, meter: Meter) -> None:
        self.uri = options.uri.rstrip("/")
        self._options = options
        self._command = WatchedCommand(words, self.uri, options.stall_seconds, meter)

    def copy(self, object_name: str, target: str) -> None:
        """Copy an object within the bucket."""
        self._command.run(
            "cp", [self._object(object_name), self._object(target)], options=self._quiet
        )

    def read(self, object_name: str) -> bytes | None:
        """Return a small object's bytes, or None where there is none."""
        try:
            return self._command.run("cat", [self._object(object_name)], options=self._quiet)
        except ObjectNotFoundError:
            return None

    def delete(self, object_name: str, expected: ObjectInfo | None = None) -> None:
        """Remove an object."""
        options, words = self._quiet, [self._object(object_name)]
        if expected is not None:
            options, words = self._expecting(expected, words)
        with contextlib.suppress(ObjectNotFoundError):
            self._command.run("rm", words, options=options)

    def _expecting(
        self, expected: ObjectInfo | None, words: list[str]
    ) -> tuple[tuple[str, ...], list[str]]:
        """Return the options before and the words after a verb that ask for a version."""
        raise NotImplementedError

    @classmethod
    def _require(cls, program: str | None, hint: str) -> str:
        if program is None:
            raise StorageError(
                f"{cls.name} is not installed. {hint}, or --set upload_transport=python."
            )
        return program

    def _object(self, object_name: str) -> str:
        uri = join_uri(self.uri, object_name)
        if found := re.search(r"[][*?#]", uri):
            raise StorageError(
                f"{uri}: {self.name} takes {found[0]!r} for a part of a pattern or of a version. "
                "Use another name, or --set upload_transport=python."
            )
        return uri


class GcloudTransport(_CommandTransport):
    """Through `gcloud storage`: about 1 s a call."""

    name = "gcloud"
    _quiet = ("--no-user-output-enabled",)  # dots of its progress would pass for progress

    def __init__(self, options: TransportOptions, meter: Meter) -> None:
        program = self._require(shutil.which("gcloud"), "Install it")
        billing = [f"--billing-project={options.user_project}"] if options.user_project else []
        super().__init__([program, "--quiet", *billing, "storage"], options, meter)

    def put(
        self, object_name: str, write: WriteStream, expected: ObjectInfo | None, max_bytes: int
    ) -> None:
        """Upload as a stream; nothing is stored on the way."""
        options, words = self._expecting(expected, ["-", self._object(object_name)])
        try:
            self._command.run("cp", words, options=options, write=write)
        except ObjectNotFoundError as exc:
            # Its words are the same where the service has lost the upload's session.
            if not self._has_bucket():
                raise
            raise TransientStorageError(f"the upload's session was lost: {exc}") from exc

    def _has_bucket(self) -> bool:
        """Tell whether the bucket is there, even where it may not be looked at."""
        bucket = self.uri.removeprefix("gs://").partition("/")[0]
        try:
            self._command.run("buckets describe", [f"gs://{bucket}"])
        except ObjectNotFoundError:
            return False
        except StorageError as exc:
            log.debug("%s cannot be described: %s", bucket, exc)
        return True

    def _expecting(
        self, expected: ObjectInfo | None, words: list[str]
    ) -> tuple[tuple[str, ...], list[str]]:
        return self._quiet, [f"--if-generation-match={_generation(expected)}", *words]

    def stat(self, object_name: str) -> ObjectInfo | None:
        """Return size, crc32c and generation as gcloud describes them."""
        try:
            text = self._command.run(
                "objects describe", [self._object(object_name), "--format=json"]
            )
        except ObjectNotFoundError:
            return None
        try:
            found = parse_json(text)
            size, crc32c, generation = (found[k] for k in ("size", "crc32c_hash", "generation"))
            return ObjectInfo(object_name, int(size), str(crc32c), int(generation))
        except (ValueError, KeyError, TypeError) as exc:
            where = self._object(object_name)
            raise StorageError(f"gcloud describes {where} without size or crc32c.") from exc


class GsutilTransport(_CommandTransport):
    """Through gsutil: about 2 s a call.

    An archive is stored first: gsutil resumes an upload that broke off only from a file.
    """

    name = "gsutil"
    _quiet = ("-q",)  # but not for `stat`, which then says nothing at all

    def __init__(self, options: TransportOptions, meter: Meter) -> None:
        program = self._require(find_gsutil(), "Run: bash setup.sh (it puts gsutil into venv/)")
        words = [program, *(["-u", options.user_project] if options.user_project else [])]
        # Its own retries are short, ours follow; parts that a killed gsutil left would stay.
        retries = 1 if options.retry_seconds < START_SECONDS else 4
        words += ["-o", f"Boto:num_retries={retries}"]
        words += ["-o", "GSUtil:parallel_composite_upload_threshold=0"]
        super().__init__(words, options, meter)

    def put(
        self, object_name: str, write: WriteStream, expected: ObjectInfo | None, max_bytes: int
    ) -> None:
        """Upload from a local file; as a stream what is small or held to a rate."""
        target = self._object(object_name)
        options, words = self._expecting(expected, ["-", target])
        if max_bytes <= SMALL_BYTES or self._options.max_bytes_per_second is not None:
            self._command.run("cp", words, options=options, write=write)
            return
        archive = self._find_room(object_name, max_bytes)
        try:
            write_file(archive, write, partial(mapped_file_errors, str(archive)))
            words = ["--", glob.escape(str(archive)), target]
            self._command.run("cp", words, options=options, file=archive)
        except ObjectNotFoundError as exc:
            if archive.exists():
                raise
            raise TransientStorageError(f"{archive} was removed by another process.") from exc
        finally:
            with contextlib.suppress(OSError):  # left over, it is no reason to upload again
                archive.unlink(missing_ok=True)

    def _find_room(self, object_name: str, max_bytes: int) -> Path:
        """Return where the local archive of an object is to lie."""
        scratch = self._options.scratch
        where = scratch or "the temporary directory"
        with mapped_file_errors(f"gsutil needs a local archive in {where}"):
            folder = Path(scratch or tempfile.gettempdir()).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        if free < max_bytes:
            raise TransientStorageError(
                f"gsutil needs a local archive: up to {max_bytes} bytes in {folder}, where {free} "
                "are free. Free some space, or use --set upload_transport=python, which needs none."
            )
        return folder / f"{SAVING_PREFIX}{PurePosixPath(object_name).name}"

    def _expecting(
        self, expected: ObjectInfo | None, words: list[str]
    ) -> tuple[tuple[str, ...], list[str]]:
        return ("-q", "-h", f"x-goog-if-generation-match:{_generation(expected)}"), words

    def stat(self, object_name: str) -> ObjectInfo | None:
        """Return size, crc32c and generation as `gsutil stat` prints them."""
        try:
            text = self._command.run("stat", [self._object(object_name)]).decode("utf-8", "replace")
        except ObjectNotFoundError:
            return None
        patterns = (r"Content-Length:\s*(\d+)", r"Hash \(crc32c\):\s*(\S+)", r"Generation:\s*(\d+)")
        found = [re.search(rf"^\s*{pattern}", text, re.MULTILINE) for pattern in patterns]
        if not all(found):
            raise StorageError(f"gsutil stat {self._object(object_name)}: no size or crc32c.")
        size, crc32c, generation = (match[1] for match in found if match)
        return ObjectInfo(object_name, int(size), crc32c, int(generation))


def _generation(expected: ObjectInfo | None) -> int:
    return 0 if expected is None else expected.generation or 0


def find_gsutil() -> str | None:
    """Return the gsutil of the PATH, or the one that setup.sh put beside this Python."""
    beside = Path(sys.executable).with_name("gsutil")
    return shutil.which("gsutil") or (str(beside) if beside.is_file() else None)


OpenTransport = Callable[[TransportOptions, Meter], Transport]

TRANSPORTS: dict[str, dict[str, OpenTransport]] = {
    "gs": {"python": GcsTransport, "gcloud": GcloudTransport, "gsutil": GsutilTransport}
}
"""Scheme -> its transports by name, the fastest first (BENCHMARKS.md). `auto` takes the first that
works."""


def _openers(uri: str) -> dict[str, OpenTransport]:
    """Return the transports to a place, by name, in the order in which `auto` tries them."""
    if local_path(uri) is not None:
        return {"directory": DirectoryTransport}
    return TRANSPORTS.get(scheme_of(uri) or "", {"python": BucketTransport})


def _settle(uri: str, name: str) -> str:
    """Return `name`, or what auto means where there is one transport alone."""
    names = list(_openers(uri))
    return names[0] if name == "auto" and len(names) == 1 else name


def tool_words(name: str) -> str:
    """Return ` with gsutil`, to put after a place; nothing of a directory, which needs no tool."""
    return "" if name == DirectoryTransport.name else f" with {name}"


def open_transport(options: TransportOptions, meter: Meter | None = None) -> Transport:
    """Return a transport; `options.name` must not be auto where there are several.

    Raises:
        UsageError: The URI is neither a bucket nor a directory.
        StorageError: It does not fit the URI, or its program is not installed.
    """
    uri, name = options.uri, options.name
    require_place(uri)
    openers, name = _openers(uri), _settle(uri, name)
    if name not in openers:
        needed = "directory" if name == "directory" else "URI such as gs://bucket/prefix"
        raise StorageError(f"upload_transport {name} needs a {needed}, not {uri}.")
    return openers[name](options, meter or Meter(options.max_bytes_per_second))


def probe_transport(
    options: TransportOptions, folder: str, retry_seconds: float
) -> tuple[TransportOptions, str | None]:
    """Write, read and delete a small object; `auto` takes the first transport that can.

    Returns:
        The transport that works, and what does not work but is not needed: where nothing can be
        deleted, it has one stream.

    Raises:
        StorageError: Nothing works; the message says why for each.
    """
    is_open = _settle(options.uri, options.name) == "auto"
    names = list(_openers(options.uri)) if is_open else [options.name]
    errors: list[StorageError] = []
    for name in names:
        wanted = replace(options, name=name)
        stall_seconds = min(options.stall_seconds, START_SECONDS + retry_seconds)
        hasty = replace(wanted, retry_seconds=retry_seconds, stall_seconds=stall_seconds)
        try:
            with contextlib.closing(open_transport(hasty)) as transport:
                warning = _probe(transport, folder)
        except StorageError as exc:
            log.debug("upload_transport %s does not work: %s", name, exc)
            errors.append(exc)
            continue
        return (wanted if warning is None else replace(wanted, streams=1)), warning
    raise errors[0] if len(errors) == 1 else type(errors[0])(" ".join(map(str, errors)))


def _probe(transport: Transport, folder: str) -> str | None:
    """Return what is wrong with listing and deleting, None where nothing is."""
    name, token = f"{folder}/.probe-{secrets.token_hex(4)}", secrets.token_bytes(16)
    put_bytes(transport, name, token, None)
    if transport.read(name) != token:
        raise StorageError(f"{transport.uri}: what was written could not be read back.")
    try:
        transport.delete(name)
        transport.remove_unfinished(folder, only=name)  # lists, as uploads in parts do
    except StorageError as exc:
        return f"{transport.uri}: objects cannot be listed and deleted ({exc})"
    return None
