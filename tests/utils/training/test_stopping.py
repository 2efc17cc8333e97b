"""The first signal asks, the second leaves at once, and afterwards nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from utils.base.errors import ExitCode
from utils.training import stopping
from utils.training.stopping import SIGNALS, StopRequest

PROJECT = Path(__file__).resolve().parents[3]


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_the_reason_and_interrupts_nothing(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = handlers()
    with contextlib.suppress(RuntimeError), StopRequest() as stop:
        assert (stop.reason, stop.is_agreed()) == (None, False)
        os.kill(os.getpid(), number)
        assert (stop.reason, stop.is_agreed()) == (number.name, True)
        assert handlers() != before
        raise RuntimeError
    assert handlers() == before  # also after an error
    assert f"{number.name}: finishing this step, then saving." in capfd.readouterr().err
    with StopRequest() as stop:
        assert not stop.is_agreed()  # the earlier one is not remembered


def test_thread_descriptors_and_wakeup_descriptor_are_as_before() -> None:
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        signal.set_wakeup_fd(ours.fileno())
        with StopRequest() as stop:
            stop.request("a reason")
            assert len(threading.enumerate()) == len(threads) + 1
        assert signal.set_wakeup_fd(-1) == ours.fileno()
    assert set(threading.enumerate()) == threads
    assert open_descriptors() == descriptors


def test_a_request_from_another_thread_is_the_reason_and_the_first_one_stays() -> None:
    with StopRequest() as stop:
        assert (stop.reason, stop.requested_at) == (None, None)
        before = time.monotonic()
        thread = threading.Thread(target=stop.request, args=["preemption notice"])
        thread.start()
        thread.join()
        requested_at = stop.requested_at
        assert requested_at is not None
        assert before <= requested_at <= time.monotonic()
        assert stop.is_agreed()
        stop.request("another one")
        assert (stop.reason, stop.requested_at) == ("preemption notice", requested_at)


def test_a_terminal_that_goes_away_is_no_second_signal() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
            assert stop.is_agreed()
        assert stop.reason == "SIGHUP"


def test_a_hangup_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_agreed()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_wished_by_another_rank_has_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.base.ranks.any_rank", lambda wish: True)
    with StopRequest() as stop:
        assert stop.reason is None
        assert stop.is_agreed()
        assert stop.reason == "another rank was asked to stop"


@pytest.mark.parametrize("by_signal", [True, False])
@pytest.mark.parametrize(
    ("nothing_to_lose", "safe_point"), [(True, False), (True, True), (False, False)]
)
def test_only_a_run_without_a_step_that_reaches_no_safe_point_leaves_by_itself(
    monkeypatch: pytest.MonkeyPatch, *, by_signal: bool, safe_point: bool, nothing_to_lose: bool
) -> None:
    left: list[int] = []
    has_left = threading.Event()

    def leave(code: int) -> None:
        left.append(code)
        has_left.set()
        stop.nothing_to_lose = False

    monkeypatch.setattr(stopping.os, "_exit", leave)
    leaves = nothing_to_lose and not safe_point
    with StopRequest(leave_after_seconds=0.01 if leaves else 1e6) as stop:
        stop.nothing_to_lose = nothing_to_lose
        if by_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stop.request("preemption notice")
        if safe_point:
            assert stop.is_agreed()
        if leaves:
            assert has_left.wait(60)
        else:
            assert stop.reason is not None
            assert stop._milliseconds_left() is None  # there is no time to keep
    assert left == ([ExitCode.STOPPED] if leaves else [])


TRAINER = """
import atexit, ctypes, os, sys, time
from utils.training.stopping import StopRequest

def hang():
    # A C call that gives up the GIL and that no signal interrupts, as a collective is.
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    while True:
        libc.pthread_mutex_lock(lock)

def fill(descriptor):
    os.set_blocking(descriptor, False)
    try:
        while True:
            os.write(descriptor, bytes(65536))
    except BlockingIOError:
        os.set_blocking(descriptor, True)

kind = sys.argv[1]
atexit.register(lambda: print("cleaned up", flush=True))
with StopRequest(leave_after_seconds=60) as stop:
    if kind == "unread":
        fill(2)
    child = os.fork() if kind == "forks" else None
    if child == 0:
        time.sleep(60)
    print("ready", flush=True)
    if kind in ("hangs", "unread"):
        hang()
    while not stop.is_agreed():
        time.sleep(0.001)
    if child:
        print(f"child ended by {os.WTERMSIG(os.waitpid(child, 0)[1])}", flush=True)
print(f"saved after {stop.reason}", flush=True)
sys.exit(75)
"""
KINDS = ("forks", "unread", "hangs")
Trainers = dict[str, subprocess.Popen[str]]


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    """Real processes, started together because torch takes its time to load."""
    with ExitStack() as stack:
        started = {
            kind: stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", TRAINER, kind],
                    cwd=PROJECT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
            for kind in KINDS
        }
        try:
            for process in started.values():
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            yield started
        finally:
            for process in started.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def test_the_second_signal_leaves_a_c_call_at_once_with_its_number(trainers: Trainers) -> None:
    process = trainers["hangs"]
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    lines = [process.stderr.readline() for _ in range(2)]
    again = "Press Ctrl-C again to quit without saving."
    assert lines == ["\n", f"SIGINT: finishing this step, then saving. {again}\n"]
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == "\nSecond SIGTERM: leaving at once.\n"
    assert output == ""  # nothing that a stuck step or save could hold up


def test_two_signals_in_quick_succession_are_two_although_nobody_reads_the_messages(
    trainers: Trainers,
) -> None:
    process = trainers["unread"]
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def test_a_signal_to_the_whole_group_is_one_although_a_child_was_forked(
    trainers: Trainers,
) -> None:
    process = trainers["forks"]
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output == "child ended by 15\nsaved after SIGTERM\ncleaned up\n"
    assert process.returncode == ExitCode.STOPPED
