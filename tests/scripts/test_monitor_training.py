import contextlib
import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime, timedelta

import pytest

from configs.training_config import PROJECT_DIRECTORY, get_training_config
from scripts.monitor_training import LogTail, main
from tests.sample_checkpoints import RUN_ID, make_checkpoint
from tests.sample_logs import write_start, write_step
from utils.base import machine
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import RunPaths
from utils.tools.monitor.live_screen import ENTER, LEAVE, count_cells
from utils.tools.monitor.status import RunWatcher
from utils.tracking.metrics_log import append_metrics

SCRIPT = PROJECT_DIRECTORY / "scripts" / "monitor_training.py"


@pytest.fixture(autouse=True)
def _work_in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "FIRST_CPU_SECONDS", 0.001)


@pytest.fixture
def metrics(tmp_path):
    return tmp_path / "logs" / "metrics.jsonl"


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


def run(capsys, *argv):
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *argv):
    code, out, err = run(capsys, "--once", "--json", *argv)
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=pytest.fail)


@contextlib.contextmanager
def monitor(*argv, cwd, stdout=subprocess.PIPE):
    command = [sys.executable, SCRIPT, "--refresh", "0.05", *argv]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def interrupt(process):
    process.send_signal(signal.SIGINT)
    return process.wait(timeout=20)


def test_nothing_there_is_no_run_and_no_error(capsys):
    code, out, err = run(capsys, "--once")
    assert (code, err) == (0, "")
    assert "State: no run (nothing has been logged in logs/metrics.jsonl)" in out
    assert "none yet" in out
    assert "CPU: " in out


def test_running_run_shows_progress_losses_speed_and_eta(capsys, metrics):
    write_start(metrics)
    for step in range(10, 60, 10):
        write_step(metrics, step, loss=8.0 - step / 20)
    append_metrics(metrics, {"step": 50, "validation_loss": 5.6, "best_validation_loss": 5.5})
    code, out, _ = run(capsys, "--once")
    assert code == 0
    for part in (
        f"State: running (process {os.getpid()} on {socket.gethostname()})",
        f"Run: {RUN_ID}, on cpu, precision no, 1 rank, 5.3M parameters",
        "Step: 50 / 100 (50.0%)  [####################....................]  ETA: ",
        "Loss: 5.500000  Perplexity: 244.69  Gradient Norm: 1.250",
        "Validation Loss: 5.600000  Best: 5.500000",
        "Learning Rate: 4.00e-03  Tokens Seen: 102,400",
        "Speed: 3,400 tokens/s  602 ms/step  Data Wait: 0.3%",
        "7.500 to 5.500",
    ):
        assert part in out
    assert 3500 < run_json(capsys)["eta_seconds"] <= 3600


def test_finished_run_has_no_eta(capsys, metrics):
    write_start(metrics)
    write_step(metrics, 100)
    append_metrics(metrics, {"event": "end", "step": 100, "outcome": "done"})
    value = run_json(capsys)
    assert value["state"] == "finished"
    assert value["eta_seconds"] is None
    assert value["step"] == value["max_steps"] == 100


def test_process_gone_without_an_end_record_is_said(capsys, metrics, dead_pid):
    write_start(metrics, pid=dead_pid)
    write_step(metrics, 10)
    code, out, _ = run(capsys, "--once")
    assert code == 0
    assert "State: crashed" in out
    assert "is gone without an end record" in out


def test_resume_does_not_show_steps_that_were_taken_back(capsys, metrics):
    write_start(metrics)
    for step in (10, 20, 30):
        write_step(metrics, step, loss=float(step))
    write_start(metrics, "resume", 20)
    value = run_json(capsys)
    assert value["step"] == 20
    assert value["metrics"]["loss"] == 20.0
    assert value["loss_curve"] == [10.0, 20.0]


