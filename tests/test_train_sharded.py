"""Ranks that hold parts of the state: the curve of one process, checkpoints that move both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scripts import consolidate_checkpoint
from tests.test_train import TRAIN, differences, load, state_differences, train_on_ranks
from tests.test_train_recovery import batches
from utils.checkpoints.layout import find_checkpoints, read_json, read_manifest
from utils.checkpoints.state_files import read_optimizer, read_weights
from utils.checkpoints.store import verify_checkpoint
from utils.remote.loading import ModelSource, load_model
from utils.tracking.metrics_log import read_metrics

Train = Callable[..., int]
FSDP2 = "sharding=fsdp2"
ADAMW_STATE, MUON_STATE = ["step", "exp_avg", "exp_avg_sq"], ["momentum_buffer"]
# Rows that no number of ranks divides evenly: 515, 33, 66, and 1 in no bias of some ranks.
SETTINGS = (
    "logging_steps=1",
    "record_batches=true",
    "checkpoint_uri=",
    "global_batch_size=8",
    "per_device_train_batch_size=1",
    "model_overrides.vocab_size=515",
    "model_overrides.hidden_size=33",
    "model_overrides.num_attention_heads=3",
    "model_overrides.intermediate_size=66",
    "model_overrides.rotary_pct=0.5",
    "max_eval_samples=7",
)


def checkpoint(tmp_path: Path, step: int, folder: str = "run") -> Path:
    return tmp_path / folder / "checkpoints" / f"checkpoint-epoch0-step{step}-files0"


def curves(tmp_path: Path, folder: str) -> dict[str, tuple[list[int], list[float]]]:
    metrics = read_metrics(tmp_path / folder / "logs/metrics.jsonl")
    return {key: metrics.series(key) for key in ("loss", "grad_norm")}


def assert_same_bits(one: Path, other: Path) -> None:
    """Compare two checkpoints in parts: weights, moments, random states, schedule."""
    names = sorted(read_manifest(one).files)
    assert names == sorted(read_manifest(other).files)
    for name in names:
        if "part" in name:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        elif name.startswith(("optimizer", "random", "scheduler.")):
            assert not differences(load(one / name), load(other / name)), name


def assert_same_curve(tmp_path: Path, left: str, right: str) -> None:
    one, other = curves(tmp_path, left), curves(tmp_path, right)
    for key in one:
        assert one[key][0] == other[key][0]
        np.testing.assert_allclose(one[key][1], other[key][1], rtol=0, atol=1e-4)
    assert batches(tmp_path, left) == batches(tmp_path, right)


def assert_near(left: Path, right: Path, tolerance: float = 1e-4) -> None:
    """Two checkpoints, each whole or in parts, hold nearly the same weights and moments."""
    one, other = (read_weights(path, read_manifest(path)) for path in (left, right))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance)
    first, second = (read_optimizer(path, read_manifest(path)) for path in (left, right))
    assert first["param_groups"] == second["param_groups"]
    assert list(first["state"]) == list(second["state"])
    for index, values in first["state"].items():
        assert list(values) == list(second["state"][index]) in (ADAMW_STATE, MUON_STATE)
        for key, tensor in values.items():
            torch.testing.assert_close(tensor, second["state"][index][key], rtol=0, atol=tolerance)


@pytest.fixture
def run_ranks(sample_data: Path, tmp_path: Path) -> Callable[..., str]:
    """Call train.py under torchrun; return what it printed."""

    def run(
        count: int,
        *words: str,
        folder: str = "run",
        settings: tuple[str, ...] = (),
        program: Path = TRAIN,
    ) -> str:
        given = (f"data_uri={sample_data}", *SETTINGS, *settings)
        return train_on_ranks(tmp_path / folder, count, *words, settings=given, program=program)

    return run


def test_two_ranks_share_the_state_and_one_goes_on_also_from_parts_put_together(
    run_train: Train,
    run_ranks: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = (*SETTINGS, "save_steps=3")
    assert run_train("--max-steps", "6", folder="one", settings=settings) == 0
    told = run_ranks(2, "--max-steps", "6", "--stop-after", "3", settings=(FSDP2, "save_steps=3"))
    assert "FSDP2 over 2 ranks (sharding=fsdp2)" in told
    saved = checkpoint(tmp_path, 3)
    manifest = verify_checkpoint(saved)
    assert manifest.world_size == 2
    assert {name for name in manifest.files if "part" in name or "random" in name} == {
        "model-part-00001-of-00002.safetensors",
        "model-part-00002-of-00002.safetensors",
        "optimizer-part-00001-of-00002.safetensors",
        "optimizer-part-00002-of-00002.safetensors",
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    assert not {"model.safetensors", "optimizer.bin"} & set(manifest.files)
    rows = [
        load_file(saved / f"model-part-0000{rank}-of-00002.safetensors")["lm_head.weight"]
        for rank in (1, 2)
    ]
    assert [len(part) for part in rows] == [258, 257]
    loaded = load_model(ModelSource(saved.name, str(saved), manifest), device="cpu")
    assert torch.equal(loaded.model.lm_head.weight.detach(), torch.cat(rows))
    of_one = checkpoint(tmp_path, 3, "one")
    assert_near(saved, of_one)
    words = [str(saved), "--output", str(tmp_path / "whole"), "--json"]
    capsys.readouterr()
    assert consolidate_checkpoint.main(words) == 0
    made = Path(json.loads(capsys.readouterr().out)["path"])
    again = verify_checkpoint(made)
    assert again.identity == manifest.identity
    assert {*again.files, "random_states_1.pkl"} == {
        *read_manifest(of_one).files,
        "random_states_1.pkl",
    }
    for read in (read_weights, read_optimizer):
        assert not differences(read(made, again), read(saved, manifest))
    assert_near(made, of_one)
    AutoModelForCausalLM.from_pretrained(made)
    on = ("--max-steps", "6", "--resume")
    assert run_train(*on, str(made), folder="whole-run", settings=settings) == 0
    assert run_train(*on, "latest", settings=settings) == 0
    assert_same_curve(tmp_path, "one", "run")
    ends = [checkpoint(tmp_path, 6, folder) for folder in ("run", "whole-run", "one")]
    assert not state_differences(*ends[:2])
    assert_near(ends[0], ends[2])
    assert consolidate_checkpoint.main(words) == 2
    assert "is there already" in capsys.readouterr().err
    assert consolidate_checkpoint.main([str(of_one)]) == 2
    assert "is not in parts" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_moves_between_any_ranks_sharded_or_not(
    run_train: Train, run_ranks: Callable[..., str], tmp_path: Path
) -> None:
    last = ("--max-steps", "12")
    assert run_train(*last, folder="one", settings=(*SETTINGS, "save_steps=100")) == 0
    run_ranks(4, *last, "--stop-after", "2", settings=(FSDP2,))
    on = (*last, "--resume", "latest")
    told = run_ranks(2, *on, "--stop-after", "4", settings=(FSDP2,))
    assert "was written by 4 ranks, now there are 2" in told
    assert run_train(*on, "--stop-after", "6", settings=SETTINGS) == 0
    run_ranks(4, *on, "--stop-after", "8", settings=(FSDP2,))
    run_ranks(4, *on, "--stop-after", "10")  # from parts into DDP
    told = run_ranks(4, *on, settings=(FSDP2, "reshard_after_forward=false"))  # and back
    assert "random states are seeded anew" not in told
    assert_same_curve(tmp_path, "one", "run")
    assert_near(checkpoint(tmp_path, 12), checkpoint(tmp_path, 12, "one"))


@pytest.mark.slow
def test_muon_sees_whole_matrices_where_ranks_share_them(
    run_train: Train, run_ranks: Callable[..., str], tmp_path: Path
) -> None:
    settings = ("optim=muon", "learning_rate=1e-3", "save_steps=2")
    on = ("--max-steps", "4", "--resume", "latest")
    assert run_train(*on, folder="one", settings=(*SETTINGS, *settings)) == 0
    run_ranks(2, *on, "--stop-after", "2", settings=(FSDP2, *settings))
    assert run_train(*on, settings=(*SETTINGS, *settings)) == 0  # from parts
    assert_same_curve(tmp_path, "one", "run")
    for step in (2, 4):
        assert_near(checkpoint(tmp_path, step), checkpoint(tmp_path, step, "one"))


@pytest.mark.slow
def test_stopped_and_resumed_is_the_same_to_the_bit(
    run_ranks: Callable[..., str], tmp_path: Path
) -> None:
    settings = (FSDP2, "save_steps=3", "model_overrides.hidden_dropout=0.1")
    run_ranks(2, "--max-steps", "6", folder="straight", settings=settings)
    run_ranks(2, "--max-steps", "6", "--stop-after", "3", settings=settings)
    run_ranks(2, "--max-steps", "6", "--resume", "latest", settings=settings)
    assert curves(tmp_path, "straight") == curves(tmp_path, "run")
    assert_same_bits(checkpoint(tmp_path, 6, "straight"), checkpoint(tmp_path, 6))
    states = [load(checkpoint(tmp_path, 6) / f"random_states_{rank}.pkl") for rank in (0, 1)]
    assert len({tuple(one["torch_manual_seed"].tolist()) for one in states}) == 2


# Micro-step 15 of the first start is one of step 4, on the rank where it happens.
SPOILED = """
from utils import training_utils

