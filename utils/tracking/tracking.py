"""Where metrics are logged: `metrics.jsonl` always, TensorBoard or W&B through Accelerate.

    train step -> metrics.jsonl, TensorBoard, W&B -> viewer, monitor, people

Curves do not go back in time after a resume: each tracker takes back what comes after the resumed
step, and `metrics.jsonl` gets a `resume` record that its reader obeys. No tracker stops a run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from configs.config_changes import GUARDED_KEYS
from configs.training_config import TrainingConfig
from utils.base.errors import ConfigError
from utils.base.text import number, perplexity_of, printable, to_json_text
from utils.checkpoints.layout import METRICS_FILE, RunIdentity
from utils.tracking.metrics_log import HISTORY_KEYS, append_metrics, read_metrics
from utils.tracking.tensorboard import TensorBoardTracker
from utils.tracking.tracker import RunStart, RunTracker
from utils.tracking.wandb import PROJECT, WandbTracker

MAX_NOTE = 1000
_TRACKERS = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}

log = logging.getLogger(__name__)
_failing: set[Path] = set()  # files whose last event could not be written: said once


class JsonLinesTracker(RunTracker):
    """Appends each record to `metrics.jsonl`."""

    name = "jsonl"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self.title = path, str(path)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        append_metrics(self._path, {"step": step, **values})


def build_trackers(config: TrainingConfig, metrics_path: Path) -> list[RunTracker]:
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
    targets = dict.fromkeys(config.report_to)
    boards = [_TRACKERS[target](metrics_path.parent) for target in targets]
    return [JsonLinesTracker(metrics_path), *boards]


def start_trackers(
    accelerator: Accelerator,
    config: TrainingConfig,
    logs: Path,
    identity: RunIdentity,
    facts: dict[str, Any],
    step: int,
    history: Mapping[str, Sequence[Any]],
) -> None:
    """Begin the curves of this attempt at `step`.

    Args:
        accelerator: Made with `build_trackers`.
        config: The run's configuration.
        logs: The run's log directory.
        identity: Run and branch.
        facts: What `metrics.jsonl` says about this attempt.
        step: Steps done before it.
        history: `TrainingProgress.history` of the checkpoint.
    """
    accelerator.init_trackers(PROJECT)
    if not accelerator.is_main_process:
        return
    facts = {"run_id": identity.run_id, "branch": identity.branch, **facts}
    hyperparameters = find_hyperparameters(config, facts)
    start = RunStart(identity, step, config, facts, hyperparameters)
    known = last_logged_step(logs, step) if (logs / start.curve).is_dir() else 0
    missing = [item for item in metrics_of(history) if known < item[0] <= step]
    start = replace(start, missing=missing)
    for tracker in accelerator.trackers:
        tracker.begin(start)
    place = {"pid": os.getpid(), "hostname": platform.node()}
    event = "resume" if step else "start"
    record_event(logs, event, step, **facts, **place, config=config.to_json())


def find_hyperparameters(
    config: TrainingConfig, facts: Mapping[str, Any]
) -> dict[str, float | str]:
    """Return the settings that change the result, under flat names, as numbers and texts."""
    values = {key: getattr(config, key) for key in GUARDED_KEYS}
    overrides = values.pop("model_overrides")
    values |= {f"model_overrides.{key}": value for key, value in overrides.items()}
    values["max_steps"] = config.max_steps
    values |= {
        key: facts[key]
        for key in ("tokens_per_step", "num_parameters", "precision", "world_size")
        if key in facts
    }
    flat: dict[str, float | str] = {}
    for key, value in values.items():
        is_plain = isinstance(value, (int, float, str)) and not isinstance(value, bool)
        flat[key] = value if is_plain else to_json_text(value, indent=None)
    return flat


def last_logged_step(logs: Path, limit: int) -> int:
    """Return the last step up to `limit` whose metrics this machine's logs have, 0 for none."""
    try:
        records = read_metrics(logs / METRICS_FILE).records
    except OSError:
        return 0
    return max((record["step"] for record in records if record["step"] <= limit), default=0)


