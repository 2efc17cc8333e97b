"""Opens buckets: where shards come from and archives go to.

A URI is `gs://bucket/prefix` or a directory (also a mounted one). Each is a `Bucket`: named
objects with a size and a crc32c, listed by prefix, read whole or by range, written whole. Nothing
else in the project cares which of them it holds: another kind of bucket is a file beside this one
and a line in `utils.base.uri.BUCKETS`.

Guarantees: an object appears whole or not at all; a finished `put_file` was checked by size and
crc32c; a conditional write never replaces what its writer has not seen; every failure is one of
the `StorageError` classes, so callers can tell what is worth trying again.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path

from utils.base.uri import BUCKETS, require_place, scheme_of
from utils.storage.bucket import DEFAULT_RETRY_SECONDS, Bucket, Meter
from utils.storage.directory import DirectoryBucket


def open_bucket(
    uri: str,
    user_project: str | None = None,
    retry_seconds: float = DEFAULT_RETRY_SECONDS,
    meter: Meter | None = None,
) -> Bucket:
    """Return the bucket of a URI, whose requests `user_project` pays for, where one is named.

    `retry_seconds` is how long an operation over a network is tried again on transient errors.

    Raises:
        UsageError: The URI is empty or of an unknown scheme.
    """
    require_place(uri)
    meter = meter or Meter()
    scheme = scheme_of(uri)
    if scheme is not None:
        bucket: Bucket = pkgutil.resolve_name(BUCKETS[scheme])(
            uri, user_project, retry_seconds, meter
        )
        return bucket
    return DirectoryBucket(Path(uri), meter)