def test_newest_checkpoints_are_shown_with_their_upload_states(capsys, tmp_path):
    directory = tmp_path / "checkpoints"
    for step in range(10, 80, 10):
        make_checkpoint(directory, step)
    (directory / "checkpoint-epoch0-step60-files0" / "metadata.json").write_text("{")
    journal = Journal(directory / "uploads.jsonl")
    journal.record("checkpoint-epoch0-step70-files0", RUN_ID, UploadState.FAILED, error="403 no")
    journal.record("checkpoint-epoch0-step50-files0", RUN_ID, UploadState.VERIFIED)
    code, out, _ = run(capsys, "--once")
    assert code == 0
    lines = [line for line in out.splitlines() if "checkpoint-epoch0" in line]
    assert len(lines) == 5
    assert "Val: 5.9489  failed  (403 no)" in lines[-1]
    assert "metadata.json cannot be read" in lines[-2]
    assert "verified" in lines[-3]
    assert "Checkpoints:  (uploads: 1 failed, 1 verified)" in out


def test_damaged_files_are_named_and_the_rest_is_shown(capsys, tmp_path, metrics):
    write_start(metrics, device="\x1b[31mcpu")
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


def test_metrics_that_cannot_be_opened_are_a_problem(capsys, metrics):
    metrics.mkdir(parents=True)
    code, out, _ = run(capsys, "--once")
    assert code == 0
    assert "metrics.jsonl cannot be read: Is a directory" in out


def test_directories_and_run_name_can_be_given(capsys, tmp_path):
    write_start(tmp_path / "l" / "r" / "metrics.jsonl", step=3)
    make_checkpoint(tmp_path / "c" / "r", 3)
    value = run_json(capsys, "--logging-dir", "l", "--output-dir", "c", "--run-name", "r")
    assert value["step"] == 3
    assert [row["step"] for row in value["checkpoints"]] == [3]


def test_logs_only_shows_the_last_lines_without_terminal_escapes(capsys, tmp_path):
    log = tmp_path / "logs" / "train.log"
    log.parent.mkdir()
    log.write_text("".join(f"line {number}\n" for number in range(50)) + "bad \x1b[2J\n")
    code, out, _ = run(capsys, "--logs-only", "--once")
    assert code == 0
    assert out.splitlines() == [*(f"line {number}" for number in range(31, 50)), "bad ?[2J"]
    code, out, _ = run(capsys, "--logs-only", "--once", "--json")
    assert json.loads(out.splitlines()[0]) == {"line": "line 31"}


def test_logs_only_without_a_log_says_so(capsys):
    code, out, _ = run(capsys, "--logs-only", "--once")
    assert code == 0
    assert "No log lines in logs/train.log yet." in out


def test_log_tail_follows_appends_whole_lines_and_another_file(tmp_path):
    path = tmp_path / "train.log"
    tail = LogTail(path)
    assert tail.read_new() == []
    path.write_text("a\nb\nhal")
    assert tail.read_new() == ["a", "b"]
    with path.open("a") as file:
        file.write("f\nc\n")
    assert tail.read_new() == ["half", "c"]
    assert tail.read_new() == []
    path.rename(tmp_path / "train.log.1")
    path.write_text("a new file that is longer than the old one was\n")
    assert tail.read_new() == ["a new file that is longer than the old one was"]
    path.write_text("cut\n")
    assert tail.read_new() == ["cut"]


def test_log_tail_reads_only_the_end_of_a_long_file(tmp_path):
    path = tmp_path / "train.log"
    path.write_bytes(b"x" * 2**20 + b"\nlast\n")
    assert LogTail(path).read_new()[-1] == "last"


