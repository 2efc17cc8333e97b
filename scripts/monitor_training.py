"""Watch a run: its state, progress, speed, checkpoints, uploads and machine.

    logs/metrics.jsonl, journal, checkpoints/ -> a live view, plain lines in a pipe, or --json

Reads only, so it may be started, stopped and run twice at any time, before, during and after a
run. A terminal gets a view that is renewed in place, a pipe a line each time. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.training_config import TrainingConfig, get_training_config  # noqa: E402
from utils.console import format_bytes, format_duration, get_console, run_command  # noqa: E402
from utils.costs import describe_costs_so_far, parse_hourly_price  # noqa: E402
from utils.layout import RunPaths  # noqa: E402
from utils.machine import Gpu, Machine  # noqa: E402
from utils.metadata import printable, to_json_text  # noqa: E402
from utils.run_status import CheckpointStatus, RunStatus, RunWatcher  # noqa: E402

DEFAULT_REFRESH_SECONDS = 2.0
TAIL_LINES = 20
TAIL_BYTES = 64 * 2**10
BAR_WIDTH = 30
ABSENT = "-"
SPARKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
ASCII_SPARKS = "_.-=*#"


def main(argv: Sequence[str] | None = None) -> int:
    """Watch a run and return the exit code."""
    return run_command(run_monitor, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Watch a training run; changes nothing.")
    parser.add_argument(
        "--refresh",
        type=_positive_seconds,
        default=DEFAULT_REFRESH_SECONDS,
        metavar="S",
        help="seconds between two looks (default: 2)",
    )
    parser.add_argument("--once", action="store_true", help="look once and exit")
    parser.add_argument("--logs-only", action="store_true", help="show and follow train.log only")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a look")
    parser.add_argument("--config", default="test", help="name or .json file (default: test)")
    parser.add_argument("--output-dir", help="directory of the checkpoints (default: the config's)")
    parser.add_argument("--logging-dir", help="directory of the logs (default: the config's)")
    parser.add_argument("--run-name", help="folder of the run (default: the config's)")
    parser.add_argument(
        "--hourly-price",
        type=parse_hourly_price,
        metavar="X",
        help="dollars an hour, for the time whose price the run did not know",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _positive_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 86400, got {text}")
    return seconds


def run_monitor(args: argparse.Namespace) -> None:
    """Show the run once, or until Ctrl-C."""
    paths = RunPaths.of(load_config(args))
    try:
        if args.logs_only:
            follow_log(LogTail(paths.train_log), args)
        elif args.once:
            status = RunWatcher(paths, args.hourly_price).look()
            print(status_json(status, indent=2) if args.json else "\n".join(full_view(status)))
        elif args.json or not sys.stdout.isatty():
            repeat_lines(RunWatcher(paths, args.hourly_price), args)
        else:
            show_live(RunWatcher(paths, args.hourly_price), args.refresh)
    except KeyboardInterrupt:
        return  # the usual way to end it


def load_config(args: argparse.Namespace) -> TrainingConfig:
    """Return the configuration that the options name."""
    keys = ("output_dir", "logging_dir", "run_name")
    overrides = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    return get_training_config(args.config, overrides)


def repeat_lines(watcher: RunWatcher, args: argparse.Namespace) -> None:
    """Print a line, or a JSON object, at each look."""
    while True:
        status = watcher.look()
        print(status_json(status) if args.json else one_line(status), flush=True)
        time.sleep(args.refresh)


def show_live(watcher: RunWatcher, refresh_seconds: float) -> None:
    """Renew the whole view in place; the last one stays on the screen."""
    from rich.live import Live
    from rich.text import Text

    # Redirected, standard output would no longer tell its encoding.
    with Live(console=get_console(), auto_refresh=False, redirect_stdout=False) as live:
        while True:
            text = Text("\n".join(full_view(watcher.look())), no_wrap=True, overflow="ellipsis")
            live.update(text, refresh=True)
            time.sleep(refresh_seconds)


def status_json(status: RunStatus, *, indent: int | None = None) -> str:
    """Return a look as JSON."""
    return to_json_text(asdict(status), indent=indent)


class LogTail:
    """Reads the end of a log file, then what is appended to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._file_number: int | None = None

    def read_new(self) -> list[str]:
        """Return the whole lines since the last call; at first the last ones of the file."""
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                is_first = self._file_number is None
                if facts.st_ino != self._file_number or facts.st_size < self._offset:
                    self._file_number, self._offset = facts.st_ino, 0
                begin = max(self._offset, facts.st_size - TAIL_BYTES) if is_first else self._offset
                file.seek(begin)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        self._offset = begin + whole
        lines = data[:whole].decode("utf-8", "replace").split("\n")[:-1]
        return [
            printable(line, limit=2000) for line in (lines[-TAIL_LINES:] if is_first else lines)
        ]


