"""Buckets and objects: the state of the service, safe to use from many threads.

Object records are frozen; a change replaces the record under the store's lock, and every new
version of an object gets a higher generation, also when the clock stands still or goes back.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from .blobs import Blob, BlobWriter
from .errors import ApiError

READ_PERMISSIONS = frozenset({"storage.buckets.get", "storage.objects.get", "storage.objects.list"})
WRITE_PERMISSIONS = frozenset({"storage.objects.create", "storage.objects.delete"})


@dataclass(frozen=True)
class StoredObject:
    """The live version of an object."""

    bucket: str
    name: str
    generation: int
    blob: Blob
    content_type: str
    created: datetime

    @property
    def size(self) -> int:
        return self.blob.size


@dataclass
class Bucket:
    """A bucket; `permissions` are those of the caller, whoever it is."""

    name: str
    created: datetime
    permissions: frozenset[str]
    requester_pays: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the bucket as the API writes them, such as `retentionPolicy`."""
    objects: dict[str, StoredObject] = field(default_factory=dict)

    def require(self, permission: str) -> None:
        """Raise 403 unless the caller has the permission."""
        if permission and permission not in self.permissions:
            message = f"The caller does not have {permission} access to the bucket {self.name}."
            raise ApiError(403, message)


class Store:
    """All buckets, and the folder that holds the bytes of their objects."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._lock = threading.RLock()
        self._buckets: dict[str, Bucket] = {}
        self._file_numbers = itertools.count()
        self._last_generation = 0

    def create_bucket(
        self,
        name: str,
        *,
        writable: bool,
        without: Collection[str],
        requester_pays: bool,
        fields: Mapping[str, Any],
    ) -> None:
        """Make an empty bucket in place of any of that name."""
        permissions = READ_PERMISSIONS | (WRITE_PERMISSIONS if writable else frozenset())
        created = datetime.now(UTC)
        bucket = Bucket(name, created, permissions - set(without), requester_pays, fields)
        with self._lock:
            self._buckets[name] = bucket

    def bucket(self, name: str) -> Bucket:
        with self._lock:
            found = self._buckets.get(name)
        if found is None:
            raise ApiError(404, "The specified bucket does not exist.")
        return found

    def new_writer(self, *, composite: bool = False) -> BlobWriter:
        """A file for bytes that will become an object."""
        path = self._directory / f"{next(self._file_numbers):08d}.blob"
        return BlobWriter(path, composite=composite)

    def find(self, bucket: str, name: str) -> StoredObject | None:
        with self._lock:
            return self.bucket(bucket).objects.get(name)

    def get(self, bucket: str, name: str, generation: int | None = None) -> StoredObject:
        """The live version, or 404, also when it is not the generation that is asked for."""
        found = self.find(bucket, name)
        if found is None or generation not in (None, found.generation):
            raise ApiError(404, f"No such object: {bucket}/{name}")
        return found

    def names(self, bucket: str) -> list[str]:
        with self._lock:
            return sorted(self.bucket(bucket).objects)

    def open(self, stored: StoredObject) -> BinaryIO:
        """Open the bytes; they stay readable when the object is replaced meanwhile."""
        try:
            return stored.blob.path.open("rb")
        except FileNotFoundError as exc:
            raise ApiError(404, f"No such object: {stored.bucket}/{stored.name}") from exc

    def commit(
        self,
        bucket: str,
        name: str,
        blob: Blob,
        content_type: str | None = None,
        expected: int | None = None,
    ) -> StoredObject:
        """Make the bytes the live version; on an error (403, 412) they are removed."""
        with self._lock:
            try:
                existing = self.require_generation(bucket, name, expected)
                if existing is not None:
                    self.bucket(bucket).require("storage.objects.delete")
            except ApiError:
                blob.path.unlink(missing_ok=True)
                raise
            now = datetime.now(UTC)
            generation = max(self._last_generation + 1, int(now.timestamp() * 1_000_000))
            self._last_generation = generation
            kind = content_type or "application/octet-stream"
            stored = StoredObject(bucket, name, generation, blob, kind, now)
            self.bucket(bucket).objects[name] = stored
            if existing is not None:
                existing.blob.path.unlink(missing_ok=True)
            return stored

    def delete(
        self, bucket: str, name: str, generation: int | None = None, expected: int | None = None
    ) -> None:
        """Remove the live version and its bytes."""
        with self._lock:
            self.require_generation(bucket, name, expected)
            stored = self.get(bucket, name, generation)
            del self.bucket(bucket).objects[name]
            stored.blob.path.unlink(missing_ok=True)

    def clear(self) -> None:
        with self._lock:
            self._buckets.clear()
            for path in self._directory.glob("*.blob"):
                path.unlink(missing_ok=True)

    def require_generation(
        self, bucket: str, name: str, expected: int | None
    ) -> StoredObject | None:
        """Return the live version, or 412 where it is not the expected one (0: none at all)."""
        existing = self.find(bucket, name)
        generation = existing.generation if existing else 0
        if expected not in (None, generation):
            message = "At least one of the pre-conditions you specified did not hold."
            raise ApiError(412, f"{message} {expected} expected, but it is {generation}.")
        return existing
