"""Every command ends in one message and the documented code; a pipe gets plain lines."""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from utils.base import errors
from utils.base.console import LiveLine, print_table, run_command
from utils.base.errors import ExitCode, PretrainError
from utils.base.text import format_bytes, format_duration

PROJECT = Path(__file__).resolve().parents[3]


def end_with(error: BaseException | None, *, debug: bool = False, code: int | None = None) -> int:
    def command(args: argparse.Namespace) -> int | None:
        if error is not None:
            raise error
        return code

    return run_command(command, argparse.Namespace(debug=debug))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.PretrainError("what failed"), 1),
        (errors.UsageError("what failed"), 2),
        (errors.ConfigError("what failed"), 2),
        (errors.DataError("what failed"), 2),
        (errors.ShardError("a.npz", "what failed"), 2),
        (errors.CheckpointError("what failed"), 2),
        (errors.UnreadableCheckpointError("what failed"), 2),
        (errors.SaveError("what failed"), 1),
        (errors.DivergenceError("what failed"), 1),
        (errors.ResourceShortageError("what failed"), 1),
        (errors.LockedError("what failed"), 2),
        (errors.PreflightError("what failed"), 3),
        (errors.UploadError("what failed"), 4),
        (errors.StorageError("what failed"), 1),
        (errors.ObjectNotFoundError("what failed"), 1),
        (errors.AccessDeniedError("what failed"), 1),
        (errors.ConflictError("what failed"), 1),
        (errors.TransientStorageError("what failed"), 1),
    ],
)
def test_an_error_for_the_user_is_one_line_and_its_code(
    error: PretrainError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_with(error) == code
    captured = capsys.readouterr()
    assert captured.err == f"Error: {error}\n"
    assert captured.out == ""


def test_every_error_class_is_in_the_table_above() -> None:
    known = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, PretrainError)
    }
    assert len(known) == 18


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ZeroDivisionError("division"), 1, "Unexpected error: ZeroDivisionError: division"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_a_bug_is_one_line_too(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_with(error) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_the_home_of_nobody_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def command(args: argparse.Namespace) -> None:
        Path("~no-such-user-here/model").expanduser()

    assert run_command(command, argparse.Namespace()) == 2
    shown = capsys.readouterr().err
    assert shown == "Error: A path begins with ~NAME, and this machine has no such user.\n"


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_with(errors.ConfigError("what failed"), debug=True) == ExitCode.USAGE
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("Error: what failed\n")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (4, 4), (75, 75)])
def test_a_command_that_returns_gives_its_code(returned: int | None, code: int) -> None:
    assert end_with(None, code=returned) == code


def test_the_documented_codes_are_the_codes() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "UNEXPECTED": 1,
        "USAGE": 2,
        "PREFLIGHT": 3,
        "NOT_VERIFIED": 4,
        "STOPPED": 75,
        "SIGNAL_BASE": 128,
    }


def test_what_a_message_quotes_cannot_steer_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    end_with(errors.UsageError("a\x1b[2J\nb\x07\udc80"))
    assert capsys.readouterr().err == "a?[2J\nb??\n".replace("a", "Error: a")
    code = (
        "from utils.base.console import configure_logging; import logging\n"
        "configure_logging(); logging.info('a\\x1b[2J')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith(" a?[2J\n")


def test_a_table_in_a_pipe_shows_the_columns_that_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"name": "a", "step": 1, "x": 2}, {"name": "bb", "step": 10, "x": 3}]
    print_table("Title", rows, ["step", "name"], ["step"])
    print_table("Nothing", [])
    assert capsys.readouterr().out == "Title\n  step  name\n  1     a\n  10    bb\n"


def test_output_cut_by_head_is_no_error() -> None:
    code = """
import argparse, sys
from utils.base.console import run_command
def command(args):
    for number in range(200_000):
        print(number)
sys.exit(run_command(command, argparse.Namespace()))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        errors_shown = process.stderr.read()
    assert (process.returncode, errors_shown) == (0, "")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (-2048, "-2.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (17e9, "15.8 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_sizes_are_shown_in_binary_units(count: float | None, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (4.24, "4.2s"),
        (60, "1m00s"),
        (200.9, "3m20s"),
        (3600, "1h00m"),
        (3725, "1h02m"),
        (400_000, "111h06m"),
    ],
)
def test_durations_are_shown_in_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


LOGGING = """
import logging, sys, warnings
from pathlib import Path
from utils.base.console import LiveLine, configure_logging
options = eval(sys.argv[1])
configure_logging(**options)
live = LiveLine()
live.show("at the bottom")
for level in ("debug", "info", "warning", "error"):
    getattr(logging.getLogger("train"), level)("a %s line", level)
warnings.warn("a captured warning")
logging.getLogger("urllib3").info("noise")
live.close()
print("end")
"""


def log_with(directory: Path, stdout: int = subprocess.PIPE, **options: object) -> str:
    result = subprocess.run(
        [sys.executable, "-c", LOGGING, repr(options)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout or ""


def levels(text: str) -> list[str]:
    return [w for w in ("debug", "info", "warning", "error") if f"a {w} line" in text]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, ["info", "warning", "error"]),
        ({"level": "debug"}, ["debug", "info", "warning", "error"]),
        ({"level": "error"}, ["error"]),
        ({"quiet": True}, ["warning", "error"]),
        ({"main_process": False}, ["warning", "error"]),
    ],
)
def test_a_pipe_gets_plain_lines_of_the_asked_level(
    tmp_path: Path, options: dict[str, object], shown: list[str]
) -> None:
    output = log_with(tmp_path, **options)
    assert levels(output) == shown
    assert output.endswith("end\n")
    assert "\x1b" not in output
    assert "at the bottom" not in output
    assert "noise" not in output
    assert ("a captured warning" in output) == (options.get("level") != "error")


def test_the_log_file_gets_what_quiet_hides_and_only_from_the_main_process(tmp_path: Path) -> None:
    code = LOGGING.replace("eval(sys.argv[1])", "{**eval(sys.argv[1]), 'file': Path('l/t.log')}")
    for main_process in ("True", "False", "True"):
        options = f"{{'quiet': True, 'main_process': {main_process}}}"
        subprocess.run(
            [sys.executable, "-c", code, options],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    text = (tmp_path / "l/t.log").read_text("utf-8")
    assert levels(text) == ["info", "warning", "error"]
    assert text.count("a info line") == 2  # appended, by the main process alone


def test_a_long_wait_in_a_pipe_says_so_now_and_then(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 100.0
    monkeypatch.setattr("utils.base.console.time.monotonic", lambda: now)
    caplog.set_level("INFO")
    live, silent = LiveLine(plain_seconds=30), LiveLine(enabled=False, plain_seconds=30)
    for now in (101.0, 129.0, 131.0, 140.0, 162.0):  # noqa: B007 - the clock reads it
        live.show(f"at {now:.0f}")
        silent.show("never")
    assert [record.message for record in caplog.records] == ["at 131", "at 162"]
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_live_line_that_goes_away(tmp_path: Path) -> None:
    reader, terminal = pty.openpty()
    try:
        log_with(tmp_path, stdout=terminal)
    finally:
        os.close(terminal)
    shown = ""
    with os.fdopen(reader, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while data := stream.read(65536):  # Linux ends it with EIO
            shown += data.decode()
    assert "a info line" in shown
    assert "at the bottom" in shown
    assert shown.rstrip().endswith("end")
