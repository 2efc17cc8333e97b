"""One start of a run: its parts, and what the loop in train.py asks of them.

    batches -> train step -> metrics, evaluation, checkpoint -> uploader -> the end

Everything that is not the train step is timed and taken out of the reported speed. Watching
changes nothing: logging, evaluating, saving and uploading leave weights and random state alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from configs.training_config import TrainingConfig, compare_configs
from utils import checkpoint_store, checkpoint_utils, tracking
from utils.console import LiveLine, format_duration
from utils.data_state import DataState
from utils.data_utils import BatchLoader, SampleReader, ValidationData
from utils.errors import ConfigError, ExitCode
from utils.evaluation import evaluate
from utils.journal import Journal
from utils.layout import (
    METRICS_HISTORY_FILE,
    TRAINING_CONFIG_FILE,
    Manifest,
    RunPaths,
    read_json,
)
from utils.mixture import build_order
from utils.ranks import gather_to_main
from utils.resume import Start
from utils.shard_cache import ShardCache
from utils.shard_index import DataSource
from utils.stopping import StopRequest
from utils.storage import join_uri, open_bucket
from utils.training_utils import (
    Throughput,
    build_train_state,
    mean_loss,
    set_determinism,
    train_step,
)
from utils.transports import build_transport
from utils.uploader import Uploader, find_unfinished

log = logging.getLogger("train")


class TrainingRun:
    """A context manager that holds everything of one start.

    Args:
        config: The run's configuration.
        paths: Its directories.
        model_config: transformers config of the model.
        sources: Where the training data come from; the first also has the validation data.
        start: Where to begin.
        accelerator: This process among the ranks.
        stop: Asked by the loop.
        background_upload: False uploads within `save`.
        accept_data_change: Go on although the shards are not the checkpoint's.
        accept_config_change: Go on although the configuration trains something else.
    """

    def __init__(
        self,
        config: TrainingConfig,
        paths: RunPaths,
        model_config: Any,
        sources: Sequence[DataSource],
        start: Start,
        accelerator: Accelerator,
        stop: StopRequest,
        *,
        background_upload: bool = True,
        accept_data_change: bool = False,
        accept_config_change: bool = False,
    ) -> None:
        self.config, self.paths, self.stop = config, paths, stop
        self.start, self._sources = start, tuple(sources)
        self._accelerator = accelerator
        self._is_main = accelerator.is_main_process
        set_determinism(config)
        self.state = build_train_state(accelerator, model_config, config)
        self._order = build_order(
            [[shard.tokens for shard in source.index.training] for source in sources],
            [source.weight for source in sources],
            config.sequence_length,
            config.seed,
            config.shuffle_window_shards,
        )
        self._global_batch, self._accumulation = config.resolve_batch(accelerator.num_processes)
        self._skip_bad_shards = config.bad_shard == "skip"
        self._bad_shards: tuple[int, ...] = ()
        if start.checkpoint is not None and start.manifest is not None:
            self._require_same_config(start.checkpoint, accept_config_change)
            self._restore(start.checkpoint, start.manifest, accept_data_change)
        self._document_end = model_config.eos_token_id if config.mask_documents else None
        user_project = config.gcs_user_project or None
        self._buckets = [open_bucket(source.uri, user_project) for source in sources]
        self._reader = self._build_reader(model_config.vocab_size)
        self._validation = self._build_validation(model_config.vocab_size)
        self._tokenizer_files = {
            name: self._buckets[0].read_bytes(name)
            for name in sources[0].index.tokenizer_files
            if self._is_main
        }
        self._journal = Journal(paths.journal)
        self._background_upload = background_upload
        self._uploader: Uploader | None = None
        self._loader: BatchLoader | None = None
        self._live = LiveLine(enabled=False)
        self._throughput = Throughput()
        self._waited = 0.0
        self._saved_at = time.monotonic()
        self._last_record: dict[str, float] = {}
        self._outcome = "failed"

    def __enter__(self) -> TrainingRun:
        """Start trackers, uploader and live line."""
        config, step = self.config, self.state.progress.step
        facts = {
            "run_id": self.start.identity.run_id,
            "branch": self.start.identity.branch,
            "max_steps": config.max_steps,
            "world_size": self._accelerator.num_processes,
            "device": str(self._accelerator.device),
            "precision": self._accelerator.mixed_precision,
            "num_parameters": sum(p.numel() for p in self.state.core_model.parameters()),
            "tokens_per_step": self.tokens_per_step,
        }
        tracking.start_trackers(self._accelerator, config, self.paths.logs, facts, step)
        if self._is_main and config.checkpoint_uri:
            self._uploader = self._build_uploader()
        self._live = LiveLine(enabled=self._is_main)
        self._throughput = Throughput()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop every thread, close every file, and note how it ended."""
        self._live.close()
        if self._loader is not None:
            self._loader.close()
        else:
            self._reader.cache.close()
        self._validation.close()
        if self._uploader is not None:
            self._uploader.close()
        for bucket in self._buckets:
            bucket.close()
        if self._is_main:
            tracking.record_end(self.paths.logs, self.state.progress.step, self._outcome)
        if error is None:
            self._accelerator.end_training()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer update over all ranks."""
        return self._global_batch * self.config.sequence_length

    def batches(self, last_step: int) -> Iterator[list[torch.Tensor]]:
        """Yield this rank's micro-batches of each step up to `last_step`."""
        progress = self.state.progress
        if progress.step >= last_step:
            log.info("Step %d of %d is done already.", progress.step, self.config.max_steps)
            return
        self._loader = BatchLoader(
            self._reader,
            position=progress.sample_index,
            micro_batch=self.config.per_device_train_batch_size,
            accumulation=self._accumulation,
            rank=self._accelerator.process_index,
            world_size=self._accelerator.num_processes,
            pin_memory=self._accelerator.device.type == "cuda",
        )
        for batches in self._loader:
            yield batches
            if progress.step >= last_step:
                return

    def train_step(self, batches: list[torch.Tensor]) -> int:
        """Do one optimizer update; return how many are done."""
        train_step(self.state, batches, self.config.max_grad_norm, self._document_end)
        self._throughput.step()
        self._show_live()
        return self.state.progress.step

    def log_metrics(self) -> None:
        """Log the mean loss since the last time, and the speed."""
        state, progress = self.state, self.state.progress
        loss = mean_loss(state)
        waited = self._loader.wait_seconds if self._loader else 0.0
        speed = self._throughput.report(self.tokens_per_step, waited - self._waited)
        self._waited = waited
        record = {
            "epoch": self._order.epoch_of(progress.sample_index)[0],
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "learning_rate": state.last_learning_rate,
            "grad_norm": float(state.grad_norm.item()),
            "tokens_seen": progress.tokens_seen,
            **speed,
            "eta_seconds": (self.config.max_steps - progress.step) * speed["step_seconds"],
        }
        state.interval_loss.zero_()
        progress.interval_steps = 0
        progress.add_metrics(record)
        self._accelerator.log(record, step=progress.step)
        self._last_record = record
        log.info("Step %s", self._describe(record))

    def is_save_due(self) -> bool:
        """Tell whether `save_seconds` have passed since the last save; ranks agree."""
        seconds = self.config.save_seconds
        if seconds is None:
            return False
        return self.stop.any_rank(time.monotonic() - self._saved_at >= seconds)

    def evaluate(self) -> bool:
        """Measure the validation loss, once a step at most; tell whether it is the best so far."""
        progress = self.state.progress
        if progress.validation_step == progress.step and progress.validation_loss is not None:
            return False
        started = time.perf_counter()
        loss = evaluate(
            self.state, self._validation, self.config.eval_batch_size, self._document_end
        )
        self._throughput.pause(time.perf_counter() - started)
        if loss is None:
            return False
        improved = progress.add_validation(loss)
        record = {
            "validation_loss": loss,
            "validation_perplexity": math.exp(min(loss, 700.0)),
            "best_validation_loss": progress.best_validation_loss,
        }
        self._accelerator.log(record, step=progress.step)
        log.info(
            "Validation at step %d: loss %.4f, perplexity %.1f, best %.4f (%d samples, %s).",
            progress.step, loss, record["validation_perplexity"], progress.best_validation_loss,
            self._validation.num_samples, format_duration(time.perf_counter() - started),
        )  # fmt: skip
        return improved

    def save(self) -> None:
        """Commit a checkpoint, queue its upload, and let old ones go."""
        started = time.perf_counter()
        log.info("Saving checkpoint at step %d.", self.state.progress.step)
        checkpoint = checkpoint_utils.save_checkpoint(
            self.state,
            self._data_state(self._known_bad_shards()),
            self.config,
            self.start.identity,
            self.paths.checkpoints,
            self._tokenizer_files,
        )
        if checkpoint is not None:
            log.info("Saved %s in %s.", checkpoint.name,
                     format_duration(time.perf_counter() - started))  # fmt: skip
            if self._uploader is not None:
                self._uploader.submit(checkpoint)
            self._apply_retention()
        self._saved_at = time.monotonic()
        self._throughput.pause(time.perf_counter() - started)

    def _apply_retention(self) -> None:
        checkpoint_store.apply_retention(
            self.paths.checkpoints,
            self._journal,
            self.config,
            run_id=self.start.identity.run_id,
            is_uploading_on=self._uploader is not None,
        )

    def _known_bad_shards(self) -> list[int]:
        """Return what any rank has found unusable, on the main process."""
        found = gather_to_main(sorted(self._reader.bad_shards)) or []
        return sorted({shard for shards in found for shard in shards})

    def finish(self) -> ExitCode:
        """Wait for uploads, say what this start made, and return the exit code."""
        step, reason = self.state.progress.step, self.stop.reason
        self._outcome = "done" if step >= self.config.max_steps else "stopped"
        self._live.close()
        # The other ranks leave at once: one that waited for hours of uploads would time out.
        code = self._finish_uploads()
        if self._outcome == "done":
            log.info("Done: step %d of %d.", step, self.config.max_steps)
        elif reason is not None:
            log.info("Stopped by %s at step %d, saved. Go on with --resume latest.", reason, step)
            return ExitCode.STOPPED
        else:
            log.info("Ended after step %d as asked. Go on with --resume latest.", step)
        return code

    def _finish_uploads(self) -> ExitCode:
        uploader = self._uploader
        if uploader is None:
            return ExitCode.DONE
        if uploader.pending:
            log.info("Waiting for %d uploads.", len(uploader.pending))
        pending = uploader.drain(
            self.config.upload_deadline_seconds,
            lambda names: self._live.show(f"uploading {', '.join(names)}"),
        )
        self._apply_retention()
        if not pending and not uploader.failures:
            return ExitCode.DONE
        for name in pending:
            log.error("%s was not uploaded before the deadline.", name)
        missing = [*pending, *uploader.failures]
        kept = [name for name in missing if (self.paths.checkpoints / name).is_dir()]
        log.error(
            "%d checkpoints are not verified in the bucket. Kept in %s: %s. "
            "Then: python scripts/upload_manager.py upload-all",
            len(missing), self.paths.checkpoints, ", ".join(kept) or "none",
        )  # fmt: skip
        return ExitCode.NOT_VERIFIED

    def _require_same_config(self, checkpoint: Path, accept: bool) -> None:
        """List what differs from the checkpoint's configuration; refuse what trains differently.

        Raises:
            ConfigError: There is such a difference, and it was not accepted.
        """
        saved = read_json(checkpoint / TRAINING_CONFIG_FILE)
        changes = compare_configs(saved, self.config)
        guarded = list(changes.guarded)
        batch = read_json(checkpoint / METRICS_HISTORY_FILE)["progress"]["global_batch_size"]
        if batch not in (0, self._global_batch):
            guarded.append(
                f"samples a step: {batch} -> {self._global_batch} (global_batch_size={batch} "
                "keeps it)"
            )
        for change in changes.free:
            log.info("Changed since the checkpoint: %s.", change)
        if guarded and not accept:
            raise ConfigError(
                f"{checkpoint.name} was trained with another configuration: {'; '.join(guarded)}. "
                "Put it back, go on all the same with --accept-config-change, or begin anew with "
                "--fresh."
            )
        for change in guarded:
            log.warning("Changed since the checkpoint, as accepted: %s.", change)

    def _restore(self, checkpoint: Path, manifest: Manifest, accept_data_change: bool) -> None:
        saved = checkpoint_utils.read_data_state(checkpoint)
        checkpoint_utils.restore_checkpoint(self.state, checkpoint, manifest, self.config)
        progress = self.state.progress
        changes = saved.describe_changes(self._data_state())
        if changes and accept_data_change:
            progress.sample_index = (saved.epoch + 1) * self._order.samples_per_epoch
            log.warning("The data changed (%s): going on at epoch %d of the new data.",
                        changes, saved.epoch + 1)  # fmt: skip
        else:
            saved.require_same_order(self._data_state())
            self._bad_shards = saved.bad_shards
        log.info("Resumed from %s (step %d).", checkpoint.name, progress.step)

    def _data_state(self, bad_shards: Sequence[int] = ()) -> DataState:
        position = self.state.progress.sample_index
        shards = [source.index.training for source in self._sources]
        return DataState(
            sample_index=position,
            epoch=self._order.epoch_of(position)[0],
            files_consumed=self._order.shards_consumed(position),
            sequence_length=self.config.sequence_length,
            seed=self.config.seed,
            shuffle_window_shards=self.config.shuffle_window_shards,
            shards=tuple(shard for group in shards for shard in group),
            source_sizes=tuple(len(group) for group in shards),
            weights=tuple(source.weight for source in self._sources),
            bad_shards=tuple(bad_shards),
        )

    def _build_reader(self, vocab_size: int) -> SampleReader:
        shards = [source.index.training for source in self._sources]
        cache = ShardCache(
            list(zip(self._buckets, shards, strict=True)),
            self.paths.cache,
            vocab_size,
            self.config.cache_limit_bytes,
        )
        window = f"one shuffle window of {self.config.shuffle_window_shards} shards"
        cache.require_room_for(self._order.largest_window(), window)
        return SampleReader(
            self._order,
            cache,
            skip_bad_shards=self._skip_bad_shards,
            bad_shards=self._bad_shards,
        )

    def _build_validation(self, vocab_size: int) -> ValidationData:
        shards = self._sources[0].index.validation
        cache = ShardCache([(self._buckets[0], shards)], self.paths.cache, vocab_size)
        return ValidationData(
            cache,
            shards,
            self.config.sequence_length,
            self.config.max_eval_samples,
            skip_bad_shards=self._skip_bad_shards,
        )

    def _build_uploader(self) -> Uploader:
        config = self.config
        transport = build_transport(
            join_uri(config.checkpoint_uri, config.run_name),
            config.upload_transport,
            config.gcs_user_project or None,
        )
        uploader = Uploader(transport, self._journal, background=self._background_upload)
        for checkpoint in find_unfinished(self.paths.checkpoints, self._journal, transport.uri):
            uploader.submit(checkpoint)
        return uploader

    def _describe(self, record: dict[str, float]) -> str:
        progress = self.state.progress
        best = progress.best_validation_loss
        milliseconds = record["step_seconds"] * 1e3
        eta_seconds = (self.config.max_steps - progress.step) * record["step_seconds"]
        return (
            f"{progress.step}/{self.config.max_steps}  loss {record['loss']:.4f}  "
            f"ppl {record['perplexity']:.1f}  "
            f"best val {'-' if best is None else format(best, '.4f')}  "
            f"lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
            f"{record['tokens_per_second']:,.0f} tok/s  "
            f"{milliseconds:.0f} ms/step  ETA {format_duration(eta_seconds)}"
        )

    def _show_live(self) -> None:
        if self._last_record:
            self._live.show(self._describe(self._last_record))
        else:
            self._live.show(f"{self.state.progress.step}/{self.config.max_steps}")
