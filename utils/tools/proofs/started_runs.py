"""Attempts of train.py as other processes: launched, watched, killed. For proofs that crash them.

Only processes that were started here are ever ended, by their id. No torch here.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from configs.config_files import PROJECT_DIRECTORY
from utils.base.archive_formats import ARCHIVE_SUFFIXES
from utils.base.errors import PretrainError, UsageError
from utils.base.text import parse_json_object, printable
from utils.base.uri import require_path
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import MANIFEST_FILE, SAVING_PREFIX, RunPaths

TRAIN = PROJECT_DIRECTORY / "train.py"
RUN_POLL_SECONDS = 0.005
KILL_WAIT_SECONDS = 10.0
TAIL_LINES = 8

log = logging.getLogger(__name__)


class Running(Protocol):
    """A train.py that was started; `subprocess.Popen` is one."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""

    def wait(self) -> int:
        """Wait for its end; return the exit code."""


class Launcher(Protocol):
    """A way to start train.py in the current directory."""

    def start(self, words: Sequence[str], output: Path) -> Running:
        """Start it with these words; standard output and error go to a file."""


class CommandLauncher:
    """Starts train.py as a user does, each time in a session of its own.

    Several ranks are launched through torch.distributed.run. `prefix` is words before the Python
    interpreter, such as those of strace.
    """

    def __init__(
        self,
        processes: int = 1,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._program = [*prefix, sys.executable]
        if processes > 1:
            self._program += ["-m", "torch.distributed.run", "--standalone"]
            self._program += ["--nproc_per_node", str(processes)]
        self._environment = {**os.environ, **(environment or {})}

    def start(self, words: Sequence[str], output: Path) -> Running:
        """Start it with these words; standard output and error go to a file."""
        with output.open("wb") as file:
            return subprocess.Popen(  # noqa: S603 - our own program, no shell
                [*self._program, str(TRAIN), *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )


def find_family(pid: int) -> list[psutil.Process]:
    """Return a process that this script started and all its descendants."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_processes(family: Sequence[psutil.Process]) -> None:
    """Send SIGKILL to each process, by its id; one that has ended is no error."""
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until_gone(family: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for processes to end; return those that still run at the deadline."""
    deadline = time.monotonic() + seconds
    while left := [process for process in family if _is_running(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(RUN_POLL_SECONDS)
    return left


def _is_running(process: psutil.Process) -> bool:
    try:
        # A zombie whose other threads still end (one waits for the disk) holds its files and locks.
        is_zombie = process.status() == psutil.STATUS_ZOMBIE and process.num_threads() < 2
        return bool(process.is_running() and not is_zombie)
    except psutil.NoSuchProcess:
        return False


def kill_tree(pid: int) -> None:
    """Kill a process that this script started with all its descendants, and wait for their end."""
    family = find_family(pid)
    kill_processes(family)
    left = wait_until_gone(family, KILL_WAIT_SECONDS)
    if left:
        raise PretrainError(f"Processes {[process.pid for process in left]} outlive SIGKILL.")


def read_records(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects in a file from a byte on, and where its last whole line ends.

    A line that a crash has torn is left out.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data.rfind(b"\n") + 1
    records = []
    for line in data[:whole].splitlines():
        with contextlib.suppress(ValueError):
            record = parse_json_object(line)
            if isinstance(record.get("step"), int):
                records.append(record)
    return records, offset + whole


class StepWatch:
    """Follows what one attempt adds to metrics.jsonl.

    `begin` is the steps done before it, `last` the last step that it logged; None while unknown.
    """

    def __init__(self, metrics: Path) -> None:
        self.begin: int | None = None
        self.last: int | None = None
        self._path = metrics
        self._offset = metrics.stat().st_size if metrics.is_file() else 0

    def read(self) -> None:
        """Take in what is new."""
        records, self._offset = read_records(self._path, self._offset)
        for record in records:
            if record.get("event") in ("start", "resume"):
                self.begin = record["step"]
            elif "loss" in record:
                self.last = record["step"]


def phase_of(paths: RunPaths, watch: StepWatch) -> str:
    """Return what an attempt was doing when it was killed, by what it has left."""
    if watch.begin is None:
        return "starting"
    names = [path.name for path in paths.checkpoints.iterdir()]
    archives = any(name.endswith(ARCHIVE_SUFFIXES) for name in names)
    saving = [
        name
        for name in names
        if name.startswith(SAVING_PREFIX) and not name.endswith(ARCHIVE_SUFFIXES)
    ]
    if any((paths.checkpoints / name / MANIFEST_FILE).is_file() for name in saving):
        return "committing"
    if any("deleted" not in name for name in saving):
        return "saving"
    if saving:
        return "deleting"
    states = {entry.state for entry in Journal(paths.journal).latest().values()}
    if archives or states & {UploadState.ARCHIVING, UploadState.UPLOADING}:
        return "uploading"
    return "training"


def tail(output: Path) -> str:
    """Return the last lines that an attempt has printed."""
    lines = output.read_text("utf-8", errors="replace").splitlines()
    return "\n".join(f"  {printable(line)}" for line in lines[-TAIL_LINES:])


@contextlib.contextmanager
def killed_at_exit(running: Running) -> Iterator[None]:
    """Leave no process running, even after an error."""
    try:
        yield
    finally:
        if running.poll() is None:
            kill_tree(running.pid)


@contextlib.contextmanager
def open_work_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Give `--workdir` or a temporary folder; remove it unless `--keep` is set by then.

    Raises:
        UsageError: The folder is not empty, or not on this machine.
    """
    if args.workdir is not None:
        require_path(str(args.workdir), "--workdir")
    work: Path = args.workdir or Path(tempfile.mkdtemp(prefix="crashes-"))
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise UsageError(f"{work} is not empty: --workdir must name a new or empty folder.")
    try:
        yield work.resolve()
    finally:
        if args.keep:
            log.info("Kept: %s", work)
        else:
            shutil.rmtree(work, ignore_errors=True)
