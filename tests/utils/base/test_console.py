"""Every command ends in one message and the documented code; a pipe gets plain lines."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from configs.config_files import PROJECT_DIRECTORY
from tests.processes import run_in_terminal, run_python
from utils.base import errors
from utils.base.console import LiveLine, new_parser, run_command
from utils.base.errors import ExitCode, PretrainError
from utils.base.text import format_bytes, format_duration


def end_with(error: BaseException | None, *, debug: bool = False, code: int | None = None) -> int:
    def command(args: argparse.Namespace) -> int | None:
        if error is not None:
            raise error
        return code

    return run_command(command, argparse.Namespace(debug=debug))


CODES = {
    1: "PretrainError SaveError DivergenceError ResourceShortageError StorageError "
    "ObjectNotFoundError AccessDeniedError ConflictError TransientStorageError",
    2: "UsageError ConfigError DataError CheckpointError UnreadableCheckpointError LockedError",
    3: "PreflightError",
    4: "UploadError",
}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ShardError("a.npz", "what failed"), 2),
        *((getattr(errors, n)("what failed"), code) for code in CODES for n in CODES[code].split()),
    ],
)
def test_an_error_for_the_user_is_one_line_and_its_code(
    error: PretrainError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_with(error) == code
    captured = capsys.readouterr()
    assert captured.err == f"Error: {error}\n"
    assert captured.out == ""


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


FULL = """
import argparse, os, resource, shutil, signal, sys
from pathlib import Path
from utils.base.console import (run_command)
from utils.base.files import append_line
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def command(args):
    exec(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
sys.exit(run_command(command, argparse.Namespace()))
"""
BIG = b"x" * 1000


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"Path('new').write_bytes({BIG!r})", "new: File too large"),
        (f"Path('new').write_text('{BIG.decode()}')", "new: File too large"),
        (f"append_line(Path('log'), {BIG!r})", "log: File too large"),
        ("shutil.copyfile('big', 'copy')", "big -> copy: File too large"),
        ("Path('full').write_bytes(b'x')", "full: No space left on device"),
        ("Path('big/new').mkdir()", "big/new: Not a directory"),
        (
            "os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('x')",
            "standard output: No space left",
        ),
        ("raise OSError(28, 'No space left')", "standard output or a temporary file: No space"),
    ],
)
def test_an_error_of_a_disk_names_the_file(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "big").write_bytes(BIG)
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "a-file-that-is-read").touch()
    code = f"with open('a-file-that-is-read') as other: {code}"
    result = run_python("-c", FULL, code, cwd=tmp_path)
    assert result.returncode == ExitCode.UNEXPECTED
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_with(errors.ConfigError("what failed"), debug=True) == ExitCode.USAGE
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("Error: what failed\n")


def test_what_a_message_quotes_cannot_steer_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    end_with(errors.UsageError("a\x1b[2J\nb\x07\udc80"))
    assert capsys.readouterr().err == "a?[2J\nb??\n".replace("a", "Error: a")
    code = (
        "from utils.base.console import configure_logging; import logging\n"
        "configure_logging(); logging.info('a\\x1b[2J')"
    )
    result = run_python("-c", code)
    assert result.stdout.endswith(" a?[2J\n")


def test_output_cut_by_head_is_no_error() -> None:
    code = """
import argparse, sys
from utils.base.console import (run_command)
def command(args):
    for number in range(200_000):
        print(number)
sys.exit(run_command(command, argparse.Namespace()))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=PROJECT_DIRECTORY,
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


def test_sizes_and_durations_are_shown_in_units() -> None:
    sizes = [format_bytes(count) for count in (None, 1023, 1024, -2048, 17e9, 2**60)]
    assert sizes == ["-", "1023 B", "1.0 KiB", "-2.0 KiB", "15.8 GiB", "1048576.0 TiB"]
    durations = [format_duration(seconds) for seconds in (0, 4.24, 60, 200.9, 3725, 400_000)]
    assert durations == ["0.0s", "4.2s", "1m00s", "3m20s", "1h02m", "4d15h"]


LOGGING = """
import logging, sys, warnings
from pathlib import Path, PosixPath
from utils.base.console import (LiveLine, configure_logging)
options = eval(sys.argv[1])
configure_logging(**options)
live = LiveLine()
live.show("at the bottom")
for level in ("debug", "info", "warning", "error"):
    getattr(logging.getLogger("train"), level)("a %s line", level)
logging.getLogger("train").warning("%s tokens", "1,701,888")
warnings.warn("a captured warning")
logging.getLogger("urllib3").info("noise")
live.close()
print("end")
"""


def levels(text: str) -> list[str]:
    return [w for w in ("debug", "info", "warning", "error") if f"a {w} line" in text]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"level": "debug"}, ["debug", "info", "warning", "error"]),
        ({"quiet": True}, ["warning", "error"]),
        ({"main_process": False}, ["warning", "error"]),
    ],
)
def test_a_pipe_gets_plain_lines_and_the_file_of_the_main_process_what_quiet_hides(
    tmp_path: Path, options: dict[str, object], shown: list[str]
) -> None:
    is_main = options.get("main_process", True)
    for count in (1, 2):
        given = {**options, "file": Path("l/t.log")}
        result = run_python("-c", LOGGING, repr(given), cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        output = result.stdout
        assert levels(output) == shown
        assert output.endswith("end\n")
        for text in ("\x1b", "at the bottom", "noise"):
            assert text not in output
        assert "a captured warning" in output
        assert " WARNING a warning line\n" in output
        assert "INFO" not in output  # the usual level: the line of a step needs the room
        assert (tmp_path / "l/t.log").exists() == is_main
        if is_main:
            text = (tmp_path / "l/t.log").read_text("utf-8")
            assert levels(text)[-3:] == ["info", "warning", "error"]
            assert text.count("a info line") == count  # appended


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
    shown = run_in_terminal("-c", LOGGING, "{}", cwd=tmp_path)
    assert "a info line" in shown
    assert "1,701,888 tokens" in shown  # in one colour
    assert "at the bottom" in shown
    assert "WARNING" in shown
    assert "INFO" not in shown
    assert shown.rstrip().endswith("end")


def test_a_log_file_on_a_full_disk_is_told_once_and_the_lines_go_on(tmp_path: Path) -> None:
    (tmp_path / "full.log").symlink_to("/dev/full")
    code = (
        "import logging; from pathlib import Path; from utils.base.console import *\n"
        "configure_logging(file=Path('full.log'))\n"
        "for word in ('one', 'two', 'three'): logging.warning(word)\n"
        "configure_logging()  # closes the file\n"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("full.log cannot be written: No space left on device.") == 1
    assert all(f" {word}\n" in result.stdout for word in ("one", "two", "three"))


def test_a_name_that_is_too_long_is_a_wrong_word(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("n" * 400)
    assert run_command(lambda args: path.read_text() and 0, argparse.Namespace()) == ExitCode.USAGE
    assert "File name too long" in capsys.readouterr().err


def test_help_fits_a_terminal_and_commands_in_it_stay_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = "    python scripts/a.py --option a-value-that-is-long --another 1"
    text = f"""What it does in a sentence that does not fit, but
wraps.

    list   what is there, in words enough for two lines
{command}
"""
    monkeypatch.setenv("COLUMNS", "50")
    lines = new_parser("a.py", text).format_help().splitlines()
    at = lines.index("What it does in a sentence that does not fit, but")
    assert lines[at : at + 6] == [
        "What it does in a sentence that does not fit, but",
        "wraps.",
        "",
        "    list   what is there, in words enough for two",
        "           lines",
        command,
    ]
