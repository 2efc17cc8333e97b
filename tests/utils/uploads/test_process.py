"""The upload process: out of the trainer's way, seen by it, and never left behind."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.sample_checkpoints import make_checkpoint, seal
from tests.utils.uploads.waiting import WAIT_SECONDS, started, wait_until
from utils.base.child_process import AUTOGROUP_FILE, NICENESS
from utils.base.errors import (
    CheckpointError,
    StorageError,
    TransientStorageError,
)
from utils.checkpoints.layout import archive_object, read_manifest, sidecar_object
from utils.uploads import process as upload_process
from utils.uploads.job import ProgressReport, UploadJob, UploadProgress, UploadResult, run_job
from utils.uploads.process import InterruptedUploadError, run_in_process
from utils.uploads.transports import TransportOptions

NAME = "checkpoint-epoch0-step10-files0"
ARCHIVE, SIDECAR = archive_object(NAME), sidecar_object(NAME)
GONE_SECONDS = 3.0
MEGABYTE = 2**20
CANARY = "canary-5f2c"


@pytest.fixture(scope="module")
def noise() -> bytes:
    return os.urandom(8 * MEGABYTE)  # less goes at once, and at no rate


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoints", 10)


@pytest.fixture
def large(tmp_path: Path, noise: bytes) -> Path:
    """A checkpoint whose archive is large enough to be watched."""
    path = make_checkpoint(tmp_path / "checkpoints", 10)
    (path / "optimizer.bin").write_bytes(noise)
    seal(path, 10)
    return path


@pytest.fixture
def options(tmp_path: Path) -> TransportOptions:
    return TransportOptions(str(tmp_path / "bucket"), "directory")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    others = set(psutil.Process().children(recursive=True))  # of fixtures of other files
    yield
    assert set(psutil.Process().children(recursive=True)) - others == set()


def the_child() -> psutil.Process:
    (child,) = psutil.Process().children()
    return child


def test_the_result_is_that_of_the_job(
    checkpoint: Path, options: TransportOptions, tmp_path: Path
) -> None:
    result = run_in_process(UploadJob(str(checkpoint), options))
    here = TransportOptions(str(tmp_path / "here"), "directory")
    expected = run_job(UploadJob(str(checkpoint), here), UploadProgress())
    assert (result.size, result.crc32c) == (expected.size, expected.crc32c)
    for name in (ARCHIVE, SIDECAR):
        assert (tmp_path / "bucket" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    again = run_in_process(UploadJob(str(checkpoint), options))
    assert (again.size, again.crc32c, again.sent) == (result.size, result.crc32c, 0)


def test_relative_paths_are_those_of_the_trainer(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = TransportOptions("bucket", "directory")
    run_in_process(UploadJob(f"checkpoints/{NAME}", options))
    assert (tmp_path / "bucket" / SIDECAR).is_file()


def test_its_errors_are_those_of_the_job(checkpoint: Path, options: TransportOptions) -> None:
    job = UploadJob(str(checkpoint), options)
    with pytest.raises(StorageError, match="KeyError: 'bogus'"):
        run_in_process(UploadJob(str(checkpoint), options, "bogus"))
    (checkpoint / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        run_in_process(job)


def test_what_it_logs_appears_in_the_log_of_the_trainer(
    checkpoint: Path,
    options: TransportOptions,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_in_process(UploadJob(str(checkpoint), options))
    line = f"The archive of {NAME} is in the bucket already."
    logger = logging.getLogger("utils")
    for level, lines in ((logging.WARNING, []), (logging.INFO, [line])):
        caplog.clear()
        logger.setLevel(level)
        (tmp_path / "bucket" / SIDECAR).unlink()
        run_in_process(UploadJob(str(checkpoint), options))
        logger.setLevel(logging.NOTSET)
        assert caplog.messages == lines
    assert caplog.records[0].name == "utils.uploads.job"


def test_it_is_seen_while_it_goes_on_out_of_the_way_and_without_secrets(
    large: Path, options: TransportOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("HF_TOKEN", "WANDB_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(key, CANARY)
    reports: list[ProgressReport] = []
    seen: dict[str, Any] = {}

    def look(report: ProgressReport) -> None:
        reports.append(report)
        if report.sent and not seen:
            child = the_child()
            group = AUTOGROUP_FILE.parent.parent / str(child.pid) / AUTOGROUP_FILE.name
            seen["is_leader"] = os.getsid(child.pid) == child.pid
            seen["nice"] = child.nice()
            seen["autogroup"] = group.read_text().split()[-1] if group.exists() else str(NICENESS)
            seen["words"] = child.cmdline()

    rate = replace(options, max_bytes_per_second=4 * MEGABYTE)
    result = run_in_process(UploadJob(str(large), rate, "none"), look)
    sent = [report.sent for report in reports]
    assert len(set(sent)) >= 2
    assert sent == sorted(sent)
    assert {report.total for report in reports[1:]} == {read_manifest(large).total_bytes}
    assert "uploading" in {report.stage for report in reports}
    assert result.sent >= result.size > 8 * MEGABYTE
    words = seen.pop("words")
    nice = min(19, os.nice(0) + NICENESS)
    assert seen == {"is_leader": True, "nice": nice, "autogroup": str(NICENESS)}
    assert "utils.uploads.process" in words
    assert CANARY not in " ".join(words)


# How it ends.


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.parametrize("can_be_killed", [True, False])
def test_what_makes_no_progress_is_ended_and_holds_nothing_up_where_no_kill_ends_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_be_killed: bool
) -> None:
    monkeypatch.setattr(upload_process, "STALL_MARGIN_SECONDS", 0.5)
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / "model.safetensors")  # whose reader waits for ever
    options = TransportOptions(str(tmp_path / "bucket"), "directory", stall_seconds=0.5)
    children: list[psutil.Process] = []
    with monkeypatch.context() as patch:
        if not can_be_killed:
            patch.setattr(upload_process, "END_SECONDS", 0.1)
            patch.setattr(os, "killpg", lambda group, number: children.append(the_child()))
        with pytest.raises(TransientStorageError, match="no progress for 1 s; the upload was end"):
            run_in_process(UploadJob(str(checkpoint), options))
    assert can_be_killed != bool(children)
    for child in children[:1]:
        child.kill()
        child.wait(WAIT_SECONDS)


def test_a_trainer_that_was_stopped_for_a_while_does_not_take_it_for_a_stall() -> None:
    reports = [ProgressReport("uploading", sent, 4, sent, None, 0) for sent in range(4)]
    result = UploadResult(4, "AAAAAA==", 1.0, 4)
    ours, theirs = Pipe()
    with ours, theirs:
        for message in (*reports, result):
            theirs.send(message)  # all of it is there when the trainer goes on
        seen: list[ProgressReport] = []
        # The limit is over at each of them, as it is after a stop.
        assert upload_process._follow(ours, -1e9, seen.append, lambda: False) == result
    assert seen == reports


def test_where_no_process_can_be_started_it_uploads_here(
    checkpoint: Path,
    options: TransportOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    run_in_process(UploadJob(str(checkpoint), options))
    assert (tmp_path / "bucket" / SIDECAR).is_file()
    assert "No upload process can be started" in caplog.text


# Its parent, and what it starts.

PARENT = """
import os, sys, time
from utils.uploads import process as upload_process
from utils.uploads.transports import TransportOptions
from utils.uploads.job import UploadJob

