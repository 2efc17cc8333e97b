"""What a bad step does to a run: what is noted of it, and when it is one too many.

    step guard -> verdict -> record in metrics.jsonl and checkpoints; the end of the start

Whether a step is bad is for `utils/training/step_guard.py` to say, and its update is left out
already. Every rank comes to the same result from the same verdicts.
"""

from __future__ import annotations

from typing import Any

from configs.training_config import BAD_STEP_SPAN, TrainingConfig
from utils.base.errors import DivergenceError
from utils.base.text import number
from utils.training.step_guard import Verdict
from utils.training_utils import TrainingProgress


def describe(verdict: Verdict, progress: TrainingProgress, policy: str) -> dict[str, Any]:
    """Return what is noted of a bad step.

    Args:
        verdict: Of the guard; it may come when a later step is done already.
        progress: The run's counters.
        policy: `bad_step` of the configuration.
    """
    steps_since_begin = progress.step - verdict.step + 1
    return {
        "step": verdict.step,
        "kind": verdict.kind,
        "loss": number(verdict.loss),
        "grad_norm": number(verdict.grad_norm),
        "policy": policy,
        "sample_index": progress.sample_index - steps_since_begin * progress.global_batch_size,
    }


def find_divergence(
    verdict: Verdict, progress: TrainingProgress, config: TrainingConfig
) -> DivergenceError | None:
    """Return why the run must not go on behind a bad step, None where it may.

    Args:
        verdict: Of the guard; its record is among the bad steps of `progress`.
        progress: The run's counters.
        config: The run's configuration.
    """
    if config.bad_step == "stop":
        return DivergenceError(
            f"Step {verdict.step} was bad: {verdict.kind} loss or gradients. Its update was left "
            "out and the state is saved. Go on behind its samples with --resume latest, and let "
            "later ones pass with --set bad_step=skip or rollback."
        )
    recent = [bad for bad in progress.bad_steps if bad["step"] > verdict.step - BAD_STEP_SPAN]
    if len(recent) > config.max_bad_steps:
        return DivergenceError(
            f"{len(recent)} of the last {BAD_STEP_SPAN} steps were bad (max_bad_steps is "
            f"{config.max_bad_steps}). Lower learning_rate, or resume from an older checkpoint."
        )
    return None
