"""evaluations.jsonl: the newest of each question to each model, whatever else the file says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sample_checkpoints import RUN_ID, make_checkpoint, seal
from utils.checkpoints.layout import read_manifest
from utils.tools.evaluation.log import (
    Evaluation,
    append_evaluation,
    metric_names,
    metric_points,
    newest,
    of_weights,
    read_evaluations,
    weights_id,
)
from utils.tools.evaluation.text import evaluation_lines, tables

ONE = Evaluation(
    "checkpoint-epoch0-step10-files0",
    "hellaswag",
    {"acc": 0.25, "acc_norm": 0.5, "acc_norm_stderr": 0.1, "items": 20},
    {"data": "abc"},
    {"data": "hellaswag.jsonl"},
    10,
    RUN_ID,
    "w10",
)


def at(step: int, value: float, **changes: object) -> Evaluation:
    base = replace(ONE, step=step, weights=f"w{step}", values={"acc_norm": value})
    return replace(base, **changes)  # type: ignore[arg-type]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "evaluations.jsonl"
    assert read_evaluations(path).evaluations == ()
    append_evaluation(path, ONE)
    with path.open("a") as file:  # a crash in the middle of a line
        file.write('{"model": "torn')
    append_evaluation(path, replace(ONE, model="other", step=None, weights=None))
    found = read_evaluations(path)
    assert [replace(one, time="") for one in found.evaluations] == [
        ONE,
        replace(ONE, model="other", step=None, weights=None),
    ]
    assert found.evaluations[0].time.startswith("20")
    assert found.problem == "1 of 3 lines of evaluations.jsonl cannot be read"


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "5",
        '{"model": 5, "task": "a"}',
        '{"model": "a"}',
        '{"model": "a", "task": "b", "values": 5}',
        '{"model": "a", "task": "b", "what": [1]}',
        "[" * 5000,
        "\x00",
    ],
)
def test_a_line_that_is_no_evaluation_hides_no_other(tmp_path: Path, line: str) -> None:
    path = tmp_path / "evaluations.jsonl"
    path.write_text(f"{line}\n")
    append_evaluation(path, ONE)
    found = read_evaluations(path)
    assert len(found.evaluations) == 1
    assert found.problem is not None


def test_hostile_values_become_harmless(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    values = {"acc\x1b[31m": 1e300, "loss": True, "a": "text", "b": None, "acc": 10**400, "ok": 1}
    record = {"model": "\x1b[2Jm", "task": "t\n", "step": 1e40, "run_id": 5, "values": values}
    deep: object = "end"
    for _ in range(200):
        deep = {"x": deep}
    record |= {"what": {"limit": {}, "harness": "\x1b", "max_tokens": 1e999, "deep": deep}}
    record |= {"how": {"data": "\x07"}, "time": "\x1b"}
    path.write_text(json.dumps(record))
    (found,) = read_evaluations(path).evaluations
    assert (found.model, found.task, found.step, found.run_id) == ("?[2Jm", "t?", None, None)
    assert found.results == {"ok": 1.0}
    text = "\n".join(evaluation_lines([found])) + str(tables([found]))
    assert "\x1b" not in text
    assert "\x07" not in text


def test_the_newest_of_each_question_counts() -> None:
    again = replace(ONE, values={"acc": 0.75}, how={"data": "a copy"}, time="2")
    other_data = replace(ONE, what={"data": "xyz"}, time="3")
    other_weights = replace(ONE, weights="w11", time="4")
    assert newest([ONE, other_data, again, other_weights]) == [again, other_data, other_weights]


def test_a_checkpoint_has_the_evaluations_of_its_weights(tmp_path: Path) -> None:
    first = read_manifest(make_checkpoint(tmp_path / "a", 10))
    same = read_manifest(make_checkpoint(tmp_path / "b", 10, current_loss=3.0))
    path = make_checkpoint(tmp_path / "c", 10)
    (path / "model.safetensors").write_bytes(b"weights of another branch")
    other = seal(path, 10)
    assert weights_id(first) == weights_id(same) != weights_id(other)
    mine = replace(ONE, weights=weights_id(first))
    unknown = replace(ONE, weights=None)
    assert of_weights([unknown, mine], first) == [mine]
    assert of_weights([mine], other) == []
    assert of_weights([unknown, mine], None) == []


def test_points_are_of_one_run_and_one_question() -> None:
    log = [
        at(30, 0.9, run_id="another"),
        at(40, 0.8, what={"data": "xyz"}),
        at(20, 0.3),
        at(10, 0.1),
        at(10, 0.2),  # measured again
        replace(at(99, 0.5), step=None),
        at(50, 0.5, task="other"),
    ]
    points = metric_points(log, "hellaswag.acc_norm")
    assert (points.steps, points.values, points.num_other) == ((10, 20), (0.2, 0.3), 2)
    assert metric_points(log, "hellaswag.acc").steps == ()
    assert metric_names(log) == ["hellaswag.acc_norm", "other.acc_norm"]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"acc": 1.0, "acc_norm": 0.5, "acc_norm_stderr": 0.1}, "acc_norm"),
        ({"perplexity": 9.0, "acc": 0.0, "items": 3}, "acc"),
        ({"tokens": 4, "perplexity": 9.0, "loss": 2.0}, "loss"),
        ({"bleu": 3.0, "tokens": 4}, "bleu"),
        ({"acc": None, "items": 4}, None),
    ],
)
def test_the_main_figure(values: dict[str, float | None], name: str | None) -> None:
    assert replace(ONE, values=values).main_metric == name
