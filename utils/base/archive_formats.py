"""How an archive is compressed: a class for each format, a line for each value of the setting.

The formats know files alone. Their libraries are loaded when they are used.
"""

from __future__ import annotations

import contextlib
import gzip
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, cast

BLOCK_BYTES = 2**20
# What every reader of zstd must take (RFC 8878, 3.1.1.1.2); a hostile frame may ask for more.
MAX_WINDOW_BYTES = 8 * 2**20
FAST_LEVEL = 1  # of igzip


class ArchiveFormat(ABC):
    """One way to compress a tar; the same bytes give the same bytes, with any number of threads."""

    suffix: ClassVar[str]
    """End of an archive's name."""

    @abstractmethod
    def open_write(self, sink: IO[bytes], threads: int) -> AbstractContextManager[Any]:
        """Return a file whose bytes go to `sink`, compressed."""

    @abstractmethod
    def open_read(self, source: Path | IO[bytes]) -> AbstractContextManager[IO[bytes]]:
        """Return a file with the unpacked bytes, read in order.

        Raises:
            tarfile.ReadError: They are damaged.
        """


@dataclass(frozen=True)
class Gzip(ArchiveFormat):
    """By igzip, at a level of its own: 1 to 3, or 0 for stored."""

    suffix: ClassVar[str] = ".tar.gz"
    level: int

    @contextlib.contextmanager
    def open_write(self, sink: IO[bytes], threads: int) -> Iterator[Any]:
        """Return a file whose bytes go to `sink`, compressed."""
        if self.level == 0:  # which igzip does not have
            with gzip.GzipFile("", "wb", 0, sink, mtime=0) as stored:
                yield stored
            return
        from isal import igzip_threaded

        with igzip_threaded.open(
            sink, "wb", compresslevel=self.level, threads=threads, block_size=BLOCK_BYTES
        ) as compressed:
            yield compressed

    @contextlib.contextmanager
    def open_read(self, source: Path | IO[bytes]) -> Iterator[IO[bytes]]:
        """Return a file with the unpacked bytes."""
        from isal import igzip, igzip_lib

        isal_error = cast("type[Exception]", igzip_lib.IsalError)  # its stub calls it an instance
        try:
            with igzip.open(source, "rb") as unpacked:
                yield unpacked
        except (EOFError, gzip.BadGzipFile, zlib.error, isal_error) as exc:
            raise tarfile.ReadError(str(exc)) from exc


@dataclass(frozen=True)
class Zstd(ArchiveFormat):
    """By zstandard, at one of its levels."""

    suffix: ClassVar[str] = ".tar.zst"
    level: int

    @contextlib.contextmanager
    def open_write(self, sink: IO[bytes], threads: int) -> Iterator[Any]:
        """Return a file whose bytes go to `sink`, compressed."""
        import zstandard

        # Without any thread of its own, it would write other bytes than with one or more.
        compressor = zstandard.ZstdCompressor(
            self.level, threads=max(1, threads), write_checksum=True
        )
        with compressor.stream_writer(sink, closefd=False) as compressed:
            yield compressed

    @contextlib.contextmanager
    def open_read(self, source: Path | IO[bytes]) -> Iterator[IO[bytes]]:
        """Return a file with the unpacked bytes."""
        import zstandard

        opened = source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source)
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        try:
            with opened as file, decompressor.stream_reader(file, closefd=False) as unpacked:
                yield cast("IO[bytes]", unpacked)
        except zstandard.ZstdError as exc:
            raise tarfile.ReadError(str(exc)) from exc


COMPRESSIONS: dict[str, ArchiveFormat] = {
    "fast": Gzip(FAST_LEVEL),
    "small": Gzip(3),
    "none": Gzip(0),
    "zstd": Zstd(3),
}
"""Values of `upload_compression`. Another format is a class and a line here."""
ARCHIVE_FORMATS = {each.suffix: each for each in COMPRESSIONS.values()}
"""Suffix, which an archive's sidecar names -> what reads it."""
ARCHIVE_SUFFIXES = tuple(ARCHIVE_FORMATS)
