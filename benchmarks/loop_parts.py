"""What the loop adds around the model, by part: train.py with a clock around each part of a step.

    python -m benchmarks.loop_parts JSON

The model is the test preset with one sample of 64 tokens a step, so that a step is short and parts
are seen; gradients, and with them the clip, are as large as the test preset's.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import prepare_sample, run_module, spread

STEPS = 300
WARM_STEPS = 50
LOGGING_STEPS = 10
MODEL, OURS = "model", "ours"


def measure_loop(folder: Path, runs: int) -> dict[str, str]:
    """Return the microseconds of each part, median over steps, then over a few runs."""
    data = prepare_sample(folder)
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(min(runs, 3)):
        work = folder / f"loop-{number}"
        work.mkdir()
        task = json.dumps({"folder": str(work), "data": str(data)})
        for part, microseconds in run_module("loop_parts", task).items():
            found[part].append(microseconds)
    return {part: spread(values, " us") for part, values in found.items()}


class Clocks:
    """Sums the time of each part over a step; a part within another one counts for itself."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._open: list[float] = []
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of what is done within to a part, without that of parts within it."""
        begin = time.perf_counter()
        self._open.append(0.0)
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._now[part] += seconds - self._open.pop()
            if self._open:
                self._open[-1] += seconds

    def end_step(self) -> None:
        """Begin the next step."""
        now = time.perf_counter()
        self.steps.append({**self._now, "whole step": now - self._begin})
        self._now.clear()
        self._begin = now

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Put a clock around a function of a class or module."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            with self.measure(part):
                return function(*args, **options)

        setattr(owner, name, timed)


def run(task: dict[str, str]) -> dict[str, float]:
    """Train with clocks; return the median microseconds of each part."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.optim.lr_scheduler import LambdaLR

    import train
    from utils import training_utils
    from utils.data_utils import BatchLoader
    from utils.run.metrics import RunMetrics
    from utils.run.run import TrainingRun
    from utils.tracking import tracking
    from utils.training.step_guard import StepGuard
    from utils.training.stopping import StopRequest
    from utils.training.throughput import Throughput

    clocks = Clocks()
    for owner, name, part in (
        (training_utils, "forward_loss", f"{MODEL}: forward"),
        (Accelerator, "backward", f"{MODEL}: backward"),
        (AcceleratedOptimizer, "step", f"{MODEL}: update"),
        (AcceleratedOptimizer, "zero_grad", f"{MODEL}: gradients freed"),
        (BatchLoader, "_wait", f"{OURS}: wait for the batch"),
        (StopRequest, "is_agreed", f"{OURS}: stop agreed on"),
        (Accelerator, "reduce", f"{OURS}: loss over ranks"),
        (Accelerator, "clip_grad_norm_", f"{OURS}: norm and clip"),
        (StepGuard, "judge", f"{OURS}: step judged"),
        (StepGuard, "take", f"{OURS}: verdict read"),
        (LambdaLR, "step", f"{OURS}: schedule"),
        (tracking.Notes, "write", f"{OURS}: notes"),
        (RunMetrics, "show_live", f"{OURS}: live line"),
        (Throughput, "step", f"{OURS}: speed"),
        (TrainingRun, "log_metrics", f"{OURS}: metrics, every {LOGGING_STEPS} steps"),
        (TrainingRun, "train_step", f"{OURS}: rest of the step"),
    ):
        clocks.wrap(owner, name, part)
    step = TrainingRun.train_step

    def counted(self: TrainingRun, batches: list[Any]) -> int:
        clocks.end_step()
        return step(self, batches)

    TrainingRun.train_step = counted  # type: ignore[method-assign]
    settings = {
        "data_uri": task["data"],
        "checkpoint_uri": "bucket",
        "sequence_length": 64,
        "global_batch_size": 1,
        "logging_steps": LOGGING_STEPS,
        "save_steps": 10 * STEPS,
        "eval_steps": None,
        "max_eval_samples": 1,
        "sample_tokens": 0,
    }
    words = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    os.chdir(task["folder"])
    code = train.main(["--config", "test", "--quiet", "--max-steps", str(STEPS), *words])
    if code:
        raise SystemExit(code)
    return summarize(clocks.steps[WARM_STEPS:])


def summarize(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the median microseconds of each part, and what all of ours take together."""
    medians = {
        part: statistics.median(step[part] * 1e6 for step in steps if part in step)
        for part in sorted({part for step in steps for part in step})
    }
    added = [
        1e6 * (step["whole step"] - sum(v for k, v in step.items() if k.startswith(MODEL)))
        for step in steps
    ]
    return {**medians, "all of ours in a step, mean": statistics.fmean(added)}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
