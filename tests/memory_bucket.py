"""A third kind of bucket, `mem://bucket/prefix`: the objects of this process.

    monkeypatch.setitem(BUCKETS, "mem", "tests.memory_bucket:MemoryBucket")

That line and this file are all that a kind of bucket takes.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.base.errors import ConflictError, ObjectNotFoundError, UsageError
from utils.storage.bucket import Meter, ObjectInfo, WriteStream, crc32c_of_bytes

STORED: defaultdict[str, dict[str, tuple[bytes, int]]] = defaultdict(dict)
"""Bucket -> full object name -> (bytes, generation)."""
_generations = itertools.count(1)
_lock = threading.RLock()


class MemoryBucket:
    """Named objects in a dictionary; a version is its generation."""

    def __init__(
        self, uri: str, user_project: str | None, retry_seconds: float, meter: Meter
    ) -> None:
        name, _, prefix = uri.removeprefix("mem://").partition("/")
        if not name:
            raise UsageError(f"{uri!r} names no bucket: use mem://bucket/prefix.")
        self.uri = uri.rstrip("/")
        self._objects, self._meter = STORED[name], meter
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with _lock:
            names = sorted(self._objects)
        for full in names:
            name = full.removeprefix(self._prefix)
            if full.startswith(self._prefix + prefix) and (info := self.stat(name)) is not None:
                yield info

    def stat(self, name: str) -> ObjectInfo | None:
        found = self._objects.get(self._prefix + name)
        if found is None:
            return None
        data, generation = found
        return ObjectInfo(name, len(data), crc32c_of_bytes(data), generation)

    def crc32c(self, name: str) -> str:
        return crc32c_of_bytes(self.read_bytes(name))

    def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        found = self._objects.get(self._prefix + name)
        if found is None:
            raise ObjectNotFoundError(f"{self.uri}/{name} does not exist.")
        return found[0][start : None if length is None else start + length]

    def get_file(self, name: str, path: Path) -> str:
        path.write_bytes(self.read_bytes(name))
        return self.crc32c(name)

    def fetch(self, name: str, scratch: Path) -> Path:
        self.get_file(name, scratch)
        return scratch

    def put_file(self, name: str, path: Path) -> ObjectInfo:
        return self.put_bytes(name, path.read_bytes())

    def put_stream(self, name: str, write: WriteStream, expected: ObjectInfo | None) -> None:
        memory = io.BytesIO()
        write(memory)
        self.put_bytes_if(name, memory.getvalue(), expected)

    def copy(self, name: str, target: str) -> None:
        self.put_bytes(target, self.read_bytes(name))

    def put_bytes(self, name: str, data: bytes) -> ObjectInfo:
        self._meter.pass_on(len(data))
        generation = next(_generations)
        self._objects[self._prefix + name] = (bytes(data), generation)
        return ObjectInfo(name, len(data), crc32c_of_bytes(data), generation)

    def read_version(self, name: str) -> tuple[bytes, ObjectInfo]:
        with _lock:
            data, info = self.read_bytes(name), self.stat(name)
        assert info is not None
        return data, info

    def put_bytes_if(self, name: str, data: bytes, expected: ObjectInfo | None) -> ObjectInfo:
        with _lock:
            self._require(name, expected)
            return self.put_bytes(name, data)

    def delete(self, name: str) -> None:
        self._objects.pop(self._prefix + name, None)

    def delete_if(self, name: str, expected: ObjectInfo) -> None:
        with _lock:
            if self.stat(name) is not None:
                self._require(name, expected)
                self.delete(name)

    def deletion_notes(self) -> Sequence[str]:
        return ["In memory: what is deleted is gone at once."]

    def close(self) -> None:
        """Nothing to release."""

    def _require(self, name: str, expected: ObjectInfo | None) -> None:
        found = self.stat(name)
        if (found and found.generation) != (expected and expected.generation):
            raise ConflictError(f"{self.uri}/{name} was changed by another process.")
