"""The tables of docs/SCALING.md, as the simulator makes them.

    presets, GPUs, strategies -> utils/costs/scaling.py -> rows of text -> markdown between markers

A table is a function that returns its rows, the header first. `write_tables` replaces what stands
between `<!-- table NAME -->` and `<!-- end NAME -->`; a test compares. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from utils.base.errors import UsageError
from utils.costs import scaling_run as run
from utils.costs.gpu_types import GIB, GPU_TYPES, GpuType
from utils.costs.scaling import (
    CHECKPOINTING,
    STRATEGIES,
    StepPlan,
    TrainingJob,
    best_plan,
    device_memory,
    fits,
    sent_bytes,
    shape_of_preset,
    smallest_memory,
)
from utils.models.estimates import estimate_checkpoint_bytes

MODELS = (
    "pythia-160m",
    "pythia-410m",
    "pythia-1b",
    "refocused-1.2b",
    "pythia-2.8b",
    "pythia-6.9b",
    "pythia-12b",
    "gpt-neox-20b",
)
COUNTS = (1, 8, 16, 64, 128, 512)
FEW_COUNTS = (8, 64, 512)
SEQUENCE_LENGTH = 2048
WAITING_TOO_LONG = 0.1
"""Share of a step that GPUs wait for each other, above which a strategy is said to stop."""

Table = list[list[str]]


def global_batch_of(model: str) -> int:
    """Return the samples of a step: 2^21 tokens as Pythia, 1536 samples for the model of 20B."""
    return 1536 if model == "gpt-neox-20b" else 1024


def job_of(model: str, gpu: GpuType, gpus: int, strategy: str) -> TrainingJob:
    """Return a job with the batch of the tables."""
    shape = shape_of_preset(model)
    return TrainingJob(shape, gpu, gpus, strategy, global_batch_of(model), SEQUENCE_LENGTH)


def best_strategy(model: str, gpu: GpuType, gpus: int) -> tuple[str, StepPlan] | None:
    """Return the fastest strategy, the simplest of equals; None where none fits."""
    found: tuple[str, StepPlan] | None = None
    for strategy in STRATEGIES:
        plan = best_plan(job_of(model, gpu, gpus, strategy))
        if plan and (found is None or plan.step_seconds < 0.99 * found[1].step_seconds):
            found = strategy, plan
    return found


def hardware_table() -> Table:
    """What is assumed of each GPU."""
    header = [
        "GPU",
        "memory GiB",
        "TB/s",
        "peak TFLOPS",
        "in a machine GB/s",
        "between machines GB/s",
        "GPUs a machine",
        "efficiency",
        "$/h",
        "price of",
    ]
    rows = [
        [
            gpu.name,
            f"{gpu.memory_bytes / GIB:.0f}",
            f"{gpu.memory_bytes_per_second / 1e12:.2f}",
            f"{gpu.peak_flops / 1e12:.0f}",
            f"{gpu.link_bytes_per_second / 1e9:.0f}",
            f"{gpu.network_bytes_per_second / 1e9:.0f}",
            str(gpu.gpus_per_machine),
            f"{gpu.efficiency:.2f}",
            f"{gpu.hourly_price:.2f}",
            gpu.price_source,
        ]
        for gpu in GPU_TYPES.values()
    ]
    return [header, *rows]


def models_table() -> Table:
    """What a model is, and what training it to 20 tokens a parameter means."""
    rows: Table = [
        [
            "model",
            "parameters",
            "layers x width",
            "GFLOPs/token",
            "state GiB",
            "tokens",
            "FLOPs of all",
            "expected loss",
            "batch, tokens",
            "critical batch, tokens",
            "overhead",
        ]
    ]
    for model in MODELS:
        job = job_of(model, GPU_TYPES["H100"], 1, "ddp")
        shape, batch = job.shape, job.global_batch * SEQUENCE_LENGTH
        tokens = run.TOKENS_PER_PARAMETER * shape.parameters
        loss = run.expected_loss(shape.parameters, tokens)
        critical = run.critical_batch_tokens(loss)
        rows.append(
            [
                model,
                f"{shape.parameters / 1e9:.2f} B",
                f"{shape.layers} x {shape.hidden}",
                f"{job.flops_per_token / 1e9:.1f}",
                f"{16 * shape.parameters / GIB:.1f}",
                f"{tokens / 1e9:.0f} B",
                f"{tokens * job.flops_per_token:.1e}",
                f"{loss:.2f}",
                f"{batch / 1e6:.1f} M",
                f"{critical / 1e6:.1f} M",
                f"{run.batch_overhead(batch, critical):.1f}x",
            ]
        )
    return rows


def state_table() -> Table:
    """State, gradients and gathered weights of one GPU, GiB."""
    columns = [
        ("ddp", 8),
        ("zero1", 8),
        ("zero1", 64),
        ("zero2", 8),
        ("zero2", 64),
        ("fsdp", 8),
        ("fsdp", 64),
        ("fsdp", 512),
        ("hsdp", 64),
    ]
    rows: Table = [["model", *(f"{strategy}, {gpus}" for strategy, gpus in columns)]]
    for model in MODELS:
        cells = []
        for strategy, gpus in columns:
            memory = device_memory(job_of(model, GPU_TYPES["H100"], gpus, strategy), 1, "full", 1)
            cells.append(f"{(memory.state + memory.gradients + memory.gathered) / GIB:.1f}")
        rows.append([model, *cells])
    return rows


def activations_table() -> Table:
    """Activations of one sample, GiB, by checkpointing, and what its loss takes."""
    rows: Table = [["model", *CHECKPOINTING, "loss"]]
    for model in MODELS:
        job = job_of(model, GPU_TYPES["H100"], 1, "ddp")
        found = [device_memory(job, 1, kind, 1) for kind in CHECKPOINTING]
        kept = [memory.activations for memory in found]
        rows.append([model, *(f"{value / GIB:.2f}" for value in (*kept, found[0].loss))])
    return rows


def fit_table() -> Table:
    """The smallest number of GPUs that holds a model: one sample, every layer checkpointed."""
    rows: Table = [["model", "GPU", "one GPU", *STRATEGIES]]
    for model in MODELS:
        for gpu in GPU_TYPES.values():
            alone = job_of(model, gpu, 1, "ddp")
            holds = "yes" if fits(alone, smallest_memory(alone)) else "-"
            counts = [_smallest_count(model, gpu, strategy) for strategy in STRATEGIES]
            rows.append([model, gpu.name, holds, *counts])
    return rows


def _smallest_count(model: str, gpu: GpuType, strategy: str) -> str:
    for gpus in COUNTS[1:]:
        job = job_of(model, gpu, gpus, strategy)
        if fits(job, smallest_memory(job)):
            return str(gpus)
    return "-"


def traffic_table() -> Table:
    """What one GPU sends in a step, GB, on 64 H100 (accumulation in brackets)."""
    rows: Table = [["model", *STRATEGIES]]
    for model in MODELS:
        cells = []
        for strategy in STRATEGIES:
            job = job_of(model, GPU_TYPES["H100"], 64, strategy)
            plan = best_plan(job)
            cells.append(
                f"{sent_bytes(job, plan.accumulation) / 1e9:.1f} (x{plan.accumulation})"
                if plan
                else "-"
            )
        rows.append([model, *cells])
    return rows


def mfu_table(name: str, counts: Sequence[int] = COUNTS) -> Table:
    """MFU in percent by model, number of GPUs and strategy, and the share that GPUs wait."""
    gpu = GPU_TYPES[name]
    rows: Table = [["model", "GPUs", *STRATEGIES, "best: micro-batch, checkpointing"]]
    for model in MODELS:
        for gpus in counts:
            best = best_strategy(model, gpu, gpus)
            cells = [_mfu_cell(job_of(model, gpu, gpus, strategy)) for strategy in STRATEGIES]
            chosen = "-"
            if best:
                chosen = f"{best[0]}: {best[1].micro_batch}, {best[1].checkpointing}"
            if gpus == 1:  # there is nothing to shard
                cells[1:] = [""] * (len(STRATEGIES) - 1)
            rows.append([model, str(gpus), *cells, chosen])
    return rows


def _mfu_cell(job: TrainingJob) -> str:
    plan = best_plan(job)
    return "-" if plan is None else f"{100 * plan.mfu:.0f} ({100 * max(0, plan.exposed_share):.0f})"


def stops_table() -> Table:
    """Where each strategy stops on H100: memory, waiting, or the batch."""
    gpu = GPU_TYPES["H100"]
    rows: Table = [["model", *STRATEGIES, "GPUs with one sample each at the critical batch"]]
    for model in MODELS:
        shape = shape_of_preset(model)
        tokens = run.TOKENS_PER_PARAMETER * shape.parameters
        critical = run.critical_batch_tokens(run.expected_loss(shape.parameters, tokens))
        cells = [_stop_of(model, gpu, strategy) for strategy in STRATEGIES]
        rows.append([model, *cells, str(int(critical / SEQUENCE_LENGTH))])
    return rows


def _stop_of(model: str, gpu: GpuType, strategy: str) -> str:
    plans = {gpus: best_plan(job_of(model, gpu, gpus, strategy)) for gpus in COUNTS}
    usable = {gpus: plan for gpus, plan in plans.items() if plan}
    if not usable:
        return "does not fit"
    begins = f"from {min(usable)}" if min(usable) > 1 else "from 1"
    for gpus, plan in usable.items():
        if plan.exposed_share > WAITING_TOO_LONG:
            return f"{begins}; waits at {gpus}"
    return f"{begins}; to {max(usable)}"


def time_table() -> Table:
    """Days and dollars to 20 tokens a parameter on H100, best strategy, no failures."""
    gpu = GPU_TYPES["H100"]
    rows: Table = [["model", *(f"on {gpus}" for gpus in COUNTS), "tokens/s on 64"]]
    for model in MODELS:
        tokens = run.TOKENS_PER_PARAMETER * shape_of_preset(model).parameters
        cells, speed = [], "-"
        for gpus in COUNTS:
            best = best_strategy(model, gpu, gpus)
            if best is None:
                cells.append("-")
                continue
            seconds = tokens / best[1].tokens_per_second
            dollars = seconds / 3600 * gpus * gpu.hourly_price
            cells.append(f"{format_time(seconds)}, {_dollars(dollars)}")
            if gpus == 64:
                speed = f"{best[1].tokens_per_second / 1e6:.2f} M"
        rows.append([model, *cells, speed])
    return rows


def bucket_table() -> Table:
    """What bucket, network and host memory sustain on 64 H100 in 8 machines."""
    gpu, gpus = GPU_TYPES["H100"], 64
    rows: Table = [
        [
            "model",
            "checkpoint GB",
            "upload from 1 machine",
            "from 8, sharded",
            "TB a day, saving hourly",
            "copy in host memory GB: 1 machine, 8",
            "tokens read MB/s: all, a machine",
            "shards for all",
        ]
    ]
    for model in MODELS:
        shape = shape_of_preset(model)
        best = best_strategy(model, gpu, gpus)
        size = estimate_checkpoint_bytes(shape.parameters)
        upload = size / run.UPLOAD_BYTES_PER_SECOND
        machines = gpus // gpu.gpus_per_machine
        read = best[1].tokens_per_second * run.TOKEN_BYTES / 1e6 if best else 0.0
        rows.append(
            [
                model,
                f"{size / 1e9:.0f}",
                format_time(upload),
                format_time(upload / machines),
                f"{24 * size / 1e12:.1f}",
                f"{size / 1e9:.0f}, {size / machines / 1e9:.0f}",
                f"{read:.1f}, {read / machines:.2f}",
                str(run.data_objects(run.TOKENS_PER_PARAMETER * shape.parameters)),
            ]
        )
    return rows


def failures_table() -> Table:
    """Time between failures, time between saves and what is lost, reserved and spot, H100."""
    gpu = GPU_TYPES["H100"]
    rows: Table = [
        [
            "model",
            "GPUs",
            "reserved: a failure in",
            "save every",
            "lost",
            "spot: a failure in",
            "save every",
            "lost",
        ]
    ]
    for model in MODELS:
        parameters = shape_of_preset(model).parameters
        for gpus in FEW_COUNTS:
            best = best_strategy(model, gpu, gpus)
            if best is None:
                continue
            machines = max(1, gpus // gpu.gpus_per_machine)
            sharded = best[0] not in ("ddp", "zero1")
            copying = gpus if sharded else 1
            row = [model, str(gpus)]
            for spot in (False, True):
                saving = run.plan_saving(
                    parameters,
                    run.pause_seconds(parameters, copying),
                    run.failure_seconds(gpus, machines, is_spot=spot),
                    machines if sharded else 1,
                )
                row += [
                    format_time(saving.failure_seconds),
                    format_time(saving.interval_seconds),
                    f"{100 * saving.lost_share:.1f}%",
                ]
            rows.append(row)
    return rows


def format_time(seconds: float) -> str:
    """Return minutes, hours or days with two digits that count."""
    value, unit = seconds / 60, "min"
    if seconds >= 86400:
        value, unit = seconds / 86400, "d"
    elif seconds >= 3600:
        value, unit = seconds / 3600, "h"
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def _dollars(dollars: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if dollars >= limit:
            return f"${dollars / limit:.1f}{unit}"
    return f"${dollars:.0f}"


TABLES: dict[str, Callable[[], Table]] = {
    "hardware": hardware_table,
    "models": models_table,
    "state": state_table,
    "activations": activations_table,
    "fit": fit_table,
    "traffic": traffic_table,
    "mfu-h100": lambda: mfu_table("H100"),
    "mfu-a100": lambda: mfu_table("A100", FEW_COUNTS),
    "mfu-l4": lambda: mfu_table("L4", (1, 8, 16, 64)),
    "stops": stops_table,
    "time": time_table,
    "bucket": bucket_table,
    "failures": failures_table,
}


def to_markdown(rows: Iterable[Sequence[str]]) -> str:
    """Return rows as a table of markdown, the header first."""
    header, *rest = rows
    lines = [header, ["---"] * len(header), *rest]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_tables(document: str, tables: Mapping[str, Callable[[], Table]] = TABLES) -> str:
    """Return the document with every table as the simulator makes it now.

    Raises:
        UsageError: A table has no place in the document.
    """
    for name, table in tables.items():
        place = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not place.search(document):
            raise UsageError(f"The document has no <!-- table {name} --> ... <!-- end {name} -->.")
        text = to_markdown(table())
        document = place.sub(lambda found, text=text: found[1] + text + found[2], document)  # type: ignore[misc]
    return document
