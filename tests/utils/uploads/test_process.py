"""The upload process: out of the trainer's way, seen by it, and never left behind."""

from __future__ import annotations

import gzip
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.training_config import PROJECT_DIRECTORY
from tests.gcs_server import FakeGcsServer, Fault
from tests.sample_checkpoints import make_checkpoint, seal
from utils.base.child_process import AUTOGROUP_FILE, NICENESS
from utils.base.errors import (
    AccessDeniedError,
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
WAIT_SECONDS = 20.0
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
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TransportOptions:
    return TransportOptions(str(tmp_path / "bucket"), "directory")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    others = set(psutil.Process().children(recursive=True))  # of fixtures of other files
    yield
    assert set(psutil.Process().children(recursive=True)) - others == set()


def slow_job(checkpoint: Path, bucket: Path, bytes_per_second: float, **options: Any) -> UploadJob:
    """Return one that goes through the gsutil stand-in, or at a rate through a directory."""
    way = TransportOptions(
        str(bucket), "directory", max_bytes_per_second=bytes_per_second, **options
    )
    return UploadJob(str(checkpoint), way, "none")


def wait_until(is_so: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


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


def test_it_speaks_to_gs_with_the_trainers_environment(
    checkpoint: Path, gcs: FakeGcsServer
) -> None:
    job = UploadJob(str(checkpoint), TransportOptions("gs://runs/a", "python"))
    result = run_in_process(job)
    assert gcs.get_object("runs", f"a/{ARCHIVE}").size == result.size
    gcs.create_bucket("locked", writable=False)
    locked = UploadJob(str(checkpoint), TransportOptions("gs://locked/a", "python"))
    with pytest.raises(AccessDeniedError, match="gs://locked/a/Checkpoints"):
        run_in_process(locked)


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


def test_progress_comes_while_it_goes_on(large: Path, tmp_path: Path) -> None:
    reports: list[ProgressReport] = []
    result = run_in_process(slow_job(large, tmp_path / "bucket", 4 * MEGABYTE), reports.append)
    sent = [report.sent for report in reports]
    assert len(set(sent)) >= 2
    assert sent == sorted(sent)
    assert {report.total for report in reports[1:]} == {read_manifest(large).total_bytes}
    assert "uploading" in {report.stage for report in reports}
    assert result.sent >= result.size > 8 * MEGABYTE


def test_it_steps_back_and_has_a_session_of_its_own(large: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int, str]] = []

    def look(report: ProgressReport) -> None:
        if report.sent and not seen:
            child = the_child()
            group = AUTOGROUP_FILE.parent.parent / str(child.pid) / AUTOGROUP_FILE.name
            text = group.read_text() if group.exists() else ""
            seen.append((child.nice(), child.pid, os.getsid(child.pid), text))

    run_in_process(slow_job(large, tmp_path / "bucket", 12 * MEGABYTE), look)
    ((nice, pid, session, autogroup),) = seen
    assert nice == NICENESS
    assert session == pid
    assert autogroup == "" or autogroup.split()[-1] == str(NICENESS)


# How it ends.


def test_it_ends_on_request(large: Path, tmp_path: Path) -> None:
    reports: list[ProgressReport] = []
    job = slow_job(large, tmp_path / "bucket", 100_000)
    with pytest.raises(InterruptedUploadError):
        run_in_process(job, reports.append, lambda: any(report.sent for report in reports))
    assert not (tmp_path / "bucket" / ARCHIVE).exists()
    run_in_process(UploadJob(str(large), job.transport.__class__(job.transport.uri)))
    assert (tmp_path / "bucket" / SIDECAR).is_file()


def test_when_it_is_killed_another_attempt_is_worth_it(large: Path, tmp_path: Path) -> None:
    def kill(report: ProgressReport) -> None:
        the_child().kill()

    with pytest.raises(TransientStorageError, match=r"the upload process ended \(code -9\)"):
        run_in_process(slow_job(large, tmp_path / "bucket", 100_000), kill)


def test_what_makes_no_progress_is_ended(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_process, "STALL_MARGIN_SECONDS", 0.5)
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / "model.safetensors")  # whose reader waits for ever
    options = TransportOptions(str(tmp_path / "bucket"), "directory", stall_seconds=0.5)
    started = time.monotonic()
    with pytest.raises(TransientStorageError, match="no progress for 1 s; the upload was ended"):
        run_in_process(UploadJob(str(checkpoint), options))
    assert time.monotonic() - started < 5


