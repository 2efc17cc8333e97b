"""Which checkpoints the user means, and in which order: filters, keys to sort by.

    words of the command line, rows of report.py -> rows

A filter is KEY OPERATOR VALUE, such as `step>=100`, `size<2GiB`, `age<2d`, `time>=2026-01-31`,
`state=verified`; a key is the heading of a column, or that of `--json`. A value that is not known
fulfils no condition and is sorted last. No torch here.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from utils.base.errors import UsageError
from utils.base.text import number, parse_time, printable

# Key of a filter -> key of a row.
NUMBER_KEYS = {
    "step": "step",
    "epoch": "epoch",
    "loss": "current_loss",
    "val": "validation_loss",
    "tokens": "tokens_seen",
    "size": "size_bytes",
    "age": "age_seconds",
}
TEXT_KEYS = {"checkpoint": "name", "state": "state", "kept": "kept", "run": "run_id"}
TIME_KEY = "time"
FILTER_KEYS = (*NUMBER_KEYS, TIME_KEY, *TEXT_KEYS)
SORT_KEYS = (*NUMBER_KEYS, TIME_KEY, "validation-loss")
_KEYS = {
    **{key: key for key in FILTER_KEYS},
    **{name: key for key, name in {**NUMBER_KEYS, **TEXT_KEYS, TIME_KEY: "timestamp"}.items()},
    "validation-loss": "val",
    "time (UTC)": TIME_KEY,
}

_CONDITION = re.compile(r"\s*(.*?)\s*(>=|<=|!=|==|=|<|>)\s*(.*\S)\s*")
_NUMBER = re.compile(r"([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_EXPONENTS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


Condition = Callable[[Mapping[str, Any]], bool]
"""Tells whether a row fulfils a `--filter`."""


def parse_condition(text: str) -> Condition:
    """Return the condition that a `--filter` states.

    Raises:
        UsageError: It is not a condition.
    """
    match = _CONDITION.fullmatch(text)
    if match is None or match[1] not in _KEYS:
        raise UsageError(
            f"--filter {printable(text)!r} must be KEY OPERATOR VALUE, such as 'step>=100'; "
            f"the keys are {', '.join(FILTER_KEYS)}."
        )
    key, sign, word = _KEYS[match[1]], match[2], match[3]
    wanted: float | datetime | str | None = word
    if key in TEXT_KEYS:
        if sign not in ("=", "==", "!="):
            raise UsageError(
                f"--filter {printable(text)!r}: {key} is a text and takes only = and !=."
            )
    else:
        parsers = {TIME_KEY: parse_time, "age": _parse_age}
        wanted = parsers.get(key, parse_quantity)(word)
    if wanted is None:
        kind = "number (such as 100, 1.5e9, 2GiB; of an age, 3h)"
        kind = "time (ISO 8601, UTC)" if key == TIME_KEY else kind
        raise UsageError(f"--filter {printable(text)!r}: {printable(word)!r} is not a {kind}.")

    def holds(row: Mapping[str, Any]) -> bool:
        value = value_of(row, key)
        return value is not None and _OPERATORS[sign](value, wanted)

    return holds


def parse_quantity(text: str) -> float | None:
    """Return a number that k, M, G, T (powers of 1000) or Ki, Mi, Gi, Ti (of 1024) may follow."""
    match = _NUMBER.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        return None
    try:
        base = 1024 if match[3] else 1000
        return number(float(match[1]) * base ** _EXPONENTS[match[2].lower()])
    except ValueError:
        return None


def _parse_age(text: str) -> float | None:
    unit = _SECONDS.get(text[-1:])
    count = parse_quantity(text[:-1] if unit else text)
    return None if count is None else count * (unit or 1)


def value_of(row: Mapping[str, Any], key: str) -> Any:
    """Return the value of a row that filters and sorting use, None where it is not known."""
    if key in NUMBER_KEYS:
        return number(row[NUMBER_KEYS[key]])
    if key == TIME_KEY:
        return parse_time(row["timestamp"])
    value = row[TEXT_KEYS[key]]
    return value if isinstance(value, str) else None


def choose_rows(
    rows: Sequence[dict[str, Any]],
    conditions: Sequence[Condition] = (),
    *,
    last: int | None = None,
    sort_key: str = "step",
    is_reversed: bool = False,
) -> list[dict[str, Any]]:
    """Return the `last` newest of the rows, which are by step, that fulfil all conditions.

    They are sorted by one of `SORT_KEYS`, the greatest first where `is_reversed`.
    """
    chosen = [row for row in rows if all(holds(row) for holds in conditions)]
    if last is not None:
        chosen = chosen[-last:] if last > 0 else []
    keyed = [(value_of(row, _KEYS[sort_key]), row) for row in chosen]
    known = [pair for pair in keyed if pair[0] is not None]
    known.sort(key=lambda pair: pair[0], reverse=is_reversed)
    return [row for _, row in known] + [row for value, row in keyed if value is None]