def metrics_of(history: Mapping[str, Sequence[Any]]) -> list[tuple[int, dict[str, float]]]:
    """Return the metrics of a checkpoint's histories by step, under the names of the log."""
    by_step: dict[int, dict[str, float]] = {step: {} for step in history.get("steps", ())}
    for metric, key in HISTORY_KEYS.items():
        for step, value in zip(history.get("steps", ()), history.get(key, ()), strict=False):
            _put(by_step, step, metric, value)
            if metric == "loss":
                _put(by_step, step, "perplexity", _perplexity(value))
    best: float | None = None
    for entry in history.get("validation", ()):
        step, loss = entry["step"], number(entry.get("validation_loss"))
        best = loss if best is None or (loss is not None and loss < best) else best
        _put(by_step, step, "validation_loss", loss)
        _put(by_step, step, "validation_perplexity", _perplexity(loss))
        _put(by_step, step, "best_validation_loss", best)
    return sorted(by_step.items())


def _put(by_step: dict[int, dict[str, float]], step: int, metric: str, value: object) -> None:
    known = number(value)
    if known is not None:
        by_step.setdefault(step, {})[metric] = known


def _perplexity(loss: object) -> float | None:
    known = number(loss)
    return None if known is None else perplexity_of(known)


class Notes:
    """Events of checkpoints and uploads, which come from any thread, for the trackers.

    A board needs the steps of a text to grow, and uploads end in any order. So the training loop
    writes what was noted since its last step as one text, at the step that it has reached. At the
    step where this attempt begins, the one before may have written a text.
    """

    def __init__(self, accelerator: Accelerator, step: int) -> None:
        self._accelerator = accelerator
        self._written = step
        self._waiting: list[tuple[str, str, int | None]] = []
        self._lock = threading.Lock()

    def add(self, title: str, line: str, step: int | None = None) -> None:
        """Note one event as a line of the text of this title; call it from any thread.

        `step` is for a title whose steps only grow; None is the step that training has reached.
        """
        with self._lock:
            self._waiting.append((title, printable(line, MAX_NOTE), step))

    def write(self, step: int, *, is_last: bool = False) -> None:
        """Give what was noted to the trackers, at the number of steps done.

        A second text at the same step waits for the next one, unless none follows (`is_last`).
        """
        if not self._waiting or (step == self._written and not is_last):
            return
        self._written = step
        with self._lock:
            waiting, self._waiting = self._waiting, []
        texts: dict[tuple[str, int], list[str]] = {}
        for title, line, own_step in waiting:
            texts.setdefault((title, step if own_step is None else own_step), []).append(line)
        for (title, at), lines in texts.items():
            for tracker in self._accelerator.trackers:
                tracker.log_lines(title, lines, at)


def log_samples(accelerator: Accelerator, samples: Sequence[Any], step: int) -> None:
    """Give texts of the model (`prompt`, `text`) to the trackers."""
    pairs = [(sample.prompt, sample.text) for sample in samples]
    for tracker in accelerator.trackers if pairs else []:
        tracker.log_samples(pairs, step)


def record_rollback(accelerator: Accelerator, logs: Path, step: int) -> None:
    """Take back what the curves have after `step`, in the middle of an attempt."""
    if not accelerator.is_main_process:
        return
    record_event(logs, "rollback", step)
    for tracker in accelerator.trackers:
        tracker.roll_back(step)


def record_end(accelerator: Accelerator, logs: Path, step: int, outcome: str, **facts: Any) -> None:
    """Note how this attempt ended (done, stopped or failed), and close the trackers."""
    if not accelerator.is_main_process:
        return
    record_event(logs, "end", step, outcome=outcome, **facts)
    for tracker in accelerator.trackers:
        tracker.end(outcome)


def record_event(logs: Path, event: str, step: int, **facts: Any) -> None:
    """Append an event to `metrics.jsonl`; where that fails, say so once and go on."""
    path = logs / METRICS_FILE
    try:
        append_metrics(path, {"event": event, "step": step, **facts})
    except OSError as exc:
        reason, level = exc.strerror or exc, logging.DEBUG if path in _failing else logging.WARNING
        log.log(level, "%s: the event %s could not be written: %s.", path, event, reason)
        _failing.add(path)
    else:
        _failing.discard(path)
