"""The planner as a user calls it."""

from __future__ import annotations

import json

import pytest

from scripts.plan_scaling import main


def test_a_plan_shows_what_fits_and_what_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "pythia-6.9b", "--gpus", "8", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("  ") and "GiB" in line]
    assert [(row[0], row[1]) for row in rows[:2]] == [("ddp", "8"), ("zero1", "8")]
    assert all("does not fit" in " ".join(row) for row in rows[:2])
    assert len(rows) == 10
    assert "estimates" in lines[0]
    assert lines[-1] == "Tokens: 137.1 B. Checkpoint: 76.6 GiB."


def test_json_has_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu=h200", "--gpus=8", "--strategy=fsdp", "--price=2", "--tokens=1e9", "--json"]
    assert main([*arguments, "--micro-batch", "4", "--checkpointing", "full"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (plan,) = answer["plans"]
    assert (plan["micro_batch"], plan["accumulation"], plan["checkpointing"]) == (4, 32, "full")
    assert plan["dollars"] == pytest.approx(2 * plan["gpu_hours"])
    assert plan["run_seconds"] == pytest.approx(1e9 / plan["tokens_per_second"])
    assert answer["run"]["tokens"] == 1e9


def test_the_efficiency_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    def mfu(*arguments: str) -> float:
        assert main(["--gpus", "64", "--strategy", "fsdp", "--json", *arguments]) == 0
        return float(json.loads(capsys.readouterr().out)["plans"][0]["mfu"])

    assert 0.2 < mfu("--efficiency", "0.25") < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus must be 1 to"),
        (["--gpus", "3"], "cannot be shared by 3 GPUs"),
        (["--micro-batch", "3"], "does not divide the 128 samples"),
        (["--efficiency", "1.5"], "a share of the peak"),
        (["--efficiency", "nan"], "--efficiency must be above 0"),
        (["--price", "-1"], "--price must be above 0"),
        (["--tokens", "inf"], "--tokens must be above 0"),
        (["--sequence-length", "0"], "--sequence-length must be"),
        (["--global-batch", "0"], "cannot be shared"),
        (["--gpu", "H101"], "H100, H200, A100, L4, T4"),
        (["--model", ""], "model is empty"),
        (["--model", "gpt-5"], "not a known preset"),
        (["--model", "pythia-6.9"], "Did you mean pythia-6.9b"),
    ],
)
def test_wrong_words_get_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
