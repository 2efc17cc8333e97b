"""scripts/generate.py: texts of a finished run, on a terminal, in a pipe, as JSON, in a session."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts import generate
from utils.models.generation import StopWhen
from utils.remote.loading import LoadedModel
from utils.tools.generation import texts as text_generation
from utils.tools.generation.texts import TextGenerator, _Pieces

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run the command on the newest checkpoint; return exit code, output and error output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    where = ("latest", "--output-dir", str(trained_run / "checkpoints"), "--device", "cpu")

    def call(*words: str, stdin: str | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = generate.main([*where, *words])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model in float64: no token is chosen by rounding, which each build of torch does anew.

    After 4 steps of training many tokens are as good as equally likely.
    """
    load = generate.load_found

    def load_exactly(*arguments: Any) -> LoadedModel:
        loaded = load(*arguments)
        loaded.model.double()
        return loaded

    monkeypatch.setattr(generate, "load_found", load_exactly)


def texts_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.usefixtures("exact")
def test_greedy_tokens_are_those_of_transformers(run: Run, trained_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = max((trained_run / "checkpoints").glob("*step4-*"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = ["The end of", "In", "One hundred years", "a b c d e f"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    code, output, errors = run(*words, "--temperature", "0", "--max-tokens", "24", "--json")
    assert code == 0, errors
    for prompt, text in zip(prompts, texts_of(output), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        end = model.generation_config.eos_token_id
        assert text["token_ids"] == (made[: made.index(end)] if end in made else made)
        assert text["text"] == tokenizer.decode(text["token_ids"])
        assert (text["prompt"], text["prompt_tokens"]) == (prompt, ids.shape[1])
        assert text["tokens"] == len(text["token_ids"])
        assert 0 < text["first_token_seconds"] <= text["seconds"]


def test_a_text_appears_as_it_is_made(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    show = generate._show_piece

    def watched_show(piece: str) -> None:
        shown.append(piece)
        show(piece)

    monkeypatch.setattr(generate, "_show_piece", watched_show)
    words = ("--prompt", "The", "--max-tokens", "40", "--seed", "3", "--ignore-eos")
    code, output, errors = run(*words)
    assert code == 0
    assert output == f"The{generate.without_control_characters(''.join(shown))}\n"
    assert len([piece for piece in shown if piece]) > 2
    assert "float32 on cpu" in errors
    assert "40 tokens in 1 text; prompts: " in errors
    assert "tokens/s" in errors
    shown.clear()
    again = run(*words, "--no-stream")
    assert again[1] == output
    assert len(shown) == 1


@pytest.mark.usefixtures("exact")
def test_several_texts_come_in_the_order_of_their_prompts(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The\nIn the year of\na\n")
    words = ("--prompts-file", "prompts.txt", "--num-samples", "2", "--max-tokens", "6")
    code, output, errors = run(*words, "--batch-size", "4", "--json")
    texts = texts_of(output)
    assert code == 0
    assert [text["prompt"] for text in texts] == ["The"] * 2 + ["In the year of"] * 2 + ["a"] * 2
    assert [(text["sample"], text["seed"]) for text in texts] == [(0, 0), (1, 1)] * 3
    assert "in 6 texts" in errors
    expected = "".join(
        f"--- {n} of 6\n{text['prompt']}{generate.without_control_characters(text['text'])}\n"
        for n, text in enumerate(texts, start=1)
    )
    assert run(*words, "--batch-size", "4")[1] == expected
    assert run(*words, "--batch-size", "1")[1].count("--- ") == 6  # each as it is made


def test_no_text_steers_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "\x1b]0;x\x07\r\n"
    monkeypatch.setattr(TextGenerator, "decode", lambda self, tokens: hostile * (len(tokens) > 3))
    monkeypatch.setattr(text_generation, "encode_prompt", lambda tokenizer, prompt: [1, 2, 3])
    monkeypatch.setattr(
        _Pieces,
        "on_finalized_text",
        lambda self, text, stream_end=False: self._on_piece(hostile * stream_end),
    )
    for words in ((), ("--no-stream",)):
        _, output, _ = run("--prompt", "\x1b[31mred", "--max-tokens", "1", *words)
        assert output == "?[31mred?]0;x??\n\n"
    _, output, _ = run("--prompt", "a", "--max-tokens", "1", "--json")
    assert texts_of(output)[0]["text"] == "\x1b]0;x\x07\r\n"
    assert "\x1b" not in output


def test_a_terminal_sees_which_part_is_the_prompt(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "_has_colours", lambda: True)
    _, output, _ = run("--prompt", "The", "--max-tokens", "0")
    assert output == "\x1b[1mThe\x1b[0m\n"


def test_stop_texts_of_the_command_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        TextGenerator, "_has_stop", lambda self, tokens: self.stops == ("\n", "b\t")
    )
    words = ("--stop", "\\n", "--stop", "b\\t", "--prompt", "The", "--max-tokens", "9", "--json")
    assert texts_of(run(*words)[1])[0]["tokens"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give --prompt TEXT"),
        (("--prompts-file", "none.txt"), "none.txt cannot be read"),
        (("--interactive", "--json"), "--json needs"),
    ],
)
def test_wrong_words_are_told_before_a_model_is_looked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(generate, "find_from", lambda args: pytest.fail("looked for"))
    code, output, errors = run(*words)
    assert (code, output) == (2, "")
    assert errors.startswith("Error: ")
    assert message in errors


def test_a_wrong_value_is_told(run: Run) -> None:
    code, output, errors = run("--prompt", "The", "--temperature", "-1")
    assert (code, output) == (2, "")
    assert "temperature must be" in errors


def test_ctrl_c_ends_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(3, monkeypatch)
    code, output, errors = run("--prompt", "The")
    assert code == 130
    assert output.startswith("The")
    assert output.endswith("\n")
    assert errors.endswith("Interrupted.\n")


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step, made = StopWhen.__call__, [0]

    def interrupted(self: StopWhen, *arguments: Any, **options: Any) -> Any:
        made[0] += 1
        if made[0] == steps + 1:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(StopWhen, "__call__", interrupted)


def test_a_session_answers_line_by_line(run: Run) -> None:
    alone = run("--prompt", "The", "--max-tokens", "9")[1]
    code, output, errors = run(
        "--interactive",
        "--max-tokens",
        "9",
        stdin="The\n\n/set seed 0\n/set top-p 0.95\nThe\n//x\n/quit\nThe\n",
    )
    assert code == 0
    assert output.startswith(alone * 2 + "/x")
    assert errors.count("tokens/s") == 3
    assert "; seed 0" in errors
    assert "; seed 1" in errors
    assert "top_p=0.95" in errors
    # The end of the input ends it too; a text that a command begins with has its own seed.
    code, output, _ = run("--interactive", "--max-tokens", "9", stdin="The\nThe\n")
    assert code == 0
    assert output.startswith(alone)
    assert output != alone * 2


def test_a_session_goes_on_after_a_mistake(run: Run) -> None:
    told = {
        "/help": "Ctrl-C ends a text",
        "/nothing": "/nothing is no command",
        "/set temperature warm": "warm is no number for temperature",
        "/set top_p 2": "top_p must be",
        "/set colour 2": "colour is none of max_tokens",
        "/set temperature": "Say /set NAME VALUE",
        "a\udcff": "is no UTF-8",
    }
    lines = "".join(f"{line}\n" for line in [*told, "The"])
    code, output, errors = run("--interactive", "--max-tokens", "2", stdin=lines)
    assert code == 0
    for message in told.values():
        assert message in errors
    assert output.startswith("The")


def test_ctrl_c_ends_a_text_and_not_the_session(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(3, monkeypatch)
    code, output, errors = run("--interactive", "--max-tokens", "6", stdin="One\nTwo\n")
    assert code == 0
    assert "The text was ended." in errors
    assert output.splitlines()[0].startswith("One")
    assert "\nTwo" in output


def test_ctrl_c_between_texts_ends_the_session(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(marker: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert run("--interactive")[0] == 130


def test_a_terminal_without_a_prompt_begins_a_session(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda marker: "/quit")
    code, output, errors = run()
    assert (code, output) == (0, "")
    assert "/help" in errors
