"""Pruning keeps the newest, the best and the milestones, whatever else is there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.checkpoints.retention import Action, CheckpointFacts
from utils.remote.pruning import plan_pruning


def facts(
    *steps: int, best: int | None = None, uploading: int | None = None
) -> list[CheckpointFacts]:
    return [
        CheckpointFacts(str(step), step, is_best=step == best, is_uploading=step == uploading)
        for step in steps
    ]


@pytest.mark.parametrize(
    ("checkpoints", "keep", "every", "deleted"),
    [
        (facts(), 1, None, []),
        (facts(10), 1, None, []),
        (facts(10, 20, 30), 1, None, [10, 20]),
        (facts(30, 10, 20), 2, None, [10]),
        (facts(10, 20, 30), 9, None, []),
        (facts(10, 20, 30, best=10), 1, None, [20]),
        (facts(10, 20, 30, 40), 1, 20, [10, 30]),
        (facts(10, 20, 30, uploading=20), 1, None, [10]),
    ],
)
def test_what_goes(
    checkpoints: list[CheckpointFacts], keep: int, every: int | None, deleted: list[int]
) -> None:
    decisions = plan_pruning(checkpoints, keep=keep, keep_every_steps=every)
    assert [int(one.name) for one in decisions if one.action is Action.DELETE] == deleted
    assert [int(one.name) for one in decisions] == sorted(one.step for one in checkpoints)


@given(
    steps=st.sets(st.integers(0, 1000), min_size=1, max_size=20),
    keep=st.integers(1, 25),
    every=st.none() | st.integers(1, 50),
    data=st.data(),
)
def test_the_newest_and_the_best_always_stay(
    steps: set[int], keep: int, every: int | None, data: st.DataObject
) -> None:
    best = data.draw(st.sampled_from(sorted(steps)))
    decisions = plan_pruning(facts(*steps, best=best), keep=keep, keep_every_steps=every)
    kept = {int(one.name) for one in decisions if one.action is Action.KEEP}
    assert {max(steps), best} <= kept
    assert set(sorted(steps)[-keep:]) <= kept
    assert all(one.action in (Action.KEEP, Action.DELETE) for one in decisions)
