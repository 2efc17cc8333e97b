"""`metrics.jsonl`: one record a line, appended by the run, read by everything that shows it.

It is append-only. When it is read, a `resume` record takes back every later step, so that a curve
never goes back in time and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.base.files import FollowedFile, append_line
from utils.base.text import FOREIGN_ERRORS, number, parse_json, to_json_text
from utils.checkpoints.journal import utc_now

HISTORY_LIMIT = 100
MAX_STEP = 2**63
# Nothing computed in float32 is greater, and renderers overflow long before a float64 does.
GREATEST_VALUE = 1e39
RECORD_BYTES = 512  # of a line of metrics.jsonl, at most
START_EVENTS = ("start", "resume")
# Metric -> its list in training_metrics.json.
HISTORY_KEYS = {
    "loss": "loss_history",
    "learning_rate": "learning_rates",
    "grad_norm": "grad_norms",
    "tokens_per_second": "tokens_per_second",
}


@dataclass
class MetricsLog:
    """`metrics.jsonl`, folded to the current branch.

    Attributes:
        limit: How many of the newest records and events are kept; None for all. With a limit, only
            the end of a long file is parsed, and the events before it.
        records: Metric records by step, oldest first; several may share a step.
        events: Records with an `event` (start, resume, rollback, bad_step, evaluating, finishing,
            end), oldest first.
        bad_lines: Lines that could not be read.
    """

    limit: int | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    bad_lines: int = 0
    _file: FollowedFile | None = None
    _is_shortened: bool = False

    def read_new(self, path: Path) -> bool:
        """Read what was appended to the file since the last call; tell whether there was any.

        What is known stays when the file is gone.

        Raises:
            OSError: It is there and cannot be read.
        """
        if self._file is None or self._file.path != path:
            self._file = FollowedFile(path)
        try:
            num_lines = self._read_blocks(self._file, self.limit)
            if self._is_shortened and not self.records:  # all that was kept has been taken back
                self._file = FollowedFile(path)
                self._read_blocks(self._file, None)
                self._shorten(self.limit)
        except FileNotFoundError:
            return False
        return num_lines > 0

    def _read_blocks(self, file: FollowedFile, limit: int | None) -> int:
        """Take in what is new, keeping so many records; return the number of lines."""
        num_lines = 0
        for block in file.read_new():
            if block.is_first:
                self.records, self.events, self.bad_lines = [], [], 0
                self._is_shortened = False
            lines = block.data.splitlines()
            if limit is not None and block.bytes_left > limit * RECORD_BYTES:
                self._is_shortened = True
                lines = [line for line in lines if b'"event"' in line]
            self.bad_lines += block.num_too_long
            num_lines += len(lines) + block.num_too_long
            for line in lines:
                self._take(line)
            self._shorten(limit)
        return num_lines

    def _shorten(self, limit: int | None) -> None:
        """Keep the newest, at most so many."""
        if limit is None:
            return
        if len(self.records) > limit:
            self._is_shortened = True
            del self.records[:-limit]
        if len(self.events) > limit:
            del self.events[:-limit]

    def _take(self, line: bytes) -> None:
        try:
            record = parse_json(line)
            step = record["step"] = int(record["step"])
            if abs(step) >= MAX_STEP:
                raise OverflowError
        except FOREIGN_ERRORS:
            self.bad_lines += 1
            return
        if "event" not in record:
            self.records.append(record)
            return
        self.events.append(record)
        if record["event"] in ("start", "resume", "rollback"):
            while self.records and self.records[-1]["step"] > step:
                self.records.pop()

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return (steps, values) of one metric; what is no finite number is left out."""
        points = [(record["step"], number(record.get(key))) for record in self.records]
        known = [(step, value) for step, value in points if value is not None]
        return [step for step, _ in known], [value for _, value in known]


def read_metrics(path: Path) -> MetricsLog:
    """Return everything in a `metrics.jsonl`; empty where there is none."""
    metrics = MetricsLog()
    metrics.read_new(path)
    return metrics


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Append one record with the time; `step` is required."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = to_json_text({"time": utc_now(), **record}, indent=None)
    append_line(path, line.encode("utf-8"))


def loss_trend(losses: Sequence[float]) -> str:
    """Say where a loss history goes: improving, worsening, flat, or unknown below 2 entries.

    The mean of the newer half is compared with that of the older half; 0.5% is flat.
    """
    recent = list(losses[-HISTORY_LIMIT:])
    if len(recent) < 2:
        return "unknown"
    half = len(recent) // 2
    older, newer = sum(recent[:half]) / half, sum(recent[-half:]) / half
    change = (newer - older) / abs(older) if older else 0.0
    if abs(change) < 0.005:
        return "flat"
    return "improving" if change < 0 else "worsening"
