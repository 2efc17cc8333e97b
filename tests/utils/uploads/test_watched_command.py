"""Programs that move bytes: fed, metered, understood when they fail, ended when they stall."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import psutil
import pytest

from tests.utils.uploads.waiting import wait_until
from utils.base.errors import (
    AccessDeniedError,
    ConflictError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from utils.storage.bucket import Meter
from utils.uploads import watched_command
from utils.uploads.watched_command import StallTimer, WatchedCommand, _activity

BLOCK = 256 * 1024


def command(script: str, stall_seconds: float = 10, meter: Meter | None = None) -> WatchedCommand:
    """A Python program as the command; its verb is "go"."""
    words = [sys.executable, "-SEc", f"import os, sys, time\n{script}"]
    return WatchedCommand(words, "gs://runs/a", stall_seconds, meter or Meter())


def run_shell(
    folder: Path, script: str, write: Callable[[IO[bytes]], object] | None = None
) -> bytes:
    program = folder / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return WatchedCommand([str(program)], "gs://runs/a", 10, Meter()).run("go", [], write=write)


def test_what_it_prints_comes_back_and_its_input_arrives() -> None:
    data, meter = os.urandom(3 * BLOCK + 17), Meter()
    watched = command("sys.stdout.buffer.write(sys.stdin.buffer.read())", meter=meter)

    def write(sink: IO[bytes]) -> None:
        assert sink.write(data) == len(data)
        assert sink.write(b"end") == 3

    assert watched.run("go", [], write=write) == data + b"end"
    assert meter.sent == len(data) + 3
    assert command("print(sys.stdin.read() == '', *sys.argv)").run("two words", ["-x"]) == (
        b"True -c two words -x\n"
    )


def test_what_it_reads_of_a_file_is_metered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_command, "POLL_SECONDS", 0.05)
    path, meter = tmp_path / "archive", Meter()
    path.write_bytes(bytes(1000))
    script = "f = open(sys.argv[2], 'rb', 0); f.read(700); sys.stdin.read(1)"

    def write(sink: IO[bytes]) -> None:
        wait_until(lambda: meter.sent == 700 and meter.signs_of_life > 0)
        sink.write(b".")

    command(script, meter=meter).run("go", [str(path)], write=write, file=path)
    assert meter.sent == 701


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    gone = WatchedCommand([str(tmp_path / "gone")], "gs://runs", 10, Meter())
    with pytest.raises(StorageError, match="gone go gs://runs: it cannot be started"):
        gone.run("go", [])


# Failures.


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            "You are attempting to access protected data with no configured\n"
            "credentials. Please visit https://cloud.google.com/console#/project\n"
            'and sign up for an account, and then run the "gcloud auth login"\n'
            "command to configure gsutil to use these credentials.",
            AccessDeniedError,
        ),
        ("You do not currently have an active account selected.", AccessDeniedError),
        ("AccessDeniedException: 403 insufficient permissions", AccessDeniedError),
        ("ServiceException: 401 Anonymous caller does not have storage.objects", AccessDeniedError),
        ("ERROR: [None] does not have permission to access b instance [runs]", AccessDeniedError),
        ("BucketNotFoundException: 404 gs://runs bucket does not exist.", ObjectNotFoundError),
        ("CommandException: No URLs matched: gs://runs/x", ObjectNotFoundError),
        ("ERROR: The following URLs matched no objects or files:\ngs://x", ObjectNotFoundError),
        ("PreconditionException: 412 At least one of the pre-conditions", ConflictError),
        ("ERROR: (gcloud.storage.cp) HTTPError 412: At least one of", ConflictError),
        ("ServiceException: 503 Backend Error", TransientStorageError),
        ("ResumableUploadException: 429 Too Many Requests", TransientStorageError),
        ("ResumableUploadStartOverException: 404 Not Found", TransientStorageError),
        ("503 for gs://run-404/a-412/a-403: gs://run-401/404", TransientStorageError),
        ("", TransientStorageError),
    ],
)
def test_a_failure_says_whether_to_try_again(message: str, error: type[StorageError]) -> None:
    watched = command(f"print('Copying ...\\n', {message!r}, '\\n', file=sys.stderr); sys.exit(1)")
    with pytest.raises(StorageError, match=r" go gs://runs/a: ") as caught:
        watched.run("go", [])
    assert type(caught.value) is error
    last = message.splitlines()[-1] if message else "Copying"
    assert last in str(caught.value) or "gcloud auth login" in str(caught.value)


def test_a_program_that_ends_before_its_input_says_why() -> None:
    watched = command("print('403 no', file=sys.stderr); sys.exit(1)")
    with pytest.raises(AccessDeniedError, match="403 no"):
        watched.run("go", [], write=lambda sink: sink.write(bytes(50 * BLOCK)))


def test_a_program_that_did_not_take_its_whole_input_has_failed() -> None:
    block = bytes(BLOCK)
    for count in (1, 50):
        with pytest.raises(StorageError):
            command("sys.exit(0)").run(
                "go", [], write=lambda sink, n=count: [sink.write(block) for _ in range(n)]
            )


@pytest.mark.parametrize("raised", [KeyError("x"), BrokenPipeError(32, "x"), KeyboardInterrupt()])
def test_an_error_while_writing_ends_it_before_its_input_does(
    tmp_path: Path, raised: BaseException
) -> None:
    # A shell and what it starts: the end of the input must reach neither.
    whole, pids = tmp_path / "whole", tmp_path / "pids"
    (tmp_path / "reader").write_text("#!/bin/sh\necho $$ $PPID > $2\ncat > /dev/null\ntouch $1\n")

    def write(sink: IO[bytes]) -> None:
        sink.write(bytes(4 * BLOCK))
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        raise raised

    with pytest.raises(type(raised)) as caught:
        run_shell(tmp_path, f"sh {tmp_path}/reader {whole} {pids}; touch {whole}", write)
    assert caught.value is raised
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split()))
    assert not whole.exists()


# Stalls.


def test_only_what_stays_the_same_has_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(watched_command, "time", SimpleNamespace(monotonic=lambda: now[0]))
    timer = StallTimer(10)
    for state in range(5):
        now[0] += 9  # slow, but it goes on
        assert timer.see(state)
        assert not timer.is_over
    now[0] += 10
    assert not timer.see(4)
    assert not timer.is_over
    now[0] += 1
    assert timer.is_over


def stalls_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every program be taken for stalled once a file is there, and not before."""
    monkeypatch.setattr(StallTimer, "see", lambda self, state: False)
    monkeypatch.setattr(StallTimer, "is_over", property(lambda self: path.exists()))


def test_one_that_stalls_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalls_once(tmp_path / "pids", monkeypatch)
    script = (
        "trap '' TERM INT HUP\nsleep 600 &\none=$!\n"
        f"sh -c 'sleep 600 & echo $$ $! > {tmp_path}/more; wait' &\n"
        f"while [ ! -s {tmp_path}/more ]; do sleep 0.02; done\n"
        f"echo $$ $one $(cat {tmp_path}/more) > {tmp_path}/new\n"
        f"mv {tmp_path}/new {tmp_path}/pids\nwait"
    )
    with pytest.raises(TransientStorageError, match="program go gs://runs/a: no progress for"):
        run_shell(tmp_path, script)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 4
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_one_that_does_not_read_its_input_is_killed() -> None:
    watched = command("time.sleep(600)", 1.0)
    with pytest.raises(TransientStorageError, match="no progress for 1 s"):
        watched.run("go", [], write=lambda sink: sink.write(bytes(50 * BLOCK)))


def test_where_the_system_counts_no_bytes_its_work_is_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "io_counters", refuse)
    times = [(1.0, 0.2), (5.0, 0.4)]
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda process: times.pop(0))
    assert [_activity(os.getpid()) for _ in range(2)] == [1, 5]
