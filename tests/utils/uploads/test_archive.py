"""An archive is what plain tar reads, the same bytes each time, and never half of it in silence."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.processes import run_python
from tests.sample_checkpoints import make_checkpoint, seal
from tests.utils.uploads.waiting import end_in_time
from utils.base.archive_formats import COMPRESSIONS
from utils.base.errors import CheckpointError, TransientStorageError
from utils.base.files import pass_by_cache
from utils.checkpoints.layout import read_manifest
from utils.storage.bucket import crc32c_of_bytes
from utils.uploads.archive import write_archive

NAME = "checkpoint-epoch0-step50-files0"
NOISE = hashlib.shake_128(b"").digest(5_300_000)


WAYS = [("fast", 1), ("fast", 4), ("none", 1), ("zstd", 4)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = make_checkpoint(tmp_path / "checkpoints", 50)
    # Several blocks for each thread, and an end within a block.
    (path / "optimizer.bin").write_bytes(NOISE)
    (path / "zeros.bin").write_bytes(bytes(3_000_000))
    (path / "empty.json").write_bytes(b"")
    seal(path, 50)
    return path


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def archive(checkpoint: Path, **options: Any) -> bytes:
    sink = io.BytesIO()
    info = write_archive(checkpoint, read_manifest(checkpoint), sink, **options)
    data = sink.getvalue()
    assert (info.size, info.crc32c) == (len(data), crc32c_of_bytes(data))
    return data


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("compression", list(COMPRESSIONS))
def test_plain_tar_brings_back_every_byte(
    checkpoint: Path, tmp_path: Path, compression: str
) -> None:
    data = archive(checkpoint, compression=compression, threads=2)
    if compression == "zstd":  # tar would need the zstd program
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "xf", tmp_path / "a.tar", "-C", tmp_path / "out"], check=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]
    assert contents(tmp_path / "out" / NAME) == contents(checkpoint)


@pytest.mark.parametrize("compression", list(COMPRESSIONS))
def test_the_same_files_give_the_same_bytes_with_any_number_of_threads(
    checkpoint: Path, tmp_path: Path, compression: str
) -> None:
    first = archive(checkpoint, compression=compression)
    for path in checkpoint.iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    copy = tmp_path / "copy" / NAME
    copy.parent.mkdir()
    subprocess.run(["cp", "-r", checkpoint, copy], check=True)
    for path in (checkpoint, copy):
        for threads in (1, 2, 4):
            assert archive(path, compression=compression, threads=threads) == first


def test_only_the_files_of_the_manifest_go_in_and_the_manifest_last(checkpoint: Path) -> None:
    (checkpoint / "core.1234").write_bytes(b"not ours")
    (checkpoint / ".secret").write_text("token")
    with tarfile.open(fileobj=io.BytesIO(archive(checkpoint))) as tar:
        members = tar.getmembers()
    expected = sorted(read_manifest(checkpoint).files)
    assert [m.name for m in members] == [f"{NAME}/{n}" for n in [*expected, "manifest.json"]]
    assert all(m.isfile() and m.mode == 0o644 and m.uid == m.gid == m.mtime == 0 for m in members)
    assert all(m.uname == m.gname == "" for m in members)


def test_what_is_read_is_reported(checkpoint: Path) -> None:
    counts: list[int] = []
    archive(checkpoint, on_read=counts.append)
    files = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert sum(counts) == files
    assert max(counts) <= 2**20


class Sink(io.BufferedIOBase):
    """Takes `room` bytes, then behaves as told."""

    def __init__(self, room: int, then: Exception | None) -> None:
        super().__init__()
        self._room, self._then = room, then

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        taken = min(len(data), self._room)
        self._room -= taken
        if taken < len(data) and self._then is not None:
            raise self._then
        return taken


@pytest.mark.parametrize(("compression", "threads"), WAYS)
@pytest.mark.parametrize("room", [0, 5, 1000, 3_500_000, -30, -1])
@pytest.mark.parametrize(
    "then", [None, OSError(errno.ENOSPC, "No space left"), TransientStorageError("503")]
)
def test_a_sink_that_fails_is_an_error_not_a_short_archive(
    checkpoint: Path, compression: str, threads: int, room: int, then: Exception | None
) -> None:
    if room < 0:  # at the very end
        room += len(archive(checkpoint, compression=compression))
    manifest, sink = read_manifest(checkpoint), Sink(room, then)
    options: dict[str, Any] = {"compression": compression, "threads": threads}
    error = end_in_time(lambda: write_archive(checkpoint, manifest, sink, **options))
    if then is not None:
        assert error is then
    else:
        assert isinstance(error, OSError)
        assert "short write" in str(error)


FAILING_SINKS = """
import io, pathlib, sys
from utils.uploads.archive import write_archive
from utils.checkpoints.layout import read_manifest

