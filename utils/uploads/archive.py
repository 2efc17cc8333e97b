"""A checkpoint as one archive, made as a stream.

    checkpoint directory (committed) -> archive -> bucket, verified

Plain `tar xf` reads it. The same files give the same bytes, with any number of threads: names
sorted, times, owners and modes fixed. Size and crc32c are computed on the way, and every file is
compared with its manifest as it is read. Float weights hardly compress at any level, so time
decides. No torch here.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import google_crc32c

from utils.base.archive_formats import BLOCK_BYTES, COMPRESSIONS
from utils.base.errors import CheckpointError
from utils.base.files import pass_by_cache
from utils.checkpoints.layout import MANIFEST_FILE, FileEntry, Manifest
from utils.storage.bucket import encode_crc32c

FILE_MODE = 0o644

OnRead = Callable[[int], None]
"""Called with bytes of the checkpoint that were read."""


class _HashingReader:
    """Passes a file's bytes on and keeps their count and checksum.

    They come past the page cache where they can: a checkpoint is not in it (`DurableFile`), and to
    put it there would cost the CPU time that its save has spared.
    """

    def __init__(self, source: io.FileIO, what: str, on_read: OnRead) -> None:
        self._source, self._what, self._on_read = source, what, on_read
        self._block = memoryview(mmap.mmap(-1, BLOCK_BYTES))  # aligned to pages
        self._is_direct = pass_by_cache(source)
        self._size = self._checksum = 0

    def read(self, size: int) -> bytes:
        try:
            data = self._read(size)
        except OSError as exc:
            raise CheckpointError(f"{self._what} cannot be read: {exc.strerror}.") from exc
        if len(data) < size:  # tarfile asks for what the file had when it was opened
            raise CheckpointError(f"{self._what} became shorter while it was read.")
        self._size += len(data)
        self._checksum = google_crc32c.extend(self._checksum, data)
        self._on_read(len(data))
        return data

    def _read(self, size: int) -> bytes:
        """Return `size` bytes, or those up to the end; tarfile asks for a block at most."""
        filled = 0
        while filled < size:
            try:
                count = self._source.readinto(self._block[filled:])
            except OSError as exc:
                if exc.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._is_direct = pass_by_cache(self._source, is_wanted=False)
                continue
            if not count:
                break
            filled += count
        return bytes(self._block[: min(filled, size)])

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self._size, encode_crc32c(self._checksum))


class _HashingWriter:
    """Passes bytes on and keeps their count and checksum, until the sink fails.

    The error is kept for `raise_error` and the bytes after it are dropped: igzip's writer cannot be
    closed after an error at its beginning, and complains about that when it is freed.
    """

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self._size = self._checksum = 0
        self._error: Exception | None = None

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                self._write(bytes(data))
            except Exception as exc:  # noqa: BLE001
                self._error = exc
        return len(data)

    def flush(self) -> None:
        """Do nothing: whoever made the sink closes it."""

    def raise_error(self) -> None:
        """Raise what the sink raised, if it did."""
        if self._error is not None:
            raise self._error

    def _write(self, data: bytes) -> None:
        written = self._sink.write(data)
        if written != len(data):
            raise OSError(f"short write: {written} of {len(data)} bytes")
        self._size += written
        self._checksum = google_crc32c.extend(self._checksum, data)

    @property
    def info(self) -> FileEntry:
        return FileEntry(self._size, encode_crc32c(self._checksum))


class _Positioned:
    """Knows its position, which is all that tarfile asks of a file that it cannot seek in."""

    def __init__(self, compressed: Any, writer: _HashingWriter) -> None:
        self._compressed, self._writer, self._position = compressed, writer, 0

    def write(self, data: bytes) -> int:
        self._compressed.write(data)
        self._writer.raise_error()
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position


def write_archive(
    checkpoint: Path,
    manifest: Manifest,
    sink: IO[bytes],
    *,
    compression: str = "fast",
    threads: int = 1,
    on_read: OnRead = lambda count: None,
) -> FileEntry:
    """Write the files that a checkpoint's manifest names, and itself, as an archive to `sink`.

    The bytes do not depend on the number of `threads` that compress.

    Raises:
        OSError: The sink cannot be written.
        CheckpointError: A file cannot be read, or is not what was committed; "verified" must not
            be said of it.
    """
    writer = _HashingWriter(sink)
    target: Any = writer
    with COMPRESSIONS[compression].open_write(target, threads) as compressed:
        file: Any = _Positioned(compressed, writer)
        with tarfile.TarFile(
            fileobj=file, mode="w", format=tarfile.PAX_FORMAT, copybufsize=BLOCK_BYTES
        ) as archive:
            for name in [*sorted(manifest.files), MANIFEST_FILE]:
                _add_file(archive, checkpoint, name, manifest.files.get(name), on_read)
    writer.raise_error()
    return writer.info


def _add_file(
    archive: tarfile.TarFile, checkpoint: Path, name: str, entry: FileEntry | None, on_read: OnRead
) -> None:
    what = f"{checkpoint.name}: {name}"
    member = tarfile.TarInfo(f"{checkpoint.name}/{name}")
    member.mode = FILE_MODE
    try:
        file = (checkpoint / name).open("rb", buffering=0)
    except OSError as exc:
        raise CheckpointError(f"{what} cannot be read: {exc.strerror}.") from exc
    with file:
        member.size = os.fstat(file.fileno()).st_size
        reader: Any = _HashingReader(file, what, on_read)
        archive.addfile(member, reader)
    if entry is not None and reader.entry != entry:
        raise CheckpointError(f"{what} is damaged (not what its manifest says).")
