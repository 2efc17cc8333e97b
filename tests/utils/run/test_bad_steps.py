"""Which bad step ends an attempt."""

from __future__ import annotations

from typing import Any

import pytest

from configs.training_config import TrainingConfig
from utils.run import bad_steps
from utils.training.step_guard import SPIKE, Verdict
from utils.training_utils import TrainingProgress


@pytest.mark.parametrize(
    ("policy", "earlier", "message"),
    [
        ("stop", [], "Step 2000 was bad: spike"),
        ("skip", [], None),
        ("skip", [1, 1000], None),  # too long ago
        ("skip", [1001], None),
        ("skip", [1001, 1999], "3 of the last 1000 steps were bad (max_bad_steps is 2)"),
        ("rollback", [1001, 1999], "3 of the last 1000 steps were bad"),
    ],
)
def test_one_too_many_of_the_last_steps_ends_the_attempt(
    policy: Any, earlier: list[int], message: str | None
) -> None:
    config = TrainingConfig(bad_step=policy, max_bad_steps=2)
    known = [{"step": step} for step in (*earlier, 2000)]
    verdict = Verdict(2000, SPIKE, 50.0, 1.0)
    found = bad_steps.find_divergence(verdict, TrainingProgress(step=2000, bad_steps=known), config)
    assert found is None if message is None else message in str(found)
