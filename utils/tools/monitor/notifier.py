"""Runs the user's command when something happens, and never waits for it.

    event -> command: environment PRETRAIN_*, JSON on standard input

The command gets no shell. A thread runs one at a time; a command that is missing, fails or hangs
costs one line for the user and nothing else. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass

from utils.base.errors import UsageError
from utils.base.text import printable

LIMIT_SECONDS = 30.0
LEAVE_SECONDS = 2.0
MAX_COMPLAINTS = 100
_ERROR_BYTES = 2000


@dataclass(frozen=True)
class RunEvent:
    """Something that the user is notified of once, in one line; time is in UTC, ISO 8601.

    Events are stalled, crashed, failed, stopped, finished, not_finite, bad_steps, upload_failed.
    """

    event: str
    message: str
    run: str
    step: int | None
    state: str
    time: str


def parse_command(text: str) -> list[str]:
    """Return the words of a command, split as a shell would.

    Raises:
        UsageError: It is empty, or a quote is not closed.
    """
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise UsageError(f"--notify-command {text!r} cannot be split: {exc}.") from exc
    if not words:
        raise UsageError("--notify-command is empty.")
    return words


class Notifier:
    """Runs the command for each event, in order; one that takes too long is killed."""

    def __init__(self, words: list[str], limit_seconds: float = LIMIT_SECONDS) -> None:
        self._words, self._limit_seconds = words, limit_seconds
        self._queue: queue.SimpleQueue[RunEvent | None] = queue.SimpleQueue()
        self._complaints: deque[str] = deque(maxlen=MAX_COMPLAINTS)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="notifier", daemon=True)
        self._thread.start()

    def tell(self, event: RunEvent) -> None:
        """Have the command run for an event."""
        self._queue.put(event)

    def take_complaints(self) -> list[str]:
        """Return what went wrong since the last call, a line each."""
        return [self._complaints.popleft() for _ in range(len(self._complaints))]

    def close(self, seconds: float) -> None:
        """Wait for the waiting events, then kill what is still running."""
        end = time.monotonic() + seconds
        self._queue.put(None)
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return
        self._is_closing.set()
        self._kill()
        self._thread.join(max(1.0, end - time.monotonic()))

    def _work(self) -> None:
        while (event := self._queue.get()) is not None:
            if self._is_closing.is_set():
                return
            try:
                complaint = self._run(event)
            except OSError as exc:  # no room for a temporary file
                complaint = str(exc.strerror or exc)
            if complaint is not None:
                name = printable(self._words[0], 80)
                text = f"{name} for {event.event}: {printable(complaint, 200)}"
                self._complaints.append(f"--notify-command: {text}")

    def _run(self, event: RunEvent) -> str | None:
        """Run the command once; return what went wrong."""
        environment = {
            **os.environ,
            "PRETRAIN_EVENT": event.event,
            "PRETRAIN_MESSAGE": event.message,
            "PRETRAIN_RUN": event.run,
            "PRETRAIN_STEP": "" if event.step is None else str(event.step),
        }
        # Files, not pipes: a command may read nothing or write much without blocking.
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:
            given.write(json.dumps(asdict(event)).encode() + b"\n")
            given.seek(0)
            try:
                self._process = subprocess.Popen(  # noqa: S603 - the user's own command, no shell
                    self._words,
                    stdin=given,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env=environment,
                    start_new_session=True,
                )
            except (OSError, ValueError) as exc:
                return f"cannot be started: {getattr(exc, 'strerror', None) or exc}"
            try:
                code = self._process.wait(self._limit_seconds)
            except subprocess.TimeoutExpired:
                self._kill()
                return f"was ended after {self._limit_seconds:g} s"
            if not code:
                return None
            errors.seek(0)
            lines = errors.read(_ERROR_BYTES).decode("utf-8", "replace").strip().splitlines()
            return f"exit code {code}{': ' + lines[-1] if lines else ''}"

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
