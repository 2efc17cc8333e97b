"""Watch a run: its state, progress, speed, checkpoints, uploads and machine.

    logs/metrics.jsonl, journal, checkpoints/ -> a live view, plain lines in a pipe, or --json

Reads only, so it may be started, stopped and run twice at any time, before, during and after a
run, on the machine of the run or over a shared disk. A terminal gets a view that is renewed in
place, a pipe a line each time. Ctrl-C or q ends it.

--notify-command CMD runs CMD once when one of these begins to hold, also at the first look:
  stalled      no record for long: the process hangs, or cannot be seen from here
  crashed      the process is gone without an end record        failed   it ended with an error
  stopped      saved on request        finished   all steps are done
  not_finite   the loss is no number   bad_steps  a step's update was left out
  upload_failed  a checkpoint is not in the bucket, for good or after five attempts
CMD gets PRETRAIN_EVENT, PRETRAIN_MESSAGE, PRETRAIN_RUN and PRETRAIN_STEP in its environment and the
same as JSON on standard input. It is split as by a shell but gets none: for pipes, sh -c '...'. It
is ended after 30 s; the monitor goes on whatever it does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.training_config import TrainingConfig, get_training_config  # noqa: E402
from utils.base.console import run_command  # noqa: E402
from utils.base.errors import UsageError  # noqa: E402
from utils.base.files import FollowedFile  # noqa: E402
from utils.base.text import printable, to_json_text  # noqa: E402
from utils.checkpoints.layout import RunPaths  # noqa: E402
from utils.costs.costs import parse_hourly_price  # noqa: E402
from utils.tools.monitor.events import EventTracker  # noqa: E402
from utils.tools.monitor.live_screen import (
    Line,
    LiveScreen,
    can_be_renewed,
    paint,
    terminal_encoding,
    wants_color,
)
from utils.tools.monitor.notifier import LIMIT_SECONDS, Notifier, parse_command  # noqa: E402
from utils.tools.monitor.status import RunStatus, RunWatcher  # noqa: E402
from utils.tools.monitor.view import WIDTH, build_rows, fit_rows, one_line  # noqa: E402

DEFAULT_REFRESH_SECONDS = 2.0
TAIL_LINES = 20
TAIL_BYTES = 64 * 2**10


def main(argv: Sequence[str] | None = None) -> int:
    """Watch a run and return the exit code."""
    return run_command(run_monitor, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--refresh",
        type=_positive_seconds,
        default=DEFAULT_REFRESH_SECONDS,
        metavar="S",
        help="seconds between two looks (default: 2)",
    )
    parser.add_argument("--once", action="store_true", help="look once and exit")
    parser.add_argument("--logs-only", action="store_true", help="show and follow train.log only")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a look")
    parser.add_argument(
        "--notify-command", metavar="CMD", help="run CMD on a stall, crash, end, ...; see above"
    )
    parser.add_argument("--config", default="test", help="name or .json file (default: test)")
    parser.add_argument("--output-dir", help="directory of the checkpoints (default: the config's)")
    parser.add_argument("--logging-dir", help="directory of the logs (default: the config's)")
    parser.add_argument("--run-name", help="folder of the run (default: the config's)")
    parser.add_argument(
        "--hourly-price",
        type=parse_hourly_price,
        metavar="X",
        help="dollars an hour, for the time whose price the run did not know",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 86400, got {text}")
    return seconds


def run_monitor(args: argparse.Namespace) -> None:
    """Show the run once, or until Ctrl-C or q."""
    paths = RunPaths.of(load_config(args))
    words = None if args.notify_command is None else parse_command(args.notify_command)
    # What the output's encoding lacks is shown as ?, and no reason to end.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if args.logs_only and words is not None:
        raise UsageError("--notify-command needs a look at the run: leave --logs-only out.")
    if args.logs_only:
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to end it
            follow_log(LogTail(paths.train_log), args)
        return
    watch = Watch(paths, None if words is None else Notifier(words), args.hourly_price)
    try:
        if args.once:
            show_once(watch, args)
        elif args.json or not can_be_renewed():
            repeat_lines(watch, args)
        else:
            show_live(watch, args.refresh)
    except KeyboardInterrupt:
        return
    finally:
        watch.close(LIMIT_SECONDS if args.once else None)


def load_config(args: argparse.Namespace) -> TrainingConfig:
    """Return the configuration that the options name."""
    keys = ("output_dir", "logging_dir", "run_name")
    overrides = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    return get_training_config(args.config, overrides)


class Watch:
    """Looks at the run, and has the user told of what begins.

    Args:
        paths: The run's directories.
        notifier: Runs the user's command, None where there is none.
        hourly_price: For the time whose price the run did not know.
    """

    def __init__(
        self, paths: RunPaths, notifier: Notifier | None, hourly_price: float | None
    ) -> None:
        self._watcher = RunWatcher(paths, hourly_price)
        self._events, self._notifier = EventTracker(), notifier

    def look(self) -> RunStatus:
        """Return the state of the run now."""
        status = self._watcher.look()
        if self._notifier is not None:
            for event in self._events.take(status):
                self._notifier.tell(event)
        return status

    def complaints(self) -> list[str]:
        """Return what went wrong with the user's command since the last call."""
        if self._notifier is None:
            return []
        return [f"--notify-command: {text}" for text in self._notifier.take_complaints()]

    def complain(self) -> None:
        """Say on standard error what went wrong with the user's command."""
        for text in self.complaints():
            print(text, file=sys.stderr, flush=True)

    def close(self, seconds: float | None = None) -> None:
        """Wait a moment for the user's command, or so many seconds."""
        if self._notifier is not None:
            self._notifier.close(*([] if seconds is None else [seconds]))
            self.complain()