def follow_log(log: LogTail, args: argparse.Namespace) -> None:
    """Print the end of the log, then each new line."""
    lines = log.read_new()
    if not lines and not args.json:
        print(f"No log lines in {printable(log.path)} yet.", flush=True)
    while True:
        for line in lines:
            print(to_json_text({"line": line}, indent=None) if args.json else line, flush=True)
        if args.once:
            return
        time.sleep(args.refresh)
        lines = log.read_new()


def show_figure(value: float | None, form: str) -> str:
    """Return a number in a format, `-` for None."""
    return ABSENT if value is None else format(value, form)


def show_milliseconds(status: RunStatus) -> str:
    """Return the time of a step."""
    seconds = status.metrics.step_seconds
    return ABSENT if seconds is None else f"{seconds * 1000:,.0f}"


def show_eta(status: RunStatus) -> str:
    """Return the time to the end of the run."""
    return ABSENT if status.eta_seconds is None else format_duration(status.eta_seconds)


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
    if status.step is None:
        return f"{now} {status.state.value}: {printable(status.detail)}"
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
        f"data wait {show_figure(metrics.data_wait_share, '.1%')}",
        f"ETA {show_eta(status)}",
        f"uploads: {show_uploads(status)}",
        *(printable(problem) for problem in status.problems),
    ]
    return "  ".join(cells)


def full_view(status: RunStatus) -> list[str]:
    """Return a look as lines for a terminal of 80 columns and 24 lines."""
    lines = [
        f"Training Monitor  {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}",
        "=" * 60,
        *run_lines(status),
        "",
        "Checkpoints:",
        "-" * 30,
        *checkpoint_lines(status),
        "",
        "Machine:",
        "-" * 30,
        *machine_lines(status.machine),
    ]
    if status.problems:
        lines += ["", "Problems:", *(f"  {printable(problem)}" for problem in status.problems)]
    return lines


def run_lines(status: RunStatus) -> list[str]:
    """Return state, progress, losses and speed."""
    lines = [f"State: {status.state.value} ({printable(status.detail)})"]
    if status.step is None:
        return lines
    metrics = status.metrics
    silent = ABSENT if status.silent_seconds is None else format_duration(status.silent_seconds)
    best = show_figure(metrics.best_validation_loss, ".6f")
    lines += [
        describe_start(status.start),
        f"Step: {show_steps(status)}  {progress_bar(status)}  ETA: {show_eta(status)}",
        f"Loss: {show_figure(metrics.loss, '.6f')}  "
        f"Perplexity: {show_figure(metrics.perplexity, ',.2f')}  "
        f"Gradient Norm: {show_figure(metrics.grad_norm, '.3f')}",
        f"Validation Loss: {show_figure(metrics.validation_loss, '.6f')}  Best: {best}",
        f"Learning Rate: {show_figure(metrics.learning_rate, '.2e')}  "
        f"Tokens Seen: {show_figure(metrics.tokens_seen, ',.0f')}",
        f"Speed: {show_figure(metrics.tokens_per_second, ',.0f')} tokens/s  "
        f"{show_milliseconds(status)} ms/step  "
        f"Data Wait: {show_figure(metrics.data_wait_share, '.1%')}  Last Record: {silent} ago",
    ]
    if status.costs is not None:
        lines.append(f"Cost: {describe_costs_so_far(status.costs)}")
    if len(status.loss_curve) > 1:
        first, last = status.loss_curve[0], status.loss_curve[-1]
        lines.append(f"Loss Curve: {sparkline(status.loss_curve)}  {first:.3f} to {last:.3f}")
    return lines


