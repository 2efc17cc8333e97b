"""Questions of HellaSwag and last words, as their files have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.small_models import TASK_FILES
from utils.base.errors import UsageError
from utils.tools.evaluation.task_data import (
    HELLASWAG,
    LAMBADA,
    Choice,
    LastWord,
    clean_text,
    parse_choice,
    parse_last_word,
    read_questions,
)

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


def test_a_question_is_prepared_as_by_the_harness() -> None:
    # "header" leaves its space behind, "title" becomes a full stop, and ctx_b is capitalized.
    assert parse_choice(GOOD) == Choice(
        "Roof repair: On a roof.. Climb. He Takes a hammer", ("and nails it.", "to bed"), 1
    )
    whole = {**GOOD, "ctx": "On a roof. he takes a hammer"}
    del whole["ctx_a"], whole["ctx_b"]
    assert parse_choice(whole).context == "Roof repair: On a roof. he takes a hammer"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a [title] b ", "a. b"),
        ("a [x] b", "a b"),
        ("[a][b]c", "c"),
        ("a   b", "a  b"),  # pairs of spaces, once
        ("no [end", "no [end"),
    ],
)
def test_marks_are_removed(text: str, expected: str) -> None:
    assert clean_text(text) == expected


@pytest.mark.parametrize(
    ("text", "context", "word"),
    [
        ("to the end", "to the", " end"),
        ("end", "", " end"),
        ("two  spaces  end", "two  spaces ", " end"),
        ("a trailing space ", "a trailing space", " "),
        ("a line\nbreak", "a", " line\nbreak"),
    ],
)
def test_the_last_word_is_what_follows_the_last_space(text: str, context: str, word: str) -> None:
    assert parse_last_word({"text": text}) == LastWord(context, word)
    assert context + word in (text, f" {text}")


def test_the_files_are_read() -> None:
    hellaswag = read_questions(HELLASWAG, str(TASK_FILES / "hellaswag.jsonl"))
    lambada = read_questions(LAMBADA, str(TASK_FILES / "lambada.jsonl"), limit=5)
    assert (len(hellaswag.items), len(lambada.items)) == (20, 5)
    assert isinstance(hellaswag.items[0], Choice)
    assert hellaswag.fingerprint != lambada.fingerprint


def test_the_same_questions_have_the_same_fingerprint(tmp_path: Path) -> None:
    texts = ["one two", "three four"]
    file = write(tmp_path / "a.jsonl", *({"text": text, "more": 1} for text in texts))
    plain = tmp_path / "b.txt"
    plain.write_text("one two\r\n\n  three four \n", "utf-8")
    first, second = read_questions(LAMBADA, file), read_questions(LAMBADA, str(plain))
    assert list(first.items) == list(second.items)
    assert first.fingerprint == second.fingerprint
    assert read_questions(LAMBADA, file, 1).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": 2}, "label 2 of 2 endings"),
        ({"label": -1}, "label -1 of 2 endings"),
        ({"label": "x"}, "invalid literal"),
        ({"endings": ["one"]}, "two endings at least"),
        ({"endings": ["one", "[step]"]}, "none of them empty"),
        ({"endings": 5}, "not iterable"),
        ({"ctx_b": None}, "capitalize"),
    ],
)
def test_a_line_that_is_no_question_is_named(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    file = write(tmp_path / "bad.jsonl", GOOD, {**GOOD, **change})
    with pytest.raises(UsageError, match=r"bad\.jsonl, line 2 is no question of hellaswag: ") as e:
        read_questions(HELLASWAG, file)
    assert reason in str(e.value)


def test_what_is_no_file_of_questions_is_said(tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_text('{"text": "a b"}\n{"text', "utf-8")
    with pytest.raises(UsageError, match=r"torn\.jsonl, line 2 is no JSON"):
        read_questions(LAMBADA, str(tmp_path / "torn.jsonl"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        read_questions(LAMBADA, str(tmp_path / "bytes"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_questions(LAMBADA, str(tmp_path))
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="holds no questions"):
        read_questions(LAMBADA, str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"no such file.*--lambada stands after the models"):
        read_questions(LAMBADA, "latest")
    with pytest.raises(UsageError, match="line 1 is no question of hellaswag: no ctx"):
        read_questions(HELLASWAG, write(tmp_path / "a", {"endings": []}))
    with pytest.raises(UsageError, match="line 1 is no question of lambada"):
        read_questions(LAMBADA, write(tmp_path / "b", {"text": 5}))


def test_a_data_set_that_cannot_be_loaded_wants_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, configuration: str | None, *, split: str) -> Any:
        if name == "Rowan/hellaswag":
            assert (configuration, split) == (None, "validation")
            return [GOOD]
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_questions(HELLASWAG, "").items) == 1
    with pytest.raises(UsageError, match=r"\(no network\). Name a file of it: --lambada FILE"):
        read_questions(LAMBADA, "")
