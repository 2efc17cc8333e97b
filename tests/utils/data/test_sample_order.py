"""The order of samples: each exactly once, each token at most once, the same for ever."""

from __future__ import annotations

import random
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.base.errors import DataError
from utils.data.sample_order import EpochOrder, SampleOrder, Span

Token = tuple[int, int]  # (shard, place in it)

# Many shards are smaller than a sample, some hold nothing.
SHARD_TOKENS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
LENGTHS = st.integers(2, 16)
SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 5)
WINDOWS = st.integers(1, 5)


@st.composite
def epoch_orders(draw: st.DrawFn, fewest_tokens: int = 0) -> tuple[EpochOrder, list[int], int, int]:
    tokens = [max(fewest_tokens, count) for count in draw(SHARD_TOKENS)]
    length, window = draw(LENGTHS), draw(WINDOWS)
    order = EpochOrder(tokens, length, draw(SEEDS), draw(EPOCHS), window)
    return order, tokens, length, window


def tokens_of(spans: list[Span]) -> list[Token]:
    return [(s.shard, place) for s in spans for place in range(s.start, s.start + s.length)]


def reference_stream(order: EpochOrder, tokens: list[int]) -> list[Token]:
    """Lay the shards end to end, token by token."""
    return [(int(shard), place) for shard in order.shards for place in range(tokens[shard])]


