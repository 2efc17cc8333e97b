"""Watch a run: its state, progress, speed, checkpoints, uploads and machine.

    logs/metrics.jsonl, journal, checkpoints/ -> a live view, plain lines in a pipe, or --json

It only reads, so any number of monitors may run before, during and after a run, on the machine of
the run or over a shared disk. A terminal gets a live view, a pipe one line per look. Ctrl-C or q
ends it; in a pipe, without --notify-command, also the end of the run (finished, stopped, failed or
crashed).

--notify-command CMD runs CMD once when one of these begins to hold, at the first look too:
  stalled      no record for long: the process hangs, or cannot be seen from here
  crashed      the process is gone without an end record
  failed       the run ended with an error
  stopped      it was stopped on request
  finished     all steps are done
  not_finite   the loss is not a finite number
  bad_steps    the update of a step was skipped
  upload_failed  an upload failed for good, or after five attempts
CMD gets PRETRAIN_EVENT, PRETRAIN_MESSAGE, PRETRAIN_RUN and PRETRAIN_STEP in its environment and the
same as JSON on standard input. It is split into words as by a shell but not run by one: for pipes,
write sh -c '...'. It is killed after 30 s; the monitor goes on whatever it does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.base.console import get_console, new_parser, output_width, run_command
from utils.base.errors import UsageError
from utils.base.files import FollowedFile
from utils.base.text import printable, to_json_text
from utils.checkpoints.layout import RunPaths
from utils.command_line.arguments import add_price_argument, add_run_arguments
from utils.command_line.run_config import read_run_config
from utils.tools.monitor.events import EventTracker
from utils.tools.monitor.notifier import LEAVE_SECONDS, LIMIT_SECONDS, Notifier, parse_command
from utils.tools.monitor.state import RunState
from utils.tools.monitor.status import ENDED_STATES, RunStatus, RunWatcher
from utils.tools.monitor.view import ViewRow, build_rows, fit_rows, one_line

if TYPE_CHECKING:
    from rich.text import Text

DEFAULT_REFRESH_SECONDS = 2.0
TAIL_LINES = 20
TAIL_BYTES = 64 * 2**10


def main(argv: Sequence[str] | None = None) -> int:
    """Watch a run and return the exit code."""
    return run_command(run_monitor, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("monitor_training.py", __doc__)
    parser.add_argument(
        "--refresh",
        type=_positive_seconds,
        default=DEFAULT_REFRESH_SECONDS,
        metavar="S",
        help="seconds between two looks (default: 2)",
    )
    parser.add_argument("--once", action="store_true", help="look once and exit")
    parser.add_argument("--logs-only", action="store_true", help="show and follow train.log only")
    parser.add_argument(
        "--notify-command", metavar="CMD", help="run CMD on a stall, crash, end, ... (see above)"
    )
    parser.add_argument(
        "--logging-dir", metavar="DIR", help="directory of the logs (default: the run's)"
    )
    add_run_arguments(parser)
    add_price_argument(parser)
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
    paths = RunPaths.of(read_run_config(args))
    words = None if args.notify_command is None else parse_command(args.notify_command)
    if args.logs_only and words is not None:
        raise UsageError("--notify-command does not work with --logs-only.")
    if args.logs_only:
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to end it
            follow_log(paths.train_log, args)
        return
    watch = Watch(paths, None if words is None else Notifier(words), args.hourly_price)
    try:
        if args.once:
            show_once(watch, args)
        elif args.json or not has_movable_cursor():
            repeat_lines(watch, args)
        else:
            show_live(watch, args.refresh)
    except KeyboardInterrupt:
        return
    finally:
        watch.close(LIMIT_SECONDS if args.once else LEAVE_SECONDS)


class Watch:
    """Looks at the run, and has the user's command, if any, run for events."""

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
        return [] if self._notifier is None else self._notifier.take_complaints()

    def print_complaints(self) -> None:
        """Print what went wrong with the user's command on standard error."""
        for text in self.complaints():
            print(text, file=sys.stderr, flush=True)

    def close(self, seconds: float) -> None:
        """Wait for the user's command, then kill it."""
        if self._notifier is not None:
            self._notifier.close(seconds)
            self.print_complaints()


