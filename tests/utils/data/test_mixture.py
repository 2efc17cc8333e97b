"""Several sources drawn by weight: the weights are kept, and nothing is repeated or skipped."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.base.errors import DataError
from utils.data.mixture import MIXTURE_BLOCK, MixtureOrder, build_order
from utils.data.sample_order import SampleOrder

SOURCES = st.lists(
    st.lists(st.integers(1, 60), min_size=1, max_size=4).filter(lambda tokens: sum(tokens) >= 8),
    min_size=2,
    max_size=4,
)


def mixture(sources: list[list[int]], weights: list[float], seed: int = 0) -> MixtureOrder:
    order = build_order(sources, weights, 8, seed, 2)
    assert isinstance(order, MixtureOrder)
    return order


@settings(max_examples=15)
@given(SOURCES, st.lists(st.floats(0.05, 10), min_size=4, max_size=4), st.integers(0, 99))
def test_each_source_gives_its_own_samples_in_its_own_order(
    sources: list[list[int]], weights: list[float], seed: int
) -> None:
    weights = weights[: len(sources)]
    order = mixture(sources, weights, seed)
    offsets = np.cumsum([0, *(len(tokens) for tokens in sources)])
    drawn: list[list[list[tuple[int, int, int]]]] = [[] for _ in sources]
    for position in range(200):
        spans = order.spans(position)
        number = int(np.searchsorted(offsets, spans[0].shard, side="right")) - 1
        drawn[number].append([(s.shard - int(offsets[number]), s.start, s.length) for s in spans])
    for number, (tokens, found) in enumerate(zip(sources, drawn, strict=True)):
        alone = SampleOrder(tokens, 8, seed + number, 2)
        expected = [[(s.shard, s.start, s.length) for s in alone.spans(n)] for n in range(200)]
        assert found == expected[: len(found)]
        assert order.source_positions(200)[number] == len(found)


@given(SOURCES, st.integers(0, 3000), st.integers(1, 300), st.integers(0, 9))
def test_locating_many_is_locating_each(
    sources: list[list[int]], first: int, count: int, seed: int
) -> None:
    order = mixture(sources, [1.0, 2.0, 3.0, 4.0][: len(sources)], seed)
    shards, starts = order.locate(first, count)
    for row in range(count):
        spans = order.spans(first + row)
        assert shards[row] == spans[0].shard
        assert starts[row] == (spans[0].start if len(spans) == 1 else -1)


def test_weights_are_kept_in_every_block() -> None:
    order = mixture([[800], [800], [800]], [5.0, 3.0, 0.1])
    orders = set()
    for block in (0, 1, 977):
        shards, _ = order.locate(block * MIXTURE_BLOCK, MIXTURE_BLOCK)
        orders.add(tuple(shards.tolist()))
        counts = Counter(shards.tolist())
        assert sum(counts.values()) == MIXTURE_BLOCK
        for number, weight in enumerate([5.0, 3.0, 0.1]):
            assert abs(counts[number] - weight / 8.1 * MIXTURE_BLOCK) < 1
    assert len(orders) == 3


def test_a_source_that_cannot_give_its_share_is_refused() -> None:
    with pytest.raises(DataError, match="A weight below 1/1024"):
        mixture([[800], [800]], [1.0, 1e-6])
    with pytest.raises(DataError, match="hold 3 tokens, less than one sample of 8"):
        mixture([[800], [3]], [1.0, 1.0])


@given(SOURCES, st.integers(0, 500))
def test_upcoming_shards_hold_everything_that_is_read_until_they_change(
    sources: list[list[int]], position: int
) -> None:
    order = mixture(sources, [1.0] * len(sources))
    key = order.window_key(position)
    now, _ = order.upcoming_shards(position)
    while order.window_key(position) == key:
        assert {span.shard for span in order.spans(position)} <= set(now)
        position += 1


def test_the_mixture_of_released_versions_is_frozen() -> None:
    order = mixture([[40, 20], [64]], [2.0, 1.0], seed=42)
    assert order.locate(0, 12)[0].tolist() == FROZEN_SHARDS


FROZEN_SHARDS = [0, 2, 2, 0, 2, 0, 1, 1, 2, 2, 0, 2]
