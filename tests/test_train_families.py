"""Models of other families through train.py: saved, resumed, recomputed, sharded, loaded again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY
from tests.sample_models import FAMILIES, write_model
from tests.test_train import state_differences, train_on_ranks
from tests.test_train_sharded import assert_near
from utils.checkpoints.layout import read_json
from utils.tracking.metrics_log import read_metrics

Train = Callable[..., int]
SETTINGS = ("logging_steps=1", "save_steps=4", "checkpoint_uri=", "learning_rate=3e-3")


def checkpoint(tmp_path: Path, folder: str, step: int = 6) -> Path:
    return tmp_path / folder / "checkpoints" / f"checkpoint-epoch0-step{step}-files0"


def losses(tmp_path: Path, folder: str) -> list[float]:
    return read_metrics(tmp_path / folder / "logs/metrics.jsonl").series("loss")[1]


@pytest.fixture
def run_family(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Call train.py with the file of a family; its sizes are the file's own."""
    sizes = tuple(setting for setting in TINY if not setting.startswith("model_overrides."))
    for module in ("tests.conftest", "tests.test_train"):
        monkeypatch.setattr(f"{module}.TINY", sizes)

    def run(
        family: str, *words: str, folder: str = "run", settings: tuple[str, ...] = (), **values: Any
    ) -> int:
        path = write_model(tmp_path, family, **values)
        given = (*SETTINGS, f"model={path}", *settings)
        return run_train("--max-steps", "6", *words, folder=folder, settings=given)

    return run


def check_resumed(
    run_family: Callable[..., int],
    tmp_path: Path,
    family: str,
    settings: tuple[str, ...] = (),
    **values: Any,
) -> None:
    """A straight run and one that stopped in between are the same, and are a plain HF model."""
    from transformers import AutoModelForCausalLM

    assert run_family(family, folder="straight", settings=settings, **values) == 0
    assert run_family(family, "--stop-after", "3", settings=settings, **values) == 0
    assert run_family(family, "--resume", "latest", settings=settings, **values) == 0
    last = checkpoint(tmp_path, "run")
    assert not state_differences(checkpoint(tmp_path, "straight"), last)
    assert losses(tmp_path, "run") == losses(tmp_path, "straight")
    model, info = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == FAMILIES[family]["model_type"]
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", ("mask_documents=true", "pad_vocab_to_multiple_of=100")),
        ("llama", ("gradient_checkpointing=true", "gradient_checkpointing_policy=selective")),
        pytest.param("mistral", (), marks=pytest.mark.slow),
        pytest.param("olmo2", ("gradient_checkpointing=true",), marks=pytest.mark.slow),
        pytest.param("qwen3", ("loss_implementation=model",), marks=pytest.mark.slow),
    ],
)
def test_a_family_stops_resumes_and_loads(
    run_family: Callable[..., int], tmp_path: Path, family: str, settings: tuple[str, ...]
) -> None:
    check_resumed(run_family, tmp_path, family, settings)


def test_a_resume_compares_the_model_and_not_the_name_of_its_file(
    run_family: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_family("llama", "--stop-after", "2") == 0
    moved = tmp_path / "moved.json"
    shutil.copy(write_model(tmp_path, "llama", torch_dtype="bfloat16"), moved)
    on = ("--resume", "latest", "--stop-after", "3")
    assert run_family("llama", *on, settings=(f"model={moved}",)) == 0
    assert "Changed since the checkpoint: model: " in capsys.readouterr().out
    # The same file, with another content; its weights have the same shapes.
    saved = read_json(moved)
    moved.write_text(json.dumps({**saved, "rms_norm_eps": 1e-3}))
    assert run_family("llama", *on, settings=(f"model={moved}",)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "the model's rms_norm_eps: 1e-06 -> 0.001" in error
    # An override that says what the file said.
    moved.unlink()
    settings = (f"model={tmp_path / 'llama.json'}", "model_overrides.hidden_size=32")
    assert run_family("llama", *on, "--max-steps", "6", settings=settings) == 0


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("bert", "This bert is no causal language model"), ("vit", "vit is no causal language model")],
)
def test_a_file_that_cannot_be_trained_is_exit_code_2(
    run_family: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    model_type: str,
    reason: str,
) -> None:
    assert run_family("llama", model_type=model_type) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert reason in error
    assert "Traceback" not in error


def test_a_file_is_found_beside_the_run_and_in_the_project(
    run_family: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    write_model(tmp_path / "run", "llama")
    assert run_family("llama", "--dry-run", "--quiet", settings=("model=llama.json",)) == 0
    write_model(tmp_path, "gpt2")
    (tmp_path / "run.sh").touch()  # what a clone has and an installed copy has not
    monkeypatch.setattr("configs.config_files.PROJECT_DIRECTORY", tmp_path)
    assert run_family("llama", "--dry-run", "--quiet", settings=("model={project}/gpt2.json",)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tied_weights_are_shared_among_ranks(
    run_family: Callable[..., int], sample_data: Path, tmp_path: Path, family: str
) -> None:
    settings = ("global_batch_size=4", "per_device_train_batch_size=1")
    assert run_family(family, folder="one", settings=settings) == 0
    path = write_model(tmp_path, family)
    given = (*SETTINGS, *settings, f"data_uri={sample_data}", f"model={path}", "sharding=fsdp2")
    for words in (("--stop-after", "4"), ("--resume", "latest")):
        told = train_on_ranks(tmp_path / "two", 2, "--max-steps", "6", *words, settings=given)
    assert "FSDP2 over 2 ranks" in told
    assert_near(checkpoint(tmp_path, "two"), checkpoint(tmp_path, "one"))
    # And back into one process.
    shutil.copytree(tmp_path / "two", tmp_path / "back")
    words = ("--resume", "latest", "--max-steps", "8")
    assert run_family(family, *words, folder="back", settings=settings) == 0
