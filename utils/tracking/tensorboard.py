"""Curves, texts and hyperparameters of a run as TensorBoard shows them.

    metrics, texts of a run -> event file -> TensorBoard

Each run has a folder in its logs, and each branch of it: `--fresh` begins a curve beside the old
one. TensorBoard calls a curve by its folder: the run's name, then its id. The attempts of a run
share that folder, one event file each, and make one curve. TensorBoard has two loaders. One drops
what comes after the step of a `START` record; the other drops, for each tag, what is not before the
next step that it reads. So an attempt begins with that record, and within a tag steps only grow.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.base.text import printable, to_json_text
from utils.tracking.event_file import EventFile
from utils.tracking.tracker import (
    TRAINING_LOSS,
    VALIDATION_LOSS,
    RunStart,
    RunTracker,
    group_metrics,
)

# What the HPARAMS tab compares runs by; it shows the first few hyperparameters at once.
_COMPARED_METRICS = ("loss/validation_best", VALIDATION_LOSS, TRAINING_LOSS)
# The CUSTOM SCALARS tab draws several tags, which are regular expressions, in one chart.
_LAYOUT = {
    "loss": {"training and validation": ["Multiline", [f"{TRAINING_LOSS}$", f"{VALIDATION_LOSS}$"]]}
}
_COMPARED_KEYS = ("learning_rate", "max_steps", "num_parameters", "seed", "tokens_per_step")
MAX_LINE = 2000


class TensorBoardTracker(RunTracker):
    """Writes the event file of one attempt, in a folder of the run's logs."""

    name = "tensorboard"
    title = "TensorBoard"

    def __init__(self, logs: Path) -> None:
        super().__init__()
        self._logs = logs
        self._start: RunStart | None = None
        self._file: EventFile | None = None

    def _begin(self, start: RunStart) -> None:
        self._start = start
        self._open()

    def _open(self) -> EventFile | None:
        """Return the file of this attempt; one that could not be made before is tried again."""
        start = self._start
        if self._file is None and start is not None:
            file = EventFile(self._logs / start.curve)
            try:
                _introduce(start, file)
            except BaseException:
                file.discard()
                raise
            self._file = file
        return self._file

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if file := self._open():
            file.add_scalars(group_metrics(values), step)

    def _log_lines(self, title: str, lines: Sequence[str], step: int) -> None:
        if file := self._open():
            file.add_text(title, _as_code("\n".join(lines)), step)

    def _log_samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        if file := self._open():
            texts = [
                f"{_as_code(prompt or '(end of text)')}\n\ngoes on with\n\n{_as_code(text)}"
                for prompt, text in samples
            ]
            file.add_text("samples", "\n\n---\n\n".join(texts), step)

    def _roll_back(self, step: int) -> None:
        if file := self._open():
            file.purge_from(step + 1)

    def _end(self, outcome: str) -> None:
        file, start = self._file, self._start
        self._start = self._file = None
        if file is None or start is None:
            return
        try:
            if outcome == "done":
                file.add(_hyperparameters(start)[2])
        finally:
            file.close()


def _introduce(start: RunStart, file: EventFile) -> None:
    """Write what comes before the first metrics of an attempt."""
    file.purge_from(start.step + 1)
    for step, values in start.missing:
        file.add_scalars(group_metrics(values), step)
    summary: Any = importlib.import_module("torch.utils.tensorboard.summary")
    for one in (*_hyperparameters(start)[:2], summary.custom_scalars(_LAYOUT)):
        file.add(one)
    # One step on, so that another attempt from here takes it back.
    file.add_text("configuration", describe_configuration(start), start.step + 1)


def _hyperparameters(start: RunStart) -> Any:
    """Return the summaries for the HPARAMS tab: names, values, and that the run is done."""
    summary: Any = importlib.import_module("torch.utils.tensorboard.summary")
    values = start.hyperparameters
    first = {key: values[key] for key in _COMPARED_KEYS if key in values}
    return summary.hparams({**first, **values}, dict.fromkeys(_COMPARED_METRICS))


def describe_configuration(start: RunStart) -> str:
    """Return the facts and the configuration of an attempt, as a table in Markdown."""
    rows = [f"Start at step {start.step}.", "", "| key | value |", "|---|---|"]
    for key, value in {**start.facts, **start.config.to_json()}.items():
        text = value if isinstance(value, str) else to_json_text(value, indent=None)
        shown = printable(text, MAX_LINE).replace("`", "'").replace("|", "\\|")
        rows.append(f"| {key} | {f'`{shown}`' if shown else ''} |")
    return "\n".join(rows)


def _as_code(text: str) -> str:
    """Return text as a code block of Markdown, in which nothing has a meaning."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
