"""Pruning keeps the newest, the best and the milestones, whatever else is there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from utils.checkpoints.retention import Action, CheckpointFacts
from utils.remote.pruning import plan_pruning


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
    facts = [CheckpointFacts(str(step), step, is_best=step == best) for step in steps]
    decisions = plan_pruning(facts, keep=keep, keep_every_steps=every)
    kept = {int(one.name) for one in decisions if one.action is Action.KEEP}
    assert {max(steps), best} <= kept
    assert set(sorted(steps)[-keep:]) <= kept
    assert all(one.action in (Action.KEEP, Action.DELETE) for one in decisions)
