"""Buckets: where shards come from and archives go to.

A URI is `gs://bucket/prefix` or a directory (also a mounted one). Both are a `Bucket`: named
objects with a size and a crc32c, listed by prefix, read whole or by range, written whole. Nothing
else in the project cares which of the two it holds.

Guarantees: an object appears whole or not at all; a finished `put_file` was checked by size and
crc32c; a conditional write never replaces what its writer has not seen; every failure is one of
the `StorageError` classes, so callers can tell what is worth trying again.
"""

from __future__ import annotations

from pathlib import Path

from utils.base.errors import UsageError
from utils.base.uri import PLACES, is_gcs_uri, join_uri, normalize_uri, require_place
from utils.storage.bucket import (
    DEFAULT_RETRY_SECONDS,
    READ_BLOCK_BYTES,
    Bucket,
    Meter,
    Nowhere,
    ObjectInfo,
    StreamSink,
    WriteStream,
    crc32c_of_bytes,
    crc32c_of_file,
    encode_crc32c,
    fsync_directory,
    map_file_error,
    mapped_file_errors,
    metered_blocks,
)
from utils.storage.directory import TEMPORARY_PREFIX, DirectoryBucket
from utils.storage.gcs import GcsBucket

__all__ = [
    "Bucket",
    "DEFAULT_RETRY_SECONDS",
    "DirectoryBucket",
    "GcsBucket",
    "Meter",
    "Nowhere",
    "ObjectInfo",
    "READ_BLOCK_BYTES",
    "StreamSink",
    "TEMPORARY_PREFIX",
    "WriteStream",
    "crc32c_of_bytes",
    "crc32c_of_file",
    "encode_crc32c",
    "fsync_directory",
    "is_gcs_uri",
    "join_uri",
    "map_file_error",
    "mapped_file_errors",
    "metered_blocks",
    "normalize_uri",
    "open_bucket",
]


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
    require_place(uri)
    if is_gcs_uri(uri):
        return GcsBucket(uri, user_project, retry_seconds, meter or Meter())
    if not uri:
        raise UsageError(f"{uri!r} is no bucket: give {PLACES}.")
    return DirectoryBucket(Path(uri), meter)
