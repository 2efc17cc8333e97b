"""What the viewer prints: lines and cells from rows, views and reports.

    report.py, shelf.py, weight_drift.py -> text

Values come from files that may be foreign: every one passes `printable` or a number's format. No
torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from utils.base.text import (
    ABSENT,
    format_bytes,
    format_duration,
    number,
    parse_time,
    printable,
    to_json_text,
)
from utils.checkpoints.layout import CHECKPOINT_PREFIX
from utils.checkpoints.views import CheckpointView
from utils.costs.costs import format_dollars
from utils.tools.viewer.report import loss_statistics, numbers, section
from utils.tracking.metrics_log import HISTORY_LIMIT
from utils.tracking.text_plots import format_figure, is_encodable, sparkline

TREND_SIGNS = {"improving": "\u2193", "worsening": "\u2191", "flat": "\u2192"}
_CELL_CHARACTERS = 40
# The columns that a narrow terminal drops, in this order.
LEFT_OUT_FIRST = ("tokens", "size", "time (UTC)", "step", "kept", "age", "val")
RIGHT_ALIGNED = ("step", "loss", "val", "tokens", "size", "age")


# Values


show_loss = partial(format_figure, form=".6f")
show_rate = partial(format_figure, form=".2e")
show_count = partial(format_figure, form=",.0f")
show_share = partial(format_figure, form=".1%")


def show_size(value: object) -> str:
    """Return a size in binary units."""
    return format_bytes(number(value))


def show_text(value: object) -> str:
    """Return any value on one line."""
    return ABSENT if value is None else printable(value)


def show_time(timestamp: object) -> str:
    """Return an ISO 8601 time in UTC to the second; anything else is shown as it is."""
    moment = parse_time(timestamp)
    if moment is None:
        return printable(timestamp or ABSENT)[:19]
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def show_age(seconds: float | None) -> str:
    """Return an age in its largest unit, 0s where a clock went back."""
    if seconds is None:
        return ABSENT
    age = max(0.0, seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if age >= length:
            return f"{age / length:.0f}{unit}"
    return f"{age:.0f}s"


def show_value(value: object) -> str:
    """Return any value on one line, floats with six decimals."""
    if isinstance(value, float):
        return show_loss(value)
    if isinstance(value, (dict, list)):
        return printable(to_json_text(value, indent=None))
    return show_text(value)


def show_trend(trend: str, encoding: str | None) -> str:
    """Return a trend, with its arrow where the output can show it."""
    sign = TREND_SIGNS.get(trend, "")
    return f"{sign} {trend}".strip() if is_encodable(sign, encoding) else trend


# list


def list_line(row: Mapping[str, Any]) -> str:
    """Return a checkpoint's line in the list, in the form of the user's example."""
    cells = list_cells(row)
    columns = {
        "Step": ("step", 6),
        "Loss": ("loss", 10),
        "Val": ("val", 10),
        "Time": ("time (UTC)", 19),
        "Age": ("age", 4),
        "Tokens": ("tokens", 14),
        "Size": ("size", 10),
        "Upload": ("state", 0),
    }
    parts = [f"{label}: {cells[key]:<{width}}" for label, (key, width) in columns.items()]
    marks = _marks(row)
    parts += [f"({', '.join(marks)})"] if marks else []
    parts += [f"Kept: {cells['kept']}"] if row["kept"] else []
    return " ".join([f"{row['name']:<38}", *parts])


def _marks(row: Mapping[str, Any]) -> list[str]:
    return [mark for mark in ("latest", "best") if row[f"is_{mark}"]]


def list_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a checkpoint's cells in the table of `list`, by column."""
    notes = [*_marks(row), *(["damaged"] if row["problem"] else [])]
    return {
        "checkpoint": row["name"],
        "step": str(row["step"]),
        "loss": show_loss(row["current_loss"]),
        "val": show_loss(row["validation_loss"]),
        "tokens": show_count(row["tokens_seen"]),
        "size": show_size(row["size_bytes"]),
        "time (UTC)": show_time(row["timestamp"]),
        "age": show_age(row["age_seconds"]),
        "state": row["state"],
        "kept": printable(row["kept"] or ABSENT, _CELL_CHARACTERS),
        "note": ", ".join(notes),
    }


