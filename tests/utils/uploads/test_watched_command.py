"""Programs that move bytes: fed, metered, understood when they fail, ended when they stall."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from tests.gcs_server import FakeGcsServer, Fault
from utils.base.errors import (
    AccessDeniedError,
    ConflictError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from utils.storage.bucket import Meter
from utils.uploads import watched_command
from utils.uploads.transports import TransportOptions, open_transport
from utils.uploads.watched_command import WatchedCommand, _activity

BLOCK = 256 * 1024
BLOCKS = 60


def command(script: str, stall_seconds: float = 10, meter: Meter | None = None) -> WatchedCommand:
    """A Python program as the command; its verb is "go"."""
    words = [sys.executable, "-SEc", f"import os, sys, time\n{script}"]
    return WatchedCommand(words, "gs://runs/a", stall_seconds, meter or Meter())


def run_shell(
    folder: Path, script: str, write: Callable[[IO[bytes]], object] | None = None, **fields: Any
) -> bytes:
    program = folder / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    watched = WatchedCommand(
        [str(program)], "gs://runs/a", fields.get("stall_seconds", 10), Meter()
    )
    return watched.run("go", [], write=write)


def wait_until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_it_prints_comes_back_and_its_input_arrives() -> None:
    data, meter = os.urandom(3 * BLOCK + 17), Meter()
    watched = command("sys.stdout.buffer.write(sys.stdin.buffer.read())", meter=meter)

    def write(sink: IO[bytes]) -> None:
        assert sink.write(data) == len(data)
        sink.flush()
        assert sink.write(b"end") == 3

    assert watched.run("go", [], write=write) == data + b"end"
    assert meter.sent == len(data) + 3
    assert command("print(sys.stdin.read() == '', *sys.argv)").run("two words", ["-x"]) == (
        b"True -c two words -x\n"
    )


def test_its_input_is_held_to_the_rate() -> None:
    started = time.monotonic()
    watched = command("sys.stdin.buffer.read()", meter=Meter(4 * BLOCK))
    watched.run("go", [], write=lambda sink: sink.write(bytes(3 * BLOCK)))
    assert time.monotonic() - started >= 0.75


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
    for count in (1, 50):
        with pytest.raises(StorageError):
            command("sys.exit(0)").run("go", [], write=lambda sink, n=count: feed_late(sink, n))


def feed_late(sink: IO[bytes], count: int) -> None:
    for _ in range(count):
        sink.write(bytes(BLOCK))


class OwnError(Exception):
    """Raised while writing."""


@pytest.mark.parametrize("raised", [OwnError("x"), BrokenPipeError(32, "x"), KeyboardInterrupt()])
def test_an_error_while_writing_ends_it_before_its_input_does(
    tmp_path: Path, raised: BaseException
) -> None:
    # A shell and what it starts: the end of the input must reach neither.
    whole = tmp_path / "whole"
    (tmp_path / "reader").write_text("#!/bin/sh\ncat > /dev/null\ntouch $1\n")

    def write(sink: IO[bytes]) -> None:
        sink.write(bytes(4 * BLOCK))
        raise raised

    with pytest.raises(type(raised)) as caught:
        run_shell(tmp_path, f"sh {tmp_path}/reader {whole}; touch {whole}", write)
    assert caught.value is raised
    time.sleep(0.2)
    assert not whole.exists()


# Stalls.


def test_one_that_stalls_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    script = (
        "trap '' TERM INT HUP\nsleep 600 &\n"
        f"sh -c 'sleep 600 & echo $$ $! > {tmp_path}/more; wait' &\n"
        f"echo $$ $! > {tmp_path}/pids\nwait"
    )
    started = time.monotonic()
    with pytest.raises(TransientStorageError, match=r"program go gs://runs/a: no progress for 1 s"):
        run_shell(tmp_path, script, stall_seconds=1.0)
    assert time.monotonic() - started < 20
    pids = [
        int(word) for name in ("pids", "more") for word in (tmp_path / name).read_text().split()
    ]
    assert len(pids) == 4
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_one_that_does_not_read_its_input_is_killed() -> None:
    with pytest.raises(TransientStorageError, match="no progress for 1 s"):
        command("time.sleep(600)", 1.0).run(
            "go", [], write=lambda sink: sink.write(bytes(50 * BLOCK))
        )


def test_one_that_is_slow_is_left_alone() -> None:
    script = "for n in range(6): time.sleep(0.4); os.write(1, b'.')"
    assert command(script, 1.5).run("go", []) == b"......"


def test_where_the_system_counts_no_bytes_its_work_is_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "io_counters", refuse)
    before, end = _activity(os.getpid()), time.process_time() + 1.1
    while time.process_time() < end:
        pass
    assert _activity(os.getpid()) > before
    with pytest.raises(TransientStorageError):
        command("time.sleep(600)", 1.0).run("go", [])


# The real programs, against a server that stalls or is slow.


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.gsutil)
        for name in ("gcloud", "gsutil", "gsutil from a file")
    ]
)
def program(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FakeGcsServer, Callable[[float], None]]]:
    """A server, and a way to upload 15 MB to it, given how long it may stall."""
    name = request.param.split()[0]
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    with FakeGcsServer(tmp_path / "gcs", tls=True) as server:
        server.create_bucket("runs")
        environment = (
            server.gsutil_environment(tmp_path, {"GSUtil:resumable_threshold": "262144"})
            if name == "gsutil"
            else server.gcloud_environment(tmp_path, tls=True)
        )
        for key, value in environment.items():
            monkeypatch.setenv(key, value)

        def upload(stall_seconds: float) -> None:
            rate = 1e12 if request.param == "gsutil" else None  # held to a rate, it streams
            options = TransportOptions(
                "gs://runs", name, None, 1, rate, stall_seconds, scratch=str(tmp_path)
            )
            most = BLOCKS * BLOCK
            monkeypatch.setattr("utils.uploads.transports.SMALL_BYTES", 0)
            open_transport(options).put("a", lambda sink: feed_late(sink, BLOCKS), None, most)

        yield server, upload


def descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_a_program_that_hangs_on_a_silent_server_is_ended(
    program: tuple[FakeGcsServer, Callable[[float], None]],
) -> None:
    server, upload = program
    before, started = descendants(), set()
    fault = server.add_fault(
        Fault("stall", times=None, operation="upload.chunk", after_bytes=1_000_000)
    )

    def look() -> None:
        assert fault.wait_fired(30)
        started.update(descendants() - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    begun = time.monotonic()
    with pytest.raises(TransientStorageError, match="no progress for 3 s; it was ended"):
        upload(3.0)
    watcher.join()
    assert time.monotonic() - begun < 25
    assert fault.fired >= 1
    assert started
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in started))
    server.clear_faults()
    assert server.list_objects("runs") == []


@pytest.mark.slow
def test_a_program_on_a_slow_line_is_left_alone(
    program: tuple[FakeGcsServer, Callable[[float], None]],
) -> None:
    # 6 s in all; the buffers of a connection, whose end is a silent one, hold less than 2 s of it.
    server, upload = program
    server.add_fault(
        Fault("slow", times=None, operation="upload.chunk", bytes_per_second=2_500_000)
    )
    begun = time.monotonic()
    upload(4.0)
    assert time.monotonic() - begun > 5.5
    assert server.get_object("runs", "a").size == BLOCKS * BLOCK