forward, calls = training_utils.forward_loss, []

def spoiled(model, input_ids, document_end):
    loss = forward(model, input_ids, document_end)
    calls.append(loss.requires_grad)
    return loss * torch.nan if sum(calls) == 15 and loss.requires_grad else loss

training_utils.forward_loss = spoiled
"""


def write_program(path: Path, text: str) -> Path:
    """Write a train.py that something is done to first."""
    path.write_text(f"import sys, torch, train\n{text}\nsys.exit(train.main())\n")
    return path


@pytest.mark.slow
def test_a_bad_step_is_rolled_back_by_all_ranks(
    run_ranks: Callable[..., str], tmp_path: Path
) -> None:
    program = write_program(tmp_path / "bad.py", SPOILED)
    settings = (FSDP2, "save_steps=2", "bad_step=rollback", "keep_checkpoints=9")
    told = run_ranks(2, "--max-steps", "6", settings=settings, program=program)
    assert "Rolled back to checkpoint-epoch0-step2-files0 (step 2)" in told
    assert [name.step for name in find_checkpoints(checkpoint(tmp_path, 6).parent)] == [2, 4, 6]
    metadata = read_json(checkpoint(tmp_path, 6) / "metadata.json")
    assert [step["step"] for step in metadata["bad_steps"]] == [4]
    assert np.isfinite(curves(tmp_path, "run")["loss"][1]).all()
