"""Curves of checkpoints -> a picture file, by matplotlib (no display needed).

    training_metrics.json, metadata.json -> curves -> picture; text_plots.py for a terminal

matplotlib is imported when something is drawn and not before: importing it takes longer than
everything else that the viewer does. No torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import UsageError
from utils.base.text import number, printable
from utils.base.uri import require_path
from utils.tracking.metrics_log import GREATEST_VALUE, HISTORY_KEYS, HISTORY_LIMIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES = 9.0
LOSS_INCHES = 4.5
PANEL_INCHES = 1.7
DOTS_PER_INCH = 120
DEFAULT_SUFFIX = ".png"
SUFFIXES = (".png", ".svg", ".pdf", ".jpg")
LABEL_CHARACTERS = 80
TITLE_CHARACTERS = 100
MAX_MARKED = 50  # of a line with more points, none is marked
GREATEST_STEP = 1e15

# Metric -> its name in the picture, in the order of the panels.
METRICS = {
    "loss": "training loss",
    "validation_loss": "validation loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
}
LOSSES = ("loss", "validation_loss")
_BOUNDARIES = re.compile(r"[/:\s-]+")


@dataclass(frozen=True)
class Series:
    """Values over steps, of the same length; what is not finite is drawn as a gap."""

    steps: Sequence[float] = ()
    values: Sequence[float] = ()

    @property
    def num_points(self) -> int:
        """Points that are drawn."""
        return sum(math.isfinite(value) for value in self.values)


@dataclass(frozen=True)
class Curves:
    """What is drawn of one checkpoint.

    Attributes:
        label: What it is called in the picture.
        series: By metric; those without a point are left out.
        has_steps: Whether the steps are known; else the entries are numbered.
    """

    label: str
    series: Mapping[str, Series] = field(default_factory=dict)
    has_steps: bool = True


@dataclass(frozen=True)
class Panel:
    """A curve in a panel of its own; `title` is drawn above it where it is not empty."""

    series: Series
    label: str
    title: str = ""


def curves_from_history(label: str, history: Mapping[str, Any]) -> Curves:
    """Return the curves of a `training_metrics.json`; of what is damaged, the readable points."""
    steps = _list(history.get("steps"))
    evaluations = [item for item in _list(history.get("validation")) if isinstance(item, dict)]
    series = {
        metric: read_series(steps, _list(history.get(key))) for metric, key in HISTORY_KEYS.items()
    }
    series["validation_loss"] = read_series(
        [item.get("step") for item in evaluations],
        [item.get("validation_loss") for item in evaluations],
    )
    return Curves(label, _with_points(series))


def curves_from_metadata(label: str, metadata: Mapping[str, Any]) -> Curves:
    """Return the last points as `metadata.json` keeps them; their steps are not known."""
    series = {}
    for metric in ("loss", "learning_rate"):
        values = _list(metadata.get(HISTORY_KEYS[metric]))
        series[metric] = read_series(range(1, len(values) + 1), values)
    return Curves(label, _with_points(series), has_steps=False)


def _with_points(series: Mapping[str, Series]) -> dict[str, Series]:
    return {
        metric: series[metric]
        for metric in METRICS
        if metric in series and series[metric].num_points
    }


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def read_series(steps: Sequence[object], values: Sequence[object]) -> Series:
    """Pair steps with values; a value that is not a number is a gap, a missing step no point."""
    points = [
        (number(step, GREATEST_STEP), number(value, GREATEST_VALUE))
        for step, value in zip(steps, values, strict=False)
    ]
    known = [
        (step, math.nan if value is None else value) for step, value in points if step is not None
    ]
    return Series([step for step, _ in known], [value for _, value in known])


def require_drawable(all_curves: Sequence[Curves]) -> None:
    """Refuse to draw nothing.

    Raises:
        UsageError: No curve has a point.
    """
    if not any(curves.series for curves in all_curves):
        labels = ", ".join(printable(curves.label) for curves in all_curves)
        raise UsageError(f"{labels}: nothing was logged before it, so there is no curve.")


def x_label(all_curves: Sequence[Curves]) -> str:
    """Return what the horizontal axis of curves counts."""
    if all(curves.has_steps for curves in all_curves):
        return "step"
    return f"logged entry (of the last {HISTORY_LIMIT})"


def picture_path(path: Path) -> Path:
    """Return where a picture goes: `path`, with .png added where it has no suffix.

    Raises:
        UsageError: The suffix is of no kind of picture, or the path is a URI.
    """
    require_path(str(path))
    target = path if path.suffix else path.with_name(path.name + DEFAULT_SUFFIX)
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--save {path}: the name must end in one of {', '.join(SUFFIXES)}.")
    return target


def draw_picture(all_curves: Sequence[Curves], path: Path) -> Path:
    """Draw losses above and every other metric in a panel below; return the file.

    Each of several checkpoints has a colour. `path` is of `picture_path`.

    Raises:
        UsageError: The file cannot be written.
    """
    present = [key for key in METRICS if any(key in curves.series for curves in all_curves)]
    losses = tuple(metric for metric in LOSSES if metric in present)
    panels = [panel for panel in (losses, *((m,) for m in present if m not in LOSSES)) if panel]
    heights = [LOSS_INCHES if panel == losses else PANEL_INCHES for panel in panels]
    figure, every = _new_figure(heights)
    for axes, panel in zip(every, panels, strict=True):
        _draw_panel(axes, panel, all_curves)
    is_alone = len(all_curves) == 1
    title = all_curves[0].label if is_alone else f"Curves of {len(all_curves)} checkpoints"
    figure.suptitle(_plain(title, TITLE_CHARACTERS))
    if losses or not is_alone:
        every[0].legend(fontsize="small", frameon=False)
    every[-1].set_xlabel(x_label(all_curves))
    figure.align_ylabels()
    return _save(figure, path)


def draw_panels(panels: Sequence[Panel], title: str, path: Path) -> Path:
    """Draw curves one below the other, their points marked; return the file.

    `path` is of `picture_path`.

    Raises:
        UsageError: There is nothing to draw, or the file cannot be written.
    """
    if not any(panel.series.num_points for panel in panels):
        raise UsageError("There is nothing to draw: no figure of a checkpoint is known.")
    figure, every = _new_figure([LOSS_INCHES / 1.5] * len(panels))
    for axes, panel in zip(every, panels, strict=True):
        steps, values = panel.series.steps, panel.series.values
        axes.plot(steps, values, marker="o", markersize=4, linewidth=1.2)
        axes.set_ylabel(_plain(panel.label))
        axes.set_title(_plain(panel.title, TITLE_CHARACTERS), loc="left", fontsize="medium")
    figure.suptitle(_plain(title, TITLE_CHARACTERS))
    every[-1].set_xlabel("step")
    figure.align_ylabels()
    return _save(figure, path)


def _save(figure: Any, target: Path) -> Path:
    try:
        figure.savefig(target, dpi=DOTS_PER_INCH)
    except OSError as exc:
        raise UsageError(f"{target} cannot be written: {exc.strerror or exc}.") from exc
    return target


def _new_figure(heights: Sequence[float]) -> tuple[Any, Any]:
    """Return (a figure, its axes one below the other)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
    every = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    for axes in every[:, 0]:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    every[-1, 0].xaxis.get_major_locator().set_params(integer=True)  # there is no half of a step
    return figure, every[:, 0]