def describe_start(start: dict[str, Any]) -> str:
    """Return which run it is and what it runs on."""
    ranks = start.get("world_size")
    parameters = start.get("num_parameters")
    cells = [
        f"Run: {printable(start.get('run_id', ABSENT))}",
        f"on {printable(start.get('device', ABSENT))}",
        f"precision {printable(start.get('precision', ABSENT))}",
        f"{printable(ABSENT if ranks is None else ranks)} rank{'' if ranks == 1 else 's'}",
    ]
    if isinstance(parameters, int):
        cells.append(f"{parameters:,} parameters")
    return ", ".join(cells)


def progress_bar(status: RunStatus) -> str:
    """Return the share of the steps as a bar."""
    share = min(1.0, (status.step or 0) / status.max_steps) if status.max_steps else 0.0
    filled = max(0, round(share * BAR_WIDTH))
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]"


def sparkline(values: Sequence[float]) -> str:
    """Return the values as a row of bars, lowest to highest."""
    bars = SPARKS
    try:
        bars.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        bars = ASCII_SPARKS
    low, high = min(values), max(values)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in values)


def checkpoint_lines(status: RunStatus) -> list[str]:
    """Return the newest checkpoints with their upload states."""
    if not status.checkpoints:
        return ["  none yet"]
    lines = [checkpoint_line(checkpoint) for checkpoint in status.checkpoints]
    return [*lines, f"  Uploads: {show_uploads(status)}"]


def checkpoint_line(checkpoint: CheckpointStatus) -> str:
    """Return one checkpoint's line."""
    cells = [
        f"  {checkpoint.name:<36}",
        f"Val: {show_figure(checkpoint.validation_loss, '.4f')}",
        f"Upload: {checkpoint.upload or ABSENT}",
    ]
    for trouble in (checkpoint.upload_error, checkpoint.problem):
        if trouble:
            cells.append(f"({printable(trouble, limit=120)})")
    return "  ".join(cells)


def machine_lines(machine: Machine) -> list[str]:
    """Return the load of CPU, memory, disk and GPUs."""
    memory = machine.memory_used_bytes / machine.memory_total_bytes
    lines = [
        f"CPU: {machine.cpu_percent:.0f}%  "
        f"Memory: {format_bytes(machine.memory_used_bytes)} of "
        f"{format_bytes(machine.memory_total_bytes)} ({memory:.0%})  "
        f"Disk Free: {format_bytes(machine.disk_free_bytes)} of "
        f"{format_bytes(machine.disk_total_bytes)}",
        *(gpu_line(gpu) for gpu in machine.gpus),
    ]
    return [*lines, f"GPU: {printable(machine.gpu_note)}"] if machine.gpu_note else lines


def gpu_line(gpu: Gpu) -> str:
    """Return the load of one GPU."""
    return (
        f"GPU {gpu.index}: {printable(gpu.name)}  "
        f"{show_figure(gpu.utilization_percent, '.0f')}%  "
        f"{format_bytes(gpu.memory_used_bytes)} of {format_bytes(gpu.memory_total_bytes)}  "
        f"{show_figure(gpu.temperature_celsius, '.0f')} C  "
        f"{show_figure(gpu.power_watts, '.0f')} W"
    )


if __name__ == "__main__":
    sys.exit(main())
