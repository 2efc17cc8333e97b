"""Batches: the tensors of each step, prepared ahead in a thread.

sample order -> local cache -> batches -> train step
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.training_config import TrainingConfig
from utils.base.errors import ShardError
from utils.data.data_state import DataState
from utils.data.mixture import DataOrder, build_order
from utils.data.sample_order import Span
from utils.data.shard_cache import ShardCache
from utils.data.shard_index import DataSource, ShardFacts, read_tokenizer_files
from utils.data.token_stream import choose_samples, read_tokens
from utils.storage.open import open_bucket

PREFETCHED_STEPS = 4
SEARCH_BLOCK = 1024
STOP_POLL_SECONDS = 0.1
CLOSE_SECONDS = 2.0

log = logging.getLogger(__name__)


class SampleReader:
    """Reads samples by their global sample index.

    With `bad_shard: skip`, a sample that touches an unusable shard is replaced by the next sample
    of the order that lies within one usable shard. Which samples those are depends on the order and
    on which shards are unusable, on nothing else: every rank and every restart replaces the same.
    `bad_shards` are those that were found unusable before, by number.
    """

    def __init__(
        self,
        order: DataOrder,
        cache: ShardCache,
        *,
        skip_bad_shards: bool = False,
        bad_shards: Iterable[int] = (),
    ) -> None:
        self.order, self.cache = order, cache
        self.bad_shards = frozenset(bad_shards)
        """Numbers of the shards known to be unusable; the training thread reads it while the
        loader's thread adds to it."""
        self._skip = skip_bad_shards

    def read(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """Return samples `first` to `first + count`: int64 [count, sequence_length].

        Raises:
            ShardError: A shard is unusable and not skipped, or no shard is usable.
            StorageError: A shard cannot be downloaded.
        """
        length = self.order.sequence_length
        batch = np.empty((count, length), dtype=np.int64)
        shards, starts = self.order.locate(first, count)
        places = zip(shards.tolist(), starts.tolist(), strict=True)
        for row, (shard, start) in enumerate(places):
            if start >= 0 and not self._skip:
                batch[row] = self.cache.tokens(shard)[start : start + length]
            else:
                self._read_row(first + row, batch[row])
        return batch

    def _read_row(self, position: int, row: np.ndarray[Any, Any]) -> None:
        spans = self.order.spans(position)
        while True:
            if any(span.shard in self.bad_shards for span in spans):
                spans = [self._replacement(position)]
            try:
                return _copy(self.cache, spans, row)
            except ShardError as exc:
                if not self._skip:
                    raise
                self._note_bad(spans, exc)

    def _note_bad(self, spans: Sequence[Span], error: ShardError) -> None:
        for span in spans:
            try:
                self.cache.tokens(span.shard)
            except ShardError:
                self.bad_shards |= {span.shard}
                log.warning("Skipping a bad shard, its samples are replaced: %s", error)

    def _replacement(self, position: int) -> Span:
        """Return the next sample after `position` that lies within one shard not known as bad."""
        length, last = self.order.sequence_length, position + 2 * self.order.samples_per_epoch
        for first in range(position + 1, last, SEARCH_BLOCK):
            shards, starts = self.order.locate(first, SEARCH_BLOCK)
            usable = (starts >= 0) & ~np.isin(shards, list(self.bad_shards))
            if usable.any():
                found = int(np.argmax(usable))
                return Span(int(shards[found]), int(starts[found]), length)
        raise ShardError("all shards", f"{len(self.bad_shards)} of them are unusable.")


def _copy(cache: ShardCache, spans: Sequence[Span], row: np.ndarray[Any, Any]) -> None:
    filled = 0
    for span in spans:
        tokens = cache.tokens(span.shard)
        row[filled : filled + span.length] = tokens[span.start : span.start + span.length]
        filled += span.length


@dataclass(frozen=True)
class StepShape:
    """How the samples of a step lie over micro-steps and ranks.

    A micro-batch is the samples in one forward of one rank; `accumulation` of them make a step.
    """

    micro_batch: int
    accumulation: int
    rank: int = 0
    world_size: int = 1

    @property
    def samples(self) -> int:
        """Samples in a step, over all ranks."""
        return self.micro_batch * self.accumulation * self.world_size

    def positions(self, first: int) -> list[range]:
        """Return the global sample indices of this rank's micro-batches in the step from `first`.

        The step as a whole takes the same indices at any world size.
        """
        starts = (
            first + (number * self.world_size + self.rank) * self.micro_batch
            for number in range(self.accumulation)
        )
        return [range(start, start + self.micro_batch) for start in starts]


class BatchLoader:
    """Yields the micro-batches of each step, prepared ahead in a thread.

    The reader is closed with the loader. `position` is the global sample index to begin at, a
    multiple of nothing in particular. `should_stop` is asked while no batch is ready, about every
    0.1 s; once it says so, the iteration ends. Batches that are ready are yielded all the same.
    """

    def __init__(
        self,
        reader: SampleReader,
        shape: StepShape,
        *,
        position: int,
        pin_memory: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.wait_seconds = 0.0
        """Time that the training thread has waited for data."""
        self._reader, self._shape, self._position = reader, shape, position
        self._pin_memory, self._should_stop = pin_memory, should_stop
        self._window: tuple[int, ...] | None = None
        self._ready: queue.Queue[list[torch.Tensor] | BaseException] = queue.Queue(PREFETCHED_STEPS)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Yield, for each step, `accumulation` int64 tensors [micro_batch, sequence_length]."""
        while (item := self._wait()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and its cache."""
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._reader.cache.close()  # first: the thread may wait for a bucket that does not answer
        self._thread.join(CLOSE_SECONDS)  # a daemon: it may wait for such a bucket for ever

    def _wait(self) -> list[torch.Tensor] | BaseException | None:
        """Return the next item, or None where a stop comes before it."""
        started = time.perf_counter()
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    return self._ready.get(timeout=STOP_POLL_SECONDS)
                if self._should_stop():
                    return None
        finally:
            self.wait_seconds += time.perf_counter() - started

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
        self._follow_window()
        step = []
        for positions in self._shape.positions(self._position):
            tensor = torch.from_numpy(self._reader.read(positions.start, len(positions)))
            step.append(tensor.pin_memory() if self._pin_memory else tensor)
        self._position += self._shape.samples
        return step

    def _follow_window(self) -> None:
        """Keep this window's shards and the next one's; let the rest go."""
        order = self._reader.order
        window = order.window_key(self._position)
        if self._window == window:
            return
        self._window = window
        now, later = order.upcoming_shards(self._position)
        # What this step touches comes first: the training thread may be waiting for it.
        mine = self._shape.positions(self._position)
        touched = [
            span.shard for group in mine for position in group for span in order.spans(position)
        ]
        self._reader.cache.prefetch(list(dict.fromkeys([*touched, *now])), later)


class ValidationData:
    """The validation samples: shards in the order of their names, cut without overlap.

    `max_samples` of them are used, as `choose_samples` takes them. `skip_bad_shards` leaves
    unusable shards out instead of failing at the first evaluation.
    """

    def __init__(
        self,
        cache: ShardCache,
        shards: Sequence[ShardFacts],
        sequence_length: int,
        max_samples: int | None,
        *,
        skip_bad_shards: bool = False,
    ) -> None:
        self.sequence_length = sequence_length
        self._cache = cache
        tokens = [shard.tokens for shard in shards]
        cache.prefetch(range(len(shards)))
        if skip_bad_shards:
            tokens = [self._usable_tokens(number, shard) for number, shard in enumerate(shards)]
        self._ends = np.cumsum(tokens, dtype=np.int64)
        total = int(self._ends[-1]) if len(shards) else 0
        self._samples = choose_samples(total, sequence_length, max_samples)
        self.num_samples = len(self._samples)

    def batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[torch.Tensor]:
        """Yield this rank's share as int64 tensors of at most [batch_size, sequence_length]."""
        mine, length = self._samples[rank::world_size], self.sequence_length
        for first in range(0, len(mine), batch_size):
            rows = [
                read_tokens(self._cache, self._ends, sample * length, length)
                for sample in mine[first : first + batch_size]
            ]
            yield torch.from_numpy(np.stack(rows))

    def close(self) -> None:
        """Release the cache."""
        self._cache.close()

    def _usable_tokens(self, number: int, shard: ShardFacts) -> int:
        try:
            self._cache.tokens(number)
        except ShardError as exc:
            log.warning("Leaving out a bad validation shard: %s", exc)
            return 0
        return shard.tokens


class TrainingData:
    """The data of a run: their order at once, batches and validation samples once it is opened.

    The first source also has the validation data.
    """

    validation: ValidationData
    """The validation samples; there once it is opened."""

    def __init__(
        self, config: TrainingConfig, sources: Sequence[DataSource], cache: Path, vocab_size: int
    ) -> None:
        self._config, self._sources = config, tuple(sources)
        self._cache, self._vocab_size = cache, vocab_size
        self._shards = [source.index.training for source in sources]
        self.order = build_order(
            [[shard.tokens for shard in shards] for shards in self._shards],
            [source.weight for source in sources],
            config.sequence_length,
            config.seed,
            config.shuffle_window_shards,
        )
        self._should_skip = config.bad_shard == "skip"
        self._loader: BatchLoader | None = None
        self._waited = 0.0

    def open(self, bad_shards: Iterable[int]) -> None:
        """Open the buckets.

        `bad_shards` are those that were found unusable before, by number.

        Raises:
            ConfigError: `cache_limit_bytes` is below what is needed at once.
        """
        config, index = self._config, self._sources[0].index
        self._known_bad_shards = tuple(bad_shards)
        user_project = config.gcs_user_project
        self._buckets = [open_bucket(source.uri, user_project) for source in self._sources]
        self._reader = self._build_reader()
        self.validation = ValidationData(
            ShardCache([(self._buckets[0], index.validation)], self._cache, self._vocab_size),
            index.validation,
            config.sequence_length,
            config.max_eval_samples,
            skip_bad_shards=self._should_skip,
        )

    def read_tokenizer(self) -> dict[str, bytes]:
        """Return the tokenizer that checkpoints get: the first source's, file name -> bytes."""
        return read_tokenizer_files(self._buckets[0], self._sources[0].index)

    def load(
        self,
        position: int,
        rank: int,
        world_size: int,
        *,
        pin_memory: bool,
        should_stop: Callable[[], bool],
    ) -> Iterator[list[torch.Tensor]]:
        """Yield this rank's micro-batches of each step, as `BatchLoader` does."""
        self._loader = BatchLoader(
            self._reader,
            StepShape(
                self._config.per_device_train_batch_size,
                self._config.resolve_batch(world_size)[1],
                rank,
                world_size,
            ),
            position=position,
            pin_memory=pin_memory,
            should_stop=should_stop,
        )
        return iter(self._loader)

    def stop_loading(self) -> None:
        """Stop reading ahead; `load` may begin anew elsewhere."""
        if self._loader is not None:
            self._loader.close()
        self._loader, self._waited = None, 0.0
        self._reader = self._build_reader()

    def take_wait_seconds(self) -> float:
        """Return the time that training has waited for data since this was asked before."""
        waited = self._loader.wait_seconds if self._loader else 0.0
        since, self._waited = waited - self._waited, waited
        return since

    def describe(self, position: int, bad_shards: Iterable[int] = ()) -> DataState:
        """Return what a checkpoint keeps of a position in the data.

        `position` counts samples over all ranks; `bad_shards` were found unusable by now, on any
        rank.
        """
        return DataState(
            sample_index=position,
            epoch=self.order.epoch_of(position)[0],
            files_consumed=self.order.shards_consumed(position),
            sequence_length=self._config.sequence_length,
            seed=self._config.seed,
            shuffle_window_shards=self._config.shuffle_window_shards,
            shards=tuple(shard for group in self._shards for shard in group),
            source_sizes=tuple(len(group) for group in self._shards),
            weights=tuple(source.weight for source in self._sources),
            bad_shards=tuple(bad_shards),
        )

    @property
    def bad_shards(self) -> frozenset[int]:
        """Shards that this rank knows to be unusable, by number."""
        return self._reader.bad_shards

    def close(self) -> None:
        """Stop reading, and let go of caches and buckets."""
        if self._loader is not None:
            self._loader.close()
        else:
            self._reader.cache.close()
        self.validation.close()
        for bucket in self._buckets:
            bucket.close()

    def _build_reader(self) -> SampleReader:
        cache = ShardCache(
            list(zip(self._buckets, self._shards, strict=True)),
            self._cache,
            self._vocab_size,
            self._config.cache_limit_bytes,
        )
        window = f"one shuffle window of {self._config.shuffle_window_shards} shards"
        cache.require_room_for(self.order.largest_window(), window)
        return SampleReader(
            self.order,
            cache,
            skip_bad_shards=self._should_skip,
            bad_shards=self._known_bad_shards,
        )
