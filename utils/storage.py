"""Buckets: where shards come from and archives go to. The one place that knows google.cloud.

A URI is `gs://bucket/prefix` or a directory (also a mounted one). Both are a `Bucket`: named
objects with a size and a crc32c, listed by prefix, read whole or by range, written whole. Nothing
else in the project cares which of the two it holds.

Guarantees: an object appears whole or not at all; a finished `put_file` was checked by size and
crc32c; a conditional write never replaces what its writer has not seen; every failure is one of
the `StorageError` classes, so callers can tell what is worth trying again. Checksums are written
as Google Cloud Storage writes them: base64 of the big-endian crc32c
(https://cloud.google.com/storage/docs/hashes-etags).
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import google_crc32c

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from utils.errors import (
    AccessDeniedError,
    ConflictError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
    UsageError,
)

READ_BLOCK_BYTES = 4 * 2**20
TEMPORARY_PREFIX = ".tmp-"
STREAM_SUFFIX = ".part"
CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 60.0
DEFAULT_RETRY_SECONDS = 120.0
POOL_CONNECTIONS = 32
SEND_BLOCK_BYTES = 256 * 1024
SYNC_BYTES = 64 * 2**20
STREAM_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ObjectInfo:
    """What a bucket says about one object.

    Attributes:
        name: Name relative to the bucket's prefix, with `/` separators.
        size: Bytes.
        crc32c: Base64 checksum, or None where the bucket keeps none (directories).
        generation: What tells versions of it apart: its generation on gs://, the time of its last
            change (ns) in a directory; None where unknown.
    """

    name: str
    size: int
    crc32c: str | None = None
    generation: int | None = None


class Meter:
    """Counts bytes on their way to a bucket and holds them to a rate; threads may share one.

    Args:
        bytes_per_second: The rate; None for as fast as it goes.
    """

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self.sent = 0
        """Bytes so far, with those that had to be sent again."""
        self.signs_of_life = 0
        """Changes while something is done that sends no bytes of its own."""
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def pass_on(self, count: int) -> None:
        """Count bytes that are about to be sent; wait until the rate allows them."""
        with self._lock:
            self.sent += count
            if self._rate is None:
                return
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + count / self._rate
            wait = self._free_at - now
        time.sleep(wait)

    def count(self, count: int) -> None:
        """Count bytes that another process has sent."""
        with self._lock:
            self.sent += count

    def show_life(self) -> None:
        """Say that something is going on."""
        with self._lock:
            self.signs_of_life += 1


WriteStream = Callable[[IO[bytes]], object]
"""Writes an object's bytes into the binary file that it is given."""


class Bucket(Protocol):
    """Named objects under one URI."""

    uri: str

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose name starts with `prefix`, sorted by name."""

    def stat(self, name: str) -> ObjectInfo | None:
        """Return what is known of `name`, or None where there is no such object."""

    def crc32c(self, name: str) -> str:
        """Return the checksum of the stored bytes, reading them where the bucket keeps none."""

    def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes, or `length` of them from `start`."""

    def get_file(self, name: str, path: Path) -> str:
        """Download to `path`, checked against the stored checksum; return that checksum."""

    def fetch(self, name: str, scratch: Path) -> Path:
        """Return a local file with the object's bytes: `scratch` after a download, or its own."""

    def put_file(self, name: str, path: Path) -> ObjectInfo:
        """Upload the file and return what the bucket then holds under `name`."""

    def put_stream(self, name: str, write: WriteStream, expected: ObjectInfo | None) -> None:
        """Write what `write` writes, where the bucket still holds `expected`; whole or not at all.

        Args:
            name: Object name.
            write: Called once.
            expected: From `stat`; None where there is to be no object.

        Raises:
            ConflictError: Another version is there, or none; it was not changed.
        """

    def copy(self, name: str, target: str) -> None:
        """Copy an object within the bucket; the bytes do not leave it."""

    def put_bytes(self, name: str, data: bytes) -> ObjectInfo:
        """Write a small object."""

    def read_version(self, name: str) -> tuple[bytes, ObjectInfo]:
        """Return a small object's bytes and what tells this version of it from all others."""

    def put_bytes_if(self, name: str, data: bytes, expected: ObjectInfo | None) -> ObjectInfo:
        """Write a small object where the bucket still holds `expected`.

        An answer can be lost after the change was made, so an object that holds exactly `data`
        counts as written: put something into it that no other writer has, such as a random token.

        Args:
            name: Object name.
            data: What it is to hold.
            expected: From `read_version` or `put_bytes_if`; None where there is to be no object.

        Raises:
            ConflictError: Another version is there, or none; nothing was changed.
        """

    def delete(self, name: str) -> None:
        """Remove the object; one that does not exist is no error."""

    def delete_if(self, name: str, expected: ObjectInfo) -> None:
        """Remove the object where the bucket still holds `expected`; none at all is no error.

        Raises:
            ConflictError: Another version is there; it was left.
        """

    def deletion_notes(self) -> Sequence[str]:
        """Say what the bucket does with objects that are deleted, a sentence each."""

    def close(self) -> None:
        """Release connections."""


