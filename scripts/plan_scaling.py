"""What training a preset takes on many GPUs: memory, time, traffic, money, by formula.

    plan_scaling.py --model pythia-6.9b --gpus 64                  every strategy on 64 H100
    plan_scaling.py --model pythia-12b --gpus 8 64 512 --gpu A100 --strategy fsdp hsdp
    plan_scaling.py --gpus 64 --price 3.50                         dollars, too

Nothing is measured: docs/SCALING.md has the formulas. `train.py --dry-run` measures a step on the
machine at hand: the MFU of one GPU, as a share, is the --efficiency to give.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from utils.base.console import add_output_arguments, new_parser, run_command
from utils.base.errors import UsageError
from utils.base.tables import Column, print_table
from utils.base.text import format_bytes, format_duration, to_json_text
from utils.costs.gpu_types import GPU_TYPES, find_gpu_type
from utils.costs.scaling import (
    CHECKPOINTING,
    STRATEGIES,
    TrainingJob,
    best_plan,
    fits,
    plan_step,
    sent_bytes,
    shape_of_preset,
)
from utils.models.estimates import estimate_checkpoint_bytes

MAX_GPUS = 2**20
TOKENS_PER_PARAMETER = 20  # near the optimum of Hoffmann et al. 2022 (Chinchilla)
COLUMNS = (
    Column("strategy"),
    Column("GPUs", kind="number"),
    Column("memory", 2, "number"),
    Column("micro-batch", 6, "number"),
    Column("checkpointing", 3),
    Column("step", 8, "number"),
    Column("MFU %", 7, "number"),
    Column("waits %", 10, "number"),
    Column("GB sent", 11, "number"),
    Column("days", 4, "number"),
    Column("GPU hours", 9, "number"),
    Column("$", 5, "number"),
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = new_parser("plan_scaling.py", __doc__)
    add = parser.add_argument
    add("--model", default="refocused-1.2b", metavar="PRESET", help="(default: %(default)s)")
    add("--gpus", type=int, nargs="+", default=[8], metavar="N", help="(default: 8)")
    add("--gpu", default="H100", metavar="NAME", help=f"{', '.join(GPU_TYPES)} (default: H100)")
    add(
        "--strategy",
        nargs="+",
        choices=STRATEGIES,
        default=list(STRATEGIES),
        metavar="S",
        help=f"{', '.join(STRATEGIES)} (default: all)",
    )
    add("--global-batch", type=int, default=1024, metavar="N", help="samples in a step (1024)")
    add("--sequence-length", type=int, default=2048, metavar="N", help="tokens in a sample (2048)")
    add("--micro-batch", type=int, metavar="N", help="of a GPU (default: the fastest that fits)")
    add("--checkpointing", choices=CHECKPOINTING, help="of activations (default: the fastest)")
    add("--tokens", type=float, metavar="N", help="of the run (default: 20 a parameter)")
    add("--efficiency", type=float, metavar="X", help="share of the peak in compute, 0 to 1")
    add("--price", type=float, metavar="X", help="dollars for an hour of one GPU")
    add_output_arguments(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Print a plan for each number of GPUs and each strategy."""
    gpu = find_gpu_type(args.gpu)
    _require_usable(args)
    shape = shape_of_preset(args.model)
    if args.tokens is None:
        args.tokens = float(TOKENS_PER_PARAMETER * shape.parameters)
    batch = (args.global_batch, args.sequence_length)
    records = [
        _describe(args, TrainingJob(shape, gpu, gpus, strategy, *batch))
        for gpus in args.gpus
        for strategy in args.strategy
    ]
    checkpoint = estimate_checkpoint_bytes(shape.parameters)
    if args.json:
        facts = {"parameters": shape.parameters, "tokens": args.tokens}
        facts["checkpoint_bytes"] = checkpoint
        values = {"model": args.model, "gpu": dataclasses.asdict(gpu)}
        print(to_json_text({**values, "run": facts, "plans": records}))
        return 0
    print_table(
        f"{args.model} on {gpu.name}, {args.global_batch} samples of {args.sequence_length} tokens "
        "in a step (estimates)",
        [_row(record) for record in records],
        [column for column in COLUMNS if column.name != "$" or args.price is not None],
    )
    print(f"\nTokens: {args.tokens / 1e9:.1f} B. Checkpoint: {format_bytes(checkpoint)}.")
    return 0


