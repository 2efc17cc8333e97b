"""Curves of a run -> a picture file, with matplotlib's Agg renderer (no display needed).

matplotlib is imported when something is drawn and not before: it takes longer than everything else
the viewer does. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import PretrainError, UsageError
from utils.metadata import HISTORY_LIMIT, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (9.0, 6.5)
DOTS_PER_INCH = 120
DEFAULT_SUFFIX = ".png"
SUFFIXES = (".png", ".svg", ".pdf", ".jpg")


@dataclass(frozen=True)
class Series:
    """Values over steps, of the same length; what is not finite is drawn as a gap."""

    steps: Sequence[float]
    values: Sequence[float]

    @property
    def num_points(self) -> int:
        """Points that are drawn."""
        return sum(math.isfinite(value) for value in self.values)


@dataclass(frozen=True)
class TrainingCurves:
    """What one picture shows.

    Attributes:
        title: Heading of the picture.
        loss: Training loss.
        validation: Validation loss.
        learning_rate: Learning rate.
        x_label: What the steps count.
    """

    title: str
    loss: Series
    validation: Series
    learning_rate: Series
    x_label: str = "step"


def curves_from_history(title: str, history: Mapping[str, Any]) -> TrainingCurves:
    """Return the curves of a `training_metrics.json`; of what is damaged, the readable points."""
    steps, evaluations = _list(history.get("steps")), _list(history.get("validation"))
    points = [item for item in evaluations if isinstance(item, dict)]
    return TrainingCurves(
        title=title,
        loss=_series(steps, _list(history.get("loss_history"))),
        validation=_series(
            [item.get("step") for item in points], [item.get("validation_loss") for item in points]
        ),
        learning_rate=_series(steps, _list(history.get("learning_rates"))),
    )


def curves_from_metadata(title: str, metadata: Mapping[str, Any]) -> TrainingCurves:
    """Return the last points as `metadata.json` keeps them; their steps are not known."""
    losses, rates = _list(metadata.get("loss_history")), _list(metadata.get("learning_rates"))
    return TrainingCurves(
        title=title,
        loss=_series(range(1, len(losses) + 1), losses),
        validation=Series((), ()),
        learning_rate=_series(range(1, len(rates) + 1), rates),
        x_label=f"logged entry (of the last {HISTORY_LIMIT})",
    )


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _series(steps: Sequence[object], values: Sequence[object]) -> Series:
    """Pair steps with values; what is no number becomes a gap, a missing step drops the point."""
    points = [(number(step), number(value)) for step, value in zip(steps, values, strict=False)]
    known = [
        (step, math.nan if value is None else value) for step, value in points if step is not None
    ]
    return Series([step for step, _ in known], [value for _, value in known])


def draw_training_curves(curves: TrainingCurves, path: Path) -> Path:
    """Draw losses above and the learning rate below, over the same steps.

    Returns:
        The file that was written: `path`, with .png added where it had no suffix.

    Raises:
        UsageError: There is nothing to draw, or the file cannot be written.
        PretrainError: matplotlib is not installed.
    """
    target = path if path.suffix else path.with_name(path.name + DEFAULT_SUFFIX)
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--save {path}: the name must end in one of {', '.join(SUFFIXES)}.")
    if not (curves.loss.num_points or curves.validation.num_points):
        raise UsageError(f"{curves.title}: no loss was logged before it, so there is no curve.")
    figure = _build_figure(curves)
    try:
        figure.savefig(target, dpi=DOTS_PER_INCH)
    except OSError as exc:
        raise UsageError(f"{target} cannot be written: {exc.strerror or exc}.") from exc
    return target


def _build_figure(curves: TrainingCurves) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise PretrainError("matplotlib is not installed; run: pip install matplotlib") from exc
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    # A `$` in a title would be read as the start of a formula.
    losses.set_title(curves.title.replace("$", r"\$"))
    _draw(losses, curves.loss, "training loss", "C0")
    _draw(losses, curves.validation, "validation loss", "C1", marker="o")
    losses.set_ylabel("loss")
    losses.legend()
    _draw(rates, curves.learning_rate, "learning rate", "C2")
    rates.set_ylabel("learning rate")
    rates.set_xlabel(curves.x_label)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    return figure


def _draw(axes: Axes, series: Series, label: str, color: str, marker: str = "") -> None:
    if series.num_points == 0:
        return
    # A single point has no line to be seen by.
    values = [value if math.isfinite(value) else math.nan for value in series.values]
    mark = marker or ("o" if series.num_points == 1 else "")
    axes.plot(series.steps, values, color=color, marker=mark, markersize=4, label=label)
