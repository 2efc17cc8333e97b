"""What a person sees: log lines, the live line of a run, and how a command ends.

A terminal gets colours and a live line, a pipe gets plain lines. Every command runs through
`run_command`, so that an error for users is one message and an exit code, never a traceback
(`--debug` shows it).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import logging
import os
import re
import select
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.base.errors import ExitCode, PretrainError
from utils.base.text import wrap_words

if TYPE_CHECKING:
    from rich.console import Console, ConsoleRenderable
    from rich.live import Live

_NO_HOME = "Could not determine home directory."  # of Path.expanduser, which has no type for it
PLAIN_LINE = "is_plain_line"  # an extra of a log record: its text stands alone, to be copied
LOG_TIME = "%Y-%m-%d %H:%M:%S"  # short, so that a step line fits 100 columns
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2
NOISY_LOGGERS = ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "google", "matplotlib")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
log = logging.getLogger(__name__)
_shared_consoles: dict[bool, Console] = {}


def get_console(*, stderr: bool = False) -> Console:
    """Return the console of this process on standard output, or on standard error."""
    if stderr not in _shared_consoles:
        from rich.console import Console

        is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
        _shared_consoles[stderr] = Console(
            highlight=False, soft_wrap=not is_terminal, stderr=stderr
        )
    return _shared_consoles[stderr]


def configure_logging(
    level: str = "info",
    *,
    quiet: bool = False,
    file: Path | None = None,
    main_process: bool = True,
    stderr: bool = False,
) -> None:
    """Send log records to standard output, and to `file` where one is given.

    `quiet` shows only warnings and errors; `file`, which is appended to, still gets everything.
    Ranks other than the main process show the same and write no file. `stderr` is for commands
    whose output is a result, such as JSON.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level.upper())
    shown = logging.WARNING if quiet or not main_process else logging.NOTSET
    root.addHandler(_terminal_handler(shown, stderr=stderr))
    if file is not None and main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        file_handler = _LogFile(file, encoding="utf-8")
        file_handler.setFormatter(_LineFormatter(datefmt=LOG_TIME))
        root.addHandler(file_handler)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)


def leave_closed_outputs() -> None:
    """Redirect to os.devnull what nobody can read any more: a terminal or a pipe that is gone.

    Each write to it would fail, and the work that is left needs no reader.
    """
    poll = select.poll()
    for descriptor in (STANDARD_OUTPUT, STANDARD_ERROR):
        poll.register(descriptor, 0)  # hang-ups and errors are reported in any case
    for descriptor, _ in poll.poll(0):
        _send_nowhere(descriptor)


def _send_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _terminal_handler(level: int, *, stderr: bool) -> logging.Handler:
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        from rich.highlighter import NullHighlighter
        from rich.logging import RichHandler
        from rich.text import Text

        class TerminalHandler(RichHandler):
            """As the lines of a pipe: the level where it is not the usual one."""

            def render_message(self, record: logging.LogRecord, message: str) -> ConsoleRenderable:
                text = super().render_message(record, message)
                name = record.levelname
                if record.levelno == logging.INFO or not isinstance(text, Text):
                    return text
                return Text.assemble((f"{name} ", f"logging.level.{name.lower()}"), text)

        handler: logging.Handler = TerminalHandler(
            level,
            console=get_console(stderr=stderr),
            show_level=False,
            show_path=False,
            log_time_format="%H:%M:%S",
            markup=False,
            highlighter=NullHighlighter(),
        )
        handler.setFormatter(_HarmlessFormatter("%(message)s"))
        handler.addFilter(functools.partial(_is_wrapped, get_console(stderr=stderr)))
    else:
        handler = logging.StreamHandler(stream)
        handler.setLevel(level)
        handler.setFormatter(_LineFormatter(datefmt=LOG_TIME))
    ordinary = handler.handleError
    handler.handleError = functools.partial(_leave_output, ordinary)  # type: ignore[method-assign]
    return handler


def _is_wrapped(console: Console, record: logging.LogRecord) -> bool:
    """Print what is to be copied as it stands; tell whether a record is another one."""
    if not getattr(record, PLAIN_LINE, False):
        return True
    try:
        text = without_control_characters(record.getMessage())
        console.print(text, soft_wrap=True, markup=False)
    except OSError:
        leave_closed_outputs()
    return False


def _leave_output(ordinary: Callable[[logging.LogRecord], None], record: logging.LogRecord) -> None:
    """Go on without an output that nobody reads; report a faulty log call as usual."""
    if isinstance(sys.exc_info()[1], OSError):
        leave_closed_outputs()
    else:
        ordinary(record)


class _LogFile(logging.FileHandler):
    """A log file whose disk may be full: that is said once, and whoever logs goes on."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Say what is wrong with the file, or report a faulty log call as usual."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            path, reason = self.baseFilename, error.strerror or error
            log.warning("%s cannot be written: %s. Log lines are only shown.", path, reason)

    def close(self) -> None:
        """Close the file; what its disk did not take is lost."""
        with contextlib.suppress(OSError):
            super().close()


class _HarmlessFormatter(logging.Formatter):
    """Log lines may quote names and errors that came from outside."""

    def format(self, record: logging.LogRecord) -> str:
        return without_control_characters(super().format(record))


class _LineFormatter(_HarmlessFormatter):
    """A line of a pipe or a file: the time, the level where it is not the usual one, the text.

    What is to be copied stands alone.
    """

    def usesTime(self) -> bool:  # noqa: N802 - logging's own name
        return True

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        if getattr(record, PLAIN_LINE, False):
            return record.message
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return f"{record.asctime} {level}{record.message}"


def without_control_characters(text: str) -> str:
    """Return text that cannot steer a terminal; its lines stay lines."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


