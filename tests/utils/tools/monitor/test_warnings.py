"""Each warning comes when it should, and not when it should not."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from utils.checkpoints.journal import JournalEntry, UploadState
from utils.tools.monitor.warnings import (
    DAY_SECONDS,
    FIRST_EVALUATION_SECONDS,
    FIRST_RECORD_SECONDS,
    STALL_MIN_SECONDS,
    has_failed,
    judge_bad_steps,
    judge_disk,
    judge_loss,
    judge_newest,
    judge_state,
    judge_uploads,
    stall_seconds,
)

GIB = 2**30
RUN = Path("checkpoints/a b")


def noisy(means: list[float], noise: float = 0.05) -> list[float]:
    source = random.Random(0)
    return [mean + source.gauss(0, noise) for mean in means]


@pytest.mark.parametrize(
    ("losses", "rises"),
    [
        ([], False),
        ([1.0] * 39, False),
        ([1.0] * 200, False),
        (noisy([5 * math.exp(-step / 100) + 2 for step in range(500)]), False),
        (noisy([2.0] * 1000, 0.3), False),
        (noisy([3.0] * 200 + [3.0 + step / 100 for step in range(60)]), True),
        (noisy([3.0] * 200 + [6.0] * 25), True),
        # One spike, or a handful, moves no median.
        (noisy([3.0] * 200) + [50.0, 60.0], False),
        # It rose, and is on its way back.
        (noisy([3.0] * 200 + [6.0] * 20 + [4.0] * 20), False),
        # Slow, over the whole of what is kept: no two neighbouring windows differ much.
        (noisy([3.0 + step / 2000 for step in range(1000)], 0.02), True),
        ([1e308, -1e308] * 100, False),
    ],
)
def test_a_rising_loss_is_told_from_noise(losses: list[float], rises: bool) -> None:
    warning = judge_loss(losses)
    assert (warning is not None) is rises
    if warning is not None:
        assert warning.kind == "loss_rising"
        assert warning.advice


@pytest.mark.parametrize(
    ("record", "kinds"),
    [
        ({}, []),
        ({"step": 1, "loss": 2.0, "grad_norm": 10.0}, []),
        ({"step": 1, "loss": 2.0, "grad_norm": 10.1}, ["gradient_norm"]),
        ({"step": 1, "loss": math.nan, "grad_norm": 11.0}, ["not_finite", "gradient_norm"]),
        ({"step": 1, "loss": math.inf, "grad_norm": "11"}, ["not_finite"]),
        ({"step": 1, "loss": None}, ["not_finite"]),
        ({"step": 1, "loss": [1.0]}, ["not_finite"]),
    ],
)
def test_the_newest_record_is_judged(record: dict[str, Any], kinds: list[str]) -> None:
    loss = record.get("loss")
    found = judge_newest(record, loss if isinstance(loss, float) else None)
    assert [warning.kind for warning in found] == kinds


def test_bad_steps_count_among_the_last_thousand() -> None:
    events = [
        {"event": "bad_step", "step": 10, "kind": "spike", "policy": "skip"},
        {"event": "bad_step", "step": 1500, "kind": "non-finite\x1b[2J", "policy": "skip"},
        {"event": "resume", "step": 1600},
    ]
    warning = judge_bad_steps(events, 1600)
    assert warning is not None
    assert warning.message.startswith("1 bad step in the last 1000, the last at 1500: non-finite?")
    assert warning.subject == "1500"
    assert judge_bad_steps(events, 2600) is None
    assert judge_bad_steps([], None) is None


Timed = list[tuple[dict[str, Any], float]]


def records_every(seconds: float, count: int, begin: float = 1000.0) -> Timed:
    return [
        ({"step": 10 * i, "loss": 1.0, "step_seconds": seconds / 10}, begin + seconds * i)
        for i in range(count)
    ]


def evaluated(timed: Timed, seconds: float) -> Timed:
    return [*timed, ({"step": 200, "validation_loss": 1.0}, timed[-1][1] + seconds)]


def test_a_stall_is_measured_by_the_pace_of_the_run_itself() -> None:
    timed = records_every(30, 20)
    # Twice the longest gap, which the evaluation made.
    assert stall_seconds(evaluated(timed, 200), 990.0) == 400.0
    usual = evaluated(records_every(300, 20), 310)
    assert stall_seconds(usual, 990.0) == 1500.0  # five usual ones
    assert stall_seconds(evaluated(records_every(0.1, 20, 990.1), 0.2), 990.0) == STALL_MIN_SECONDS
    assert stall_seconds(records_every(0.1, 20, 990.1), 990.0) == FIRST_EVALUATION_SECONDS


def test_an_attempt_that_has_logged_nothing_yet_is_given_time() -> None:
    assert stall_seconds([], 1000.0) == FIRST_RECORD_SECONDS
    timed = records_every(30, 20)
    assert stall_seconds(timed, 10_000.0) == FIRST_RECORD_SECONDS
    # From the start to its first record is a gap, too.
    one = [*timed, ({"step": 200, "loss": 1.0, "step_seconds": 3.0}, 10_800.0)]
    assert stall_seconds(one, 10_000.0) == 1600.0
    # Gaps between two attempts do not count.
    both = [*timed, *evaluated(records_every(30, 20, 101_000.0), 30)]
    assert stall_seconds(both, 101_000.0) == 150.0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("running", None),
        ("finished", None),
        ("stopped", None),
        ("stalled", "no record for 10m00s, the next was due within 1m00s"),
        ("unknown", "no record for 10m00s, the next was due within 1m00s"),
        ("crashed", "the process is gone without an end record: killed or crashed"),
        ("failed", "the run ended with an error"),
    ],
)
def test_a_run_that_does_not_go_on_is_a_warning(state: str, message: str | None) -> None:
    warning = judge_state(state, 600.0, 60.0)
    assert (warning and warning.message) == message
    assert warning is None or warning.advice
    assert "no record yet" in str(judge_state("stalled", None, 60.0))


def entry(state: UploadState = UploadState.FAILED, **details: Any) -> JournalEntry:
    return JournalEntry("a", "run", state, "2026-01-01T00:00:00+00:00", details)


@pytest.mark.parametrize(
    ("details", "failed"),
    [
        ({"attempts": 1, "permanent": False}, False),
        ({"attempts": 5, "permanent": False}, True),
        ({"attempts": 1, "permanent": True}, True),
        ({"attempts": "many", "permanent": "yes"}, False),
    ],
)
def test_an_upload_that_is_tried_again_soon_has_not_failed(
    details: dict[str, Any], failed: bool
) -> None:
    assert has_failed(entry(**details)) is failed
    assert not has_failed(entry(UploadState.UPLOADING, **details))


def test_failed_and_lagging_uploads_are_told() -> None:
    failure = entry(permanent=True, error="403\x1b[31m")
    found = judge_uploads({"a": failure}, {"a": 9000.0, "b": 700.0, "c": 10.0}, 600.0, RUN)
    assert [(warning.kind, warning.subject) for warning in found] == [
        ("upload_failed", "a"),
        ("upload_lagging", ""),
    ]
    assert "403?[31m" in found[0].message
    assert found[0].advice == "python scripts/upload_manager.py retry --run 'checkpoints/a b'"
    assert "1 older than the time between saves, b for 11m40s" in found[1].message
    assert judge_uploads({}, {"b": 500.0}, 600.0, RUN) == []
    assert judge_uploads({}, {"b": 500.0}, None, RUN) == []
    assert judge_uploads({}, {"b": 50.0}, 5.0, RUN) == []  # a run that saves every few seconds


@pytest.mark.parametrize(
    ("free", "left", "size", "eta", "kinds"),
    [
        (100 * GIB, None, 17 * GIB, 1e6, []),
        (33 * GIB, None, 17 * GIB, None, ["disk_low"]),
        (GIB - 1, None, None, None, ["disk_low"]),
        (None, None, None, None, []),
        (100 * GIB, 2 * DAY_SECONDS, None, None, []),
        (100 * GIB, 0.5 * DAY_SECONDS, None, None, ["disk_filling"]),
        (100 * GIB, 2 * DAY_SECONDS, None, 3 * DAY_SECONDS, ["disk_filling"]),
    ],
)
def test_a_disk_is_judged_by_what_is_still_to_come(
    free: int | None, left: float | None, size: int | None, eta: float | None, kinds: list[str]
) -> None:
    found = judge_disk(free, left, size, eta)
    assert [warning.kind for warning in found] == kinds
    assert all(warning.advice for warning in found)
    assert ("before the run ends" in str(found)) is (eta is not None and bool(kinds))
