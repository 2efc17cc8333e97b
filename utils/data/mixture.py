"""Several sources drawn by weight, in an order as exact and as resumable as that of one.

    shard index -> sample order -> local cache -> batches

No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.base.errors import DataError
from utils.data.sample_order import Indices, SampleOrder, Span, frozen_permutation

MIXTURE_BLOCK = 1024


class MixtureOrder:
    """The order of several sources drawn by weight, as exact and as resumable as one.

    Every block of `MIXTURE_BLOCK` samples holds the same number of each source, in an order that
    depends on (seed, block) alone; so a weight is kept to 1 in `MIXTURE_BLOCK` at any time, and a
    global sample index gives the source and the index within that source by arithmetic. Each
    source has epochs of its own; the mixture's epoch ends after as many samples as all sources
    have together.
    """

    def __init__(self, sources: Sequence[SampleOrder], weights: Sequence[float], seed: int) -> None:
        self.sequence_length = sources[0].sequence_length
        self.samples_per_epoch = sum(source.samples_per_epoch for source in sources)
        self._sources, self._seed = tuple(sources), seed
        self._counts = _apportion(weights, MIXTURE_BLOCK)
        sizes = [source.num_shards for source in sources]
        self._offsets = np.cumsum([0, *sizes[:-1]]).tolist()
        self._block: tuple[int, Indices] | None = None

    def epoch_of(self, position: int) -> tuple[int, int]:
        """Return (epoch, samples of that epoch before it) of a global sample index."""
        return divmod(position, self.samples_per_epoch)

    def locate(self, position: int, count: int) -> tuple[Indices, Indices]:
        """Return (shards, starts) of `count` samples; -1 says that `spans` has the answer."""
        shards, starts = np.empty(count, np.int64), np.empty(count, np.int64)
        filled = 0
        while filled < count:
            block, place = divmod(position + filled, MIXTURE_BLOCK)
            labels = self._labels(block)
            taken = min(count - filled, MIXTURE_BLOCK - place)
            here = labels[place : place + taken]
            for number, source in enumerate(self._sources):
                mine = np.flatnonzero(here == number)
                if mine.size:
                    first = self._source_position(block, place, number)
                    found = source.locate(first, mine.size)
                    shards[filled + mine] = found[0] + self._offsets[number]
                    starts[filled + mine] = found[1]
            filled += taken
        return shards, starts

    def spans(self, position: int) -> list[Span]:
        """Return where the tokens of a global sample index are."""
        block, place = divmod(position, MIXTURE_BLOCK)
        number = int(self._labels(block)[place])
        first = self._source_position(block, place, number)
        offset = self._offsets[number]
        return [
            Span(span.shard + offset, span.start, span.length)
            for span in self._sources[number].spans(first)
        ]

    def source_positions(self, position: int) -> list[int]:
        """Return how many samples of each source come before a global sample index."""
        block, place = divmod(position, MIXTURE_BLOCK)
        return [self._source_position(block, place, n) for n in range(len(self._sources))]

    def window_key(self, position: int) -> tuple[int, ...]:
        """Return (epoch, window) of each source."""
        positions = self.source_positions(position)
        keys = [s.window_key(p) for s, p in zip(self._sources, positions, strict=True)]
        return tuple(number for key in keys for number in key)

    def upcoming_shards(self, position: int) -> tuple[list[int], list[int]]:
        """Return the shards of the rest of each source's window, and of their next ones."""
        now: list[int] = []
        later: list[int] = []
        positions = self.source_positions(position)
        for source, offset, first in zip(self._sources, self._offsets, positions, strict=True):
            current, following = source.upcoming_shards(first)
            now += [shard + offset for shard in current]
            later += [shard + offset for shard in following]
        return now, later

    def shards_consumed(self, position: int) -> int:
        """Return how many shards have been wholly used, each source in its own epoch."""
        positions = self.source_positions(position)
        return sum(s.shards_consumed(p) for s, p in zip(self._sources, positions, strict=True))

    def largest_window(self) -> list[int]:
        """Return the largest shards of each source, as many as its windows hold."""
        return [
            shard + offset
            for source, offset in zip(self._sources, self._offsets, strict=True)
            for shard in source.largest_window()
        ]

    def _labels(self, block: int) -> Indices:
        cached = self._block  # the loader's thread and the training thread may both be here
        if cached is None or cached[0] != block:
            labels = np.repeat(np.arange(len(self._counts)), self._counts)
            cached = block, labels[frozen_permutation(MIXTURE_BLOCK, self._seed, block, -1)]
            self._block = cached
        return cached[1]

    def _source_position(self, block: int, place: int, number: int) -> int:
        before = int(np.count_nonzero(self._labels(block)[:place] == number))
        return block * self._counts[number] + before


DataOrder = SampleOrder | MixtureOrder
"""What the loader takes its samples from: one source or several."""


def _apportion(weights: Sequence[float], seats: int) -> list[int]:
    """Return whole numbers in the proportion of the weights that sum to `seats`.

    The largest remainders are rounded up (Hamilton's method).

    Raises:
        DataError: A weight is too small to get any.
    """
    total = sum(weights)
    exact = [weight / total * seats for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: counts[n] - exact[n])
    for number in by_remainder[: seats - sum(counts)]:
        counts[number] += 1
    if min(counts) < 1:
        raise DataError(f"A weight below 1/{seats} of all cannot be kept: {list(weights)}.")
    return counts


def build_order(
    source_tokens: Sequence[Sequence[int]],
    weights: Sequence[float],
    sequence_length: int,
    seed: int,
    window: int,
) -> DataOrder:
    """Return the order of one source, or of several drawn by weight.

    `source_tokens` are the tokens of each shard, for each source.

    Raises:
        DataError: A source is smaller than one sample, or its weight too small.
    """
    # Sources differ in their seed, so that equal sizes do not mean equal permutations.
    sources = [
        SampleOrder(tokens, sequence_length, seed + number, window)
        for number, tokens in enumerate(source_tokens)
    ]
    return sources[0] if len(sources) == 1 else MixtureOrder(sources, weights, seed)
