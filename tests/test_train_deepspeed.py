"""DeepSpeed ZeRO: the curve of one process, and checkpoints that go to any other strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed, an extra, is not installed")

from tests.test_train_sharded import (  # noqa: E402
    SETTINGS,
    assert_near,
    assert_same_curve,
    checkpoint,
    run_ranks,
)
from utils.checkpoint_store import verify_checkpoint  # noqa: E402

__all__ = ["run_ranks"]
Train = Callable[..., int]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["sharding=zero1", "sharding=zero2"])
def test_two_ranks_divide_the_state_and_one_goes_on(
    run_train: Train, run_ranks: Callable[..., str], tmp_path: Path, sharding: str
) -> None:
    settings = (*SETTINGS, "save_steps=3")
    assert run_train("--max-steps", "6", folder="one", settings=settings) == 0
    told = run_ranks(
        2, "--max-steps", "6", "--stop-after", "3", settings=(sharding, "save_steps=3")
    )
    print(told)
    saved = checkpoint(tmp_path, 3)
    manifest = verify_checkpoint(saved)
    assert manifest.world_size == 2
    assert_near(saved, checkpoint(tmp_path, 3, "one"))
    assert run_train("--max-steps", "6", "--resume", "latest", settings=settings) == 0
    assert_same_curve(tmp_path, "one", "run")
    assert_near(checkpoint(tmp_path, 6), checkpoint(tmp_path, 6, "one"))
