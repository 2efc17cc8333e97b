"""What was tokenized before, by content hash, so that it is not tokenized again.

    text --> batches --> hash of text and tokenizer --> DIRECTORY/ab/abcdef... (ids)

An entry is written under a temporary name and renamed, and carries its checksum: a process that
is killed, or two at once, leave nothing that could be taken for an entry. The directory is kept
below a limit; what was not used for longest goes first. Nothing depends on the cache: where it
cannot be read or written, the text is tokenized.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import uuid
from pathlib import Path

import google_crc32c

from utils.storage.directory import TEMPORARY_PREFIX

TEMPORARY_SECONDS = 3600.0
CHECKSUM_BYTES = 4
FULL_SHARE = 0.9

_KEY = re.compile(r"[0-9a-f]{8,128}")
_logger = logging.getLogger(__name__)


class TokenCache:
    """A bounded directory of entries.

    The directory is made when something is kept. The entries together stay below `limit_bytes`.
    """

    def __init__(self, directory: Path, limit_bytes: int = 10**10) -> None:
        self.directory = directory
        self.num_hits = 0
        self.num_misses = 0
        self._limit_bytes = limit_bytes
        self._is_writable = True
        self._total_bytes = sum(size for _, size, _ in self._scan())
        if self._total_bytes > limit_bytes:
            self._evict()

    def get(self, key: str) -> bytes | None:
        """Return what was put under the key, or None where it is not there whole."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            self.num_misses += 1
            return None
        checksum, content = data[:CHECKSUM_BYTES], data[CHECKSUM_BYTES:]
        if google_crc32c.value(content).to_bytes(CHECKSUM_BYTES, "big") != checksum:
            path.unlink(missing_ok=True)
            self.num_misses += 1
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        self.num_hits += 1
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep the content; where the disk refuses, warn once and keep nothing more."""
        size = len(content) + CHECKSUM_BYTES
        if not self._is_writable or size > self._limit_bytes:
            return
        path = self._path(key)
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(google_crc32c.value(content).to_bytes(CHECKSUM_BYTES, "big"))
                file.write(content)
            temporary.replace(path)
        except OSError as exc:
            self._is_writable = False
            _logger.warning("Token cache %s: %s. Going on without.", self.directory, exc.strerror)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return
        self._total_bytes += size
        if self._total_bytes > self._limit_bytes:
            self._evict()

    def _path(self, key: str) -> Path:
        assert _KEY.fullmatch(key)
        return self.directory / key[:2] / key

    def _scan(self) -> list[tuple[float, int, Path]]:
        """Return (last use, bytes, path) of the entries; removes what killed processes left."""
        found = []
        for path in self.directory.glob("??/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                if _KEY.fullmatch(path.name):
                    found.append((status.st_mtime, status.st_size, path))
                elif (
                    path.name.startswith(TEMPORARY_PREFIX)
                    and time.time() - status.st_mtime > TEMPORARY_SECONDS
                ):
                    path.unlink()
        return found

    def _evict(self) -> None:
        entries = sorted(self._scan())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= FULL_SHARE * self._limit_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size
        self._total_bytes = total
