"""Buckets and objects: the state of the service, safe to use from many threads.

Object records are frozen; a change replaces the record under the store's lock, and every new
version of an object gets a higher generation, also when the clock stands still or goes back.
Bytes are in files, hashed while they stream in; those of uploads that fail stay until the end.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from .errors import ApiError

BLOCK_BYTES = 1 << 20
READ_PERMISSIONS = frozenset({"storage.buckets.get", "storage.objects.get", "storage.objects.list"})
WRITE_PERMISSIONS = frozenset({"storage.objects.create", "storage.objects.delete"})


@dataclass(frozen=True)
class Blob:
    """A finished file, with its hashes as in the API; composed ones, too, have an MD5 here."""

    path: Path
    size: int
    crc32c: str
    md5: str


class BlobWriter:
    """A file being written; `size` is what has been written and hashed so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch()
        self.size = self._crc32c = 0
        self._md5 = hashlib.md5(usedforsecurity=False)  # which gcloud asks for

    def write(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)
        self._md5.update(data)
        self.size += len(data)

    def finish(self) -> Blob:
        crc32c = base64.b64encode(self._crc32c.to_bytes(4, "big")).decode()
        return Blob(self.path, self.size, crc32c, base64.b64encode(self._md5.digest()).decode())


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
        writable: bool = True,
        without: Collection[str] = (),
        requester_pays: bool = False,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        """Make an empty bucket in place of any of that name.

        Args:
            name: Its name.
            writable: Whether clients may create, change and delete objects.
            without: Permissions that are lacking besides, such as `storage.objects.delete`
                (which overwriting needs too) or `storage.buckets.get`.
            requester_pays: Whether requests without a user project are refused.
            fields: Settings that `buckets.get` tells, such as `retentionPolicy`.
        """
        permissions = READ_PERMISSIONS | (WRITE_PERMISSIONS if writable else frozenset())
        created = datetime.now(UTC)
        bucket = Bucket(name, created, permissions - set(without), requester_pays, fields or {})
        with self._lock:
            self._buckets[name] = bucket

    def bucket(self, name: str) -> Bucket:
        with self._lock:
            found = self._buckets.get(name)
        if found is None:
            raise ApiError(404, "The specified bucket does not exist.")
        return found

    def new_writer(self) -> BlobWriter:
        """A file for bytes that will become an object."""
        return BlobWriter(self._directory / f"{next(self._file_numbers):08d}.blob")

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
        """Make the bytes the live version, or raise 403 or 412."""
        with self._lock:
            existing = self.require_generation(bucket, name, expected)
            if existing is not None:
                self.bucket(bucket).require("storage.objects.delete")
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
