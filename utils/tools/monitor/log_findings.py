"""What the log and the journal of a run say, worked out from their lines.

    metrics.jsonl, uploads.jsonl -> newest figures, curve, pace, warnings; state of each upload

Both are read as they grow, and what they hold may be damaged or foreign: lines that cannot be read
are counted. No torch here.
"""

from __future__ import annotations

import itertools
import math
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
    measure_pace,
    stall_seconds,
)
from utils.tracking.metrics_log import MetricsLog

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
        return cls(**{item.name: _figure(record, item.name) for item in fields(cls)})


def _figure(record: Mapping[str, Any], key: str) -> float | None:
    """Return a number as it was logged, NaN and infinities too."""
    value = record.get(key)
    return value if isinstance(value, float) else number(value)


@dataclass(frozen=True)
class LogFindings:
    """What follows from the log alone, worked out when there is something new in it."""

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
        metrics = Metrics.of({**newest, **_last_record(log.records, "validation_loss")})
        curve = [
            loss
            for record in log.records[-CURVE_RECORDS:]
            if (loss := number(record.get("loss"))) is not None
        ]
        parts = [part[-1] for part in (log.records, log.events) if part]
        step = max((record["step"] for record in parts), default=None)
        times = [epoch_seconds(record.get("time")) for record in parts]
        found = [judge_bad_steps(log.events, step), judge_loss(curve)]
        return cls(
            start=start,
            step=step,
            newest_time=max((time for time in times if time is not None), default=None),
            newest=newest,
            metrics=metrics,
            loss_curve=condense(curve, CURVE_POINTS),
            stall_seconds=_stall_seconds(log.records[-PACE_RECORDS:], start),
            warnings=judge_newest(newest, metrics.loss) + [one for one in found if one],
        )


def _stall_seconds(records: Sequence[dict[str, Any]], start: Mapping[str, Any]) -> float:
    times = [epoch_seconds(record.get("time")) for record in records]
    timed = [record for record, time in zip(records, times, strict=True) if time is not None]
    known = [time for time in times if time is not None]
    return stall_seconds(measure_pace(timed, known, epoch_seconds(start.get("time"))))


def _last_record(records: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    return next((record for record in reversed(records) if key in record), {})


def condense(values: Sequence[float], points: int) -> list[float]:
    """Return at most `points` values: the means of equal pieces, in order."""
    if len(values) <= points:
        return list(values)
    edges = [index * len(values) // points for index in range(points + 1)]
    pieces = (values[low:high] for low, high in itertools.pairwise(edges))
    return [math.fsum(value / len(piece) for value in piece) for piece in pieces]


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
        """Return for how long each checkpoint that is owed to the bucket has been so."""
        return {
            name: max(0.0, now - since)
            for name, since in self._waits_since.items()
            if name in self.entries
        }
