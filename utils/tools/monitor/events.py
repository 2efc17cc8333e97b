"""What a user is notified of: changes between two looks at a run.

    RunStatus, look by look -> events, each once -> notifier

An event is reported when its condition first holds, at the first look too, and again only after it
has ceased to hold. No torch here.
"""

from __future__ import annotations

from datetime import UTC, datetime

from utils.base.text import printable
from utils.tools.monitor.notifier import RunEvent
from utils.tools.monitor.state import RunState
from utils.tools.monitor.status import RunStatus

EVENT_OF_STATE = {
    RunState.STALLED: "stalled",
    RunState.UNKNOWN: "stalled",
    RunState.CRASHED: "crashed",
    RunState.FAILED: "failed",
    RunState.STOPPED: "stopped",
    RunState.FINISHED: "finished",
}
EVENT_WARNINGS = ("not_finite", "bad_steps", "upload_failed")


class EventTracker:
    """Finds what is new since the look before."""

    def __init__(self) -> None:
        self._held: set[tuple[str, str]] = set()

    def take(self, status: RunStatus) -> list[RunEvent]:
        """Return the events whose conditions hold for the first time in a row."""
        holding: dict[tuple[str, str], str] = {}
        name = EVENT_OF_STATE.get(status.state)
        if name is not None:
            # Another attempt may have ended the same way between two looks.
            attempt = printable((status.start.get("time"), status.start.get("pid")))
            details = [w.message for w in status.warnings if w.kind == status.state.value]
            message = "; ".join([f"{status.state.value}: {status.detail}", *details])
            holding[name, attempt] = message
        for warning in status.warnings:
            if warning.kind in EVENT_WARNINGS:
                holding[warning.kind, warning.subject] = warning.message
        new = [key for key in holding if key not in self._held]
        self._held = set(holding)
        return [
            RunEvent(
                event=key[0],
                message=printable(holding[key], 1000),
                run=printable(status.start.get("run_id", ""), 200),
                step=status.step,
                state=status.state.value,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            for key in new
        ]
