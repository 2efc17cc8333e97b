"""The upload process: one upload, out of the trainer's way and under its eyes.

    job -> upload process (niced, a session of its own) -> progress, result

It is a process and not a thread so that neither compression nor a client library takes the
interpreter or the cores of the training loop, and so that whatever makes no progress, a library,
a program or a mounted directory, can be ended. It ends with the process that started it. No torch
here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from configs.config_files import PROJECT_DIRECTORY
from utils.base.child_process import live_no_longer_than, start_child, step_back
from utils.base.errors import PretrainError, StorageError, TransientStorageError
from utils.uploads.job import ProgressReport, UploadJob, UploadProgress, UploadResult, run_job
from utils.uploads.watched_command import StallTimer

REPORT_SECONDS = 0.5
# The watch over a program is the first to act, and says more; this one is for all else.
STALL_MARGIN_SECONDS = 15.0
END_SECONDS = 5.0

log = logging.getLogger(__name__)

OnReport = Callable[[ProgressReport], None]


class InterruptedUploadError(Exception):
    """The upload was ended on request."""


def run_in_process(
    job: UploadJob,
    on_progress: OnReport = lambda report: None,
    must_end: Callable[[], bool] = lambda: False,
) -> UploadResult:
    """Upload one checkpoint in a process of its own.

    `on_progress` is called about twice a second; `must_end` is asked as often.

    Raises:
        CheckpointError: As `run_job`.
        StorageError: As `run_job`; also transient when the process died or stalled.
        InterruptedUploadError: `must_end` said so.
    """
    directory = str(Path.cwd())
    connection, theirs = Pipe()
    try:
        process = start_child("utils.uploads.process", theirs, PROJECT_DIRECTORY)
    except (OSError, ValueError) as exc:
        log.warning("No upload process can be started (%s): uploading in this one.", exc)
        connection.close()
        return run_job(job, UploadProgress())
    finally:
        theirs.close()
    with connection:
        try:
            connection.send((job, directory))
            return _follow(connection, job.transport.stall_seconds, on_progress, must_end)
        except (EOFError, OSError) as exc:
            _wait(process)
            raise TransientStorageError(
                f"the upload process ended (code {process.returncode})."
            ) from exc
        finally:
            _end(process)


def _follow(
    connection: Connection,
    stall_seconds: float,
    on_progress: OnReport,
    must_end: Callable[[], bool],
) -> UploadResult:
    limit = stall_seconds + STALL_MARGIN_SECONDS
    timer = StallTimer(limit)
    message: Any = None
    while not must_end():
        if connection.poll(REPORT_SECONDS):
            message = connection.recv()
        if isinstance(message, UploadResult):
            return message
        if isinstance(message, Exception):
            raise message
        if isinstance(message, logging.LogRecord):
            logger = logging.getLogger(message.name)
            if logger.isEnabledFor(message.levelno):
                logger.handle(message)
            message = None
        elif message is not None and timer.see(message):
            on_progress(message)
        elif timer.is_over:
            raise TransientStorageError(f"no progress for {limit:.0f} s; the upload was ended.")
    raise InterruptedUploadError


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process with all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for its end, but not for a call into a dead mount that not even a kill ends."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)


class _Talk(logging.Handler):
    """What the process says to the one that started it, its log records too."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection, self._sending = connection, threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.say(record)

    def say(self, message: object) -> None:
        """Send a message; without a listener there is nothing left to do."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            end_group()


def end_group(*_: object) -> None:
    """End this process and all that it started."""
    os.killpg(0, signal.SIGKILL)


def serve(connection: Connection) -> None:
    """Do the one job that comes, and report until it is done."""
    talk = _Talk(connection)
    job, directory = connection.recv()
    os.chdir(directory)
    logger = logging.getLogger("utils")
    logger.setLevel(logging.INFO)
    logger.addHandler(talk)
    progress, over = UploadProgress(), threading.Event()

    def report() -> None:
        while not over.wait(REPORT_SECONDS):
            talk.say(progress.report())

    reporter = threading.Thread(target=report, name="report", daemon=True)
    reporter.start()
    answer: object
    try:
        answer = run_job(job, progress)
    except PretrainError as exc:
        answer = exc
    except Exception as exc:  # noqa: BLE001 - told to the trainer, which tells the user
        answer = StorageError(f"{type(exc).__name__}: {exc}")
    over.set()
    reporter.join()
    talk.say(answer)


def main(argv: list[str]) -> None:
    """Entry of the process: CONNECTION PARENT, numbers both of them."""
    connection, parent = map(int, argv)
    signal.signal(signal.SIGTERM, end_group)
    live_no_longer_than(parent, signal.SIGTERM)
    step_back()
    serve(Connection(connection))


if __name__ == "__main__":
    main(sys.argv[1:])
