"""Look at checkpoints: list, view, compare, plot; on this machine or in the bucket.

    metadata.json, training_metrics.json, manifest, journal -> text or --json

Reads only; neither torch nor transformers is loaded. NAME is a checkpoint's name, a step number,
`latest` or `best`. A checkpoint that cannot be read is listed with what is wrong with it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.training_config import TrainingConfig, get_training_config  # noqa: E402
from utils.checkpoint_report import (  # noqa: E402
    check_files,
    config_differences,
    data_position,
    loss_statistics,
    numbers,
    read_curves,
    read_part,
    section,
    summarize_all,
)
from utils.console import format_bytes, run_command  # noqa: E402
from utils.errors import CheckpointError, UsageError  # noqa: E402
from utils.journal import Journal  # noqa: E402
from utils.layout import (  # noqa: E402
    DATA_STATE_FILE,
    MANIFEST_FILE,
    RunPaths,
    parse_checkpoint_name,
    validate_run_name,
)
from utils.metadata import (  # noqa: E402
    HISTORY_LIMIT,
    CheckpointView,
    number,
    printable,
    read_local_checkpoints,
    read_remote_checkpoints,
    select_checkpoint,
    to_json_text,
)
from utils.plots import draw_training_curves  # noqa: E402
from utils.storage import join_uri, open_bucket  # noqa: E402

REMOTE_RETRY_SECONDS = 15.0
ABSENT = "-"
TREND_SIGNS = {"improving": "\u2193", "worsening": "\u2191", "flat": "\u2192"}


@dataclass(frozen=True)
class Found:
    """The checkpoints of one run.

    Attributes:
        where: Directory or bucket they lie in.
        views: The checkpoints, by step.
        notes: What is there besides and could not be read.
    """

    where: str
    views: list[CheckpointView]
    notes: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int | None] = args.command
    return run_command(command, args)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", default="test", help="name or .json file (default: test)")
    common.add_argument("--output-dir", help="directory of the checkpoints (default: the config's)")
    common.add_argument("--run-name", help="folder of the run (default: the config's)")
    common.add_argument("--remote", action="store_true", help="read from the bucket instead")
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    parser = argparse.ArgumentParser(description="Look at checkpoints without loading them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    names = "checkpoint name, step number, latest or best"
    add("list", run_list, "list all checkpoints")
    add("view", run_view, "show one checkpoint").add_argument("name", metavar="NAME", help=names)
    add("compare", run_compare, "show checkpoints side by side (default: the two newest)")
    commands.choices["compare"].add_argument("names", metavar="NAME", nargs="*", help=names)
    plot = add("plot", run_plot, "draw loss, validation loss and learning rate into a file")
    plot.add_argument("name", metavar="NAME", help=names)
    plot.add_argument("--save", type=Path, metavar="F", help="picture (default: ./<name>.png)")
    return parser


def run_list(args: argparse.Namespace) -> None:
    """List all checkpoints."""
    found = find_all(args)
    rows = summarize_all(found.views)
    if args.json:
        print(to_json_text({"where": found.where, "checkpoints": rows, "notes": found.notes}))
        return
    where = printable(found.where)
    if not rows:
        print(f"No checkpoints in {where}.")
        if not args.remote:
            print("python train.py --config test makes some; --output-dir looks elsewhere.")
    else:
        plural = "" if len(rows) == 1 else "s"
        print(f"Found {len(rows)} checkpoint{plural} in {where} (times in UTC):")
        print("=" * 78)
    for index, row in enumerate(rows, start=1):
        print(f"{index:2d}. {list_line(row)}")
        if row["problem"]:
            print(f"      Problem: {printable(row['problem'])}")
    for note in found.notes:
        print(f"Note: {printable(note)}")


def list_line(row: Mapping[str, Any]) -> str:
    """Return a checkpoint's line in the list, in the form of the user's example."""
    marks = [mark for mark in ("latest", "best") if row[f"is_{mark}"]]
    cells = [
        f"{row['name']:<38}",
        f"Step: {row['step']:<6}",
        f"Loss: {show_loss(row['current_loss']):<10}",
        f"Val: {show_loss(row['validation_loss']):<10}",
        f"Time: {show_time(row['timestamp']):<19}",
        f"Upload: {row['upload']['state'] if row['upload'] else ABSENT}",
    ]
    return " ".join(cells) + (f" ({', '.join(marks)})" if marks else "")


def run_view(args: argparse.Namespace) -> None:
    """Show one checkpoint."""
    found = find_all(args)
    view = select_checkpoint(args.name, found.views)
    row = next(row for row in summarize_all(found.views) if row["name"] == str(view.name))
    files, problems = check_files(view)
    data_state, data_problem = read_part(view, DATA_STATE_FILE)
    problems += [problem for problem in (view.problem, data_problem) if problem]
    if args.json:
        details = {
            "loss_statistics": loss_statistics(view.metadata),
            "metadata": view.metadata,
            "data_position": data_position(data_state),
            "files": files,
            "problems": problems,
        }
        print(to_json_text({**row, **details}))
        return
    print(f"Checkpoint Summary: {view.name}")
    print("=" * 60)
    sections = {
        "": state_lines(view),
        "Training Metrics": training_lines(view.metadata),
        "Validation Metrics": plain_lines(section(view.metadata, "validation_metrics"), "  "),
        "Progress": progress_lines(view.metadata),
        "Data Position": plain_lines(data_position(data_state), "  "),
        "Run": run_lines(row, view),
        "Upload": upload_lines(row, found.where if args.remote else ""),
        "Files": file_lines(files),
        "Problems": [f"  {printable(problem)}" for problem in problems],
    }
    for title, lines in sections.items():
        print_section(title, lines)


def run_compare(args: argparse.Namespace) -> None:
    """Show checkpoints side by side."""
    found = find_all(args)
    names = args.names or [str(view.name) for view in found.views[-2:]]
    if len(names) < 2:
        where = "named" if args.names else f"in {printable(found.where)}"
        raise UsageError(f"compare needs at least two checkpoints, {len(names)} {where}.")
    chosen = [select_checkpoint(name, found.views) for name in names]
    by_name = {row["name"]: row for row in summarize_all(found.views)}
    rows = [by_name[str(view.name)] for view in chosen]
    differences, notes = config_differences(chosen)
    if args.json:
        values = {"checkpoints": rows, "config_differences": differences, "notes": notes}
        print(to_json_text(values))
        return
    print(f"Comparing {len(rows)} checkpoints:")
    for index, row in enumerate(rows, start=1):
        print(f"  [{index}] {row['name']}")
    print("=" * 60)
    print_table(compare_table(rows))
    print_section("Configuration Differences", difference_lines(differences, notes))
    problems = [f"  {row['name']}: {printable(row['problem'])}" for row in rows if row["problem"]]
    print_section("Problems", problems)


def run_plot(args: argparse.Namespace) -> None:
    """Draw the curves of one checkpoint into a file."""
    view = select_checkpoint(args.name, find_all(args).views)
    curves, problem = read_curves(view)
    path = draw_training_curves(curves, args.save or Path(f"{view.name}.png"))
    if args.json:
        points = {
            "loss_points": curves.loss.num_points,
            "validation_points": curves.validation.num_points,
            "learning_rate_points": curves.learning_rate.num_points,
        }
        values = {"checkpoint": str(view.name), "saved": str(path), **points, "problem": problem}
        print(to_json_text(values))
        return
    if problem:
        print(f"Note: {printable(problem)}; drawn from metadata.json (last {HISTORY_LIMIT} only).")
    print(f"Plot saved to {printable(path)}")


def load_config(args: argparse.Namespace) -> TrainingConfig:
    """Return the configuration that the options name."""
    given = {"output_dir": args.output_dir, "run_name": args.run_name}
    overrides = {key: value for key, value in given.items() if value is not None}
    return get_training_config(args.config, overrides)


def find_all(args: argparse.Namespace) -> Found:
    """Return the checkpoints that the options point at."""
    config = load_config(args)
    if args.remote:
        return find_remote(config)
    directory = RunPaths.of(config).checkpoints
    notes: list[str] = []
    try:
        uploads = Journal(directory / "uploads.jsonl").latest()
    except (OSError, RecursionError) as exc:
        uploads = {}
        notes.append(f"upload states are unknown, the journal cannot be read: {exc}")
    try:
        views = read_local_checkpoints(directory, uploads)
        notes += incomplete_notes(directory)
    except OSError as exc:
        raise CheckpointError(f"{directory} cannot be read: {exc.strerror or exc}.") from exc
    return Found(str(directory), views, notes)


def find_remote(config: TrainingConfig) -> Found:
    """Return the checkpoints of the run's bucket, from the cards beside the archives."""
    if not config.checkpoint_uri:
        raise UsageError("--remote: this configuration has no checkpoint_uri.")
    uri = join_uri(config.checkpoint_uri, validate_run_name(config.run_name))
    bucket = open_bucket(uri, config.gcs_user_project or None, REMOTE_RETRY_SECONDS)
    try:
        return Found(uri, read_remote_checkpoints(bucket))
    finally:
        bucket.close()


