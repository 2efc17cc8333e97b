"""Each event is told once, when it begins to hold, and again only after it has ceased."""

from __future__ import annotations

from typing import Any

import pytest

from tests.utils.tools.monitor.test_view import status
from utils.tools.monitor.events import EventTracker
from utils.tools.monitor.state import RunState
from utils.tools.monitor.warnings import RunWarning

NAN = RunWarning("not_finite", "the loss of step 7 is not finite", "stop")
FAILED_A = RunWarning("upload_failed", "a is not in the bucket", "retry", subject="a")
FAILED_B = RunWarning("upload_failed", "b is not in the bucket", "retry", subject="b")
RISING = RunWarning("loss_rising", "the loss rises", "lower it")


def names(tracker: EventTracker, state: RunState = RunState.RUNNING, **changes: Any) -> list[str]:
    return [event.event for event in tracker.take(status(state=state, **changes))]


def test_a_state_is_told_once_and_again_after_it_has_changed() -> None:
    tracker = EventTracker()
    assert names(tracker) == []
    assert names(tracker, RunState.STALLED) == ["stalled"]
    assert names(tracker, RunState.STALLED) == []
    assert names(tracker) == []
    assert names(tracker, RunState.STALLED) == ["stalled"]
    assert names(tracker, RunState.CRASHED) == ["crashed"]
    assert names(tracker, RunState.FAILED) == ["failed"]
    assert names(tracker, RunState.STOPPED) == ["stopped"]
    assert names(tracker, RunState.NO_RUN) == []


def test_another_start_that_crashed_between_two_looks_is_another_event() -> None:
    tracker = EventTracker()
    assert names(tracker, RunState.CRASHED, start={"pid": 1}) == ["crashed"]
    assert names(tracker, RunState.CRASHED, start={"pid": 2}) == ["crashed"]
    assert names(tracker, RunState.CRASHED, start={"pid": 2}) == []


@pytest.mark.parametrize(
    ("state", "event"), [(RunState.FINISHED, "finished"), (RunState.UNKNOWN, "stalled")]
)
def test_what_holds_at_the_first_look_is_told(state: RunState, event: str) -> None:
    assert names(EventTracker(), state) == [event]


def test_warnings_of_some_kinds_are_events_each_subject_for_itself() -> None:
    tracker = EventTracker()
    assert names(tracker, warnings=[RISING]) == []
    assert names(tracker, warnings=[NAN, FAILED_A]) == ["not_finite", "upload_failed"]
    assert names(tracker, warnings=[NAN, FAILED_A, FAILED_B]) == ["upload_failed"]
    assert names(tracker, warnings=[FAILED_A, FAILED_B]) == []
    assert names(tracker, warnings=[NAN]) == ["not_finite"]


def test_an_event_says_which_run_where_and_what() -> None:
    (event,) = EventTracker().take(status(state=RunState.CRASHED, detail="gone\x00\x1b[2J"))
    assert (event.event, event.run, event.step) == ("crashed", "20260101-0a1b2c3d", 5000)
    assert event.message == "crashed: gone??[2J"
    assert event.state == "crashed"
