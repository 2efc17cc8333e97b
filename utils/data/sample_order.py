"""The order of samples: a pure function of (shard tokens, sequence length, seed, epoch).

    shard index -> sample order -> local cache -> batches

The token stream of an epoch is its shards, put in an order that depends on (seed, epoch) alone,
laid end to end. Sample i of the stream is tokens [i * L, (i + 1) * L); only the stream's last
incomplete sample is dropped, at most L - 1 tokens an epoch. Samples are then shuffled within
windows of `shuffle_window_shards` shards. The position in the data is one number: the global sample
index, which never looks at ranks, workers or restarts. Finding it costs O(shards), once an epoch.
No torch here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.base.errors import DataError

Indices = np.ndarray[Any, np.dtype[np.int64]]


def frozen_permutation(length: int, *key: int) -> Indices:
    """Return a permutation that depends on `key` alone.

    RandomState's stream is frozen for all NumPy versions (NEP 19); that of Generator is not.
    """
    digest = hashlib.sha256(repr(key).encode("ascii")).digest()
    random = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
    return random.permutation(length).astype(np.int64)


@dataclass(frozen=True)
class Span:
    """A run of tokens within one shard: `length` of them from `start`."""

    shard: int
    start: int
    length: int


@dataclass(frozen=True)
class _WindowPlan:
    """The samples of one window in the order in which they are drawn.

    Attributes:
        window: Its number.
        order: Each sample's number in the window's stream.
        shards: The shard in which each begins.
        starts: Its place there, -1 where it reaches into another shard.
    """

    window: int
    order: Indices
    shards: Indices
    starts: Indices


class EpochOrder:
    """The order of one epoch: a pure function of (shard tokens, sequence length, seed, epoch)."""

    def __init__(
        self, shard_tokens: Sequence[int], sequence_length: int, seed: int, epoch: int, window: int
    ) -> None:
        tokens = np.asarray(shard_tokens, dtype=np.int64)
        self.epoch = epoch
        self.num_samples = int(tokens.sum()) // sequence_length
        self.shards = frozen_permutation(len(tokens), seed, epoch)
        self._length, self._seed, self._window = sequence_length, seed, window
        self._ends = np.cumsum(tokens[self.shards])
        self._starts = self._ends - tokens[self.shards]
        firsts = -(-self._starts[::window] // sequence_length)
        # Window w holds the samples that begin in its shards.
        self._bounds = np.append(np.minimum(firsts, self.num_samples), self.num_samples)
        self._plan: _WindowPlan | None = None

    def window_of(self, sample: int) -> int:
        """Return the window that the epoch's sample number `sample` is drawn from."""
        return int(np.searchsorted(self._bounds, sample, side="right")) - 1

    def window_shards(self, window: int) -> list[int]:
        """Return the shards that the samples of a window touch, in stream order."""
        last = (window + 1) * self._window
        # Its last sample may reach into the shards after the window.
        reach = self.window_end(window) * self._length
        while last < len(self.shards) and self._starts[last] < reach:
            last += 1
        return [int(shard) for shard in self.shards[window * self._window : last]]

    def spans(self, sample: int) -> list[Span]:
        """Return where the tokens of the epoch's sample number `sample` are."""
        position = self._stream_sample(sample) * self._length
        end, spans = position + self._length, []
        slot = int(np.searchsorted(self._ends, position, side="right"))
        while position < end:
            length = min(end, int(self._ends[slot])) - position
            if length:
                start = position - int(self._starts[slot])
                spans.append(Span(int(self.shards[slot]), start, length))
            position += length
            slot += 1
        return spans

    def locate(self, first: int, count: int) -> tuple[Indices, Indices]:
        """Return where samples `first` to `first + count` of one window begin.

        Returns:
            (shards, starts), int64 [count] each; a start of -1 says that the sample reaches into
            another shard, and `spans` has the whole answer.
        """
        window = self.window_of(first)
        plan, begin = self._window_plan(window), int(self._bounds[window])
        part = slice(first - begin, first - begin + count)
        return plan.shards[part], plan.starts[part]

    def window_end(self, window: int) -> int:
        """Return the epoch's number of the first sample after a window."""
        return int(self._bounds[window + 1])

    def upcoming_shards(self, sample: int) -> list[int]:
        """Return the shards that the rest of a sample's window touches, by their first use."""
        window = self.window_of(sample)
        shards = self._window_plan(window).shards[sample - int(self._bounds[window]) :]
        used, first_use = np.unique(shards, return_index=True)
        ordered: list[int] = used[np.argsort(first_use)].tolist()
        return ordered + [s for s in self.window_shards(window) if s not in set(ordered)]

    def shards_consumed(self, samples: int) -> int:
        """Return how many shards have been wholly used after `samples` samples of the epoch."""
        if samples >= self.num_samples:
            return len(self.shards)
        window = self.window_of(samples)
        first_slot, begin = window * self._window, int(self._bounds[window])
        rank_of = np.argsort(self._window_plan(window).order)  # when each stream sample is drawn
        consumed = first_slot
        for slot in range(first_slot, min(first_slot + self._window, len(self.shards))):
            first = int(self._starts[slot]) // self._length - begin
            last = -(-int(self._ends[slot]) // self._length) - begin
            consumed += bool((rank_of[max(first, 0) : max(last, 0)] < samples - begin).all())
        return consumed

    def _window_plan(self, window: int) -> _WindowPlan:
        plan = self._plan  # the loader's thread and the training thread may both be here
        if plan is None or plan.window != window:
            begin, end = int(self._bounds[window]), int(self._bounds[window + 1])
            order = frozen_permutation(end - begin, self._seed, self.epoch, window)
            positions = (begin + order) * self._length
            slots = np.searchsorted(self._ends, positions, side="right")
            starts = positions - self._starts[slots]
            starts[positions + self._length > self._ends[slots]] = -1
            plan = self._plan = _WindowPlan(window, order, self.shards[slots], starts)
        return plan

    def _stream_sample(self, sample: int) -> int:
        window = self.window_of(sample)
        begin = int(self._bounds[window])
        return begin + int(self._window_plan(window).order[sample - begin])


class SampleOrder:
    """The order of all samples of one source for ever: global sample index -> epoch and tokens."""

    def __init__(
        self, shard_tokens: Sequence[int], sequence_length: int, seed: int, window: int
    ) -> None:
        self.sequence_length = sequence_length
        self.samples_per_epoch = sum(shard_tokens) // sequence_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"The training shards hold {sum(shard_tokens)} tokens, less than one sample of "
                f"{sequence_length}. Lower sequence_length or add data."
            )
        self._arguments = (tuple(shard_tokens), sequence_length, seed)
        self._window = window
        self._epochs: dict[int, EpochOrder] = {}

    def epoch_of(self, position: int) -> tuple[int, int]:
        """Return (epoch, samples of that epoch before it) of a global sample index."""
        return divmod(position, self.samples_per_epoch)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._arguments[0])

    def epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch; the last ones asked for are kept."""
        known = self._epochs.get(epoch)  # several threads may ask
        if known is None:
            known = EpochOrder(*self._arguments, epoch=epoch, window=self._window)
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: known}
        return known

    def locate(self, position: int, count: int) -> tuple[Indices, Indices]:
        """Return (shards, starts) of `count` samples; -1 says that `spans` has the answer."""
        parts = []
        while count > 0:
            epoch, sample = self.epoch_of(position)
            order = self.epoch(epoch)
            taken = min(count, order.window_end(order.window_of(sample)) - sample)
            parts.append(order.locate(sample, taken))
            position, count = position + taken, count - taken
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def spans(self, position: int) -> list[Span]:
        """Return where the tokens of a global sample index are."""
        epoch, sample = self.epoch_of(position)
        return self.epoch(epoch).spans(sample)

    def window_key(self, position: int) -> tuple[int, ...]:
        """Return (epoch, window): what changes when `upcoming_shards` may have changed."""
        epoch, sample = self.epoch_of(position)
        return epoch, self.epoch(epoch).window_of(sample)

    def upcoming_shards(self, position: int) -> tuple[list[int], list[int]]:
        """Return the shards of the rest of this window, by first use, and of the next one."""
        epoch, sample = self.epoch_of(position)
        order = self.epoch(epoch)
        end = order.window_end(order.window_of(sample))
        return order.upcoming_shards(sample), self._window_after(epoch, end)

    def _window_after(self, epoch: int, sample: int) -> list[int]:
        if sample >= self.samples_per_epoch:
            return self.epoch(epoch + 1).window_shards(0)
        order = self.epoch(epoch)
        return order.window_shards(order.window_of(sample))

    def shards_consumed(self, position: int) -> int:
        """Return how many shards have been wholly used in the epoch of a global sample index."""
        epoch, sample = self.epoch_of(position)
        return self.epoch(epoch).shards_consumed(sample)

    def largest_window(self) -> list[int]:
        """Return shards whose sizes bound those of any window with what it reaches into."""
        tokens = self._arguments[0]
        by_size = sorted(range(len(tokens)), key=lambda shard: tokens[shard], reverse=True)
        return by_size[: self._window + 1]