def show_once(watch: Watch, args: argparse.Namespace) -> None:
    """Print one look."""
    status = watch.look()
    if args.json:
        print(status_json(status, indent=2))
    else:
        print_view(status)


def repeat_lines(watch: Watch, args: argparse.Namespace) -> None:
    """Print a line, or a JSON object, at each look; in a pipe up to the end of the run.

    A command that waits for events waits for those of the next attempt too.
    """
    is_endless = sys.stdout.isatty() or args.notify_command is not None
    while True:
        status = watch.look()
        print(status_json(status) if args.json else one_line(status), flush=True)
        watch.print_complaints()
        if status.state in (RunState.FINISHED, *ENDED_STATES) and not is_endless:
            return
        time.sleep(args.refresh)


def show_live(watch: Watch, refresh_seconds: float) -> None:
    """Show the view on the alternate screen until q; the last one stays on the terminal."""
    from rich.live import Live

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # Ctrl-Z would leave the terminal as it is here
    console = get_console()
    notes: list[str] = []
    status = watch.look()
    try:
        with reading_keys(), Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                # rich fills lines with blanks: a command copied of this screen may not work.
                hint = "q: quit, then copy the command" if status.go_on else "q: quit"
                view = build_rows(
                    status, console.encoding, width=console.width, notes=notes, hint=hint
                )
                text = as_text(fit_rows(view, console.height))
                text.no_wrap, text.overflow = True, "ellipsis"
                live.update(text, refresh=True)
                if is_quit_within(refresh_seconds):
                    break
                status = watch.look()
                now = f"{datetime.now().astimezone():%H:%M}"
                notes = [*notes, *(f"{now} {text}" for text in watch.complaints())][-1:]
    finally:
        print_view(status, notes)


@contextlib.contextmanager
def reading_keys() -> Iterator[None]:
    """Have the terminal pass on each key at once; afterwards it is as before."""
    if not sys.stdin.isatty():
        yield
        return
    mode = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, mode)


def is_quit_within(seconds: float) -> bool:
    """Wait for so long or until a key is pressed; tell whether the user wants to quit."""
    sources = [sys.stdin] if sys.stdin.isatty() else []
    if not select.select(sources, [], [], seconds)[0]:
        return False
    keys = os.read(sys.stdin.fileno(), 512)
    return not keys or b"q" in keys.lower()  # no keys: the terminal is gone


def has_movable_cursor() -> bool:
    """Tell whether standard output is a terminal whose cursor can be moved."""
    return sys.stdout.isatty() and not get_console().is_dumb_terminal


def print_view(status: RunStatus, notes: Sequence[str] = ()) -> None:
    """Print the whole view, with its styles where there is a terminal for them."""
    width = output_width()
    rows = build_rows(status, sys.stdout.encoding, width=width, notes=notes)
    if width is not None:
        get_console().print(as_text(rows), soft_wrap=True)
    else:
        print("\n".join(row.text for row in rows), flush=True)


def as_text(rows: Sequence[ViewRow]) -> Text:
    """Return rows for `rich`."""
    from rich.text import Text

    return Text("\n").join(Text(row.text, row.style) for row in rows)


def status_json(status: RunStatus, *, indent: int | None = None) -> str:
    """Return a look as JSON."""
    return to_json_text(asdict(status), indent=indent)


def follow_log(path: Path, args: argparse.Namespace) -> None:
    """Print the last lines of the log, then each new one; a line is shown when it is whole.

    Raises:
        UsageError: The log is there and cannot be read.
    """
    file, is_first = FollowedFile(path, TAIL_BYTES), True
    while True:
        data = b""
        try:
            data = b"".join(block.data for block in file.read_new())
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise UsageError(f"{path} cannot be read: {exc.strerror or exc}.") from exc
        lines = data.decode("utf-8", "replace").split("\n")[:-1]
        if is_first and not (lines or args.json):
            print(f"No log lines in {printable(path)} yet.", flush=True)
        for line in lines[-TAIL_LINES:] if is_first else lines:
            shown = printable(line, limit=2000)
            print(to_json_text({"line": shown}, indent=None) if args.json else shown, flush=True)
        if args.once:
            return
        is_first = False
        time.sleep(args.refresh)


if __name__ == "__main__":
    sys.exit(main())