def test_a_server_that_stalls_is_left_and_the_next_attempt_succeeds(
    checkpoint: Path, gcs: FakeGcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_process, "STALL_MARGIN_SECONDS", 0.5)
    fault = gcs.add_fault(Fault("stall", operation="upload", after_bytes=100))
    options = TransportOptions("gs://runs/a", "python", stall_seconds=4.0)
    with pytest.raises(TransientStorageError, match="no progress"):
        run_in_process(UploadJob(str(checkpoint), options))
    assert fault.fired == 1
    patient = replace(options, stall_seconds=60.0)  # a busy machine starts a process slowly
    result = run_in_process(UploadJob(str(checkpoint), patient))
    assert gcs.get_object("runs", f"a/{ARCHIVE}").size == result.size


def follow(script: Callable[[Any], None], on_progress: Callable[[ProgressReport], None]) -> Any:
    """Follow a process that says what the script sends."""
    ours, theirs = Pipe()
    with ours, theirs:
        process = threading.Thread(target=script, args=(theirs,))
        process.start()
        try:
            return upload_process._follow(ours, 0.3, on_progress, lambda: False)
        finally:
            process.join()


REPORTS = [ProgressReport("uploading", sent, 4, sent, None, 0) for sent in range(4)]
RESULT = UploadResult(4, "AAAAAA==", 1.0, 4)


def test_what_is_slow_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_process, "STALL_MARGIN_SECONDS", 0.3)
    monkeypatch.setattr(upload_process, "REPORT_SECONDS", 0.05)

    def go_on_slowly(connection: Any) -> None:
        for report in REPORTS:
            connection.send(report)
            time.sleep(0.35)  # less than the limit of 0.6 s, and together more
        connection.send(RESULT)

    seen: list[ProgressReport] = []
    assert follow(go_on_slowly, seen.append) == RESULT
    assert seen == REPORTS


def test_a_trainer_that_was_stopped_for_a_while_does_not_take_it_for_a_stall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upload_process, "STALL_MARGIN_SECONDS", 0.0)

    def go_on(connection: Any) -> None:
        for message in (*REPORTS, RESULT):
            connection.send(message)

    # The stop itself is the passing of time between two messages that are there already.
    assert follow(go_on, lambda report: time.sleep(0.4)) == RESULT


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


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_process_that_not_even_a_kill_ends_does_not_hold_the_uploads_up(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upload_process, "END_SECONDS", 0.1)
    monkeypatch.setattr(upload_process, "STALL_MARGIN_SECONDS", 0.0)
    children: list[psutil.Process] = []
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / "model.safetensors")
    options = TransportOptions(str(tmp_path / "bucket"), "directory", stall_seconds=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda group, number: children.append(the_child()))
        with pytest.raises(TransientStorageError, match="no progress"):
            run_in_process(UploadJob(str(checkpoint), options))
    children[0].kill()
    children[0].wait(WAIT_SECONDS)


# Its parent, and what it starts.

PARENT = """
import json, os, signal, sys, time
from utils.uploads import process as upload_process
from utils.uploads.transports import TransportOptions
from utils.uploads.job import UploadJob

if __name__ == "__main__":
    checkpoint, options = sys.argv[1], json.loads(sys.argv[2])
    signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))

    def tell(report):
        if "fork" in sys.argv:
            sys.argv.remove("fork")
            if os.fork() == 0:  # as workers do, which then hold the connection open too
                time.sleep(60)
        print("sent" if report.sent else "busy", flush=True)

    job = UploadJob(checkpoint, TransportOptions(**options), "none")
    print(upload_process.run_in_process(job, tell).crc32c, flush=True)
"""


