"""The questions of HellaSwag and of last-word tasks, from local files or from the Hub.

    JSONL, lines of text, `datasets` -> questions -> task_scores.py

Texts are prepared as EleutherAI's lm-evaluation-harness does it (tasks `hellaswag` and
`lambada_openai`, version 1.0 of both), so that scores are comparable. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.errors import UsageError
from utils.base.files import read_regular_file
from utils.base.text import parse_json, printable, reason_of

HELLASWAG, LAMBADA = "hellaswag", "lambada"
# Task -> (data set, configuration, split) on the Hub.
HUB_SOURCES = {
    HELLASWAG: ("Rowan/hellaswag", None, "validation"),
    LAMBADA: ("EleutherAI/lambada_openai", "default", "test"),
}
DELIMITER = " "
_BRACKETS = re.compile(r"\[.*?\]")


@dataclass(frozen=True)
class Choice:
    """A question with several answers, of which one is right.

    Attributes:
        context: What the answers follow, without the space between.
        answers: Two or more texts.
        right: Number of the right one.
    """

    context: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class LastWord:
    """A text whose last word is to be found; `word` begins with the space before it."""

    context: str
    word: str


@dataclass(frozen=True)
class Questions:
    """The questions of a task.

    Attributes:
        source: Where they come from, for people.
        fingerprint: SHA-256 of what was read, which tells one set from another.
        items: In the order of the source.
    """

    source: str
    fingerprint: str
    items: Sequence[Choice | LastWord]


def read_questions(task: str, source: str, limit: int | None = None) -> Questions:
    """Return the questions of a task.

    Args:
        task: `HELLASWAG` or `LAMBADA`.
        source: A file of JSON objects, one a line (for last words plain lines of text, too); empty
            for the data set on the Hub.
        limit: Only so many, the first; None for all.

    Raises:
        UsageError: There are none, or a line is no question; it is named.
    """
    records = list(_read_file(task, Path(source)) if source else _load_from_hub(task))[:limit]
    items = [_parse(task, where, record) for where, record in records]
    if not items:
        raise UsageError(f"{printable(source or HUB_SOURCES[task][0])} holds no questions.")
    # The questions and not the file: other bytes may hold the same, and a limit takes fewer.
    plain = json.dumps([vars(item) for item in items]).encode()
    return Questions(source or HUB_SOURCES[task][0], hashlib.sha256(plain).hexdigest(), items)


def _read_file(task: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of the lines of a file."""
    try:
        text = read_regular_file(path.expanduser()).decode("utf-8")
    except FileNotFoundError as exc:
        raise UsageError(
            f"--{task} {printable(str(path))}: there is no such file. Without a file, for the "
            f"data set on the Hub, --{task} stands after the models."
        ) from exc
    except (OSError, ValueError) as exc:
        raise UsageError(f"--{task} {printable(str(path))} cannot be read: {exc}.") from exc
    is_plain = task == LAMBADA and not text.lstrip().startswith("{")
    for number, line in enumerate(text.splitlines() if is_plain else text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{printable(path.name)}, line {number}"
        if is_plain:
            yield where, {"text": line.strip()}
            continue
        try:
            yield where, parse_json(line)
        except ValueError as exc:
            raise UsageError(f"{where} is no JSON: {printable(exc)}.") from exc


def _load_from_hub(task: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, configuration, split = HUB_SOURCES[task]
    try:
        found = datasets.load_dataset(name, configuration, split=split)
    except Exception as exc:  # many families, most of them of a network that is not there
        raise UsageError(
            f"--{task}: {name} cannot be loaded ({reason_of(exc).rstrip('.')}). Name a file of it: "
            f"--{task} FILE.jsonl."
        ) from exc
    for number, record in enumerate(found):
        yield f"{name}, row {number}", record


def _parse(task: str, where: str, record: Any) -> Choice | LastWord:
    try:
        return parse_choice(record) if task == HELLASWAG else parse_last_word(record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
        reason = f"no {exc.args[0]}" if isinstance(exc, KeyError) else printable(exc)
        raise UsageError(f"{where} is no question of {task}: {reason}.") from exc


def parse_choice(record: Mapping[str, Any]) -> Choice:
    """Return a question of HellaSwag's own format.

    Args:
        record: `activity_label`, `endings`, `label`, and the context: `ctx_a` and `ctx_b`, or
            `ctx`, which is both.

    Raises:
        KeyError, TypeError, ValueError: It is none.
    """
    if "ctx_a" in record:
        context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    else:
        context = str(record["ctx"])
    answers = tuple(clean_text(str(ending)) for ending in list(record["endings"]))
    right = int(record["label"])
    if len(answers) < 2 or not all(answers):
        raise ValueError("two endings at least are needed, none of them empty")
    if not 0 <= right < len(answers):
        raise ValueError(f"label {right} of {len(answers)} endings")
    return Choice(clean_text(f"{record['activity_label']}: {context}"), answers, right)


def clean_text(text: str) -> str:
    """Return a text of HellaSwag without the marks of WikiHow, as the harness does it."""
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETS.sub("", text).replace("  ", " ")


def parse_last_word(record: Mapping[str, Any]) -> LastWord:
    """Return the question in a text: everything up to the last space, and what follows.

    Raises:
        KeyError, TypeError, ValueError: `record` has no `text`, or an empty one.
    """
    text = record["text"]
    if not isinstance(text, str) or not text:
        raise ValueError("its text is empty or no text")
    context, _, word = text.rpartition(" ")
    return LastWord(context, f" {word}")
