"""Measure this project against named peers in the same run, interleaved.

    checkpoint  how long a save holds training; peers: Accelerator.save_state, torch's async_save
    data        a warm cache (peer: np.memmap), a cold bucket (peer: the download), a far start
    forecast    expected against real time of a run, before it begins and after 20 steps
    loop        what train.py adds around the model in a step, by part
    loss        the loss without the logits of all tokens; peers: with them, torch's own
    memory      the peak of real steps against the estimate, by preset and micro-batch
    monitor     the monitor beside a run of 100,000 logged lines; peer: the interpreter's own start
    prepare     tokenizing, two tasks at once, host memory; peers: tokenizers' own batches
    profile     where the time of a step goes, by operator, and the share of matrix products
    recipe      configs/speedrun.json, loss by tokens and seconds; peer: transformers.Trainer, tuned
    recipe-20m  the same with a model of 20M parameters
    startup     from `python train.py` to the end of the first step; peer: a script alike
    train       tokens a second with everything on; peers: transformers.Trainer, a plain loop
    upload      1 GB of state by each transport; peer: `tar czf` and `gsutil cp` to the same server
    variants    what compilation, padding, recomputing, the loss and float8 are worth, one by one
    viewer      1,000 checkpoints of 10,000 logged points; peer: the interpreter's own start

Each figure is a median of interleaved runs with its spread; ratios compare runs side by side, so
that a machine that slows down slows both. `--json` prints everything.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from benchmarks.data import measure_data
from benchmarks.figures import RUNS, describe_machine
from benchmarks.forecast import measure_forecast
from benchmarks.loop_parts import measure_loop
from benchmarks.loss import measure_loss
from benchmarks.memory import measure_memory
from benchmarks.monitor import measure_monitor
from benchmarks.preparing import measure_prepare
from benchmarks.profiling import measure_profile
from benchmarks.recipe import measure_recipe, measure_recipe_20m
from benchmarks.saving import measure_checkpoint
from benchmarks.startup import measure_startup
from benchmarks.training import measure_train
from benchmarks.upload import measure_upload
from benchmarks.variants import measure_variants
from benchmarks.viewer import measure_viewer
from utils.base.console import add_output_arguments, new_parser, run_command
from utils.base.errors import UsageError


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = new_parser("benchmark.py", __doc__)
    parser.add_argument(
        "parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--runs", type=int, default=RUNS, help="interleaved runs (default: 7)")
    add_output_arguments(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Measure the parts; print them."""
    results: dict[str, Any] = {"machine": describe_machine()}
    for part in args.parts:
        if part not in PARTS:
            raise UsageError(f"{part!r} is no part of the benchmark: {', '.join(PARTS)}.")
        # A part may set variables, such as those of a bucket's server: they are its own.
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
            results[part] = PARTS[part](Path(folder), args.runs)
    if args.json:
        print(json.dumps(results, indent=1))
        return 0
    print(f"machine: {results.pop('machine')}")
    for part, figures in results.items():
        print(f"\n{part}")
        for name, figure in figures.items():
            print(f"  {name:<44} {figure}")
    return 0


PARTS: dict[str, Callable[[Path, int], dict[str, str]]] = {
    "checkpoint": measure_checkpoint,
    "data": measure_data,
    "forecast": measure_forecast,
    "loop": measure_loop,
    "loss": measure_loss,
    "memory": measure_memory,
    "monitor": measure_monitor,
    "prepare": measure_prepare,
    "profile": measure_profile,
    "recipe": measure_recipe,
    "recipe-20m": measure_recipe_20m,
    "startup": measure_startup,
    "train": measure_train,
    "upload": measure_upload,
    "variants": measure_variants,
    "viewer": measure_viewer,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
