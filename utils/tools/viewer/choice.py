"""Which checkpoints the user means, and in which order: names, filters, keys to sort by.

    words of the command line, rows of report.py -> names, rows

A filter is KEY OPERATOR VALUE, such as `step>=100`, `size<2GiB`, `time>=2026-01-31`,
`state=verified`. A value that is not known fulfils no condition and is sorted last. No torch here.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from utils.base.errors import UsageError
from utils.base.text import number, parse_time, printable
from utils.checkpoints.layout import CheckpointName
from utils.checkpoints.views import no_such_checkpoint

_NUM_SHOWN = 5
NUMBER_KEYS = {
    "step": "step",
    "epoch": "epoch",
    "loss": "current_loss",
    "validation-loss": "validation_loss",
    "tokens": "tokens_seen",
    "size": "size_bytes",
}
TEXT_KEYS = {"state": "state", "kept": "kept", "run": "run_id"}
TIME_KEY = "time"
FILTER_KEYS = (*NUMBER_KEYS, TIME_KEY, *TEXT_KEYS)
SORT_KEYS = ("step", "loss", "validation-loss", TIME_KEY, "size")

_CONDITION = re.compile(r"\s*([a-z-]+)\s*(>=|<=|!=|==|=|<|>)\s*(.*\S)\s*")
_NUMBER = re.compile(r"([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
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
    if match is None or match[1] not in FILTER_KEYS:
        raise UsageError(
            f"--filter {printable(text)!r} must be KEY OPERATOR VALUE, such as 'step>=100'; "
            f"the keys are {', '.join(FILTER_KEYS)}."
        )
    key, sign, word = match.groups()
    wanted: float | datetime | str | None = word
    if key in TEXT_KEYS:
        if sign not in ("=", "==", "!="):
            raise UsageError(
                f"--filter {printable(text)!r}: {key} is a text and takes only = and !=."
            )
    else:
        wanted = parse_time(word) if key == TIME_KEY else parse_quantity(word)
    if wanted is None:
        kind = "time (ISO 8601, UTC)" if key == TIME_KEY else "number (such as 100, 1.5e9, 2GiB)"
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
    keyed = [(value_of(row, sort_key), row) for row in chosen]
    known = [pair for pair in keyed if pair[0] is not None]
    known.sort(key=lambda pair: pair[0], reverse=is_reversed)
    return [row for _, row in known] + [row for value, row in keyed if value is None]


def choose_name(text: str, names: Sequence[CheckpointName]) -> CheckpointName:
    """Return the checkpoint with this name, this step, or this beginning or end of its name.

    A beginning may leave out `checkpoint-`. Digits are a step, with or without `step` before them.

    Raises:
        UsageError: No checkpoint fits, or more than one.
    """
    exact = [name for name in names if str(name) == text]
    if text.removeprefix("step").isdecimal():
        found = [name for name in names if name.is_of_step(text)]
    else:
        found = exact or [name for name in names if text and _is_part(text, str(name))]
    if len(found) == 1:
        return found[0]
    shown = printable(text)
    if found:
        fitting = ", ".join(map(str, found[-_NUM_SHOWN:]))
        count = "" if len(found) <= _NUM_SHOWN else f"{len(found)} checkpoints, the newest "
        raise UsageError(f"{shown!r} fits {count}{fitting}. Write more of the name.")
    raise no_such_checkpoint(text, names)


def _is_part(text: str, name: str) -> bool:
    return name.startswith((text, f"checkpoint-{text}")) or name.endswith(text)
