import contextlib
import json
import math
import os
import pty
import select
import signal
import socket
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest

from configs.training_config import PROJECT_DIRECTORY
from scripts.monitor_training import LogTail, main, sparkline
from tests.sample_checkpoints import RUN_ID, make_checkpoint
from utils import machine
from utils.journal import Journal, UploadState
from utils.metadata import append_metrics
from utils.run_status import RunState, condense, is_process_alive, judge_run

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


def write_start(path, event="start", step=0, pid=None, **changes):
    record = {
        "event": event,
        "step": step,
        "run_id": RUN_ID,
        "max_steps": 100,
        "world_size": 1,
        "device": "cpu",
        "precision": "no",
        "num_parameters": 5256704,
        "tokens_per_step": 2048,
        "pid": os.getpid() if pid is None else pid,
        "hostname": socket.gethostname(),
    }
    append_metrics(path, {**record, **changes})


def write_step(path, step, loss=5.0, **changes):
    record = {
        "step": step,
        "epoch": 0,
        "loss": loss,
        "perplexity": math.exp(loss),
        "learning_rate": 0.004,
        "grad_norm": 1.25,
        "tokens_seen": step * 2048,
        "tokens_per_second": 3400.0,
        "step_seconds": 0.602,
        "data_wait_share": 0.003,
        "eta_seconds": 3600.0,
    }
    append_metrics(path, {**record, **changes})


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


START = {"event": "start", "pid": 7, "hostname": "far"}


@pytest.mark.parametrize(
    ("events", "is_alive", "silent_seconds", "state"),
    [
        ([], None, None, RunState.NO_RUN),
        ([{"event": "note"}], None, 1.0, RunState.NO_RUN),
        ([START], True, 9999.0, RunState.RUNNING),
        ([START], False, 1.0, RunState.STOPPED),
        ([START], None, 1.0, RunState.RUNNING),
        ([START], None, 9999.0, RunState.UNKNOWN),
        ([START], None, None, RunState.UNKNOWN),
        ([START, {"event": "end", "outcome": "done"}], True, 1.0, RunState.FINISHED),
        ([START, {"event": "end", "outcome": "stopped"}], False, 1.0, RunState.STOPPED),
        ([START, {"event": "end", "outcome": "failed"}], False, 1.0, RunState.FAILED),
        ([START, {"event": "end"}], False, 1.0, RunState.FAILED),
        (
            [{"event": "end", "outcome": "stopped"}, {**START, "event": "resume"}],
            True,
            1.0,
            "running",
        ),
    ],
)
def test_state_follows_from_events_and_process(events, is_alive, silent_seconds, state):
    found, detail = judge_run(events, is_alive=is_alive, silent_seconds=silent_seconds)
    assert found == state
    assert detail


def test_process_is_known_by_number_host_and_age(dead_pid):
    now = datetime.now(timezone.utc)
    here = {"pid": os.getpid(), "hostname": socket.gethostname(), "time": now.isoformat()}
    assert is_process_alive(here) is True
    assert is_process_alive({**here, "pid": dead_pid}) is False
    # Recorded long before this process began: the number has been given out again.
    old = (now - timedelta(days=365)).isoformat()
    assert is_process_alive({**here, "time": old}) is False
    assert is_process_alive({**here, "time": "nonsense"}) is True
    assert is_process_alive({**here, "hostname": "elsewhere"}) is None
    for pid in (None, "7", -1, 2**70):
        assert not is_process_alive({**here, "pid": pid})
    assert is_process_alive({}) is None


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
        f"Run: {RUN_ID}, on cpu, precision no, 1 rank, 5,256,704 parameters",
        "Step: 50 / 100 (50.0%)  [###############...............]  ETA: ",
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
    assert "State: stopped" in out
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
    assert "Upload: failed  (403 no)" in lines[-1]
    assert "metadata.json cannot be read" in lines[-2]
    assert "Upload: verified" in lines[-3]
    assert "Uploads: 1 failed, 1 verified" in out


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


def test_terminal_gets_a_view_renewed_in_place_until_ctrl_c(tmp_path, metrics):
    write_start(metrics)
    write_step(metrics, 10)
    ours, theirs = pty.openpty()
    try:
        with monitor(cwd=tmp_path, stdout=theirs) as process:
            shown = _read_until(ours, b"Step: 10 / 100")
            assert b"Training Monitor" in shown
            write_step(metrics, 20)
            _read_until(ours, b"Step: 20 / 100")
            assert interrupt(process) == 0
            assert process.stderr.read() == ""
            # The cursor that the view hid is shown again.
            _read_until(ours, b"\x1b[?25h")
    finally:
        os.close(ours)
        os.close(theirs)


def _read_until(descriptor, wanted):
    shown = b""
    while wanted not in shown:
        assert select.select([descriptor], [], [], 20)[0], f"{wanted!r} did not appear in {shown!r}"
        shown += os.read(descriptor, 65536)
    return shown


def test_monitor_does_not_load_torch(tmp_path):
    code = (
        "import sys; from scripts.monitor_training import main\n"
        "assert main(['--once']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_DIRECTORY)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize(
    ("values", "points", "expected"),
    [
        ([], 4, []),
        ([1.0, 2.0], 4, [1.0, 2.0]),
        ([1.0, 3.0, 5.0, 7.0], 2, [2.0, 6.0]),
        ([1.0, 2.0, 3.0], 2, [1.0, 2.5]),
    ],
)
def test_long_curves_are_condensed_to_means(values, points, expected):
    assert condense(values, points) == expected


def test_sparkline_goes_from_lowest_to_highest_bar():
    assert sparkline([0.0, 1.0]) in ("\u2581\u2588", "_#")
    assert len(set(sparkline([3.0, 3.0, 3.0]))) == 1


def write_priced_start(path, seconds_ago, price):
    launched = datetime.now(timezone.utc) - timedelta(seconds=seconds_ago)
    before = {"starts": 1, "seconds": 3600.0, "dollars": 10.0, "lost_seconds": 360.0,
              "lost_dollars": 1.0}  # fmt: skip
    write_start(
        path, "resume", 10, launched_at=launched.isoformat(), hourly_price=price, spending=before
    )  # fmt: skip


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
