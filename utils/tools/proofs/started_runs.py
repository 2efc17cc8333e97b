"""Starts of train.py as other processes: launched, watched, killed. For proofs that crash them.

Only processes that were started here are ever ended, by their id. No torch here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import runpy
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import psutil

from configs.training_config import PROJECT_DIRECTORY
from utils.base.archive_formats import ARCHIVE_SUFFIXES
from utils.base.errors import PretrainError, UsageError
from utils.base.text import parse_json, printable
from utils.base.uri import require_path
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import MANIFEST_FILE, SAVING_PREFIX, RunPaths

TRAIN = PROJECT_DIRECTORY / "train.py"
RUN_POLL_SECONDS = 0.005
KILL_WAIT_SECONDS = 10.0
TAIL_LINES = 8

log = logging.getLogger(__name__)


class Running(Protocol):
    """A start of train.py; `subprocess.Popen` is one."""

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

    Args:
        processes: Ranks; more than one start through torch.distributed.run.
        prefix: Words before the Python interpreter, such as those of strace.
        environment: Variables besides those of this process.
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


class ForkServer:
    """Starts train.py in forks of a process that has imported torch already: in 0.1 s (Linux).

    A fork leads a session of its own, runs the file train.py as `__main__` and is killed like any
    other process. One start at a time.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        code = "from utils.tools.proofs.started_runs import serve_forks; serve_forks()"
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT_DIRECTORY,
            env={**os.environ, **(environment or {})},
            bufsize=0,  # an answer that waits must show in select, not hide in a buffer
            start_new_session=True,
        )
        self._running: ForkedStart | None = None
        self._read_line()

    def __enter__(self) -> ForkServer:
        """Return the server itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the server and what it still runs."""
        self.close()

    def start(self, words: Sequence[str], output: Path) -> Running:
        """Start train.py with these words; standard output and error go to a file."""
        assert self._running is None or self._running.poll() is not None, "one start at a time"
        request = {"words": list(words), "cwd": str(Path.cwd()), "output": str(output.absolute())}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._running = ForkedStart(self, int(self._read_line()))
        return self._running

    def read_answer(self, timeout: float | None) -> int | None:
        """Return the exit code of the fork that runs, None where it still does at the timeout."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        return int(self._read_line()) if ready else None

    def close(self) -> None:
        """End the server and what it still runs."""
        if self._running is not None and self._running.poll() is None:
            kill_tree(self._running.pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PretrainError("The fork server has ended; its error is above.")
        return line


class ForkedStart:
    """A start of train.py by a `ForkServer`."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""
        if self._code is None:
            self._code = self._server.read_answer(timeout=0.0)
        return self._code

    def wait(self) -> int:
        """Wait for its end; return the exit code."""
        if self._code is None:
            self._code = self._server.read_answer(timeout=None)
        assert self._code is not None
        return self._code


def serve_forks() -> None:
    """Fork a train.py for each request on standard input; answer with its id, then its end."""
    sys.path[0] = str(PROJECT_DIRECTORY)
    for module in (
        "train",
        "configs.model_config",
        "utils.start.preflight",
        "utils.run.run",
        "transformers.models.gpt_neox.modeling_gpt_neox",
    ):
        importlib.import_module(module)
    _answer("ready")
    while line := sys.stdin.readline():
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become_train(request)
        _answer(pid)
        _, status = os.waitpid(pid, 0)
        _answer(os.waitstatus_to_exitcode(status))


def _answer(text: object) -> None:
    print(text, flush=True)


def _become_train(request: dict[str, Any]) -> None:
    """Run train.py in this fork; never returns."""
    os.setsid()
    os.chdir(request["cwd"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    os.close(null)
    sys.argv = [str(TRAIN), *request["words"]]
    runpy.run_path(str(TRAIN), run_name="__main__")
    sys.exit()


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


def find_marked(variable: str, value: str) -> list[psutil.Process]:
    """Return every process that was started, by whomever, with this environment variable."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(variable) == value:
                found.append(process)
    return found


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

    A line that a crash has torn is left out, also where the next writer has gone on in it.
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
        for text in (line, line[max(0, line.rfind(b'{"')) :]):
            with contextlib.suppress(ValueError):
                record = parse_json(text)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
                    break
    return records, offset + whole


class StepWatch:
    """Follows what one start adds to metrics.jsonl.

    Attributes:
        begin: Steps done before it, None while it has not said so.
        last: The last step that it logged, None while there is none.
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
    """Return what a start was doing when it was killed, by what it has left."""
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
    """Return the last lines that a start has written."""
    lines = output.read_text("utf-8", errors="replace").splitlines()
    return "\n".join(f"  {printable(line)}" for line in lines[-TAIL_LINES:])


@contextlib.contextmanager
def killed_at_exit(running: Running) -> Iterator[None]:
    """Leave no process behind, whatever happens in between."""
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
    require_path(str(args.workdir or ""), "--workdir")
    work: Path = args.workdir or Path(tempfile.mkdtemp(prefix="crashes-"))
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise UsageError(f"{work} is not empty: --workdir wants a folder of its own.")
    try:
        yield work.resolve()
    finally:
        if args.keep:
            log.info("Kept: %s", work)
        else:
            shutil.rmtree(work, ignore_errors=True)
