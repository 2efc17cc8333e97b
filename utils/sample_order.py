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

from utils.errors import DataError
from utils.shard_index import ShardFacts, describe_shard_changes, fingerprint_shards

DATA_STATE_FORMAT = 1


def _permutation(length: int, *key: int) -> np.ndarray[Any, Any]:
    """Return a permutation that depends on `key` alone.

    RandomState's stream is frozen for all NumPy versions (NEP 19); that of Generator is not.
    """
    digest = hashlib.sha256(repr(key).encode("ascii")).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4")).permutation(length)


@dataclass(frozen=True)
class Span:
    """A run of tokens within one shard: `length` of them from `start`."""

    shard: int
    start: int
    length: int


class EpochOrder:
    """The order of one epoch: a pure function of (shard tokens, sequence length, seed, epoch)."""

    def __init__(
        self, shard_tokens: Sequence[int], sequence_length: int, seed: int, epoch: int, window: int
    ) -> None:
        tokens = np.asarray(shard_tokens, dtype=np.int64)
        self.epoch = epoch
        self.num_samples = int(tokens.sum()) // sequence_length
        self.shards = _permutation(len(tokens), seed, epoch)
        self._length, self._seed, self._window = sequence_length, seed, window
        self._ends = np.cumsum(tokens[self.shards])
        self._starts = self._ends - tokens[self.shards]
        firsts = -(-self._starts[::window] // sequence_length)
        # Window w holds the samples that begin in its shards.
        self._bounds = np.append(np.minimum(firsts, self.num_samples), self.num_samples)
        self._cached: tuple[int, np.ndarray[Any, Any]] | None = None

    @property
    def num_windows(self) -> int:
        """Number of shuffle windows in the epoch."""
        return len(self._bounds) - 1

    def window_of(self, sample: int) -> int:
        """Return the window that the epoch's sample number `sample` is drawn from."""
        return int(np.searchsorted(self._bounds, sample, side="right")) - 1

    def window_shards(self, window: int) -> list[int]:
        """Return the shards that the samples of a window touch, in stream order."""
        last = (window + 1) * self._window
        # Its last sample may reach into the shards behind the window.
        reach = int(self._bounds[window + 1]) * self._length if window < self.num_windows else 0
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

    def shards_consumed(self, samples: int) -> int:
        """Return how many shards have been wholly used after `samples` samples of the epoch."""
        if samples >= self.num_samples:
            return len(self.shards)
        window = self.window_of(samples)
        first_slot, begin = window * self._window, int(self._bounds[window])
        rank_of = np.argsort(self._window_order(window))  # when each stream sample is drawn
        consumed = first_slot
        for slot in range(first_slot, min(first_slot + self._window, len(self.shards))):
            first = int(self._starts[slot]) // self._length - begin
            last = -(-int(self._ends[slot]) // self._length) - begin
            consumed += bool((rank_of[max(first, 0) : max(last, 0)] < samples - begin).all())
        return consumed

    def _window_order(self, window: int) -> np.ndarray[Any, Any]:
        cached = self._cached  # the loader's thread and the training thread may both be here
        if cached is None or cached[0] != window:
            length = int(self._bounds[window + 1] - self._bounds[window])
            cached = window, _permutation(length, self._seed, self.epoch, window)
            self._cached = cached
        return cached[1]

    def _stream_sample(self, sample: int) -> int:
        window = self.window_of(sample)
        begin = int(self._bounds[window])
        return begin + int(self._window_order(window)[sample - begin])


class SampleOrder:
    """The order of all samples for ever: global sample index -> epoch and tokens."""

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
        self._epochs: tuple[EpochOrder, ...] = ()

    def epoch_of(self, position: int) -> tuple[int, int]:
        """Return (epoch, samples of that epoch before it) of a global sample index."""
        return divmod(position, self.samples_per_epoch)

    def epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch; the two used last are kept."""
        order = next((kept for kept in self._epochs if kept.epoch == epoch), None)
        if order is None:
            order = EpochOrder(*self._arguments, epoch=epoch, window=self._window)
            # Replaced as a whole: the loader's thread and the training thread may both be here.
            self._epochs = (*self._epochs[-1:], order)
        return order

    def spans(self, position: int) -> list[Span]:
        """Return where the tokens of a global sample index are."""
        epoch, sample = self.epoch_of(position)
        return self.epoch(epoch).spans(sample)


@dataclass(frozen=True)
class DataState:
    """The position in the data, as a checkpoint keeps it.

    Attributes:
        sample_index: Samples consumed since the start of the run, over all ranks.
        epoch: Epoch of the next sample.
        files_consumed: Training shards wholly consumed in that epoch.
        sequence_length: Tokens in a sample.
        seed: Seed of the order.
        shuffle_window_shards: Window of the order.
        shards: The training shards.
    """

    sample_index: int
    epoch: int
    files_consumed: int
    sequence_length: int
    seed: int
    shuffle_window_shards: int
    shards: tuple[ShardFacts, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the state as it is written."""
        return {
            "format": DATA_STATE_FORMAT,
            "epoch": self.epoch,
            "sample_index": self.sample_index,
            "files_consumed": self.files_consumed,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "shuffle_window_shards": self.shuffle_window_shards,
            "fingerprint": fingerprint_shards(self.shards),
            "shards": [[s.name, s.tokens, s.size, s.crc32c] for s in self.shards],
        }

    @classmethod
    def from_json(cls, value: Any) -> DataState:
        """Return the state that `to_json` wrote.

        Raises:
            DataError: It is of another format.
        """
        if not isinstance(value, dict) or value.get("format") != DATA_STATE_FORMAT:
            raise DataError("data_state.json is of a format that this version does not know.")
        return cls(
            sample_index=value["sample_index"],
            epoch=value["epoch"],
            files_consumed=value["files_consumed"],
            sequence_length=value["sequence_length"],
            seed=value["seed"],
            shuffle_window_shards=value["shuffle_window_shards"],
            shards=tuple(ShardFacts(*row) for row in value["shards"]),
        )

    def require_same_order(self, current: DataState) -> None:
        """Raise unless the current data gives the same samples in the same order.

        Raises:
            DataError: Shards, sequence length, seed or window differ; the message lists how.
        """
        changes = []
        for key in ("sequence_length", "seed", "shuffle_window_shards"):
            if getattr(self, key) != getattr(current, key):
                changes.append(f"{key} {getattr(self, key)} -> {getattr(current, key)}")
        if fingerprint_shards(self.shards) != fingerprint_shards(current.shards):
            changes.append("shards: " + describe_shard_changes(self.shards, current.shards))
        if changes:
            raise DataError(
                "The data differ from the checkpoint's, so the same tokens would not follow: "
                + "; ".join(changes)
                + ". Restore them, or start a new run (--fresh)."
            )
