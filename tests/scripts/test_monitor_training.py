"""The monitor as a user sees it: once, in a pipe, and live in a terminal."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.config_files import PROJECT_DIRECTORY
from scripts import monitor_training
from scripts.monitor_training import main
from tests.sample_checkpoints import RUN_ID, make_checkpoint
from tests.sample_logs import write_start, write_step
from utils.base import console, machine
from utils.checkpoints.journal import Journal, UploadState
from utils.tracking.metrics_log import append_metrics

Capture = pytest.CaptureFixture[str]
SCRIPT = PROJECT_DIRECTORY / "scripts" / "monitor_training.py"
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"  # of the alternate screen
SHOW_CURSOR = b"\x1b[?25h"


@pytest.fixture(autouse=True)
def _work_in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "FIRST_CPU_SECONDS", 0.001)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "metrics.jsonl"


def run(capsys: Capture, *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: Capture, *argv: str) -> dict[str, Any]:
    code, out, err = run(capsys, "--once", "--json", *argv)
    assert (code, err) == (0, "")
    value: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    return value


def test_nothing_there_is_no_run_and_no_error(capsys: Capture) -> None:
    code, out, err = run(capsys, "--once")
    assert (code, err) == (0, "")
    assert "State: no run (nothing has been logged in logs/metrics.jsonl)" in out
    assert "none yet" in out
    assert "CPU: " in out


def test_running_run_shows_progress_losses_speed_and_eta(capsys: Capture, metrics: Path) -> None:
    write_start(metrics)
    for step in range(10, 60, 10):
        write_step(metrics, step, loss=8.0 - step / 20)
    validation = {"validation_loss": 5.6, "validation_perplexity": 270.4}
    append_metrics(metrics, {"step": 50, **validation, "best_validation_loss": 5.5})
    code, out, _ = run(capsys, "--once")
    assert code == 0
    for part in (
        f"State: running (process {os.getpid()} on {socket.gethostname()})",
        f"Run: {RUN_ID}, on cpu, precision no, 1 rank, 5.3M parameters",
        "Step: 50 / 100 (50.0%)  [###############...............]  ETA: ",
        "Training Loss: 5.500000  Perplexity: 244.69  Gradient Norm: 1.250",
        "Validation Loss: 5.600000  Perplexity: 270.40  Best: 5.500000",
        "Learning Rate: 4.00e-03  Tokens Seen: 102,400",
        "Speed: 3,400 tokens/s  602 ms/step  Data Wait: 0.3%",
        "7.500 to 5.500",
    ):
        assert part in out
    value = run_json(capsys)
    assert 0 < value["eta_seconds"] <= 3600
    assert value["stall_seconds"] > 0
    append_metrics(metrics, {"event": "evaluating", "step": 50})
    write_step(metrics, 50)
    assert ", evaluating)" in run(capsys, "--once")[1]
    append_metrics(metrics, {"step": 50, "validation_loss": 3.0})
    assert "evaluating" not in run(capsys, "--once")[1]


def test_newest_checkpoints_are_shown_with_their_upload_states(
    capsys: Capture, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoints"
    for step in range(10, 80, 10):
        make_checkpoint(directory, step)
    (directory / "checkpoint-epoch0-step60-files0" / "metadata.json").write_text("{")
    journal = Journal(directory / "uploads.jsonl")
    journal.record("checkpoint-epoch0-step70-files0", RUN_ID, UploadState.FAILED, error="403 no")
    journal.record("checkpoint-epoch0-step50-files0", RUN_ID, UploadState.VERIFIED)
    code, out, _ = run(capsys, "--once")
    assert code == 0
    lines = [line for line in out.splitlines() if "  checkpoint-epoch0-step" in line]
    assert len(lines) == 5
    assert "failed  Val: 5.9489  (403 no)" in lines[-1]
    assert "metadata.json cannot be read" in lines[-2]
    assert "verified" in lines[-3]
    assert "Checkpoints:  (uploads: 1 failed, 1 verified)" in out


def test_damaged_files_are_named_and_the_rest_is_shown(
    capsys: Capture, tmp_path: Path, metrics: Path
) -> None:
    write_start(metrics, device="\x1b[31mcpu", pid="\x1b[2J")
    write_step(metrics, 10, learning_rate="fast", step_seconds=None)
    with metrics.open("ab") as file:
        file.write(b'{"step": 11, "loss": NaN}\n\xff\xfe{\n')
    (tmp_path / "checkpoints" / "uploads.jsonl").mkdir(parents=True)
    code, out, _ = run(capsys, "--once")
    assert code == 0
    assert "Loss: nan" in out
    assert "the loss of step 11 is not finite" in out
    assert "1 unreadable lines" in out
    assert "uploads.jsonl cannot be read" in out
    assert "\x1b" not in out
    assert run_json(capsys)["metrics"]["loss"] is None
    write_step(metrics, 12, loss=math.nan)  # written as null
    assert "the loss of step 12 is not finite" in run(capsys, "--once")[1]


def test_json_has_warnings_with_what_to_do(capsys: Capture, metrics: Path) -> None:
    write_start(metrics)
    write_step(metrics, 10, grad_norm=11.5, mfu=0.41)
    append_metrics(metrics, {"event": "bad_step", "step": 11, "kind": "spike", "policy": "skip"})
    value = run_json(capsys)
    assert value["metrics"]["mfu"] == 0.41
    assert [warning["kind"] for warning in value["warnings"]] == ["gradient_norm", "bad_steps"]
    assert all(warning["advice"] for warning in value["warnings"])


def test_directories_and_run_name_can_be_given(capsys: Capture, tmp_path: Path) -> None:
    write_start(tmp_path / "l" / "r" / "metrics.jsonl", step=3)
    make_checkpoint(tmp_path / "c" / "r", 3)
    value = run_json(capsys, "--logging-dir", "l", "--output-dir", "c", "--run-name", "r")
    assert value["step"] == 3
    assert [row["step"] for row in value["checkpoints"]] == [3]


@pytest.mark.parametrize(
    "argv",
    [["--refresh", "0"], ["--refresh", "nan"], ["--refresh", "soon"], ["--hourly-price", "abc"]],
)
def test_wrong_numbers_exit_with_2(capsys: Capture, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "tset"],
        ["--run-name", "a/b"],
        ["--notify-command", ""],
        ["--logs-only", "--notify-command", "true"],
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(capsys: Capture, argv: list[str]) -> None:
    code, out, err = run(capsys, "--once", *argv)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")


def test_costs_of_a_running_run_count_to_now_at_a_given_price_too(
    capsys: Capture, metrics: Path
) -> None:
    launched = datetime.now(UTC) - timedelta(minutes=30)
    before = {
        "starts": 1,
        "seconds": 3600.0,
        "dollars": 10.0,
        "lost_seconds": 360.0,
        "lost_dollars": 1.0,
    }
    write_start(metrics, "resume", 10, launched_at=launched.isoformat(), spending=before)
    write_step(metrics, 50)
    assert "Spent 1h30m, $10.00 in 2 attempts (30m" in run(capsys, "--once")[1]
    costs = run_json(capsys, "--hourly-price", "8")["costs"]
    assert costs["seconds"] >= 5400
    assert costs["dollars"] >= 14.0
    # Half an hour from the launch to the event is the way to the first step.
    assert costs["lost_dollars"] == pytest.approx(5.0, abs=0.02)
    assert costs["starts"] == 2


# The log.


def test_logs_only_shows_the_last_lines_without_terminal_escapes(
    capsys: Capture, tmp_path: Path
) -> None:
    assert run(capsys, "--logs-only", "--once")[1] == "No log lines in logs/train.log yet.\n"
    log = tmp_path / "logs" / "train.log"
    log.parent.mkdir()
    log.write_text("".join(f"line {number}\n" for number in range(50)) + "bad \x1b[2J\n")
    code, out, _ = run(capsys, "--logs-only", "--once")
    assert code == 0
    assert out.splitlines() == [*(f"line {number}" for number in range(31, 50)), "bad ?[2J"]
    code, out, _ = run(capsys, "--logs-only", "--once", "--json")
    assert json.loads(out.splitlines()[0]) == {"line": "line 31"}
    log.unlink()
    os.mkfifo(log)
    code, out, err = run(capsys, "--logs-only", "--once")
    assert (code, out) == (2, "")
    assert err == "Error: logs/train.log cannot be read: it is no regular file.\n"


# A pipe: looks follow until Ctrl-C.


@pytest.fixture
def between_looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[None]], None]:
    """Run the steps of a generator instead of the pauses between looks, then press Ctrl-C."""

    def use(steps: Iterator[None]) -> None:
        def sleep(seconds: float) -> None:
            assert seconds == monitor_training.DEFAULT_REFRESH_SECONDS
            if next(steps, "end") == "end":
                raise KeyboardInterrupt

        monkeypatch.setattr(monitor_training, "time", SimpleNamespace(sleep=sleep))

    return use


def test_a_pipe_gets_a_line_a_look_until_ctrl_c_and_the_notify_command_its_events(
    capsys: Capture,
    tmp_path: Path,
    metrics: Path,
    between_looks: Callable[[Iterator[None]], None],
) -> None:
    command = tmp_path / "notify me"
    command.write_text('#!/bin/sh\necho "$PRETRAIN_EVENT $PRETRAIN_STEP" >> "$0.out"\n')
    command.chmod(0o755)

    def steps() -> Iterator[None]:
        write_start(metrics)
        write_step(metrics, 10)
        yield
        with metrics.open("a") as file:
            file.write('{"step": 20, "loss": NaN}\n')
        yield
        append_metrics(metrics, {"event": "end", "step": 20, "outcome": "done"})
        yield
        yield  # it is told once

    between_looks(steps())
    code, out, err = run(capsys, "--notify-command", f"'{command}'")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "no run: nothing has been logged" in lines[0]
    assert "step 10 / 100 (10.0%)  loss 5.000000" in lines[1]
    assert "step 20 is not finite" in lines[2]
    assert [" finished " in line for line in lines[3:]] == [True, True]
    assert command.with_name("notify me.out").read_text() == "not_finite 20\nfinished 20\n"


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_pipe_ends_with_the_run(
    capsys: Capture,
    metrics: Path,
    between_looks: Callable[[Iterator[None]], None],
    words: tuple[str, ...],
) -> None:
    """Before it, and while it goes on, looks follow."""

    def steps() -> Iterator[None]:
        write_start(metrics)
        yield
        write_start(metrics, pid=2**30)
        yield
        pytest.fail("the run has crashed: no look follows")

    between_looks(steps())
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    for line, state in zip(out.splitlines(), ("no run", "running", "crashed"), strict=True):
        assert state in line
    for outcome, state in (("done", "finished"), ("stopped", "stopped"), ("nan", "failed")):
        append_metrics(metrics, {"event": "end", "step": 20, "outcome": outcome})
        (line,) = run(capsys, *words)[1].splitlines()
        assert state in line


def test_a_pipe_gets_a_json_object_or_new_log_lines_a_look(
    capsys: Capture,
    metrics: Path,
    between_looks: Callable[[Iterator[None]], None],
) -> None:
    between_looks(iter([None]))
    code, out, _ = run(capsys, "--json")
    assert code == 0
    assert [json.loads(line)["state"] for line in out.splitlines()] == ["no run", "no run"]
    log = metrics.with_name("train.log")
    log.parent.mkdir()
    log.write_text("first\n")

    def steps() -> Iterator[None]:
        with log.open("a") as file:
            file.write("second\n")
        yield

    between_looks(steps())
    assert run(capsys, "--logs-only")[:2] == (0, "first\nsecond\n")


# A terminal.


def take_terminal() -> None:
    """Make standard input the controlling terminal, and Ctrl-C work also below a background job."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """The monitor on a pseudo-terminal of its own, as its controlling terminal."""

    def __init__(self, cwd: Path, *argv: str) -> None:
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.mode = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "--refresh", "0.05", *argv],
            cwd=cwd,
            env={**os.environ, "TERM": "xterm"},
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        self.unread = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def read_until(self, wanted: bytes) -> bytes:
        """Return what is shown up to this; the rest is for the next call."""
        end = time.monotonic() + 120  # of a test that hangs
        while wanted not in self.unread:
            ready = select.select([self.ours], [], [], max(0, end - time.monotonic()))[0]
            assert ready, f"{wanted!r} did not appear in {self.unread!r}"
            self.unread += os.read(self.ours, 65536)
        shown, found, self.unread = self.unread.partition(wanted)
        return shown + found

    def read_end(self, code: int) -> bytes:
        """Return the rest of what is shown; the terminal is as it was."""
        shown = self.read_until(LEAVE)
        assert self.process.wait(timeout=120) == code
        assert termios.tcgetattr(self.theirs) == self.mode
        while select.select([self.ours], [], [], 0)[0]:
            self.unread += os.read(self.ours, 65536)
        return shown + self.unread


@pytest.mark.parametrize(
    ("leave", "code"),
    [
        (lambda terminal: terminal.type(b"q"), 0),
        (lambda terminal: terminal.type(b"\x03"), 0),  # Ctrl-C
        (lambda terminal: terminal.process.send_signal(signal.SIGTERM), 143),
    ],
    ids=["q", "ctrl-c", "sigterm"],
)
def test_terminal_gets_a_live_view_and_is_given_back(
    tmp_path: Path, metrics: Path, leave: Callable[[Terminal], None], code: int
) -> None:
    write_start(metrics, device="\x1b]0;owned\x07caf\u00e9")
    write_step(metrics, 10)
    with Terminal(tmp_path, "--notify-command", "false") as terminal:
        shown = terminal.read_until(b"Step: 10 / 100")
        assert ENTER in shown
        # An orphaned process group is never stopped (POSIX), so Ctrl-Z cannot be typed here.
        signals = Path(f"/proc/{terminal.process.pid}/status").read_text()
        ignored = int(signals.split("SigIgn:")[1].split()[0], 16)
        assert ignored & 1 << signal.SIGTSTP - 1
        assert b"\x1b[32mState: running" in shown
        assert "on ?]0;owned?caf\u00e9,".encode() in shown
        write_step(metrics, 20)
        shown += terminal.read_until(b"Step: 20 / 100")
        append_metrics(metrics, {"event": "bad_step", "step": 21, "kind": "spike"})
        shown += terminal.read_until(b"--notify-command: false for bad_steps: exit code 1")
        leave(terminal)
        shown += terminal.read_end(code)
    assert SHOW_CURSOR in shown
    # The last view stays on the terminal.
    assert b"Step: 21 / 100" in shown[shown.rindex(LEAVE) :]
    for text in (b"Traceback", b"\x1b]0", b"\x07"):
        assert text not in shown


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name, is_movable in (("dumb", False), ("xterm", True)):
        monkeypatch.setenv("TERM", name)
        monkeypatch.setattr(console, "_shared_consoles", {})
        assert monitor_training.has_movable_cursor() is is_movable
