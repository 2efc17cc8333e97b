"""Tables of what a command found: what matters most, in the width there is.

rows, columns with their ranks -> lines that fit a terminal; in a pipe, all of it
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from utils.base.console import output_width, print_wrapped
from utils.base.text import cell_width, shorten_middle, wrap_words

TABLE_INDENT, TABLE_GAP = "  ", "  "
# Of a column, where a terminal is narrow: the name of a checkpoint stays whole.
LEAST_NAME, LEAST_PROSE = 44, 24
MOST_PADDED = 40  # in a pipe: longer prose moves what comes after it


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its cells in a row, and its heading.

    `rank` is its place in the order of importance: where a terminal is too narrow, the column of
    the highest leaves first, and those of 1 never. A number stands on the right. Names lose the
    beginning that all of them share, and then their middle. Prose wraps at words.
    """

    name: str
    rank: int = 1
    kind: Literal["word", "number", "name", "prose"] = "word"


def table_lines(
    rows: Sequence[Mapping[str, str]], columns: Sequence[Column], width: int | None
) -> tuple[list[str], list[str]]:
    """Return (the lines of a table that fits a width, notes on what it does not show).

    Each row has at least a line; the first line has the headings. Without a width (None) every
    column is there, and nothing wraps.
    """
    cells = {column.name: [row[column.name] for row in rows] for column in columns}
    notes: list[str] = []
    widths = {column.name: _widest([column.name, *cells[column.name]]) for column in columns}
    shown = list(columns)
    if width is None:
        for column in columns[:-1]:
            if column.kind == "prose":
                widths[column.name] = min(widths[column.name], MOST_PADDED)
    else:
        shown = [column for column in columns if column.rank == 1 or any(cells[column.name])]
        notes = _fit_columns(shown, cells, widths, width - len(TABLE_INDENT))
    lines = [_join_cells([column.name for column in shown], shown, widths)]
    for index in range(len(rows)):
        blocks = [
            _fit_cell(cells[column.name][index], column, None if width is None else widths)
            for column in shown
        ]
        lines += [_join_cells(line, shown, widths) for line in zip_longest(*blocks, fillvalue="")]
    return lines, notes


def _fit_columns(
    shown: list[Column], cells: dict[str, list[str]], widths: dict[str, int], room: int
) -> list[str]:
    """Make columns fit, all together, by less of their names, less prose, and fewer columns.

    Returns:
        Notes on what is not shown any more.
    """
    notes = []
    for column in shown:
        names, heading = cells[column.name], column.name
        if column.kind == "name" and _total_width(shown, widths) > room and len(names) > 1:
            shared = os.path.commonprefix(names)
            shared = shared[: max(shared.rfind("-"), shared.rfind("/")) + 1]
            if shared:
                cells[heading] = [name.removeprefix(shared) for name in names]
                widths[heading] = _widest([heading, *cells[heading]])
                notes.append(f"Each {heading} begins with {shared}")
    wanted = dict(widths)
    for column in shown:
        least = _least_width(column, cells[column.name], wanted[column.name])
        widths[column.name] = min(room, least)
    kept: list[Column] = []
    for column in sorted(shown, key=lambda column: column.rank):
        if column.rank == 1 or _total_width([*kept, column], widths) <= room:
            kept.append(column)
    spare = room - _total_width(kept, widths)
    for column in kept:
        more = max(0, min(spare, wanted[column.name] - widths[column.name]))
        widths[column.name] += more
        spare -= more
    left_out = [column.name for column in shown if column not in kept]
    shown[:] = [column for column in shown if column in kept]
    return [*notes, f"Not shown in this width: {', '.join(left_out)}."] if left_out else notes


def _widest(texts: Iterable[str]) -> int:
    return max(map(cell_width, texts), default=0)


def _least_width(column: Column, cells: Sequence[str], wanted: int) -> int:
    """Return how narrow a column may become: prose takes two lines before another one leaves."""
    least = wanted
    if column.kind == "name":
        least = LEAST_NAME
    elif column.kind == "prose":
        longest = _widest(word for cell in cells for word in cell.split())
        least = min(LEAST_PROSE, max(longest, wanted - wanted // 2))
    return min(wanted, max(cell_width(column.name), least))


def _total_width(columns: Sequence[Column], widths: Mapping[str, int]) -> int:
    return sum(widths[column.name] + len(TABLE_GAP) for column in columns) - len(TABLE_GAP)


def _fit_cell(cell: str, column: Column, widths: Mapping[str, int] | None) -> list[str]:
    if widths is None:
        return [cell]
    width = widths[column.name]
    return wrap_words(cell, width) if column.kind == "prose" else [shorten_middle(cell, width)]


def _join_cells(cells: Sequence[str], columns: Sequence[Column], widths: Mapping[str, int]) -> str:
    placed = []
    for cell, column in zip(cells, columns, strict=True):
        blanks = " " * (widths[column.name] - cell_width(cell))
        placed.append(blanks + cell if column.kind == "number" else cell + blanks)
    return f"{TABLE_INDENT}{TABLE_GAP.join(placed)}".rstrip()


def print_table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column] = ()
) -> None:
    """Print rows below a title, if there are any, as wide as the terminal allows.

    Without `columns` they are the keys of the first row, which are in the order of importance.
    """
    if not rows:
        return
    columns = columns or [Column(key, rank) for rank, key in enumerate(rows[0], 1)]
    cells = [{column.name: str(row[column.name]) for column in columns} for row in rows]
    lines, notes = table_lines(cells, columns, output_width())
    print_wrapped(title)
    print_wrapped(lines[0], style="bold")
    print("\n".join(lines[1:]))
    for note in notes:
        print_wrapped(note)