def reference_samples(order: EpochOrder, tokens: list[int], length: int) -> list[list[Token]]:
    stream = reference_stream(order, tokens)
    return [stream[n * length : (n + 1) * length] for n in range(len(stream) // length)]


@given(epoch_orders())
def test_every_sample_comes_once_and_every_token_at_most_once(
    drawn: tuple[EpochOrder, list[int], int, int],
) -> None:
    order, tokens, length, _ = drawn
    assert sorted(order.shards.tolist()) == list(range(len(tokens)))
    seen = [tokens_of(order.spans(sample)) for sample in range(order.num_samples)]
    assert sorted(seen) == sorted(reference_samples(order, tokens, length))
    assert all(span.length > 0 for n in range(order.num_samples) for span in order.spans(n))
    used = [token for sample in seen for token in sample]
    assert len(used) == len(set(used))
    assert 0 <= sum(tokens) - len(used) <= length - 1


@given(epoch_orders())
def test_samples_come_window_by_window(drawn: tuple[EpochOrder, list[int], int, int]) -> None:
    order, tokens, length, window = drawn
    slot_of = {int(shard): slot for slot, shard in enumerate(order.shards)}
    windows = []
    for sample in range(order.num_samples):
        first_shard = order.spans(sample)[0].shard
        assert order.window_of(sample) == slot_of[first_shard] // window
        windows.append(order.window_of(sample))
        touched = {span.shard for span in order.spans(sample)}
        assert touched <= set(order.window_shards(order.window_of(sample)))
    assert windows == sorted(windows)


@given(epoch_orders(fewest_tokens=1))
def test_consumed_shards_are_those_with_no_token_still_to_come(
    drawn: tuple[EpochOrder, list[int], int, int],
) -> None:
    order, tokens, length, window = drawn
    samples = [tokens_of(order.spans(sample)) for sample in range(order.num_samples)]
    assert order.shards_consumed(order.num_samples) == len(tokens)
    counts = []
    for done in range(order.num_samples):
        # Of the windows that have been begun: a shard in a later one is never counted.
        begun = order.shards[: (order.window_of(done) + 1) * window]
        still_to_come = {shard for sample in samples[done:] for shard, _ in sample}
        counts.append(sum(int(shard) not in still_to_come for shard in begun))
    assert [order.shards_consumed(done) for done in range(order.num_samples)] == counts
    assert counts == sorted(counts)


@given(tokens=SHARD_TOKENS, length=LENGTHS, seed=SEEDS, window=WINDOWS, data=st.data())
def test_a_position_means_the_same_whoever_asks_and_in_whatever_order(
    tokens: list[int], length: int, seed: int, window: int, data: st.DataObject
) -> None:
    tokens = [*tokens, length]
    straight = SampleOrder(tokens, length, seed, window)
    positions = range(3 * straight.samples_per_epoch)
    expected = [straight.spans(position) for position in positions]

    other = SampleOrder(list(tokens), length, seed, window)
    for position in data.draw(st.permutations(positions)):
        assert other.spans(position) == expected[position]
    for epoch in range(3):
        first = epoch * straight.samples_per_epoch
        assert straight.epoch_of(first) == (epoch, 0)
        whole = [tokens_of(spans) for spans in expected[first:][: straight.samples_per_epoch]]
        assert sorted(whole) == sorted(reference_samples(straight.epoch(epoch), tokens, length))


def stream(order: SampleOrder, samples: int) -> list[list[Span]]:
    return [order.spans(position) for position in range(samples)]


def test_epochs_and_seeds_and_windows_give_different_orders() -> None:
    tokens = [64] * 10
    orders = [SampleOrder(tokens, 8, seed, window) for seed in (1, 2) for window in (1, 4)]
    epoch = orders[0].samples_per_epoch
    streams = [stream(order, 2 * epoch) for order in orders]
    halves = [half for spans in streams for half in (spans[:epoch], spans[epoch:])]
    assert len({repr(half) for half in halves}) == len(halves)


def test_the_order_of_released_versions_is_frozen() -> None:
    # A run that is resumed with a later version must go on with the same tokens: if this fails,
    # DATA_STATE_FORMAT needs a new number and old checkpoints their old order.
    order = SampleOrder([5, 0, 17, 3, 40, 9], sequence_length=8, seed=42, window=2)
    assert [order.epoch(epoch).shards.tolist() for epoch in (0, 1)] == [
        [1, 0, 3, 2, 4, 5],
        [4, 5, 0, 2, 3, 1],
    ]
    spans = [[(s.shard, s.start, s.length) for s in order.spans(n)] for n in range(9)]
    assert spans == [
        [(0, 0, 5), (3, 0, 3)],
        [(2, 16, 1), (4, 0, 7)],
        [(2, 8, 8)],
        [(2, 0, 8)],
        [(4, 7, 8)],
        [(4, 23, 8)],
        [(4, 31, 8)],
        [(4, 15, 8)],
        [(4, 39, 1), (5, 0, 7)],
    ]
    large = EpochOrder([100] * 1000, 16, seed=2**40, epoch=7, window=8)
    assert large.shards[:8].tolist() == [8, 617, 979, 430, 609, 924, 597, 759]
    assert [large.spans(n)[0] for n in (0, 1, 6249)] == [
        Span(shard=430, start=36, length=16),
        Span(shard=609, start=48, length=16),
        Span(shard=537, start=76, length=16),
    ]


def test_sizes_beyond_32_bits_are_exact() -> None:
    tokens = [10**9 + number for number in range(3000)]
    order = SampleOrder(tokens, 2048, seed=1, window=1)
    assert order.samples_per_epoch == sum(tokens) // 2048
    last = order.epoch(0).spans(order.samples_per_epoch - 1)
    assert sum(span.length for span in last) == 2048
    assert all(s.start >= 0 and s.start + s.length <= tokens[s.shard] for s in last)


def test_data_smaller_than_one_sample_are_refused_with_numbers() -> None:
    with pytest.raises(DataError, match="hold 7 tokens, less than one sample of 8"):
        SampleOrder([3, 4], 8, 0, 1)
    assert SampleOrder([3, 5], 8, 0, 1).samples_per_epoch == 1


def test_the_loader_and_the_training_thread_may_ask_at_the_same_time() -> None:
    order = SampleOrder([40] * 6, 8, seed=3, window=1)
    expected = stream(order, 4 * order.samples_per_epoch)
    wrong: list[int] = []

    def ask(seed: int) -> None:
        positions = list(range(len(expected)))
        random.Random(seed).shuffle(positions)
        for position in positions * 4:
            if order.spans(position) != expected[position]:
                wrong.append(position)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places as often as they can
    try:
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
