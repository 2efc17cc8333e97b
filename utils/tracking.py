"""Where logged metrics go: `metrics.jsonl` always, TensorBoard or W&B through Accelerate.

    train step -> metrics.jsonl, TensorBoard -> viewer, monitor

Curves do not go back in time after a resume: TensorBoard is told to purge what lies behind the
resumed step, and `metrics.jsonl` gets a `resume` record that its reader obeys.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process

from configs.training_config import TrainingConfig
from utils.errors import ConfigError
from utils.metadata import append_metrics

TENSORBOARD_FOLDER = "tensorboard"

log = logging.getLogger(__name__)


class JsonLinesTracker(GeneralTracker):
    """An Accelerate tracker that appends each record to `metrics.jsonl`."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        """The file, as Accelerate asks for it."""
        return self.path

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append one record."""
        try:
            append_metrics(self.path, {"step": step, **values})
        except OSError as exc:
            log.warning("Metrics of step %s could not be written: %s", step, exc)


def build_trackers(config: TrainingConfig, metrics_path: Path) -> list[Any]:
    """Return what `Accelerator(log_with=...)` takes.

    Raises:
        ConfigError: A tracker's package is not installed.
    """
    for target in config.report_to:
        if importlib.util.find_spec(target) is None:
            raise ConfigError(
                f"report_to names {target}, which is not installed. "
                f"Run: pip install {target} (in the virtual environment)."
            )
    return [JsonLinesTracker(metrics_path), *config.report_to]


def start_trackers(
    accelerator: Accelerator, config: TrainingConfig, logs: Path, facts: dict[str, Any], step: int
) -> None:
    """Begin the curves of this start at `step`.

    Args:
        accelerator: Made with `build_trackers`.
        config: The run's configuration.
        logs: The run's log directory.
        facts: What `metrics.jsonl` says about this start.
        step: Steps done before it.
    """
    accelerator.init_trackers(
        TENSORBOARD_FOLDER,
        init_kwargs={
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"name": config.run_name or None, "id": facts["run_id"], "resume": "allow"},
        },
    )
    if accelerator.is_main_process:
        event = {
            "event": "resume" if step else "start",
            "step": step,
            **facts,
            "pid": os.getpid(),
            "hostname": platform.node(),
        }
        append_metrics(logs / "metrics.jsonl", event)


def record_rollback(accelerator: Accelerator, logs: Path, step: int) -> None:
    """Take back what the curves have behind `step`, in the middle of a start."""
    if not accelerator.is_main_process:
        return
    append_metrics(logs / "metrics.jsonl", {"event": "rollback", "step": step})
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            # What `purge_step` of a new SummaryWriter writes.
            start = SessionLog(status=SessionLog.START)
            tracker.tracker.file_writer.add_event(Event(step=step + 1, session_log=start))


def record_finishing(logs: Path, step: int) -> None:
    """Note that what follows is saving and uploading: no record is to be expected for a while."""
    try:
        append_metrics(logs / "metrics.jsonl", {"event": "finishing", "step": step})
    except OSError as exc:
        log.warning("The end of training at step %d could not be noted: %s", step, exc)


def record_end(logs: Path, step: int, outcome: str, **facts: Any) -> None:
    """Note how this start ended: done, stopped or failed; and facts besides."""
    event = {"event": "end", "step": step, "outcome": outcome, **facts}
    append_metrics(logs / "metrics.jsonl", event)
