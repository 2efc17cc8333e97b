"""What a bad step does to a run: what is noted of it, a rollback, and when it is one too many.

    step guard -> verdict -> record in metrics.jsonl and checkpoints; rollback; the attempt's end

Whether a step is bad is for `utils/training/step_guard.py` to say, and its update is left out
already. Every rank comes to the same result from the same verdicts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.training_config import BAD_STEP_SPAN, TrainingConfig
from utils.base import ranks
from utils.base.errors import DivergenceError
from utils.base.text import number
from utils.checkpoint_utils import read_checkpoint, restore_state
from utils.checkpoints.layout import Manifest, RunPaths
from utils.start.machine_sharing import on_every_machine
from utils.tracking import tracking
from utils.training.step_guard import Verdict
from utils.training_utils import TrainingProgress, TrainState

log = logging.getLogger("train")


def find_divergence(
    verdict: Verdict, progress: TrainingProgress, config: TrainingConfig
) -> DivergenceError | None:
    """Return why the run must not go on after a bad step, None where it may.

    Its record is among the bad steps of `progress` already.
    """
    if config.bad_step == "stop":
        return DivergenceError(
            f"Step {verdict.step} was bad: {verdict.kind} loss or gradients. Its update was left "
            "out and the state is saved: a resume goes on after its samples. To let later ones "
            "pass, add --set bad_step=skip or rollback."
        )
    recent = [bad for bad in progress.bad_steps if bad["step"] > verdict.step - BAD_STEP_SPAN]
    if len(recent) > config.max_bad_steps:
        return DivergenceError(
            f"{len(recent)} of the last {BAD_STEP_SPAN} steps were bad (max_bad_steps is "
            f"{config.max_bad_steps}). Lower learning_rate, or resume from an older checkpoint."
        )
    return None


class BadSteps:
    """Acts on the bad steps of a run, in the same way on every rank.

    `fail` is called with the reason where the run must not go on.
    """

    def __init__(
        self, config: TrainingConfig, state: TrainState, fail: Callable[[DivergenceError], None]
    ) -> None:
        self._config, self._state, self._fail = config, state, fail
        self._paths = RunPaths.of(config)
        self.rollback_from: Verdict | None = None
        """The bad step that is to be rolled back, None where none is."""

    def judge(self, *, newest: bool) -> None:
        """Act on the bad steps that the guard has found.

        With `newest`, the verdict of the last step is waited for too.
        """
        for verdict in self._state.guard.take(newest=newest):
            if verdict.code:
                self._handle(verdict)

    def _handle(self, verdict: Verdict) -> None:
        config, progress = self._config, self._state.progress
        steps_since_begin = progress.step - verdict.step + 1  # a later one may be done already
        record: dict[str, Any] = {
            "step": verdict.step,
            "kind": verdict.kind,
            "loss": number(verdict.loss),
            "grad_norm": number(verdict.grad_norm),
            "policy": config.bad_step,
            "sample_index": progress.sample_index - steps_since_begin * progress.global_batch_size,
        }
        progress.bad_steps.append(record)
        if self._state.accelerator.is_main_process:
            tracking.record_event(self._paths.logs, "bad_step", **record)
        log.warning(
            "Step %d is bad: %s (loss %.4g, gradient norm %.4g). Its update is left out.",
            verdict.step,
            verdict.kind,
            verdict.loss,
            verdict.grad_norm,
        )
        error = find_divergence(verdict, progress, config)
        if error is not None:
            self._fail(error)
        elif config.bad_step == "rollback":
            self.rollback_from = verdict

    def roll_back(self, find_newest: Callable[[int], tuple[Path, Manifest] | None]) -> bool:
        """Bring back the newest checkpoint, and the position after the samples of the bad step.

        `find_newest` returns the newest checkpoint before a step; the main process calls it. False:
        there was none, and the run must not go on.
        """
        verdict, self.rollback_from = self.rollback_from, None
        assert verdict is not None
        state, known = self._state, self._state.progress.bad_steps
        position = known[-1]["sample_index"] + state.progress.global_batch_size
        found = ranks.compute_on_main(lambda: find_newest(verdict.step))
        if found is None:
            text = f"Step {verdict.step} was bad: {verdict.kind}."
            self._fail(DivergenceError(f"{text} There is no checkpoint to roll back to."))
            return False
        checkpoint, manifest = found
        with on_every_machine(checkpoint, manifest, self._paths.checkpoints) as here:
            saved = read_checkpoint(
                here,
                manifest,
                rank=state.accelerator.process_index,
                world_size=state.accelerator.num_processes,
                part=state.division.rows,
            )
        restore_state(state, saved, self._config)
        skipped = position - state.progress.sample_index
        state.progress.sample_index = position
        state.progress.bad_steps = known
        tracking.record_rollback(state.accelerator, self._paths.logs, state.progress.step)
        log.warning(
            "Rolled back to %s (step %d); %d samples are left out, up to and with those of step "
            "%d.",
            checkpoint.name,
            state.progress.step,
            skipped,
            verdict.step,
        )
        return True
