"""Training speed: train.py against transformers.Trainer and a plain PyTorch loop.

On a CPU all run at once and take turns, because the machine is shared; on a GPU one run follows the
other, because two would not fit.
"""

from __future__ import annotations

import contextlib
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contestants import OURS, PLAIN, TRAINER
from benchmarks.figures import GPU_SHAPE, interleave, prepare_sample, ratios, spread
from benchmarks.turns import Contestant, take_turns

COMPILED = "compiled"
CONTESTANTS = {OURS: OURS, COMPILED: OURS, PLAIN: PLAIN, TRAINER: TRAINER}
TURNS_A_RUN = 12
RUN_STEPS = 20  # of a run that is one turn

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
        "model": "neox-tiny",
        "sequence_length": 512,
        "per_device_train_batch_size": 1,
        "global_batch_size": 4,
    },
    "70M": {
        "model": "pythia-70m",
        "sequence_length": 512,
        "per_device_train_batch_size": 1,
        "global_batch_size": 1,
        "save_steps": 500,
    },
}


def measure_train(folder: Path, runs: int) -> dict[str, str]:
    """Measure all trainers, each in a process of its own."""
    import torch

    has_gpu = torch.cuda.is_available()
    data = str(prepare_sample(folder))
    found: dict[str, str] = {}
    for case, shape in ({"1.2B": GPU_SHAPE} if has_gpu else CASES).items():
        settings = {**EVERYTHING_ON, **shape, "data_uri": data}
        tasks = dict.fromkeys(CONTESTANTS, settings)
        tasks[COMPILED] = {**settings, "torch_compile": True}
        rates = (rates_of_runs if has_gpu else rates_of_turns)(tasks, folder, runs)
        for name, what in ((OURS, "train.py"), (COMPILED, "train.py, compiled")):
            found[f"{case}: tokens/s of {what}"] = spread(rates[name])
            for peer, of_peer in ((TRAINER, "Trainer"), (PLAIN, "plain loop")):
                found[f"{case}: {what} / {of_peer}"] = spread(ratios(rates[name], rates[peer]), "x")
    return found


def rates_of_turns(
    tasks: dict[str, dict[str, Any]], folder: Path, runs: int
) -> dict[str, list[float]]:
    """Return tokens a second by name, a figure for each `TURNS_A_RUN` turns of a step."""
    turns = runs * TURNS_A_RUN
    with contextlib.ExitStack() as stack:
        contestants = {
            name: stack.enter_context(Contestant(CONTESTANTS[name], settings, folder, turns=turns))
            for name, settings in tasks.items()
        }
        take_turns(list(contestants.values()))
    starts = range(0, turns, TURNS_A_RUN)
    return {
        name: [statistics.harmonic_mean(one.rates[at : at + TURNS_A_RUN]) for at in starts]
        for name, one in contestants.items()
    }


def rates_of_runs(
    tasks: dict[str, dict[str, Any]], folder: Path, runs: int
) -> dict[str, list[float]]:
    """Return tokens a second by name, a figure for each whole run."""

    def measure(name: str) -> float:
        settings = tasks[name]
        with Contestant(CONTESTANTS[name], settings, folder, turns=1, turn_steps=RUN_STEPS) as one:
            return one.take_turn()

    ways = {name: partial(measure, name) for name in tasks}
    return interleave(ways, runs, warm_up=False)
