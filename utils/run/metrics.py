"""What a run says of its steps: the live line, the log line, the record for the trackers.

step, loss, speed -> live line; every `logging_steps` -> log line, record -> metrics.jsonl, boards
"""

from __future__ import annotations

import logging
import math

from configs.training_config import TrainingConfig
from utils.base.console import LiveLine
from utils.base.text import format_duration, perplexity_of
from utils.data_utils import TrainingData
from utils.training.throughput import RemainingTime, Throughput
from utils.training_utils import TrainState, mean_loss

WAIT_LINE_SECONDS = 30.0

log = logging.getLogger("train")


class RunMetrics:
    """Measures how fast a run is; shows, logs and records its steps and evaluations."""

    def __init__(self, config: TrainingConfig, state: TrainState, data: TrainingData) -> None:
        self._config, self._state, self._data = config, state, data
        samples, _ = config.resolve_batch(state.accelerator.num_processes)
        self._tokens_per_step = samples * config.sequence_length
        self._utilization = state.utilization(config.sequence_length)
        self._remaining = RemainingTime(config, samples, data.validation.num_samples)
        self._last_record: dict[str, float] = {}
        self._throughput = Throughput()
        self.live = LiveLine(
            enabled=state.accelerator.is_main_process, plain_seconds=WAIT_LINE_SECONDS
        )

    def note_step(self) -> None:
        """Count a step, and show it."""
        self._throughput.step()
        step, record = self._state.progress.step, self._last_record
        text = self._describe(record) if record else f"{step}/{self._config.max_steps}"
        best = self._state.progress.best_validation_loss
        if best is not None:
            text += f"  best val {best:.4f}"
        self.live.show(text, is_logged=False)  # `log_step` logs

    def measure_speed(self) -> None:
        """Measure the speed since the last log line, for a checkpoint between two."""
        self._state.tokens_per_second = self._throughput.tokens_per_second(self._tokens_per_step)

    def note_save(self, seconds: float) -> None:
        """Leave out of the speed how long training waited for a save."""
        self._throughput.pause(seconds)
        self._remaining.save_seconds = seconds

    def note_evaluation(self, seconds: float, *, is_complete: bool) -> None:
        """Leave an evaluation out of the speed."""
        self._throughput.pause(seconds)
        if is_complete:
            self._remaining.evaluation_seconds = seconds

    def restart(self) -> None:
        """Measure the speed anew, after a rollback."""
        self._throughput = Throughput()

    def log_step(self) -> None:
        """Log and record the mean loss since the last time, and the speed."""
        state, progress = self._state, self._state.progress
        loss = mean_loss(state)
        speed = self._throughput.report(self._tokens_per_step, self._data.take_wait_seconds())
        record = {
            "epoch": self._data.order.epoch_of(progress.sample_index)[0],
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
        state.accelerator.log(record, step=progress.step)
        self._last_record = record
        log.info("Step %s", self._describe(record))

    def log_validation(self, loss: float, seconds: float) -> None:
        """Log and record a validation loss that `progress` has taken already."""
        progress = self._state.progress
        best, perplexity = progress.best_validation_loss, perplexity_of(loss)
        first = progress.history["validation"][0]
        is_older = first == {"step": 0, "validation_loss": best} and progress.step > 0
        record = {
            "validation_loss": loss,
            "validation_perplexity": perplexity,
            "best_validation_loss": best,
        }
        self._state.accelerator.log(record, step=progress.step)
        log.info(
            "Validation at step %d: loss %.4f, ppl %s, best %s, took %s.",
            progress.step,
            loss,
            f"{perplexity:.1f}" if perplexity < 1e6 else f"{perplexity:.2e}",
            "none yet" if best is None else f"{best:.4f}{' (before training)' if is_older else ''}",
            format_duration(seconds),
        )
        if not math.isfinite(loss):
            log.warning("A validation loss of %s is passed over: it is never the best.", loss)

    def show_pause(self, doing: str) -> None:
        """Show what is done instead of a step; without a terminal, a log line now and then."""
        self.live.show(f"Step {self._state.progress.step}/{self._config.max_steps}  {doing}")

    def _eta_seconds(self, newest_step_seconds: float) -> float:
        step_seconds = self._throughput.recent_step_seconds or newest_step_seconds
        return self._remaining.seconds(self._state.progress.step, step_seconds)

    def _describe(self, record: dict[str, float]) -> str:
        eta = format_duration(self._eta_seconds(record["step_seconds"]))
        rate = f"{record['learning_rate']:.2e}".replace("e-0", "e-")
        # 100 columns have room for 80 characters after the time in a log, 91 in a terminal.
        return (
            f"{self._state.progress.step}/{self._config.max_steps}  loss {record['loss']:.4f}  "
            f"lr {rate}  grad {shorten(record['grad_norm'])}  "
            f"{shorten(record['tokens_per_second'])} tok/s  ETA {eta}"
        )


def shorten(count: float) -> str:
    """Return a count in three digits: 547, 12.3k, 1.23M."""
    for unit in ("", "k", "M"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}G"
