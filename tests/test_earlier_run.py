"""A run that an earlier version made goes on: its formats on disk and in the bucket are a contract.

`tests/earlier_run/run` is what `train.py --max-steps 6 --stop-after 4` left there, before modules
moved into folders; `expected.json` has the tokens and losses of the same run without a stop.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import checkpoint_viewer, upload_manager
from utils.checkpoints.store import verify_checkpoint

Train = Callable[..., int]
EARLIER = Path(__file__).parent / "earlier_run"
NAMES = ["checkpoint-epoch0-step2-files0", "checkpoint-epoch0-step4-files0"]
SETTINGS = (
    "data_uri=data",
    "checkpoint_uri=bucket",
    "report_to=[]",
    "model_overrides.num_hidden_layers=1",
    "model_overrides.hidden_size=8",
    "model_overrides.num_attention_heads=2",
    "model_overrides.intermediate_size=16",
    "model_overrides.vocab_size=300",
    "sequence_length=16",
    "max_eval_samples=6",
    "sample_tokens=0",
    "warmup_steps=2",
    "save_steps=2",
    "logging_steps=1",
    "record_batches=true",
)


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the earlier run, which is the current directory."""
    folder = tmp_path / "run"
    shutil.copytree(EARLIER / "run", folder)
    journal = folder / "checkpoints" / "uploads.jsonl"  # names the bucket by its whole path
    journal.write_text(journal.read_text("utf-8").replace("/runs/a/bucket", f"{folder}/bucket"))
    monkeypatch.chdir(folder)
    return folder


def read_lines(path: Path, key: str) -> dict[str, float | str]:
    records = map(json.loads, path.read_text("utf-8").splitlines())
    return {str(record["step"]): record[key] for record in records if key in record}


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_it_is_resumed_from_its_directory_and_from_its_bucket(
    where: str, run_folder: Path, run_train: Train
) -> None:
    if where == "bucket":
        shutil.rmtree(run_folder / "checkpoints")

    words = ("--config", "test", "--max-steps", "6", "--resume", "latest", "--quiet")
    assert run_train(*words, settings=SETTINGS) == 0

    expected = json.loads((EARLIER / "expected.json").read_text("utf-8"))
    assert read_lines(run_folder / "logs" / "batches.jsonl", "crc32c") == expected["batches"]
    losses = read_lines(run_folder / "logs" / "metrics.jsonl", "loss")
    assert losses == pytest.approx(expected["losses"], abs=1e-4)
    archives = sorted(path.name for path in (run_folder / "bucket" / "Checkpoints").glob("*.gz"))
    assert archives == [f"checkpoint-epoch0-step{step}-files0.tar.gz" for step in (2, 4, 6)]


def test_its_checkpoints_are_listed_verified_and_downloaded(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--config", "test", "--set", "checkpoint_uri=bucket")
    assert upload_manager.main(["verify", "--deep", *where]) == 0
    assert upload_manager.main(["list", "--json", *where]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in NAMES)
    assert checkpoint_viewer.main(["list", "--json"]) == 0
    assert NAMES[1] in capsys.readouterr().out

    assert upload_manager.main(["download", NAMES[0], "--to", "other", *where]) == 0
    assert verify_checkpoint(run_folder / "other" / NAMES[0]).step == 2
