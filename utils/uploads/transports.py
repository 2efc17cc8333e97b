"""Ways for an archive to reach the bucket: one small protocol, a class for each way.

    python     the bucket's own methods: streams; into gs:// also in parallel parts
    gcloud     the `gcloud storage` command: streams through its standard input
    gsutil     the `gsutil` command: from a local archive, so that it can resume within it
    directory  a directory, also a mounted one: streams into it

`python` and `directory` are here, the commands in `command_transports.py`. Every write names the
version that it replaces. No torch here.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Protocol

from utils.base.errors import ObjectNotFoundError
from utils.storage.bucket import Meter, ObjectInfo, WriteStream
from utils.storage.directory import STREAM_SUFFIX, TEMPORARY_PREFIX, DirectoryBucket
from utils.storage.gcs import GcsBucket
from utils.storage.open import open_bucket
from utils.uploads.parallel_upload import PARTS_FOLDER, parts_prefix, put_parallel, remove_parts

STALL_SECONDS = 120.0
RETRY_SECONDS = 60.0  # within one request; what fails then is tried again from the start
SMALL_BYTES = 8 * 2**20


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
