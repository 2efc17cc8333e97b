"""The prompts that a user gives in a file: a line each, or JSON lines.

    file, pipe or standard input -> lines -> prompts

No torch here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

from utils.base.errors import UsageError
from utils.base.text import parse_json, printable

STDIN = "-"
MAX_BYTES = 256 * 2**20
_JSON_SUFFIXES = (".jsonl", ".ndjson")


def read_prompts(name: str) -> list[str]:
    """Return the prompts of a file.

    JSON lines are objects with a text `prompt`; they are recognized by the file's name or by their
    first line. In any other file each line is a prompt as it is. Empty lines do not count.

    Raises:
        UsageError: It cannot be read, holds no prompt, or has a line that is none; it is named.
    """
    lines = read_lines(name)
    if not lines:
        raise UsageError(f"{_shown(name)} holds no prompt.")
    is_json = name.endswith(_JSON_SUFFIXES) or _problem_of(lines[0][1]) is None
    if not is_json:
        return [line for _, line in lines]
    for number, line in lines:
        problem = _problem_of(line)
        if problem is not None:
            raise UsageError(f"{_shown(name)}, line {number}: {problem}. Nothing was generated.")
    return [parse_json(line)["prompt"] for _, line in lines]


def read_lines(name: str) -> list[tuple[int, str]]:
    """Return (number, text) of each line, if not empty, of a file, a pipe or `-`: standard input.

    Raises:
        UsageError: It cannot be read, or a line is no UTF-8; it is named.
    """
    lines = []
    for number, line in enumerate(_read(name).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as exc:
            place = f"{_shown(name)}, line {number}"
            raise UsageError(f"{place}: byte {exc.start + 1} is no UTF-8.") from exc
        if text.strip():
            lines.append((number, text))
    return lines


def _read(name: str) -> bytes:
    try:
        if name == STDIN:
            return _read_within_limit(name, sys.stdin.buffer)
        with Path(name).expanduser().open("rb") as file:
            return _read_within_limit(name, file)
    except OSError as exc:
        raise UsageError(f"{_shown(name)} cannot be read: {exc.strerror or exc}.") from exc


def _read_within_limit(name: str, file: BinaryIO) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UsageError(f"{_shown(name)} has more than {MAX_BYTES // 2**20} MiB. Cut it in parts.")
    return data


def _problem_of(line: str) -> str | None:
    """Return why a line is no JSON object with a prompt; None where it is one."""
    try:
        value = parse_json(line)
    except ValueError:
        return "it is no JSON"
    if not isinstance(value, dict):
        return "it is no JSON object"
    return None if isinstance(value.get("prompt"), str) else 'it has no text "prompt"'


def _shown(name: str) -> str:
    return "Standard input" if name == STDIN else printable(name)
