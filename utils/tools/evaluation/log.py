"""`evaluations.jsonl`: what was measured of which weights, one JSON object a line.

    evaluate.py -> evaluations.jsonl -> viewer, plots

Lines are only appended; of the same evaluation of the same weights the newest counts. Weights are
told by their checksums, not by a name that another branch may have used, too. What lines say may be
foreign: each is read as far as it makes sense. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.base.files import read_regular_file
from utils.base.text import FOREIGN_ERRORS, number, parse_json, printable, to_json_text
from utils.checkpoints.layout import Manifest
from utils.tracking.metrics_log import GREATEST_VALUE, MAX_STEP, append_metrics
from utils.tracking.plots import Series

MODEL_FILES = ("model", "pytorch_model")
# Ends the name of a figure's standard error, as in lm-evaluation-harness.
ERROR_SUFFIX = "_stderr"
# What is a circumstance of a figure and not a figure.
NO_RESULTS = ("tokens", "bytes", "tokens_per_second", "items")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one model.

    Attributes:
        model: What the model was called.
        task: validation, training, hellaswag, lambada, or a task of lm-evaluation-harness.
        values: Figures by name; None where one is not known.
        what: What decides about the figures: data by their fingerprints, lengths, limits.
        how: What should not: places, device, versions.
        step: Optimizer updates; None where the model is no checkpoint.
        run_id: The run that made it, None where unknown.
        weights: Which weights, of `weights_id`; None where no manifest vouches for them.
        time: When it ended, in UTC.
    """

    model: str
    task: str
    values: Mapping[str, float | None]
    what: Mapping[str, Any] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    run_id: str | None = None
    weights: str | None = None
    time: str = ""

    @property
    def question(self) -> tuple[str, str]:
        """What was asked: figures of the same question can be compared."""
        return self.task, to_json_text(dict(sorted(self.what.items())), indent=None)

    @property
    def main_metric(self) -> str | None:
        """The figure that people look at first."""
        results = [name for name in self.results if not name.endswith(ERROR_SUFFIX)]
        for name in ("acc_norm", "acc", "loss", *results):
            if name in results:
                return name
        return None

    @property
    def results(self) -> dict[str, float]:
        """The figures that are known, without the circumstances."""
        return {
            name: value
            for name, value in self.values.items()
            if value is not None and name not in NO_RESULTS
        }

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as it is written; the time is added when it is."""
        return {key: value for key, value in asdict(self).items() if key != "time"}


@dataclass(frozen=True)
class EvaluationLog:
    """What a file says, in its order; `problem` is why it cannot be read, or not all of it."""

    evaluations: tuple[Evaluation, ...] = ()
    problem: str | None = None


def weights_id(manifest: Manifest) -> str:
    """Return what tells the weights of a checkpoint from all others: 16 hex digits."""
    files = [
        [name, entry.size, entry.crc32c]
        for name, entry in sorted(manifest.files.items())
        if name.startswith(MODEL_FILES)
    ]
    return hashlib.sha256(json.dumps(files).encode("utf-8")).hexdigest()[:16]


def append_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Append an evaluation with the time.

    Raises:
        OSError: The file cannot be written.
    """
    append_metrics(path, evaluation.to_json())


def read_evaluations(path: Path) -> EvaluationLog:
    """Return what a file says as far as it can be read; nothing where there is none."""
    try:
        data = read_regular_file(path)
    except FileNotFoundError:
        return EvaluationLog()
    except (OSError, ValueError) as exc:
        return EvaluationLog(problem=f"{path.name} cannot be read ({exc})")
    lines = [line for line in data.splitlines() if line.strip()]
    found = [_parse(line) for line in lines]
    known = tuple(evaluation for evaluation in found if evaluation is not None)
    lost = len(lines) - len(known)
    problem = f"{lost} of {len(lines)} lines of {path.name} cannot be read" if lost else None
    return EvaluationLog(known, problem)


def _parse(line: bytes) -> Evaluation | None:
    try:
        record = parse_json(line)
        model, task = record["model"], record["task"]
        values, what, how = (record.get(key) or {} for key in ("values", "what", "how"))
        if not (isinstance(model, str) and isinstance(task, str)):
            return None
        step = number(record.get("step"))
        return Evaluation(
            printable(model),
            printable(task, 80),
            {printable(name, 80): number(value, GREATEST_VALUE) for name, value in values.items()},
            dict(what),
            dict(how),
            int(step) if step is not None and 0 <= step < MAX_STEP else None,
            _text(record.get("run_id")),
            _text(record.get("weights")),
            printable(record.get("time") or ""),
        )
    except FOREIGN_ERRORS:
        return None


def _text(value: object) -> str | None:
    return printable(value) if isinstance(value, str) else None


def newest(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Return the last of each question to each model, by task and time."""
    last = {
        (evaluation.weights or evaluation.model, evaluation.question): evaluation
        for evaluation in evaluations
    }
    return sorted(last.values(), key=lambda evaluation: (evaluation.task, evaluation.time))


def of_weights(evaluations: Iterable[Evaluation], manifest: Manifest | None) -> list[Evaluation]:
    """Return the newest evaluations of a checkpoint's weights."""
    if manifest is None:
        return []
    wanted = weights_id(manifest)
    return newest(found for found in evaluations if found.weights == wanted)


@dataclass(frozen=True)
class MetricPoints(Series):
    """A figure over the steps of a run.

    Attributes:
        name: Task and figure, with a dot between.
        num_other: Checkpoints that are left out, because another run made them or the question to
            them was another one.
        newest: The newest evaluation: its question and run are those of all; None without points.
    """

    name: str = ""
    num_other: int = 0
    newest: Evaluation | None = None

    @property
    def run_id(self) -> str | None:
        """The run that the checkpoints are of."""
        return None if self.newest is None else self.newest.run_id

    def to_json(self) -> dict[str, Any]:
        """Return the points as `--json` has them."""
        return {
            "steps": self.steps,
            "values": self.values,
            "name": self.name,
            "num_other": self.num_other,
            "run_id": self.run_id,
        }


def metric_points(evaluations: Iterable[Evaluation], name: str) -> MetricPoints:
    """Return a figure, such as `hellaswag.acc_norm`, over the steps of a run.

    Run and question are those of the newest, the last, of the evaluations.
    """
    found = [
        (evaluation, evaluation.step, evaluation.results[metric])
        for evaluation in evaluations
        for metric in evaluation.results
        if f"{evaluation.task}.{metric}" == name and evaluation.step is not None
    ]
    if not found:
        return MetricPoints(name=name)
    last = found[-1][0]
    alike, models, others = {}, set(), set()
    for evaluation, step, value in found:
        model = evaluation.weights or evaluation.model
        if (evaluation.run_id, evaluation.question) == (last.run_id, last.question):
            alike[step] = value
            models.add(model)
        else:
            others.add(model)
    steps = tuple(sorted(alike))
    values = tuple(alike[step] for step in steps)
    return MetricPoints(steps, values, name, len(others - models), last)


def metric_names(evaluations: Iterable[Evaluation]) -> list[str]:
    """Return every figure that is known, sorted."""
    return sorted(
        {
            f"{evaluation.task}.{metric}"
            for evaluation in evaluations
            for metric in evaluation.results
        }
    )
