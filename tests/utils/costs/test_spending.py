"""Spending over starts: what is counted, what is lost, whatever the clocks and files say."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sample_clock import Clock
from utils.costs.spending import (
    Amount,
    Spending,
    SpendingMeter,
    find_spending_before,
    limit_age,
    open_meter,
    read_spending,
)
from utils.tracking.metrics_log import MetricsLog, append_metrics

RUN = "20260101-0a1b2c3d"
BASE = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


def at(seconds: float) -> str:
    return datetime.fromtimestamp(BASE + seconds, UTC).isoformat()


def start(
    launched: float,
    *,
    before: Spending | None = None,
    price: float | None = 3600.0,
    startup: float = 10.0,
    **changes: Any,
) -> dict[str, Any]:
    """A start event; at 3600 dollars an hour a second is a dollar."""
    event = {
        "event": "resume" if before else "start",
        "step": 0,
        "run_id": RUN,
        "time": at(launched + startup),
        "launched_at": at(launched),
        "hourly_price": price,
        "spending": (before or Spending()).to_json(),
    }
    return {key: value for key, value in {**event, **changes}.items() if value is not ...}


def step(number: int, seconds: float) -> dict[str, Any]:
    return {"step": number, "time": at(seconds), "loss": 1.0}


def log_of(*records: dict[str, Any]) -> MetricsLog:
    return MetricsLog(
        records=[record for record in records if "event" not in record],
        events=[record for record in records if "event" in record],
    )


def spent(total: float, lost: float = 0.0, starts: int = 1) -> Spending:
    return Spending(Amount(total, total), Amount(lost, lost), starts, 3600.0)


def test_time_is_counted_without_a_price_and_dollars_with_one() -> None:
    assert Amount.of(1800, 4.0) == Amount(1800, 2.0, 0)
    assert Amount.of(1800, None) == Amount(1800, 0, 1800)
    assert Amount.of(-5, 4.0) == Amount()
    assert Amount.of(1800, 4.0) - Amount.of(3600, 8.0) == Amount()
    mixed = Amount.of(1800, 4.0) + Amount.of(1800, None)
    assert mixed.known_dollars == 2.0
    assert mixed.priced_at(8.0) == Amount(3600, 6.0, 0)
    assert Amount.of(1800, None).known_dollars is None


END = {"event": "end", "step": 2, "time": at(500)}
OLD = {"launched_at": ..., "hourly_price": ..., "spending": ...}  # an older version logged none
LOGS = {
    "killed: up to its last record": (log_of(start(0), step(1, 50), step(2, 100)), spent(100)),
    "ended: as it says itself": (
        log_of(start(0), step(1, 50), {**END, "spending": spent(123, 4).to_json()}),
        spent(123, 4),
    ),
    "ended, and says nothing": (log_of(start(0), step(1, 50), END), spent(500)),
    "a restart loses the time to its first step": (
        log_of(start(200, before=spent(100, 20)), step(3, 260)),
        spent(160, 30, starts=2),
    ),
    "an older version": (
        log_of(start(0, **OLD), step(1, 110)),
        Spending(Amount(100, 0, 100), starts=1),
    ),
    "a clock that was set after the launch": (
        log_of(start(-1.7e9, time=at(5)), step(1, 100)),
        spent(95),
    ),
    "no attempt": (MetricsLog(), None),
}


@pytest.mark.parametrize(("log", "expected"), LOGS.values(), ids=LOGS.keys())
def test_a_log_says_what_was_spent(log: MetricsLog, expected: Spending | None) -> None:
    assert read_spending(log) == expected


def test_a_running_attempt_counts_to_now() -> None:
    assert read_spending(log_of(start(0), step(1, 50)), now=BASE + 80) == spent(80)


# What the checkpoint says, what the log says, and what was spent and lost before the next attempt.
BEFORE = {
    "steps after the save are lost": (
        spent(100),
        log_of(start(0), step(1, 100), step(2, 150)),
        spent(150, 50),
    ),
    "an attempt that saved nothing is lost": (
        spent(100),
        log_of(start(1000, before=spent(150, 50)), step(2, 1060)),
        spent(210, 110, 2),
    ),
    "died before its first save": (Spending(), log_of(start(0), step(1, 70)), spent(70, 70)),
    "a new machine has no log": (spent(100, 5, 3), MetricsLog(), spent(100, 5, 3)),
    "a log that knows less": (spent(400, 5, 2), log_of(start(0), step(1, 70)), spent(400, 5, 2)),
    "another run's log": (
        Spending(),
        log_of(start(0, run_id="another"), step(1, 5000)),
        Spending(),
    ),
    "an old checkpoint takes the log's": (None, log_of(start(0), step(1, 70)), spent(70)),
    "an old checkpoint and no log": (None, MetricsLog(), Spending()),
}


@pytest.mark.parametrize(("checkpoint", "log", "expected"), BEFORE.values(), ids=BEFORE.keys())
def test_checkpoint_and_log_say_what_was_spent_and_lost_before(
    checkpoint: Spending | None, log: MetricsLog, expected: Spending
) -> None:
    before = find_spending_before(RUN, checkpoint, log)
    assert (before.total, before.lost) == (expected.total, expected.lost)
    assert before.starts == expected.starts


def test_a_first_start_loses_nothing_and_a_restart_its_way_to_the_first_step() -> None:
    clock = Clock()
    first = SpendingMeter(Spending(), 3600.0, 5.0, clock)
    again = SpendingMeter(spent(100, 20), 3600.0, 5.0, clock)
    clock.now += 3
    for meter in (first, again):
        meter.note_step()
    clock.now += 40
    for meter in (first, again):
        meter.note_step()
    assert first.read() == spent(48)
    assert again.read() == spent(148, 28, starts=2)


def test_going_back_in_the_middle_of_a_start_loses_what_the_checkpoint_has_not() -> None:
    clock = Clock()
    meter = SpendingMeter(Spending(), 3600.0, 0.0, clock)
    clock.now += 100
    saved = Spending.from_json(meter.read().to_json())
    clock.now += 30
    meter.go_back(saved)
    assert meter.read() == spent(130, 30)
    meter.go_back(None)
    assert meter.read() == spent(130, 30)


@pytest.mark.parametrize(
    ("now", "created", "uptime", "seen", "age"),
    [
        (1000.0, 990.0, 5000.0, [], 10.0),
        (1000.0, 1010.0, 5000.0, [], 0.0),
        (1000.0, 0.0, 60.0, [], 60.0),
        (1000.0, 900.0, 5000.0, [980.0], 20.0),
        (1000.0, 990.0, 5000.0, [980.0], 10.0),
        (1000.0, 990.0, 5000.0, [2000.0], 10.0),
    ],
    ids=["plain", "clock-back", "no-boot-time", "same-process", "another-process", "future-record"],
)
def test_the_age_of_a_start_survives_wrong_clocks(
    now: float, created: float, uptime: float, seen: list[float], age: float
) -> None:
    assert limit_age(now, created, uptime, seen) == age


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=6), st.floats(-1e6, 1e6))
def test_no_clock_makes_a_negative_spending(moments: list[float], launched: float) -> None:
    records = [step(place, moment) for place, moment in enumerate(moments, start=1)]
    log = log_of(start(launched, before=spent(100, 20)), *records)
    found = read_spending(log, now=BASE + moments[0])
    before = find_spending_before(RUN, spent(90, 10), log)
    assert found is not None
    for spending in (found, before):
        assert 0 <= spending.lost.seconds <= spending.total.seconds + 1e-6
        assert spending.total.seconds >= 90
        assert spending.total.dollars >= 0


JUNK = [None, 3, [], {}, {"seconds": "x"}, {"seconds": float("nan")}, {"seconds": True}]


@pytest.mark.parametrize("value", JUNK)
def test_what_says_nothing_is_no_spending(value: object) -> None:
    assert Spending.from_json(value) is None


def test_absurd_figures_are_limited() -> None:
    found = Spending.from_json(
        {"seconds": 10**300, "dollars": -5, "starts": -2, "lost_seconds": [], "hourly_price": -1}
    )
    assert found == Spending(Amount(1e10, 0.0, 0.0), Amount(), 0, None)


def test_hostile_events_stop_nothing() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "x", 10**400, None, {"a": 1}):
        event = start(0, time=value, launched_at=value, hourly_price=value, spending=value)
        found = read_spending(log_of(event, {"step": 1, "time": value}))
        assert found is not None
        assert found.total.seconds == 0


def test_spending_survives_its_json() -> None:
    spending = Spending(Amount(12.5, 3.25, 1.5), Amount(2.5, 0.75, 0.5), 3, 9.5)
    assert Spending.from_json(spending.to_json()) == spending


def test_a_meter_is_opened_with_the_local_log(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    append_metrics(metrics, start(0))
    append_metrics(metrics, step(1, 130))
    meter = open_meter(metrics, RUN, 1, spent(100).to_json(), 3600.0)
    assert meter.before.total.seconds == 130
    assert meter.before.lost.seconds == 30
    assert meter.read().total.seconds >= 130
    for path in (None, tmp_path, tmp_path / "none"):
        assert open_meter(path, RUN, 1, spent(100).to_json(), 1.0).before.total.seconds == 100
