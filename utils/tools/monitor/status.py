"""A run as it can be seen from outside: its files, its process, its machine.

    metrics.jsonl, journal, checkpoints/, process table, psutil, NVML -> RunStatus -> monitor

Watching changes nothing: files are only read, no lock is touched, no signal is sent. Each look
reads what is new in metrics.jsonl and the journal, and the newest checkpoints. What cannot be read
is named in `problems`, and the rest is shown. No torch here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from utils.base.machine import MachineLoad, MachineProbe
from utils.base.text import epoch_seconds, number
from utils.checkpoints.journal import JournalEntry, UploadState
from utils.checkpoints.layout import RunPaths, find_checkpoints
from utils.checkpoints.run_record import read_run_record
from utils.checkpoints.views import CheckpointView, read_local_checkpoint
from utils.costs.costs import Costs, summarize_costs
from utils.costs.spending import read_spending
from utils.tools.monitor.disk_trend import DiskTrend
from utils.tools.monitor.log_findings import LogFindings, Metrics, UploadLog
from utils.tools.monitor.state import RunState, is_process_alive, judge_run
from utils.tools.monitor.warnings import RunWarning, judge_disk, judge_state, judge_uploads
from utils.tracking.metrics_log import MAX_STEP, MetricsLog
from utils.uploads.status import describe_progress

NEWEST_CHECKPOINTS = 5
KEPT_RECORDS = 5000
ENDED_STATES = (RunState.STOPPED, RunState.CRASHED, RunState.FAILED)
MAX_ETA_SECONDS = 100 * 365 * 86400.0


@dataclass(frozen=True)
class CheckpointStatus:
    """One of the newest checkpoints, and the state of its upload.

    Attributes:
        upload: State of the upload, None where the journal does not know the checkpoint.
        upload_progress: What `describe_progress` returns; empty while nothing is being uploaded.
    """

    name: str
    step: int
    loss: float | None
    validation_loss: float | None
    total_bytes: int | None
    upload: str | None
    upload_progress: dict[str, Any]
    upload_error: str | None
    problem: str | None


@dataclass(frozen=True)
class RunStatus:
    """One look at a run; None where something is not known.

    Attributes:
        state: What the run is doing.
        detail: The evidence for that state.
        start: The newest start or resume record, empty where there is none.
        step: Newest step of any record.
        eta_seconds: Time to the end of a running run.
        silent_seconds: Time since the newest record.
        stall_seconds: Silence after which it counts as stalled.
        loss_curve: Training loss, the newest records condensed.
        checkpoints: The newest ones on this machine.
        save_interval_seconds: Time between the two newest.
        uploads: Upload state -> number of checkpoints.
        disk_seconds_left: Time until the checkpoints' disk is full; None while it is not filling,
            or has not been watched for long enough to tell.
        costs: Machine time and dollars over all attempts of the run.
        warnings: What needs attention.
        problems: What cannot be read.
        go_on: The command that goes on with a run that ended before its last step.
    """

    state: RunState
    detail: str
    start: dict[str, Any]
    step: int | None
    max_steps: int | None
    eta_seconds: float | None
    silent_seconds: float | None
    stall_seconds: float
    metrics: Metrics
    loss_curve: list[float]
    checkpoints: list[CheckpointStatus]
    save_interval_seconds: float | None
    uploads: dict[str, int]
    machine: MachineLoad
    disk_seconds_left: float | None
    costs: Costs | None
    warnings: list[RunWarning]
    problems: list[str]
    go_on: str = ""


class RunWatcher:
    """Looks at one run again and again, reading what is new.

    `hourly_price` is dollars an hour for time that the run itself had no price for.
    """

    def __init__(
        self,
        paths: RunPaths,
        hourly_price: float | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths, self._hourly_price = paths, hourly_price
        self._clock, self._monotonic = clock, monotonic
        self._metrics = MetricsLog(limit=KEPT_RECORDS)
        self._uploads = UploadLog(paths.journal)
        self._machine = MachineProbe(paths.checkpoints)
        self._disk = DiskTrend()
        self._is_first_look = True
        self._began_at = monotonic()
        self._grew_at: float | None = None
        self._was_gone = False  # the process of the run, at the last look
        self._is_elsewhere = False

    def look(self) -> RunStatus:
        """Return the state of the run now."""
        problems: list[str] = []
        has_grown = self._read_metrics(problems)
        self._read_journal(problems)
        findings = LogFindings.of(self._metrics)
        silent_seconds = self._silent_seconds(findings)
        state, detail = judge_run(
            self._metrics.events,
            is_alive=self._see_process(findings.start, has_grown),
            silent_seconds=silent_seconds,
            stall_seconds=findings.stall_seconds,
            has_records=bool(self._metrics.records),
            is_evaluating=self._is_evaluating(),
        )
        if state is RunState.NO_RUN:
            detail = f"{detail} in {self._paths.metrics}"
        names = self._find_checkpoints(problems)
        views = [
            read_local_checkpoint(self._paths.checkpoints / name, brief=True)
            for name in names[-NEWEST_CHECKPOINTS:]
        ]
        machine = self._machine.look()
        interval = _save_interval(views)
        if machine.disk_free_bytes is not None:
            self._disk.add(self._monotonic(), machine.disk_free_bytes)
        eta_seconds = _remaining_seconds(findings.newest, state, silent_seconds)
        disk_seconds = self._disk.seconds_left(interval)
        of_state = judge_state(state.value, silent_seconds, findings.stall_seconds)
        warnings = [of_state] if of_state is not None else []
        warnings += [*findings.warnings, *self._judge_uploads(names, interval)]
        if state.is_live:
            size = views[-1].total_bytes if views else None
            warnings += judge_disk(machine.disk_free_bytes, disk_seconds, size, eta_seconds)
        max_steps, now = number(findings.start.get("max_steps")), self._clock()
        record = read_run_record(self._paths.checkpoints) if state in ENDED_STATES else None
        return RunStatus(
            state=state,
            detail=detail,
            start=findings.start,
            step=findings.step,
            max_steps=int(max_steps) if max_steps and 0 < max_steps < MAX_STEP else None,
            eta_seconds=eta_seconds,
            silent_seconds=silent_seconds,
            stall_seconds=findings.stall_seconds,
            metrics=findings.metrics,
            loss_curve=findings.loss_curve,
            checkpoints=[_checkpoint_status(view, self._uploads.entries, now) for view in views],
            save_interval_seconds=interval,
            uploads=dict(Counter(one.state.value for one in self._uploads.entries.values())),
            machine=machine,
            disk_seconds_left=disk_seconds,
            costs=summarize_costs(
                read_spending(self._metrics, now if state.is_live else None),
                tokens_seen=findings.metrics.tokens_seen,
                remaining_seconds=eta_seconds,
                hourly_price=self._hourly_price,
            ),
            warnings=warnings,
            problems=problems,
            go_on="" if record is None else record.command,
        )

    def _is_evaluating(self) -> bool:
        """Tell whether an evaluation has begun and not yet logged its result."""
        records, events = self._metrics.records, self._metrics.events
        if not events or events[-1]["event"] != "evaluating":
            return False
        last = records[-1] if records else {"step": 0}
        return last["step"] <= events[-1]["step"] and "validation_loss" not in last

    def _read_metrics(self, problems: list[str]) -> bool:
        """Read what is new in the log; tell whether there was anything."""
        path, log = self._paths.metrics, self._metrics
        has_grown = False
        try:
            has_grown = log.read_new(path)
            if (log.records or log.events) and not path.exists():
                problems.append(f"{path} is gone; what was read from it before is shown")
            if has_grown and not self._is_first_look:
                self._grew_at = self._monotonic()
            self._is_first_look = False
        except OSError as exc:
            problems.append(f"{path} cannot be read: {exc.strerror or exc}")
        if log.bad_lines:
            problems.append(f"{path}: {log.bad_lines} unreadable lines")
        return has_grown

    def _read_journal(self, problems: list[str]) -> None:
        path = self._paths.journal
        try:
            self._uploads.read_new()
        except NotADirectoryError:
            return  # `_find_checkpoints` says so
        except OSError as exc:
            problems.append(f"{path} cannot be read: {exc.strerror or exc}")
        if self._uploads.bad_lines:
            problems.append(f"{path}: {self._uploads.bad_lines} unreadable lines")

    def _silent_seconds(self, findings: LogFindings) -> float | None:
        """Return the time since the last record, None where there is none.

        Clocks of two machines differ, so the moment at which the log was seen to grow comes first.
        While it has not grown, the run has been silent for at least as long as the watch.
        """
        now = self._monotonic()
        if self._grew_at is not None:
            return now - self._grew_at
        if findings.newest_time is None:
            return None
        return max(self._clock() - findings.newest_time, now - self._began_at)

    def _see_process(self, start: Mapping[str, Any], has_grown: bool) -> bool | None:
        """Tell whether the process lives, None where it cannot be seen.

        A container may share the host's name but not its processes. So where the log grows although
        the process was gone at the look before, the process lives elsewhere.
        """
        is_alive = is_process_alive(start)
        self._is_elsewhere = is_alive is False and (
            self._is_elsewhere or (self._was_gone and has_grown)
        )
        self._was_gone = is_alive is False
        return None if self._is_elsewhere else is_alive

    def _judge_uploads(
        self, names: Collection[str], save_interval_seconds: float | None
    ) -> list[RunWarning]:
        """Judge the uploads of checkpoints that are still here."""
        failures = self._uploads.failures
        waiting = self._uploads.waiting_seconds(self._clock())
        return judge_uploads(
            {name: failures[name] for name in names if name in failures},
            {name: waiting[name] for name in names if name in waiting},
            save_interval_seconds,
            self._paths.checkpoints,
        )

    def _find_checkpoints(self, problems: list[str]) -> list[str]:
        directory = self._paths.checkpoints
        try:
            names = find_checkpoints(directory)
            if not names and directory.exists() and not directory.is_dir():
                problems.append(f"{directory} is no directory")
        except OSError as exc:
            problems.append(f"{directory} cannot be read: {exc.strerror or exc}")
            return []
        return [str(name) for name in names]


def _remaining_seconds(
    record: Mapping[str, Any], state: RunState, silent_seconds: float | None
) -> float | None:
    eta = number(record.get("eta_seconds"))
    if eta is None or not 0 <= eta < MAX_ETA_SECONDS or state is not RunState.RUNNING:
        return None
    return max(0.0, eta - (silent_seconds or 0.0))


def _save_interval(views: Sequence[CheckpointView]) -> float | None:
    """Return the time between the two newest checkpoints, None where it is not known."""
    moments = [epoch_seconds(view.metadata.get("timestamp")) for view in views[-2:]]
    if len(moments) < 2 or moments[0] is None or moments[1] is None:
        return None
    interval = moments[1] - moments[0]
    return interval if interval > 0 else None


def _checkpoint_status(
    view: CheckpointView, uploads: Mapping[str, JournalEntry], now: float
) -> CheckpointStatus:
    upload = uploads.get(str(view.name))
    error = upload.details.get("error") if upload else None
    progress = {}
    if upload is not None and upload.state in (UploadState.ARCHIVING, UploadState.UPLOADING):
        progress = describe_progress(upload, datetime.fromtimestamp(now, UTC))
    return CheckpointStatus(
        name=str(view.name),
        step=view.name.step,
        loss=view.loss,
        validation_loss=view.validation_loss,
        total_bytes=view.total_bytes,
        upload=upload.state.value if upload else None,
        upload_progress=progress,
        upload_error=None if error is None else str(error),
        problem=view.problem,
    )
