"""evaluate.py on the checkpoints of a real run, as users call it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import checkpoint_viewer, evaluate
from tests.sample_shards import flip_bit
from tests.small_models import TASK_FILES, plain_losses
from utils.base.errors import UsageError
from utils.checkpoints.layout import read_manifest
from utils.remote.loading import load_model
from utils.storage.bucket import crc32c_of_bytes
from utils.tools.evaluation import evaluator
from utils.tools.evaluation.evaluator import Evaluator
from utils.tools.evaluation.harness import Result
from utils.tools.evaluation.log import read_evaluations

HELLASWAG = str(TASK_FILES / "hellaswag.jsonl")
HERE = ("--set", "logging_dir=logs", "--set", "cache_dir=cache")  # and not where the run was
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    logging_as_before: None,
) -> Run:
    """Call evaluate.py in a folder of its own, on the run's checkpoints: (code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, output_dir: Path = trained_run / "checkpoints") -> tuple[int, str, str]:
        where = ("--output-dir", str(output_dir), *HERE)
        code = evaluate.main([*words, *where, "--device", "cpu"])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


def first_tokens(data: Path, count: int) -> list[int]:
    with np.load(data / "val_00000.npz") as shard:
        return list(shard["input_ids"].reshape(-1)[:count].astype(int).tolist())