class Parent:
    """A trainer that does nothing but upload, in a process group of its own."""

    def __init__(self, checkpoint: Path, *, forks: bool = False, **options: Any) -> None:
        words = [str(checkpoint), json.dumps(options), *(["fork"] if forks else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, *words],
            cwd=PROJECT_DIRECTORY,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def __enter__(self) -> Parent:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def descendants(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        for found in self.process.stdout:
            if found.strip() == line:
                return
        pytest.fail(f"it never said {line}")

    def result(self) -> str:
        output, _ = self.process.communicate(timeout=WAIT_SECONDS)
        assert self.process.returncode == 0
        return str(output.split()[-1])


@pytest.fixture
def sleeping_gsutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gsutil that starts another program and hangs; the file gets the number of that one."""
    record = tmp_path / "gsutil.pid"
    program = tmp_path / "bin/gsutil"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\nsleep 60 &\necho $! > {record}.new\nmv {record}.new {record}\nwait\n"
    )
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
    with Parent(checkpoint, forks=forks, uri="gs://runs/a", name="gsutil") as parent:
        wait_until(sleeping_gsutil.exists)
        parent.wait_for("busy")
        processes = parent.descendants()
        workers = [p for p in processes if os.getsid(p.pid) == parent.process.pid]
        processes = [p for p in processes if p not in workers]
        assert (len(processes), len(workers)) == (3, int(forks))  # itself, gsutil, sleep
        parent.process.kill()
        try:
            require_gone(processes)
        finally:
            for worker in workers:
                worker.kill()


def test_when_the_trainer_is_killed_while_it_starts_it_goes_too(
    checkpoint: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"uri": str(tmp_path / "bucket"), "name": "directory"}
    with Parent(checkpoint, **options) as parent:
        wait_until(parent.descendants)
        processes = parent.descendants()
        parent.process.kill()
        require_gone(processes)


def test_what_it_started_ends_with_it(checkpoint: Path, sleeping_gsutil: Path) -> None:
    job = UploadJob(str(checkpoint), TransportOptions("gs://runs/a", "gsutil"))
    processes: list[psutil.Process] = []

    def must_end() -> bool:
        if sleeping_gsutil.exists() and not processes:
            processes.extend(psutil.Process().children(recursive=True))
        return bool(processes)

    with pytest.raises(InterruptedUploadError):
        run_in_process(job, must_end=must_end)
    assert len(processes) == 3
    require_gone(processes)


def test_what_it_started_ends_when_it_is_killed(checkpoint: Path, sleeping_gsutil: Path) -> None:
    job = UploadJob(str(checkpoint), TransportOptions("gs://runs/a", "gsutil"))
    processes: list[psutil.Process] = []

    def must_end() -> bool:
        if sleeping_gsutil.exists() and not processes:
            processes.extend(psutil.Process().children(recursive=True))
            the_child().kill()
        return False

    with pytest.raises(TransientStorageError, match="code -9"):
        run_in_process(job, must_end=must_end)
    require_gone(processes)


def test_ctrl_c_in_the_terminal_does_not_reach_it(large: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"uri": str(tmp_path / "bucket"), "name": "directory"}
    with Parent(large, **options, max_bytes_per_second=6 * MEGABYTE) as parent:
        parent.wait_for("sent")
        os.killpg(parent.process.pid, signal.SIGINT)
        parent.wait_for("interrupted")
        result = parent.result()
    assert json.loads((tmp_path / "bucket" / SIDECAR).read_text())["archive"]["crc32c"] == result


def test_no_secret_of_the_environment_is_in_its_arguments_or_in_the_bucket(
    large: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for key in ("HF_TOKEN", "WANDB_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(key, CANARY)
    caplog.set_level(logging.DEBUG)
    words: list[str] = []

    def look(report: ProgressReport) -> None:
        words.extend(the_child().cmdline())

    run_in_process(slow_job(large, tmp_path / "bucket", 12 * MEGABYTE), look)
    assert "utils.uploads.process" in words
    assert CANARY not in " ".join(words)
    assert CANARY not in caplog.text
    assert CANARY.encode() not in gzip.decompress((tmp_path / "bucket" / ARCHIVE).read_bytes())
    assert CANARY.encode() not in (tmp_path / "bucket" / SIDECAR).read_bytes()
