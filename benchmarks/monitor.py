"""The monitor beside a run of 100,000 logged lines and 1,000 checkpoints that goes on logging.

Each monitor is a process of its own, as a user starts it, in a terminal of 80 x 24 or with --json
in a pipe. CPU time is the process's own, from its first view to the end of the watch, and the whole
of it with the start. The peer of the start is the interpreter that does nothing, in the same run.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import interleave, spread, timed
from benchmarks.viewer import write_checkpoints
from configs.config_files import PROJECT_DIRECTORY
from tests.sample_logs import make_step, write_start
from utils.tracking.metrics_log import append_metrics

NUM_LINES = 100_000
LOGGING_STEPS = 10
APPEND_SECONDS = 1.0
WATCH_SECONDS = 60.0
REFRESH_SECONDS = 2.0
ROWS, COLUMNS = 24, 80
MONITOR = (
    sys.executable,
    str(PROJECT_DIRECTORY / "scripts" / "monitor_training.py"),
    "--refresh",
    str(REFRESH_SECONDS),
)
FORMS = {"terminal": (), "--json": ("--json",)}
FIRST_VIEW = b"Disk Free:"  # the last row of the view


def measure_monitor(folder: Path, runs: int) -> dict[str, str]:
    """Measure start, CPU time and bytes of the monitor in both forms."""
    write_checkpoints(folder / "checkpoints")
    write_log(folder / "logs" / "metrics.jsonl")
    nothing = (sys.executable, "-c", "pass")
    ways = {"the interpreter alone": partial(timed, partial(subprocess.run, nothing, check=True))}
    ways |= {form: partial(_time_start, folder, form) for form in FORMS}
    starts = interleave(ways, runs)
    figures = {
        f"start to first view, {name}": spread(values, " s") for name, values in starts.items()
    }
    with _appending(folder / "logs" / "metrics.jsonl"):
        for form in FORMS:
            with open_monitor(folder, form) as watched:
                figures.update(_watch(watched, form))
    return figures


def _watch(watched: Watched, form: str) -> dict[str, str]:
    """Let a monitor watch for a while; return what it took."""
    watched.read_first_view()
    process = psutil.Process(watched.process.pid)
    before, begin = _cpu_seconds(process), time.perf_counter()
    size = watched.read_for(WATCH_SECONDS)
    seconds, after = time.perf_counter() - begin, _cpu_seconds(process)
    return {
        f"CPU of a core over {seconds:.0f} s, {form}": f"{(after - before) / seconds:.2%}",
        f"the same with the start, {form}": f"{after / seconds:.2%}",
        f"bytes a refresh, {form}": f"{size * REFRESH_SECONDS / seconds:,.0f}",
        f"resident memory, {form}": f"{process.memory_info().rss / 2**20:.0f} MiB",
    }


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@dataclass
class Watched:
    """A monitor and the end of its output."""

    process: subprocess.Popen[bytes]
    output: int
    first_view: bytes
    began: float

    def read_first_view(self) -> float:
        """Wait for the first view; return the seconds since the start."""
        shown = b""
        while self.first_view not in shown:
            data = os.read(self.output, 2**16)
            if not data:
                raise subprocess.CalledProcessError(self.process.wait(), self.process.args)
            shown += data
        return time.perf_counter() - self.began

    def read_for(self, seconds: float) -> int:
        """Read for a while; return the bytes that came."""
        size = 0
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            if select.select([self.output], [], [], left)[0]:
                size += len(os.read(self.output, 2**16))
        return size


@contextmanager
def open_monitor(folder: Path, form: str) -> Iterator[Watched]:
    """Start a monitor, in a terminal or a pipe; end it."""
    is_terminal = form == "terminal"
    ours, theirs = pty.openpty() if is_terminal else os.pipe()
    if is_terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {
        key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")
    }
    began = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603
        (*MONITOR, *FORMS[form]),
        cwd=folder,
        env={**environment, "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
    )
    os.close(theirs)
    try:
        yield Watched(process, ours, FIRST_VIEW if is_terminal else b"\n", began)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _time_start(folder: Path, form: str) -> float:
    with open_monitor(folder, form) as watched:
        return watched.read_first_view()


def write_log(path: Path) -> None:
    """Write the log of a run that has just logged its last line; its process is this one."""
    path.parent.mkdir(parents=True)
    now = datetime.now(UTC)
    write_start(path, max_steps=2 * NUM_LINES * LOGGING_STEPS)
    with path.open("a", encoding="utf-8") as file:
        for number in range(1, NUM_LINES + 1):
            moment = now - timedelta(seconds=NUM_LINES - number)
            line = {"time": moment.isoformat(timespec="seconds"), **_record(number)}
            file.write(json.dumps(line) + "\n")


def _record(number: int) -> dict[str, Any]:
    """Return a record; some of them are of an evaluation."""
    step = number * LOGGING_STEPS
    loss = 2.5 + 8 / (1 + step / 1000)
    if number % 50 == 0:
        return {
            "step": step,
            "validation_loss": loss,
            "validation_perplexity": 12.182493960703473,
            "best_validation_loss": loss,
        }
    return make_step(step, loss, mfu=0.4 + loss / 1e4, tokens_per_second=3e5 + step / 7)


@contextmanager
def _appending(path: Path) -> Iterator[None]:
    """Append a line a second, as a run does."""
    ending = threading.Event()

    def append() -> None:
        number = NUM_LINES
        while not ending.wait(APPEND_SECONDS):
            number += 1
            append_metrics(path, _record(number))

    thread = threading.Thread(target=append)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
