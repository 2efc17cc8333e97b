"""What the monitor shows: a look at a run as rows for a terminal, and as one line.

    RunStatus -> rows of (text, style), each with its importance -> what fits, or all of them

Rows are short enough for 80 columns where their values are; on a terminal that is too low the least
important ones are left out. Values come from files that may be foreign: they pass `printable`.
No torch here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from utils.base.machine import Gpu, MachineLoad
from utils.base.text import ABSENT, format_bytes, printable
from utils.checkpoints.layout import CHECKPOINT_PREFIX
from utils.costs.costs import describe_costs_so_far
from utils.tools.monitor.live_screen import Line
from utils.tools.monitor.state import RunState
from utils.tools.monitor.status import CheckpointStatus, RunStatus
from utils.tools.monitor.warnings import DAY_SECONDS
from utils.tracking.text_plots import sparkline

WIDTH = 80
SPARK_WIDTH = 32
MIN_BAR_WIDTH = 10
MAX_BAR_WIDTH = 40
MAX_GPU_ROWS = 2
MAX_WARNING_ROWS = 3
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
    """One row of the view.

    Attributes:
        text: What it says.
        style: A key of the screen's styles, or an empty string.
        importance: 0 stays longest when there is no room.
    """

    text: str
    style: str = ""
    importance: int = 2


def fit_rows(rows: Sequence[ViewRow], height: int | None) -> list[Line]:
    """Return the rows that fit, in their order; the least important last ones go first."""
    kept = list(enumerate(rows))
    if height is not None and len(kept) > height:
        kept.sort(key=lambda item: (item[1].importance, item[0]))
        kept = sorted(kept[:height])
    return [(row.text, row.style) for _, row in kept]


def show_figure(value: float | None, form: str) -> str:
    """Return a number in a format, shorter where that would be very long, `-` for None."""
    if value is None:
        return ABSENT
    return format(value, form if abs(value) < 1e15 or value != value else ".3e")


def show_seconds(seconds: float | None) -> str:
    """Return a duration as `3d04h`, `1h02m`, `3m20s` or `4s`, `-` for None."""
    if seconds is None:
        return ABSENT
    minutes, rest = divmod(int(seconds), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}m{rest:02d}s"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h" if days > 1 else f"{24 * days + hours}h{minutes:02d}m"


def show_milliseconds(status: RunStatus) -> str:
    """Return the time of a step."""
    seconds = status.metrics.step_seconds
    return ABSENT if seconds is None else show_figure(seconds * 1000, ",.0f")


def show_steps(status: RunStatus) -> str:
    """Return the step, of how many, and the share."""
    text = f"{show_figure(status.step, ',')} / {show_figure(status.max_steps, ',')}"
    if status.step is None or not status.max_steps:
        return text
    return f"{text} ({status.step / status.max_steps:.1%})"


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
        f"loss {show_figure(metrics.loss, '.6f')}",
        f"ppl {show_figure(metrics.perplexity, ',.2f')}",
        f"val {show_figure(metrics.validation_loss, '.6f')}",
        f"lr {show_figure(metrics.learning_rate, '.2e')}",
        f"{show_figure(metrics.tokens_per_second, ',.0f')} tokens/s",
        f"{show_milliseconds(status)} ms/step",
        *([] if metrics.mfu is None else [f"MFU {show_figure(metrics.mfu, '.1%')}"]),
        f"data wait {show_figure(metrics.data_wait_share, '.1%')}",
        f"ETA {show_seconds(status.eta_seconds)}",
        f"uploads: {show_uploads(status)}",
        *worries,
    ]
    return "  ".join(cells)


def build_rows(
    status: RunStatus,
    encoding: str | None,
    *,
    width: int = WIDTH,
    notes: Sequence[str] = (),
    hint: str = "",
) -> list[ViewRow]:
    """Return a look as rows.

    Args:
        status: The look.
        encoding: Encoding of the output.
        width: Columns of the output.
        notes: What the monitor has to say of itself.
        hint: Shown beside the title.
    """
    blank, now = ViewRow("", importance=8), datetime.now().astimezone()
    return [
        ViewRow(f"Training Monitor  {now:%Y-%m-%d %H:%M:%S %Z}  {hint}".rstrip(), "bold", 3),
        *run_rows(status, encoding, width),
        blank,
        *checkpoint_rows(status, width),
        blank,
        *machine_rows(status),
        *_warning_rows(status, width, notes),
    ]


def run_rows(status: RunStatus, encoding: str | None, width: int = WIDTH) -> list[ViewRow]:
    """Return state, progress, losses and speed."""
    style = STATE_STYLES.get(status.state, "")
    rows = [ViewRow(f"State: {status.state.value} ({printable(status.detail)})", style, 0)]
    if status.step is None:
        return rows
    metrics = status.metrics
    steps = f"Step: {show_steps(status)}  "
    eta = f"  ETA: {show_seconds(status.eta_seconds)}"
    silent = (
        ABSENT if status.silent_seconds is None else f"{show_seconds(status.silent_seconds)} ago"
    )
    mfu = "" if metrics.mfu is None else f"MFU: {show_figure(metrics.mfu, '.1%')}  "
    return [
        *rows,
        ViewRow(describe_start(status), importance=4),
        ViewRow(f"{steps}{progress_bar(status, width - len(steps) - len(eta) - 2)}{eta}", "", 0),
        ViewRow(
            f"Loss: {show_figure(metrics.loss, '.6f')}  "
            f"Perplexity: {show_figure(metrics.perplexity, ',.2f')}  "
            f"Gradient Norm: {show_figure(metrics.grad_norm, '.3f')}",
            importance=0,
        ),
        *_curve_rows(status, encoding),
        ViewRow(
            f"Validation Loss: {show_figure(metrics.validation_loss, '.6f')}  "
            f"Best: {show_figure(metrics.best_validation_loss, '.6f')}",
            importance=1,
        ),
        ViewRow(
            f"Speed: {show_figure(metrics.tokens_per_second, ',.0f')} tokens/s  "
            f"{show_milliseconds(status)} ms/step  {mfu}"
            f"Data Wait: {show_figure(metrics.data_wait_share, '.1%')}",
            importance=1,
        ),
        ViewRow(
            f"Last Record: {silent}  Learning Rate: {show_figure(metrics.learning_rate, '.2e')}  "
            f"Tokens Seen: {show_figure(metrics.tokens_seen, ',.0f')}",
            importance=2,
        ),
        *_cost_rows(status),
    ]


def _cost_rows(status: RunStatus) -> list[ViewRow]:
    if status.costs is None:
        return []
    return [ViewRow(f"Cost: {describe_costs_so_far(status.costs)}", importance=3)]


def _curve_rows(status: RunStatus, encoding: str | None) -> list[ViewRow]:
    curve = status.loss_curve
    if len(curve) < 2:
        return []
    bars = sparkline(curve, encoding, SPARK_WIDTH)
    first, last = (show_figure(value, ".3f") for value in (curve[0], curve[-1]))
    return [ViewRow(f"Loss Curve: {bars}  {first} to {last}", importance=3)]


def describe_start(status: RunStatus) -> str:
    """Return which run it is and what it runs on."""
    start = status.start
    ranks, parameters = start.get("world_size"), start.get("num_parameters")
    cells = [
        f"Run: {printable(start.get('run_id', ABSENT), 60)}",
        f"on {printable(start.get('device', ABSENT), 60)}",
        f"precision {printable(start.get('precision', ABSENT), 20)}",
        f"{printable(ABSENT if ranks is None else ranks, 20)} rank{'' if ranks == 1 else 's'}",
    ]
    if isinstance(parameters, int) and 0 < parameters < 2**63:
        cells.append(f"{parameters / 1e6:,.1f}M parameters")
    return ", ".join(cells)


def progress_bar(status: RunStatus, width: int) -> str:
    """Return the share of the steps as a bar."""
    width = min(MAX_BAR_WIDTH, max(MIN_BAR_WIDTH, width))
    share = min(1.0, (status.step or 0) / status.max_steps) if status.max_steps else 0.0
    filled = max(0, round(share * width))
    return f"[{'#' * filled}{'.' * (width - filled)}]"


def checkpoint_rows(status: RunStatus, width: int = WIDTH) -> list[ViewRow]:
    """Return the newest checkpoints, the very newest last, with their upload states."""
    heading = ViewRow(f"Checkpoints:  (uploads: {show_uploads(status)})", "bold", 1)
    if not status.checkpoints:
        return [heading, ViewRow("  none yet", importance=5)]
    prefix = "" if width >= WIDTH else CHECKPOINT_PREFIX  # what all names begin with
    names = [checkpoint.name.removeprefix(prefix) for checkpoint in status.checkpoints]
    texts = [
        checkpoint_text(f"{name:<{max(map(len, names))}}", checkpoint, width)
        for name, checkpoint in zip(names, status.checkpoints, strict=True)
    ]
    rows = [
        ViewRow(text, importance=1 if not age else min(7, 3 + age))
        for age, text in enumerate(reversed(texts))
    ]
    return [heading, *reversed(rows)]


def checkpoint_text(name: str, checkpoint: CheckpointStatus, width: int = WIDTH) -> str:
    """Return one checkpoint's row."""
    begin = (
        f"  {name}  Val: {show_figure(checkpoint.validation_loss, '.4f')}  "
        f"{checkpoint.upload or 'not uploaded'}"
    )
    progress = checkpoint.upload_progress
    if progress:
        percent, eta = progress["percent"], progress["eta_seconds"]
        cells = [printable(progress["text"])]  # with the rate
        if len(begin) + 1 + len(cells[0]) > width:
            cells = [] if percent is None else [f"{percent:.0f}%"]
            cells += [] if eta is None or eta < 0 else [f"{show_seconds(eta)} left"]
        begin = f"{begin} {', '.join(cells)}"
    troubles = [checkpoint.upload_error, checkpoint.problem]
    return "  ".join([begin, *(f"({printable(text, 120)})" for text in troubles if text)])