def _require_usable(args: argparse.Namespace) -> None:
    """Refuse what is no share, price, or number of GPUs, samples or tokens."""
    for name, low in (("efficiency", 0.0), ("price", -1e-9), ("tokens", 0)):
        value = getattr(args, name)
        if value is not None and not low < value < 1e18:
            raise UsageError(f"--{name} must be above 0, got {value}.")
    if args.efficiency is not None and args.efficiency > 1:
        raise UsageError(f"--efficiency is a share of the peak, 0 to 1, got {args.efficiency}.")
    for gpus in args.gpus:
        if not 1 <= gpus <= MAX_GPUS:
            raise UsageError(f"--gpus must be 1 to {MAX_GPUS}, got {gpus}.")
        if args.global_batch < 1 or args.global_batch % gpus:
            raise UsageError(
                f"--global-batch {args.global_batch} cannot be shared by {gpus} GPUs evenly."
            )
        share = args.global_batch // gpus
        if args.micro_batch is not None and (args.micro_batch < 1 or share % args.micro_batch):
            raise UsageError(
                f"--micro-batch {args.micro_batch} does not divide the {share} samples of a GPU."
            )
    if not 1 <= args.sequence_length <= 2**24:
        raise UsageError(f"--sequence-length must be 1 to {2**24}, got {args.sequence_length}.")


def _describe(args: argparse.Namespace, job: TrainingJob) -> dict[str, Any]:
    """Return one plan as a record."""
    record: dict[str, Any] = {"gpus": job.gpus, "strategy": job.strategy}
    if args.micro_batch or args.checkpointing:
        plan = plan_step(job, args.micro_batch or 1, args.checkpointing or "none", args.efficiency)
    else:  # where none fits, the plan that needs the least memory
        plan = best_plan(job, args.efficiency) or plan_step(job, 1, "full", args.efficiency)
    if not fits(job, plan.memory):
        return {**record, "fits": False, "memory_bytes": plan.memory.total}
    seconds = args.tokens / plan.tokens_per_second
    gpu_hours = seconds / 3600 * job.gpus
    return {
        **record,
        "fits": True,
        "memory_bytes": plan.memory.total,
        "sent_bytes": sent_bytes(job, plan.accumulation),
        "run_seconds": seconds,
        "gpu_hours": gpu_hours,
        "dollars": None if args.price is None else gpu_hours * args.price,
        **{key: value for key, value in dataclasses.asdict(plan).items() if key != "memory"},
    }


def _row(record: dict[str, Any]) -> dict[str, str]:
    """Return a plan as a row of the table."""
    row = {
        "strategy": record["strategy"],
        "GPUs": str(record["gpus"]),
        "memory": format_bytes(record["memory_bytes"]),
    }
    if not record["fits"]:
        return {
            **dict.fromkeys((column.name for column in COLUMNS), "-"),
            **row,
            "checkpointing": "does not fit",
        }
    return {
        **row,
        "micro-batch": f"{record['micro_batch']} x {record['accumulation']}",
        "checkpointing": record["checkpointing"],
        "step": format_duration(record["step_seconds"]),
        "MFU %": f"{100 * record['mfu']:.0f}",
        "waits %": f"{100 * record['exposed_share']:.0f}",
        "GB sent": f"{record['sent_bytes'] / 1e9:.1f}",
        "days": f"{record['run_seconds'] / 86400:.1f}",
        "GPU hours": f"{record['gpu_hours']:,.0f}",
        "$": f"{record['dollars'] or 0:,.0f}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
