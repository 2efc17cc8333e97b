"""Sample texts of a run: harmless to read, off when they cannot be had, and said once."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.training_config import TrainingConfig
from tests.utils.models.test_tokenizer import write_tokenizer
from utils.models.tokenizer import load_tokenizer
from utils.run import sample_texts
from utils.run.sample_texts import Sampler

SETTINGS = b'{"eos_token": "</s>", "bos_token": "<s>"}'
FILES = {"tokenizer.json": b"{}"}


class Tokenizer:
    """Reads letters and writes what a test wants."""

    bos_token_id: int | None = None
    eos_token_id: int | None = 7

    def __init__(self, text: str = "text") -> None:
        self.text = text

    def __call__(self, prompt: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in prompt]}

    def decode(self, tokens: list[int]) -> str:
        return self.text


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What the model was given."""
    given: list[list[int]] = []

    def generate(model: Any, ids: list[list[int]], *_: Any, **options: Any) -> list[list[int]]:
        assert options["end_ids"] == (7,)
        given.extend(ids)
        return [[1, 2]]

    monkeypatch.setattr(sample_texts, "generate_tokens", generate)
    monkeypatch.setattr(sample_texts, "load_tokenizer", lambda files: Tokenizer())
    return given


def state_of(*, has_whole_weights: bool = True) -> Any:
    return SimpleNamespace(
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
        core_model=SimpleNamespace(config=SimpleNamespace(bos_token_id=7)),
        division=SimpleNamespace(has_whole_weights=has_whole_weights),
        progress=SimpleNamespace(step=40),
    )


def config(**values: Any) -> TrainingConfig:
    return TrainingConfig(**{"sample_prompts": ["", "ab"], **values})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_prompt_begins_like_the_data_and_does_not_end(
    tmp_path: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_tokenizer(tmp_path, {"eos_token": "</s>", "bos_token": "<s>"}, "<s> $A </s>")
    monkeypatch.setattr(sample_texts, "load_tokenizer", load_tokenizer)

    def generate(model: Any, ids: list[list[int]], *_: Any, **options: Any) -> list[list[int]]:
        prompts.extend(ids)
        return [[5]]

    monkeypatch.setattr(sample_texts, "generate_tokens", generate)
    state = state_of()
    state.core_model.config.bos_token_id = 2
    files = {"tokenizer.json": content, "tokenizer_config.json": SETTINGS}

    Sampler(config(sample_prompts=["fox", ""]), files, tmp_path / "x").write(state, lambda: False)

    plain = load_tokenizer(files)("fox", add_special_tokens=False).input_ids
    assert prompts == [[2, *plain], [2]]


def test_a_text_cannot_steer_a_terminal(
    tmp_path: Path,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hostile = "a\x1b[2J\x9b31m\r\x07b\n\tc\u202ed\u2028e\ud800f"
    monkeypatch.setattr(sample_texts, "load_tokenizer", lambda files: Tokenizer(hostile))
    caplog.set_level("DEBUG")
    path = tmp_path / "samples.jsonl"
    (found,) = Sampler(config(sample_prompts=["p\x1b"]), FILES, path).write(state_of(), bool)
    assert found.text == "a?[2J?31m??b\n    c?d?e?f"
    for text in (caplog.text, path.read_text()):
        assert all(character.isprintable() for character in text.replace("\n", ""))


@pytest.mark.parametrize(
    ("files", "has_whole_weights", "reason"),
    [({}, True, "without a tokenizer"), (FILES, False, "a part of the weights only")],
)
def test_texts_that_cannot_be_had_are_told_once(
    tmp_path: Path,
    prompts: list[list[int]],
    caplog: pytest.LogCaptureFixture,
    files: dict[str, bytes],
    has_whole_weights: bool,
    reason: str,
) -> None:
    caplog.set_level("INFO")
    sampler = Sampler(config(), files, tmp_path / "samples.jsonl")
    state = state_of(has_whole_weights=has_whole_weights)
    assert [sampler.write(state, lambda: False) for _ in range(3)] == [[], [], []]
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert prompts == []


@pytest.mark.parametrize("values", [{"sample_prompts": []}, {"sample_tokens": 0}])
def test_off_is_off(
    tmp_path: Path,
    prompts: list[list[int]],
    values: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampler = Sampler(config(**values), {}, tmp_path / "samples.jsonl")
    assert sampler.write(state_of(), lambda: False) == []
    assert not warnings(caplog)
    assert not list(tmp_path.iterdir())


def test_an_error_ends_the_texts_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(files: Any) -> Any:
        raise Exception("expected `,` at line 1")  # what tokenizers raises

    monkeypatch.setattr(sample_texts, "load_tokenizer", fail)
    sampler = Sampler(config(), FILES, tmp_path / "samples.jsonl")
    assert [sampler.write(state_of(), lambda: False) for _ in range(2)] == [[], []]
    assert warnings(caplog) == ["No sample texts in this attempt: expected `,` at line 1."]


def test_texts_go_on_when_the_file_cannot_be_written(
    tmp_path: Path, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    sampler = Sampler(config(), FILES, tmp_path / "samples.jsonl")
    assert len(sampler.write(state_of(), lambda: False)) == 2
    (message,) = warnings(caplog)
    assert "samples.jsonl cannot be written" in message


def test_a_request_to_stop_leaves_no_half_texts(tmp_path: Path, prompts: list[list[int]]) -> None:
    sampler = Sampler(config(), FILES, tmp_path / "samples.jsonl")
    assert sampler.write(state_of(), lambda: len(prompts) == 2) == []
    assert not list(tmp_path.iterdir())
    assert len(sampler.write(state_of(), lambda: False)) == 2
