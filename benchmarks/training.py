"""Training speed: train.py against transformers.Trainer and a plain PyTorch loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contestants import OURS, PLAIN, TRAINER
from benchmarks.figures import spread
from configs.training_config import PROJECT_DIRECTORY

COMPILED = "compiled"
PREPARE = (sys.executable, str(PROJECT_DIRECTORY / "scripts" / "prepare_data.py"))

EVERYTHING_ON = {
    "logging_steps": 10, "save_steps": 25, "max_eval_samples": 4, "sample_tokens": 0,
    "checkpoint_uri": "bucket", "learning_rate": 1e-3,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "test preset": {
        "first_step": 10, "last_step": 40,
        "settings": {
            "model": "neox-tiny", "sequence_length": 512, "per_device_train_batch_size": 1,
            "global_batch_size": 4,
        },
    },
    "70M": {
        "first_step": 2, "last_step": 12,
        "settings": {
            "model": "pythia-70m", "sequence_length": 512, "per_device_train_batch_size": 1,
            "global_batch_size": 1,
        },
    },
}  # fmt: skip
GPU_SHAPE: dict[str, Any] = {
    "model": "refocused-1.2b", "sequence_length": 2048, "per_device_train_batch_size": 8,
    "global_batch_size": 16,
}  # fmt: skip
GPU_CASES: dict[str, dict[str, Any]] = {
    "1.2B": {"first_step": 5, "last_step": 25, "settings": GPU_SHAPE},
}


def measure_train(folder: Path, runs: int) -> dict[str, str]:
    """Measure whole runs, interleaved, each in a process of its own."""
    import torch

    data = folder / "data"
    words = [*PREPARE, "--sample", "--output", str(data), "--quiet"]
    subprocess.run(words, check=True, cwd=folder)  # noqa: S603
    cases = GPU_CASES if torch.cuda.is_available() else CASES
    found: dict[str, str] = {}
    for case, task in cases.items():
        found.update(_measure_case(case, task, data, folder, runs))
    return found


def _measure_case(
    case: str, task: dict[str, Any], data: Path, folder: Path, runs: int
) -> dict[str, str]:
    settings = {**EVERYTHING_ON, **task["settings"], "data_uri": str(data)}
    steps = task["last_step"] - task["first_step"]
    tokens = steps * settings["global_batch_size"] * settings["sequence_length"]
    contestants = {OURS: OURS, COMPILED: OURS, PLAIN: PLAIN, TRAINER: TRAINER}
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(runs):
        for name, known in rates.items():
            work = folder / f"{case}-{name}-{number}".replace(" ", "-")
            work.mkdir()
            own = {**settings, "torch_compile": True} if name == COMPILED else settings
            words = {**task, "settings": own, "folder": str(work)}
            result = run_contestant(contestants[name], words)
            known.append(tokens / result["seconds"])
            _remove(work)
    found = {}
    for name, what in ((OURS, "train.py"), (COMPILED, "train.py, compiled")):
        found[f"{case}: tokens/s of {what}"] = spread(rates[name])
        found[f"{case}: {what} / Trainer"] = _ratios(rates[name], rates[TRAINER])
        found[f"{case}: {what} / plain loop"] = _ratios(rates[name], rates[PLAIN])
    return found


def run_contestant(name: str, task: dict[str, Any]) -> dict[str, float]:
    """Return what one contestant printed: `seconds` and `peak_bytes`."""
    # One cache for all runs: what compilation takes is not what is compared here.
    compiled = Path(task["folder"]).parent / "compiled"
    output = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "benchmarks.contestants", name, json.dumps(task)],
        check=True,
        cwd=PROJECT_DIRECTORY,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(compiled)},
        stdout=subprocess.PIPE,
    ).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def _ratios(ours: list[float], peer: list[float]) -> str:
    return spread([a / b for a, b in zip(ours, peer, strict=True)], "x")


def _remove(work: Path) -> None:
    import shutil

    shutil.rmtree(work, ignore_errors=True)
