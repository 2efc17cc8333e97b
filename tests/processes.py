"""Python in a process of its own, as tests start it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import pty
import runpy
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from configs.config_files import PROJECT_DIRECTORY


def run_python(
    *words: object, cwd: Path = PROJECT_DIRECTORY, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this Python, which finds the project from anywhere; return what it wrote and its code."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PROJECT_DIRECTORY), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,  # to end a test that hangs
    )


def run_in_terminal(*words: object, cwd: Path, columns: int = 80, **environment: str) -> str:
    """Run this Python at a terminal of 50 lines; return what it showed there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PROJECT_DIRECTORY), **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the process has ended
            while block := os.read(ours, 65536):
                shown += block
        os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


def load_train() -> None:
    """Import what a training imports, so that forks of this process begin at once."""
    sys.path[0] = str(PROJECT_DIRECTORY)
    for module in (
        "train",
        "configs.model_config",
        "utils.start.preflight",
        "utils.run.run",
        "transformers.models.gpt_neox.modeling_gpt_neox",
    ):
        importlib.import_module(module)


def run_train_file(words: Sequence[str]) -> NoReturn:
    """Run the file train.py with these words as `__main__` of this process, and end with it."""
    sys.argv = [str(PROJECT_DIRECTORY / "train.py"), *words]
    sys.orig_argv = [sys.executable, *sys.argv]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()
