"""What every bucket is: named objects with a size and a crc32c, under one URI.

Nothing here knows which kinds of buckets there are (`utils/storage/open.py` opens each). Checksums
are written as Google Cloud Storage writes them: base64 of the big-endian crc32c
(https://cloud.google.com/storage/docs/hashes-etags).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import google_crc32c

from utils.base.errors import StorageError, TransientStorageError

READ_BLOCK_BYTES = 4 * 2**20
DEFAULT_RETRY_SECONDS = 120.0
SEND_BLOCK_BYTES = 256 * 1024
# A full disk may be emptied, a mounted one come back.
PASSING_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
    *(errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
}


@dataclass(frozen=True)
class ObjectInfo:
    """What a bucket says about one object.

    Attributes:
        name: Name relative to the bucket's prefix, with `/` separators.
        crc32c: Base64 checksum, or None where the bucket keeps none (directories).
        generation: What tells versions of it apart: its generation on gs://, the time of its last
            change (ns) in a directory; None where unknown.
    """

    name: str
    size: int
    crc32c: str | None = None
    generation: int | None = None


class Meter:
    """Counts bytes on their way to a bucket and holds them to a rate; threads may share one."""

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
"""Writes an object's bytes into what it is given, by its `write` alone."""


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
        `expected` is None where there is to be no object.

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


def map_file_error(exc: OSError, what: str) -> StorageError:
    """Return the StorageError that says whether an error of a file is worth trying again."""
    kind = TransientStorageError if exc.errno in PASSING_ERRORS else StorageError
    return kind(f"{what}: {exc.strerror or exc}.")


@contextlib.contextmanager
def mapped_file_errors(what: str) -> Iterator[None]:
    """Raise errors of files of this machine as StorageErrors; `what` begins their message."""
    try:
        yield
    except OSError as exc:
        raise map_file_error(exc, what) from exc


def metered_blocks(data: bytes, meter: Meter) -> Iterator[memoryview]:
    """Yield data in blocks that are sent one at a time, each when the meter allows it."""
    view = memoryview(data)
    for start in range(0, len(view), SEND_BLOCK_BYTES):
        block = view[start : start + SEND_BLOCK_BYTES]
        meter.pass_on(len(block))
        yield block


class Nowhere:
    """Takes any bytes and forgets them."""

    def write(self, data: bytes, /) -> int:
        """Take all of it."""
        return len(data)


MappedErrors = Callable[[], contextlib.AbstractContextManager[None]]


class StreamSink:
    """What a stream is written into: its errors are the bucket's, those of the writer pass by."""

    def __init__(self, file: IO[bytes], mapped_errors: MappedErrors) -> None:
        self._file, self._mapped_errors = file, mapped_errors

    def write(self, data: bytes) -> int:
        """Write all of it."""
        with self._mapped_errors():
            return self._file.write(data)


def write_file(
    path: Path,
    write: WriteStream,
    mapped_errors: MappedErrors,
    wrap: Callable[[IO[bytes]], Any] = lambda file: file,
) -> None:
    """Write a file through `wrap`; its errors are mapped, those of `write` pass by."""
    with mapped_errors():
        file = path.open("wb")
    try:
        sink: Any = StreamSink(wrap(file), mapped_errors)
        write(sink)
        with mapped_errors():
            file.close()
    finally:
        with contextlib.suppress(OSError):
            file.close()
