"""Windows that predict each token once, and shards read as one stream."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sample_shards import CountingBucket, save_shards
from utils.base.errors import ShardError
from utils.data.shard_cache import ShardCache
from utils.data.token_stream import TokenStream, covering_windows, training_windows


@given(st.integers(0, 300), st.integers(1, 40), st.data())
def test_every_token_but_the_first_is_predicted_once(
    num_tokens: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.one_of(st.none(), st.integers(1, length)))
    predicted = []
    for window in covering_windows(num_tokens, length, stride):
        assert 1 <= window.length <= length
        assert 1 <= window.targets <= window.length
        end = window.start + window.length
        assert end < max(num_tokens, 1)
        places = range(end - window.targets + 1, end + 1)
        predicted += places
        if window.start:
            # What is predicted first has the least context.
            assert places[0] - window.start >= length - (stride or length) + 1
    assert predicted == list(range(1, num_tokens))


@pytest.mark.parametrize(
    ("num_tokens", "length", "most", "starts"),
    [
        (25, 8, None, [0, 8, 16]),
        (7, 8, None, []),
        (24, 8, 9, [0, 8, 16]),
        (80, 8, 5, [8, 24, 40, 56, 72]),
        (80, 8, 3, [8, 40, 64]),
        (80, 8, 1, [40]),
    ],
)
def test_training_windows_are_whole_samples(
    num_tokens: int, length: int, most: int | None, starts: list[int]
) -> None:
    windows = list(training_windows(num_tokens, length, most))
    assert [window.start for window in windows] == starts
    assert all(window.length == window.targets == length - 1 for window in windows)


def open_stream(directory: Path, lengths: list[int], most: int | None = None) -> TokenStream:
    shards = save_shards(directory / "data", lengths)
    cache = ShardCache([(CountingBucket(directory / "data"), shards)], directory / "cache", 1000)
    return TokenStream(cache, shards, most)


def test_shards_are_read_as_one_stream(tmp_path: Path) -> None:
    stream = open_stream(tmp_path, [5, 1, 7, 4])
    assert stream.num_tokens == 17
    for start, length in [(0, 17), (4, 3), (3, 8), (12, 5), (16, 1), (5, 1)]:
        assert stream.read(start, length).tolist() == list(range(start, start + length))


def test_a_limit_ends_the_stream(tmp_path: Path) -> None:
    assert open_stream(tmp_path, [5, 5], 7).num_tokens == 7
    assert open_stream(tmp_path / "b", [5, 5], 70).num_tokens == 10
    assert open_stream(tmp_path / "c", []).num_tokens == 0


def test_a_bad_shard_is_named(tmp_path: Path) -> None:
    stream = open_stream(tmp_path, [5, 6, 5])
    (tmp_path / "data" / "train_00001.npz").write_bytes(b"no shard")
    assert stream.read(0, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ShardError, match="train_00001"):
        stream.read(4, 3)
