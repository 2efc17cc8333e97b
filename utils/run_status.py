"""The state of a run as it can be seen from outside: its files, its process, its machine.

    metrics.jsonl, journal, checkpoints/, process table, psutil, NVML -> RunStatus -> monitor

Watching changes nothing: files are only read, no lock is touched, no signal is sent. Each look
reads what is new: the end of metrics.jsonl, a journal that changed, checkpoints not seen before.
No torch here.
"""

from __future__ import annotations

import itertools
import math
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from enum import Enum
from typing import Any

import psutil

from utils.costs import Costs, summarize_costs
from utils.journal import Journal, JournalEntry
from utils.layout import RunPaths, find_checkpoints
from utils.machine import Machine, MachineProbe
from utils.metadata import CheckpointView, MetricsLog, number, read_local_checkpoint
from utils.spending import read_spending

NEWEST_CHECKPOINTS = 5
CURVE_RECORDS = 1000
CURVE_POINTS = 40
SEARCHED_RECORDS = 10_000
SILENCE_SECONDS = 600.0
CLOCK_SLACK_SECONDS = 60.0
START_EVENTS = ("start", "resume")


class RunState(str, Enum):
    """What a run is doing."""

    NO_RUN = "no run"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class CheckpointStatus:
    """One of the newest checkpoints and where it is on its way to the bucket."""

    name: str
    step: int
    loss: float | None
    validation_loss: float | None
    upload: str | None
    upload_error: str | None
    problem: str | None


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
    data_wait_share: float | None
    validation_loss: float | None
    validation_perplexity: float | None
    best_validation_loss: float | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Metrics:
        """Return the figures that a record holds."""
        return cls(**{item.name: _figure(record, item.name) for item in fields(cls)})


@dataclass(frozen=True)
class RunStatus:
    """One look at a run; None where something is not known.

    Attributes:
        state: What the run is doing.
        detail: What that rests on.
        start: The record of the last start or resume, empty where there is none.
        step: Newest step of any record.
        max_steps: Length of the run.
        eta_seconds: Time to the end of a running run.
        silent_seconds: Time since the newest record.
        metrics: The newest figures.
        loss_curve: Training loss, the newest records condensed.
        checkpoints: The newest ones on this machine.
        uploads: Upload state -> number of checkpoints.
        machine: Load of this machine.
        costs: Machine time and dollars over all starts of the run.
        problems: What cannot be read, and losses that are no numbers.
    """

    state: RunState
    detail: str
    start: dict[str, Any]
    step: int | None
    max_steps: int | None
    eta_seconds: float | None
    silent_seconds: float | None
    metrics: Metrics
    loss_curve: list[float]
    checkpoints: list[CheckpointStatus]
    uploads: dict[str, int]
    machine: Machine
    costs: Costs | None
    problems: list[str]


def judge_run(
    events: Sequence[Mapping[str, Any]], *, is_alive: bool | None, silent_seconds: float | None
) -> tuple[RunState, str]:
    """Return (state, what it rests on) from the events of metrics.jsonl, oldest first.

    Args:
        events: Records with an `event`: start, resume or end.
        is_alive: Whether the process of the last start lives; None where that cannot be seen.
        silent_seconds: Time since the last record of any kind.
    """
    last = next((e for e in reversed(events) if e["event"] in (*START_EVENTS, "end")), None)
    if last is None:
        return RunState.NO_RUN, "nothing has been logged"
    if last["event"] == "end":
        return _judge_end(last)
    who = f"process {last.get('pid')} on {last.get('hostname')}"
    if is_alive:
        return RunState.RUNNING, who
    if is_alive is False:
        return RunState.STOPPED, f"{who} is gone without an end record: killed or crashed"
    if silent_seconds is not None and silent_seconds < SILENCE_SECONDS:
        return RunState.RUNNING, f"{who}, as its records say; it cannot be seen from here"
    return RunState.UNKNOWN, f"{who} cannot be seen from here, and it has logged nothing lately"


def _judge_end(event: Mapping[str, Any]) -> tuple[RunState, str]:
    outcome = event.get("outcome")
    if outcome == "done":
        return RunState.FINISHED, "all steps are done"
    if outcome == "stopped":
        return RunState.STOPPED, "saved on request; --resume latest goes on"
    return RunState.FAILED, f"ended with outcome {outcome}; see the log"


def is_process_alive(start: Mapping[str, Any]) -> bool | None:
    """Tell whether the process of a start record lives, None where that cannot be seen.

    A process of that number which began after the record is another one.
    """
    pid = start.get("pid")
    if not isinstance(pid, int) or start.get("hostname") != socket.gethostname():
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
    recorded = _seconds_of(start)
    return recorded is None or began <= recorded + CLOCK_SLACK_SECONDS


