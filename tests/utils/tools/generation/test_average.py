"""The mean of the weights of several checkpoints, as export and evaluation take it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from scripts import evaluate, export_model
from tests.sample_checkpoints import change_manifest, seal_file
from utils.base.errors import ExitCode

WEIGHTS = "model.safetensors"
NAMES = [f"checkpoint-epoch0-step{step}-files0" for step in (2, 4)]


@pytest.fixture
def run_folder(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained run, with checkpoints of steps 2 and 4, to work in."""
    monkeypatch.chdir(shutil.copytree(trained_run, tmp_path / "run"))
    return tmp_path / "run"


def export(*words: str) -> int:
    own = ("--set", "checkpoint_uri=bucket")  # of the copy, and not of the run that was copied
    return export_model.main([*words, *own, "--output", "mean", "--overwrite", "--device", "cpu"])


def measure(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert evaluate.main([*words, "--json", "--device", "cpu", "--max-tokens", "300"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["evaluations"]
    return found


def test_the_mean_of_checkpoints_here_or_in_the_bucket_is_exported_and_measured(
    run_folder: Path, trained_run: Path, sample_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (load_file(trained_run / "checkpoints" / name / WEIGHTS) for name in NAMES)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    shutil.rmtree(run_folder / "checkpoints" / NAMES[0])  # the bucket still has it
    for words in (
        ("latest", "--average", "2"),
        ("latest", "--average", "1-4"),
        (str(run_folder / "bucket" / "latest"), "--average", "2"),
    ):
        assert export(*words) == 0
        mean: Any = AutoModelForCausalLM.from_pretrained("mean", local_files_only=True)
        mean = mean.state_dict()
        assert mean.keys() == one.keys()
        for key, tensor in mean.items():
            assert torch.equal(tensor, (one[key] + other[key]) / 2), key
        shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)
    card = (run_folder / "mean" / "README.md").read_text("utf-8").replace("\\", "")
    assert [f"| mean of the weights of | {name} |" in card for name in NAMES] == [True, True]
    assert "validation loss" not in card

    found = measure(capsys, "latest", "--average", "2")
    exported = measure(capsys, "mean", "--sequence-length", "32", "--data", str(sample_data))
    assert found["values"]["loss"] == exported["values"]["loss"]
    assert (found["model"], found["weights"]) == (f"{NAMES[1]} (mean of 2)", None)
    steps = measure(capsys, "2", "--average", "1-4")  # however its branch was named
    assert (steps["model"], steps["step"]) == (found["model"], 4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("latest", "--average", "3"), "3 checkpoints of the branch of"),
        (("latest", "--average", "3-4"), "there are 1 (steps: 4)"),
        (("latest", "--average", "1"), "give a number from 2 on"),
        (("data", "--average", "2"), "is no checkpoint of a run"),
    ],
)
def test_too_few_are_refused(
    words: tuple[str, ...], told: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "data").mkdir()
    (run_folder / "data" / "config.json").write_text("{}")
    try:
        code = export(*words)
    except SystemExit as exc:  # argparse
        code = int(str(exc))
    assert code == ExitCode.USAGE
    assert told in " ".join(capsys.readouterr().err.split())


def test_models_of_other_shapes_have_no_mean(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run_folder / "checkpoints" / NAMES[0]
    weights = load_file(checkpoint / WEIGHTS)
    key = sorted(weights)[0]
    save_file({**weights, key: weights[key][:1].contiguous()}, checkpoint / WEIGHTS)
    seal_file(checkpoint, WEIGHTS)
    assert export("latest", "--average", "2") == ExitCode.USAGE
    text = " ".join(capsys.readouterr().err.split())
    assert f"{NAMES[0]} and {NAMES[1]} have no mean: {key} is" in text


def test_checkpoints_of_another_run_do_not_count(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run_folder / "bucket")
    assert export("latest", "--average", "2") == 0
    change_manifest(run_folder / "checkpoints" / NAMES[0], run_id="20260101-0a1b2c3d")
    assert export("latest", "--average", "2") == ExitCode.USAGE
    assert "there are 1 (steps: 4)" in " ".join(capsys.readouterr().err.split())
