"""Batches: the tensors of each step, prepared ahead in a thread.

sample order -> local cache -> batches -> train step
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from utils.sample_order import SampleOrder
from utils.shard_cache import ShardCache
from utils.shard_index import ShardFacts

PREFETCHED_STEPS = 4


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
