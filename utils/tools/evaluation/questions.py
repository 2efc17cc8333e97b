"""The questions of `--hellaswag FILE` and `--lambada FILE`, as lm-evaluation-harness takes them.

    JSONL, lines of text -> questions, each checked -> a task of the harness (harness.py)

A line that is no question is named before a model is loaded. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.errors import UsageError
from utils.base.text import parse_json, printable
from utils.tools.generation.prompts import read_lines

HELLASWAG, LAMBADA = "hellaswag", "lambada"
TEXTS = ("activity_label", "ctx_a", "ctx_b")


@dataclass(frozen=True)
class Questions:
    """The questions of a file, in its order: the fields that the harness reads."""

    source: str
    records: Sequence[Mapping[str, Any]]

    @property
    def fingerprint(self) -> str:
        """What tells these questions from others, whatever bytes they were written with."""
        return hashlib.sha256(json.dumps(list(self.records)).encode()).hexdigest()[:16]


def read_questions(task: str, source: str) -> Questions:
    """Return the questions of a file.

    Args:
        task: `HELLASWAG` (its own JSONL) or `LAMBADA` (JSONL with `text`, or a text a line).
        source: The file.

    Raises:
        UsageError: It cannot be read, or a line is no question; it is named.
    """
    if not Path(source).expanduser().exists():
        raise UsageError(
            f"--{task} {printable(source)}: there is no such file. Without a file, for the data "
            f"set on the Hub, --{task} stands after the models."
        )
    lines, records = read_lines(source), []
    is_plain = task == LAMBADA and not (lines and lines[0][1].lstrip().startswith("{"))
    for number, line in lines:
        where = f"{printable(source)}, line {number}"
        try:
            record = {"text": line.strip()} if is_plain else parse_json(line)
        except ValueError as exc:
            raise UsageError(f"{where} is no JSON: {printable(exc)}.") from exc
        try:
            records.append(_hellaswag(record) if task == HELLASWAG else _lambada(record))
        except (KeyError, TypeError, ValueError) as exc:
            reason = f"no {exc.args[0]}" if isinstance(exc, KeyError) else printable(exc)
            raise UsageError(f"{where} is no question of {task}: {reason}.") from exc
    if not records:
        raise UsageError(f"{printable(source)} holds no questions.")
    return Questions(source, records)


def _hellaswag(record: Mapping[str, Any]) -> dict[str, Any]:
    endings, label = list(record["endings"]), int(record["label"])
    if len(endings) < 2 or not all(isinstance(one, str) and one.strip() for one in endings):
        raise ValueError("two endings at least are needed, none of them empty")
    if not 0 <= label < len(endings):
        raise ValueError(f"label {label} of {len(endings)} endings")
    texts = {key: record[key] for key in TEXTS}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"{', '.join(TEXTS)} must be texts")
    return {**texts, "endings": endings, "label": label}


def _lambada(record: Mapping[str, Any]) -> dict[str, Any]:
    text = record["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its text is empty or no text")
    return {"text": text}
