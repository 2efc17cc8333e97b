"""Questions of HellaSwag and last words, as their files have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.small_models import TASK_FILES
from utils.base.errors import UsageError
from utils.tools.evaluation.questions import HELLASWAG, LAMBADA, read_questions

GOOD: dict[str, Any] = {
    "activity_label": "Roof repair",
    "ctx_a": "[header] On a roof. [title] Climb.  He",
    "ctx_b": "tAKES a hammer",
    "endings": ["and nails [step] it.", " to bed "],
    "label": "1",
}


def write(path: Path, *records: Any) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), "utf-8")
    return str(path)


def test_the_files_are_read() -> None:
    hellaswag = read_questions(HELLASWAG, str(TASK_FILES / "hellaswag.jsonl"))
    lambada = read_questions(LAMBADA, str(TASK_FILES / "lambada.jsonl"))
    assert (len(hellaswag.records), len(lambada.records)) == (20, 20)
    assert set(hellaswag.records[0]) == set(GOOD)
    assert hellaswag.fingerprint != lambada.fingerprint


def test_the_same_questions_have_the_same_fingerprint(tmp_path: Path) -> None:
    texts = ["one two", "three four"]
    file = write(tmp_path / "a.jsonl", *({"text": text, "more": 1} for text in texts))
    plain = tmp_path / "b.txt"
    plain.write_text("one two\r\n\n  three four \n", "utf-8")
    first, second = read_questions(LAMBADA, file), read_questions(LAMBADA, str(plain))
    assert list(first.records) == list(second.records)
    assert first.fingerprint == second.fingerprint
    assert read_questions(LAMBADA, write(tmp_path / "c", {"text": "one two"})) != first


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": 2}, "label 2 of 2 endings"),
        ({"label": -1}, "label -1 of 2 endings"),
        ({"label": "x"}, "invalid literal"),
        ({"endings": ["one"]}, "two endings at least"),
        ({"endings": ["one", " "]}, "none of them empty"),
        ({"endings": 5}, "not iterable"),
        ({"ctx_b": None}, "must be texts"),
    ],
)
def test_a_line_that_is_no_question_is_named(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    file = write(tmp_path / "bad.jsonl", GOOD, {**GOOD, **change})
    with pytest.raises(UsageError, match=r"bad\.jsonl, line 2 is no question of hellaswag: ") as e:
        read_questions(HELLASWAG, file)
    assert reason in str(e.value)


@pytest.mark.parametrize(
    ("task", "content", "told"),
    [
        (LAMBADA, b'{"text": "a b"}\n{"text', "file, line 2 is no JSON"),
        (LAMBADA, b"\xff\xfe", "line 1: byte 1 is no UTF-8"),
        (LAMBADA, b"", "holds no questions"),
        (LAMBADA, b'{"text": 5}', "line 1 is no question of lambada"),
        (LAMBADA, b'{"text": " "}', "line 1 is no question of lambada: its text is empty"),
        (HELLASWAG, b'{"label": 0}', "line 1 is no question of hellaswag: no endings"),
        (HELLASWAG, b"5", "line 1 is no question of hellaswag"),
    ],
)
def test_what_is_no_file_of_questions_is_said(
    tmp_path: Path, task: str, content: bytes, told: str
) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UsageError, match=told):
        read_questions(task, str(tmp_path / "file"))


def test_a_name_that_is_no_file_may_be_the_models(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such file.*--lambada stands after the models"):
        read_questions(LAMBADA, "latest")
    with pytest.raises(UsageError, match="cannot be read"):
        read_questions(LAMBADA, str(tmp_path))