def encode_crc32c(value: int) -> str:
    """Return a crc32c the way GCS writes it (base64, big-endian)."""
    return base64.b64encode(value.to_bytes(4, "big")).decode("ascii")


def crc32c_of_bytes(data: bytes) -> str:
    """Return the base64 crc32c of `data`."""
    return encode_crc32c(google_crc32c.value(data))


def crc32c_of_file(path: Path, on_block: Callable[[], None] = lambda: None) -> str:
    """Return the base64 crc32c of a file's bytes; `on_block` is called now and then."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK_BYTES):
            checksum = google_crc32c.extend(checksum, block)
            on_block()
    return encode_crc32c(checksum)


def fsync_directory(path: Path) -> None:
    """Make renames and new names in `path` durable; a no-op where directories cannot be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_gcs_uri(uri: str) -> bool:
    """Tell whether `uri` names a Google Cloud Storage bucket."""
    return uri.startswith("gs://")


def join_uri(uri: str, *names: str) -> str:
    """Append object names to a bucket URI; empty names are left out."""
    base = uri if uri.endswith("://") else uri.rstrip("/")
    return "/".join([base, *(name.strip("/") for name in names if name)])


def normalize_uri(uri: str) -> str:
    """Return the one spelling of a bucket URI: directories absolute, no slash at the end."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().absolute())


def open_bucket(
    uri: str,
    user_project: str | None = None,
    retry_seconds: float = DEFAULT_RETRY_SECONDS,
    meter: Meter | None = None,
) -> Bucket:
    """Return the bucket behind a URI.

    Args:
        uri: `gs://bucket/prefix` or a directory.
        user_project: Project that pays for requests (requester-pays buckets).
        retry_seconds: How long a gs:// operation is retried on transient errors.
        meter: Told of all bytes that are sent.

    Raises:
        UsageError: The URI is empty or of an unknown scheme.
    """
    if is_gcs_uri(uri):
        return GcsBucket(uri, user_project, retry_seconds, meter or Meter())
    if not uri or "://" in uri:
        raise UsageError(f"{uri!r} is not a bucket: use gs://bucket/prefix or a directory.")
    return DirectoryBucket(Path(uri), meter)


class DirectoryBucket:
    """A directory (local or mounted) that behaves like a bucket.

    A version of an object is its content. Conditional writes of one machine exclude each other; on
    a file system that several machines mount, creating excludes too, but two that replace the same
    version within the same millisecond may both succeed where it has no `flock`.
    """

    def __init__(self, root: Path, meter: Meter | None = None) -> None:
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)
        self._meter = meter or Meter()

    def _path(self, name: str) -> Path:
        pure = PurePosixPath(name)
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in name:
            raise UsageError(f"{name!r} is not a valid object name.")
        return self.root / pure

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose name starts with `prefix`, sorted by name."""
        directory = self.root / PurePosixPath(prefix).parent if "/" in prefix else self.root
        if prefix.endswith("/"):
            directory = self.root / prefix
        found = []
        with self._mapped_errors(prefix):
            for folder, folders, files in os.walk(directory, onerror=_raise_unless_gone):
                folders[:] = [name for name in folders if not name.startswith(TEMPORARY_PREFIX)]
                for file in files:
                    name = (Path(folder) / file).relative_to(self.root).as_posix()
                    if name.startswith(prefix) and not file.startswith(TEMPORARY_PREFIX):
                        found.append(name)
        for name in sorted(found):
            info = self.stat(name)
            if info is not None:
                yield info

    def stat(self, name: str) -> ObjectInfo | None:
        """Return the object's size and time, or None; directories keep no checksum."""
        path = self._path(name)
        with contextlib.suppress(ObjectNotFoundError), self._mapped_errors(name):
            if path.is_file():
                facts = path.stat()
                return ObjectInfo(name, facts.st_size, None, facts.st_mtime_ns)
        return None

    def crc32c(self, name: str) -> str:
        """Return the checksum of the file's bytes, read from the directory."""
        with self._mapped_errors(name):
            return crc32c_of_file(self._path(name), self._meter.show_life)

    def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes, or `length` of them from `start`."""
        with self._mapped_errors(name), self._path(name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    def get_file(self, name: str, path: Path) -> str:
        """Copy the object to `path`; return its checksum."""
        with self._mapped_errors(name):
            shutil.copyfile(self._path(name), path)
        return crc32c_of_file(path)

    def fetch(self, name: str, scratch: Path) -> Path:
        """Return the object's own file; nothing is copied."""
        path = self._path(name)
        with self._mapped_errors(name), path.open("rb"):
            return path

    def put_file(self, name: str, path: Path) -> ObjectInfo:
        """Copy the file in under a temporary name, sync it, rename it."""
        target = self._path(name)
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        with self._mapped_errors(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(path, temporary)
                self._commit(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return ObjectInfo(name, target.stat().st_size, crc32c_of_file(target))

    def put_stream(self, name: str, write: WriteStream, expected: ObjectInfo | None) -> None:
        """Write into a temporary file, sync it, rename it where `expected` is still there.

        The temporary name belongs to the object: what a killed writer left is written over.
        """
        target = self._path(name)
        temporary = self._temporary(target)
        with self._mapped_errors(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("wb")
        metered: Any = _MeteredFile(file, self._meter)
        sink: Any = _StreamSink(metered, lambda: self._mapped_errors(name))
        try:
            write(sink)
            with self._mapped_errors(name):
                file.close()
                with _alone_in(target.parent):
                    if _version(self.stat(name)) != _version(expected):
                        raise ConflictError(f"{target} was changed by another process.")
                    self._commit(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                file.close()
            temporary.unlink(missing_ok=True)

    def copy(self, name: str, target: str) -> None:
        """Copy an object within the directory."""
        self.put_file(target, self._path(name))

    def remove_unfinished(self, folder: str, keep: frozenset[str]) -> None:
        """Remove what killed streams left in a folder, but for the objects in `keep`."""
        spared = {self._temporary(self._path(name)).name for name in keep}
        with self._mapped_errors(folder):
            directory = self._path(folder)
            for path in directory.glob(f"{TEMPORARY_PREFIX}*{STREAM_SUFFIX}"):
                if path.name not in spared:
                    path.unlink(missing_ok=True)

    def put_bytes(self, name: str, data: bytes) -> ObjectInfo:
        """Write a small object."""
        target = self._path(name)
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        with self._mapped_errors(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                self._commit(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return ObjectInfo(name, len(data), crc32c_of_bytes(data))

    def read_version(self, name: str) -> tuple[bytes, ObjectInfo]:
        """Return a small object's bytes and their checksum."""
        data = self.read_bytes(name)
        return data, ObjectInfo(name, len(data), crc32c_of_bytes(data))

    def put_bytes_if(self, name: str, data: bytes, expected: ObjectInfo | None) -> ObjectInfo:
        """Write a small object where the directory still holds `expected`."""
        target = self._path(name)
        self._meter.pass_on(len(data))
        with self._mapped_errors(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(target.parent):
                if expected is None:
                    self._create(target, data)
                else:
                    self._require_version(name, expected)
                    self.put_bytes(name, data)
        return ObjectInfo(name, len(data), crc32c_of_bytes(data))

    def delete(self, name: str) -> None:
        """Remove the object; one that does not exist is no error."""
        with self._mapped_errors(name):
            self._path(name).unlink(missing_ok=True)

    def delete_if(self, name: str, expected: ObjectInfo) -> None:
        """Remove the object where the directory still holds `expected`."""
        target = self._path(name)
        with self._mapped_errors(name):
            if not target.parent.is_dir():
                return
            with _alone_in(target.parent):
                if target.exists():
                    self._require_version(name, expected)
                    target.unlink()

    def deletion_notes(self) -> Sequence[str]:
        """Say that a directory keeps nothing."""
        return ["A directory: what is deleted is gone at once."]

    def close(self) -> None:
        """Nothing to release."""

    @staticmethod
    def _temporary(target: Path) -> Path:
        return target.with_name(f"{TEMPORARY_PREFIX}{target.name}{STREAM_SUFFIX}")

    def _require_version(self, name: str, expected: ObjectInfo) -> None:
        try:
            _, found = self.read_version(name)
        except ObjectNotFoundError as exc:
            raise ConflictError(f"{self.uri}/{name} is gone.") from exc
        if (found.size, found.crc32c) != (expected.size, expected.crc32c):
            raise ConflictError(f"{self.uri}/{name} was changed by another process.")

    def _create(self, target: Path, data: bytes) -> None:
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(data)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            try:
                os.link(temporary, target)  # unlike a rename, it replaces nothing
            except FileExistsError:
                raise
            except OSError:
                # Some mounted buckets have no links; a reader may then see half of the object.
                with target.open("xb") as file:
                    file.write(data)
        except FileExistsError as exc:
            raise ConflictError(f"{target} exists.") from exc
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(target.parent)

    @staticmethod
    def _commit(temporary: Path, target: Path) -> None:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        try:
            temporary.replace(target)
        except PermissionError:
            raise
        except OSError:
            # Some mounted buckets cannot rename; the caller's checksum still guards the copy.
            shutil.copyfile(temporary, target)
        fsync_directory(target.parent)

    @contextlib.contextmanager
    def _mapped_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as exc:
            raise ObjectNotFoundError(f"{self.uri}/{name} does not exist.") from exc
        except PermissionError as exc:
            raise AccessDeniedError(f"{self.uri}/{name}: {exc.strerror}.") from exc
        except OSError as exc:
            raise StorageError(f"{self.uri}/{name}: {exc.strerror or exc}.") from exc


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keep the conditional writes of other processes and threads out, where the system can."""
    descriptor = None
    try:
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY)
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _version(info: ObjectInfo | None) -> tuple[int, int | None] | None:
    return None if info is None else (info.size, info.generation)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


class _MeteredFile:
    """A binary file that is written to in blocks, each of them metered.

    It is synced on the way: what is metered has arrived, but for the last bytes, and one sync at
    the end would take long without a sign of life.
    """

    def __init__(self, file: IO[bytes], meter: Meter) -> None:
        self._file, self._meter = file, meter
        self._unsynced = 0

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        for start in range(0, len(view), SEND_BLOCK_BYTES):
            block = view[start : start + SEND_BLOCK_BYTES]
            self._meter.pass_on(len(block))
            self._file.write(block)
            self._unsynced += len(block)
        if self._unsynced >= SYNC_BYTES:
            self._unsynced = 0
            self._file.flush()
            os.fsync(self._file.fileno())
        return len(view)

    def flush(self) -> None:
        self._file.flush()


class _StreamSink:
    """What a stream is written into: its errors are the bucket's, those of the writer pass by."""

    def __init__(
        self, file: IO[bytes], mapped_errors: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._file, self._mapped_errors = file, mapped_errors

    def write(self, data: bytes) -> int:
        with self._mapped_errors():
            return self._file.write(data)

    def flush(self) -> None:
        with self._mapped_errors():
            self._file.flush()


class GcsBucket:
    """A bucket of Google Cloud Storage, through the google-cloud-storage client.

    Application Default Credentials or a service account where there are any, anonymous where
    there are none; `STORAGE_EMULATOR_HOST` is honoured by the client itself.
    """

    def __init__(
        self, uri: str, user_project: str | None, retry_seconds: float, meter: Meter
    ) -> None:
        bucket_name, _, prefix = uri.removeprefix("gs://").partition("/")
        if not bucket_name:
            raise UsageError(f"{uri!r} names no bucket: use gs://bucket/prefix.")
        self.uri = uri.rstrip("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._client = _build_gcs_client(meter)
        self._bucket = self._client.bucket(bucket_name, user_project=user_project)
        self._options = _gcs_request_options(retry_seconds)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose name starts with `prefix`, page by page, sorted by name."""
        with self._mapped_errors(prefix):
            blobs = self._client.list_blobs(
                self._bucket,
                prefix=self._prefix + prefix,
                fields="items(name,size,crc32c,generation),nextPageToken",
                **self._options,
            )
            for blob in blobs:
                yield self._info(blob)

    def stat(self, name: str) -> ObjectInfo | None:
        """Return size, checksum and generation, or None where there is no such object."""
        with self._mapped_errors(name):
            blob = self._bucket.get_blob(self._prefix + name, **self._options)
        return None if blob is None else self._info(blob)

    def crc32c(self, name: str) -> str:
        """Return the checksum that the bucket itself keeps."""
        info = self.stat(name)
        if info is None or info.crc32c is None:
            raise ObjectNotFoundError(f"{self.uri}/{name} does not exist.")
        return info.crc32c

    def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes, or `length` of them from `start`."""
        if length == 0:
            return b""
        end = None if length is None else start + length - 1
        with self._mapped_errors(name):
            blob = self._bucket.blob(self._prefix + name)
            data: bytes = blob.download_as_bytes(start=start or None, end=end, **self._options)
        return data

    def get_file(self, name: str, path: Path) -> str:
        """Download to `path`; the client checks the bytes against the stored checksum."""
        with self._mapped_errors(name):
            blob = self._bucket.blob(self._prefix + name)
            blob.download_to_filename(str(path), checksum="crc32c", **self._options)
        return crc32c_of_file(path)

    def fetch(self, name: str, scratch: Path) -> Path:
        """Download to `scratch`."""
        self.get_file(name, scratch)
        return scratch

    def put_file(self, name: str, path: Path) -> ObjectInfo:
        """Upload the file; above 8 MiB as a resumable upload."""
        with self._mapped_errors(name):
            blob = self._bucket.blob(self._prefix + name)
            blob.upload_from_filename(str(path), checksum="crc32c", **self._options)
        return self._info(blob)

    def put_stream(self, name: str, write: WriteStream, expected: ObjectInfo | None) -> None:
        """Write as one resumable upload, chunk by chunk."""
        with self._mapped_errors(name):
            writer = self._bucket.blob(self._prefix + name).open(
                "wb",
                chunk_size=STREAM_CHUNK_BYTES,
                ignore_flush=True,
                if_generation_match=_generation(expected),
                checksum="crc32c",
                **self._options,
            )
        sink: Any = _StreamSink(writer, lambda: self._mapped_errors(name))
        try:
            write(sink)
            with self._mapped_errors(name):
                writer.close()
        except BaseException:
            # Or the garbage collector would close it: send the rest, and commit. (`terminate` of
            # version 3.17 asks the wrong address; the service drops the session after a week.)
            writer._buffer.close()  # noqa: SLF001
            raise

    def compose(
        self, name: str, parts: Sequence[ObjectInfo], expected: ObjectInfo | None
    ) -> ObjectInfo:
        """Join up to 32 objects of the bucket to one, where it still holds `expected`."""
        with self._mapped_errors(name):
            blob = self._bucket.blob(self._prefix + name)
            blob.compose(
                [self._bucket.blob(self._prefix + part.name) for part in parts],
                if_source_generation_match=[part.generation for part in parts],
                if_generation_match=_generation(expected),
                **self._options,
            )
        return self._info(blob)

    def copy(self, name: str, target: str) -> None:
        """Copy an object within the bucket."""
        with self._mapped_errors(name):
            source = self._bucket.blob(self._prefix + name)
            token, *_ = (blob := self._bucket.blob(self._prefix + target)).rewrite(
                source, **self._options
            )
            while token is not None:
                token, *_ = blob.rewrite(source, token=token, **self._options)

    def put_bytes(self, name: str, data: bytes) -> ObjectInfo:
        """Write a small object."""
        with self._mapped_errors(name):
            blob = self._bucket.blob(self._prefix + name)
            blob.upload_from_string(data, checksum="crc32c", **self._options)
        return self._info(blob)

    def read_version(self, name: str) -> tuple[bytes, ObjectInfo]:
        """Return a small object's bytes and their generation, both of one answer."""
        with self._mapped_errors(name):
            blob = self._bucket.blob(self._prefix + name)
            data: bytes = blob.download_as_bytes(checksum="crc32c", **self._options)
        info = ObjectInfo(name, len(data), crc32c_of_bytes(data), int(blob.generation or 0))
        return data, info

    def put_bytes_if(self, name: str, data: bytes, expected: ObjectInfo | None) -> ObjectInfo:
        """Write a small object where the bucket still holds the generation of `expected`."""
        condition = {"if_generation_match": _generation(expected)}
        try:
            with self._mapped_errors(name):
                blob = self._bucket.blob(self._prefix + name)
                blob.upload_from_string(data, checksum="crc32c", **condition, **self._options)
        except ConflictError:
            # Where the answer to the first attempt was lost, the next one meets its own object.
            found = self.stat(name)
            if found is None or (found.size, found.crc32c) != (len(data), crc32c_of_bytes(data)):
                raise
            return found
        return self._info(blob)

    def delete(self, name: str) -> None:
        """Remove the object; one that does not exist is no error."""
        with contextlib.suppress(ObjectNotFoundError), self._mapped_errors(name):
            self._bucket.blob(self._prefix + name).delete(**self._options)

    def delete_if(self, name: str, expected: ObjectInfo) -> None:
        """Remove the object where the bucket still holds the generation of `expected`."""
        condition = {"if_generation_match": _generation(expected)}
        try:
            with contextlib.suppress(ObjectNotFoundError), self._mapped_errors(name):
                self._bucket.blob(self._prefix + name).delete(**condition, **self._options)
        except ConflictError:
            if self.stat(name) is not None:  # none: gone before, or the first answer was lost
                raise

    def deletion_notes(self) -> Sequence[str]:
        """Say what the bucket's settings do with objects that are deleted."""
        try:
            with self._mapped_errors(""):
                self._bucket.reload(**self._options)
        except StorageError as exc:
            return [f"The settings of {self.uri} cannot be read: {exc}"]
        return _describe_deletion(self._bucket)

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def _info(self, blob: Any) -> ObjectInfo:
        name = blob.name.removeprefix(self._prefix)
        return ObjectInfo(name, int(blob.size or 0), blob.crc32c, int(blob.generation or 0))

    @contextlib.contextmanager
    def _mapped_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as exc:  # every library underneath raises its own family
            raise _map_gcs_error(exc, f"{self.uri}/{name}" if name else self.uri) from exc


def _generation(expected: ObjectInfo | None) -> int:
    """Return the generation to ask for; 0 means that there is no object."""
    if expected is None:
        return 0
    if not expected.generation:
        raise StorageError(f"{expected.name}: the server did not say which version of it there is.")
    return expected.generation


def _describe_deletion(bucket: Any) -> list[str]:
    """Say what the settings of a bucket do with objects that are deleted."""
    notes = []
    if bucket.retention_period:
        lock = "locked" if bucket.retention_policy_locked else "not locked"
        notes.append(
            f"Retention policy ({lock}): objects younger than {_days(bucket.retention_period)} "
            "cannot be deleted."
        )
    if bucket.default_event_based_hold:
        notes.append("New objects are held: none can be deleted until its hold is released.")
    if bucket.object_retention_mode:
        notes.append("Objects may have a retention of their own, until which they stay.")
    soft_delete = bucket.soft_delete_policy.retention_duration_seconds
    if soft_delete:
        notes.append(
            f"Soft deletion: what is deleted can be restored for {_days(soft_delete)}, and is paid "
            "for until then."
        )
    if bucket.versioning_enabled:
        notes.append(
            "Object versioning: what is deleted stays as an older version, and is paid for."
        )
    rules = list(bucket.lifecycle_rules)
    if rules:
        actions = sorted({str(rule.get("action", {}).get("type")) for rule in rules})
        notes.append(f"Lifecycle rules: {len(rules)} ({', '.join(actions)}).")
    return notes or ["What is deleted is gone at once: no retention, soft deletion or versions."]


def _days(seconds: float) -> str:
    return f"{seconds / 86400:g} days"


def _build_gcs_client(meter: Meter) -> Any:
    # Or the client's first use asks for the bucket's own metadata in a thread nobody waits for.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    import google.auth
    import google.auth.exceptions
    from google.cloud import storage

    if os.environ.get("STORAGE_EMULATOR_HOST"):
        client = storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "emulator"))
    else:
        try:
            credentials, project = google.auth.default(scopes=storage.Client.SCOPE[:1])
            client = storage.Client(project=project or "none", credentials=credentials)
        except google.auth.exceptions.DefaultCredentialsError:
            client = storage.Client.create_anonymous_client()
    adapter = _build_adapter(meter)
    for scheme in ("https://", "http://"):
        client._http.mount(scheme, adapter)  # noqa: SLF001 - its session, there is no other way
    return client


class _MeteredBody:
    """The body of a request, read block by block as it is sent."""

    def __init__(self, data: bytes, meter: Meter) -> None:
        self._data, self._meter, self._position = memoryview(data), meter, 0

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int = SEND_BLOCK_BYTES) -> bytes:
        block = self._data[self._position : self._position + size]
        self._position += len(block)
        self._meter.pass_on(len(block))
        return bytes(block)


def _build_adapter(meter: Meter) -> Any:
    """Return what sends the bodies of requests in blocks.

    A body that is sent in one call has to be gone within the timeout, so that a slow line would
    look like a dead one. In blocks, the timeout is for each of them.
    """
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):  # type: ignore[misc]
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> Any:
            return super().init_poolmanager(*args, blocksize=SEND_BLOCK_BYTES, **kwargs)

        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(request.body, bytes):
                request.body = _MeteredBody(request.body, meter)
            return super().send(request, *args, **kwargs)

    return Adapter(pool_maxsize=POOL_CONNECTIONS)


def _gcs_request_options(retry_seconds: float) -> dict[str, Any]:
    from google.cloud.storage.retry import DEFAULT_RETRY

    # Every write here is idempotent: the same name gets the same bytes.
    return {
        "retry": DEFAULT_RETRY.with_timeout(retry_seconds),
        "timeout": (min(CONNECT_TIMEOUT_SECONDS, max(retry_seconds, 1.0)), READ_TIMEOUT_SECONDS),
    }


def _map_gcs_error(exc: Exception, where: str) -> StorageError:
    """Return the StorageError that tells callers what to do about a client library error."""
    import requests
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    cause = exc.cause if isinstance(exc, api.RetryError) and exc.cause else exc
    code = getattr(cause, "code", None)
    if isinstance(cause, InvalidResponse):
        code = cause.response.status_code
    detail = f"{where}: {_innermost_reason(cause)}"
    if code in (401, 403) or isinstance(
        cause,
        (auth.RefreshError, auth.InvalidOperation),  # the latter: anonymous and asked to log in
    ):
        return AccessDeniedError(detail)
    if code == 404:
        return ObjectNotFoundError(detail)
    if code in (409, 412):
        return ConflictError(detail)
    transient = (requests.exceptions.RequestException, OSError, auth.TransportError, DataCorruption)
    if code in (408, 429) or (isinstance(code, int) and code >= 500):
        return TransientStorageError(detail)
    if isinstance(cause, (*transient, api.RetryError)):
        return TransientStorageError(detail)
    return StorageError(detail)


def _innermost_reason(exc: BaseException) -> str:
    """Return one readable line; connection errors wrap their reason several times."""
    import requests

    if isinstance(exc, requests.exceptions.ConnectionError):
        inner: BaseException = exc
        while inner.__cause__ or inner.__context__:
            inner = inner.__cause__ or inner.__context__ or inner
        return f"no connection ({inner})."
    lines = str(exc).strip().splitlines()
    return lines[0][:300] if lines else type(exc).__name__