def fit_columns(
    rows: Sequence[Mapping[str, str]], width: int
) -> tuple[list[dict[str, str]], list[str]]:
    """Return (rows that fit a width, the columns that were dropped for it).

    Names lose the prefix that all of them share before a column is dropped.
    """
    fitting = [dict(row) for row in rows]
    left_out: list[str] = []
    for column in ("checkpoint", *LEFT_OUT_FIRST):
        if not fitting or _table_width(fitting) <= width:
            break
        if column == "checkpoint":
            for row in fitting:
                row[column] = row[column].removeprefix(CHECKPOINT_PREFIX)
        else:
            left_out.append(column)
            fitting = [{key: row[key] for key in row if key != column} for row in fitting]
    return fitting, left_out


def _table_width(rows: Sequence[Mapping[str, str]]) -> int:
    return 1 + sum(3 + max(len(key), *(len(row[key]) for row in rows)) for key in rows[0])


# view


def plain_lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return a line for each key."""
    return [f"{indent}{printable(key)}: {show_value(value)}" for key, value in values.items()]


def config_lines(config: Mapping[str, Any]) -> list[str]:
    """Return every key of a configuration with its value as it was written."""
    texts = {key: to_json_text(config[key], indent=None) for key in sorted(config)}
    return [f"  {printable(key)}: {printable(text)}" for key, text in texts.items()]


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


def training_lines(metadata: Mapping[str, Any], encoding: str | None) -> list[str]:
    """Return the training metrics of the user's example, with the curve of the kept losses."""
    statistics = loss_statistics(metadata)
    losses, rates = numbers(metadata.get("loss_history")), numbers(metadata.get("learning_rates"))
    kept = f" (the last {HISTORY_LIMIT} are kept here)"
    lines = [
        f"Current Loss: {show_loss(number(metadata.get('current_loss')))}",
        f"Best Loss: {show_loss(number(metadata.get('best_loss')))}",
        f"Loss History Length: {statistics['length']}"
        + (kept if statistics["length"] >= HISTORY_LIMIT else ""),
        f"Average Loss: {show_loss(statistics['average'])}",
        f"Loss Std Dev: {show_loss(statistics['standard_deviation'])}",
        f"Loss Trend: {show_trend(statistics['trend'], encoding)}",
    ]
    if losses:
        ends = f"{show_loss(losses[0])} to {show_loss(losses[-1])}"
        lines.append(f"Loss Curve: {sparkline(losses, encoding)} {ends}")
    return [
        *lines,
        f"Current LR: {show_rate(rates[-1] if rates else None)}",
        f"LR History Length: {len(rates)}" + (kept if len(rates) >= HISTORY_LIMIT else ""),
    ]