class Sink(io.BytesIO):
    def write(self, data):
        if self.tell() + len(data) > room:
            raise OSError("full")
        return super().write(data)

checkpoint = pathlib.Path(sys.argv[1])
manifest = read_manifest(checkpoint)
for compression, threads in (("fast", 1), ("fast", 4), ("zstd", 4)):
    for room in (0, 5, 1000, 3_500_000):
        try:
            write_archive(checkpoint, manifest, Sink(), compression=compression, threads=threads)
        except OSError as exc:
            print(exc)
"""


def test_nothing_complains_later_of_a_sink_that_failed(checkpoint: Path) -> None:
    # Python below 3.13 hides what fails while a file is freed, except from developers.
    result = run_python("-X", "dev", "-c", FAILING_SINKS, checkpoint)
    assert (result.stdout, result.stderr) == ("full\n" * 12, "")


@pytest.mark.parametrize("change", ["cut", "flipped", "longer", "gone", "folder"])
def test_a_file_that_is_not_what_was_committed_is_an_error(checkpoint: Path, change: str) -> None:
    path = checkpoint / "optimizer.bin"
    data = path.read_bytes()
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change != "gone":
        flipped = bytes([data[0] ^ 1]) + data[1:]
        path.write_bytes({"cut": data[:-1], "flipped": flipped, "longer": data + b"x"}[change])
    problem = "cannot be read" if change in ("gone", "folder") else "is damaged"
    with pytest.raises(CheckpointError, match=f"{NAME}: optimizer.bin {problem}"):
        write_archive(checkpoint, read_manifest(checkpoint), io.BytesIO(), threads=4)


def test_a_file_that_cannot_be_read_to_its_end_is_an_error_of_the_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            raise OSError(errno.EIO, "Input/output error")

    manifest = read_manifest(checkpoint)
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: Broken(path))
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        write_archive(checkpoint, manifest, io.BytesIO())


def test_the_bytes_are_the_same_where_nothing_passes_by_the_page_cache(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    class Cached(io.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            if fcntl.fcntl(self, fcntl.F_GETFL) & os.O_DIRECT:
                refused.append(self.name)
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().readinto(buffer[:1000]) or 0

    expected, stream, manifest = archive(checkpoint), io.BytesIO(), read_manifest(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: Cached(path))
        write_archive(checkpoint, manifest, stream)
    assert stream.getvalue() == expected
    with (checkpoint / "manifest.json").open("rb", buffering=0) as file:
        can_pass = pass_by_cache(file)
    assert bool(refused) == can_pass


def test_a_file_that_grows_meanwhile_is_archived_as_it_was_committed(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = checkpoint / "optimizer.bin"
    committed = path.read_bytes()
    grown: list[int] = []

    def grow(count: int) -> None:
        if count == 2**20 and not grown:
            grown.append(count)
            with path.open("ab") as file:
                file.write(b"more")

    data = archive(checkpoint, on_read=grow)
    assert grown
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.extractfile(f"{NAME}/optimizer.bin")
        assert member is not None
        assert member.read() == committed


def test_a_file_that_shrinks_meanwhile_is_an_error(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.bin"

    def shrink(count: int) -> None:
        if count == 2**20:
            os.truncate(path, 2**20 + 7)

    with pytest.raises(CheckpointError, match="optimizer.bin became shorter while it was read"):
        write_archive(checkpoint, read_manifest(checkpoint), io.BytesIO(), on_read=shrink)