def incomplete_notes(directory: Path) -> list[str]:
    """Name the directories that look like checkpoints and were never committed."""
    if not directory.is_dir():
        return []
    return [
        f"{entry.name} is not listed: it has no {MANIFEST_FILE}, so it is incomplete."
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name)
        if parse_checkpoint_name(entry.name) and not Path(entry, MANIFEST_FILE).exists()
    ]


def show_loss(value: float | None) -> str:
    """Return a loss with six decimals."""
    return ABSENT if value is None else f"{value:.6f}"


def show_rate(value: float | None) -> str:
    """Return a learning rate."""
    return ABSENT if value is None else f"{value:.2e}"


def show_count(value: float | None) -> str:
    """Return a count with separators."""
    return ABSENT if value is None else f"{value:,.0f}"


def show_text(value: object) -> str:
    """Return any value on one line."""
    return ABSENT if value is None else printable(value)


def show_time(timestamp: object) -> str:
    """Return an ISO 8601 time in UTC to the second; without a zone it is shown as it is."""
    text = printable(timestamp or ABSENT)
    try:
        # Python 3.10 does not read the suffix Z.
        moment = datetime.fromisoformat(text.removesuffix("Z") + "+00:00" * text.endswith("Z"))
        if moment.tzinfo is not None:
            moment = moment.astimezone(timezone.utc)
        return moment.strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError):
        return text[:19]