def progress_lines(metadata: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """Return the progress of the run and its speed."""
    progress = section(metadata, "training_progress")
    labels = {
        "max_steps": "Max Steps",
        "tokens_seen": "Tokens Seen",
        "samples_seen": "Samples Seen",
        "global_batch_size": "Global Batch Size",
    }
    return [
        *(f"{label}: {show_count(number(progress.get(key)))}" for key, label in labels.items()),
        f"Tokens/s: {show_count(row['tokens_per_second'])}",
        f"MFU: {show_share(row['mfu'])}"
        + ("" if row["mfu"] is not None else " (the device's peak speed is not known)"),
    ]


def storage_line(storage: Mapping[str, Any]) -> str:
    """Return what the archives of a bucket take."""
    return f"Archives: {show_size(storage['archive_bytes'])} in all."


def run_lines(row: Mapping[str, Any], view: CheckpointView) -> list[str]:
    """Return which run, code and machine wrote the checkpoint."""
    system = section(view.metadata, "system_info")
    versions = ("python", "torch", "transformers", "accelerate")
    return [
        f"Run ID: {show_text(row['run_id'])}",
        f"Branch: {show_text(view.manifest.branch if view.manifest else None)}",
        *([f"Begun From: {show_text(row['init_from'])}"] if row["init_from"] else []),
        f"Git Commit: {show_text(row['git_commit'])}",
        f"Parameters: {show_count(row['num_parameters'])}",
        f"Device: {show_text(system.get('device'))}",
        f"World Size: {show_text(system.get('world_size'))}",
        "Versions: " + ", ".join(f"{name} {show_text(system.get(name))}" for name in versions),
    ]


def upload_lines(row: Mapping[str, Any], bucket_uri: str) -> list[str]:
    """Return the state of the upload, and why the checkpoint is kept here."""
    if bucket_uri:
        size = row["archive_bytes"]
        archive = "missing" if size is None else format_bytes(size)
        return [f"Bucket: {printable(bucket_uri)}", f"State: {row['state']}", f"Archive: {archive}"]
    upload = row["upload"]
    kept = [f"Kept: {printable(row['kept'])}"] if row["kept"] else []
    if upload is None:
        return [f"State: {row['state']} (nothing in the journal)", *kept]
    head = f"State: {row['state']} ({upload['state']} {show_time(upload['time'])} UTC)"
    return [head, *kept, *plain_lines(upload["details"], "  ")]


def file_lines(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the files with their sizes and hashes, and the sum."""
    if not files:
        return ["  unknown: the manifest cannot be read"]
    width = max(len(printable(file["name"])) for file in files)
    lines = [
        f"  {printable(file['name']):<{width}}  {show_size(file['size_bytes']):>10}"
        f"  crc32c {printable(file['crc32c'], _CELL_CHARACTERS)}"
        for file in files
    ]
    total = math.fsum(number(file["size_bytes"]) or 0.0 for file in files)
    return [*lines, f"  {'total':<{width}}  {show_size(total):>10}"]


# compare

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
    ("Samples Seen", "samples_seen", show_count),
    ("Tokens Seen", "tokens_seen", show_count),
    ("Tokens/s", "tokens_per_second", show_count),
    ("MFU", "mfu", show_share),
    ("Machine Time", "machine_seconds", format_duration),
    ("Cost", "dollars", format_dollars),
    ("Parameters", "num_parameters", show_count),
    ("Size", "size_bytes", show_size),
    ("Run ID", "run_id", show_text),
    ("Git Commit", "git_commit", lambda commit: show_text(commit)[:12]),
)


def compare_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of `compare`: a line for each figure, its change from first to last."""
    table = [["", *(f"[{index}]" for index in range(1, len(rows) + 1)), "change"]]
    for label, key, show in COMPARED:
        values = [row[key] for row in rows]
        change = ABSENT
        first, last = number(values[0]), number(values[-1])
        if first is not None and last is not None:
            change = ("+" if last > first else "") + show(last - first)
        table.append([label, *(show(value) for value in values), change])
    return [*table, ["Upload", *(row["state"] for row in rows), ABSENT]]


def drift_lines(pair: Mapping[str, Any]) -> list[str]:
    """Return the drift of the weights from one checkpoint to the next, layer by layer."""
    problems = [f"  {printable(problem)}" for problem in pair["problems"]]
    if pair["total"] is None:
        return problems
    table = [["", "elements", "norm", "change", "cosine", "NaN before", "NaN"]]
    for name, figures in {**pair["layers"], "total": pair["total"]}.items():
        table.append(
            [
                f"  {printable(name, _CELL_CHARACTERS)}",
                show_count(figures["num_elements"]),
                format_figure(figures["norm"], ".4g"),
                format_figure(figures["change"], ".3e"),
                format_figure(figures["cosine"], ".8f"),
                show_count(figures["older_nan"]),
                show_count(figures["nan"]),
            ]
        )
    return [*table_lines(table), *problems]


def table_lines(table: Sequence[Sequence[str]]) -> list[str]:
    """Return rows in columns, the first one left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]))
    return lines


def difference_lines(differences: Mapping[str, Sequence[Any]], notes: Sequence[str]) -> list[str]:
    """Return the lines below `Configuration Differences`."""
    if notes:
        return [f"  unknown: {printable(note)}" for note in notes]
    if not differences:
        return ["  none"]
    return [
        f"  {printable(key)}: "
        + " | ".join(printable(to_json_text(value, indent=None)) for value in values)
        for key, values in differences.items()
    ]
