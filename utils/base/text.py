"""Values and texts that may come from anywhere, made safe: to show, to compute with, to write.

Numbers pass `number` before arithmetic, texts `printable` before a terminal, values `to_json_text`
before `--json`. JSON is read by `parse_json`: torn, foreign or nested without end, it is a value or
one kind of error. Lines fit a width: `wrap_words`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from utils.base.errors import first_line

MAX_SHOWN_CHARACTERS = 300
MAX_DEPTH = 32
ABSENT = "-"  # shown where a value is not known
GREATEST_FLOAT = sys.float_info.max
GREATEST_EXPONENT = 700.0  # exp() of 710 is no float any more
TOO_DEEP = "(too deep)"
_HARD_BLANK = "\0"
_SECOND_CELL = "\1"
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


def number(value: object, greatest: float = GREATEST_FLOAT) -> float | None:
    """Return a finite number, at most `greatest`, as float; None for anything else and booleans."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -greatest <= value <= greatest else None


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


def did_you_mean(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """Return ` Did you mean X?` where a word is nearly a known one, else nothing."""
    near = difflib.get_close_matches(word, list(known), 1, likeness)
    return f" Did you mean {near[0]}?" if near else ""


def count_of(number: int, thing: str) -> str:
    """Return `1 token` or `2,000 tokens`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


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


def two_digits(value: float) -> str:
    """Return two digits of a number: 0.0021, 1.6, 2,700."""
    return f"{float(f'{value:.2g}'):,g}"


def format_bytes(count: object) -> str:
    """Return a size in binary units, `-` for what is no number."""
    size = number(count)
    if size is None:
        return ABSENT
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_duration(seconds: float | None) -> str:
    """Return a duration as `5d02h`, `1h02m`, `3m20s` or `4.2s`, `-` for None."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours = minutes // 60
    return f"{hours // 24}d{hours % 24:02d}h" if hours > 99 else f"{hours}h{minutes % 60:02d}m"


def cell_width(text: str) -> int:
    """Return how many columns of a terminal a text takes: letters of Asia and emoji take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # not for commands that show no such letter

    return cell_len(text)


def _spread(text: str) -> str:
    """Return text with a mark after each character of two columns: its length is its width."""
    if text.isascii():
        return text
    return "".join(char + _SECOND_CELL * (cell_width(char) - 1) for char in text)


def shorten_middle(text: str, width: int) -> str:
    """Return text whose middle gives way to `...` where it is wider than `width`."""
    if cell_width(text) <= width:
        return text
    # At the cut, half of a letter of two columns would be a whole one.
    text, kept = _spread(text), max(2, width - 3 - (not text.isascii()))
    shown = f"{text[: kept - kept // 2]}...{text[-(kept // 2) :]}"
    return shown.replace(_SECOND_CELL, "")


def wrap_words(text: str, width: int, hanging: int = 0) -> list[str]:
    """Return text in lines that fit, broken between words; all but the first begin with blanks.

    A word that fits no line, such as a URI, loses its middle. Figures that two blanks divide, three
    or more in a line, stay whole.
    """
    room = max(8, width - hanging)
    lines = []
    for line in text.split("\n"):
        words = " ".join(shorten_middle(word, room) for word in line.split(" "))
        figures = words.strip().split("  ")
        if len(figures) > 2 and max(map(cell_width, figures)) <= room:
            words = re.sub(r"(?<=\S) (?=\S)", _HARD_BLANK, words)
        lines += _fill_lines(words, max(8, width), hanging) or [""]
    return lines


def wrap_command(command: str, width: int) -> list[str]:
    """Return a command in lines that fit and that a shell takes as one, when they are copied."""
    quoted = re.sub(r"'[^']*'|\"[^\"]*\"", lambda part: part[0].replace(" ", _HARD_BLANK), command)
    lines = _fill_lines(quoted, max(8, width - 2), 2)
    return [*(f"{line} \\" for line in lines[:-1]), *lines[-1:]]


def _fill_lines(text: str, width: int, hanging: int) -> list[str]:
    lines = textwrap.wrap(
        _spread(text),
        width,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_SECOND_CELL, "").replace(_HARD_BLANK, " ") for line in lines]


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
