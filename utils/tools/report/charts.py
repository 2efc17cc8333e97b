"""Curves as SVG for a page: thinned, and in the colours of the page around them.

    series -> matplotlib -> SVG without a document around it

matplotlib writes colours that nothing else uses, and they become variables of the page's style
sheet, so that one drawing fits a light page and a dark one. No torch here.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping

from utils.tracking.plots import Series

# Small, so that letters can be read where the drawing is shrunk to the width of a phone.
SIZE_INCHES = (4.4, 2.7)
FONT_POINTS = 10.0
MAX_POINTS = 600
MAX_MARKS = 30  # of a line with more points, no point is marked
_TEXT, _GRID = "#010101", "#020202"
_LINES = ("#030303", "#040404")
_STYLES = {
    _TEXT: "currentColor",
    _GRID: "var(--grid)",
    _LINES[0]: "var(--line-1)",
    _LINES[1]: "var(--line-2)",
}
_ID = re.compile(r' id="([^"]*)"')
_REFERENCE = re.compile(r"#([A-Za-z][\w.-]*)")


def thin_series(series: Series, max_points: int = MAX_POINTS) -> Series:
    """Return the finite points, at most so many: of equal pieces the least and the greatest.

    A spike of one step stays.
    """
    points = [
        (step, value)
        for step, value in zip(series.steps, series.values, strict=True)
        if math.isfinite(value)
    ]
    if len(points) > max_points:
        count = max_points // 2
        edges = [index * len(points) // count for index in range(count + 1)]
        kept = set()
        for begin, end in itertools.pairwise(edges):
            piece = sorted(points[begin:end], key=lambda point: point[1])
            kept |= {piece[0], piece[-1]}
        points = sorted(kept)
    return Series([step for step, _ in points], [value for _, value in points])


def draw_svg(curves: Mapping[str, Series], title: str) -> str:
    """Return a chart of at most two curves by name over the steps.

    `title` is different for each chart of a page: the ids within a drawing are made from it.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": FONT_POINTS}
    colors = {f"{part}.color": _TEXT for part in ("text", "xtick", "ytick")}
    colors["axes.labelcolor"] = _TEXT
    with rc_context({**settings, **colors, "axes.edgecolor": _GRID, "grid.color": _GRID}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        for color, (name, series) in zip(_LINES, curves.items(), strict=False):
            shown = thin_series(series)
            (line,) = axes.plot(shown.steps, shown.values, color=color, linewidth=1.5, label=name)
            if len(shown.values) <= MAX_MARKS:
                line.set(marker="o", markersize=3)
        if len(curves) > 1:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.5)
        axes.margins(x=0.02)
        axes.set_xlabel("step")
        axes.locator_params(nbins=5)
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useOffset=False)
        target = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, format="svg", metadata=nothing)
    return _fit_page(target.getvalue())


def _fit_page(text: str) -> str:
    """Return the drawing alone: its colours those of the page, no id that nothing refers to."""
    text = text[text.index("<svg") :]
    for color, style in _STYLES.items():
        text = text.replace(color, style)
    used = set(_REFERENCE.findall(text))
    return _ID.sub(lambda found: found[0] if found[1] in used else "", text)
