"""The first signal asks, the second leaves at once, and afterwards nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from utils.errors import ExitCode
from utils.stopping import SIGNALS, StopRequest

PROJECT = Path(__file__).resolve().parents[2]


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_the_reason_and_interrupts_nothing(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = handlers()
    with StopRequest() as stop:
        assert (stop.reason, stop.is_agreed()) == (None, False)
        os.kill(os.getpid(), number)
        assert (stop.reason, stop.is_agreed()) == (number.name, True)
        assert stop.is_agreed()
    assert handlers() == before
    assert f"{number.name}: finishing this step, then saving." in capfd.readouterr().err


def test_handlers_are_put_back_after_an_error() -> None:
    before = handlers()
    inside = []
    with contextlib.suppress(RuntimeError), StopRequest():
        inside = handlers()
        raise RuntimeError
    assert inside != before
    assert handlers() == before


def test_a_stop_of_an_earlier_start_is_not_remembered() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGTERM"
    with StopRequest() as stop:
        assert not stop.is_agreed()


TRAINER = """
import atexit, sys, time
from utils.stopping import StopRequest
atexit.register(lambda: print("cleaned up", flush=True))
with StopRequest() as stop:
    print("ready", flush=True)
    while not (stop.is_agreed() and "obeys" in sys.argv):
        time.sleep(0.001)
print(f"saved after {stop.reason}", flush=True)
sys.exit(75)
"""


@pytest.fixture(scope="module")
def trainers() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Real processes, started together because torch takes its time to load."""
    with ExitStack() as stack:
        started = {
            kind: stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", TRAINER, kind.split()[0]],
                    cwd=PROJECT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for kind in ("obeys", "hangs SIGINT", "hangs SIGTERM")
        }
        try:
            for process in started.values():
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            yield started
        finally:
            for process in started.values():
                process.kill()


def test_a_process_that_obeys_ends_with_its_own_code(
    trainers: dict[str, subprocess.Popen[str]],
) -> None:
    process = trainers["obeys"]
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert output == "saved after SIGTERM\ncleaned up\n"
    assert "SIGTERM: finishing this step" in errors
    assert process.returncode == ExitCode.STOPPED


@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_leaves_at_once_with_its_number(
    trainers: dict[str, subprocess.Popen[str]], second: signal.Signals
) -> None:
    process = trainers[f"hangs {second.name}"]
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    lines = [process.stderr.readline() for _ in range(2)]
    assert lines == ["\n", "SIGINT: finishing this step, then saving. Once more leaves at once.\n"]
    process.send_signal(second)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + second
    assert errors == f"\nSecond {second.name}: leaving at once.\n"
    assert output == ""  # nothing that a stuck step or save could hold up
