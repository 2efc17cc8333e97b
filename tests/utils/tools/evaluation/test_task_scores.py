"""Accuracies: by tables, and against a reference that scores token by token."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.small_models import TASK_FILES, build_small_model, plain_score
from utils.tools.evaluation.scoring import Score
from utils.tools.evaluation.task_data import HELLASWAG, LAMBADA, Choice, read_questions
from utils.tools.evaluation.task_scores import (
    judge_choices,
    judge_last_words,
    score_questions,
    standard_error,
)
from utils.tools.generation.loading import load_named_tokenizer


@pytest.fixture(scope="module")
def tokenizer(sample_data: Path) -> Any:
    return load_named_tokenizer(str(sample_data))


@pytest.fixture(scope="module")
def model() -> Any:
    return build_small_model(context=256)


def test_choices_are_judged_by_likelihood_and_by_character() -> None:
    items = [Choice("a", ("long answer", "no"), 0), Choice("b", ("x", "yy", "\u00e9\u00e9"), 2)]
    totals = [-6.0, -4.0, -3.0, -4.0, -3.0]  # each -0.5 and -2, then -3, -2 and -1.5
    values = judge_choices(items, [Score(total, is_greedy=False) for total in totals])
    assert values == {
        "acc": 0.0,  # of equals the first one
        "acc_stderr": 0.0,
        "acc_norm": 1.0,
        "acc_norm_stderr": 0.0,
        "items": 2,
    }


def test_last_words_are_judged_by_greedy_hits_and_perplexity() -> None:
    values = judge_last_words([Score(-1.0, is_greedy=True), Score(-3.0, is_greedy=False)])
    assert values["acc"] == 0.5
    assert values["acc_stderr"] == pytest.approx(0.5)
    assert values["perplexity"] == pytest.approx(math.exp(2.0))
    assert judge_last_words([Score(-1e6, is_greedy=False)])["perplexity"] is None


def test_the_standard_error_is_the_sample_one() -> None:
    hits = [True, False, False, True, True, False, True, True]
    expected = statistics.stdev(map(float, hits)) / math.sqrt(len(hits))
    assert standard_error(hits) == pytest.approx(expected)
    assert standard_error([True]) is None


def test_hellaswag_is_that_of_a_plain_reference(model: Any, tokenizer: Any) -> None:
    """The harness's rules once more, from the raw file: no code of ours but the tokenizer."""
    right, right_norm = [], []
    lines = (TASK_FILES / "hellaswag.jsonl").read_text("utf-8").splitlines()
    for record in map(json.loads, lines):
        begin = record["ctx_b"][:1].upper() + record["ctx_b"][1:].lower()
        context = _clean(f"{record['activity_label']}: {record['ctx_a']} {begin}")
        totals, per_character = [], []
        for ending in record["endings"]:
            answer = _clean(ending)
            stripped = context.rstrip()
            ids = tokenizer.encode(f"{context} {answer}")
            cut = len(tokenizer.encode(stripped))
            total, _ = plain_score(model, ids[:cut], ids[cut:])
            totals.append(total)
            per_character.append(total / len(answer))
        right.append(totals.index(max(totals)) == record["label"])
        right_norm.append(per_character.index(max(per_character)) == record["label"])
    questions = read_questions(HELLASWAG, str(TASK_FILES / "hellaswag.jsonl"))
    done: list[tuple[int, int]] = []
    values = score_questions(
        model,
        tokenizer,
        questions,
        context_size=256,
        batch_size=7,
        on_progress=lambda *counts: done.append(counts),
    )
    assert values["acc"] == sum(right) / 20
    assert values["acc_norm"] == sum(right_norm) / 20
    assert values["acc"] != values["acc_norm"]
    assert done[-1] == (80, 80)


def _clean(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    while "[" in text and "]" in text[text.index("[") :]:
        begin = text.index("[")
        text = text[:begin] + text[text.index("]", begin) + 1 :]
    return text.replace("  ", " ")


def test_last_words_are_those_of_a_plain_reference(model: Any, tokenizer: Any) -> None:
    totals, hits = [], []
    lines = (TASK_FILES / "lambada.jsonl").read_text("utf-8").splitlines()
    for text in (json.loads(line)["text"] for line in lines):
        words = text.split(" ")
        context = " ".join(words[:-1])
        ids = tokenizer.encode(f"{context} {words[-1]}" if context else f" {words[-1]}")
        begin = tokenizer.encode(context) if context else []
        total, hit = plain_score(model, begin or [tokenizer.eos_token_id], ids[len(begin) :])
        totals.append(total)
        hits.append(hit)
    questions = read_questions(LAMBADA, str(TASK_FILES / "lambada.jsonl"))
    values = score_questions(model, tokenizer, questions, context_size=256)
    assert values["acc"] == sum(hits) / 20
    assert math.log(values["perplexity"] or 0) == pytest.approx(-sum(totals) / 20, rel=1e-5)
    assert values["items"] == 20