def show_once(watch: Watch, args: argparse.Namespace) -> None:
    """Print one look."""
    status = watch.look()
    if args.json:
        print(status_json(status, indent=2))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    print_lines(fit_rows(build_rows(status, output_encoding(), width=width), None))


def repeat_lines(watch: Watch, args: argparse.Namespace) -> None:
    """Print a line, or a JSON object, at each look."""
    while True:
        status = watch.look()
        print(status_json(status) if args.json else one_line(status), flush=True)
        watch.complain()
        time.sleep(args.refresh)


def show_live(watch: Watch, refresh_seconds: float) -> None:
    """Renew the whole view in place; the last one stays on the terminal."""
    encoding = output_encoding()
    notes: list[str] = []
    status = watch.look()
    try:
        with LiveScreen(encoding, has_color=wants_color()) as screen:

            def draw() -> None:
                columns, rows = screen.size
                view = build_rows(status, encoding, width=columns, notes=notes, hint="q: quit")
                screen.show(fit_rows(view, rows))

            draw()
            while not screen.wait(refresh_seconds, draw):
                status = watch.look()
                now = f"{datetime.now().astimezone():%H:%M}"
                notes = [*notes, *(f"{now} {text}" for text in watch.complaints())][-1:]
                draw()
    finally:
        width = shutil.get_terminal_size().columns
        print_lines(fit_rows(build_rows(status, encoding, width=width, notes=notes), None))


def print_lines(lines: Sequence[Line]) -> None:
    """Print rows as they are, with their styles where there is a terminal for them."""
    print("\n".join(paint(line, has_color=wants_color()) for line in lines), flush=True)


def output_encoding() -> str:
    """Return what standard output can show."""
    return terminal_encoding() if sys.stdout.isatty() else sys.stdout.encoding or "ascii"


def status_json(status: RunStatus, *, indent: int | None = None) -> str:
    """Return a look as JSON."""
    return to_json_text(asdict(status), indent=indent)


class LogTail:
    """Reads the end of a log file, then what is appended to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = FollowedFile(path, TAIL_BYTES)
        self._is_first = True

    def read_new(self) -> list[str]:
        """Return the whole lines since the last call; at first the last ones of the file.

        Raises:
            OSError: It is there and cannot be read.
        """
        try:
            data = b"".join(block.data for block in self._file.read_new())
        except FileNotFoundError:
            return []
        lines = data.decode("utf-8", "replace").split("\n")[:-1]
        shown = lines[-TAIL_LINES:] if self._is_first else lines
        self._is_first = False
        return [printable(line, limit=2000) for line in shown]


def follow_log(log: LogTail, args: argparse.Namespace) -> None:
    """Print the end of the log, then each new line.

    Raises:
        UsageError: The log cannot be read.
    """
    try:
        lines = log.read_new()
        if not lines and not args.json:
            print(f"No log lines in {printable(log.path)} yet.", flush=True)
        while True:
            for line in lines:
                print(to_json_text({"line": line}, indent=None) if args.json else line, flush=True)
            if args.once:
                return
            time.sleep(args.refresh)
            lines = log.read_new()
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise UsageError(f"{log.path} cannot be read: {exc.strerror or exc}.") from exc


if __name__ == "__main__":
    sys.exit(main())