class LiveLine:
    """One line at the bottom of a terminal that follows what goes on.

    Without a terminal the line is logged every `plain_seconds`, or not at all.
    """

    def __init__(self, *, enabled: bool = True, plain_seconds: float | None = None) -> None:
        self._live: Live | None = None
        self._plain_seconds = plain_seconds if enabled else None
        self._plain_at = time.monotonic()
        if enabled and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(console=get_console(), refresh_per_second=4, transient=True)
            self._live.start()

    def show(self, text: str, *, is_logged: bool = True) -> None:
        """Replace the line.

        Without `is_logged` it is shown on a terminal alone, and the time of the next log line
        begins.
        """
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(text, style="bold", no_wrap=True, overflow="ellipsis"))
        elif self._plain_seconds is not None:
            now = time.monotonic()
            if not is_logged:
                self._plain_at = now
            elif now - self._plain_at >= self._plain_seconds:
                self._plain_at = now
                log.info("%s", text)

    def close(self) -> None:
        """Remove the line."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def output_width() -> int | None:
    """Return the columns of the terminal; None in a pipe, whose lines may be of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_wrapped(
    text: str, *, hanging: int = 0, style: str = "", styled: int | None = None
) -> None:
    """Print text; in a terminal in lines that break at words, all but the first `hanging`.

    There, its first `styled` characters, or all, get a style of `rich`.
    """
    width = output_width()
    lines = [text] if width is None else wrap_words(text, width, hanging)
    if style and width is not None:
        from rich.text import Text

        shown = Text("\n".join(lines))
        shown.stylize(style, 0, styled)
        get_console().print(shown, soft_wrap=True)
    else:
        print("\n".join(lines))


def new_parser(
    name: str,
    text: str | None,
    epilog: str = "",
    kind: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> argparse.ArgumentParser:
    """Return the parser of a command, whose `--help` shows the texts in lines that fit."""
    width = min(100, shutil.get_terminal_size().columns)
    return kind(
        prog=name,
        description=_fit_help(text or "", width),
        epilog=_fit_help(epilog, width),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _fit_help(text: str, width: int) -> str:
    """Return a text whose paragraphs fill lines of a width, and whose indented lines fit it.

    Commands stay on one line, to be copied.
    """
    lines: list[str] = []
    for line in text.strip("\n").split("\n"):
        if lines and _is_prose(lines[-1]) and _is_prose(line):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    fitting = []
    for line in lines:
        column = re.match(r" +\S.*?  +(?=\S)|  +|", line)
        is_command = re.fullmatch(r" +(python|bash) (?!.*  ).*", line)
        hanging = min(column.end(), width // 2) if column else 0
        fitting += [line] if is_command else wrap_words(line, width, hanging)
    return "\n".join(fitting)


def _is_prose(line: str) -> bool:
    return line != "" and not line.startswith(" ")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--debug`."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="debug log lines and tracebacks")


def run_command(
    command: Callable[[argparse.Namespace], int | None], args: argparse.Namespace
) -> int:
    """Run a command and return its exit code; errors become one message on standard error."""
    debug = bool(getattr(args, "debug", False))
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # what it cannot encode is shown as ?
        code = int(command(args) or ExitCode.DONE)
        sys.stdout.flush()
        return code
    except PretrainError as exc:
        _report(f"Error: {exc}", debug)
        return int(exc.exit_code)
    except KeyboardInterrupt:
        _report("Interrupted.", debug)
        return ExitCode.SIGNAL_BASE + 2
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        leave_closed_outputs()
        return ExitCode.DONE
    except OSError as exc:
        file = _find_file(exc)
        if file is None:
            return _report_unexpected(exc, debug)
        # No bug of ours: a file that cannot be used.
        _report(f"Error: {file}: {exc.strerror or exc}", debug)
        is_word = exc.errno == errno.ENAMETOOLONG
        return ExitCode.USAGE if is_word else ExitCode.UNEXPECTED
    except RuntimeError as exc:
        if str(exc) != _NO_HOME:
            return _report_unexpected(exc, debug)
        _report("Error: A path begins with ~NAME, and this machine has no such user.", debug)
        return ExitCode.USAGE
    except Exception as exc:  # noqa: BLE001 - the one place that turns a bug into a message
        return _report_unexpected(exc, debug)


def _find_file(exc: OSError) -> str | None:
    """Return the file that an error is about, None where it is about none.

    The system does not say which file a failed write was for: the calls that led to it know.
    """
    if not _flush_output():
        return "standard output"
    if exc.filename is not None:
        return " -> ".join(str(name) for name in (exc.filename, exc.filename2) if name is not None)
    if exc.errno not in DISK_ERRORS:
        return None
    calls = [frame.f_locals.values() for frame, _ in traceback.walk_tb(exc.__traceback__)]
    for value in (value for values in reversed(calls) for value in values):
        name, mode = getattr(value, "name", None), str(getattr(value, "mode", ""))
        if isinstance(value, io.IOBase) and isinstance(name, str) and set(mode) & set("wax+"):
            return name
    return "standard output or a temporary file"


def _flush_output() -> bool:
    """Write what is still to be shown; leave an output that takes no more, and return False."""
    try:
        sys.stdout.flush()
    except OSError:
        _send_nowhere(STANDARD_OUTPUT)
        return False
    return True


def _report_unexpected(exc: Exception, debug: bool) -> int:
    _report(f"Unexpected error: {type(exc).__name__}: {exc} (--debug shows where)", debug)
    return ExitCode.UNEXPECTED


def _report(message: str, debug: bool) -> None:
    log.debug("%s", message)
    if debug:
        traceback.print_exc()
    _flush_output()
    print(without_control_characters(message), file=sys.stderr)
