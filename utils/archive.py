"""A checkpoint as one tar.gz, made as a stream.

    checkpoint directory (committed) -> archive -> bucket, verified

Plain `tar xzf` reads it. The same files give the same bytes: names sorted, times, owners and modes
fixed. Size and crc32c are computed on the way. Compression is igzip's, which makes about 300 MB/s
on one core where `tar czf` makes 25; float weights hardly compress at any level. No torch here.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import google_crc32c
from isal import igzip

from utils.errors import CheckpointError
from utils.layout import MANIFEST_FILE, FileEntry, Manifest
from utils.storage import encode_crc32c

COMPRESSION_LEVEL = 1
FILE_MODE = 0o644


@dataclass(frozen=True)
class ArchiveInfo:
    """Bytes and base64 crc32c of an archive."""

    size: int
    crc32c: str


class _HashingReader:
    """Passes bytes on and keeps their count and checksum."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._size = self._checksum = 0

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self._size += len(data)
        self._checksum = google_crc32c.extend(self._checksum, data)
        return data

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self._size, encode_crc32c(self._checksum))


class _HashingWriter:
    """Passes bytes on and keeps their count and checksum."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self.size = 0
        self.checksum = 0

    def write(self, data: bytes) -> int:
        written = self._sink.write(data)
        if written != len(data):
            raise OSError(f"short write: {written} of {len(data)} bytes")
        self.size += written
        self.checksum = google_crc32c.extend(self.checksum, bytes(data))
        return written

    def flush(self) -> None:
        self._sink.flush()


def write_archive(
    checkpoint: Path,
    manifest: Manifest,
    sink: IO[bytes],
    should_stop: Callable[[], bool] = lambda: False,
) -> ArchiveInfo:
    """Write a checkpoint as tar.gz to `sink`.

    Args:
        checkpoint: A committed checkpoint directory.
        manifest: Its manifest; only the files that it names go in, and itself.
        sink: Binary file that takes the bytes.
        should_stop: Asked before each file.

    Raises:
        OSError: A file cannot be read, the sink cannot be written, or `should_stop` said so.
        CheckpointError: A file is not what was committed; "verified" must not be said of it.
    """
    writer = _HashingWriter(sink)
    with (
        igzip.IGzipFile(
            filename="", mode="wb", compresslevel=COMPRESSION_LEVEL, fileobj=writer, mtime=0
        ) as compressed,
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in [*sorted(manifest.files), MANIFEST_FILE]:
            if should_stop():
                raise OSError("interrupted")
            _add_file(archive, checkpoint, name, manifest.files.get(name))
    return ArchiveInfo(writer.size, encode_crc32c(writer.checksum))


def _add_file(
    archive: tarfile.TarFile, checkpoint: Path, name: str, entry: FileEntry | None
) -> None:
    path = checkpoint / name
    with path.open("rb") as file:
        member = tarfile.TarInfo(f"{checkpoint.name}/{name}")
        member.size = path.stat().st_size
        member.mode = FILE_MODE
        reader: Any = _HashingReader(file)
        archive.addfile(member, reader)
    if entry is not None and reader.entry != entry:
        raise CheckpointError(f"{checkpoint.name}: {name} is damaged (not what its manifest says).")