if __name__ == "__main__":
    def tell(report):
        if "fork" in sys.argv:
            sys.argv.remove("fork")
            if os.fork() == 0:  # as workers do, which then hold the connection open too
                time.sleep(60)
        print("busy", flush=True)

    job = UploadJob(sys.argv[1], TransportOptions("gs://runs/a", "gsutil"), "none")
    upload_process.run_in_process(job, tell)
"""


@pytest.fixture
def sleeping_gsutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gsutil that starts another program, then makes the file and hangs."""
    record = tmp_path / "gsutil.hangs"
    program = tmp_path / "bin/gsutil"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nsleep 60 &\n: > {record}\nwait\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return record


def require_gone(processes: list[psutil.Process]) -> None:
    gone, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert alive == []


@pytest.mark.parametrize("forks", [False, True])
def test_when_the_trainer_is_killed_it_goes_with_all_that_it_started(
    checkpoint: Path, sleeping_gsutil: Path, forks: bool
) -> None:
    with started(PARENT, checkpoint, *(["fork"] if forks else [])) as (parent, line):
        assert line == "busy\n"
        wait_until(sleeping_gsutil.exists)
        processes = psutil.Process(parent.pid).children(recursive=True)
        workers = [p for p in processes if os.getsid(p.pid) == parent.pid]
        processes = [p for p in processes if p not in workers]
        assert (len(processes), len(workers)) == (3, int(forks))  # itself, gsutil, sleep
        parent.kill()
        try:
            require_gone(processes)
        finally:
            for worker in workers:
                worker.kill()


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_it_started_ends_with_it(
    checkpoint: Path, sleeping_gsutil: Path, is_killed: bool
) -> None:
    job = UploadJob(str(checkpoint), TransportOptions("gs://runs/a", "gsutil"))
    processes: list[psutil.Process] = []

    def must_end() -> bool:
        if sleeping_gsutil.exists() and not processes:
            processes.extend(psutil.Process().children(recursive=True))
            if is_killed:
                the_child().kill()
        return bool(processes) and not is_killed

    error = TransientStorageError if is_killed else InterruptedUploadError
    with pytest.raises(error, match="code -9" if is_killed else None):
        run_in_process(job, must_end=must_end)
    assert len(processes) == 3
    require_gone(processes)
