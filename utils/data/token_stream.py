"""Shards as one stream of tokens, and the windows through which a model reads it.

    shard cache -> token stream -> windows -> perplexity

The shards are laid end to end in the order of their names. `covering_windows` predicts every token
but the first of the stream exactly once; `training_windows` are the samples of the evaluations
during training. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.data.shard_cache import ShardCache
from utils.data.shard_index import ShardFacts


@dataclass(frozen=True)
class Window:
    """A piece of the stream that the model sees at once.

    From token `start` on, the model sees `length` tokens and predicts as many, each from those
    before it; the last `targets` of the predictions count.
    """

    start: int
    length: int
    targets: int


def covering_windows(num_tokens: int, length: int, stride: int | None = None) -> Iterator[Window]:
    """Yield windows whose targets are the positions 1 to `num_tokens - 1`, each once, in order.

    `stride` is from one window's beginning to the next one's, at most `length` (None: `length`). A
    smaller one gives each token at least `length - stride` tokens of context, and takes so much
    longer.
    """
    start = done = 0
    while done < num_tokens - 1:
        stop = min(start + length, num_tokens - 1)
        yield Window(start, stop - start, stop - done)
        start, done = start + (stride or length), stop


def choose_samples(num_tokens: int, length: int, max_samples: int | None) -> list[int]:
    """Return which samples of `length` tokens a run is validated on: their numbers, ascending.

    At most `max_samples`, spread evenly over all of them, so that each part of a mixed corpus has
    its share; always the same ones. None: all. Tokens that fill no sample are left out.
    """
    available = num_tokens // length
    count = available if max_samples is None else min(available, max_samples)
    return [(2 * part + 1) * available // (2 * count) for part in range(count)]


def training_windows(num_tokens: int, length: int, max_samples: int | None) -> Iterator[Window]:
    """Yield the validation samples of a run; the first token of each has no loss."""
    for sample in choose_samples(num_tokens, length, max_samples):
        yield Window(sample * length, length - 1, length - 1)


def read_tokens(
    cache: ShardCache,
    ends: np.ndarray[Any, Any],
    start: int,
    length: int,
    on_shard: Callable[[int], None] = lambda shard: None,
) -> np.ndarray[Any, Any]:
    """Return tokens of shards laid end to end: int64 [length].

    `ends` are the positions after each shard's last token; a shard without tokens is left out.
    `on_shard` is told of each shard before it is read.
    """
    parts, end = [], start + length
    shard = int(np.searchsorted(ends, start, side="right"))
    while start < end:
        begin = int(ends[shard - 1]) if shard else 0
        if begin < ends[shard]:
            on_shard(shard)
            tokens = cache.tokens(shard)[start - begin : end - begin]
            parts.append(tokens.astype(np.int64))
            start += len(tokens)
        shard += 1
    return np.concatenate(parts)


class TokenStream:
    """The tokens of shards, read in order.

    With `max_tokens`, only the first ones.
    """

    def __init__(
        self, cache: ShardCache, shards: Sequence[ShardFacts], max_tokens: int | None = None
    ) -> None:
        self._cache = cache
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        total = int(self._ends[-1]) if len(shards) else 0
        self.num_tokens = total if max_tokens is None else min(total, max_tokens)
        self._newest = -1

    def read(self, start: int, length: int) -> np.ndarray[Any, Any]:
        """Return tokens of the stream: int64 [length].

        Raises:
            ShardError: A shard cannot be used; it is named.
            StorageError: A shard cannot be downloaded.
        """
        return read_tokens(self._cache, self._ends, start, length, self._follow)

    def _follow(self, shard: int) -> None:
        """Keep this shard and the one before, which a window may go back to; fetch the next."""
        if shard <= self._newest:
            return
        self._newest = shard
        before = [shard - 1] if shard else []
        later = [shard + 1] if shard + 1 < len(self._ends) else []
        self._cache.prefetch([shard, *before], later)
