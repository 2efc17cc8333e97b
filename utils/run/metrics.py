"""What a run says of its steps: the live line, the log line, the record for the trackers.

step, loss, speed -> live line; every `logging_steps` -> log line, record -> metrics.jsonl, boards
"""

from __future__ import annotations

import logging

from configs.training_config import TrainingConfig
from utils.base.console import LiveLine
from utils.base.text import format_duration, perplexity_of
from utils.data_utils import TrainingData
from utils.training.throughput import RemainingTime, Throughput
from utils.training_utils import TrainState, mean_loss

log = logging.getLogger("train")


class RunMetrics:
    """Measures how fast a run is; shows, logs and records its steps and evaluations.

    Args:
        config: The run's configuration.
        state: The train state; its progress keeps every record.
        data: The run's data, opened.
    """

    def __init__(self, config: TrainingConfig, state: TrainState, data: TrainingData) -> None:
        self._config, self._state, self._data = config, state, data
        samples, _ = config.resolve_batch(state.accelerator.num_processes)
        self._tokens_per_step = samples * config.sequence_length
        self._utilization = state.utilization(config.sequence_length)
        self._remaining = RemainingTime(config, samples, data.validation.num_samples)
        self._last_record: dict[str, float] = {}
        self._throughput = Throughput()
        self.live = LiveLine(enabled=state.accelerator.is_main_process)

    def note_step(self) -> None:
        """Count a step, and show it."""
        self._throughput.step()
        self.show_live()

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
        record = {
            "validation_loss": loss,
            "validation_perplexity": perplexity_of(loss),
            "best_validation_loss": progress.best_validation_loss,
        }
        self._state.accelerator.log(record, step=progress.step)
        log.info(
            "Validation at step %d: loss %.4f, perplexity %.1f, best %.4f (%d samples, %s).",
            progress.step,
            loss,
            record["validation_perplexity"],
            progress.best_validation_loss,
            self._data.validation.num_samples,
            format_duration(seconds),
        )

    def show_live(self, doing: str = "") -> None:
        """Show the newest record, or what is done instead of a step."""
        if self._last_record and not doing:
            self.live.show(self._describe(self._last_record))
        else:
            text = f"{self._state.progress.step}/{self._config.max_steps}"
            self.live.show(f"{text}  {doing}" if doing else text)

    def _eta_seconds(self, newest_step_seconds: float) -> float:
        step_seconds = self._throughput.recent_step_seconds or newest_step_seconds
        return self._remaining.seconds(self._state.progress.step, step_seconds)

    def _describe(self, record: dict[str, float]) -> str:
        progress = self._state.progress
        best = progress.best_validation_loss
        milliseconds = record["step_seconds"] * 1e3
        eta_seconds = self._eta_seconds(record["step_seconds"])
        return (
            f"{progress.step}/{self._config.max_steps}  loss {record['loss']:.4f}  "
            f"ppl {record['perplexity']:.1f}  "
            f"best val {'-' if best is None else format(best, '.4f')}  "
            f"lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
            f"{record['tokens_per_second']:,.0f} tok/s  "
            f"{milliseconds:.0f} ms/step  ETA {format_duration(eta_seconds)}"
        )
