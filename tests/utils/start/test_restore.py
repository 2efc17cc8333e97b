"""What an attempt looks at before it begins."""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from configs.config_changes import ConfigChanges
from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.errors import CheckpointError
from utils.checkpoint_utils import seed_random_state
from utils.checkpoints.layout import RunIdentity
from utils.start.restore import begin, judge_changes, require_shared_directory
from utils.start.resume import Plan
from utils.training_utils import set_determinism


def test_one_process_shares_its_directory_with_itself(tmp_path: Path) -> None:
    require_shared_directory(tmp_path / "checkpoints", "0a1b")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_rank_that_does_not_see_the_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "gather_to_main", lambda seen: [seen, True, False])
    with pytest.raises(CheckpointError, match="Rank 2 does not see output_dir .* of rank 0"):
        require_shared_directory(tmp_path, "0a1b")
    assert not list(tmp_path.iterdir())


def drawn() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_each_rank_of_a_new_run_draws_other_numbers_and_the_same_each_time(tmp_path: Path) -> None:
    config = TrainingConfig(output_dir=str(tmp_path), seed=7)

    def numbers(rank: int) -> tuple[float, ...]:
        set_determinism(config)
        state: Any = SimpleNamespace(accelerator=SimpleNamespace(process_index=rank))
        plan, data = Plan(RunIdentity("a" * 8)), SimpleNamespace()
        begin(plan, config, state, data, Namespace(accept_missing_random_state=False))  # type: ignore[arg-type]
        return drawn()

    found = [numbers(rank) for rank in range(3)]
    assert [numbers(rank) for rank in range(3)] == found
    assert all(len(set(each)) == 3 for each in zip(*found, strict=True))
    set_determinism(config)
    assert drawn() == found[0]  # one process draws what it always drew


def test_random_states_are_seeded_from_seed_step_and_rank() -> None:
    def numbers(*words: int) -> tuple[float, ...]:
        seed_random_state(*words)
        return drawn()

    cases = [(7, 4, 0), (7, 4, 1), (7, 5, 0), (8, 4, 0)]
    found = [numbers(*case) for case in cases]
    assert [numbers(*case) for case in cases] == found
    assert all(len(set(each)) == 4 for each in zip(*found, strict=True))


REGION = {"use_regional_compilation": ""}
DRAWN = " (dropout draws other numbers)"


@pytest.mark.parametrize(
    ("free", "guarded", "of_model", "draws", "compiles", "wanted_free", "wanted_guarded"),
    [
        # Another name of the same model, the same name of another one, and both.
        ({}, {"model": "", "seed": ""}, {}, False, False, {"model": ""}, {"seed": ""}),
        ({}, {}, {"n": "1 -> 2"}, False, False, {}, {"the model's n": "1 -> 2"}),
        ({}, {"model": ""}, {"n": "1 -> 2"}, False, False, {}, {"model": ""}),
        ({}, {"model": ""}, None, False, False, {}, {"model": ""}),
        # How a model is computed changes nothing but what dropout draws.
        ({"torch_compile": ""}, {}, {}, False, True, {"torch_compile": ""}, {}),
        ({"torch_compile": ""}, {}, {}, True, True, {}, {"torch_compile": DRAWN}),
        ({"attn_implementation": ""}, {}, {}, True, False, {}, {"attn_implementation": DRAWN}),
        (REGION, {}, {}, True, True, {}, {"use_regional_compilation": DRAWN}),
        (REGION, {}, {}, True, False, REGION, {}),
        ({"save_steps": ""}, {}, {}, True, True, {"save_steps": ""}, {}),
    ],
)
def test_changes_are_judged_by_the_model_that_they_come_to(
    free: dict[str, str],
    guarded: dict[str, str],
    of_model: dict[str, str] | None,
    draws: bool,
    compiles: bool,
    wanted_free: dict[str, str],
    wanted_guarded: dict[str, str],
) -> None:
    changes = ConfigChanges({}, {**free}, {**guarded})
    judge_changes(changes, of_model, has_dropout=draws, is_compiled=compiles)
    assert changes == ConfigChanges({}, wanted_free, wanted_guarded)
