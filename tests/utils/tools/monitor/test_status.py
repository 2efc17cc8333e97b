"""A look at a run shows what is there, says what is wrong, and reads only what is new."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sample_checkpoints import RUN_ID, make_checkpoint
from tests.sample_clock import Clock
from tests.sample_logs import ago, write_start, write_step
from utils.base import files, machine
from utils.base.text import epoch_seconds
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import RunPaths
from utils.tools.monitor import status as run_status
from utils.tools.monitor.state import RunState
from utils.tools.monitor.status import RunStatus, RunWatcher
from utils.tracking.metrics_log import append_metrics

NAME = "checkpoint-epoch0-step{}-files0"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "FIRST_CPU_SECONDS", 0.0)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "checkpoints", tmp_path / "logs", tmp_path / "cache")


def kinds(status: RunStatus) -> list[str]:
    return [warning.kind for warning in status.warnings]


def test_the_pace_decides_when_a_run_has_stalled(paths: RunPaths) -> None:
    clock = Clock()
    watcher = RunWatcher(paths, monotonic=clock)
    write_start(paths.metrics)
    for step in (10, 20, 30):
        write_step(paths.metrics, step)
    append_metrics(paths.metrics, {"step": 30, "validation_loss": 4.0})
    assert watcher.look().state is RunState.RUNNING
    write_step(paths.metrics, 40)
    status = watcher.look()
    limit = status.stall_seconds
    clock.now += limit - 1
    assert watcher.look().state is RunState.RUNNING
    clock.now += 2
    status = watcher.look()
    assert status.state is RunState.STALLED
    assert status.silent_seconds == limit + 1
    write_step(paths.metrics, 50)
    assert watcher.look().state is RunState.RUNNING


def test_a_run_over_a_shared_disk_is_known_by_its_records(paths: RunPaths) -> None:
    clock = Clock()
    watcher = RunWatcher(paths, monotonic=clock)
    # The other machine's clock is a day ahead.
    write_start(paths.metrics, hostname="far", time=ago(-86400))
    for step in (10, 20, 30):
        write_step(paths.metrics, step, time=ago(-86400 - step))
    append_metrics(paths.metrics, {"step": 30, "validation_loss": 4.0, "time": ago(-86430)})
    status = watcher.look()
    assert status.state is RunState.RUNNING
    assert "cannot be seen from here" in status.detail
    clock.now += status.stall_seconds + 1
    assert watcher.look().state is RunState.UNKNOWN
    write_step(paths.metrics, 40, time=ago(-86500))
    assert watcher.look().state is RunState.RUNNING


def test_a_process_that_is_gone_has_crashed_unless_its_log_grows(
    paths: RunPaths, dead_pid: int
) -> None:
    watcher = RunWatcher(paths)
    write_start(paths.metrics, pid=dead_pid)
    write_step(paths.metrics, 10)
    assert watcher.look().state is RunState.CRASHED
    assert watcher.look().state is RunState.CRASHED
    write_step(paths.metrics, 20)  # it lives in a container whose processes cannot be seen
    assert watcher.look().state is RunState.RUNNING
    assert watcher.look().state is RunState.RUNNING


def at(minute: int) -> dict[str, str]:
    return {"timestamp": f"2026-01-01T12:{minute:02}:00+00:00"}


def write_journal(paths: RunPaths, *lines: tuple[int, int, UploadState, dict[str, Any]]) -> None:
    """Append (step, minute, state, details) to the journal."""
    paths.journal.parent.mkdir(parents=True, exist_ok=True)
    with paths.journal.open("a") as file:
        for step, minute, state, details in lines:
            value = {
                "time": at(minute)["timestamp"],
                "checkpoint": NAME.format(step),
                "run_id": RUN_ID,
                "state": state.value,
                **details,
            }
            file.write(json.dumps(value) + "\n")


def test_uploads_show_progress_and_lag_behind_saves(paths: RunPaths) -> None:
    for step, minute in ((10, 0), (20, 10)):
        make_checkpoint(paths.checkpoints, step, **at(minute))
    write_journal(
        paths,
        (10, 1, UploadState.QUEUED, {}),
        (10, 5, UploadState.UPLOADING, {"sent": 5, "size": 20, "bytes_per_second": 2048}),
        (20, 11, UploadState.QUEUED, {}),
    )
    moment = epoch_seconds("2026-01-01T12:20:00+00:00")
    assert moment is not None
    watcher = RunWatcher(paths, clock=lambda: moment)
    status = watcher.look()
    assert status.save_interval_seconds == 600
    assert status.uploads == {"uploading": 1, "queued": 1}
    assert status.checkpoints[0].upload_progress["percent"] == 25
    assert "25%, 2.0 KiB/s" in status.checkpoints[0].upload_progress["text"]
    assert kinds(status) == ["upload_lagging"]  # the first has waited 19 min, the second 9
    assert "1 older" in status.warnings[0].message
    write_journal(paths, (10, 20, UploadState.VERIFIED, {}))
    assert kinds(watcher.look()) == []


def test_a_failed_upload_stays_a_warning_while_it_is_tried_again(paths: RunPaths) -> None:
    make_checkpoint(paths.checkpoints, 10)
    watcher = RunWatcher(paths)
    failed = {"error": "403", "attempts": 5, "permanent": False}
    write_journal(paths, (10, 1, UploadState.FAILED, failed))
    assert kinds(watcher.look()) == ["upload_failed"]
    write_journal(paths, (10, 2, UploadState.ARCHIVING, {"attempt": 6}))
    status = watcher.look()
    assert kinds(status) == ["upload_failed"]
    assert status.checkpoints[0].upload == "archiving"
    write_journal(paths, (10, 3, UploadState.VERIFIED, {}))
    assert kinds(watcher.look()) == []


def test_what_is_not_here_is_not_owed(paths: RunPaths) -> None:
    write_journal(paths, (10, 1, UploadState.FAILED, {"permanent": True, "error": "no"}))
    assert kinds(RunWatcher(paths).look()) == []


def test_a_compacted_journal_is_read_again_and_waits_are_not_forgotten(paths: RunPaths) -> None:
    for step, minute in ((10, 0), (20, 1)):
        make_checkpoint(paths.checkpoints, step, **at(minute))
    write_journal(
        paths,
        (10, 1, UploadState.QUEUED, {}),
        (10, 9, UploadState.UPLOADING, {}),
        (20, 9, UploadState.VERIFIED, {}),
    )
    moment = epoch_seconds("2026-01-01T12:10:00+00:00")
    assert moment is not None
    watcher = RunWatcher(paths, clock=lambda: moment + 1)
    before = watcher.look()
    Journal(paths.journal).compact()
    assert len(paths.journal.read_text().splitlines()) == 2
    after = watcher.look()
    assert after.uploads == before.uploads == {"uploading": 1, "verified": 1}
    assert "for 9m01s" in after.warnings[0].message  # the queued line is gone


def make_garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xff garbage")


@pytest.mark.parametrize(
    ("part", "make", "problem"),
    [
        ("metrics", os.mkfifo, "metrics.jsonl cannot be read: it is no regular file"),
        ("metrics", Path.mkdir, "metrics.jsonl cannot be read: Is a directory"),
        ("journal", os.mkfifo, "uploads.jsonl cannot be read: it is no regular file"),
        ("checkpoints", make_garbage, "checkpoints is no directory"),
        ("logs", make_garbage, "metrics.jsonl cannot be read: Not a directory"),
    ],
)
def test_something_else_in_the_place_of_a_file_is_said(
    paths: RunPaths, part: str, make: Callable[[Path], None], problem: str
) -> None:
    path = getattr(paths, part)
    path.parent.mkdir(exist_ok=True)
    make(path)
    status = RunWatcher(paths).look()
    assert status.state is RunState.NO_RUN
    assert [problem in text for text in status.problems] == [True]


def test_a_log_that_is_replaced_cut_or_deleted_while_it_is_watched(paths: RunPaths) -> None:
    watcher = RunWatcher(paths)
    write_start(paths.metrics)
    write_step(paths.metrics, 10)
    assert watcher.look().step == 10
    paths.metrics.unlink()
    status = watcher.look()
    assert (status.step, status.state) == (10, RunState.RUNNING)
    assert "is gone; what was read from it before is shown" in status.problems[0]
    write_start(paths.metrics)
    write_step(paths.metrics, 5)
    status = watcher.look()
    assert (status.step, status.problems) == (5, [])
    paths.metrics.write_bytes(b"")
    assert watcher.look().state is RunState.NO_RUN


HOSTILE = [
    {"step": 20, "loss": "\x1b[2J", "grad_norm": [1], "tokens_per_second": {"a": 1}},
    {"step": 21, "loss": 10**400, "perplexity": 1e308, "eta_seconds": 1e300, "mfu": "fast"},
    {"step": 22, "loss": 1e308, "learning_rate": True, "step_seconds": -1e308, "time": 7},
    {"step": 10**400, "loss": 1.0},
    {"step": 23, "loss": None, "data_wait_share": 10**30, "time": "9999-12-31T23:59:59+00:00"},
    {"event": ["start"], "step": 24},
    {"event": "bad_step", "step": 25, "kind": {"\x1b": 1}},
    {
        "event": "start",
        "step": 26,
        "pid": -5,
        "hostname": 7,
        "max_steps": 1e300,
        "run_id": [1],
        "num_parameters": 10**400,
        "world_size": "\x1b[31m",
        "time": None,
    },
]


def test_hostile_values_are_taken_for_what_they_are(paths: RunPaths) -> None:
    paths.logs.mkdir()
    watcher = RunWatcher(paths)
    for record in HOSTILE:
        with paths.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        status = watcher.look()
        assert status.eta_seconds is None
    assert status.max_steps is None
    assert status.step == 26
    assert status.problems == [f"{paths.metrics}: 1 unreadable lines"]


def test_memory_is_bounded_and_take_backs_beyond_it_are_obeyed(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_status, "KEPT_RECORDS", 100)
    monkeypatch.setattr(files, "LINE_BLOCK_BYTES", 2**14)
    write_start(paths.metrics)
    with paths.metrics.open("a") as file:
        for step in range(1, 2001):
            line = {"step": step, "loss": 1.0 + step, "pad": "x" * 300}
            file.write(json.dumps(line) + "\n")
    watcher = RunWatcher(paths)
    status = watcher.look()
    assert (status.step, status.max_steps, status.metrics.loss) == (2000, 100, 2001.0)
    assert len(watcher._metrics.records) == 100
    write_start(paths.metrics, "resume", 50)  # before all that was parsed
    for status in (RunWatcher(paths).look(), watcher.look()):
        assert (status.step, status.metrics.loss) == (50, 51.0)


def test_a_full_disk_and_a_filling_one_are_told_of_a_live_run(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"bytes": 100 * 2**30}
    monkeypatch.setattr(
        machine.psutil,
        "disk_usage",
        lambda path: type("Usage", (), {"free": free["bytes"], "total": 200 * 2**30})(),
    )
    clock = Clock()
    watcher = RunWatcher(paths, monotonic=clock)
    write_start(paths.metrics)
    for step in range(1, 61):
        write_step(paths.metrics, step)
        assert kinds(status := watcher.look()) in ([], ["disk_filling"])
        clock.now += 60
        free["bytes"] -= 2**30
    assert kinds(status) == ["disk_filling"]
    assert status.disk_seconds_left == pytest.approx(41 * 60, rel=0.1)
    free["bytes"] = 2**29
    assert "disk_low" in kinds(watcher.look())


def test_a_disk_that_cannot_be_read_is_not_known(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(machine.psutil, "disk_usage", refuse)
    assert RunWatcher(paths).look().machine.disk_free_bytes is None
