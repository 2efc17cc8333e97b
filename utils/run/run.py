"""One attempt of a run: its parts, and what the loop in train.py asks of them.

    batches -> train step -> metrics, evaluation, checkpoint -> uploader -> the end

Everything that is not the train step is timed and taken out of the reported speed. Watching
changes nothing: logging, evaluating, saving and uploading leave weights and random state alone.
A request to stop is acted on between two steps, when every rank has its batch or waits for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.errors import ExitCode, PretrainError, ResourceShortageError, SaveError
from utils.base.text import number
from utils.checkpoints.layout import RunPaths
from utils.checkpoints.run_record import RunRecord
from utils.command_line.next_command import NextCommand
from utils.costs.costs import describe_costs, summarize_costs
from utils.costs.spending import Spending, open_meter
from utils.data_utils import TrainingData
from utils.run import evaluation, leaving
from utils.run.bad_steps import BadSteps
from utils.run.metrics import RunMetrics
from utils.run.sample_texts import Sampler
from utils.run.saving import RunSaving, SavedParts, SavingOptions
from utils.start.restore import commit_start
from utils.start.resume import Start
from utils.storage.bucket import encode_crc32c
from utils.tracking import tracking
from utils.training.stopping import StopRequest
from utils.training_utils import TrainState, mean_loss, train_step

log = logging.getLogger("train")


class TrainingRun:
    """A context manager that holds everything of one attempt."""

    def __init__(
        self,
        config: TrainingConfig,
        state: TrainState,
        data: TrainingData,
        start: Start,
        stop: StopRequest,
        options: SavingOptions,
        next_command: NextCommand,
    ) -> None:
        self.config, self.state, self.start, self.stop = config, state, start, stop
        self.paths, self._next_command = RunPaths.of(config), next_command
        self._data, self._options = data, options
        self._is_main = state.accelerator.is_main_process
        model_config: Any = state.core_model.config
        self._document_end = model_config.eos_token_id if config.mask_documents else None
        data.open(start.bad_shards)
        tokenizer_files = data.read_tokenizer() if self._is_main else {}
        self._sampler = Sampler(config, tokenizer_files, self.paths.samples)
        self._batches = tracking.JsonLinesTracker(self.paths.batches)
        self._notes = tracking.Notes(state.accelerator, state.progress.step)
        self._meter = open_meter(
            self.paths.metrics if self._is_main else None,
            start.identity.run_id,
            state.progress.step,
            state.progress.spending,
            config.hourly_price,
        )
        self._parts = SavedParts(state, data, start.identity, self._meter, tokenizer_files)
        self._bad_steps = BadSteps(config, state, self._fail)
        self._failure: PretrainError | None = None
        self._outcome = "failed"

    def __enter__(self) -> TrainingRun:
        """Take possession of the directory; start trackers, saver, uploader and live line."""
        # Nothing is moved before everything is there that this attempt needs.
        if self._is_main:
            note = (self.config.to_json(), str(Path.cwd()), self._next_command.text())
            commit_start(self.start, self.paths, RunRecord(self.start.identity, *note))
        config, accelerator, progress = self.config, self.state.accelerator, self.state.progress
        facts = {
            "max_steps": config.max_steps,
            "world_size": accelerator.num_processes,
            "device": str(accelerator.device),
            "precision": accelerator.mixed_precision,
            "num_parameters": sum(p.numel() for p in self.state.core_model.parameters()),
            "tokens_per_step": config.resolve_batch(accelerator.num_processes)[0]
            * config.sequence_length,
            **asdict(self.state.utilization(config.sequence_length)),
            "launched_at": self._meter.launched_at,
            "hourly_price": self._meter.read().hourly_price,
            "spending": self._meter.before.to_json(),
        }
        tracking.start_trackers(
            accelerator,
            config,
            self.paths.logs,
            self.start.identity,
            facts,
            progress.step,
            progress.history,
        )
        self._saving = RunSaving(config, self._parts, self.stop, self._options, self._notes.add)
        self._metrics = RunMetrics(config, self.state, self._data)
        if self._is_main:
            self.stop.last_words, self.stop.note_end = self._describe_kept, self._note_finishing
        return self

    def _describe_kept(self) -> str:
        """Return what is on this disk while the attempt goes on, and the command that goes on."""
        begun = self.start.checkpoint
        saved = self._saving.saver.last_committed or (begun.name if begun else None)
        kept = f"{saved} is kept, later steps are lost" if saved else "Nothing was saved yet"
        return f"{kept}. Go on with:\n{self._next_command.text()}\n"

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Stop every thread, close every file, and note how it ended.

        Raises:
            ResourceShortageError: In place of an error that says that memory is short.
        """
        shortage, accelerator = leaving.describe_shortage(error), self.state.accelerator
        self._metrics.live.close()
        if shortage is not None and self._saving.is_writing:
            log.error("Out of memory: finishing the save and the uploads in progress.")
            self._finish_saves()
        self._data.close()
        self._saving.close()
        step, spending = self.state.progress.step, self._meter.read().to_json()
        self._notes.write(step, is_last=True)
        facts = {"spending": spending, "tokens_seen": self.state.progress.tokens_seen}
        if error is None:  # a device that failed may not answer
            facts["current_loss"] = number(mean_loss(self.state))
        tracking.record_end(accelerator, self.paths.logs, step, self._outcome, **facts)
        if shortage is not None:
            raise ResourceShortageError(f"{shortage}\n{self._next_command.text()}") from error
        if error is None:
            accelerator.end_training()
            ranks.disconnect()

    def _finish_saves(self) -> None:
        try:
            seconds = self.config.upload_deadline_seconds
            leaving.wait_for_uploads(self._saving, self._metrics.live, seconds, is_leaving=False)
        except SaveError as exc:
            log.error("%s", exc)

    def batches(self, last_step: int) -> Iterator[list[torch.Tensor]]:
        """Yield this rank's micro-batches of each step, up to `last_step` or an agreed stop."""
        accelerator = self.state.accelerator
        if self.state.progress.step >= last_step:
            log.info("Step %d of %d is done already.", last_step, self.config.max_steps)
            return
        while self.state.progress.step < last_step:
            batches = self._data.load(
                self.state.progress.sample_index,
                accelerator.process_index,
                accelerator.num_processes,
                pin_memory=accelerator.device.type == "cuda",
                should_stop=lambda: self.stop.reason is not None,
            )
            yield from self._agreed_batches(batches, last_step)
            if self._bad_steps.rollback_from is None:
                return
            self._roll_back()

    def _agreed_batches(
        self, batches: Iterator[list[torch.Tensor]], last_step: int
    ) -> Iterator[list[torch.Tensor]]:
        """Yield until the last step, a stop that all ranks know of, or a rollback."""
        while self.state.progress.step < last_step and self._bad_steps.rollback_from is None:
            step: list[torch.Tensor] | None = None
            try:
                step = next(batches, None)
            except PretrainError as exc:  # the state is whole: it is saved before this is told
                self._fail(exc)
            save_failure = self._saving.failure
            if self.config.failed_save == "stop" and save_failure is not None:
                self._fail(save_failure)
            if self.stop.is_agreed() or step is None:
                self.stop.nothing_to_lose = False  # a safe point: from here on it leaves by itself
                return
            yield step

    def _fail(self, error: PretrainError) -> None:
        """End this attempt at the next safe point: saved, uploads drained, then `error`."""
        self._failure = self._failure or error
        self.stop.request("an error")

    def train_step(self, batches: list[torch.Tensor]) -> int:
        """Do one optimizer update; return how many are done."""
        self._meter.note_step()
        self._notes.write(self.state.progress.step)
        train_step(
            self.state,
            batches,
            self.config.max_grad_norm,
            self._document_end,
            self._saving.saver.fence,
        )
        self.stop.nothing_to_lose = False
        if self.config.record_batches:
            self._record_batches(batches)
        self._bad_steps.judge(newest=False)
        self._metrics.note_step()
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
        self._batches.log({"crc32c": encode_crc32c(checksum)}, self.state.progress.step)

    def _roll_back(self) -> None:
        """Bring back the newest checkpoint and go on after the samples of the bad step."""
        self._data.stop_loading()
        self._saving.wait()
        if self._bad_steps.roll_back(self._saving.find_newest):
            self._meter.go_back(Spending.from_json(self.state.progress.spending))
            self._saving.saved_step = self.state.progress.step
            self._metrics.restart()

    def log_metrics(self) -> None:
        """Log the mean loss since the last time, and the speed."""
        self._bad_steps.judge(newest=True)
        self._metrics.log_step()

    def is_save_due(self) -> bool:
        """Tell whether `save_seconds` have passed, or a failed save is to be tried again."""
        return self._saving.is_due()

    def evaluate(self) -> bool:
        """Measure the validation loss, once a step at most; tell whether it is the best so far.

        A request to stop ends it without a result.
        """
        self._bad_steps.judge(newest=True)
        progress, data, metrics = self.state.progress, self._data.validation, self._metrics
        is_measured = progress.validation_step == progress.step
        if self._bad_steps.rollback_from is not None or (
            is_measured and progress.validation_loss is not None
        ):
            return False
        started = time.perf_counter()
        if self._is_main:
            tracking.record_event(self.paths.logs, "evaluating", progress.step)
        loss = evaluation.evaluate(
            self.state,
            data,
            self.config.per_device_eval_batch_size or self.config.per_device_train_batch_size,
            self._document_end,
            self.stop.is_agreed,
            lambda done: metrics.show_pause(f"evaluating, {done} of {data.num_samples} samples"),
        )
        loss_seconds = time.perf_counter() - started
        self._write_sample_texts()
        metrics.note_evaluation(time.perf_counter() - started, is_complete=loss is not None)
        if loss is None:
            return False
        is_best = progress.add_validation(loss)
        metrics.log_validation(loss, loss_seconds)
        return is_best

    def _write_sample_texts(self) -> None:
        """Have the main process write them; other ranks wait at their next agreement."""
        if self._is_main and self.stop.reason is None:
            self._metrics.show_pause("writing sample texts")
            samples = self._sampler.write(self.state, lambda: self.stop.reason is not None)
            tracking.log_samples(self.state.accelerator, samples, self.state.progress.step)

    def save(self) -> None:
        """Begin to save a checkpoint; training goes on while it is written."""
        self._bad_steps.judge(newest=True)
        if self._bad_steps.rollback_from is None:
            self._metrics.measure_speed()
            seconds = self._saving.save()
            if seconds:
                self._metrics.note_save(seconds)

    def _note_finishing(self) -> None:
        """Record what asked for the end, None where nothing has."""
        progress = self.state.progress
        asked_by = None if self._failure is not None else self.stop.reason
        facts = {"reason": asked_by, "tokens_seen": progress.tokens_seen}
        tracking.record_event(self.paths.logs, "finishing", progress.step, **facts)

    def finish(self) -> ExitCode:
        """Save what is not saved yet, wait for uploads, and return the exit code.

        Raises:
            PretrainError: What ended this attempt before its time; the state is saved.
        """
        config, progress, saving = self.config, self.state.progress, self._saving
        reason = self.stop.reason
        if self._is_main:
            self._note_finishing()
        leave_at = math.inf if self._failure is not None else saving.leave_at()
        if leave_at < math.inf and self._is_main:
            leaving.tell_plan(saving, leave_at - time.monotonic())
        self._bad_steps.judge(newest=True)
        if self._bad_steps.rollback_from is None:
            self._metrics.measure_speed()
            saving.save_last()
        left = leave_at - time.monotonic()
        upload_seconds = max(0.0, min(config.upload_deadline_seconds, left))
        failure = leaving.find_failure(self._failure)
        code = ExitCode.DONE
        try:
            if self._is_main:
                code = leaving.wait_for_uploads(
                    saving, self._metrics.live, upload_seconds, is_leaving=reason is not None
                )
        finally:
            # A launcher ends all ranks once one has left with another code than 0.
            if reason is not None:
                ranks.broadcast_from_main(None)
        if failure is not None:
            text = f"Step {progress.step} is saved. Go on with:"
            leaving.show_command(text, self._next_command.text())
            raise failure
        self._outcome = "done" if progress.step >= config.max_steps else "stopped"
        costs = summarize_costs(
            self._meter.read(), tokens_seen=progress.tokens_seen, remaining_seconds=None
        )
        if costs is not None:
            log.info("%s", describe_costs(costs))
        if code is not ExitCode.DONE:
            reason = self.stop.reason  # it may have come while uploads were waited for
        return leaving.conclude(code, reason, progress.step, config.max_steps, self._next_command)
