"""The plan for the grace period: which checkpoints reach the bucket, and what is said about it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.run.grace import NEW_CHECKPOINT, GracePlan, describe_outcome, plan_grace

MB, MIB = 10**6, 2**20
NEW = NEW_CHECKPOINT


WORDS = {True: "yes", False: "no", None: "unknown"}


def fates(plan: GracePlan) -> str:
    return ", ".join(f"{upload.name} {WORDS[upload.arrives]}" for upload in plan.uploads)


# 30 s of grace, a new checkpoint of 100 MB: seconds of a save, MB/s, MB of what is pending.
@pytest.mark.parametrize(
    ("save", "rate", "pending", "expected"),
    [
        (2.0, 10, {}, "NEW yes"),
        # The newest pending one comes before the older one.
        (2.0, 10, {"old": 60, "newer": 120}, "NEW yes, newer yes, old yes"),
        (2.0, 10, {"old": 61, "newer": 120}, "NEW yes, newer yes, old no"),
        # What does not fit takes no time from what does.
        (2.0, 10, {"small": 60, "large": 900}, "NEW yes, small yes, large no"),
        (2.0, 3, {"a": 30, "b": 40}, "b yes, a yes, NEW no"),
        # To the second.
        (20.0, 10, {}, "NEW yes"),
        (20.1, 10, {}, "NEW no"),
        # Unknown is unknown, but what cannot be in time is known.
        (2.0, None, {"a": 30}, "NEW unknown, a unknown"),
        (2.0, 0, {}, "NEW unknown"),
        (None, 10, {"a": 30}, "NEW unknown, a unknown"),
        (None, 1, {"a": 20}, "a unknown, NEW no"),
        (None, None, {}, "NEW unknown"),
        (31.0, None, {"a": 1}, "NEW no, a no"),
    ],
)
def test_the_newest_that_fit_go_up_first(
    save: float | None, rate: float | None, pending: dict[str, int], expected: str
) -> None:
    waiting = [(name, size * MB) for name, size in pending.items()]
    plan = plan_grace(30.0, save, 100 * MB, None if rate is None else rate * MB, waiting)
    assert fates(plan) == expected.replace("NEW", NEW)


sizes = st.lists(st.integers(0, 10**9), max_size=5)


@given(
    grace=st.floats(0, 100),
    save=st.floats(0, 50),
    size=st.integers(0, 10**9),
    rate=st.floats(1e6, 1e9),
    pending=sizes,
)
def test_what_is_planned_fits_and_nothing_is_left_out(
    grace: float, save: float, size: int, rate: float, pending: list[int]
) -> None:
    waiting = [(f"p{number}", num_bytes) for number, num_bytes in enumerate(pending)]
    plan = plan_grace(grace, save, size, rate, waiting)
    assert {upload.name for upload in plan.uploads} == {NEW, *(name for name, _ in waiting)}
    in_time = [upload for upload in plan.uploads if upload.arrives]
    total = save + sum(upload.seconds or 0.0 for upload in in_time)
    assert not in_time or total <= grace * (1 + 1e-9)
    newest_first = [NEW, *(name for name, _ in reversed(waiting))]
    names = [upload.name for upload in in_time]
    assert names == [name for name in newest_first if name in names]
    if save + size / rate <= grace:
        assert plan.uploads[0].name == NEW
        assert plan.uploads[0].arrives


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            (30, 2.2, 16_200 * MIB, 180 * MIB),
            "30 s of grace: save checkpoint (about 2 s), then upload it (15.8 GiB at 180.0 MiB/s, "
            "about 90 s): it will not reach the bucket in time; it stays on this disk and goes up "
            "at the next start.",
        ),
        (
            (30, 0.1, 900, 1500, [("A", 1200), ("B", 400), ("C", 10**6)]),
            "30 s of grace: save checkpoint (about 1 s), then upload it (900 B at 1.5 KiB/s, "
            "about 1 s): it reaches the bucket in time. Pending, in time: B, A. Pending, up at the "
            "next start: C.",
        ),
        (
            (600, None, 5 * MIB, None, [("A", MIB)]),
            "600 s of grace: save checkpoint (unknown time), then upload it (5.0 MiB at an unknown "
            "speed): whether it reaches the bucket in time is unknown; if not, it stays on this "
            "disk and goes up at the next start. Pending, end unknown: A.",
        ),
        (
            (30, 45, 5 * MIB, 5 * MIB),
            "30 s of grace: save checkpoint (about 45 s), then upload it (5.0 MiB at 5.0 MiB/s, "
            "about 1 s): the save itself will not end in time; what was saved before is safe.",
        ),
    ],
)
def test_the_plan_is_one_line(arguments: tuple, line: str) -> None:
    assert plan_grace(*arguments).describe() == line


@pytest.mark.parametrize(
    ("saved", "verified", "left", "line"),
    [
        ("C", ["C"], [], "Saved C, verified in the bucket."),
        ("C", ["B", "C"], [], "Saved C, verified in the bucket. Verified in the bucket: B."),
        ("C", [], [], "Saved C on this disk."),
        (
            "C",
            ["A"],
            ["B", "C"],
            "Saved C on this disk. Verified in the bucket: A. "
            "Not in the bucket, up at the next start: B, C.",
        ),
        (None, [], [], "No new checkpoint was saved."),
        (
            None,
            ["A"],
            ["B"],
            "No new checkpoint was saved. Verified in the bucket: A. "
            "Not in the bucket, up at the next start: B.",
        ),
    ],
)
def test_the_outcome_says_what_survived_and_where(
    saved: str | None, verified: list[str], left: list[str], line: str
) -> None:
    assert describe_outcome(saved, verified, left) == line
