"""Bytes of objects: files whose hashes are computed while the bytes stream in.

Nothing is held in memory beyond one block, so that a body of a gigabyte costs its hashing
(about 2 s, nearly all of it MD5) and no more.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Blob:
    """A finished file. Hashes are base64 as in the API; `md5` is None for composite objects."""

    path: Path
    size: int
    crc32c: str
    md5: str | None


class BlobWriter:
    """A file being written; `size` is what has been written and hashed so far.

    As a context manager it removes the file, unless `finish` was called within the block.
    """

    def __init__(self, path: Path, *, composite: bool = False) -> None:
        """Create the file; the service keeps no MD5 of composite objects."""
        self.path = path
        self.size = 0
        self._file = path.open("wb")
        self._md5 = None if composite else hashlib.md5(usedforsecurity=False)
        self._crc32c = 0
        self._finished = False

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the file if it was not finished."""
        if not self._finished:
            self.discard()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        if self._md5 is not None:
            self._md5.update(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)
        self.size += len(data)

    def finish(self) -> Blob:
        self._file.close()
        self._finished = True
        md5 = base64.b64encode(self._md5.digest()).decode() if self._md5 else None
        crc32c = base64.b64encode(self._crc32c.to_bytes(4, "big")).decode()
        return Blob(self.path, self.size, crc32c, md5)

    def discard(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def iterate_blocks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a file, block by block."""
    while block := file.read(BLOCK_BYTES):
        yield block
