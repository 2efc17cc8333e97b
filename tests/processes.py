"""Python in a process of its own, as tests start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from configs.training_config import PROJECT_DIRECTORY


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