def _seconds_of(record: Mapping[str, Any]) -> float | None:
    """Return the time of a record in seconds since 1970, None where it has none."""
    try:
        moment = datetime.fromisoformat(record["time"])
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def condense(values: Sequence[float], points: int) -> list[float]:
    """Return at most `points` values: the means of equal pieces, in order."""
    if len(values) <= points:
        return list(values)
    edges = [index * len(values) // points for index in range(points + 1)]
    pieces = (values[low:high] for low, high in itertools.pairwise(edges))
    return [math.fsum(piece) / len(piece) for piece in pieces]


class RunWatcher:
    """Looks at one run again and again, reading what is new.

    Args:
        paths: Where the run keeps its things.
        hourly_price: For the time whose price the run did not know.
    """

    def __init__(self, paths: RunPaths, hourly_price: float | None = None) -> None:
        self._paths, self._hourly_price = paths, hourly_price
        self._metrics = MetricsLog()
        self._machine = MachineProbe(paths.checkpoints)
        self._views: dict[str, CheckpointView] = {}
        self._journal_version: tuple[int, int] | None = None
        self._uploads: dict[str, JournalEntry] = {}

    def look(self) -> RunStatus:
        """Return the state of the run now."""
        problems = self._read_files()
        record = self._last_record("loss")
        metrics = Metrics.of({**record, **self._last_record("validation_loss")})
        if "loss" in record and (metrics.loss is None or not math.isfinite(metrics.loss)):
            problems.append(f"the loss of step {record['step']} is not finite")
        events, silent_seconds = self._metrics.events, self._silent_seconds()
        starts = [event for event in events if event["event"] in START_EVENTS]
        start = starts[-1] if starts else {}
        is_alive = is_process_alive(start)
        state, detail = judge_run(events, is_alive=is_alive, silent_seconds=silent_seconds)
        if state is RunState.NO_RUN:
            detail = f"{detail} in {self._paths.metrics}"
        max_steps = number(start.get("max_steps"))
        eta_seconds = _remaining_seconds(record, state, silent_seconds)
        return RunStatus(
            state=state,
            detail=detail,
            start=start,
            step=self._newest_step(),
            max_steps=None if max_steps is None else int(max_steps),
            eta_seconds=eta_seconds,
            silent_seconds=silent_seconds,
            metrics=metrics,
            loss_curve=self._loss_curve(),
            checkpoints=self._newest_checkpoints(problems),
            uploads=dict(Counter(entry.state.value for entry in self._uploads.values())),
            machine=self._machine.look(),
            costs=self._measure_costs(state, metrics.tokens_seen, eta_seconds),
            problems=problems,
        )

    def _measure_costs(
        self, state: RunState, tokens_seen: float | None, eta_seconds: float | None
    ) -> Costs | None:
        is_running = state is RunState.RUNNING
        now = datetime.now(timezone.utc).timestamp() if is_running else None
        return summarize_costs(
            read_spending(self._metrics, now),
            tokens_seen=tokens_seen,
            remaining_seconds=eta_seconds,
            hourly_price=self._hourly_price,
        )

    def _read_files(self) -> list[str]:
        problems = []
        try:
            self._metrics.read_new(self._paths.metrics)
        except OSError as exc:
            problems.append(f"{self._paths.metrics} cannot be read: {exc.strerror or exc}")
        if self._metrics.bad_lines:
            problems.append(f"{self._paths.metrics}: {self._metrics.bad_lines} unreadable lines")
        try:
            self._read_journal()
        except (OSError, RecursionError) as exc:
            problems.append(f"{self._paths.journal} cannot be read: {exc}")
        return problems

    def _read_journal(self) -> None:
        try:
            facts = self._paths.journal.stat()
        except FileNotFoundError:
            self._journal_version, self._uploads = None, {}
            return
        version = (facts.st_size, facts.st_mtime_ns)
        if version != self._journal_version:
            self._uploads = Journal(self._paths.journal).latest()
            self._journal_version = version

    def _newest_checkpoints(self, problems: list[str]) -> list[CheckpointStatus]:
        directory = self._paths.checkpoints
        try:
            names = find_checkpoints(directory)[-NEWEST_CHECKPOINTS:]
        except OSError as exc:
            problems.append(f"{directory} cannot be read: {exc.strerror or exc}")
            return []
        # A committed checkpoint never changes, so it is read once.
        views = {
            str(name): self._views.get(str(name)) or read_local_checkpoint(directory / str(name))
            for name in names
        }
        self._views = {name: view for name, view in views.items() if view.problem is None}
        return [_checkpoint_status(view, self._uploads.get(name)) for name, view in views.items()]

    def _last_record(self, key: str) -> dict[str, Any]:
        newest = itertools.islice(reversed(self._metrics.records), SEARCHED_RECORDS)
        return next((record for record in newest if key in record), {})

    def _newest_step(self) -> int | None:
        newest = [
            part[-1]["step"] for part in (self._metrics.records, self._metrics.events) if part
        ]
        return max(newest, default=None)

    def _silent_seconds(self) -> float | None:
        newest = [part[-1] for part in (self._metrics.records, self._metrics.events) if part]
        moments = [moment for record in newest if (moment := _seconds_of(record)) is not None]
        if not moments:
            return None
        return max(0.0, datetime.now(timezone.utc).timestamp() - max(moments))

    def _loss_curve(self) -> list[float]:
        newest = self._metrics.records[-CURVE_RECORDS:]
        losses = [loss for record in newest if (loss := number(record.get("loss"))) is not None]
        return condense(losses, CURVE_POINTS)


def _figure(record: Mapping[str, Any], key: str) -> float | None:
    """Return a number as it was logged, NaN and infinities too."""
    value = record.get(key)
    return value if isinstance(value, float) else number(value)


def _remaining_seconds(
    record: Mapping[str, Any], state: RunState, silent_seconds: float | None
) -> float | None:
    eta = number(record.get("eta_seconds"))
    if eta is None or state is not RunState.RUNNING:
        return None
    return max(0.0, eta - (silent_seconds or 0.0))


def _checkpoint_status(view: CheckpointView, upload: JournalEntry | None) -> CheckpointStatus:
    error = upload.details.get("error") if upload else None
    return CheckpointStatus(
        name=str(view.name),
        step=view.name.step,
        loss=view.loss,
        validation_loss=view.validation_loss,
        upload=upload.state.value if upload else None,
        upload_error=None if error is None else str(error),
        problem=view.problem,
    )
