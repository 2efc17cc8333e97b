"""Training speed: train.py against transformers.Trainer and a plain PyTorch loop.

On a CPU all run at once and take turns, because the machine is shared; on a GPU one run follows the
other, because two would not fit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contestants import OURS, PLAIN, TRAINER
from benchmarks.figures import spread
from benchmarks.turns import Runner, take_turns
from configs.training_config import PROJECT_DIRECTORY

COMPILED = "compiled"
CONTESTANTS = {OURS: OURS, COMPILED: OURS, PLAIN: PLAIN, TRAINER: TRAINER}
TURNS_A_RUN = 12
PREPARE = (sys.executable, str(PROJECT_DIRECTORY / "scripts" / "prepare_data.py"))

EVERYTHING_ON = {
    "logging_steps": 10,
    "save_steps": 50,
    "max_eval_samples": 4,
    "sample_tokens": 0,
    "checkpoint_uri": "bucket",
    "learning_rate": 1e-3,
}
CASES: dict[str, dict[str, Any]] = {
    "test preset": {
        "first_step": 10,
        "turn_steps": 1,
        "settings": {
            "model": "neox-tiny",
            "sequence_length": 512,
            "per_device_train_batch_size": 1,
            "global_batch_size": 4,
        },
    },
    "70M": {
        "first_step": 4,
        "turn_steps": 1,
        "settings": {
            "model": "pythia-70m",
            "sequence_length": 512,
            "per_device_train_batch_size": 1,
            "global_batch_size": 1,
            "save_steps": 500,
        },
    },
}
GPU_SHAPE: dict[str, Any] = {
    "model": "refocused-1.2b",
    "sequence_length": 2048,
    "per_device_train_batch_size": 8,
    "global_batch_size": 16,
}
GPU_CASES: dict[str, dict[str, Any]] = {
    "1.2B": {"first_step": 5, "last_step": 25, "settings": GPU_SHAPE},
}


def measure_train(folder: Path, runs: int) -> dict[str, str]:
    """Measure all trainers, each in a process of its own."""
    import torch

    data = folder / "data"
    words = [*PREPARE, "--sample", "--output", str(data), "--quiet"]
    subprocess.run(words, check=True, cwd=folder)  # noqa: S603
    has_gpu = torch.cuda.is_available()
    found: dict[str, str] = {}
    for case, task in (GPU_CASES if has_gpu else CASES).items():
        settings = {**EVERYTHING_ON, **task["settings"], "data_uri": str(data)}
        tasks = {
            name: {
                **task,
                "settings": {**settings, "torch_compile": True} if name == COMPILED else settings,
            }
            for name in CONTESTANTS
        }
        places = folder / case.replace(" ", "-")
        rates = (_rates_of_runs if has_gpu else _rates_of_turns)(tasks, places, runs)
        for name, what in ((OURS, "train.py"), (COMPILED, "train.py, compiled")):
            found[f"{case}: tokens/s of {what}"] = spread(rates[name])
            found[f"{case}: {what} / Trainer"] = _ratios(rates[name], rates[TRAINER])
            found[f"{case}: {what} / plain loop"] = _ratios(rates[name], rates[PLAIN])
    return found


def _rates_of_turns(
    tasks: dict[str, dict[str, Any]], places: Path, runs: int
) -> dict[str, list[float]]:
    """Return tokens a second, a figure for each `TURNS_A_RUN` turns."""
    turns = runs * TURNS_A_RUN
    with contextlib.ExitStack() as stack:
        runners = {}
        for name, task in tasks.items():
            last = task["first_step"] + turns * task["turn_steps"]
            words = {**task, "last_step": last, "folder": str(_make(places / name))}
            command, environment = _start_of(CONTESTANTS[name], words)
            runner = Runner(command, PROJECT_DIRECTORY, environment)
            runners[name] = stack.enter_context(runner)
        rounds = list(take_turns(runners, turns))
    shutil.rmtree(places, ignore_errors=True)
    parts = [rounds[begin : begin + TURNS_A_RUN] for begin in range(0, turns, TURNS_A_RUN)]
    return {
        name: [
            TURNS_A_RUN * task["turn_steps"] * _tokens_a_step(task) / sum(one[name] for one in part)
            for part in parts
        ]
        for name, task in tasks.items()
    }


def _rates_of_runs(
    tasks: dict[str, dict[str, Any]], places: Path, runs: int
) -> dict[str, list[float]]:
    """Return tokens a second of whole runs, one after the other."""
    rates: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(runs):
        for name, task in tasks.items():
            words = {**task, "folder": str(_make(places / name))}
            seconds = run_contestant(CONTESTANTS[name], words)["seconds"]
            steps = task["last_step"] - task["first_step"]
            rates[name].append(steps * _tokens_a_step(task) / seconds)
            shutil.rmtree(places / name, ignore_errors=True)
    return rates


def run_contestant(name: str, task: dict[str, Any]) -> dict[str, float]:
    """Return what one contestant printed at its end: `seconds` and `peak_bytes`."""
    command, environment = _start_of(name, task)
    output = subprocess.run(  # noqa: S603
        command,
        check=True,
        cwd=PROJECT_DIRECTORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def _start_of(name: str, task: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a contestant."""
    # One cache for all runs: what compilation takes is not what is compared here.
    compiled = str(Path(task["folder"]).parent / "kept-compilations")
    command = [sys.executable, "-m", "benchmarks.contestants", name, json.dumps(task)]
    return command, {**os.environ, "TORCHINDUCTOR_CACHE_DIR": compiled}


def _tokens_a_step(task: dict[str, Any]) -> int:
    settings = task["settings"]
    tokens: int = settings["global_batch_size"] * settings["sequence_length"]
    return tokens


def _make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _ratios(ours: list[float], peer: list[float]) -> str:
    return spread([a / b for a, b in zip(ours, peer, strict=True)], "x")
