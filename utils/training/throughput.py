"""How fast a run is, and how long it still takes.

    steps, pauses -> tokens a second, seconds to the end -> metrics.jsonl, live line

Everything that is not training is taken out of the speed, and counted for the time to the end. No
torch here.
"""

from __future__ import annotations

import time
from collections import deque

from configs.training_config import TrainingConfig
from utils.models.estimates import count_pauses, estimate_evaluation_seconds

RECENT_STEPS = 200
UNTIMED_STEPS = 2  # they load kernels and make the optimizer's state


class Throughput:
    """Speed since the last report and over the last steps, without what is not training."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._paused = 0.0
        self._steps = 0
        self._done = 0
        self._all_paused = 0.0
        self._marks: deque[float] = deque(maxlen=RECENT_STEPS + 1)

    def pause(self, seconds: float) -> None:
        """Leave out time spent on saving and evaluating."""
        self._paused += seconds
        self._all_paused += seconds

    def step(self) -> None:
        """Count one step."""
        self._steps += 1
        self._done += 1
        if self._done >= UNTIMED_STEPS:
            self._marks.append(time.perf_counter() - self._all_paused)

    @property
    def recent_step_seconds(self) -> float | None:
        """Mean time of the last steps, without the first ones of an attempt; None without steps."""
        if len(self._marks) < 2:
            return None
        return (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1)

    def tokens_per_second(self, tokens_per_step: int) -> float | None:
        """Return the speed since the last report, None without a step; the report stays to come."""
        elapsed = self._elapsed(time.perf_counter())
        return self._steps * tokens_per_step / elapsed if self._steps else None

    def report(self, tokens_per_step: int, data_wait_seconds: float) -> dict[str, float]:
        """Return tokens_per_second, step_seconds and data_wait_share, and begin anew.

        `tokens_per_step` is over all ranks; `data_wait_seconds` is the time waited since the last
        report.
        """
        now = time.perf_counter()
        elapsed = self._elapsed(now)
        steps = max(1, self._steps)
        self._started, self._paused, self._steps = now, 0.0, 0
        return {
            "tokens_per_second": steps * tokens_per_step / elapsed,
            "step_seconds": elapsed / steps,
            "data_wait_share": data_wait_seconds / elapsed,
        }

    def _elapsed(self, now: float) -> float:
        return max(1e-9, now - self._started - self._paused)


class RemainingTime:
    """The time to the end of a run: steps, evaluations, and waiting for saves."""

    def __init__(
        self, config: TrainingConfig, samples_per_step: int, evaluation_samples: int
    ) -> None:
        self._config = config
        self._samples_per_step = samples_per_step
        self._evaluation_samples = evaluation_samples
        self.evaluation_seconds: float | None = None
        """Time of the last evaluation; None before the first, which is estimated."""
        self.save_seconds = 0.0
        """How long training waited for the last save."""

    def seconds(self, step: int, step_seconds: float) -> float:
        """Return the time from `step` done steps to the end, with steps of that time."""
        config = self._config
        evaluation = self.evaluation_seconds
        if evaluation is None:
            evaluation = estimate_evaluation_seconds(
                self._evaluation_samples, self._samples_per_step, step_seconds
            )
        evaluations = count_pauses(step, config.max_steps, config.save_steps, config.eval_steps)
        saves = count_pauses(step, config.max_steps, config.save_steps)
        return (
            (config.max_steps - step) * step_seconds
            + evaluations * evaluation
            + saves * self.save_seconds
        )
