"""What all measurements share: interleaved runs and their spread, processes, a train state."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.config_files import PROJECT_DIRECTORY
from configs.training_config import TrainingConfig, get_training_config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from utils.training_utils import TrainState

RUNS = 7
# What is measured on a GPU: the 1.2B preset, two micro-batches a step.
GPU_SHAPE: dict[str, Any] = {
    "model": "refocused-1.2b",
    "sequence_length": 2048,
    "per_device_train_batch_size": 8,
    "global_batch_size": 16,
}
TRAIN = (sys.executable, str(PROJECT_DIRECTORY / "train.py"))
PREPARE = (sys.executable, str(PROJECT_DIRECTORY / "scripts" / "prepare_data.py"))


def describe_machine() -> str:
    """Return CPU, cores, Python and torch in one line."""
    import torch

    cpu = platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, " + (
        f"torch {torch.__version__}, {platform.system()} {platform.release()}"
    )


def timed(action: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def interleave(
    ways: Mapping[str, Callable[[], float]], runs: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Return the figures of each way, one a run; the ways take turns in each run.

    With `warm_up`, a first run of all of them is left out.
    """
    rounds = [{name: way() for name, way in ways.items()} for _ in range(runs + warm_up)]
    return {name: [figures[name] for figures in rounds[warm_up:]] for name in ways}


def spread(values: Sequence[float], unit: str = "", scale: float = 1.0) -> str:
    """Return the median with minimum and maximum."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle / scale:.2f}{unit} ({low / scale:.2f} to {high / scale:.2f})"


def ratios(ours: Sequence[float], peer: Sequence[float]) -> list[float]:
    """Return the ratio of each pair of runs that were made side by side."""
    return [a / b for a, b in zip(ours, peer, strict=True)]


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def prepare_sample(folder: Path) -> Path:
    """Write the sample corpus as shards; return their folder."""
    data = folder / "data"
    words = [*PREPARE, "--sample", "--output", str(data), "--quiet"]
    subprocess.run(words, check=True, cwd=folder)  # noqa: S603
    return data


def run_module(name: str, *words: str, **variables: str) -> Any:
    """Run a module of this folder in a process of its own; return the JSON of its last line."""
    output = subprocess.run(  # noqa: S603
        [sys.executable, "-m", f"benchmarks.{name}", *words],
        check=True,
        cwd=PROJECT_DIRECTORY,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ).stdout
    return json.loads(output.splitlines()[-1])


@dataclass(frozen=True)
class Setup:
    """A train state as a run builds it, without data; `model_config` is of transformers."""

    config: TrainingConfig
    model_config: Any
    accelerator: Accelerator
    state: TrainState

    def random_batches(self) -> list[Any]:
        """Return the micro-batches of a step: int64 [micro-batch, sequence_length] each."""
        import torch

        samples, accumulation = self.config.resolve_batch(1)
        shape = (samples // accumulation, self.config.sequence_length)
        vocabulary = self.model_config.vocab_size
        return [torch.randint(vocabulary, shape) for _ in range(accumulation)]

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def build_setup(folder: Path, settings: Mapping[str, Any]) -> Setup:
    """Build a train state, in place of one that was built before in this process.

    The settings go over the test configuration.
    """
    from accelerate.state import AcceleratorState, GradientState

    from configs.model_config import build_model_config
    from utils.training_utils import (
        build_accelerator,
        build_train_state,
        resolve_precision,
        set_determinism,
    )

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = get_training_config("test", {"cache_dir": str(folder), **settings})
    model_config = build_model_config(
        config.model,
        config.model_overrides,
        config.sequence_length,
        config.pad_vocab_to_multiple_of,
    )
    set_determinism(config)
    accelerator = build_accelerator(config, resolve_precision(config), [], folder)
    state = build_train_state(accelerator, model_config, config)
    return Setup(config, model_config, accelerator, state)
