"""What evaluate.py and the viewer print of evaluations.

    evaluations (log.py) -> titles, cells, lines, charts

Names and values may come from a foreign file: texts pass `printable`. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.base.tables import Column
from utils.base.text import ABSENT, number, printable
from utils.tools.evaluation.log import ERROR_SUFFIX, NO_RESULTS, Evaluation, MetricPoints
from utils.tracking.plots import Panel, draw_panels
from utils.tracking.text_plots import draw_chart

_SHOWN_NAMES = {
    "bits_per_byte": "bits/byte",
    "tokens_per_second": "tokens/s",
}
# Beside the figures, where they are known.
SHOWN_CIRCUMSTANCES = ("tokens", "tokens_per_second", "items")
_CELL_CHARACTERS = 60
CHART_LINES = 8


def show_measured(value: float | None, error: float | None = None) -> str:
    """Return a figure with four decimals, and its standard error where that is known."""
    if value is None:
        return ABSENT
    text = f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"
    return text if error is None else f"{text} +-{error:.4f}"


def figures(evaluation: Evaluation) -> dict[str, str]:
    """Return the figures of an evaluation by their shown names, then its circumstances."""
    values = evaluation.values
    found = {
        _SHOWN_NAMES.get(name, name): show_measured(value, values.get(f"{name}{ERROR_SUFFIX}"))
        for name, value in values.items()
        if name not in NO_RESULTS and not name.endswith(ERROR_SUFFIX)
    }
    counts = {
        _SHOWN_NAMES.get(name, name): ABSENT if values[name] is None else f"{values[name]:,.0f}"
        for name in SHOWN_CIRCUMSTANCES
        if name in values
    }
    return {printable(name, _CELL_CHARACTERS): text for name, text in {**found, **counts}.items()}


def row(evaluation: Evaluation) -> dict[str, str]:
    """Return an evaluation's cells in a table of models."""
    step = ABSENT if evaluation.step is None else f"{evaluation.step}"
    return {"model": printable(evaluation.model), "step": step, **figures(evaluation)}


def tables(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return (title, rows with the same columns) of each question, in the order of evaluations."""
    groups: dict[tuple[str, str], list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.question, []).append(evaluation)
    found = []
    for group in groups.values():
        rows = [row(evaluation) for evaluation in group]
        columns = dict.fromkeys(column for cells in rows for column in cells)
        full = [{column: cells.get(column, ABSENT) for column in columns} for cells in rows]
        found.append((title(group[0]), full))
    return found


def table_columns(row: Mapping[str, str]) -> list[Column]:
    """Return the columns of rows like this one; its figures are in the order of importance."""
    names = [name for name in row if name not in ("model", "step")]
    ranks = {"model": 1, **{name: rank for rank, name in enumerate(names, 2)}, "step": 4}
    return [Column(name, ranks[name], "name" if name == "model" else "number") for name in row]


def title(evaluation: Evaluation) -> str:
    """Say what was measured, and of which data."""
    parts = [evaluation.task]
    data = evaluation.how.get("data")
    if isinstance(data, str):
        parts.append(f"of {printable(data)}")
    details = describe_question(evaluation.what)
    return " ".join(parts) + (f" ({details})" if details else "")


def describe_question(what: Mapping[str, Any]) -> str:
    """Return what besides the data decides about figures."""
    parts = []
    length, stride = (number(what.get(key)) for key in ("sequence_length", "stride"))
    if what.get("samples") == "training":
        parts.append("the samples of training")
    if length is not None:
        parts.append(f"{length:.0f} tokens at once")
    if stride is not None and stride != length:
        parts.append(f"stride {stride:.0f}")
    if what.get("mask_documents") is True:
        parts.append("documents apart")
    for key, text in (
        ("max_tokens", "the first {:,.0f} tokens"),
        ("num_fewshot", "{:.0f}-shot"),
        ("limit", "the first {:.0f}"),
    ):
        value = number(what.get(key))
        if value is not None:
            parts.append(text.format(value))
    if isinstance(what.get("harness"), str):
        parts.append(printable(what["harness"], _CELL_CHARACTERS))
    return ", ".join(parts)


def evaluation_summary(evaluations: Iterable[Evaluation]) -> list[str]:
    """Return a line with the main figure of each task, as it was measured last."""
    newest = {one.task: one for one in evaluations}
    figures = [
        f"{printable(task)} {name} {show_measured(one.values[name])}"
        for task, one in newest.items()
        if (name := one.main_metric) is not None
    ]
    return [f"Evaluations: {', '.join(figures)}"] if figures else []


def evaluation_lines(evaluations: Iterable[Evaluation]) -> list[str]:
    """Return the evaluations of one checkpoint, a line for each."""
    lines = []
    for evaluation in evaluations:
        cells = "  ".join(f"{name} {text}" for name, text in figures(evaluation).items())
        lines.append(f"  {title(evaluation)}:")
        lines.append(f"    {cells}  {evaluation.time[:19].replace('T', ' ')}".rstrip())
    return lines


def chart_lines(all_points: Sequence[MetricPoints], encoding: str | None, width: int) -> list[str]:
    """Return a chart for each figure."""
    lines: list[str] = []
    for points in all_points:
        chart = draw_chart([(points.steps, points.values)], encoding, width, CHART_LINES)
        lines += ["", f"{printable(points.name)} over step", *chart]
    return lines


def describe_drawn(all_points: Sequence[MetricPoints]) -> str:
    """Say what is drawn and of which runs: `validation.loss, piqa.acc of run 20260101-0a1b2c3d`."""
    runs = dict.fromkeys(points.run_id or "without an id" for points in all_points)
    names = ", ".join(printable(points.name) for points in all_points)
    return f"{names} of run{'' if len(runs) == 1 else 's'} {', '.join(map(printable, runs))}"


def left_out_notes(all_points: Sequence[MetricPoints]) -> list[str]:
    """Return what is not drawn, and why."""
    return [
        f"{points.name}: {points.num_other} left out, measured in another way or of another run"
        for points in all_points
        if points.num_other
    ]


def draw_evaluations(all_points: Sequence[MetricPoints], path: Path) -> Path:
    """Draw figures over steps, below what was measured and of which runs; return the file.

    `path` is of `picture_path`.

    Raises:
        UsageError: There is nothing to draw, or the file cannot be written.
    """
    panels, above = [], ""
    for points in all_points:
        metric = points.name.removeprefix(f"{points.newest.task}.") if points.newest else ""
        question = title(points.newest) if points.newest else ""
        shown = "" if question == above else question
        panels.append(Panel(points, _SHOWN_NAMES.get(metric, metric), shown))
        above = question
    return draw_panels(panels, describe_drawn(all_points), path)