def _draw_panel(axes: Axes, panel: Sequence[str], all_curves: Sequence[Curves]) -> None:
    """Draw the metrics of a panel; of several checkpoints, each has a colour and one legend."""
    is_alone = len(all_curves) == 1
    names = shorten_labels([curves.label for curves in all_curves])
    for index, (curves, name) in enumerate(zip(all_curves, names, strict=True)):
        for metric in panel:
            series = curves.series.get(metric)
            if series is None:
                continue
            is_dashed = metric == "validation_loss" and not is_alone
            if is_alone:
                color, label = f"C{panel.index(metric)}", METRICS[metric]
            else:
                color, label = f"C{index % 10}", "" if metric != panel[0] else _plain(name)
            # A single point has no line to be seen by; evaluations are far apart.
            limit = MAX_MARKED if metric == "validation_loss" else 1
            axes.plot(
                series.steps,
                series.values,
                color=color,
                linestyle="--" if is_dashed else "-",
                marker="o" if series.num_points <= limit else "",
                markersize=4,
                linewidth=1.2,
                label=label,
                zorder=2 + 1 / (1 + series.num_points),  # the shorter of two that agree is seen
            )
    if not is_alone and len(panel) > 1:
        axes.plot(
            [], [], color="gray", linestyle="--", marker="o", markersize=4, label="validation"
        )
    axes.set_ylabel("loss" if panel[0] in LOSSES else METRICS[panel[0]])
    if panel[0] == "learning_rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def shorten_labels(labels: Sequence[str]) -> list[str]:
    """Return what tells labels apart: the words of each that not all of them have."""
    words = [_BOUNDARIES.split(label) for label in labels]
    common = set.intersection(*map(set, words))
    short = [" ".join(word for word in own if word not in common) for own in words]
    return short if all(short) and len(set(short)) == len(set(labels)) else list(labels)


def _plain(label: str, limit: int = LABEL_CHARACTERS) -> str:
    """Return text that matplotlib shows as it is: `$` would begin a formula, `_` hide a label."""
    text = printable(label, limit).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
