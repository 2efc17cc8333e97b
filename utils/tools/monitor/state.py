"""What a run is doing: a judgement from its events, its process and the time since its last record.

    events of metrics.jsonl, process table, silence -> RunState -> monitor

The process can be seen on its own machine only. Over a shared disk, new records show that the run
lives; when they stop, a stall cannot be told from a crash. No torch here.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import psutil

from utils.base.text import epoch_seconds, printable
from utils.tracking.metrics_log import START_EVENTS

CLOCK_SLACK_SECONDS = 60.0
FINISHING_SECONDS = 3600.0  # without a record, while the last checkpoint is saved and uploaded


class RunState(StrEnum):
    """What a run is doing."""

    NO_RUN = "no run"
    RUNNING = "running"
    STALLED = "stalled"
    FINISHED = "finished"
    STOPPED = "stopped"
    CRASHED = "crashed"
    FAILED = "failed"
    UNKNOWN = "unknown"

    @property
    def is_live(self) -> bool:
        """Whether the run still goes on, as far as can be seen."""
        return self in (RunState.RUNNING, RunState.STALLED)


def find_start(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the newest start or resume record, empty where there is none."""
    found = (event for event in reversed(events) if event["event"] in START_EVENTS)
    return dict(next(found, {}))


def judge_run(
    events: Sequence[Mapping[str, Any]],
    *,
    is_alive: bool | None,
    silent_seconds: float | None,
    stall_seconds: float,
    has_records: bool = False,
    is_evaluating: bool = False,
) -> tuple[RunState, str]:
    """Return (state, the evidence for it) from the events of metrics.jsonl, oldest first.

    Args:
        events: Records with an `event`: start, resume, finishing or end.
        is_alive: Whether the process of the last attempt lives; None where that cannot be seen.
        silent_seconds: Time since the last record of any kind, None where there is none.
        stall_seconds: Silence after which a run counts as stalled.
        has_records: There are metric records.
        is_evaluating: An evaluation has begun and not yet logged its result.
    """
    known = (*START_EVENTS, "finishing", "end")
    last = next((event for event in reversed(events) if event["event"] in known), None)
    if last is None:
        if not has_records:
            return RunState.NO_RUN, "nothing has been logged"
        who = "a process whose start is not in the log"
    elif last["event"] == "end":
        return _judge_end(last)
    else:
        start = find_start(events)
        who = f"process {printable(start.get('pid'), 40)} on {printable(start.get('hostname'), 80)}"
    finishing = last if last is not None and last["event"] == "finishing" else None
    limit = max(stall_seconds, FINISHING_SECONDS) if finishing else stall_seconds
    is_silent = silent_seconds is None or silent_seconds >= limit
    if is_alive is False:
        if finishing and finishing.get("reason") is not None:
            reason = printable(finishing["reason"], 80)
            return RunState.STOPPED, f"{who} was asked to stop ({reason}) and left before its end"
        return RunState.CRASHED, f"{who} is gone"
    if is_alive:
        if is_silent:
            return RunState.STALLED, f"{who} is alive but logs nothing"
        doing = ", saving and uploading the last checkpoint" if finishing else ""
        return RunState.RUNNING, f"{who}{doing or (', evaluating' if is_evaluating else '')}"
    if is_silent:
        return RunState.UNKNOWN, f"{who} cannot be seen from here and is silent: stalled or crashed"
    return RunState.RUNNING, f"{who} cannot be seen from here, but its records come"


def _judge_end(event: Mapping[str, Any]) -> tuple[RunState, str]:
    outcome = event.get("outcome")
    if outcome == "done":
        return RunState.FINISHED, "all steps are done"
    if outcome == "stopped":
        return RunState.STOPPED, "stopped on request and saved"
    return RunState.FAILED, f"ended with outcome {printable(outcome, 80)}; see the log"


def is_process_alive(start: Mapping[str, Any]) -> bool | None:
    """Tell whether the process of a start record lives, None where that cannot be seen.

    A process with that id that began after the record is another one.
    """
    pid = start.get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool):
        return None
    if start.get("hostname") != socket.gethostname():
        return None
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        began = process.create_time()
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except psutil.AccessDenied:
        return True
    recorded = epoch_seconds(start.get("time"))
    return recorded is None or began <= recorded + CLOCK_SLACK_SECONDS
