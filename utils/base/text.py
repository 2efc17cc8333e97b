"""Values and texts that may come from anywhere, made safe: to show, to compute with, to write.

Numbers pass `number` before arithmetic, texts `printable` before a terminal, values `to_json_text`
before `--json`. JSON is read by `parse_json`: torn, foreign or nested without end, it is a value or
one kind of error.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

from utils.base.errors import first_line

MAX_SHOWN_CHARACTERS = 300
MAX_DEPTH = 32
ABSENT = "-"  # shown where a value is not known
GREATEST_EXPONENT = 700.0  # exp() of 710 is no float any more
TOO_DEEP = "(too deep)"
# What can be raised while JSON that somebody else wrote becomes a value of ours: other types,
# missing keys, infinite numbers, or nesting too deep for str().
FOREIGN_ERRORS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def number(value: object) -> float | None:
    """Return a finite number as float, None for anything else (booleans too)."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def perplexity_of(loss: float) -> float:
    """Return exp(loss), a finite number for any loss but NaN."""
    return math.exp(min(loss, GREATEST_EXPONENT))


def parse_time(value: object) -> datetime | None:
    """Return an ISO 8601 time, in UTC where it names no zone; None for anything else."""
    try:
        moment = datetime.fromisoformat(str(value))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def epoch_seconds(value: object) -> float | None:
    """Return an ISO 8601 time in seconds since 1970, None where it is none."""
    moment = parse_time(value) if isinstance(value, str) else None
    return None if moment is None else moment.timestamp()


def printable(value: object, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    """Return a value as one line of text that cannot steer a terminal."""
    try:
        begin = str(value)[: limit + 1]
    except RecursionError:
        begin = TOO_DEEP
    text = begin
    if not begin.isprintable():
        text = "".join(character if character.isprintable() else "?" for character in begin)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def reason_of(exc: BaseException) -> str:
    """Return what an error of a library says, in one line that no terminal obeys."""
    return printable(first_line(exc))


def to_json_text(value: object, *, indent: int | None = 2) -> str:
    """Return a value as strict JSON.

    NaN and infinities, which JSON lacks, become null; what is nested deeper than anything of ours
    is cut.
    """
    return json.dumps(_plain(value, 0), indent=indent, allow_nan=False, default=str)


def _plain(value: object, depth: int) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth > MAX_DEPTH:
        return TOO_DEEP if isinstance(value, (dict, list, tuple)) else value
    if isinstance(value, dict):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    return value


def format_bytes(count: float | None) -> str:
    """Return a size in binary units, `-` for None."""
    if count is None:
        return ABSENT
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_duration(seconds: float | None) -> str:
    """Return a duration as `1h02m`, `3m20s` or `4.2s`, `-` for None."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def parse_json(text: bytes | str, **options: Any) -> Any:
    """Return the value of JSON text, UTF-8 where it is bytes; `options` are those of `json.loads`.

    Raises:
        ValueError: It is no JSON, no UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose keys are all there once; `object_pairs_hook` of `parse_json`.

    Raises:
        ValueError: One is there twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {printable(key)!r} is there twice: remove one")
        found[key] = value
    return found


def parse_json_object(text: bytes | str, **options: Any) -> dict[str, Any]:
    """Return the JSON object that text holds.

    Raises:
        ValueError: Of `parse_json`, or it is another value.
    """
    value = parse_json(text, **options)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value
