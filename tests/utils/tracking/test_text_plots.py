"""Curves as text: every level, every gap, every encoding; nothing overflows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.tracking.text_plots import draw_chart, format_figure, means_of_pieces, sparkline

numbers = st.floats(allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize(
    ("values", "encoding", "line"),
    [
        ([], "utf-8", ""),
        ([math.nan, math.inf], "utf-8", ""),
        ([1.0], "utf-8", "\u2581"),
        ([2.0, 2.0], "utf-8", "\u2581\u2581"),
        ([0.0, math.nan, 7.0], "utf-8", "\u2581\u2588"),
        (list(range(8)), "utf-8", "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"),
        (list(range(8)), "ascii", "_.-=+*%#"),
        (list(range(8)), "no such encoding", "_.-=+*%#"),
        ([0.0] * 40 + [1.0] * 40, "ascii", "_" * 20 + "#" * 20),
    ],
)
def test_sparkline(values: list[float], encoding: str | None, line: str) -> None:
    assert sparkline(values, encoding) == line


def test_a_chart_names_its_ends_and_draws_between_them() -> None:
    lines = draw_chart([([10, 20, 30], [1.0, 2.0, 3.0])], "ascii", width=21, height=3)
    assert lines == [
        "          3 |      **",
        "            |   ***",
        "          1 |***",
        "             10    30",
    ]


def test_a_gap_is_not_drawn_over() -> None:
    steps = list(range(8))
    values = [0.0, 0.0, math.nan, math.nan, math.nan, math.nan, 0.0, 0.0]
    lines = draw_chart([(steps, values)], "ascii", width=21, height=3)
    assert lines[1] == "          0 |**    **"


def test_several_curves_have_marks_of_their_own() -> None:
    curves = [([0, 7], [0.0, 0.0]), ([0, 7], [1.0, 1.0]), ((), ())]
    lines = draw_chart(curves, "utf-8", width=21, height=2)
    assert lines[0].endswith("|oooooooo")
    assert lines[1].endswith("|********")


def test_a_single_curve_has_eight_points_a_cell() -> None:
    lines = draw_chart([([0, 1], [0.0, 7.0])], "utf-8", width=21, height=2)
    assert lines[0] == "          7 |    \u28c0\u2824\u2812\u2809"
    assert lines[1] == "          0 |\u28c0\u2824\u2812\u2809"


@pytest.mark.parametrize("values", [[-1.7e308, 1.7e308], [0.0, 1e-300]])
def test_the_whole_range_of_numbers_is_drawn(values: list[float]) -> None:
    lines = draw_chart([(values, values)], "ascii", width=21, height=2)
    assert [line[12:] for line in lines[:2]] == ["|    ****", "|****"]
    assert sparkline(values, "ascii") == "_#"


def test_a_range_too_small_to_divide_by_is_flat() -> None:
    assert draw_chart([([0.0, 1e-310], [0.0, 1e-310])], "ascii", width=21, height=2)
    assert sparkline([0.0, 1e-310], "ascii") == "__"
    assert draw_chart([([1], [math.nan]), ((), ())], "utf-8") == []


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (12345.678, "12,345.7"), (-1e300, "-1.000e+300")]
)
def test_figures_stay_short(value: float | None, text: str) -> None:
    assert format_figure(value, ",.1f") == text


@pytest.mark.parametrize(
    ("values", "count", "means"),
    [
        ([], 4, []),
        ([1.0, 2.0], 4, [1.0, 2.0]),
        ([1.0, 2.0, 3.0], 2, [1.0, 2.5]),
        ([1e308] * 4, 2, [1e308, 1e308]),
    ],
)
def test_long_curves_become_means(values: list[float], count: int, means: list[float]) -> None:
    assert means_of_pieces(values, count) == means


@given(
    st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False), numbers), max_size=20),
    st.integers(-5, 90),
    st.sampled_from(["utf-8", "ascii"]),
)
def test_any_values_fit_the_chart(
    points: list[tuple[float, float]], width: int, encoding: str
) -> None:
    curve = ([x for x, _ in points], [y for _, y in points])
    for curves in ([curve], [curve, curve]):
        lines = draw_chart(curves, encoding, width, 4)
        assert len(lines) in (0, 5)
        assert all(len(line) <= max(width, 21) for line in lines[:-1])
    assert len(sparkline(curve[1], encoding, 10)) <= 10
