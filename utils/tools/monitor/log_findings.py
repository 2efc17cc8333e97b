"""What the log and the journal of a run say, worked out from their lines.

    metrics.jsonl, uploads.jsonl -> newest figures, curve, pace, warnings; state of each upload

Both are read as they grow, and what they hold may be damaged or foreign: lines that cannot be read
are counted. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from utils.base.files import FollowedFile
from utils.base.text import epoch_seconds, number
from utils.checkpoints.journal import JournalEntry, parse_entry
from utils.tools.monitor.state import find_start
from utils.tools.monitor.warnings import (
    RunWarning,
    has_failed,
    judge_bad_steps,
    judge_loss,
    judge_newest,
    stall_seconds,
)
from utils.tracking.metrics_log import MetricsLog
from utils.tracking.text_plots import means_of_pieces

CURVE_RECORDS = 1000
CURVE_POINTS = 40
PACE_RECORDS = 200


@dataclass(frozen=True)
class Metrics:
    """The newest figures as they were logged, NaN too; None where there is none yet."""

    loss: float | None
    perplexity: float | None
    learning_rate: float | None
    grad_norm: float | None
    epoch: float | None
    tokens_seen: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    mfu: float | None
    data_wait_share: float | None
    validation_loss: float | None
    validation_perplexity: float | None
    best_validation_loss: float | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Metrics:
        """Return the figures that a record holds."""
        values = {item.name: record.get(item.name) for item in fields(cls)}
        return cls(**{k: v if isinstance(v, float) else number(v) for k, v in values.items()})


@dataclass(frozen=True)
class LogFindings:
    """What follows from the log alone."""

    start: dict[str, Any]
    step: int | None
    newest_time: float | None
    newest: dict[str, Any]
    metrics: Metrics
    loss_curve: list[float]
    stall_seconds: float
    warnings: list[RunWarning]

    @classmethod
    def of(cls, log: MetricsLog) -> LogFindings:
        """Return what the records and events say."""
        start = find_start(log.events)
        newest = _last_record(log.records, "loss")
        # An attempt ends between two logged steps: its last event knows more than these.
        event = log.events[-1] if log.events else {}
        ended = {"tokens_seen": event.get("tokens_seen"), "loss": event.get("current_loss")}
        ended = {key: value for key, value in ended.items() if value is not None}
        metrics = Metrics.of({**newest, **_last_record(log.records, "validation_loss"), **ended})
        losses = (number(record.get("loss")) for record in log.records[-CURVE_RECORDS:])
        curve = [loss for loss in losses if loss is not None]
        last = [part[-1] for part in (log.records, log.events) if part]
        step = max((record["step"] for record in last), default=None)
        times = [epoch_seconds(record.get("time")) for record in last]
        found = [judge_bad_steps(log.events, step), judge_loss(curve)]
        return cls(
            start=start,
            step=step,
            newest_time=max((time for time in times if time is not None), default=None),
            newest=newest,
            metrics=metrics,
            loss_curve=means_of_pieces(curve, CURVE_POINTS),
            stall_seconds=_stall_seconds(log.records[-PACE_RECORDS:], start),
            warnings=judge_newest(newest, metrics.loss) + [one for one in found if one],
        )


def _stall_seconds(records: Sequence[dict[str, Any]], start: Mapping[str, Any]) -> float:
    pairs = [(record, epoch_seconds(record.get("time"))) for record in records]
    timed = [(record, time) for record, time in pairs if time is not None]
    return stall_seconds(timed, epoch_seconds(start.get("time")))


def _last_record(records: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    return next((record for record in reversed(records) if key in record), {})


class UploadLog:
    """The journal as it grows: the newest entry of each checkpoint, and since when it waits.

    A failure counts until the checkpoint is verified or given up, also while it is tried again.
    """

    def __init__(self, path: Path) -> None:
        self.entries: dict[str, JournalEntry] = {}
        self.failures: dict[str, JournalEntry] = {}
        self.bad_lines = 0
        self._file = FollowedFile(path)
        self._waits_since: dict[str, float] = {}

    def read_new(self) -> None:
        """Take in what is new; a journal that is gone is an empty one.

        Raises:
            OSError: It is there and cannot be read.
        """
        try:
            for block in self._file.read_new():
                if block.is_first:
                    self._forget()
                self.bad_lines += block.num_too_long
                for line in block.data.splitlines():
                    self._take(line)
        except FileNotFoundError:
            self._forget()

    def _forget(self) -> None:
        # Not since when each waits: a compaction leaves the first lines out.
        self.entries, self.failures, self.bad_lines = {}, {}, 0

    def _take(self, line: bytes) -> None:
        entry = parse_entry(line)
        if entry is None:
            self.bad_lines += bool(line.strip())
            return
        name = entry.checkpoint
        self.entries[name] = entry
        moment = epoch_seconds(entry.time)
        if has_failed(entry):
            self.failures[name] = entry
        if not entry.state.is_pending:
            self._waits_since.pop(name, None)
            self.failures.pop(name, None)
        elif moment is not None:
            self._waits_since.setdefault(name, moment)

    def waiting_seconds(self, now: float) -> dict[str, float]:
        """Return for how long each checkpoint has waited for its upload to be verified."""
        return {
            name: max(0.0, now - since)
            for name, since in self._waits_since.items()
            if name in self.entries
        }
