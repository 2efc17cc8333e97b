"""The plan for the grace period: which checkpoints reach the bucket, and what is said about it."""

from __future__ import annotations

import pytest

from utils.run.grace import describe_outcome, describe_plan

MB = 10**6


# 30 s of grace, a new checkpoint of 100 MB: seconds of a save, MB/s, MB of what is pending.
@pytest.mark.parametrize(
    ("save", "rate", "pending", "expected"),
    [
        (2.0, 10, {}, "it reaches the bucket in time."),
        # The newest pending one comes before the older one.
        (2.0, 10, {"old": 60, "newer": 120}, "in time. Pending, in time: newer, old."),
        (2.0, 10, {"old": 61, "newer": 120}, "in time: newer. Pending, up at the next start: old."),
        # What does not fit takes no time from what does.
        (2.0, 10, {"small": 60, "large": 900}, "in time: small. Pending, up at the next start: l"),
        (2.0, 3, {"a": 30, "b": 40}, "up at the next start. Pending, in time: b, a."),
        # To the second.
        (20.0, 10, {}, "it reaches the bucket in time."),
        (20.1, 10, {}, "it will not reach the bucket in time; it stays on this disk"),
        # Unknown is unknown, but what cannot be in time is known.
        (2.0, None, {"a": 30}, "in time is unknown; if not, it stays on this disk and goes up at "),
        (2.0, 0, {"a": 30}, "Pending, end unknown: a."),
        (None, 10, {"a": 30}, "Pending, end unknown: a."),
        (None, 1, {"a": 20}, "it will not reach the bucket in time"),
        (31.0, None, {"a": 1}, "the save itself will not end in time; what was saved before is "),
    ],
)
def test_the_newest_that_fit_go_up_first(
    save: float | None, rate: float | None, pending: dict[str, int], expected: str
) -> None:
    waiting = [(name, size * MB) for name, size in pending.items()]
    plan = describe_plan(30.0, save, 100 * MB, None if rate is None else rate * MB, waiting)
    assert expected in plan


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
