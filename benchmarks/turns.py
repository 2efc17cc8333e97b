"""A trainer in a process of its own that does its steps turn by turn, and is stopped in between.

    start, warm up, stop -> (continue, the steps of a turn, stop) again and again -> end

Machines that others share are now fast, now slow, for seconds or minutes. Whole runs one after the
other meet different machines; turns of some seconds meet the same one. A process that is not in
its turn is stopped with all its children, so that none works in another's time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from configs.config_files import PROJECT_DIRECTORY

FIRST_STEP = 5  # the steps before it warm up
END_SECONDS = 120.0


class Contestant:
    """One of `benchmarks/contestants.py`, warm and stopped once it is entered.

    In `folder` is the folder of its run, which is removed at the end, and what is compiled, which
    stays for the next one: the time of compilation is not what is compared. `peak_bytes` is the
    peak of the GPU's memory so far, `rates` has the tokens a second of each turn, `losses` the
    validation loss by step: of every `eval_steps` steps and of the last, where it is not 0.
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        folder: Path,
        *,
        turns: int,
        turn_steps: int = 1,
        eval_steps: int = 0,
    ) -> None:
        self.peak_bytes, self.turns = 0, turns
        self.rates: list[float] = []
        self.losses: dict[int, float] = {}
        self._folder = Path(tempfile.mkdtemp(prefix=f"run-{name}-", dir=folder))
        self._tokens = turn_steps * settings["global_batch_size"] * settings["sequence_length"]
        task = {
            "first_step": FIRST_STEP,
            "turn_steps": turn_steps,
            "turns": turns,
            "eval_steps": eval_steps,
            "folder": str(self._folder),
            "settings": settings,
        }
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "benchmarks.contestants", name, json.dumps(task)],
            cwd=PROJECT_DIRECTORY,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "kept-compilations")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Contestant:
        """Wait until it is warm, and stop it."""
        try:
            self._read_turn()
        except RuntimeError as exc:
            self.__exit__(type(exc), exc, None)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Let it end by itself; after an error, end it."""
        for one in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.resume() if error is None else one.kill()
        self._process.communicate(timeout=END_SECONDS)
        shutil.rmtree(self._folder)
        if error is None and self._process.returncode:
            raise RuntimeError(f"{self._folder.name} ended with {self._process.returncode}")

    def take_turn(self) -> float:
        """Do the steps of a turn; return tokens a second."""
        assert self._process.stdin is not None
        for one in self._tree():
            one.resume()
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.rates.append(self._tokens / self._read_turn())
        return self.rates[-1]

    def _read_turn(self) -> float:
        """Return the seconds it reports at the end of a turn, and stop it; skip other lines."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                report = json.loads(line)
                seconds, self.peak_bytes = float(report["turn_seconds"]), report["peak_bytes"]
                if report["validation_loss"] is not None:
                    self.losses[report["step"]] = report["validation_loss"]
                for one in self._tree():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.suspend()
                return seconds
        raise RuntimeError(f"{self._folder.name} ended before its turn")

    def _tree(self) -> list[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]


def take_turns(contestants: Sequence[Contestant]) -> None:
    """Let all take their turns, one each in a round, until none has any left."""
    order = list(contestants)
    while left := [one for one in order if len(one.rates) < one.turns]:
        for one in left:
            one.take_turn()
        order.reverse()
