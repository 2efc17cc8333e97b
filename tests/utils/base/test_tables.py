"""Tables: what matters most, in the width there is."""

from __future__ import annotations

import pytest

from utils.base.tables import Column, print_table, table_lines
from utils.base.text import cell_width


def test_a_table_in_a_pipe_shows_the_columns_that_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"name": "a", "step": 1, "x": 2}, {"name": "bb", "step": 10, "x": 3}]
    print_table("Title", rows, [Column("step", kind="number"), Column("name", kind="prose")])
    print_table("Nothing", [])
    assert capsys.readouterr().out == "Title\n  step  name\n     1  a\n    10  bb\n"


def test_the_least_important_columns_leave_first_and_are_named() -> None:
    columns = (
        Column("size", 4, "number"),
        Column("run", kind="name"),
        Column("age", 2, "number"),
        Column("state", 3),
        Column("nothing", 3),
        Column("reason", kind="prose"),
    )
    common = {"state": "not in this bucket", "nothing": "", "reason": "it is the newest of all"}
    rows = [
        {"size": "1.0 GiB", "run": "runs/a-long-one-12", "age": "1m", **common},
        {"size": "512.0 GiB", "run": "runs/a-long-one-3", "age": "22h", **common},
    ]
    for width, header, left_out in (
        (90, "       size  run                 age  state               reason", []),
        (75, "       size  run  age  state               reason", []),
        (60, "       size  run  age  state               reason", []),  # prose takes two lines
        (54, "  run  age  state               reason", ["size"]),
        (30, "  run  age  reason", ["size", "state"]),
    ):
        lines, notes = table_lines(rows, columns, width)
        assert lines[0] == header
        assert max(map(len, lines)) <= width
        shared = ["Each run begins with runs/a-long-one-"] if width < 90 else []
        named = [f"Not shown in this width: {', '.join(left_out)}."] if left_out else []
        assert notes == shared + named
    assert lines[1:3] == ["  12    1m  it is the newest", "            of all"]
    assert len(table_lines(rows, columns, None)[0][0].split()) == len(columns)


@pytest.mark.parametrize("width", [60, 80, None])
def test_letters_that_take_two_columns_stay_in_line(width: int | None) -> None:
    columns = (Column("run", kind="name"), Column("size", 2, "number"), Column("note", 3, "prose"))
    long = "\u9577\u3044" * 15 if width == 60 else "\u9577\u3044"
    rows = [
        {"run": long, "size": "123", "note": "\u826f\u3044 " * 20},
        {"run": "plain", "size": "4567", "note": "\U0001f600"},
    ]
    lines, _ = table_lines(rows, columns, width)
    assert width is None or max(map(cell_width, lines)) <= width
    cells = ["size", *(row["size"] for row in rows)]
    placed = [line for line in lines if any(cell in line for cell in cells)]
    ends = {
        cell_width(line[: line.index(cell) + len(cell)])
        for cell, line in zip(cells, placed, strict=True)
    }
    assert len(ends) == 1