@pytest.mark.parametrize(
    "argv", [["--refresh", "0"], ["--refresh", "nan"], ["--refresh", "soon"], ["--nonsense"]]
)
def test_wrong_options_exit_with_2(argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize("argv", [["--config", "tset"], ["--run-name", "a/b"]])
def test_wrong_configuration_is_one_message_and_exit_code_2(capsys, argv):
    code, out, err = run(capsys, "--once", *argv)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")


def test_pipe_gets_a_line_a_look_with_what_is_new_until_ctrl_c(tmp_path, metrics):
    with monitor(cwd=tmp_path) as process:
        assert "no run: nothing has been logged" in process.stdout.readline()
        write_start(metrics)
        write_step(metrics, 10)
        line = next(line for line in process.stdout if "step 10 / 100" in line)
        assert "loss 5.000000" in line
        assert "3,400 tokens/s" in line
        write_step(metrics, 20, loss=4.0)
        assert next(line for line in process.stdout if "loss 4.000000" in line)
        assert interrupt(process) == 0
        assert process.stderr.read() == ""


def test_pipe_gets_a_json_object_a_look(tmp_path):
    with monitor("--json", cwd=tmp_path) as process:
        looks = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert [look["state"] for look in looks] == ["no run", "no run"]
        assert interrupt(process) == 0


def test_reader_that_leaves_ends_it_without_a_traceback(tmp_path):
    with monitor(cwd=tmp_path) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""


def test_logs_only_follows_until_ctrl_c(tmp_path):
    log = tmp_path / "logs" / "train.log"
    log.parent.mkdir()
    log.write_text("first\n")
    with monitor("--logs-only", cwd=tmp_path) as process:
        assert process.stdout.readline() == "first\n"
        with log.open("a") as file:
            file.write("second\n")
        assert process.stdout.readline() == "second\n"
        assert interrupt(process) == 0
        assert process.stderr.read() == ""


class Terminal:
    """The monitor on a pseudo-terminal of its own, as its controlling terminal."""

    def __init__(self, cwd, *argv, size=(24, 80), **environment):
        self.ours, theirs = pty.openpty()
        self.resize(*size)
        self.mode = termios.tcgetattr(theirs)
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in ("COLUMNS", "LINES", "NO_COLOR", "LC_ALL")
        }
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "--refresh", "0.05", *argv],
            cwd=cwd,
            env={**inherited, "TERM": "xterm", **environment},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.theirs, self.unread = theirs, b""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)

    def resize(self, rows, columns):
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys):
        os.write(self.ours, keys)

    def read_until(self, wanted):
        """Return what is shown up to this; the rest is for the next call."""
        end = time.monotonic() + 20
        while wanted not in self.unread:
            ready = select.select([self.ours], [], [], max(0, end - time.monotonic()))[0]
            assert ready, f"{wanted!r} did not appear in {self.unread!r}"
            self.unread += os.read(self.ours, 65536)
        shown, found, self.unread = self.unread.partition(wanted)
        return shown + found

    def assert_left(self, code=0):
        """It has ended, and the terminal is as it was."""
        shown = self.read_until(LEAVE.encode())
        assert self.process.wait(timeout=20) == code
        assert termios.tcgetattr(self.theirs) == self.mode
        shown += self.unread
        while select.select([self.ours], [], [], 0)[0]:
            shown += os.read(self.ours, 65536)
        return shown


@pytest.mark.parametrize(
    ("leave", "code"),
    [
        (lambda terminal: terminal.type(b"q"), 0),
        (lambda terminal: terminal.type(b"\x03"), 0),  # Ctrl-C
        (lambda terminal: terminal.process.terminate(), 143),
    ],
    ids=["q", "ctrl-c", "sigterm"],
)
def test_terminal_gets_a_view_renewed_in_place_and_is_given_back(tmp_path, metrics, leave, code):
    write_start(metrics)
    write_step(metrics, 10)
    with Terminal(tmp_path) as terminal:
        shown = terminal.read_until(b"Step: 10 / 100")
        assert ENTER.encode() in shown
        assert b"Training Monitor" in shown
        write_step(metrics, 20)
        shown = terminal.read_until(b"Step: 20 / 100")
        leave(terminal)
        shown = terminal.assert_left(code)
        # The last view stays where the user was before.
        assert b"Step: 20 / 100" in shown[shown.rindex(LEAVE.encode()) :]
        assert b"Traceback" not in shown


def test_only_rows_that_changed_are_written(tmp_path, metrics):
    write_start(metrics)
    write_step(metrics, 10)
    with Terminal(tmp_path) as terminal:
        terminal.read_until(b"Disk Free:")
        write_step(metrics, 20)
        shown = terminal.read_until(b"Step: 20 / 100")
        assert b"Training Monitor" not in shown or len(shown) < 3000
        assert b"Run:" not in shown
        assert b"\x1b[2J" not in shown
        assert len(shown) < 3000
        terminal.resize(24, 60)
        terminal.read_until(b"\x1b[2J")
        rows = screen_rows(terminal.read_until(b"Disk Free:"))
        assert max(count_cells(row) for row in rows) <= 60