def show_value(value: object) -> str:
    """Return a value of an open-ended list, losses with six decimals."""
    if isinstance(value, float):
        return f"{value:.6f}"
    return show_text(value if not isinstance(value, (dict, list)) else json.dumps(value))


def plain_lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return a line for each key."""
    return [f"{indent}{printable(key)}: {show_value(value)}" for key, value in values.items()]


def state_lines(view: CheckpointView) -> list[str]:
    """Return the head of the user's example."""
    metadata, system = view.metadata, section(view.metadata, "system_info")
    progress = section(metadata, "training_progress")
    return [
        f"Timestamp: {show_text(metadata.get('timestamp'))}",
        f"Step: {show_text(metadata.get('step', view.name.step))}",
        f"Epoch: {show_text(metadata.get('epoch', view.name.epoch))}",
        f"Files Processed: {show_text(progress.get('files_processed', view.name.files))}",
        f"CUDA Available: {show_text(system.get('cuda_available'))}",
        f"GPU Count: {show_text(system.get('device_count'))}",
        f"Mixed Precision: {show_text(system.get('mixed_precision'))}",
    ]


def training_lines(metadata: Mapping[str, Any]) -> list[str]:
    """Return the training metrics of the user's example."""
    statistics = loss_statistics(metadata)
    rates = numbers(metadata.get("learning_rates"))
    kept = f" (the last {HISTORY_LIMIT} are kept here)"
    return [
        f"Current Loss: {show_loss(number(metadata.get('current_loss')))}",
        f"Best Loss: {show_loss(number(metadata.get('best_loss')))}",
        f"Loss History Length: {statistics['length']}"
        + (kept if statistics["length"] >= HISTORY_LIMIT else ""),
        f"Average Loss: {show_loss(statistics['average'])}",
        f"Loss Std Dev: {show_loss(statistics['standard_deviation'])}",
        f"Loss Trend: {show_trend(statistics['trend'])}",
        f"Current LR: {show_rate(rates[-1] if rates else None)}",
        f"LR History Length: {len(rates)}" + (kept if len(rates) >= HISTORY_LIMIT else ""),
    ]


def show_trend(trend: str) -> str:
    """Return a trend with its arrow, where the terminal's encoding has arrows."""
    sign = TREND_SIGNS.get(trend, "")
    try:
        sign.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        sign = ""
    return f"{sign} {trend}".strip()


