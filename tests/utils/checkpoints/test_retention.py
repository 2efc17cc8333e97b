"""Which checkpoints go: a table of every rule, and what holds whatever the facts are."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.checkpoints.retention import Action, CheckpointFacts, keep_reasons, plan_retention

LETTERS = {"keep": "k", "delete": "d", "supersede": "s"}


def facts(step: int, marks: str) -> CheckpointFacts:
    return CheckpointFacts(
        f"step{step}",
        step,
        is_best="b" in marks,
        is_verified="v" in marks,
        is_uploading="u" in marks,
    )


def plan(
    marks: str,
    keep: int = 1,
    max_unverified: int = 3,
    is_uploading_on: bool = True,
    every: int | None = None,
) -> tuple[str, list[str]]:
    """Return one letter a checkpoint and the reasons; `marks` are the facts, oldest first."""
    checkpoints = [facts(step, word) for step, word in enumerate(marks.split())]
    random.Random(0).shuffle(checkpoints)
    decisions = plan_retention(
        checkpoints,
        keep_checkpoints=keep,
        max_unverified=max_unverified,
        is_uploading_on=is_uploading_on,
        keep_every_steps=every,
    )
    assert [decision.name for decision in decisions] == [
        f"step{step}" for step in range(len(checkpoints))
    ]
    letters = "".join(LETTERS[decision.action.value] for decision in decisions)
    return letters, [decision.reason for decision in decisions]


# The ladder that this machine and the bucket share.
@pytest.mark.parametrize(
    ("marks", "keep", "every", "reasons"),
    [
        ("", 1, None, []),
        ("-", 1, None, ["latest"]),
        ("- - -", 1, None, [None, None, "latest"]),
        ("- - -", 2, None, [None, "newest 2", "latest"]),
        ("b - -", 1, None, ["best", None, "latest"]),
        ("u - -", 1, None, ["uploading", None, "latest"]),
        ("- - - -", 1, 2, ["every 2 steps", None, "every 2 steps", "latest"]),
        ("bu u u", 3, 2, ["best", "newest 3", "latest"]),
        ("u u bu", 1, 1, ["every 1 steps", "every 1 steps", "latest"]),
    ],
)
def test_the_first_rule_that_keeps_is_told(
    marks: str, keep: int, every: int | None, reasons: list[str | None]
) -> None:
    checkpoints = [facts(step, word) for step, word in enumerate(marks.split())]
    found = list(keep_reasons(checkpoints[::-1], keep=keep, keep_every_steps=every))
    assert [one for one, _ in found] == checkpoints
    assert [reason for _, reason in found] == reasons


# b best, v verified, u uploading, - none of these.
@pytest.mark.parametrize(
    ("marks", "options", "letters"),
    [
        ("-", {}, "k"),
        ("v v v v", {}, "dddk"),
        ("v v v v", {"keep": 2}, "ddkk"),
        ("vb v v v", {}, "kddk"),
        ("v vb v v", {"keep": 2}, "dkkk"),
        ("vu v v v", {}, "kddk"),
        ("- v v v", {}, "kddk"),
        ("- - - - - -", {}, "sskkkk"),
        ("- - - - - -", {"max_unverified": 1}, "sssskk"),
        ("- - - - - - -", {"keep": 3}, "skkkkkk"),
        ("-b - - - - -", {}, "kskkkk"),
        ("-u - - - - -", {}, "kskkkk"),
        ("- v - v - v - v -", {}, "sdkdkdkdk"),
        ("- - - - v", {"is_uploading_on": False}, "ddddk"),
        ("-b - - - -", {"is_uploading_on": False, "keep": 2}, "kddkk"),
        ("-u - - -", {"is_uploading_on": False}, "kddk"),
        ("v v v v v v v v", {"every": 3}, "kddkddkk"),
        ("- - - - - - - -", {"every": 2, "max_unverified": 2}, "kskkkkkk"),
    ],
)
def test_rules(marks: str, options: dict[str, int], letters: str) -> None:
    assert plan(marks, **options)[0] == letters


def test_every_deletion_and_every_wait_says_why() -> None:
    assert plan("- - - - v -")[1] == [
        "more than 3 wait for the bucket",
        *["not verified in the bucket yet"] * 3,
        "verified in the bucket",
        "latest",
    ]
    assert plan("- -", is_uploading_on=False)[1] == ["uploading is off", "latest"]


@given(
    marks=st.lists(st.sets(st.sampled_from("bvu")).map("".join), max_size=12),
    keep=st.integers(1, 4),
    max_unverified=st.integers(1, 4),
    is_uploading_on=st.booleans(),
    order=st.randoms(),
)
def test_what_must_never_happen_never_happens(
    marks: list[str], keep: int, max_unverified: int, is_uploading_on: bool, order: random.Random
) -> None:
    checkpoints = [facts(step, word) for step, word in enumerate(marks)]
    by_name = {checkpoint.name: checkpoint for checkpoint in checkpoints}
    order.shuffle(checkpoints)
    decisions = plan_retention(
        checkpoints,
        keep_checkpoints=keep,
        max_unverified=max_unverified,
        is_uploading_on=is_uploading_on,
    )
    assert sorted(decision.name for decision in decisions) == sorted(by_name)
    gone = [by_name[d.name] for d in decisions if d.action is not Action.KEEP]
    kept = [by_name[d.name] for d in decisions if d.action is Action.KEEP]
    superseded = [by_name[d.name] for d in decisions if d.action is Action.SUPERSEDE]
    newest = sorted(by_name.values(), key=lambda checkpoint: checkpoint.step)[-keep:]

    for checkpoint in gone:
        assert not checkpoint.is_best
        assert not checkpoint.is_uploading
        assert checkpoint not in newest
    waiting = [
        c
        for c in by_name.values()
        if not (c.is_best or c.is_uploading or c.is_verified or c in newest)
    ]
    if not is_uploading_on:
        assert superseded == []
        return
    assert {c.name for c in gone if not c.is_verified} == {c.name for c in superseded}
    assert len(superseded) == max(0, len(waiting) - max_unverified)
    # The oldest go, and so much stays that a dead bucket cannot fill the disk.
    kept_waiting = [c.step for c in waiting if c not in superseded]
    assert all(c.step < step for c in superseded for step in kept_waiting)
    special = sum(c.is_best or c.is_uploading for c in by_name.values())
    assert len(kept) <= keep + max_unverified + special