def test_the_loss_of_a_checkpoint_is_that_of_a_plain_loop(
    run: Run, trained_run: Path, sample_data: Path, tmp_path: Path
) -> None:
    code, out, _ = run("latest", "--max-tokens", "200", "--json")
    assert code == 0
    (found,) = json.loads(out)["evaluations"]
    loaded = load_model(evaluate.find_from(_words(trained_run), "latest"), device="cpu")
    tokens = first_tokens(sample_data, 200)
    losses = plain_losses(loaded.model, tokens, 32)  # sequence_length of the run
    values = found["values"]
    expected = math.fsum(losses) / len(losses)
    assert values["tokens"] == 199
    assert values["loss"] == pytest.approx(expected, rel=1e-6)
    assert values["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    text = loaded.tokenizer.decode(tokens[1:], skip_special_tokens=True)
    assert values["bytes"] == len(text.encode())
    assert values["bits_per_byte"] == pytest.approx(
        math.fsum(losses) / math.log(2) / len(text.encode()), rel=1e-6
    )
    assert found["what"]["sequence_length"] == 32
    assert found["step"] == 4
    (kept,) = read_evaluations(tmp_path / "logs" / "evaluations.jsonl").evaluations
    assert kept.to_json() == found


def _words(trained_run: Path) -> Any:
    where = ["--output-dir", str(trained_run / "checkpoints")]
    return evaluate.build_parser().parse_args(["latest", *where, "--json"])


def test_like_training_gives_the_numbers_of_training(
    run: Run, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.base.progress.LINE_SECONDS", 0.0)
    code, _, errors = run("all", "--like-training")
    assert code == 0
    assert " checkpoint-epoch0-step4-files0: 186 of 186 tokens (100%)" in errors
    code, out, errors = run("all", "--like-training", "--json")
    assert (code, errors) == (0, "")
    found = json.loads(out)["evaluations"]
    assert [one["step"] for one in found] == [2, 4]
    for one in found:
        metadata = json.loads(
            (trained_run / "checkpoints" / one["model"] / "metadata.json").read_text()
        )
        expected = metadata["validation_metrics"]["validation_loss"]
        assert one["values"]["loss"] == pytest.approx(expected, rel=1e-6)
        assert one["values"]["tokens"] == 6 * 31  # max_eval_samples of the run


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a stand-in in the place of lm-evaluation-harness; return what it was asked for.

    The package itself runs in tests/test_lm_evaluation_harness.py.
    """
    asked: list[dict[str, Any]] = []

    def run_harness(loaded: Any, tasks: Any, **options: Any) -> list[Result]:
        loaded.require_tokenizer()
        asked.append({"tasks": tasks, **options})
        return [(str(tasks), {"acc": 0.5, "acc_norm": 0.25}, {"num_fewshot": 0})]

    monkeypatch.setattr(evaluator, "run_harness", run_harness)
    monkeypatch.setattr(evaluator, "task_of", lambda task, questions: (task, questions))
    monkeypatch.setattr(evaluate, "require_harness", lambda option: "1.0")
    return asked


def test_tasks_over_files_and_by_name(run: Run, harness: list[dict[str, Any]]) -> None:
    words = ("--hellaswag", HELLASWAG, "--lambada", "--limit", "4", "--tasks", "arc_easy, piqa")
    code, out, _ = run("latest", *words, "--num-fewshot", "2", "--batch-size", "3", "--json")
    assert code == 0
    found = json.loads(out)["evaluations"]
    assert [one["task"] for one in found[:2]] == ["hellaswag", "lambada"]
    hellaswag, lambada, named = harness
    ((task, questions),) = hellaswag.pop("tasks")
    assert (task, questions.source, len(questions.records)) == ("hellaswag", HELLASWAG, 20)
    assert hellaswag == {"limit": 4, "batch_size": 3, "softmax_dtype": "float32"}
    assert lambada["tasks"] == [("lambada", None)]  # of the Hub
    assert (named["tasks"], named["num_fewshot"], named["limit"]) == (["arc_easy", "piqa"], 2, 4)
    assert found[0]["what"] == {"data": questions.fingerprint, "num_fewshot": 0}
    assert found[0]["how"]["data"] == HELLASWAG


def test_the_viewer_shows_what_was_measured(
    run: Run,
    harness: list[dict[str, Any]],
    trained_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--max-tokens", "100", "--hellaswag", HELLASWAG, "--perplexity", "--plot", "figures")
    code, out, _ = run("all", *words)
    assert code == 0
    for title in ("validation of ", f"hellaswag of {HELLASWAG}"):
        assert title in out
    assert len(re.findall("checkpoint-epoch0-step2-files0 +2 ", out)) == 2
    assert (tmp_path / "figures.png").stat().st_size > 10_000
    run_id = read_manifest(trained_run / "checkpoints" / "checkpoint-epoch0-step4-files0").run_id
    drawn_of = f"validation.loss, hellaswag.acc_norm of run {run_id}"
    assert f"Plot saved to figures.png: {drawn_of}" in out
    where = ["--output-dir", str(trained_run / "checkpoints"), *HERE]
    assert checkpoint_viewer.main(["view", "latest", *where]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Evaluations: "))
    assert re.search(r"hellaswag acc_norm [\d.]+, validation loss [\d.]+$", line)
    assert checkpoint_viewer.main(["view", "latest", *where, "--all"]) == 0
    out = capsys.readouterr().out
    assert "Evaluations:" in out
    assert f"  hellaswag of {HELLASWAG}" in out
    assert out.count("acc_norm") == 1  # that of the other checkpoint is its own
    assert checkpoint_viewer.main(["view", "2", *where, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["evaluations"]
    assert [(one["task"], one["step"]) for one in found] == [("hellaswag", 2), ("validation", 2)]
    drawn = ["--evaluation", "validation.loss", "--evaluation", "hellaswag.acc_norm"]
    assert checkpoint_viewer.main(["plot", *drawn, *where, "--save", "e.svg", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["steps"] for one in found["evaluations"]] == [[2, 4], [2, 4]]
    assert found["saved"] == "e.svg"
    picture = (tmp_path / "e.svg").read_text()
    for text in (drawn_of, f"<!-- hellaswag of {HELLASWAG}", "<!-- acc_norm -->"):
        assert text in picture
    assert checkpoint_viewer.main(["plot", *drawn, *where, "--terminal"]) == 0
    assert "validation.loss over step" in capsys.readouterr().out
    # A log that cannot be read hides nothing else.
    (tmp_path / "logs" / "evaluations.jsonl").unlink()
    (tmp_path / "logs" / "evaluations.jsonl").mkdir()
    assert checkpoint_viewer.main(["view", "latest", *where]) == 0
    out = capsys.readouterr().out
    assert "Current Loss" in out
    assert "  evaluations.jsonl cannot be read" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--evaluation", "arc.acc"], "--evaluation arc.acc: known are none yet; evaluate.py"),
        (["latest", "--evaluation", "a.b"], "it takes no NAME"),
    ],
)
def test_a_figure_that_is_not_there_is_said(
    run: Run, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint_viewer.main(["plot", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_does_not_keep_the_others(
    run: Run, trained_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained_run / "checkpoints", copy)
    weights = next(copy.glob("*step2-*")) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    code, out, err = run("2", "7", "4", "--max-tokens", "64", output_dir=copy)
    assert code == 2
    assert "step4-files0" in out
    assert "step2-files0" not in out
    first, second = (line for line in err.splitlines() if line[:10] in ("Error: 2: ", "Error: 7: "))
    assert "model.safetensors is damaged" in first
    assert "There is no checkpoint" in second


def test_a_log_that_cannot_be_written_does_not_end_the_evaluation(run: Run, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the directory should be")
    code, out, err = run("all", "--max-tokens", "40")
    assert code == 1
    names = {line.split()[0] for line in out.splitlines() if " checkpoint-" in line}
    assert len(names) > 1
    assert err.count("evaluations.jsonl cannot be written") == len(names)
    assert "Results saved in" not in out


def test_a_measure_that_fails_does_not_keep_the_others(
    run: Run, harness: list[dict[str, Any]], trained_run: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    source = next((trained_run / "checkpoints").glob("*step4-*"))
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, bare)
    data = json.loads((source / "training_config.json").read_text())["data_uri"]
    words = ("--data", data, "--max-tokens", "64", "--hellaswag", HELLASWAG)
    code, out, err = run(str(bare), *words)
    assert code == 2
    assert "bare, hellaswag: bare has no tokenizer" in err
    assert "512 tokens at once" in out  # all that the model sees, as no run says otherwise
    assert "bits/byte" in out
    (kept,) = read_evaluations(tmp_path / "logs" / "evaluations.jsonl").evaluations
    assert (kept.task, kept.step, kept.weights) == ("validation", None, None)
    assert kept.values["bits_per_byte"] is None
    words = ("--perplexity", "--sequence-length", "4096", "--hellaswag", HELLASWAG)
    code, out, err = run("latest", *words)
    assert code == 2
    assert "the model sees 512" in err
    assert f"hellaswag of {HELLASWAG}" in out


def record_tokenizer(data: Path) -> None:
    """Write the tokenizer's checksums into the index, as whoever made the data with it would."""
    path = data / "index.json"
    index, tokenizer = json.loads(path.read_text("utf-8")), (data / "tokenizer.json").read_bytes()
    index["tokenizer_crc32c"]["tokenizer.json"] = crc32c_of_bytes(tokenizer)
    index["tokenizer_sha256"] = hashlib.sha256(tokenizer).hexdigest()
    path.write_text(json.dumps(index), "utf-8")


def test_shards_of_another_tokenizer_are_refused(
    run: Run, sample_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample_data, data)
    text = (data / "tokenizer.json").read_text("utf-8")
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (piece for piece, token in vocabulary.items() if token in (40, 41))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (data / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    record_tokenizer(data)
    code, _, err = run("latest", "--data", str(data))
    assert code == 2
    assert "was made with another tokenizer than checkpoint-epoch0-step4-files0: token 4" in err
    (data / "tokenizer.json").write_text("{", "utf-8")
    record_tokenizer(data)
    code, _, err = run("latest", "--data", str(data), "--max-tokens", "64")
    assert code == 0
    assert "cannot be read" in err


def test_a_damaged_tokenizer_of_data_is_not_used(
    run: Run, sample_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample_data, data)
    flip_bit(data / "tokenizer_config.json")
    code, out, err = run("latest", "--data", str(data), "--max-tokens", "64")
    assert (code, out) == (2, "")
    assert f"{data}/tokenizer_config.json is damaged" in err
    flip_bit(data / "tokenizer.json")
    code, _, err = run("latest", "--tokenizer", str(data / "tokenizer.json"))
    assert code == 2
    assert f"{data}/tokenizer.json is damaged" in err


@pytest.mark.parametrize(
    ("shards", "split", "told"),
    [
        (["train_00000.npz"], "validation", "holds no validation shards; --split training"),
        (["train_00000.npz"], "validation", "prepare_data.py"),
        (["train_00000.npz"], "training", ""),
        (["val_00000.npz"], "validation", ""),
        (["val_00000.npz"], "training", "holds no training shards; --split validation"),
        ([], "validation", "data holds no shards"),
        (None, "validation", "data does not exist"),
    ],
)
def test_data_without_the_wanted_shards_say_what_to_do(
    run: Run, sample_data: Path, tmp_path: Path, shards: list[str] | None, split: str, told: str
) -> None:
    for name in shards or ():
        (tmp_path / "data").mkdir()
        shutil.copy(sample_data / name, tmp_path / "data")
    if shards == []:
        (tmp_path / "data").mkdir()
    code, _, err = run("2", "4", "--data", "data", "--split", split, "--max-tokens", "64")
    assert code == (2 if told else 0)
    assert told in err
    assert err.count("Error") == (1 if told else 0)  # not for each model


def test_a_bad_shard_is_named_and_what_is_done_is_kept(
    run: Run, sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(sample_data / "val_00000.npz", data / "val_a.npz")
    np.savez(data / "val_b.npz", input_ids=np.array([5, 100_000]))
    code, out, err = run("2", "4", "--data", str(data))
    assert code == 2
    assert "val_b.npz: token id 100000 is outside the vocabulary" in err
    assert out == ""

    real = Evaluator.measures

    def measures(self: Evaluator) -> Any:
        def interrupt(*_: object) -> Any:
            raise KeyboardInterrupt

        return [*real(self), ("later", interrupt)]

    monkeypatch.setattr(Evaluator, "measures", measures)
    code, out, err = run("4", "2", "--max-tokens", "64")
    assert code == 130
    assert "step4-files0" in out
    assert "Interrupted." in err
    log = read_evaluations(tmp_path / "logs" / "evaluations.jsonl")
    assert [one.step for one in log.evaluations] == [4]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--like-training", "--stride", "4"], "--like-training is what the run did"),
        (["--plot", "x.docx"], "must end in one of"),
        (["--tasks", "a", "--tasks-path", "missing"], "--tasks-path missing is no directory"),
        (["--stride", "33"], "--stride 33 would leave tokens out: 32 is the most"),
        (["--sequence-length", "4096"], "--sequence-length 4096: the model sees 512 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(run: Run, words: list[str], told: str) -> None:
    code, out, err = run("latest", *words)
    assert (code, out) == (2, "")
    assert told in err


@pytest.mark.parametrize("words", [["--tasks", "arc_easy"], ["--hellaswag", HELLASWAG]])
def test_without_the_harness_nothing_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "lm_eval" else real(name, *more),
    )
    code, out, err = run("no-such-model", *words)
    assert (code, out) == (2, "")
    assert f'{words[0]} needs EleutherAI\'s lm-evaluation-harness: pip install "lm-eval[hf]"' in err


def test_a_file_of_questions_is_read_before_a_model(
    run: Run, harness: list[dict[str, Any]]
) -> None:
    code, out, err = run("no-such-model", "--hellaswag", "missing.jsonl")
    assert (code, out) == (2, "")
    assert "missing.jsonl: there is no such file" in err


@pytest.mark.parametrize(
    ("texts", "steps"),
    [
        (["all"], [2, 4]),
        (["3-"], [4]),
        (["-3"], [2]),
        (["2-2", "all"], [2, 4]),
        (["0-100", "other"], [2, 4, None]),
    ],
)
def test_models_are_chosen_by_steps(
    trained_run: Path, texts: list[str], steps: list[int | None]
) -> None:
    config = evaluate.read_model_config(_words(trained_run))
    for name, step in zip(evaluate.choose_models(texts, config), steps, strict=True):
        assert name == "other" if step is None else f"-step{step}-" in name
    with pytest.raises(UsageError, match="5-9: there is no such checkpoint"):
        evaluate.choose_models(["5-9"], config)


def test_one_token_is_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.build_parser().parse_args(["latest", "--max-tokens", "1"])
    assert "--max-tokens: must be at least 2, got 1" in capsys.readouterr().err
