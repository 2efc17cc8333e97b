"""Sample order, shard cache and batches: from the shard index to the tensors of each step.

    shard index -> sample order -> local cache -> batches -> train step

The token stream of an epoch is its shards, put in an order that depends on (seed, epoch) alone,
laid end to end. Sample i of the stream is tokens [i * L, (i + 1) * L); only the stream's last
incomplete sample is dropped, at most L - 1 tokens an epoch. Samples are then shuffled within
windows of `shuffle_window_shards` shards. The position in the data is one number: the global sample
index, which never looks at ranks, workers or restarts. Finding it costs O(shards), once an epoch.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import DataError, ShardError
from utils.shard_index import (
    MASK_KEY,
    ShardFacts,
    describe_shard_changes,
    find_token_key,
    fingerprint_shards,
    open_shard,
    read_array,
)
from utils.storage import Bucket

PREFETCHED_STEPS = 4
DATA_STATE_FORMAT = 1

log = logging.getLogger(__name__)


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
        if self._cached is None or self._cached[0] != window:
            length = int(self._bounds[window + 1] - self._bounds[window])
            self._cached = window, _permutation(length, self._seed, self.epoch, window)
        return self._cached[1]

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
        self._epochs: dict[int, EpochOrder] = {}

    def epoch_of(self, position: int) -> tuple[int, int]:
        """Return (epoch, samples of that epoch before it) of a global sample index."""
        return divmod(position, self.samples_per_epoch)

    def epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch; the two used last are kept."""
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = EpochOrder(*self._arguments, epoch=epoch, window=self._window)
        return self._epochs[epoch]

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


