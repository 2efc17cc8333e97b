"""What every tracker of a run is: an Accelerate tracker that can fail without stopping the run.

    metrics, texts of a run -> tracker -> metrics.jsonl | TensorBoard | W&B

A tracker that fails (a full disk, a service that is down) says so once, until it works again, and
training goes on. Only the main process has anything to track.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from configs.training_config import TrainingConfig
from utils.base.text import printable
from utils.checkpoints.layout import RunIdentity

TRAINING_LOSS, VALIDATION_LOSS = "loss/train", "loss/validation"
# Boards sort groups, and names within a group: the two losses come first, then the optimizer, the
# speed, and what is left.
_BOARD_NAMES = {
    "loss": TRAINING_LOSS,
    "validation_loss": VALIDATION_LOSS,
    "best_validation_loss": "loss/validation_best",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "validation_perplexity": "validation/perplexity",
    **{
        key: f"speed/{key}"
        for key in ("tokens_per_second", "step_seconds", "data_wait_share", "mfu", "eta_seconds")
    },
}

log = logging.getLogger("train")


@dataclass(frozen=True)
class RunStart:
    """What a tracker needs to know of an attempt when it begins.

    Attributes:
        identity: Run and branch.
        step: Steps done before this attempt.
        config: The run's configuration.
        facts: Numbers and names of this attempt: ranks, device, precision, parameters, ...
        hyperparameters: Settings that change the result, flat: name -> number or text.
        missing: (step, metrics) that another machine logged and this one's logs lack.
    """

    identity: RunIdentity
    step: int
    config: TrainingConfig
    facts: Mapping[str, Any]
    hyperparameters: Mapping[str, float | str]
    missing: Sequence[tuple[int, Mapping[str, float]]] = ()

    @property
    def curve(self) -> str:
        """Name of the curve: the same for all attempts of a run, another one for a branch."""
        branch = self.identity.branch
        return self.identity.run_id + (f"-branch{branch}" if branch else "")


def group_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among flat metrics under names that boards sort into groups."""
    return {
        _BOARD_NAMES.get(key, f"train/{key}"): float(value)
        for key, value in values.items()
        if isinstance(value, (int, float))
    }


class RunTracker(GeneralTracker):
    """A tracker of one attempt; every method may be called from any thread, and none raises."""

    name = ""
    title = ""  # its name in messages, where that is another one
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self._is_failing = False

    @property
    def tracker(self) -> Any:
        """The object that Accelerate hands out for this tracker."""
        return self

    @on_main_process
    def begin(self, start: RunStart) -> None:
        """Begin, or go on with, the curves of a run."""
        self._attempt(lambda: self._begin(start))

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Take the metrics of a step."""
        self._attempt(lambda: self._log(values, step or 0), is_proof=True)

    @on_main_process
    def log_lines(self, title: str, lines: Sequence[str], step: int) -> None:
        """Take events, a line each."""
        self._attempt(lambda: self._log_lines(title, lines, step))

    @on_main_process
    def log_samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        """Take texts of the model, each with its prompt before it."""
        self._attempt(lambda: self._log_samples(samples, step))

    @on_main_process
    def roll_back(self, step: int) -> None:
        """Take back what comes after `step`, in the middle of an attempt."""
        self._attempt(lambda: self._roll_back(step))

    @on_main_process
    def end(self, outcome: str) -> None:
        """Close it; nothing comes after this. `outcome` is done, stopped or failed."""
        self._attempt(lambda: self._end(outcome))

    def _attempt(self, action: Callable[[], None], *, is_proof: bool = False) -> None:
        """Do it, or say why not; `is_proof`: where it succeeds, the tracker works again."""
        try:
            action()
        except Exception as exc:  # noqa: BLE001 - watching must never stop a run
            log.debug("%s failed.", self.name, exc_info=True)
            if not self._is_failing:
                reason = getattr(exc, "strerror", None) or printable(exc) or type(exc).__name__
                title = self.title or self.name
                log.warning("%s cannot be written: %s. Training goes on.", title, reason)
            self._is_failing = True
        else:
            self._is_failing = self._is_failing and not is_proof

    def _begin(self, start: RunStart) -> None:
        """Nothing to prepare."""

    @abstractmethod
    def _log(self, values: Mapping[str, Any], step: int) -> None: ...

    def _log_lines(self, title: str, lines: Sequence[str], step: int) -> None:
        """No place for events."""

    def _log_samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        """No place for texts."""

    def _roll_back(self, step: int) -> None:
        """Nothing to take back."""

    def _end(self, outcome: str) -> None:
        """Nothing to close."""
