"""A view that is renewed in place on a terminal, line by line, with as few bytes as that takes.

    lines of (text, style) -> the rows that differ -> terminal

The alternate screen is used, as by `top`: what was on the terminal is there again at the end, also
after Ctrl-C, SIGTERM and Ctrl-Z. Only rows that changed are written, in one write a refresh:
nothing flickers and a slow line is enough. Only the standard library, and `rich` for widths.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

Line = tuple[str, str]
"""A row's text, and its style: a key of `STYLES` or an empty string."""

STYLES = {"bold": "1", "green": "32", "yellow": "33", "red": "31", "dim": "2"}
RESET = "\x1b[0m"
# Alternate screen, hidden cursor, no automatic wrap: a row that is too wide cannot spoil the next.
ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"


def can_be_renewed(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether standard output is a terminal whose cursor can be moved."""
    return sys.stdout.isatty() and environment.get("TERM", "dumb") not in ("", "dumb")


def wants_color(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether standard output should have colours (https://no-color.org)."""
    return can_be_renewed(environment) and not environment.get("NO_COLOR")


def terminal_encoding(environment: Mapping[str, str] = os.environ) -> str:
    """Return what standard output can show.

    Python takes the C locale for UTF-8 (PEP 538 and 540, which set LC_CTYPE); who asked for it by
    name gets ASCII.
    """
    ctype = environment.get("LC_CTYPE", "")
    names = (environment.get("LC_ALL"), "" if ctype == "C.UTF-8" else ctype)
    name = next((name for name in (*names, environment.get("LANG")) if name), "")
    if name in ("C", "POSIX"):
        return "ascii"
    return sys.stdout.encoding or "ascii"


def crop(text: str, width: int) -> str:
    """Return text that takes at most so many cells of a terminal."""
    if count_cells(text) <= width:
        return text
    if text.isascii():
        return f"{text[: max(0, width - 3)]}..."[:width]
    from rich.cells import set_cell_size

    return f"{set_cell_size(text, max(0, width - 3))}..."[:width]


def count_cells(text: str) -> int:
    """Return how many cells of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def paint(line: Line, *, has_color: bool) -> str:
    """Return a line with its style as escape sequences."""
    text, style = line
    if not (has_color and style and text):
        return text
    return f"\x1b[{STYLES[style]}m{text}{RESET}"


class LiveScreen:
    """A context manager that owns the terminal.

    Args:
        encoding: Encoding of the terminal; what it lacks is shown as `?`.
        has_color: Whether styles are shown.
    """

    def __init__(self, encoding: str, *, has_color: bool) -> None:
        self._encoding, self._has_color = encoding, has_color
        self._shown: list[Line] = []
        self._size = (0, 0)
        self._terminal_mode: Any = None
        self._handlers: dict[int, Any] = {}
        self._wakeup: tuple[int, int] | None = None

    def __enter__(self) -> LiveScreen:
        """Take the terminal."""
        self._wakeup = os.pipe()
        for descriptor in self._wakeup:
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        for number, handler in (
            (signal.SIGWINCH, _do_nothing),  # it wakes `wait`
            (signal.SIGTERM, _leave),
            (signal.SIGHUP, _leave),
            (signal.SIGTSTP, self._suspend),
        ):
            self._handlers[number] = signal.signal(number, handler)
        self._take_terminal()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the terminal back as it was."""
        with contextlib.suppress(OSError):  # it may be gone
            self._give_terminal_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        for descriptor in self._wakeup or ():
            os.close(descriptor)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal now."""
        columns, rows = shutil.get_terminal_size()
        return columns, rows

    def show(self, lines: Sequence[Line]) -> None:
        """Replace what is shown; what is below the terminal's end is left out."""
        columns, rows = size = self.size
        text = ""
        if size != self._size:
            self._size, self._shown, text = size, [], "\x1b[2J"
        new = [(crop(line, columns), style) for line, style in lines[:rows]]
        old = self._shown
        for row, line in enumerate(new):
            if row >= len(old) or line != old[row]:
                # At the last column the cursor stands on what was just written.
                rest = "\x1b[K" if count_cells(line[0]) < columns else ""
                text += f"\x1b[{row + 1}H{paint(line, has_color=self._has_color)}{rest}"
        if len(new) < len(old):
            text += f"\x1b[{len(new) + 1}H\x1b[J"
        self._shown = new
        self._write(text)

    def wait(self, seconds: float, must_redraw: Callable[[], None]) -> bool:
        """Wait; tell whether the user pressed `q`.

        Args:
            seconds: How long.
            must_redraw: Called when the terminal has another size.
        """
        assert self._wakeup is not None
        end = time.monotonic() + seconds
        sources = [self._wakeup[0]]
        if self._terminal_mode is not None:
            sources.append(sys.stdin.fileno())
        while (remaining := end - time.monotonic()) > 0:
            ready, _, _ = select.select(sources, [], [], remaining)
            if self._wakeup[0] in ready:
                os.read(self._wakeup[0], 512)
                if self.size != self._size:
                    must_redraw()
            if len(sources) > 1 and sources[1] in ready:
                keys = os.read(sources[1], 512)
                if b"q" in keys.lower():
                    return True
                if not keys:  # the terminal is gone, or its input was closed
                    del sources[1]
        return False

    def _take_terminal(self) -> None:
        self._size = (0, 0)
        if _is_in_foreground():
            import termios
            import tty

            self._terminal_mode = termios.tcgetattr(sys.stdin.fileno())
            tty.setcbreak(sys.stdin.fileno())
        self._write(ENTER)

    def _give_terminal_back(self) -> None:
        if self._terminal_mode is not None:
            import termios

            with contextlib.suppress(termios.error):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._terminal_mode)
            self._terminal_mode = None
        self._write(LEAVE)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: give the terminal back, stop, and take it again when there is a `fg`."""
        self._give_terminal_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._suspend)
        self._take_terminal()

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.buffer.write(text.encode(self._encoding, "replace"))
            sys.stdout.buffer.flush()


def _do_nothing(number: int, frame: FrameType | None) -> None:
    del number, frame


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _is_in_foreground() -> bool:
    """Tell whether standard input is a terminal that this process may read."""
    try:
        descriptor = sys.stdin.fileno()
        return os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return False