def machine_rows(status: RunStatus) -> list[ViewRow]:
    """Return the load of GPUs, CPU, memory and disk."""
    machine = status.machine
    memory = machine.memory_used_bytes / max(1, machine.memory_total_bytes)
    disk = f"Disk Free: {format_bytes(machine.disk_free_bytes)}"
    if machine.disk_total_bytes is not None:
        disk += f" of {format_bytes(machine.disk_total_bytes)}"
    if status.disk_seconds_left is not None:
        days = status.disk_seconds_left / DAY_SECONDS
        disk += f" ({show_figure(days, '.1f' if days < 10 else '.0f')} days left)"
    rows = _gpu_rows(machine)
    if machine.gpu_note:
        rows.append(ViewRow(f"GPU: {printable(machine.gpu_note)}", importance=6))
    rows.append(
        ViewRow(
            f"CPU: {machine.cpu_percent:.0f}%  Memory: {format_bytes(machine.memory_used_bytes)} "
            f"of {format_bytes(machine.memory_total_bytes)} ({memory:.0%})",
            importance=2,
        )
    )
    return [*rows, ViewRow(disk, importance=2)]


def _gpu_rows(machine: MachineLoad) -> list[ViewRow]:
    """Return a row for each GPU; of many, a row that sums them up stays longest."""
    if len(machine.gpus) <= MAX_GPU_ROWS:
        return [ViewRow(gpu_text(gpu), importance=1) for gpu in machine.gpus]
    rows = [ViewRow(gpu_text(gpu), importance=7) for gpu in machine.gpus]
    return [ViewRow(describe_gpus(machine.gpus), importance=1), *rows]


