"""Batches: the tokens of step N are the same for any number of ranks and after any resume."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sample_shards import CountingBucket, save_shards
from utils.base.errors import ShardError
from utils.data.mixture import DataOrder, build_order
from utils.data.sample_order import SampleOrder
from utils.data.shard_cache import ShardCache
from utils.data_utils import BatchLoader, SampleReader, StepShape, ValidationData

VOCABULARY = 70_000


@given(
    first=st.integers(0, 10**6),
    micro_batch=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 8),
)
def test_the_ranks_of_a_step_share_its_samples_without_a_gap(
    first: int, micro_batch: int, accumulation: int, world_size: int
) -> None:
    ranks = [
        StepShape(micro_batch, accumulation, rank, world_size).positions(first)
        for rank in range(world_size)
    ]
    assert all(len(rank) == accumulation for rank in ranks)
    assert all(len(batch) == micro_batch for rank in ranks for batch in rank)
    in_order = [batch for step in zip(*ranks, strict=True) for batch in step]
    samples = micro_batch * accumulation * world_size
    assert [n for batch in in_order for n in batch] == list(range(first, first + samples))


class Corpus:
    """Shards whose token ids are 0, 1, 2, ..., and what reads them."""

    def __init__(self, directory: Path, lengths: Sequence[int]) -> None:
        self.directory = directory
        self.lengths = list(lengths)
        self.shards = save_shards(directory / "data", lengths)
        self.bucket = CountingBucket(directory / "data")

    def cache(self) -> ShardCache:
        sources = [(self.bucket, self.shards)]
        return ShardCache(sources, self.directory / "cache", VOCABULARY)

    def reader(self, order: DataOrder, *, skip: bool = False, bad: Sequence[int] = ()):
        return SampleReader(order, self.cache(), skip_bad_shards=skip, bad_shards=bad)

    def read(self, order: DataOrder, first: int, count: int) -> np.ndarray:
        reader = self.reader(order)
        samples = reader.read(first, count)
        reader.cache.close()
        return samples

    def order(self, length: int, seed: int = 0, window: int = 2) -> SampleOrder:
        return SampleOrder(self.lengths, length, seed, window)

    def steps(
        self,
        order: DataOrder,
        position: int,
        *,
        num_steps: int,
        global_batch: int,
        world_size: int = 1,
        micro_batch: int = 1,
        skip: bool = False,
        bad: Sequence[int] = (),
    ) -> list[list[int]]:
        """Return the token ids of each step as `world_size` ranks read them, in sample order."""
        accumulation = global_batch // (micro_batch * world_size)
        streams = []
        for rank in range(world_size):
            loader = BatchLoader(
                self.reader(order, skip=skip, bad=bad),
                StepShape(micro_batch, accumulation, rank, world_size),
                position=position,
            )
            batches = iter(loader)
            streams.append([next(batches) for _ in range(num_steps)])
            loader.close()
        assert all(
            batch.shape == (micro_batch, order.sequence_length) and batch.dtype == torch.int64
            for stream in streams
            for step in stream
            for batch in step
        )
        return [
            torch.cat([batch for ranks in zip(*step, strict=True) for batch in ranks])
            .flatten()
            .tolist()
            for step in zip(*streams, strict=True)
        ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    # 403 tokens: shards smaller than a sample, and some that many samples fit into.
    lengths = [60, 3, 5, 81, 40, 1, 70, 33, 90, 20]
    return Corpus(tmp_path_factory.mktemp("corpus"), lengths)


def test_samples_are_the_tokens_of_the_shards_laid_end_to_end(corpus: Corpus) -> None:
    order = corpus.order(length=7)
    samples = corpus.read(order, 0, order.samples_per_epoch)
    stops = np.cumsum(corpus.lengths)
    shards = [np.arange(stop - n, stop) for stop, n in zip(stops, corpus.lengths, strict=True)]
    laid_out = np.concatenate([shards[shard] for shard in order.epoch(0).shards])
    expected = laid_out[: len(laid_out) // 7 * 7].reshape(-1, 7)
    assert samples.dtype == np.int64
    assert sorted(samples.tolist()) == sorted(expected.tolist())
    assert samples.tolist() != expected.tolist()


# Samples in a step: 12. An epoch has 57 samples of 7, so epochs end within steps.
WORLDS = [(1, 1), (1, 3), (1, 12), (2, 1), (2, 3), (3, 4), (4, 1), (6, 2), (12, 1)]


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    window=st.integers(1, 12),
    lengths=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    worlds=st.lists(st.sampled_from(WORLDS), min_size=4, max_size=4),
)
def test_a_stream_resumed_three_times_on_other_ranks_equals_the_straight_one(
    corpus: Corpus,
    seed: int,
    window: int,
    lengths: list[int],
    worlds: list[tuple[int, int]],
) -> None:
    straight = corpus.steps(
        corpus.order(7, seed, window), 0, num_steps=sum(lengths), global_batch=12
    )
    resumed, done = [], 0
    for length, (world_size, micro_batch) in zip(lengths, worlds, strict=True):
        resumed += corpus.steps(
            corpus.order(7, seed, window),  # a new process: nothing is remembered
            position=done * 12,
            num_steps=length,
            global_batch=12,
            world_size=world_size,
            micro_batch=micro_batch,
        )
        done += length
    assert resumed == straight


def test_shards_are_downloaded_once_in_two_epochs(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [30, 40, 50, 20, 10, 30])
    corpus.steps(corpus.order(10, window=1), 0, num_steps=36, global_batch=1)
    assert sorted(corpus.bucket.downloads) == [shard.name for shard in corpus.shards]


# Bad shards that are skipped.


def break_shards(corpus: Corpus, numbers: Sequence[int]) -> None:
    for number in numbers:
        (corpus.directory / "data" / corpus.shards[number].name).write_bytes(b"<html>")


def test_samples_of_a_bad_shard_are_replaced_and_the_others_stay(tmp_path: Path) -> None:
    whole = Corpus(tmp_path / "whole", [40] * 6)
    broken = Corpus(tmp_path / "broken", [40] * 6)
    break_shards(broken, [1, 4])
    order = whole.order(10, window=2)
    expected = whole.steps(order, 0, num_steps=24, global_batch=1)
    found = broken.steps(order, 0, num_steps=24, global_batch=1, skip=True)
    bad_tokens = {*range(40, 80), *range(160, 200)}
    good = {tuple(step) for step in expected if not bad_tokens & set(step)}
    for before, after in zip(expected, found, strict=True):
        if bad_tokens & set(before):
            assert tuple(after) in good
        else:
            assert after == before


def test_replacements_are_the_same_for_all_ranks_and_after_a_resume(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [33, 7, 40, 2, 51, 28, 64, 12])
    break_shards(corpus, [2, 4])
    order = corpus.order(7, window=3)
    straight = corpus.steps(order, 0, num_steps=15, global_batch=4, skip=True)
    ranks = corpus.steps(order, 0, num_steps=15, global_batch=4, world_size=4, skip=True)
    assert ranks == straight
    later = corpus.steps(order, 20, num_steps=10, global_batch=4, skip=True)
    assert later == straight[5:]
    # Known as bad from the start, as a checkpoint says: also when the shard has been mended.
    save_shards(tmp_path / "data", corpus.lengths)
    known = corpus.steps(order, 20, num_steps=10, global_batch=4, skip=True, bad=[2, 4])
    assert known == straight[5:]


def test_no_usable_shard_at_all_is_an_error(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [40, 40])
    break_shards(corpus, [0, 1])
    reader = corpus.reader(corpus.order(10), skip=True)
    with pytest.raises(ShardError, match="2 of them are unusable"):
        reader.read(0, 8)
    reader.cache.close()


def test_bad_validation_shards_can_be_left_out(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [20, 20, 20])
    break_shards(corpus, [1])
    validation = ValidationData(corpus.cache(), corpus.shards, 10, None, skip_bad_shards=True)
    rows = torch.cat(list(validation.batches(4, 0, 1)))
    assert rows.flatten().tolist() == [*range(20), *range(40, 60)]
    validation.close()
    strict = ValidationData(corpus.cache(), corpus.shards, 10, None)
    with pytest.raises(ShardError, match=corpus.shards[1].name):
        list(strict.batches(4, 0, 1))
    strict.close()


# Mixtures.


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 39), world_size=st.sampled_from([1, 2, 4]))
def test_a_mixture_resumes_exactly_at_any_number_of_ranks(
    corpus: Corpus, seed: int, cut: int, world_size: int
) -> None:
    def order() -> DataOrder:
        return build_order([corpus.lengths[:4], corpus.lengths[4:]], [3, 1], 7, seed, 2)

    straight = corpus.steps(order(), 0, num_steps=40, global_batch=4)
    first = corpus.steps(order(), 0, num_steps=cut, global_batch=4, world_size=world_size)
    rest = corpus.steps(order(), 4 * cut, num_steps=40 - cut, global_batch=4, micro_batch=2)
    assert first + rest == straight


def test_closing_ends_every_thread_although_batches_wait_to_be_read(corpus: Corpus) -> None:
    before = set(threading.enumerate())
    reader = corpus.reader(corpus.order(7))
    loader = BatchLoader(reader, StepShape(2, 3), position=0)
    next(iter(loader))
    loader.close()
    assert set(threading.enumerate()) == before


def test_time_spent_waiting_for_data_is_counted(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr("utils.data_utils.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    reader = corpus.reader(corpus.order(7))
    loader = BatchLoader(reader, StepShape(1, 1), position=0)
    batches = iter(loader)
    next(batches)
    assert loader.wait_seconds == 2.5
    next(batches)
    assert loader.wait_seconds == 2.75
    loader.close()


class StalledBucket(CountingBucket):
    """A bucket that answers for one shard only when it is told to."""

    def __init__(self, root: Path, stalled: str) -> None:
        super().__init__(root)
        self.stalled, self.released = stalled, threading.Event()

    def fetch(self, name: str, scratch: Path) -> Path:
        if name == self.stalled:
            self.released.wait(60)
        return super().fetch(name, scratch)


def stalled_loader(
    tmp_path: Path, stalled: int, **arguments: Any
) -> tuple[BatchLoader, StalledBucket, list[int]]:
    """Return a loader of 2 steps a shard, what it waits for, and the shards in their order."""
    corpus = Corpus(tmp_path, [50, 50, 50])
    order = corpus.order(5, window=1)
    shards = order.epoch(0).shards.tolist()
    bucket = StalledBucket(tmp_path / "data", corpus.shards[shards[stalled]].name)
    corpus.bucket = bucket
    reader = corpus.reader(order)
    loader = BatchLoader(reader, StepShape(5, 1), position=0, **arguments)
    return loader, bucket, shards


def wait_for_ready(loader: BatchLoader, count: int) -> None:
    end = time.monotonic() + 60
    while loader._ready.qsize() < count:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("ready", [0, 1])
def test_a_stop_ends_the_wait_for_a_batch_after_those_that_are_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: int
) -> None:
    monkeypatch.setattr("utils.data_utils.STOP_POLL_SECONDS", 0.02)
    asked = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) >= 3

    loader, bucket, shards = stalled_loader(tmp_path, ready, should_stop=should_stop)
    wait_for_ready(loader, 2 * ready)
    tokens = [step[0].flatten().tolist() for step in loader]
    assert len(asked) == 3
    expected = [token for shard in shards[:ready] for token in range(50 * shard, 50 * shard + 50)]
    assert sorted(sum(tokens, [])) == sorted(expected)
    assert len(tokens) == 2 * ready
    bucket.released.set()
    loader.close()


def test_without_a_stop_a_late_batch_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.data_utils.STOP_POLL_SECONDS", 0.001)

    def should_stop() -> bool:  # asked while nothing is ready
        bucket.released.set()
        return False

    loader, bucket, _ = stalled_loader(tmp_path, 1, should_stop=should_stop)
    assert len([step for step, _ in zip(loader, range(3), strict=False)]) == 3
    assert bucket.released.is_set()
    loader.close()


def test_a_bad_shard_is_raised_in_its_place_although_a_stop_is_asked_for(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [50, 50])
    order = corpus.order(10, window=1)
    bad = corpus.shards[order.epoch(0).shards[1]].name
    (tmp_path / "data" / bad).write_bytes(b"<html>")
    loader = BatchLoader(
        corpus.reader(order),
        StepShape(5, 1),
        position=0,
        should_stop=lambda: True,
    )
    wait_for_ready(loader, 2)
    batches = iter(loader)
    next(batches)
    with pytest.raises(ShardError, match=bad):
        next(batches)
    loader.close()


# Validation.


@pytest.fixture
def build_validation(
    corpus: Corpus,
) -> Iterator[Callable[..., ValidationData]]:
    opened = []

    def build(length: int, max_samples: int | None = None) -> ValidationData:
        opened.append(ValidationData(corpus.cache(), corpus.shards, length, max_samples))
        return opened[-1]

    yield build
    for validation in opened:
        validation.close()


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 100), (3, 4), (8, 1)])
def test_validation_samples_are_shared_by_the_ranks_without_a_gap(
    build_validation: Callable[..., ValidationData], world_size: int, batch_size: int
) -> None:
    validation = build_validation(length=7)
    assert validation.num_samples == 57
    rows = []
    for rank in range(world_size):
        for batch in validation.batches(batch_size, rank, world_size):
            assert batch.dtype == torch.int64
            assert 1 <= len(batch) <= batch_size
            rows += batch.tolist()
    assert sorted(rows) == [list(range(7 * n, 7 * n + 7)) for n in range(57)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_limit_takes_the_same_samples_of_all_parts_of_the_validation_data_on_any_ranks(
    build_validation: Callable[..., ValidationData], world_size: int
) -> None:
    validation = build_validation(length=7, max_samples=5)  # of 57
    rows = [
        row[0] // 7
        for _ in range(2)
        for rank in range(world_size)
        for batch in validation.batches(3, rank, world_size)
        for row in batch.tolist()
    ]
    assert sorted(rows) == sorted(2 * [5, 17, 28, 39, 51])
    assert build_validation(length=7, max_samples=1000).num_samples == 57
    assert build_validation(length=404).num_samples == 0
