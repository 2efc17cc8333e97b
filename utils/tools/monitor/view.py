"""What the monitor shows: a look at a run as rows for a terminal, and as one line.

    RunStatus -> rows, each with its style and its importance -> those that fit, or all of them

Rows wrap at words; a terminal that is too low loses the least important ones. Values come from
files that may be foreign: they pass `printable`. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from utils.base.machine import Gpu, MachineLoad
from utils.base.text import (
    ABSENT,
    cell_width,
    format_bytes,
    format_duration,
    printable,
    wrap_command,
    wrap_words,
)
from utils.checkpoints.layout import CHECKPOINT_PREFIX
from utils.costs.costs import describe_costs
from utils.tools.monitor.state import RunState
from utils.tools.monitor.status import CheckpointStatus, RunStatus
from utils.tracking.text_plots import (
    format_figure,
    show_count,
    show_loss,
    show_rate,
    show_share,
    sparkline,
)

WIDTH = 80
SPARK_WIDTH = 32
BAR_WIDTH = 30
MAX_GPU_ROWS = 2
STATE_STYLES = {
    RunState.RUNNING: "green",
    RunState.FINISHED: "green",
    RunState.STALLED: "red",
    RunState.CRASHED: "red",
    RunState.FAILED: "red",
    RunState.STOPPED: "yellow",
    RunState.UNKNOWN: "yellow",
}
SEVERE_WARNINGS = ("stalled", "crashed", "failed", "not_finite", "upload_failed", "disk_low")


@dataclass(frozen=True)
class ViewRow:
    """One row of the view, in a style of `rich`; importance 0 is dropped last in a low terminal."""

    text: str
    style: str = ""
    importance: int = 2
    is_command: bool = False


def fit_rows(rows: Sequence[ViewRow], height: int) -> list[ViewRow]:
    """Return the rows that fit, in their order; the least important last ones go first."""
    kept = list(enumerate(rows))
    kept.sort(key=lambda item: (item[1].importance, item[0]))
    return [rows[index] for index in sorted(index for index, _ in kept[:height])]


def show_milliseconds(status: RunStatus) -> str:
    """Return the time of a step."""
    seconds = status.metrics.step_seconds
    return ABSENT if seconds is None else show_count(seconds * 1000)


def show_steps(status: RunStatus) -> str:
    """Return the step, of how many, and the share."""
    text = f"{show_count(status.step)} / {show_count(status.max_steps)}"
    return text if not status.max_steps else f"{text} ({_share_done(status):.1%})"


def _share_done(status: RunStatus) -> float:
    return min(1.0, max(0, status.step or 0) / status.max_steps) if status.max_steps else 0.0


def show_uploads(status: RunStatus) -> str:
    """Return how many checkpoints are in which upload state."""
    counts = (f"{count} {state}" for state, count in sorted(status.uploads.items()))
    return ", ".join(counts) or "none"


def one_line(status: RunStatus) -> str:
    """Return a look on one line."""
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    worries = [f"warning: {warning.message}" for warning in status.warnings]
    worries += [printable(problem) for problem in status.problems]
    if status.step is None:
        return "  ".join([f"{now} {status.state.value}: {printable(status.detail)}", *worries])
    metrics = status.metrics
    cells = [
        f"{now} {status.state.value}",
        f"step {show_steps(status)}",
        f"loss {show_loss(metrics.loss)}",
        f"ppl {format_figure(metrics.perplexity, ',.2f')}",
        f"val {show_loss(metrics.validation_loss)}",
        f"lr {show_rate(metrics.learning_rate)}",
        f"{show_count(metrics.tokens_per_second)} tokens/s",
        f"{show_milliseconds(status)} ms/step",
        *([] if metrics.mfu is None else [f"MFU {show_share(metrics.mfu)}"]),
        f"data wait {show_share(metrics.data_wait_share)}",
        f"ETA {format_duration(status.eta_seconds)}",
        f"uploads: {show_uploads(status)}",
        *worries,
    ]
    return "  ".join(cells)


def build_rows(
    status: RunStatus,
    encoding: str | None,
    *,
    width: int | None = None,
    notes: Sequence[str] = (),
    hint: str = "",
) -> list[ViewRow]:
    """Return a look as rows, for an output of this encoding and width; without one they are long.

    `notes` is what went wrong with the monitor itself, `hint` stands beside the title.
    """
    blank, now = ViewRow("", importance=8), datetime.now().astimezone()
    rows = [
        ViewRow(f"Training Monitor  {now:%Y-%m-%d %H:%M:%S %Z}  {hint}".rstrip(), "bold", 3),
        *_run_rows(status, encoding, width),
        blank,
        *_checkpoint_rows(status, width),
        blank,
        *_machine_rows(status),
        *_warning_rows(status, notes),
    ]
    if width is None:
        return rows
    return [
        replace(row, text=line)
        for row in rows
        for line in (
            wrap_command(row.text, width) if row.is_command else wrap_words(row.text, width, 4)
        )
    ]


def _run_rows(status: RunStatus, encoding: str | None, width: int | None) -> list[ViewRow]:
    """Return state, progress, losses, speed and costs."""
    style = STATE_STYLES.get(status.state, "")
    rows = [ViewRow(f"State: {status.state.value} ({printable(status.detail)})", style, 0)]
    if status.go_on:
        rows.append(ViewRow("Go on with:", importance=0))
        rows.append(ViewRow(printable(status.go_on, 2000), importance=0, is_command=True))
    if status.step is None:
        return rows
    metrics, curve = status.metrics, status.loss_curve
    silent = ABSENT
    if status.silent_seconds is not None:
        silent = f"{format_duration(status.silent_seconds)} ago"
    steps, eta = f"Step: {show_steps(status)}  ", f"  ETA: {format_duration(status.eta_seconds)}"
    bar = _progress_bar(status, (width or WIDTH) - len(steps + eta))
    mfu = "" if metrics.mfu is None else f"MFU: {show_share(metrics.mfu)}  "
    rows += [
        ViewRow(_describe_attempt(status), importance=4),
        ViewRow(f"{steps}{bar}{eta}", importance=0),
        ViewRow(
            f"Training Loss: {show_loss(metrics.loss)}  "
            f"Perplexity: {format_figure(metrics.perplexity, ',.2f')}  "
            f"Gradient Norm: {format_figure(metrics.grad_norm, '.3f')}",
            importance=0,
        ),
    ]
    if len(curve) > 1:
        bars = sparkline(curve, encoding, SPARK_WIDTH)
        ends = f"{format_figure(curve[0], '.3f')} to {format_figure(curve[-1], '.3f')}"
        rows.append(ViewRow(f"Loss Curve: {bars}  {ends}", importance=3))
    rows += [
        ViewRow(
            f"Validation Loss: {show_loss(metrics.validation_loss)}  "
            f"Perplexity: {format_figure(metrics.validation_perplexity, ',.2f')}  "
            f"Best: {show_loss(metrics.best_validation_loss)}",
            importance=1,
        ),
        ViewRow(
            f"Speed: {show_count(metrics.tokens_per_second)} tokens/s  "
            f"{show_milliseconds(status)} ms/step  {mfu}"
            f"Data Wait: {show_share(metrics.data_wait_share)}",
            importance=1,
        ),
        ViewRow(
            f"Last Record: {silent}  "
            f"Learning Rate: {show_rate(metrics.learning_rate)}  "
            f"Tokens Seen: {show_count(metrics.tokens_seen)}",
        ),
    ]
    if status.costs is not None:
        hint = " --hourly-price X shows dollars." if status.costs.dollars is None else ""
        rows.append(ViewRow(f"{describe_costs(status.costs)}{hint}", importance=3))
    return rows


def _describe_attempt(status: RunStatus) -> str:
    """Return which run it is and what it runs on."""
    start = status.start
    ranks, parameters = start.get("world_size", ABSENT), start.get("num_parameters")
    cells = [
        f"Run: {printable(start.get('run_id', ABSENT), 60)}",
        f"on {printable(start.get('device', ABSENT), 60)}",
        f"precision {printable(start.get('precision', ABSENT), 20)}",
        f"{printable(ranks, 20)} rank{'' if ranks == 1 else 's'}",
    ]
    if isinstance(parameters, int) and 0 < parameters < 2**63:
        cells.append(f"{parameters / 1e6:,.1f}M parameters")
    return ", ".join(cells)


def _progress_bar(status: RunStatus, room: int) -> str:
    """Return a bar in brackets, shorter where there is less room."""
    length = max(4, min(BAR_WIDTH, room - 2))
    filled = round(_share_done(status) * length)
    return f"[{'#' * filled}{'.' * (length - filled)}]"


def _checkpoint_rows(status: RunStatus, width: int | None) -> list[ViewRow]:
    """Return the newest checkpoints, the very newest last, with their upload states.

    Where there is no room for a line, their names lose what all have in common.
    """
    rows = [ViewRow(f"Checkpoints:  (uploads: {show_uploads(status)})", "bold", 1)]
    if not status.checkpoints:
        return [*rows, ViewRow("  none yet", importance=5)]
    longest = max(len(checkpoint.name) for checkpoint in status.checkpoints)
    texts = [_checkpoint_text(f"{one.name:<{longest}}", one) for one in status.checkpoints]
    if max(map(cell_width, texts)) > (width or math.inf):
        texts = [text.replace(CHECKPOINT_PREFIX, "", 1) for text in texts]
    for age, text in zip(reversed(range(len(texts))), texts, strict=True):
        rows.append(ViewRow(text, importance=1 if not age else min(7, 3 + age)))
    return rows


def _checkpoint_text(name: str, checkpoint: CheckpointStatus) -> str:
    upload = checkpoint.upload or "not uploaded"
    if checkpoint.upload_progress:
        upload = f"{upload} {printable(checkpoint.upload_progress['text'])}".rstrip()
    loss = format_figure(checkpoint.validation_loss, ".4f")
    troubles = (checkpoint.upload_error, checkpoint.problem)
    shown = [f"({printable(trouble, 120)})" for trouble in troubles if trouble]
    return "  ".join([f"  {name}", upload, f"Val: {loss}", *shown])


def _machine_rows(status: RunStatus) -> list[ViewRow]:
    """Return the load of GPUs, CPU, memory and disk."""
    machine = status.machine
    memory = machine.memory_used_bytes / max(1, machine.memory_total_bytes)
    disk = f"Disk Free: {format_bytes(machine.disk_free_bytes)}"
    if machine.disk_total_bytes is not None:
        disk += f" of {format_bytes(machine.disk_total_bytes)}"
    if status.disk_seconds_left is not None:
        disk += f" ({format_duration(status.disk_seconds_left)} left)"
    rows = _gpu_rows(machine)
    if machine.gpu_note:
        rows.append(ViewRow(f"GPU: {printable(machine.gpu_note)}", importance=6))
    processor = (
        f"CPU: {machine.cpu_percent:.0f}%  Memory: {format_bytes(machine.memory_used_bytes)} "
        f"of {format_bytes(machine.memory_total_bytes)} ({memory:.0%})"
    )
    return [*rows, ViewRow(processor), ViewRow(disk)]


def _gpu_rows(machine: MachineLoad) -> list[ViewRow]:
    """Return a row for each GPU; of many, a row that sums them up stays longest."""
    if len(machine.gpus) <= MAX_GPU_ROWS:
        return [ViewRow(_gpu_text(gpu), importance=1) for gpu in machine.gpus]
    rows = [ViewRow(_gpu_text(gpu), importance=7) for gpu in machine.gpus]
    return [ViewRow(_describe_gpus(machine.gpus), importance=1), *rows]


def _gpu_text(gpu: Gpu) -> str:
    return (
        f"GPU {gpu.index}: {format_figure(gpu.utilization_percent, '.0f')}%  "
        f"{format_bytes(gpu.memory_used_bytes)} of {format_bytes(gpu.memory_total_bytes)}  "
        f"{format_figure(gpu.temperature_celsius, '.0f')} C  "
        f"{format_figure(gpu.power_watts, '.0f')} W  {printable(gpu.name, 80)}"
    )


def _describe_gpus(gpus: Sequence[Gpu]) -> str:
    """Return the load of several GPUs: range of use, fullest memory, highest heat, all power."""
    use = [gpu.utilization_percent for gpu in gpus if gpu.utilization_percent is not None]
    memory = [gpu.memory_used_bytes for gpu in gpus if gpu.memory_used_bytes is not None]
    heat = [gpu.temperature_celsius for gpu in gpus if gpu.temperature_celsius is not None]
    power = [gpu.power_watts for gpu in gpus if gpu.power_watts is not None]
    share = f"{min(use):.0f} to {max(use):.0f}%" if use else ABSENT
    return (
        f"{len(gpus)} GPUs: {share}  up to {format_bytes(max(memory, default=None))}  "
        f"{format_figure(max(heat, default=None), '.0f')} C  "
        f"{format_figure(sum(power) if power else None, ',.0f')} W"
    )


def _warning_rows(status: RunStatus, notes: Sequence[str]) -> list[ViewRow]:
    rows = []
    for warning in status.warnings:
        style = "red" if warning.kind in SEVERE_WARNINGS else "yellow"
        rows.append(ViewRow(f"! {warning.message}. Do: {warning.advice}", style, 1))
    for problem in (*status.problems, *notes):
        rows.append(ViewRow(f"! {printable(problem)}", "yellow", 3))
    return [ViewRow("", importance=8), ViewRow("Warnings:", "bold", 3), *rows] if rows else []
