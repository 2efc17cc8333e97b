"""A program that moves bytes: run without a shell, fed, metered, and ended when it stalls.

It is ended when it neither reads nor writes for too long, however slow it is otherwise; with it
goes everything that it started. It runs in a session that Ctrl-C in the terminal does not reach.
No torch here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil

from utils.base.child_process import leads_session
from utils.base.errors import (
    AccessDeniedError,
    ConflictError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from utils.storage.bucket import Meter, WriteStream, mapped_file_errors, metered_blocks

POLL_SECONDS = 0.5  # a look at all processes costs some ms
START_SECONDS = 15.0
ERROR_CHARACTERS = 300
QUIET_ENVIRONMENT = {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1", "PYTHONWARNINGS": "ignore"}

log = logging.getLogger(__name__)


class StallTimer:
    """Tells when something has stayed the same for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._state: object = None
        self._since = time.monotonic()

    def see(self, state: object) -> bool:
        """Take the newest state; tell whether it has changed."""
        if state == self._state:
            return False
        self._state, self._since = state, time.monotonic()
        return True

    @property
    def is_over(self) -> bool:
        """Whether it has not changed for too long."""
        return time.monotonic() - self._since > self._seconds


class WatchedCommand:
    """Runs a program, with `words` in every call, and watches that it reads or writes.

    Messages call what it works on `target`.
    """

    def __init__(self, words: list[str], target: str, stall_seconds: float, meter: Meter) -> None:
        self._words, self._target, self._meter = words, target, meter
        self._stall_seconds = stall_seconds

    def run(
        self,
        verb: str,
        words: list[str],
        *,
        options: tuple[str, ...] = (),
        write: WriteStream | None = None,
        file: Path | None = None,
    ) -> bytes:
        """Return what the program prints.

        The options come before the verb, the words after it. `write` writes the standard input;
        `file` is a file that the program sends, whose position is metered.

        Raises:
            StorageError: It failed, or was ended because it made no progress.
        """
        label = f"{Path(self._words[0]).name} {verb} {self._target}"
        with mapped_file_errors(f"{label}: no temporary file"):
            output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        with output, errors:
            try:
                process = subprocess.Popen(  # noqa: S603
                    [*self._words, *options, *verb.split(), *words],
                    stdin=subprocess.DEVNULL if write is None else subprocess.PIPE,
                    stdout=output,
                    stderr=errors,
                    start_new_session=not leads_session(),
                    env={**os.environ, **QUIET_ENVIRONMENT},
                )
            except OSError as exc:
                raise StorageError(f"{label}: it cannot be started ({exc}).") from exc
            with _Watch(process, self._stall_seconds, self._meter, file) as watch:
                took_all = self._feed(process, write)
                process.wait()
            for stream in (output, errors):
                stream.seek(0)
            if watch.has_stalled:
                raise TransientStorageError(
                    f"{label}: no progress for {self._stall_seconds:.0f} s; it was ended."
                )
            if process.returncode != 0 or not took_all:
                raise _command_error(errors.read().decode("utf-8", "replace"), label)
            return output.read()

    def _feed(self, process: subprocess.Popen[bytes], write: WriteStream | None) -> bool:
        """Write standard input; return whether the program took all of it."""
        if write is None or process.stdin is None:
            return True
        pipe = _MeteredPipe(process.stdin, self._meter)
        sink: Any = pipe
        try:
            write(sink)
        except BaseException as exc:
            if not (pipe.is_broken and isinstance(exc, Exception)):
                end_process(process)  # before its input ends: it would take that for the whole
                raise
            log.debug("%s ended before its input did.", self._words[0])  # and will say why
        finally:
            pipe.close()
        return not pipe.is_broken


class _MeteredPipe:
    """Standard input of a program."""

    def __init__(self, pipe: IO[bytes], meter: Meter) -> None:
        self.is_broken = False
        self._pipe, self._meter = pipe, meter

    def write(self, data: bytes) -> int:
        try:
            for block in metered_blocks(data, self._meter):
                self._pipe.write(block)
        except BrokenPipeError:
            self.is_broken = True
            raise
        return len(data)

    def close(self) -> None:
        try:
            self._pipe.close()
        except BrokenPipeError:
            self.is_broken = True


class _Watch:
    """Ends a process that neither reads nor writes for too long; a context manager around it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        stall_seconds: float,
        meter: Meter,
        file: Path | None,
    ) -> None:
        self.has_stalled = False
        self._process, self._stall_seconds = process, stall_seconds
        self._meter, self._file = meter, file
        self._over = threading.Event()
        self._position = 0
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        end_process(self._process)

    def _watch(self) -> None:
        timer = StallTimer(self._stall_seconds)
        while not self._over.wait(POLL_SECONDS):
            self._meter_position()
            if timer.see(_activity(self._process.pid)):
                self._meter.show_life()
            elif timer.is_over:
                self.has_stalled = True
                end_process(self._process)
                return

    def _meter_position(self) -> None:
        if self._file is not None:
            position = _position_in(self._process.pid, str(self._file))
            self._meter.count(max(0, position - self._position))
            self._position = max(position, self._position)


def _processes(pid: int) -> list[psutil.Process]:
    """Return a process and those that it started, as far as they live."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _activity(pid: int) -> float:
    """Return a number that changes while the processes read or write."""
    total = 0.0
    for process in _processes(pid):
        with contextlib.suppress(psutil.Error):
            try:
                counters = process.io_counters()
                total += counters.read_chars + counters.write_chars
            except (AttributeError, psutil.AccessDenied):  # not on this system, or not for us
                total += round(sum(process.cpu_times()[:2]))
    return total


def _position_in(pid: int, path: str) -> int:
    """Return how far the processes have read a file; 0 where the system does not tell."""
    position = 0
    for process in _processes(pid):
        with contextlib.suppress(psutil.Error, OSError):
            for opened in process.open_files():
                if opened.path == path:
                    position = max(position, getattr(opened, "position", 0))
    return position


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started; nothing happens where it has ended."""
    if process.poll() is None:
        for member in _processes(process.pid):  # parents first: none starts anything more
            with contextlib.suppress(psutil.Error):
                member.kill()
    process.wait()


def _command_error(message: str, call: str) -> StorageError:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    detail = f"{call}: {lines[-1][:ERROR_CHARACTERS] if lines else 'failed'}"
    message = re.sub(r"gs://\S+", "", message)  # a name may look like a status, such as run-404
    if re.search(r"with no configured\s+credentials|active account selected", message):
        return AccessDeniedError(f"{call}: no credentials. Run: gcloud auth login")
    if re.search(r"\b412\b|PreconditionException", message):
        return ConflictError(detail)
    if "ResumableUploadStartOver" in message:  # gsutil's word for a lost session, with its 404
        return TransientStorageError(detail)
    if re.search(
        r"AccessDenied|Forbidden|\b40[13]\b|Anonymous caller|does not have|[Pp]ermission", message
    ):
        return AccessDeniedError(detail)
    if re.search(
        r"BucketNotFound|NotFoundException|No URLs matched|matched no objects|\b404\b", message
    ):
        return ObjectNotFoundError(detail)
    return TransientStorageError(detail)
