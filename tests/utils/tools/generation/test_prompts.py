"""Prompts from files: lines, JSON lines, and a bad line named before anything is made."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.base.errors import UsageError
from utils.tools.generation import prompts
from utils.tools.generation.prompts import read_prompts


def write(folder: Path, content: bytes, name: str = "prompts.txt") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\n two \r\n\nthree", ["one", " two ", "three"]),
        ("\ufeffné\u2028e\x0b!\n".encode(), ["né\u2028e\x0b!"]),
        (b'{"a": 1}\n', ['{"a": 1}']),
        (b'{"prompt": "a\\nb", "id": 3}\n\n{"prompt": ""}\n', ["a\nb", ""]),
    ],
)
def test_prompts_of_a_file(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    assert read_prompts(write(tmp_path, content)) == expected


def test_prompts_of_json_lines_and_of_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(json.dumps({"prompt": f"{n}\n"}) + "\n" for n in range(3))
    assert read_prompts(write(tmp_path, lines.encode(), "a.jsonl")) == ["0\n", "1\n", "2\n"]
    for content, expected in ((lines, ["0\n", "1\n", "2\n"]), ("x\ny", ["x", "y"])):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
        assert read_prompts("-") == expected


def test_prompts_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"one\ntwo\n",))
    writer.start()
    assert read_prompts(str(tmp_path / "pipe")) == ["one", "two"]
    writer.join()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"one\ntwo\xff\n", "line 2: byte 4 is no UTF-8"),
        ("a.jsonl", b"one\n", "line 1: it is no JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: it is no JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', "line 2: it is no JSON object"),
        ("a.txt", b'{"prompt": "a"}\n{"text": "b"}\n', 'line 2: it has no text "prompt"'),
        ("a.jsonl", b'{"prompt": 1}\n', 'line 1: it has no text "prompt". Nothing was generated'),
    ],
)
def test_a_bad_file_is_one_error(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_prompts(write(tmp_path, content, name))


def test_a_file_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="nothing cannot be read: No such file"):
        read_prompts(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_prompts(str(tmp_path))
    monkeypatch.setattr(prompts, "MAX_BYTES", 4)
    with pytest.raises(UsageError, match="has more than"):
        read_prompts(write(tmp_path, b"12345"))