def decode_shard(path: Path, name: str, vocab_size: int) -> np.ndarray[Any, Any]:
    """Return a shard's tokens, flat, as uint16 or uint32.

    Args:
        path: The NPZ file.
        name: Its name for messages.
        vocab_size: Ids must be below it; checked before any cast.

    Raises:
        ShardError: The file is damaged or its contents cannot be trained on.
    """
    with open_shard(path, name) as archive:
        tokens = read_array(archive, find_token_key(archive, name), name)
        if f"{MASK_KEY}.npy" in archive.namelist():
            mask = read_array(archive, MASK_KEY, name)
            if mask.shape != tokens.shape:
                raise ShardError(name, f"{MASK_KEY} has another shape than the tokens.")
            tokens = tokens[mask != 0]
    if tokens.size == 0:
        raise ShardError(name, "it holds no tokens.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0:
        raise ShardError(name, f"token id {low} is negative.")
    if high >= vocab_size:
        raise ShardError(
            name,
            f"token id {high} is outside the vocabulary of {vocab_size}. "
            "Tokenize it again, or set model_overrides.vocab_size.",
        )
    return tokens.astype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class ShardCache:
    """Decoded shards on local disk, memory-mapped; shared by the ranks of one machine."""

    def __init__(
        self, bucket: Bucket, shards: Sequence[ShardFacts], directory: Path, vocab_size: int
    ) -> None:
        self._bucket, self._shards, self._vocab_size = bucket, tuple(shards), vocab_size
        self._directory = directory / hashlib.sha256(bucket.uri.encode()).hexdigest()[:12]
        self._open: dict[int, np.ndarray[Any, Any]] = {}
        self._loading: dict[int, Future[np.ndarray[Any, Any]]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="shard-cache")

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to download and decode shards in the background."""
        for shard in shards:
            self._request(shard)

    def tokens(self, shard: int) -> np.ndarray[Any, Any]:
        """Return a shard's tokens, waiting for it where it is not here yet."""
        opened = self._open.get(shard)
        return opened if opened is not None else self._request(shard).result()

    def release(self, keep: Sequence[int]) -> None:
        """Unmap every shard that is not in `keep`; its file stays."""
        with self._lock:
            for shard in set(self._open) - set(keep):
                del self._open[shard]
                self._loading.pop(shard, None)

    def close(self) -> None:
        """Stop background work."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._open.clear()

    def _request(self, shard: int) -> Future[np.ndarray[Any, Any]]:
        with self._lock:
            if shard not in self._loading:
                self._loading[shard] = self._pool.submit(self._load, shard)
            return self._loading[shard]

    def _load(self, shard: int) -> np.ndarray[Any, Any]:
        facts = self._shards[shard]
        key = hashlib.sha256(
            repr((facts.name, facts.size, facts.crc32c, self._vocab_size)).encode()
        ).hexdigest()[:16]
        path = self._directory / f"{Path(facts.name).stem}-{key}.npy"
        if not path.is_file():
            self._fill(facts, path)
        tokens: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(tokens) != facts.tokens:
            raise ShardError(
                facts.name, f"it holds {len(tokens)} tokens, the index says {facts.tokens}."
            )
        self._open[shard] = tokens
        return tokens

    def _fill(self, facts: ShardFacts, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        stem = f".{path.name}.{os.getpid()}.{threading.get_ident()}"
        download, decoded = path.with_name(f"{stem}.npz"), path.with_name(f"{stem}.npy")
        try:
            crc32c = self._bucket.get_file(facts.name, download)
            if facts.crc32c is not None and crc32c != facts.crc32c:
                raise ShardError(
                    facts.name, f"its crc32c is {crc32c}, the index says {facts.crc32c}."
                )
            np.save(decoded, decode_shard(download, facts.name, self._vocab_size))
            decoded.replace(path)
        finally:
            download.unlink(missing_ok=True)
            decoded.unlink(missing_ok=True)


def read_samples(
    order: SampleOrder, cache: ShardCache, positions: Sequence[int]
) -> np.ndarray[Any, Any]:
    """Return the samples of some global sample indices: int64 [len(positions), sequence_length]."""
    batch = np.empty((len(positions), order.sequence_length), dtype=np.int64)
    for row, position in zip(batch, positions, strict=True):
        filled = 0
        for span in order.spans(position):
            tokens = cache.tokens(span.shard)
            row[filled : filled + span.length] = tokens[span.start : span.start + span.length]
            filled += span.length
    return batch


def rank_positions(
    first: int, micro_batch: int, accumulation: int, rank: int, world_size: int
) -> list[list[int]]:
    """Return the global sample indices of one rank's micro-batches in the step from `first` on.

    The step as a whole takes the same indices at any world size.
    """
    starts = (first + (m * world_size + rank) * micro_batch for m in range(accumulation))
    return [list(range(start, start + micro_batch)) for start in starts]


class BatchLoader:
    """Yields the micro-batches of each step, prepared ahead in a thread.

    Args:
        order: Sample order.
        cache: Where the tokens come from.
        position: Global sample index to begin at; a multiple of nothing in particular.
        micro_batch: Samples in one forward of one rank.
        accumulation: Micro-steps in a step.
        rank: This process.
        world_size: All processes.
    """

    def __init__(
        self,
        order: SampleOrder,
        cache: ShardCache,
        *,
        position: int,
        micro_batch: int,
        accumulation: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.wait_seconds = 0.0
        """Time that the training thread has waited for data."""
        self._order, self._cache, self._position = order, cache, position
        self._shape = (micro_batch, accumulation, rank, world_size)
        self._pin_memory = pin_memory
        self._window: tuple[int, int] | None = None
        self._ready: queue.Queue[list[torch.Tensor] | BaseException] = queue.Queue(PREFETCHED_STEPS)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Yield, for each step, `accumulation` int64 tensors [micro_batch, sequence_length]."""
        while True:
            started = time.perf_counter()
            item = self._ready.get()
            self.wait_seconds += time.perf_counter() - started
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and the cache behind it."""
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._thread.join()
        self._cache.close()

    def _produce(self) -> None:
        try:
            while not self._stopped.is_set():
                self._put(self._build_step())
        except BaseException as exc:  # noqa: BLE001 - handed to the training thread, raised there
            self._put(exc)

    def _put(self, item: list[torch.Tensor] | BaseException) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return

    def _build_step(self) -> list[torch.Tensor]:
        micro_batch, accumulation, rank, world_size = self._shape
        self._follow_window()
        step = []
        for positions in rank_positions(
            self._position, micro_batch, accumulation, rank, world_size
        ):
            tensor = torch.from_numpy(read_samples(self._order, self._cache, positions))
            step.append(tensor.pin_memory() if self._pin_memory else tensor)
        self._position += micro_batch * accumulation * world_size
        return step

    def _follow_window(self) -> None:
        """Keep this window's shards and the next one's; let the rest go."""
        epoch, sample = self._order.epoch_of(self._position)
        order = self._order.epoch(epoch)
        window = order.window_of(sample)
        if self._window == (epoch, window):
            return
        self._window = (epoch, window)
        needed = order.window_shards(window)
        if window + 1 < order.num_windows:
            needed += order.window_shards(window + 1)
        else:
            needed += self._order.epoch(epoch + 1).window_shards(0)
        self._cache.prefetch(needed)
        self._cache.release(needed)


class ValidationData:
    """The validation samples: shards in the order of their names, cut without overlap.

    Args:
        cache: Where the tokens come from.
        shards: Validation shards.
        sequence_length: Tokens in a sample.
        max_samples: Use only so many, the first; None for all.
    """

    def __init__(
        self,
        cache: ShardCache,
        shards: Sequence[ShardFacts],
        sequence_length: int,
        max_samples: int | None,
    ) -> None:
        self._cache, self._length = cache, sequence_length
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        available = (int(self._ends[-1]) if len(shards) else 0) // sequence_length
        self.num_samples = available if max_samples is None else min(available, max_samples)

    def batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[torch.Tensor]:
        """Yield this rank's share as int64 tensors of at most [batch_size, sequence_length]."""
        mine = range(rank, self.num_samples, world_size)
        for first in range(0, len(mine), batch_size):
            rows = [self._sample(sample) for sample in mine[first : first + batch_size]]
            yield torch.from_numpy(np.stack(rows))

    def close(self) -> None:
        """Release the cache."""
        self._cache.close()

    def _sample(self, sample: int) -> np.ndarray[Any, Any]:
        position, parts = sample * self._length, []
        end = position + self._length
        shard = int(np.searchsorted(self._ends, position, side="right"))
        while position < end:
            begin = int(self._ends[shard - 1]) if shard else 0
            tokens = self._cache.tokens(shard)[position - begin : end - begin]
            parts.append(tokens.astype(np.int64))
            position += len(tokens)
            shard += 1
        return np.concatenate(parts)
