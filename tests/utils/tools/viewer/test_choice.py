"""What filters and names mean, and what they do not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.tools.viewer.choice import choose_rows, parse_condition, parse_quantity

KEYS = (
    "epoch",
    "current_loss",
    "validation_loss",
    "tokens_seen",
    "size_bytes",
    "age_seconds",
    "timestamp",
)


def row(step: int, **values: Any) -> dict[str, Any]:
    texts = {"state": "not queued", "kept": "", "run_id": None}
    return {"step": step, **dict.fromkeys(KEYS), **texts, **values}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100", 100.0),
        ("-1.5e3", -1500.0),
        ("2k", 2000.0),
        ("2GiB", 2 * 2**30),
        ("2 TB", 2e12),
        ("7B", 7.0),
        ("1iB", None),
        ("", None),
        ("1..2", None),
        ("nan", None),
        ("1e999", None),
        ("\u0661", None),
    ],
)
def test_quantities(text: str, value: float | None) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("operator", ["<=", "!=", ">"])
@pytest.mark.parametrize("condition", ["loss{}1", "size{}1", "time{}2026-01-01"])
def test_what_is_not_known_fulfils_no_condition(condition: str, operator: str) -> None:
    assert choose_rows([row(1)], [parse_condition(condition.format(operator))]) == []
    assert choose_rows([row(1)], [parse_condition("run!=a")]) == []


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=False)), max_size=9), st.booleans())
def test_sorting_loses_no_row_and_puts_the_unknown_last(
    losses: list[float | None], is_reversed: bool
) -> None:
    rows = [row(step, current_loss=loss) for step, loss in enumerate(losses)]
    found = choose_rows(rows, sort_key="loss", is_reversed=is_reversed)
    assert sorted(one["step"] for one in found) == list(range(len(losses)))
    values = [one["current_loss"] for one in found]
    finite = [value for value in values if value is not None and abs(value) != float("inf")]
    assert values[: len(finite)] == sorted(finite, reverse=is_reversed)


@pytest.mark.parametrize(
    ("condition", "steps"),
    [
        ("val<1", [1]),  # as the table says
        ("validation_loss<1", [1]),  # as --json says
        ("validation-loss<1", [1]),
        ("time (UTC)<2026-01-02", [1]),
        ("timestamp<2026-01-02", [1]),
        ("age>1.5d", [2]),
        ("age<=60", [1]),
        ("age<2m", [1]),
        ("checkpoint=b", [2]),
    ],
)
def test_a_filter_takes_the_headings_of_the_table_and_the_keys_of_json(
    condition: str, steps: list[int]
) -> None:
    rows = [
        row(1, name="a", validation_loss=0.5, age_seconds=60.0, timestamp="2026-01-01"),
        row(2, name="b", validation_loss=1.5, age_seconds=172_800.0, timestamp="2026-01-03"),
    ]
    assert [one["step"] for one in choose_rows(rows, [parse_condition(condition)])] == steps
