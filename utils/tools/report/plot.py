"""What `plot` of the viewer draws: the curves of checkpoints, or figures of evaluate.py.

    chosen checkpoints, evaluations.jsonl -> Plot -> picture, charts in text, JSON

No torch here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.base.console import output_width
from utils.base.errors import UsageError
from utils.base.text import printable
from utils.checkpoints.layout import RunPaths
from utils.command_line.run_config import read_run_config
from utils.tools.evaluation.log import metric_names, metric_points, read_evaluations
from utils.tools.evaluation.text import chart_lines, draw_evaluations, left_out_notes
from utils.tools.viewer import report
from utils.tools.viewer.chosen import choose_checkpoints
from utils.tracking.metrics_log import HISTORY_LIMIT
from utils.tracking.plots import METRICS, Curves, draw_picture, require_drawable, x_label
from utils.tracking.text_plots import MARKS, draw_chart

_CHART_WIDTH = 78
_LOSS_CHART_LINES, _CHART_LINES = 12, 6


@dataclass(frozen=True)
class Plot:
    """What `plot` draws: into a picture, as charts in text, as values for JSON.

    `name` is that of the picture where the user gives none; `notes` say what is left out, and why.
    """

    name: str
    draw: Callable[[Path], Path]
    charts: Callable[[], list[str]]
    values: dict[str, Any]
    notes: list[str]


def plot_of_evaluations(args: argparse.Namespace) -> Plot:
    """Return the plot of figures of evaluate.py over the steps of checkpoints.

    Raises:
        UsageError: Checkpoints are named too, or no checkpoint has such a figure.
    """
    if args.names or args.remote:
        raise UsageError("--evaluation draws all checkpoints: it takes no NAME and no --remote.")
    log = read_evaluations(RunPaths.of(read_run_config(args)).evaluations)
    drawn = [metric_points(log.evaluations, name) for name in args.evaluation]
    for points in drawn:
        if not points.steps:
            known = ", ".join(metric_names(log.evaluations)) or "none yet; evaluate.py makes some"
            raise UsageError(f"--evaluation {printable(points.name)}: known are {known}.")
    return Plot(
        drawn[0].name,
        lambda path: draw_evaluations(drawn, path),
        lambda: chart_lines(drawn, sys.stdout.encoding, _chart_width()),
        {"evaluations": [points.to_json() for points in drawn]},
        left_out_notes(drawn) + ([log.problem] if log.problem else []),
    )


def plot_of_checkpoints(args: argparse.Namespace) -> Plot:
    """Return the plot of all named checkpoints in all places."""
    names, every, notes, values = [], [], [], []
    chosen = choose_checkpoints(args, args.names or ["latest"])
    is_one_place = len({one.where for one in chosen}) == 1
    for one in chosen:
        name = str(one.view.name)
        label = name if is_one_place else one.label
        curves, problem = report.read_curves(one.view, label)
        if problem:
            notes.append(
                f"{label}: {problem}; drawn from metadata.json (last {HISTORY_LIMIT} only)"
            )
        names.append(name)
        every.append(curves)
        values.append({"checkpoint": name, **asdict(curves), "problem": problem})
    drawn = [curves for curves in every if curves.has_steps and curves.series] or every
    notes += [
        f"{curves.label} is left out: its steps are not known"
        for curves in every
        if curves not in drawn
    ]
    require_drawable(drawn)
    return Plot(
        names[0],
        lambda path: draw_picture(drawn, path),
        lambda: _curve_charts(drawn, sys.stdout.encoding),
        {"curves": values},
        notes,
    )


def _curve_charts(all_curves: Sequence[Curves], encoding: str | None) -> list[str]:
    """Return a chart for each metric, below the names of the curves."""
    is_alone = len(all_curves) == 1
    lines = [
        printable(curves.label)
        if is_alone
        else f"{MARKS[index % len(MARKS)]} {printable(curves.label)}"
        for index, curves in enumerate(all_curves)
    ]
    for metric, title in METRICS.items():
        curves = [
            (curves.series[metric].steps, curves.series[metric].values)
            if metric in curves.series
            else ((), ())
            for curves in all_curves
        ]
        height = _LOSS_CHART_LINES if metric == "loss" else _CHART_LINES
        chart = draw_chart(curves, encoding, _chart_width(), height)
        if chart:
            lines += ["", f"{title} over {x_label(all_curves)}", *chart]
    return lines


def _chart_width() -> int:
    """Return the columns of a chart."""
    return min(output_width() or _CHART_WIDTH, _CHART_WIDTH)
