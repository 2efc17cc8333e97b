"""An archive is what plain tar reads, the same bytes each time, and never half of it in silence."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.sample_checkpoints import make_checkpoint, seal
from utils.archive import write_archive
from utils.errors import CheckpointError
from utils.layout import Manifest, read_manifest
from utils.storage import crc32c_of_bytes

NAME = "checkpoint-epoch0-step50-files0"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = make_checkpoint(tmp_path / "checkpoints", 50)
    (path / "optimizer.bin").write_bytes(hashlib.shake_128(b"").digest(600_000))
    (path / "empty.json").write_bytes(b"")
    seal(path, 50)
    return path


def archive(checkpoint: Path) -> bytes:
    sink = io.BytesIO()
    info = write_archive(checkpoint, read_manifest(checkpoint), sink)
    data = sink.getvalue()
    assert (info.size, info.crc32c) == (len(data), crc32c_of_bytes(data))
    return data


def test_plain_tar_brings_back_every_byte(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(archive(checkpoint))
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "xzf", tmp_path / "a.tar.gz", "-C", tmp_path / "out"], check=True)

    back = tmp_path / "out" / NAME
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]
    files = sorted(path.name for path in checkpoint.iterdir())
    assert sorted(path.name for path in back.iterdir()) == files
    for name in files:
        assert (back / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_same_files_give_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    first = archive(checkpoint)
    for path in checkpoint.iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    copy = tmp_path / "copy" / NAME
    copy.parent.mkdir()
    subprocess.run(["cp", "-r", checkpoint, copy], check=True)
    assert archive(checkpoint) == first
    assert archive(copy) == first


def test_only_the_files_of_the_manifest_go_in_and_the_manifest_last(checkpoint: Path) -> None:
    (checkpoint / "core.1234").write_bytes(b"not ours")
    (checkpoint / ".secret").write_text("token")
    with tarfile.open(fileobj=io.BytesIO(archive(checkpoint))) as tar:
        members = tar.getmembers()
    expected = sorted(read_manifest(checkpoint).files)
    assert [m.name for m in members] == [f"{NAME}/{n}" for n in [*expected, "manifest.json"]]
    assert all(m.isfile() and m.mode == 0o644 and m.uid == m.gid == m.mtime == 0 for m in members)
    assert all(m.uname == m.gname == "" for m in members)


class Sink(io.RawIOBase):
    """Takes `room` bytes, then behaves as told."""

    def __init__(self, room: int, then: OSError | None) -> None:
        super().__init__()
        self._room, self._then = room, then

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        taken = min(len(data), self._room)
        self._room -= taken
        if taken < len(data) and self._then is not None:
            raise self._then
        return taken


@pytest.mark.parametrize("room", [0, 5, 1000, 200_000])
def test_a_short_write_is_an_error_not_a_short_archive(checkpoint: Path, room: int) -> None:
    with pytest.raises(OSError, match="short write"):
        write_archive(checkpoint, read_manifest(checkpoint), Sink(room, None))


def test_a_full_disk_is_its_own_error(checkpoint: Path) -> None:
    full = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        write_archive(checkpoint, read_manifest(checkpoint), Sink(1000, full))


@pytest.mark.parametrize("change", ["cut", "flipped", "longer"])
def test_a_file_that_changed_after_the_commit_is_never_archived_as_good(
    checkpoint: Path, change: str
) -> None:
    path = checkpoint / "optimizer.bin"
    data = path.read_bytes()
    flipped = data[:300_000] + bytes([data[300_000] ^ 1]) + data[300_001:]
    path.write_bytes({"cut": data[:-1], "flipped": flipped, "longer": data + b"x"}[change])
    with pytest.raises(CheckpointError, match=f"{NAME}: optimizer.bin is damaged"):
        write_archive(checkpoint, read_manifest(checkpoint), io.BytesIO())


def test_a_missing_file_is_an_error(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    (checkpoint / "optimizer.bin").unlink()
    with pytest.raises(OSError, match="optimizer.bin"):
        write_archive(checkpoint, manifest, io.BytesIO())


def test_asked_to_stop_it_stops_before_the_next_file(checkpoint: Path) -> None:
    asked = []

    def stop_at_the_third_file() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(OSError, match="interrupted"):
        write_archive(checkpoint, read_manifest(checkpoint), io.BytesIO(), stop_at_the_third_file)
    assert len(asked) == 3


def test_a_checkpoint_without_files_is_an_archive_of_its_manifest(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    sink = io.BytesIO()
    write_archive(path, Manifest("r", 50, 0, 1), sink)
    with tarfile.open(fileobj=io.BytesIO(sink.getvalue())) as tar:
        assert tar.getnames() == [f"{NAME}/manifest.json"]
