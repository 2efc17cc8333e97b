"""What an attempt looks at before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.config_changes import ConfigChanges
from utils.base import ranks
from utils.base.errors import CheckpointError
from utils.start.restore import judge_changes, require_shared_directory


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


MODEL, RATE = "model: a -> b", "learning_rate: 1 -> 2"
COMPILE, REGION = "torch_compile: false -> true", "use_regional_compilation: true -> false"
KERNEL = "attn_implementation: sdpa -> eager"
DRAWN = " (dropout draws other numbers)"


@pytest.mark.parametrize(
    ("free", "guarded", "of_model", "draws", "compiles", "wanted_free", "wanted_guarded"),
    [
        # Another name of the same model, the same name of another one, and both.
        ((), (MODEL, RATE), [], False, False, (MODEL,), (RATE,)),
        ((), (), ["n: 1 -> 2"], False, False, (), ("the model's n: 1 -> 2",)),
        ((), (MODEL,), ["n: 1 -> 2"], False, False, (), (MODEL,)),
        ((), (MODEL,), None, False, False, (), (MODEL,)),
        # How a model is computed changes nothing but what dropout draws.
        ((COMPILE, KERNEL), (), [], False, True, (COMPILE, KERNEL), ()),
        ((COMPILE, KERNEL), (), [], True, True, (), (COMPILE + DRAWN, KERNEL + DRAWN)),
        ((REGION,), (), [], True, True, (), (REGION + DRAWN,)),
        ((REGION,), (), [], True, False, (REGION,), ()),
        (("save_steps: 1 -> 2",), (), [], True, True, ("save_steps: 1 -> 2",), ()),
    ],
)
def test_changes_are_judged_by_the_model_that_they_come_to(
    free: tuple[str, ...],
    guarded: tuple[str, ...],
    of_model: list[str] | None,
    draws: bool,
    compiles: bool,
    wanted_free: tuple[str, ...],
    wanted_guarded: tuple[str, ...],
) -> None:
    found = judge_changes(
        ConfigChanges(free, guarded), of_model, has_dropout=draws, is_compiled=compiles
    )
    assert found == ConfigChanges(wanted_free, wanted_guarded)
