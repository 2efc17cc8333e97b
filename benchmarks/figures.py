"""What all measurements share: pairs of runs, their spread, the machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

RUNS = 7


def describe_machine() -> str:
    """Return CPU, cores, Python and torch in one line."""
    import torch

    cpu = platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, " + (
        f"torch {torch.__version__}, {platform.system()} {platform.release()}"
    )


def compare(
    ours: Callable[[], float], peer: Callable[[], float], runs: int
) -> tuple[list[float], list[float], list[float]]:
    """Return the rates of interleaved runs of both, and their ratios pair by pair."""
    ours(), peer()  # warm both
    pairs = [(ours(), peer()) for _ in range(runs)]
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return left, right, [a / b for a, b in pairs]


def spread(values: Sequence[float], unit: str = "", scale: float = 1.0) -> str:
    """Return the median with minimum and maximum."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle / scale:.2f}{unit} ({low / scale:.2f} to {high / scale:.2f})"


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
