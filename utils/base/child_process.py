"""A child process of the trainer, and its manners: it steps back, and does not outlive its parent.

A child that works for the trainer calls `live_no_longer_than` and `step_back` before anything else.
It needs neither torch nor the trainer's state for that, so this module imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

NICENESS = 10
AUTOGROUP_FILE = Path("/proc/self/autogroup")
_PR_SET_PDEATHSIG = 1


def start_child(
    module: str,
    connection: Connection,
    project_directory: Path,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a module of the project with the numbers of a connection and of this process.

    It leads a session of its own: Ctrl-C in the terminal is for the trainer alone.

    Raises:
        OSError: It cannot be started.
        ValueError: This system cannot hand over a connection.
    """
    return subprocess.Popen(  # noqa: S603 - our own module, no shell
        [sys.executable, "-m", module, str(connection.fileno()), str(os.getpid())],
        cwd=project_directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(connection.fileno(),),
        start_new_session=True,
    )


def live_no_longer_than(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel end this process with its parent (Linux only).

    If `parent`, its process id as it was known there, is gone already, this process exits.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit()


def step_back() -> None:
    """Take only the cores that training leaves."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    # Linux may schedule each session as a group, and then niceness counts within one alone; the
    # group of this session has its own (man 7 sched, "The autogroup feature").
    with contextlib.suppress(OSError):
        AUTOGROUP_FILE.write_text(str(NICENESS))


def leads_session() -> bool:
    """Tell whether this process leads a session of its own, which Ctrl-C elsewhere does not reach.

    What such a process starts can share the session, and then ends with it.
    """
    return os.getsid(0) == os.getpid() and not _has_terminal()


def _has_terminal() -> bool:
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDONLY))
        return True
    return False