def gpu_text(gpu: Gpu) -> str:
    """Return the load of one GPU."""
    return (
        f"GPU {gpu.index}: {show_figure(gpu.utilization_percent, '.0f')}%  "
        f"{format_bytes(gpu.memory_used_bytes)} of {format_bytes(gpu.memory_total_bytes)}  "
        f"{show_figure(gpu.temperature_celsius, '.0f')} C  "
        f"{show_figure(gpu.power_watts, '.0f')} W  {printable(gpu.name, 80)}"
    )


def describe_gpus(gpus: Sequence[Gpu]) -> str:
    """Return the load of several GPUs: range of use, fullest memory, highest heat, all power."""
    use = [gpu.utilization_percent for gpu in gpus if gpu.utilization_percent is not None]
    memory = [gpu.memory_used_bytes for gpu in gpus if gpu.memory_used_bytes is not None]
    heat = [gpu.temperature_celsius for gpu in gpus if gpu.temperature_celsius is not None]
    power = [gpu.power_watts for gpu in gpus if gpu.power_watts is not None]
    share = f"{min(use):.0f} to {max(use):.0f}%" if use else ABSENT
    return (
        f"{len(gpus)} GPUs: {share}  "
        f"up to {format_bytes(max(memory, default=None))}  "
        f"{show_figure(max(heat, default=None), '.0f')} C  "
        f"{show_figure(sum(power) if power else None, ',.0f')} W"
    )


def _warning_rows(status: RunStatus, width: int, notes: Sequence[str]) -> list[ViewRow]:
    rows = []
    for warning in status.warnings:
        style = "red" if warning.kind in SEVERE_WARNINGS else "yellow"
        text = f"{warning.message}. Do: {warning.advice}"
        rows += _wrap(text, width, style, importance=1)
    for problem in status.problems:
        rows += _wrap(printable(problem), width, "yellow", importance=3)
    for note in notes:
        rows += _wrap(printable(note), width, "yellow", importance=3)
    return [ViewRow("", importance=8), ViewRow("Warnings:", "bold", 3), *rows] if rows else []


def _wrap(text: str, width: int, style: str, importance: int) -> list[ViewRow]:
    lines = textwrap.wrap(
        text,
        max(20, width),
        initial_indent="! ",
        subsequent_indent="  ",
        max_lines=MAX_WARNING_ROWS,
        placeholder=" ...",
        break_on_hyphens=False,
    )
    return [ViewRow(line, style, importance) for line in lines]