def progress_lines(metadata: Mapping[str, Any]) -> list[str]:
    """Return what the run has done so far."""
    progress = section(metadata, "training_progress")
    labels = {
        "max_steps": "Max Steps",
        "tokens_seen": "Tokens Seen",
        "samples_seen": "Samples Seen",
        "global_batch_size": "Global Batch Size",
        "tokens_per_second": "Tokens/s",
    }
    return [f"{label}: {show_count(number(progress.get(key)))}" for key, label in labels.items()]


def run_lines(row: Mapping[str, Any], view: CheckpointView) -> list[str]:
    """Return which run, code and machine wrote the checkpoint."""
    system = section(view.metadata, "system_info")
    versions = ("python", "torch", "transformers", "accelerate")
    return [
        f"Run ID: {show_text(row['run_id'])}",
        f"Branch: {view.manifest.branch if view.manifest else ABSENT}",
        f"Git Commit: {show_text(row['git_commit'])}",
        f"Parameters: {show_count(row['num_parameters'])}",
        f"Device: {show_text(system.get('device'))}",
        f"World Size: {show_text(system.get('world_size'))}",
        "Versions: " + ", ".join(f"{name} {show_text(system.get(name))}" for name in versions),
    ]


def upload_lines(row: Mapping[str, Any], bucket_uri: str) -> list[str]:
    """Return where the checkpoint is on its way to the bucket."""
    upload = row["upload"]
    if bucket_uri:
        lines = [f"Bucket: {printable(bucket_uri)}"]
        size = row["archive_bytes"]
        return [*lines, f"Archive: {'missing' if size is None else format_bytes(size)}"]
    if upload is None:
        return ["State: nothing in the journal"]
    head = f"State: {upload['state']} ({show_time(upload['time'])} UTC)"
    return [head, *plain_lines(upload["details"], "  ")]


def file_lines(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the files with their sizes and the sum."""
    if not files:
        return ["  unknown: the manifest cannot be read"]
    width = max(len(file["name"]) for file in files)
    lines = [
        f"  {printable(file['name']):<{width}}  {format_bytes(file['size_bytes']):>10}"
        for file in files
    ]
    total = sum(file["size_bytes"] for file in files)
    return [*lines, f"  {'total':<{width}}  {format_bytes(total):>10}"]


def print_section(title: str, lines: Sequence[str]) -> None:
    """Print lines below a heading; nothing where there are none."""
    if not lines:
        return
    if title:
        print(f"\n{title}:")
        print("-" * 30)
    for line in lines:
        print(line)


Formatter = Callable[[Any], str]
COMPARED: tuple[tuple[str, str, Formatter], ...] = (
    ("Step", "step", show_count),
    ("Epoch", "epoch", show_count),
    ("Files Processed", "files_processed", show_count),
    ("Time (UTC)", "timestamp", show_time),
    ("Loss", "current_loss", show_loss),
    ("Best Loss", "best_loss", show_loss),
    ("Validation Loss", "validation_loss", show_loss),
    ("Validation Perplexity", "validation_perplexity", show_loss),
    ("Best Validation Loss", "best_validation_loss", show_loss),
    ("Learning Rate", "learning_rate", show_rate),
    ("Tokens Seen", "tokens_seen", show_count),
    ("Tokens/s", "tokens_per_second", show_count),
    ("Parameters", "num_parameters", show_count),
    ("Size", "size_bytes", format_bytes),
    ("Run ID", "run_id", show_text),
    ("Git Commit", "git_commit", lambda commit: show_text(commit)[:12]),
)


def compare_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of `compare`: a line for each figure, its change from first to last."""
    head = ["", *(f"[{index}]" for index in range(1, len(rows) + 1)), "change"]
    table = [head]
    for label, key, show in COMPARED:
        values = [row[key] for row in rows]
        change = ABSENT
        first, last = number(values[0]), number(values[-1])
        if first is not None and last is not None:
            change = ("+" if last > first else "") + show(last - first)
        table.append([label, *(show(value) for value in values), change])
    states = [row["upload"]["state"] if row["upload"] else ABSENT for row in rows]
    return [*table, ["Upload", *states, ABSENT]]


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([f"{row[0]:<{widths[0]}}", *cells]))


def difference_lines(differences: Mapping[str, Sequence[Any]], notes: Sequence[str]) -> list[str]:
    """Return the lines below `Configuration Differences`."""
    if notes:
        return [f"  unknown: {printable(note)}" for note in notes]
    if not differences:
        return ["  none"]
    return [
        f"  {printable(key)}: " + " | ".join(show_text(json.dumps(value)) for value in values)
        for key, values in differences.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
