"""DeepSpeed ZeRO: the curve of one process, and checkpoints that go to any other strategy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_train import differences
from tests.test_train_sharded import (
    FSDP2,
    SETTINGS,
    SPOILED,
    assert_near,
    assert_same_bits,
    assert_same_curve,
    checkpoint,
    curves,
    run_ranks,
    write_program,
)
from utils.checkpoints.layout import read_manifest
from utils.checkpoints.state_files import read_optimizer, read_weights

__all__ = ["run_ranks"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed, which is optional, is not installed",
    ),
]
Train = Callable[..., int]
ZERO1, ZERO2 = "sharding=zero1", "sharding=zero2"


def test_a_checkpoint_moves_between_all_strategies(
    run_train: Train, run_ranks: Callable[..., str], tmp_path: Path
) -> None:
    last = ("--max-steps", "12")
    assert run_train(*last, folder="one", settings=(*SETTINGS, "save_steps=100")) == 0
    run_ranks(4, *last, "--stop-after", "2", settings=(ZERO2,))
    on = (*last, "--resume", "latest")
    told = run_ranks(2, *on, "--stop-after", "4", settings=(FSDP2,))
    assert "was written by 4 ranks, now there are 2" in told
    run_ranks(2, *on, "--stop-after", "6", settings=(ZERO1,))  # from parts of fully_shard
    run_ranks(2, *on, "--stop-after", "8")  # DDP
    run_ranks(4, *on, "--stop-after", "10", settings=(ZERO2,))  # from whole tensors
    assert run_train(*on, settings=SETTINGS) == 0
    assert_same_curve(tmp_path, "one", "run")
    assert_near(checkpoint(tmp_path, 12), checkpoint(tmp_path, 12, "one"))


@pytest.mark.parametrize("options", [(ZERO1,), (ZERO2, "bf16=true")])
def test_stopped_and_resumed_is_the_same_to_the_bit(
    run_ranks: Callable[..., str], tmp_path: Path, options: tuple[str, ...]
) -> None:
    settings = (*options, "save_steps=3", "model_overrides.hidden_dropout=0.1")
    run_ranks(2, "--max-steps", "6", folder="straight", settings=settings)
    run_ranks(2, "--max-steps", "6", "--stop-after", "3", settings=settings)
    run_ranks(2, "--max-steps", "6", "--resume", "latest", settings=settings)
    assert curves(tmp_path, "straight") == curves(tmp_path, "run")
    assert_same_bits(checkpoint(tmp_path, 6, "straight"), checkpoint(tmp_path, 6))


# The way of a GPU: the optimizer obeys on the device; every wait for it is counted.
ON_DEVICE = """
import os
from utils.run import run as training_run
from torch.utils._python_dispatch import TorchDispatchMode

step, counts = training_run.train_step, []

class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))

def watched(state, *words):
    state.guard.is_on_device = True
    with Waits() as waits:
        step(state, *words)
    counts.append(waits.found)
    if len(counts) == 6 and os.environ["RANK"] == "0":
        print("WAITS", counts, flush=True)

training_run.train_step = watched
"""


@pytest.mark.parametrize("options", [(ZERO1,), (ZERO2,), (ZERO2, "bf16=true")])
def test_a_step_waits_no_more_than_ddps_and_a_bad_one_changes_nothing(
    run_ranks: Callable[..., str], tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Step 4 of 6 is bad, obeyed on the device: it leaves weights and moments as step 3 did."""
    settings = (*options, "save_steps=1", "bad_step=skip", "keep_checkpoints=9")
    both = write_program(tmp_path / "both.py", SPOILED + ON_DEVICE)
    waits = []
    for folder, how in (("ddp", settings[len(options) :]), ("device", settings)):
        told = run_ranks(2, "--max-steps", "6", folder=folder, settings=how, program=both)
        waits.append(next(line for line in told.splitlines() if line.startswith("WAITS")))
    assert waits[0] == waits[1]  # those of transformers and the loss on a CPU
    assert "Step 4 is bad: non-finite" in told
    three, four, five = (checkpoint(tmp_path, step, "device") for step in (3, 4, 5))
    for read in (read_weights, read_optimizer):
        states = [read(path, read_manifest(path)) for path in (three, four, five)]
        for state in states:
            state.pop("param_groups", None)  # the schedule goes on
        assert not differences(states[0], states[1])
        assert differences(states[1], states[2])

    host = write_program(tmp_path / "host.py", SPOILED)
    run_ranks(2, "--max-steps", "6", folder="host", settings=settings, program=host)
    assert curves(tmp_path, "host") == curves(tmp_path, "device")