def screen_rows(shown):
    """Return the rows of a redraw, without escape sequences."""
    text = shown.decode()
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row) for row in re.split(r"\x1b\[\d+H", text)]


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(tmp_path, metrics):
    write_start(metrics)
    write_step(metrics, 10)
    with Terminal(tmp_path) as terminal:
        terminal.read_until(b"Step: 10 / 100")
        # An orphaned process group is not stopped by SIGTSTP (POSIX), so it goes on at once here.
        os.kill(terminal.process.pid, signal.SIGTSTP)
        terminal.read_until(LEAVE.encode())
        terminal.read_until(ENTER.encode())
        terminal.read_until(b"Step: 10 / 100")
        terminal.type(b"q")
        terminal.assert_left()


def test_colours_can_be_switched_off(tmp_path, metrics):
    write_start(metrics)
    write_step(metrics, 10)
    with Terminal(tmp_path, NO_COLOR="1") as terminal:
        shown = terminal.read_until(b"Step: 10")
        assert b"State: running" in shown
        assert b"\x1b[32m" not in shown


def test_a_terminal_in_the_c_locale_gets_ascii(tmp_path, metrics):
    write_start(metrics, device="caf\u00e9")
    for step in (10, 20):
        write_step(metrics, step, loss=10.0 - step / 10)
    with Terminal(tmp_path, LANG="C", LC_ALL="C") as terminal:
        shown = terminal.read_until(b"Disk Free:")
    assert b"\x1b[32mState: running" in shown
    assert b"Loss Curve: #_  9.000 to 8.000" in shown
    assert b"on caf?," in shown
    assert shown.isascii()


def test_a_dumb_terminal_gets_lines(tmp_path, metrics):
    write_start(metrics)
    write_step(metrics, 10)
    with Terminal(tmp_path, TERM="dumb") as terminal:
        shown = terminal.read_until(b"loss 5.000000")
        assert b"\x1b" not in shown
        terminal.type(b"\x03")
        assert terminal.process.wait(timeout=20) == 0


def recorder(path):
    """Return a --notify-command that writes down what it gets."""
    path.write_text('#!/bin/sh\necho "$PRETRAIN_EVENT $PRETRAIN_STEP" >> "$0.out"\n')
    path.chmod(0o755)
    return str(path), path.with_name(f"{path.name}.out")


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_the_notify_command_is_run_once_in_each_mode(capsys, tmp_path, metrics, form):
    command, out = recorder(tmp_path / "notify me")
    write_start(metrics)
    write_step(metrics, 100)
    append_metrics(metrics, {"event": "end", "step": 100, "outcome": "done"})
    code, _, err = run(capsys, "--once", "--notify-command", f"'{command}'", *form)
    assert (code, err) == (0, "")
    assert out.read_text() == "finished 100\n"


def test_the_notify_command_follows_a_run_through_a_pipe(tmp_path, metrics, dead_pid):
    command, out = recorder(tmp_path / "notify")
    with monitor("--notify-command", command, cwd=tmp_path) as process:
        process.stdout.readline()
        write_start(metrics)
        write_step(metrics, 10)
        next(line for line in process.stdout if "step 10 / 100" in line)
        with metrics.open("a") as file:
            file.write('{"step": 20, "loss": NaN}\n')
        next(line for line in process.stdout if "is not finite" in line)
        write_start(metrics, "resume", 20, pid=dead_pid)
        for _ in range(3):  # it is told once
            next(line for line in process.stdout if " crashed " in line)
        assert interrupt(process) == 0
        assert process.stderr.read() == ""
    assert out.read_text() == "not_finite 20\ncrashed 20\n"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("false", "exit code 1"),
        ("sleep 60", None),
    ],
)
def test_a_notify_command_that_fails_or_hangs_holds_nothing_up(
    tmp_path, metrics, dead_pid, command, complaint
):
    write_start(metrics, pid=dead_pid)
    with monitor("--notify-command", command, cwd=tmp_path) as process:
        for _ in range(5):
            assert "crashed" in process.stdout.readline()
        if complaint is not None:
            assert complaint in process.stderr.readline()
        assert interrupt(process) == 0


def test_a_failing_notify_command_shows_in_the_view(tmp_path, metrics, dead_pid):
    write_start(metrics, pid=dead_pid)
    with Terminal(tmp_path, "--notify-command", "false") as terminal:
        terminal.read_until(b"--notify-command: false for crashed: exit code 1")


