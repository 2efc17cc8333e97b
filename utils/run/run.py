"""One start of a run: its parts, and what the loop in train.py asks of them.

    batches -> train step -> metrics, evaluation, checkpoint -> uploader -> the end

Everything that is not the train step is timed and taken out of the reported speed. Watching
changes nothing: logging, evaluating, saving and uploading leave weights and random state alone.
A request to stop is acted on between two steps, when every rank has its batch or waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import google_crc32c
import torch
from accelerate import Accelerator

from configs.model_config import known_vocab_size
from configs.training_config import TrainingConfig
from utils import checkpoint_utils
from utils.base import ranks
from utils.base.console import LiveLine
from utils.base.errors import (
    DivergenceError,
    ExitCode,
    PretrainError,
    ResourceShortageError,
    SaveError,
)
from utils.base.text import format_duration, perplexity_of
from utils.checkpoints.layout import RunPaths
from utils.checkpoints.saver import Rendezvous
from utils.checkpoints.writer import WriterProcess
from utils.costs.costs import describe_costs, summarize_costs
from utils.costs.spending import Spending, open_meter
from utils.data.data_state import DataState
from utils.data.mixture import build_order
from utils.data.shard_cache import ShardCache
from utils.data.shard_index import DataSource, read_tokenizer_files
from utils.data_utils import BatchLoader, SampleReader, StepShape, ValidationData
from utils.run import bad_steps
from utils.run.evaluation import evaluate
from utils.run.sample_texts import Sampler
from utils.run.saving import RunSaving
from utils.start import restore, resume
from utils.start.machine_sharing import on_every_machine
from utils.start.restore import Consent
from utils.storage.bucket import encode_crc32c
from utils.storage.open import open_bucket
from utils.tracking import tracking
from utils.tracking.metrics_log import append_metrics
from utils.training.step_guard import Verdict
from utils.training.stopping import StopRequest
from utils.training.throughput import RemainingTime, Throughput
from utils.training_utils import (
    build_train_state,
    mean_loss,
    set_determinism,
    train_step,
)
from utils.uploads.transports import TransportOptions

WAIT_LINE_SECONDS = 30.0
LEAVING_SHARE = 0.1  # of the grace period, for ending threads and releasing what is held

log = logging.getLogger("train")


class TrainingRun:
    """A context manager that holds everything of one start.

    Args:
        config: The run's configuration.
        paths: Its directories.
        model_config: transformers config of the model.
        sources: Where the training data come from; the first also has the validation data.
        plan: Where to begin.
        accelerator: This process among the ranks.
        stop: Asked between two steps.
        consent: What is accepted that a resume would refuse.
        transport: The way to the bucket; None uploads nothing.
        background_upload: False uploads within `save`.
        hourly_price: Dollars an hour of all machines together, None where it is not known.
        writer: A process for writing checkpoints that has been started already.
    """

    def __init__(
        self,
        config: TrainingConfig,
        paths: RunPaths,
        model_config: Any,
        sources: Sequence[DataSource],
        plan: resume.Plan,
        accelerator: Accelerator,
        stop: StopRequest,
        consent: Consent,
        *,
        transport: TransportOptions | None = None,
        background_upload: bool = True,
        hourly_price: float | None = None,
        writer: WriterProcess | None = None,
    ) -> None:
        self.config, self.paths, self.stop = config, paths, stop
        self._sources, self._accelerator = tuple(sources), accelerator
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
        self._document_end = model_config.eos_token_id if config.mask_documents else None
        self._vocab_size = known_vocab_size(model_config)
        self.start = self._begin(plan, consent)
        user_project = config.gcs_user_project or None
        self._buckets = [open_bucket(source.uri, user_project) for source in sources]
        self._reader = self._build_reader()
        self._validation = self._build_validation()
        self._utilization = self.state.utilization(config.sequence_length)
        self._remaining = RemainingTime(config, self._global_batch, self._validation.num_samples)
        self._tokenizer_files = (
            read_tokenizer_files(self._buckets[0], sources[0].index) if self._is_main else {}
        )
        self._sampler = Sampler(config, self._tokenizer_files, paths.samples)
        self._notes = tracking.Notes(accelerator, self.state.progress.step)
        self._transport, self._background_upload = transport, background_upload
        self._early_writer = writer
        self._meter = open_meter(
            paths.metrics if self._is_main else None,
            self.start.identity.run_id,
            self.state.progress.step,
            self.state.progress.spending,
            hourly_price,
        )
        self._saving: RunSaving | None = None
        self._loader: BatchLoader | None = None
        self._live = LiveLine(enabled=False)
        self._throughput = Throughput()
        self._waited = 0.0
        self._saved_at = time.monotonic()
        self._saved_step = self.state.progress.step
        self._rollback_from: Verdict | None = None
        self._failure: PretrainError | None = None
        self._last_record: dict[str, float] = {}
        self._outcome = "failed"

    def _begin(self, plan: resume.Plan, consent: Consent) -> resume.Start:
        """Restore what the plan says."""
        state, config = self.state, self.config
        beginning = restore.begin(plan, self.paths, config, state, self._global_batch, consent)
        start, saved = beginning.start, beginning.saved
        if saved is not None:
            self._bad_shards = restore.place_in_data(
                state,
                saved,
                self._data_state,
                self._order.samples_per_epoch,
                accept_change=consent.data_change,
            )
            log.info("Resumed from %s (step %d).", start.checkpoint, state.progress.step)
        return start

    def __enter__(self) -> TrainingRun:
        """Take possession of the directory; start trackers, saver, uploader and live line."""
        # Nothing is moved before everything is there that this start needs.
        if self._is_main:
            resume.commit_start(self.start, self.paths)
        config, step = self.config, self.state.progress.step
        facts = {
            "max_steps": config.max_steps,
            "world_size": self._accelerator.num_processes,
            "device": str(self._accelerator.device),
            "precision": self._accelerator.mixed_precision,
            "num_parameters": sum(p.numel() for p in self.state.core_model.parameters()),
            "tokens_per_step": self.tokens_per_step,
            **asdict(self._utilization),
            "launched_at": self._meter.launched_at,
            "hourly_price": self._meter.read().hourly_price,
            "spending": self._meter.before.to_json(),
        }
        tracking.start_trackers(
            self._accelerator,
            config,
            self.paths.logs,
            self.start.identity,
            facts,
            step,
            self.state.progress.history,
        )
        rendezvous = self._arrange_rendezvous() if self.state.division.is_saved_in_parts else None
        if self._is_main:
            self._saving = RunSaving(
                config,
                self.paths,
                self.start.identity,
                self._accelerator.device,
                transport=self._transport,
                background_upload=self._background_upload,
                tell=self._notes.add,
                rendezvous=rendezvous,
                writer=self._early_writer,
            )
        elif rendezvous is not None:
            self._saving = RunSaving(
                config,
                self.paths,
                self.start.identity,
                self._accelerator.device,
                rendezvous=rendezvous,
            )
        if self._saving is not None:
            self._saving.prepare(self.state.division.snapshot_bytes())
        self._live = LiveLine(enabled=self._is_main)
        self._throughput = Throughput()
        return self

    def _arrange_rendezvous(self) -> Rendezvous:
        """Return where the savers of all ranks meet: a group of their own, for their threads.

        Raises:
            CheckpointError: The ranks do not see the same output directory.
        """
        token = ranks.broadcast_from_main(secrets.token_hex(4))
        restore.require_shared_directory(self.paths.checkpoints, token)
        group = ranks.new_host_group()
        return Rendezvous(token, lambda answer: ranks.gather_to_main(answer, group))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop every thread, close every file, and note how it ended.

        Raises:
            ResourceShortageError: In place of an error that says that memory is short.
        """
        shortage = _describe_shortage(error)
        self._live.close()
        if shortage is not None and self._saving is not None:
            log.error("Out of memory: finishing the save and the uploads in progress.")
            self._end_quietly()
        if self._loader is not None:
            self._loader.close()
        else:
            self._reader.cache.close()
        self._validation.close()
        if self._saving is not None:
            self._saving.close()
        for bucket in self._buckets:
            bucket.close()
        step, spending = self.state.progress.step, self._meter.read().to_json()
        self._notes.write(step, is_last=True)
        tracking.record_end(
            self._accelerator, self.paths.logs, step, self._outcome, spending=spending
        )
        if shortage is not None:
            raise ResourceShortageError(shortage) from error
        if error is None:
            self._accelerator.end_training()

    def _end_quietly(self) -> None:
        assert self._saving is not None
        try:
            self._saving.finish(self._live, self.config.upload_deadline_seconds, is_leaving=False)
        except SaveError as exc:
            log.error("%s", exc)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer update over all ranks."""
        return self._global_batch * self.config.sequence_length

    def batches(self, last_step: int) -> Iterator[list[torch.Tensor]]:
        """Yield this rank's micro-batches of each step, up to `last_step` or an agreed stop."""
        if self.state.progress.step >= last_step:
            log.info("Step %d of %d is done already.", last_step, self.config.max_steps)
            return
        while self.state.progress.step < last_step:
            self._loader = BatchLoader(
                self._reader,
                StepShape(
                    self.config.per_device_train_batch_size,
                    self._accumulation,
                    self._accelerator.process_index,
                    self._accelerator.num_processes,
                ),
                position=self.state.progress.sample_index,
                pin_memory=self._accelerator.device.type == "cuda",
                should_stop=lambda: self.stop.reason is not None,
            )
            yield from self._agreed_batches(self._loader, last_step)
            if self._rollback_from is None:
                return
            self._roll_back(self._rollback_from)

    def _agreed_batches(self, loader: BatchLoader, last_step: int) -> Iterator[list[torch.Tensor]]:
        """Yield until the last step, a stop that all ranks know of, or a rollback."""
        batches = iter(loader)
        while self.state.progress.step < last_step and self._rollback_from is None:
            step: list[torch.Tensor] | None = None
            try:
                step = next(batches, None)
            except PretrainError as exc:  # the state is whole: it is saved before this is told
                self._fail(exc)
            self._check_saves()
            if self.stop.is_agreed() or step is None:
                self.stop.nothing_to_lose = False  # a safe point: from here on it leaves by itself
                return
            yield step

    def _fail(self, error: PretrainError) -> None:
        """End this start at the next safe point: saved, uploads drained, then `error`."""
        self._failure = self._failure or error
        self.stop.request("an error")

    def train_step(self, batches: list[torch.Tensor]) -> int:
        """Do one optimizer update; return how many are done."""
        self._meter.note_step()
        fence = self._saving.fence if self._saving is not None else lambda: None
        self._notes.write(self.state.progress.step)
        train_step(self.state, batches, self.config.max_grad_norm, self._document_end, fence)
        self.stop.nothing_to_lose = False
        if self.config.record_batches:
            self._record_batches(batches)
        self._judge(newest=False)
        self._throughput.step()
        self._show_live()
        return self.state.progress.step

    def _record_batches(self, batches: list[torch.Tensor]) -> None:
        """Append the checksum of the step's tokens, in the order of the samples."""
        gathered = ranks.gather_to_main([batch.numpy().tobytes() for batch in batches])
        if gathered is None:
            return
        checksum = 0
        for micro_step in zip(*gathered, strict=True):
            for data in micro_step:
                checksum = google_crc32c.extend(checksum, data)
        record = {"step": self.state.progress.step, "crc32c": encode_crc32c(checksum)}
        append_metrics(self.paths.batches, record)

    def _judge(self, *, newest: bool) -> None:
        """Act on the bad steps that the guard has found, in the same way on every rank."""
        for verdict in self.state.guard.take(newest=newest):
            if verdict.code:
                self._handle_bad_step(verdict)

    def _handle_bad_step(self, verdict: Verdict) -> None:
        config, progress = self.config, self.state.progress
        record = bad_steps.describe(verdict, progress, config.bad_step)
        progress.bad_steps.append(record)
        if self._is_main:
            tracking.record_event(self.paths.logs, {"event": "bad_step", **record})
        log.warning(
            "Step %d is bad: %s (loss %.4g, gradient norm %.4g). Its update is left out.",
            verdict.step,
            verdict.kind,
            verdict.loss,
            verdict.grad_norm,
        )
        error = bad_steps.find_divergence(verdict, progress, config)
        if error is not None:
            self._fail(error)
        elif config.bad_step == "rollback":
            self._rollback_from = verdict

    def _roll_back(self, verdict: Verdict) -> None:
        """Bring back the newest checkpoint and go on behind the samples of the bad step."""
        self._rollback_from = None
        state, known = self.state, self.state.progress.bad_steps
        position = known[-1]["sample_index"] + self._global_batch
        if self._loader is not None:
            self._loader.close()
            self._loader = None
        self._wait_for_saver()
        found = ranks.compute_on_main(lambda: self._find_rollback(verdict.step))
        if found is None:
            self._reader = self._build_reader()
            self._fail(
                DivergenceError(
                    f"Step {verdict.step} was bad: {verdict.kind}. There is no checkpoint to roll "
                    "back to."
                )
            )
            return
        checkpoint, manifest = found
        accelerator = self._accelerator
        with on_every_machine(checkpoint, manifest, self.paths.checkpoints) as here:
            saved = checkpoint_utils.read_checkpoint(
                here,
                manifest,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                part=state.division.rows,
            )
        checkpoint_utils.restore_state(state, saved, self.config)
        self._meter.go_back(Spending.from_json(state.progress.spending))
        skipped = position - state.progress.sample_index
        state.progress.sample_index = position
        state.progress.bad_steps = known
        self._saved_step = state.progress.step
        tracking.record_rollback(accelerator, self.paths.logs, state.progress.step)
        self._reader = self._build_reader()
        self._throughput, self._waited = Throughput(), 0.0
        log.warning(
            "Rolled back to %s (step %d); %d samples are left out, up to and with those of step "
            "%d.",
            checkpoint.name,
            state.progress.step,
            skipped,
            verdict.step,
        )

    def _find_rollback(self, before_step: int) -> tuple[Any, Any] | None:
        assert self._saving is not None
        return self._saving.find_newest(before_step)

    def log_metrics(self) -> None:
        """Log the mean loss since the last time, and the speed."""
        self._judge(newest=True)
        state, progress = self.state, self.state.progress
        loss = mean_loss(state)
        waited = self._loader.wait_seconds if self._loader else 0.0
        speed = self._throughput.report(self.tokens_per_step, waited - self._waited)
        self._waited = waited
        record = {
            "epoch": self._order.epoch_of(progress.sample_index)[0],
            "loss": loss,
            "perplexity": perplexity_of(loss),
            "learning_rate": state.last_learning_rate,
            "grad_norm": float(state.grad_norm.item()),
            "tokens_seen": progress.tokens_seen,
            **speed,
            "eta_seconds": self._eta_seconds(speed["step_seconds"]),
        }
        mfu = self._utilization.at(speed["tokens_per_second"])
        if mfu is not None:
            record["mfu"] = mfu
        state.interval.zero_()
        progress.add_metrics(record)
        self._accelerator.log(record, step=progress.step)
        self._last_record = record
        log.info("Step %s", self._describe(record))

    def _eta_seconds(self, newest_step_seconds: float) -> float:
        step_seconds = self._throughput.recent_step_seconds or newest_step_seconds
        return self._remaining.seconds(self.state.progress.step, step_seconds)

    def is_save_due(self) -> bool:
        """Tell whether `save_seconds` have passed, or a failed save is to be tried again."""
        seconds = self.config.save_seconds
        due = seconds is not None and time.monotonic() - self._saved_at >= seconds
        if self._saving is not None:
            due = due or self._saving.is_retry_due()
        return self.stop.any_rank(due)

    def evaluate(self) -> bool:
        """Measure the validation loss, once a step at most; tell whether it is the best so far.

        A request to stop ends it without a result.
        """
        self._judge(newest=True)
        progress = self.state.progress
        measured = progress.validation_step == progress.step
        if self._rollback_from or (measured and progress.validation_loss is not None):
            return False
        started = time.perf_counter()
        if self._is_main:
            tracking.record_evaluating(self.paths.logs, progress.step)
            self._live.show(f"{progress.step}/{self.config.max_steps}  evaluating")
        loss = evaluate(
            self.state,
            self._validation,
            self.config.eval_batch_size,
            self._document_end,
            self.stop.is_agreed,
        )
        seconds = time.perf_counter() - started
        self._write_samples()
        self._throughput.pause(time.perf_counter() - started)
        if loss is None:
            return False
        self._remaining.evaluation_seconds = time.perf_counter() - started
        improved = progress.add_validation(loss)
        record = {
            "validation_loss": loss,
            "validation_perplexity": perplexity_of(loss),
            "best_validation_loss": progress.best_validation_loss,
        }
        self._accelerator.log(record, step=progress.step)
        log.info(
            "Validation at step %d: loss %.4f, perplexity %.1f, best %.4f (%d samples, %s).",
            progress.step,
            loss,
            record["validation_perplexity"],
            progress.best_validation_loss,
            self._validation.num_samples,
            format_duration(seconds),
        )
        return improved

    def _write_samples(self) -> None:
        """Have the main process write sample texts; other ranks wait at their next agreement."""
        if self._is_main and self.stop.reason is None:
            samples = self._sampler.write(self.state, lambda: self.stop.reason is not None)
            tracking.log_samples(self._accelerator, samples, self.state.progress.step)

    def save(self, *, is_last: bool = False) -> None:
        """Begin to save a checkpoint; training goes on while it is written.

        A save that is due while the one before is still being written waits or is skipped, as
        `save_overlap` says; the last one of a start always waits. A state that is saved already is
        not saved twice.
        """
        self._judge(newest=True)
        step = self.state.progress.step
        if step == self._saved_step or self._rollback_from is not None:
            return
        started = time.perf_counter()
        if self.stop.any_rank(self._saving is not None and self._saving.is_busy):
            if self.config.save_overlap == "skip" and not is_last:
                log.warning(
                    "Step %d is not saved: the save before it is still being written.", step
                )
                return
            self._wait_for_saver()
        gathered = ranks.gather_to_main(
            (checkpoint_utils.capture_random_state(self.state), sorted(self._reader.bad_shards))
        )
        files = None
        if gathered is not None:
            log.info("Saving checkpoint at step %d.", step)
            self.state.progress.spending = self._meter.read().to_json()
            bad_shards = {shard for _, shards in gathered for shard in shards}
            files = checkpoint_utils.collect_files(
                self.state,
                self._data_state(sorted(bad_shards)),
                self.config,
                self.start.identity,
                [states for states, _ in gathered],
                self._tokenizer_files,
            )
        files = checkpoint_utils.add_held_state(
            self.state, self._data_state(), self.config, self.start.identity, files
        )
        if files is not None and self._saving is not None:
            self._saving.save(files, lambda: time.monotonic() >= self._leave_at())
        self._saved_at, self._saved_step = time.monotonic(), step
        seconds = time.perf_counter() - started
        self._throughput.pause(seconds)
        self._remaining.save_seconds = seconds
        log.debug("Training waited %.1f ms for the save.", seconds * 1e3)

    def _wait_for_saver(self) -> None:
        """Wait until nothing is being written; no rank waits in one collective for long."""
        while self.stop.any_rank(self._saving is not None and not self._saving.wait(0.5)):
            pass

    def _check_saves(self) -> None:
        """Request a stop where a save has failed and the configuration says so."""
        if self.config.failed_save == "stop" and self._saving is not None:
            failure = self._saving.failure
            if failure is not None:
                self._fail(failure)

    def finish(self) -> ExitCode:
        """Save what is not saved yet, wait for uploads, and return the exit code.

        Raises:
            PretrainError: What ended this start before its time; the state is saved.
        """
        if self._is_main:
            tracking.record_finishing(self.paths.logs, self.state.progress.step)
        leave_at = math.inf if self._failure is not None else self._leave_at()
        reason = self.stop.reason
        if leave_at < math.inf and self._is_main and self._saving is not None:
            size = self.state.division.snapshot_bytes()
            self._saving.plan_leaving(leave_at - time.monotonic(), size)
        self.save(is_last=True)
        self._wait_for_saver()
        if self.stop.any_rank(self._saving is not None and self._saving.failure is not None):
            log.info("Saving once more.")
            self._saved_step = -1
            self.save(is_last=True)
        left = leave_at - time.monotonic()
        upload_seconds = max(0.0, min(self.config.upload_deadline_seconds, left))
        self._live.close()
        failure = self._shared_failure()
        code = ExitCode.DONE
        try:
            if self._is_main and self._saving is not None:
                with contextlib.closing(LiveLine(plain_seconds=WAIT_LINE_SECONDS)) as live:
                    code = self._saving.finish(
                        live,
                        upload_seconds,
                        is_leaving=reason is not None,
                        must_leave=lambda: time.monotonic() >= self._leave_at(),
                    )
        finally:
            # A launcher ends all ranks once one has left with another code than 0.
            if reason is not None:
                ranks.broadcast_from_main(None)
        if failure is not None:
            raise failure
        step = self.state.progress.step
        self._outcome = "done" if step >= self.config.max_steps else "stopped"
        self._log_costs()
        if code is not ExitCode.DONE:
            reason = self.stop.reason  # it may have come while uploads were waited for
        if self._outcome == "done" and (code is ExitCode.DONE or reason is None):
            log.info("Done: step %d of %d.", step, self.config.max_steps)
        elif reason is not None:
            what = "saved" if step else "nothing was trained yet"
            log.info(
                "Stopped by %s at step %d, %s. Go on with --resume latest.", reason, step, what
            )
            return ExitCode.STOPPED
        else:
            log.info("Ended after step %d as asked. Go on with --resume latest.", step)
        return code

    def _log_costs(self) -> None:
        costs = summarize_costs(
            self._meter.read(),
            tokens_seen=self.state.progress.tokens_seen,
            remaining_seconds=None,
        )
        if costs is not None:
            log.info("%s", describe_costs(costs))

    def _leave_at(self) -> float:
        """Return the `time.monotonic()` by which a request wants the end; infinite without one."""
        requested_at = self.stop.requested_at if self.stop.reason is not None else None
        if requested_at is None:
            return math.inf
        return requested_at + (1 - LEAVING_SHARE) * self.config.grace_seconds

    def _shared_failure(self) -> PretrainError | None:
        """Return this rank's failure; on the main process that of any rank."""
        own = self._failure
        gathered = ranks.gather_to_main(own and (str(own), own.exit_code))
        if own is not None or gathered is None:
            return own
        told = next((failure for failure in gathered if failure), None)
        if told is None:
            return None
        error = PretrainError(told[0])
        error.exit_code = told[1]
        return error

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

    def _build_reader(self) -> SampleReader:
        shards = [source.index.training for source in self._sources]
        cache = ShardCache(
            list(zip(self._buckets, shards, strict=True)),
            self.paths.cache,
            self._vocab_size,
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

    def _build_validation(self) -> ValidationData:
        shards = self._sources[0].index.validation
        cache = ShardCache([(self._buckets[0], shards)], self.paths.cache, self._vocab_size)
        return ValidationData(
            cache,
            shards,
            self.config.sequence_length,
            self.config.max_eval_samples,
            skip_bad_shards=self._skip_bad_shards,
        )

    def _describe(self, record: dict[str, float]) -> str:
        progress = self.state.progress
        best = progress.best_validation_loss
        milliseconds = record["step_seconds"] * 1e3
        eta_seconds = self._eta_seconds(record["step_seconds"])
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


def _describe_shortage(error: BaseException | None) -> str | None:
    """Return what to change where an error means that memory is short, else None."""
    is_host = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if not is_host and not isinstance(error, torch.OutOfMemoryError):
        return None
    where = "host memory" if is_host else "GPU memory"
    return (
        f"Out of {where}. Lower per_device_train_batch_size (global_batch_size keeps the step's "
        "size), set gradient_checkpointing=true, or choose a smaller model. Steps since the last "
        "checkpoint are lost; go on with --resume latest."
    )
