"""The prompts that a user gives in a file: a line each, or JSON lines.

    file, pipe or standard input -> prompts; every bad line in one error

No torch here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.base.errors import UsageError
from utils.base.text import parse_json, printable

STDIN = "-"
MAX_BYTES = 256 * 2**20
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_SHOWN_PROBLEMS = 3


def read_prompts(name: str) -> list[str]:
    """Return the prompts of a file.

    JSON lines are objects with a text `prompt`; they are recognized by the file's name or by their
    first line. In any other file each line is a prompt as it is. Empty lines do not count.

    Args:
        name: A path, of a pipe too, or `-` for standard input.

    Raises:
        UsageError: It cannot be read, holds no prompt, or has lines that are none; the message
            names them.
    """
    lines = [(n, line) for n, line in _numbered_lines(name, _read(name)) if line.strip()]
    if not lines:
        raise UsageError(f"{_shown(name)} holds no prompt.")
    if not (name.endswith(_JSON_SUFFIXES) or _is_prompt_object(lines[0][1])):
        return [line for _, line in lines]
    prompts, problems = [], []
    for number, line in lines:
        try:
            prompts.append(_prompt_of(line))
        except ValueError as exc:
            problems.append((number, str(exc)))
    if problems:
        raise UsageError(_describe(name, problems))
    return prompts


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


def _numbered_lines(name: str, data: bytes) -> Iterator[tuple[int, str]]:
    problems = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as exc:
            problems.append((number, f"byte {exc.start + 1} is no UTF-8"))
            continue
        yield number, text
    if problems:
        raise UsageError(_describe(name, problems))


def _is_prompt_object(line: str) -> bool:
    try:
        _prompt_of(line)
    except ValueError:
        return False
    return True


def _prompt_of(line: str) -> str:
    """Return the prompt of a JSON line.

    Raises:
        ValueError: It has none.
    """
    try:
        value = parse_json(line)
    except ValueError as exc:
        raise ValueError("it is no JSON") from exc
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    prompt = value.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError('it has no text "prompt"')
    return prompt


def _describe(name: str, problems: list[tuple[int, str]]) -> str:
    shown = "; ".join(f"line {number}: {reason}" for number, reason in problems[:_SHOWN_PROBLEMS])
    more = len(problems) - _SHOWN_PROBLEMS
    rest = f"; and {more} more" if more > 0 else ""
    return f"{_shown(name)}: {shown}{rest}. Nothing was generated."


def _shown(name: str) -> str:
    return "Standard input" if name == STDIN else printable(name)
