"""What a run is doing follows from its events, its process and its silence."""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from utils.tools.monitor.state import FINISHING_SECONDS, RunState, is_process_alive, judge_run

START = {"event": "start", "step": 0, "pid": 7, "hostname": "far"}
FINISHING = {"event": "finishing", "step": 9}


@pytest.mark.parametrize(
    ("events", "is_alive", "silent_seconds", "state"),
    [
        ([], None, None, RunState.NO_RUN),
        ([{"event": "note"}], None, 1.0, RunState.NO_RUN),
        ([START], True, 1.0, RunState.RUNNING),
        ([START], True, 9999.0, RunState.STALLED),
        ([START], False, 1.0, RunState.CRASHED),
        ([START], None, 1.0, RunState.RUNNING),
        ([START], None, 9999.0, RunState.UNKNOWN),
        ([START], None, None, RunState.UNKNOWN),
        ([START, FINISHING], True, 600.0, RunState.RUNNING),
        ([START, FINISHING], None, 600.0, RunState.RUNNING),
        ([START, FINISHING], True, FINISHING_SECONDS, RunState.STALLED),
        ([START, FINISHING], False, 1.0, RunState.CRASHED),
        ([START, {**FINISHING, "reason": None}], False, 1.0, RunState.CRASHED),
        ([START, {**FINISHING, "reason": "SIGINT"}], False, 1.0, RunState.STOPPED),
        ([START, {"event": "end", "outcome": "done"}], True, 1.0, RunState.FINISHED),
        ([START, {"event": "end", "outcome": "stopped"}], False, 1.0, RunState.STOPPED),
        ([START, {"event": "end", "outcome": "failed"}], False, 1.0, RunState.FAILED),
        ([START, {"event": "end"}], False, 1.0, RunState.FAILED),
        (
            [{"event": "end", "outcome": "stopped"}, {**START, "event": "resume"}],
            True,
            1.0,
            RunState.RUNNING,
        ),
    ],
)
def test_state_follows_from_events_process_and_silence(
    events: list[dict[str, Any]], is_alive: bool | None, silent_seconds: float, state: RunState
) -> None:
    found, detail = judge_run(
        events, is_alive=is_alive, silent_seconds=silent_seconds, stall_seconds=100.0
    )
    assert found == state
    assert detail


def test_records_without_a_start_are_a_run_whose_start_is_not_known() -> None:
    def judge(silent_seconds: float) -> tuple[RunState, str]:
        return judge_run(
            [], is_alive=None, silent_seconds=silent_seconds, stall_seconds=100.0, has_records=True
        )

    assert judge(1.0)[0] is RunState.RUNNING
    assert judge(200.0)[0] is RunState.UNKNOWN
    assert "whose start is not in the log" in judge(1.0)[1]


def test_what_a_record_says_cannot_steer_a_terminal() -> None:
    start = {**START, "pid": "\x1b[2J", "hostname": "\x07" * 1000}
    _, detail = judge_run([start], is_alive=True, silent_seconds=1.0, stall_seconds=9.0)
    assert detail.isprintable()
    assert len(detail) < 200


def test_process_is_known_by_number_host_and_age(dead_pid: int) -> None:
    now = datetime.now(UTC)
    here = {"pid": os.getpid(), "hostname": socket.gethostname(), "time": now.isoformat()}
    assert is_process_alive(here) is True
    assert is_process_alive({**here, "pid": dead_pid}) is False
    # Recorded long before this process began: the number has been given out again.
    old = (now - timedelta(days=365)).isoformat()
    assert is_process_alive({**here, "time": old}) is False
    assert is_process_alive({**here, "time": "nonsense"}) is True
    assert is_process_alive({**here, "hostname": "elsewhere"}) is None
    for pid in (None, "7", -1, 2**70, True, [7]):
        assert not is_process_alive({**here, "pid": pid})
    assert is_process_alive({}) is None
