"""train.py in forks of a process that has imported torch already, and processes found by a mark."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from configs.config_files import PROJECT_DIRECTORY
from tests.processes import load_train, run_train_file
from utils.base.errors import PretrainError
from utils.tools.proofs.started_runs import Running, kill_tree


class ForkServer:
    """Starts train.py in forks of a process that has imported torch already: in 0.1 s (Linux).

    A fork leads a session of its own, runs the file train.py as `__main__` and is killed like any
    other process. One start at a time.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        code = "from tests.campaigns.fork_server import serve_forks; serve_forks()"
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

    def __exit__(self, *_: object) -> None:
        """End the server and what it still runs."""
        if self._running is not None and self._running.poll() is None:
            kill_tree(self._running.pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

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
    load_train()
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
    run_train_file(request["words"])


def find_marked(variable: str, value: str) -> list[psutil.Process]:
    """Return every process that was started, by whomever, with this environment variable."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(variable) == value:
                found.append(process)
    return found
