"""The token cache: whole entries or none, below its limit, and never in the way."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from utils.corpus.token_cache import TokenCache


def key(number: int) -> str:
    return f"{number:064x}"


def entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_a_whole_entry_is_found_by_another_cache_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    for damage in (b"", b"abc", b"\0\0\0\0ids"):
        TokenCache(tmp_path).put(key(1), b"ids" * 10)
        cache = TokenCache(tmp_path)
        assert (cache.get(key(1)), cache.get(key(2))) == (b"ids" * 10, None)
        assert (cache.num_hits, cache.num_misses) == (1, 1)
        (path,) = entries(tmp_path)
        path.write_bytes(damage)
        assert cache.get(key(1)) is None


def test_the_least_recently_used_go_when_the_limit_is_reached(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, limit_bytes=1000)
    for number in range(9):
        cache.put(key(number), bytes(100))
        os.utime(cache._path(key(number)), (number, number))
    assert cache.get(key(0)) is not None  # now the newest
    cache.put(key(9), bytes(100))
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 1000
    kept = [number for number in range(10) if cache.get(key(number)) is not None]
    assert {0, 8, 9} <= set(kept)
    assert 1 not in kept
    small = TokenCache(tmp_path, limit_bytes=250)  # holds from the start
    assert len(entries(tmp_path)) == 2
    small.put(key(10), bytes(300))
    assert len(entries(tmp_path)) == 2


def test_old_leftovers_are_removed_and_those_of_a_live_writer_are_not(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    for name, age in (("old", 10_000), ("new", 0)):
        path = tmp_path / "ab" / f".tmp-{name}"
        path.write_bytes(b"part")
        os.utime(path, (time.time() - age,) * 2)
    TokenCache(tmp_path)
    assert [path.name for path in entries(tmp_path)] == [".tmp-new"]


def test_a_cache_that_cannot_be_written_is_said_once_and_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TokenCache(tmp_path / "file" / "cache")
    cache.put(key(1), b"ids")
    cache.put(key(2), b"ids")
    assert cache.get(key(1)) is None
    assert len(caplog.records) == 1
