"""Turns: processes that are timed against each other run one at a time, each for some steps.

    start, warm up, stop -> (continue one, its steps, stop it) in turns, again and again -> seconds

Machines that others share are now fast, now slow, for seconds or minutes. Whole runs one after the
other meet different machines; turns of some seconds meet the same one. A process that is not in
its turn is stopped with all its children, so that none works in another's time.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

END_SECONDS = 120.0


class Runner:
    """A process that says a JSON line at the end of each turn and then waits for a line.

    Args:
        command: Of the process.
        folder: Its working directory.
        environment: Its environment.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self._name = " ".join(command)
        self._process = subprocess.Popen(  # noqa: S603
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Runner:
        """Return the process, warm and stopped."""
        self._read()
        self._stop()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let it end by itself; after an error of ours, end it."""
        for one in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.resume() if error is None else one.kill()
        self._process.communicate(timeout=END_SECONDS)
        if error is None and self._process.returncode:
            raise RuntimeError(f"{self._name} ended with {self._process.returncode}")

    def turn(self) -> float:
        """Return the seconds of one turn."""
        assert self._process.stdin is not None
        for one in self._tree():
            one.resume()
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds = self._read()
        self._stop()
        return seconds

    def _read(self) -> float:
        """Return what it says at the end of a turn; other lines are its own affair."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return float(json.loads(line)["turn_seconds"])
        raise RuntimeError(f"{self._name} ended before its turn")

    def _stop(self) -> None:
        for one in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()

    def _tree(self) -> list[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]


def take_turns(runners: Mapping[str, Runner], turns: int) -> Iterator[dict[str, float]]:
    """Yield the seconds of each round, by name; every other round goes backwards.

    Args:
        runners: Warm and stopped.
        turns: Of each.
    """
    names = list(runners)
    for _ in range(turns):
        yield {name: runners[name].turn() for name in names}
        names.reverse()
