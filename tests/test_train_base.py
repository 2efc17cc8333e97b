"""A run that begins with a trained model (`init_from`), as a user runs it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub.constants import HF_HUB_CACHE

from scripts import checkpoint_viewer, evaluate, export_model
from tests.conftest import call_train
from tests.test_train import state_differences, train_on_ranks
from tests.utils.models.test_tokenizer import write_tokenizer
from utils.base.errors import ExitCode
from utils.checkpoints.layout import read_json
from utils.start import resume
from utils.tracking.metrics_log import read_metrics

Train = Callable[..., int]
# What conftest's model is comes from init_from, and must not be said twice.
ALONE = ("model=", "report_to=[]", "init_from=../base/checkpoints/checkpoint-epoch0-step4-files0")


@pytest.fixture
def base(trained_run: Path, tmp_path: Path) -> Path:
    """The newest checkpoint of a copy of the trained run, in the folder `base`."""
    shutil.copytree(trained_run, tmp_path / "base")
    return next((tmp_path / "base" / "checkpoints").glob("*step4*"))


def newest(tmp_path: Path, folder: str = "run") -> Path:
    return max((tmp_path / folder / "checkpoints").glob("*step*"))


def put_on_hub(folder: Path, name: str, revision: str) -> None:
    """Put a model where the Hub's client finds it without a network."""
    repository = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)


@pytest.mark.parametrize("place", ["directory", "bucket", "folder", "hub"])
def test_the_first_validation_loss_is_that_of_the_model(
    place: str,
    base: Path,
    run_train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert evaluate.main([str(base), "--like-training", "--json", "--device", "cpu"]) == 0
    expected = json.loads(capsys.readouterr().out)["evaluations"][0]["values"]["loss"]
    init_from = str(base)
    if place == "bucket":
        init_from = str(tmp_path / "base" / "bucket" / "latest")
        shutil.rmtree(base.parent)
    elif place in ("folder", "hub"):
        init_from = str(tmp_path / "exported")
        assert export_model.main([str(base), "--output", init_from, "--device", "cpu"]) == 0
    if place == "hub":
        put_on_hub(Path(init_from), "someone/begun", "1234abcd" * 5)
        init_from = "someone/begun"
    settings = (*ALONE, f"init_from={init_from}", "logging_steps=1")
    assert run_train("--max-steps", "2", settings=settings) == 0
    steps, losses = read_metrics(tmp_path / "run/logs/metrics.jsonl").series("validation_loss")
    assert list(steps) == [0, 2]
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    metadata = read_json(newest(tmp_path) / "metadata.json")
    assert metadata["training_progress"]["tokens_seen"] == 256
    assert metadata["base"].get("revision") == ("1234abcd" * 5 if place == "hub" else None)


def test_every_rank_begins_with_its_rows_of_the_model(
    base: Path, sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(base), "--like-training", "--json", "--device", "cpu"]) == 0
    expected = json.loads(capsys.readouterr().out)["evaluations"][0]["values"]["loss"]
    settings = (f"data_uri={sample_data}", *ALONE, "sharding=fsdp2", "checkpoint_uri=")
    train_on_ranks(tmp_path / "run", 2, "--max-steps", "1", settings=settings)
    _, losses = read_metrics(tmp_path / "run/logs/metrics.jsonl").series("validation_loss")
    assert losses[0] == pytest.approx(expected, rel=1e-6)


def test_a_run_goes_on_without_the_model_it_began_with(
    base: Path,
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--max-steps", "4")
    assert run_train(*words, folder="straight", settings=ALONE) == 0
    assert run_train(*words, "--stop-after", "2", settings=ALONE) == 0
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # another machine: the bucket alone has it
    looks = Mock(wraps=resume.read_remote_checkpoints)
    monkeypatch.setattr(resume, "read_remote_checkpoints", looks)
    assert run_train(*words, "--resume", "latest", settings=ALONE) == 0
    assert looks.call_count == 2  # before the checks, and once directory and bucket are held
    assert not state_differences(newest(tmp_path, "straight"), newest(tmp_path))

    found = read_json(newest(tmp_path) / "metadata.json")["base"]
    assert (found["name"], found["step"]) == (base.name, 4)
    capsys.readouterr()
    assert checkpoint_viewer.main(["view", "latest"]) == 0
    assert f"Initialized From: {base.name}" in capsys.readouterr().out
    target = tmp_path / "exported"
    assert export_model.main(["latest", "--output", str(target), "--device", "cpu"]) == 0
    card = (target / "README.md").read_text("utf-8")
    assert f"beginning with {base.name}" in card.replace("\\", "")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model=gpt2", "model gpt2 is another one than that of init_from"),
        ("model_overrides.hidden_size=64", "change the shape of"),
        ("pad_vocab_to_multiple_of=1000", "(512, 32) in init_from"),
        ("init_from=latest", "name a checkpoint with its directory or bucket"),
        ("init_from=../missing/model", "there is no such directory, checkpoint or bucket"),
        ("init_from=someone/some-model", "the Hugging Face Hub does not give it"),
        ("init_from=../base/checkpoints/quantized", "is quantized: only weights of whole"),
    ],
)
def test_what_is_not_the_model_is_refused(
    setting: str,
    words: str,
    base: Path,
    run_train: Train,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    quantized = {**read_json(base / "config.json"), "quantization_config": {"bits": 4}}
    (base / "../quantized").mkdir()
    (base / "../quantized/config.json").write_text(json.dumps(quantized), "utf-8")
    assert run_train("--max-steps", "2", settings=(*ALONE, setting)) == ExitCode.USAGE
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_data_need_the_tokenizer_of_the_model(
    base: Path,
    run_train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported = tmp_path / "exported"
    assert export_model.main([str(base), "--output", str(exported), "--device", "cpu"]) == 0
    for words in ((), ("--config", "test")):
        assert run_train(*words, "--resume", str(exported)) == ExitCode.USAGE
        told = " ".join(capsys.readouterr().err.split())
        assert f"To begin a new run with this model: --set init_from={exported}." in told
    write_tokenizer(exported, {"tokenizer_class": "PreTrainedTokenizerFast"})
    settings = (*ALONE, f"init_from={exported}")
    assert run_train("--max-steps", "2", settings=settings) == ExitCode.PREFLIGHT
    text = " ".join(capsys.readouterr().err.split())
    assert "init_from: The data were made with another tokenizer than exported: token" in text
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (exported / name).unlink()
    assert run_train("--max-steps", "2", settings=settings) == 0
    told = capsys.readouterr().out
    assert "exported has no tokenizer: make sure that" in " ".join(told.split())
    # What goes on needs no model to begin with, and says the length once.
    longer = shlex.split(told.splitlines()[-1])
    assert not [word for word in longer if word.startswith("init_from=")]
    shutil.rmtree(exported)
    monkeypatch.chdir(tmp_path / "run")
    assert call_train([*longer[2:], "--dry-run"]) == 0


def test_another_model_is_no_going_on(
    base: Path, run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train("--max-steps", "2", settings=ALONE) == 0
    shutil.copytree(base, tmp_path / "other" / base.name)
    changed = (*ALONE, f"init_from=../other/{base.name}")
    words = ("--max-steps", "4", "--resume", "latest")
    assert run_train(*words, settings=changed) == ExitCode.USAGE
    assert "trained with another configuration: init_from:" in capsys.readouterr().err
    accepted: Any = (*words, "--accept-config-change")
    assert run_train(*accepted, settings=changed) == 0
