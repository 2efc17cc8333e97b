"""Stopping on request: the first SIGINT or SIGTERM asks, the second leaves at once; SIGHUP asks.

    signal, preemption notice -> reason -> asked for at each safe point, ranks agree -> save, leave

The training loop asks `StopRequest` at each safe point; ranks agree first, so that none waits for
another that has left.

Python runs the handlers of signals in the main thread, between two of its own instructions, and two
signals in quick succession as one. While that thread sits in a C call (a collective that hangs, a
wait for the GPU) a handler would never run. So the handlers here do nothing, and what acts is a
small thread that reads the byte which the interpreter writes at once for every signal.

A terminal that goes away sends SIGHUP, and its shell and the kernel may send it again: it never
counts as the second signal. Where it was ignored at the start (nohup), it stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from utils.base import ranks
from utils.base.console import STANDARD_ERROR, leave_closed_outputs
from utils.base.errors import ExitCode

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LEAVE_AFTER_SECONDS = 5.0
NOTE_SECONDS = 1.0

WAKE = b"\0"  # no signal has this number


class StopRequest:
    """Catches SIGINT, SIGTERM and SIGHUP while it is entered, and takes other requests to stop.

    Args:
        leave_after_seconds: How long a run that has nothing to lose may take from the request to
            a safe point. After that the process ends with `ExitCode.STOPPED`, whatever it is
            doing: compiling the first step or waiting for the first batch can take minutes.
    """

    def __init__(self, leave_after_seconds: float = LEAVE_AFTER_SECONDS) -> None:
        self.nothing_to_lose = True
        """Whether this attempt has not done a step yet; the run sets it to False once it has."""
        self.last_words: Callable[[], str] = str
        """What is also said when the second signal ends the process; it waits for nothing."""
        self.note_end: Callable[[], object] = str
        """Records that the process leaves at once; a disk that hangs does not hold it."""
        self.requested_at: float | None = None
        """time.monotonic() of the first request, None while there is none."""
        self._leave_after_seconds = leave_after_seconds
        self._reason: str | None = None
        self._num_signals = 0
        self._is_agreed = False
        self._is_closing = False
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_descriptor = -1
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> StopRequest:
        """Install the handlers; every rank enters at the same place, in its main thread."""
        ranks.connect_host_group()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._thread = threading.Thread(
            target=self._watch, args=[self._reader], name="stop-request", daemon=True
        )
        self._thread.start()
        self._previous_descriptor = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, _do_nothing)
        _entered.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        """Put back what was there before; nothing is left of the thread and its descriptors."""
        _entered.remove(self)
        self._put_back()
        assert self._reader is not None
        assert self._writer is not None
        assert self._thread is not None
        self._is_closing = True
        # Not close: a process that was forked has the same socket still open.
        self._writer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._take_signals()
        with self._lock:
            self._reader.close()
            self._writer.close()
            self._reader = self._writer = None

    @property
    def reason(self) -> str | None:
        """What asked for the stop first; None while nothing has."""
        if self._reason is None:
            self._take_signals()  # the thread may not have come to it yet
        return self._reason

    def request(self, reason: str) -> None:
        """Ask for a stop, from any thread; the first reason stays."""
        with self._lock:
            self._note(reason)

    def is_agreed(self) -> bool:
        """Tell whether any rank was asked to stop; all ranks call this at the same safe point."""
        if ranks.any_rank(self.reason is not None):
            self._is_agreed = True
            self.request("another rank was asked to stop")
        return self._is_agreed

    def _watch(self, reader: socket.socket) -> None:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        while not self._is_closing:
            if poll.poll(self._milliseconds_left()):
                self._take_signals()
            elif self._milliseconds_left() == 0:
                self._note_end()
                _say("\nNothing was trained since the start, so nothing is lost: leaving.\n")
                os._exit(ExitCode.STOPPED)

    def _milliseconds_left(self) -> float | None:
        """Return the time until the process leaves by itself; None where it does not."""
        if self.requested_at is None or self._is_agreed or not self.nothing_to_lose:
            return None
        left = self.requested_at + self._leave_after_seconds - time.monotonic()
        return max(0.0, left * 1e3)

    def _take_signals(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            for number in self._reader.recv(4096) if self._reader is not None else b"":
                if number in SIGNALS:
                    self._take_signal(signal.Signals(number))

    def _take_signal(self, number: signal.Signals) -> None:
        if number != signal.SIGHUP:
            self._num_signals += 1
        else:
            leave_closed_outputs()
            if self._reason is not None:
                return
        if self._num_signals > 1:
            try:
                self._note_end()
                _say(f"\nSecond {number.name}: leaving at once.\n{self.last_words()}")
            finally:
                os._exit(ExitCode.SIGNAL_BASE + number)
        # The first signal after another request is no second one: a machine that is preempted
        # gets the notice and then a SIGTERM, a rank may learn of a stop before its own SIGTERM.
        doing = "finishing this step, then saving"
        if self._reason is not None:
            doing = f"stopping already ({self._reason})"
        again = " Press Ctrl-C again to quit without saving." if number == signal.SIGINT else ""
        _say(f"\n{number.name}: {doing}.{again}\n")
        self._note(number.name)

    def _note_end(self) -> None:
        note = threading.Thread(target=self.note_end, daemon=True)
        note.start()
        note.join(NOTE_SECONDS)

    def _note(self, reason: str) -> None:
        if self._reason is not None:
            return
        self.requested_at, self._reason = time.monotonic(), reason
        if self._writer is not None:
            # The thread has a time to keep from now on. Where this fails, it is awake or ending.
            with contextlib.suppress(OSError):
                self._writer.send(WAKE)

    def _put_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_descriptor)


_entered: list[StopRequest] = []


def _release_in_child() -> None:
    """Let a forked process get its signals as before.

    Ctrl-C reaches a whole process group. A child with the same descriptor would add its own byte,
    and the parent would take one Ctrl-C for two.
    """
    for stop in _entered:
        stop._put_back()


os.register_at_fork(after_in_child=_release_in_child)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Be installed, so that the signal neither kills nor interrupts."""


def _say(text: str) -> None:
    """Write to standard error, not through logging, whose lock may be held, and without waiting."""
    poll = select.poll()
    poll.register(STANDARD_ERROR, select.POLLOUT)
    with contextlib.suppress(OSError):
        if poll.poll(0):  # else nobody reads a pipe that is full
            os.write(STANDARD_ERROR, text.encode()[: select.PIPE_BUF])  # more might wait
