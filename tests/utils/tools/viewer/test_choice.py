"""What filters and names mean, and what they do not."""

from __future__ import annotations

import time
from datetime import UTC, datetime
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
    parse_time,
)

NAMES = [
    CheckpointName(step, epoch, files)
    for step, epoch, files in ((5, 0, 0), (50, 0, 1), (100, 1, 0), (100, 1, 3))
]


def row(step: int, **values: Any) -> dict[str, Any]:
    known = {
        "epoch": 0,
        "current_loss": None,
        "validation_loss": None,
        "tokens_seen": None,
        "size_bytes": None,
        "timestamp": None,
        "state": "not queued",
        "kept": "",
        "run_id": None,
    }
    return {"step": step, **known, **values}


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


def test_times_are_compared_across_zones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    monkeypatch.undo()
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    for text in ("2026-01-01T12:00:00Z", "2026-01-01T14:00:00+02:00", "2026-01-01T12:00:00"):
        assert parse_time(text) == noon
    time.tzset()
    for value in ("yesterday", None, 7, "9999-12-31T23:59:59-23:59"):
        assert parse_time(value) is None


@pytest.mark.parametrize("operator", ["<", "<=", "=", "==", "!=", ">=", ">"])
@pytest.mark.parametrize("key", ["loss", "validation-loss", "tokens", "size", "time", "run"])
def test_what_is_not_known_fulfils_no_condition(key: str, operator: str) -> None:
    value = {"time": "2026-01-01", "run": "a"}.get(key, "1")
    if key != "run" or operator in ("=", "==", "!="):
        assert choose_rows([row(1)], [parse_condition(f"{key}{operator}{value}")]) == []


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
        ("50", 1),
        ("checkpoint-epoch0-step5-files0", 0),
        ("epoch0-step50", 1),
        ("files3", 3),
        ("checkpoint-epoch1-step100-files0", 2),
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
        ("step50", "There is no checkpoint"),
    ],
)
def test_what_fits_none_or_several_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_name(text, NAMES)