@pytest.mark.parametrize("command", ["", "echo 'open"])
def test_a_notify_command_that_is_none_is_one_message(capsys, command):
    code, out, err = run(capsys, "--once", "--notify-command", command)
    assert (code, out) == (2, "")
    assert err.startswith("Error: --notify-command")


def test_json_has_warnings_with_what_to_do(capsys, tmp_path, metrics):
    write_start(metrics)
    write_step(metrics, 10, grad_norm=11.5, mfu=0.41)
    append_metrics(metrics, {"event": "bad_step", "step": 11, "kind": "spike", "policy": "skip"})
    value = run_json(capsys)
    assert value["metrics"]["mfu"] == 0.41
    assert [warning["kind"] for warning in value["warnings"]] == ["gradient_norm", "bad_steps"]
    assert all(warning["advice"] for warning in value["warnings"])
    assert value["stall_seconds"] > 0
    assert value["disk_seconds_left"] is None


def test_logs_only_of_something_else_is_one_message(capsys, tmp_path):
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "train.log")
    code, out, err = run(capsys, "--logs-only", "--once")
    assert (code, out) == (2, "")
    assert err == "Error: logs/train.log cannot be read: it is no regular file.\n"


def test_monitor_does_not_load_torch(tmp_path):
    code = (
        "import sys; from scripts.monitor_training import main\n"
        "assert main(['--once']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_DIRECTORY)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def write_priced_start(path, seconds_ago, price):
    launched = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    before = {
        "starts": 1,
        "seconds": 3600.0,
        "dollars": 10.0,
        "lost_seconds": 360.0,
        "lost_dollars": 1.0,
    }
    write_start(
        path, "resume", 10, launched_at=launched.isoformat(), hourly_price=price, spending=before
    )


def test_costs_of_a_running_run_count_to_now(capsys, metrics):
    write_priced_start(metrics, 1800, 8.0)
    write_step(metrics, 50)
    out = run(capsys, "--once")[1]
    assert "Cost: $14.00 so far, $136.7" in out
    # Half an hour from the launch to the event is the way to the first step.
    assert " per million tokens, $8.00 to the end, $5.00 lost to restarts" in out
    costs = run_json(capsys)["costs"]
    assert 5400 <= costs["seconds"] < 5460
    assert costs["lost_dollars"] == pytest.approx(5.0, abs=0.01)
    assert costs["starts"] == 2


def test_a_price_may_be_given_to_the_monitor(capsys, metrics):
    write_priced_start(metrics, 1800, None)
    write_step(metrics, 50)
    assert "Cost: $10.00 so far, 30m" in run(capsys, "--once")[1]
    assert "Cost: $14.00 so far" in run(capsys, "--once", "--hourly-price", "8")[1]


def test_a_run_of_an_older_version_has_its_time(capsys, metrics):
    write_start(metrics)
    write_step(metrics, 50)
    assert "so far (--hourly-price X shows dollars)" in run(capsys, "--once")[1]


def test_an_evaluation_is_said_until_its_result_is_there(capsys, metrics):
    write_start(metrics)
    write_step(metrics, 50)
    append_metrics(metrics, {"event": "evaluating", "step": 50})
    assert ", evaluating)" in run(capsys, "--once")[1]
    append_metrics(metrics, {"step": 50, "validation_loss": 3.0})
    assert "evaluating" not in run(capsys, "--once")[1]


def test_a_log_that_was_emptied_shows_no_old_figures(metrics, tmp_path):
    write_start(metrics)
    write_step(metrics, 50)
    watcher = RunWatcher(RunPaths.of(get_training_config("test", {})))
    assert watcher.look().step == 50
    metrics.write_text("")
    status = watcher.look()
    assert (status.state.value, status.step, status.metrics.loss) == ("no run", None, None)


def test_logs_only_and_a_command_contradict_each_other(capsys):
    assert run(capsys, "--logs-only", "--notify-command", "true")[0] == 2


@pytest.mark.parametrize("words", [("--refresh", "abc"), ("--hourly-price", "abc")])
def test_wrong_numbers_are_told_in_plain_words(capsys, words):
    with pytest.raises(SystemExit):
        main(words)
    assert "must be" in capsys.readouterr().err
