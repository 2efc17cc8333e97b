"""A file is followed whatever happens to it, in bounded memory, without waiting for a pipe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils.base import files
from utils.base.files import FollowedFile


def take(file: FollowedFile) -> tuple[bytes, bool]:
    """Return (lines, whether another file began) of one call."""
    blocks = list(file.read_new())
    return b"".join(block.data for block in blocks), any(block.is_first for block in blocks)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_only_whole_lines_come_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "f"
    file = FollowedFile(path)
    with pytest.raises(FileNotFoundError):
        take(file)
    append(path, b"a\nb\nhal")
    assert take(file) == (b"a\nb\n", True)
    assert take(file) == (b"", False)
    append(path, b"f\nc\n")
    assert take(file) == (b"half\nc\n", False)


def test_a_replaced_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "f"
    append(path, b"old\n")
    file = FollowedFile(path)
    take(file)
    path.rename(tmp_path / "g")
    append(path, b"new and longer\n")
    assert take(file) == (b"new and longer\n", True)


@pytest.mark.parametrize("data", [b"", b"x\n", b"other line that is longer than the one before\n"])
def test_a_file_that_was_cut_is_read_from_its_start(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "f"
    append(path, b"a line of some length\n")
    file = FollowedFile(path)
    take(file)
    path.write_bytes(data)  # the same inode
    assert take(file) == (data, True)


def test_long_files_come_in_blocks_and_lines_longer_than_a_block_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LINE_BLOCK_BYTES", 16)
    path = tmp_path / "f"
    lines = [b"1234567\n", b"x" * 100 + b"\n", b"abc\n", b"y" * 50]
    path.write_bytes(b"".join(lines))
    file = FollowedFile(path)
    blocks = list(file.read_new())
    assert b"".join(block.data for block in blocks) == b"1234567\nabc\n"
    assert sum(block.num_too_long for block in blocks) == 2
    assert all(len(block.data) <= 16 for block in blocks)
    append(path, b"y\nnext\n")
    assert take(file) == (b"next\n", False)


def test_bytes_left_say_how_far_the_end_is(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a\nbc\nd")
    first, second = FollowedFile(path).read_new()
    assert (first.bytes_left, second.bytes_left) == (6, 1)


def test_the_tail_begins_with_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"first\nsecond\nthird\n")
    file = FollowedFile(path, tail_bytes=9)
    assert take(file)[0] == b"third\n"
    path.write_bytes(b"another file, longer than its tail\n")
    assert take(file)[0] == b"another file, longer than its tail\n"


def test_what_is_no_regular_file_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        take(FollowedFile(tmp_path / "pipe"))
    with pytest.raises(IsADirectoryError):
        take(FollowedFile(tmp_path))
