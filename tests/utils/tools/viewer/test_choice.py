"""What filters and names mean, and what they do not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.base.errors import UsageError
from utils.checkpoints.layout import CheckpointName
from utils.tools.viewer.choice import (
    choose_name,
    choose_rows,
    parse_condition,
    parse_quantity,
)

NAMES = [
    CheckpointName(step, epoch, files)
    for step, epoch, files in ((5, 0, 0), (50, 0, 1), (100, 1, 0), (100, 1, 3))
]


KEYS = ("epoch", "current_loss", "validation_loss", "tokens_seen", "size_bytes", "timestamp")


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
    ("text", "index"),
    [
        ("5", 0),
        ("checkpoint-epoch0-step5-files0", 0),
        ("epoch0-step50", 1),
        ("files3", 3),
    ],
)
def test_a_name_is_found(text: str, index: int) -> None:
    assert choose_name(text, NAMES) == NAMES[index]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("100", "fits checkpoint-epoch1-step100-files0, checkpoint-epoch1-step100-files3"),
        ("epoch0", "Write more of the name"),
        ("3", "There is no checkpoint '3'"),  # digits alone are a step, not the end of files3
        ("", "There is no checkpoint ''"),
    ],
)
def test_what_fits_none_or_several_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_name(text, NAMES)
