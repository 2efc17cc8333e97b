"""Figures and curves as text: a number, a sparkline, and a chart for a terminal.

    numbers -> lines of block, Braille or ASCII characters

Braille cells hold 2 x 4 points; where the output's encoding lacks them, or several curves have to
be told apart without colour, a cell is one character.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

from utils.base.text import ABSENT

_LEVELS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_LEVELS = "_.-=+*%#"
MARKS = "*o+x#%@&"
BRAILLE = 0x2800
# Bit of the dot in column x, row y of a Braille cell (Unicode 15, chapter 21.1).
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_LABEL_WIDTH = 11  # of -1.234e+123
_LONGEST = 1e15

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values, of the same length; what is not finite is a gap."""


def is_encodable(text: str, encoding: str | None) -> bool:
    """Tell whether an output of this encoding can show the text."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def format_figure(value: float | None, form: str) -> str:
    """Return a number in a format, shorter where that would be very long, `-` for None."""
    if value is None:
        return ABSENT
    return format(value, form if abs(value) < _LONGEST or math.isnan(value) else ".3e")


show_loss = partial(format_figure, form=".6f")
show_rate = partial(format_figure, form=".2e")
show_count = partial(format_figure, form=",.0f")
show_share = partial(format_figure, form=".1%")


def means_of_pieces(values: Sequence[float], count: int) -> list[float]:
    """Return at most `count` values: the means of equal pieces, in order."""
    count = min(count, len(values))
    edges = [index * len(values) // count for index in range(count + 1)] if count else []
    pieces = (values[begin:end] for begin, end in itertools.pairwise(edges))
    return [math.fsum(value / len(piece) for value in piece) for piece in pieces]


def sparkline(values: Sequence[float], encoding: str | None, width: int = 40) -> str:
    """Return finite values as one line of bars, means of neighbours where there are more."""
    means = means_of_pieces([value for value in values if math.isfinite(value)], width)
    if not means:
        return ""
    levels = _LEVELS if is_encodable(_LEVELS, encoding) else _ASCII_LEVELS
    low, high = min(means), max(means)
    scale = _scale(low, high, len(levels))
    return "".join(
        levels[min(len(levels) - 1, int((mean / 2 - low / 2) * scale))] for mean in means
    )


def _scale(low: float, high: float, count: int) -> float:
    """Return what half of a distance above `low` is multiplied by to become an index."""
    span = high / 2 - low / 2  # the halves of two finite numbers do not overflow
    return count / span if span > 0 and math.isfinite(count / span) else 0.0


def draw_chart(
    curves: Sequence[Curve], encoding: str | None, width: int = 72, height: int = 8
) -> list[str]:
    """Return a chart of curves over the same axis, as lines; empty where there is no point.

    One curve is drawn in dots, several in `MARKS`, in that order. The axis adds a line to `height`.
    """
    finite = [
        [(x, y) if math.isfinite(y) else None for x, y in zip(steps, values, strict=True)]
        for steps, values in curves
    ]
    points = [point for curve in finite for point in curve if point is not None]
    if not points:
        return []
    height = max(2, height)
    columns = max(8, width - _LABEL_WIDTH - 2)
    is_fine = len(curves) == 1 and is_encodable(chr(BRAILLE), encoding)
    wide, tall = (2 * columns, 4 * height) if is_fine else (columns, height)
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    across, up = _scale(left, right, wide - 1), _scale(low, high, tall - 1)
    grid = _Grid(columns, height, is_fine=is_fine)
    for number, curve in enumerate(finite):
        previous = None
        for point in curve:
            place = None
            if point is not None:
                row = round((point[1] / 2 - low / 2) * up) if up else tall // 2
                place = (round((point[0] / 2 - left / 2) * across), tall - 1 - row)
                grid.draw_line(previous or place, place, MARKS[number % len(MARKS)])
            previous = place
    return [*grid.lines(low, high), _axis(left, right, columns)]


class _Grid:
    """Cells that lines are drawn into."""

    def __init__(self, columns: int, rows: int, *, is_fine: bool) -> None:
        self._is_fine = is_fine
        self._cells: list[list[str]] = [[" "] * columns for _ in range(rows)]

    def draw_line(self, begin: tuple[int, int], end: tuple[int, int], mark: str) -> None:
        """Mark the points from one to another."""
        steps = max(abs(end[0] - begin[0]), abs(end[1] - begin[1]), 1)
        for index in range(steps + 1):
            x = begin[0] + round((end[0] - begin[0]) * index / steps)
            y = begin[1] + round((end[1] - begin[1]) * index / steps)
            self._mark(x, y, mark)

    def _mark(self, x: int, y: int, mark: str) -> None:
        if not self._is_fine:
            self._cells[y][x] = mark
            return
        row, column = self._cells[y // 4], x // 2
        dots = 0 if row[column] == " " else ord(row[column]) - BRAILLE
        row[column] = chr(BRAILLE + (dots | _DOTS[x % 2][y % 4]))

    def lines(self, low: float, high: float) -> list[str]:
        """Return the lines, with the values of the first and the last."""
        labels = [f"{high:.4g}", *[""] * (len(self._cells) - 2), f"{low:.4g}"]
        if low == high:
            labels = [""] * len(self._cells)
            labels[len(labels) // 2] = f"{low:.4g}"
        return [
            f"{label:>{_LABEL_WIDTH}} |{''.join(cells)}".rstrip()
            for label, cells in zip(labels, self._cells, strict=True)
        ]


def _axis(left: float, right: float, columns: int) -> str:
    first, last = f"{left:.10g}", f"{right:.10g}"
    space = " " * max(1, columns - len(first) - len(last))
    ends = first if left == right else f"{first}{space}{last}"
    return f"{'':>{_LABEL_WIDTH}}  {ends}"
