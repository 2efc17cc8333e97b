"""One object of a gs:// bucket, uploaded as parts over several connections.

    bytes -> parts of 32 MiB in the bucket, in parallel -> composed to one object -> parts removed

One stream into Cloud Storage is bound by its round trips; several are not. A part is known by the
object's name and its number, so an upload that was killed goes on with the parts that are there
already: the same bytes make the same parts. The object appears by one compose request with a
precondition. `remove_parts` takes away what a finished or given up upload leaves. A bucket whose
objects cannot be deleted must not be written in this way. No torch here.

Source: https://cloud.google.com/storage/docs/composite-objects
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from utils.base.errors import (
    ConflictError,
    ObjectNotFoundError,
    TransientStorageError,
)
from utils.storage.bucket import ObjectInfo, WriteStream, crc32c_of_bytes
from utils.storage.gcs import GcsBucket

PART_BYTES = 32 * 2**20
MAX_COMPOSED = 32
PARTS_FOLDER = ".parts"
REMOVALS = 8


def parts_prefix(name: str) -> str:
    """Return where the parts of an object lie."""
    path = PurePosixPath(name)
    return f"{path.parent / PARTS_FOLDER / path.name}/"


def put_parallel(
    bucket: GcsBucket,
    name: str,
    write: WriteStream,
    expected: ObjectInfo | None,
    *,
    streams: int,
    part_bytes: int = PART_BYTES,
) -> None:
    """Write what `write` writes, where the bucket still holds `expected`.

    In memory are at most `streams` + 1 parts. Parts that were not composed stay, for the next try.

    Raises:
        ConflictError: Another version is there, or none; it was not changed.
        StorageError: A part could not be written; transient where one was removed meanwhile.
    """
    parts = _Parts(bucket, name, streams, part_bytes)
    with parts.pool:  # nothing waits in it: no more parts are under way than it has threads
        sink: Any = parts
        write(sink)
        parts.close()
    uploaded = parts.uploaded()
    try:
        _compose(bucket, name, uploaded, expected)
    except ObjectNotFoundError as exc:  # the next try sends the parts that are not there
        raise TransientStorageError(f"a part was removed before it was composed: {exc}") from exc


def remove_parts(bucket: GcsBucket, prefix: str, keep: Iterable[str] = ()) -> None:
    """Remove the parts below a prefix, but for those of the objects in `keep`.

    The first that cannot be removed ends it.

    Raises:
        StorageError: They cannot be listed or removed.
    """
    kept = tuple(parts_prefix(name) for name in keep)
    doomed = [info.name for info in bucket.list(prefix) if not info.name.startswith(kept)]
    with ThreadPoolExecutor(REMOVALS, "parts") as pool:
        list(pool.map(bucket.delete, doomed))  # an error cancels what has not begun


class _Parts:
    """A binary file whose bytes become parts in the bucket."""

    def __init__(self, bucket: GcsBucket, name: str, streams: int, part_bytes: int) -> None:
        self.pool = ThreadPoolExecutor(streams, "parts")
        self._bucket, self._prefix, self._part_bytes = bucket, parts_prefix(name), part_bytes
        self._present = {info.name: info for info in bucket.list(self._prefix)}
        self._free = threading.Semaphore(streams)
        self._buffer = bytearray()
        self._futures: list[Future[ObjectInfo]] = []
        self._error: BaseException | None = None

    def write(self, data: bytes) -> int:
        """Take bytes; waits while as many parts as allowed are under way."""
        view = memoryview(data)
        while view:
            room = self._part_bytes - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == self._part_bytes:
                self._submit()
        return len(data)

    def close(self) -> None:
        """Send the last part."""
        if self._buffer or not self._futures:
            self._submit()

    def uploaded(self) -> list[ObjectInfo]:
        """Return the parts in order.

        Raises:
            StorageError: One could not be written.
        """
        parts = [future.result() for future in self._futures]
        if self._error is not None:
            raise self._error
        return parts

    def _submit(self) -> None:
        self._free.acquire()
        if self._error is not None:
            raise self._error
        data, self._buffer = bytes(self._buffer), bytearray()
        name = f"{self._prefix}{len(self._futures):05d}"
        self._futures.append(self.pool.submit(self._upload, name, data))

    def _upload(self, name: str, data: bytes) -> ObjectInfo:
        present = self._present.get(name)
        try:
            found = (present.size, present.crc32c) if present else None
            if self._error is None and found != (len(data), crc32c_of_bytes(data)):
                return self._bucket.put_bytes(name, data)
        except BaseException as exc:  # noqa: BLE001 - raised by the thread that writes
            self._error = self._error or exc
        finally:
            self._free.release()
        return present or ObjectInfo(name, 0)


def _compose(
    bucket: GcsBucket, name: str, parts: list[ObjectInfo], expected: ObjectInfo | None
) -> None:
    """Join the parts, 32 at a time, to the object."""
    level = 0
    while len(parts) > MAX_COMPOSED:
        groups = [parts[at : at + MAX_COMPOSED] for at in range(0, len(parts), MAX_COMPOSED)]
        names = [f"{parts_prefix(name)}joined-{level}-{n:05d}" for n in range(len(groups))]
        with ThreadPoolExecutor(REMOVALS, "compose") as pool:
            parts = list(pool.map(_join, [bucket] * len(groups), names, groups))
        level += 1
    bucket.compose(name, parts, expected)


def _join(bucket: GcsBucket, name: str, group: list[ObjectInfo]) -> ObjectInfo:
    try:
        return bucket.compose(name, group, bucket.stat(name))
    except ConflictError:  # where the answer was lost, the next attempt meets its own object
        return bucket.compose(name, group, bucket.stat(name))
