"""What the viewer prints: lines and cells from rows, views and reports.

    report.py, shelf.py, weight_drift.py -> text

Values come from files that may be foreign: every one passes `printable` or a number's format. No
torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from utils.base.tables import Column
from utils.base.text import (
    ABSENT,
    format_bytes,
    format_duration,
    number,
    parse_time,
    printable,
    to_json_text,
)
from utils.checkpoints.views import CheckpointView
from utils.costs.costs import format_dollars
from utils.tools.viewer.report import loss_statistics, numbers, section
from utils.tracking.metrics_log import HISTORY_LIMIT
from utils.tracking.text_plots import (
    format_figure,
    is_encodable,
    show_count,
    show_loss,
    show_rate,
    show_share,
    sparkline,
)

TREND_SIGNS = {"improving": "\u2193", "worsening": "\u2191", "flat": "\u2192"}
_CELL_CHARACTERS = 40
LIST_COLUMNS = (
    Column("checkpoint", kind="name"),
    Column("step", 8, "number"),
    Column("loss", 4, "number"),
    Column("val", 5, "number"),
    Column("tokens", 11, "number"),
    Column("size", 10, "number"),
    Column("time (UTC)", 9),
    Column("age", 6, "number"),
    Column("state", 2),
    Column("kept", 7, "prose"),
    Column("note", 3, "prose"),
)
DRIFT_COLUMNS = (
    Column("layer", kind="name"),
    Column("elements", 5, "number"),
    Column("norm", 4, "number"),
    Column("change", 2, "number"),
    Column("cosine", 3, "number"),
    Column("NaN before", 7, "number"),
    Column("NaN", 6, "number"),
)
FILE_COLUMNS = (Column("file", kind="name"), Column("size", kind="number"), Column("crc32c", 2))
FIGURE = "figure"  # the heading of the names of what is compared


# Values


def show_text(value: object) -> str:
    """Return any value on one line."""
    return ABSENT if value is None else printable(value)


def show_time(timestamp: object) -> str:
    """Return an ISO 8601 time in UTC to the second; anything else is shown as it is."""
    moment = parse_time(timestamp)
    if moment is None:
        return printable(timestamp or ABSENT)[:19]
    return moment.strftime("%Y-%m-%d %H:%M:%S")


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
        "size": format_bytes(row["size_bytes"]),
        "time (UTC)": show_time(row["timestamp"]),
        "age": format_duration(row["age_seconds"]),
        "state": row["state"],
        "kept": printable(row["kept"] or "", _CELL_CHARACTERS),
        "note": ", ".join(notes),
    }


# view


def plain_lines(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each key."""
    return [f"  {printable(key)}: {show_value(value)}" for key, value in values.items()]


def config_lines(config: Mapping[str, Any]) -> list[str]:
    """Return every key of a configuration with its value as it was written."""
    texts = {key: to_json_text(config[key], indent=None) for key in sorted(config)}
    return [f"  {printable(key)}: {printable(text)}" for key, text in texts.items()]


def example_sections(view: CheckpointView, encoding: str | None) -> dict[str, list[str]]:
    """Return the sections of the user's example, with more figures."""
    return {
        "": state_lines(view),
        "Training Metrics": training_lines(view, encoding),
        "Validation Metrics": plain_lines(section(view.metadata, "validation_metrics")),
    }


def shorten_sections(sections: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return these sections with several figures in a line, so that all fit one screen."""
    shortened = {title: list(lines) for title, lines in sections.items()}
    head, training = shortened[""], shortened["Training Metrics"]
    head[1:] = ["  ".join(head[1:4]), "  ".join(head[4:])]
    training[-2:] = ["  ".join(training[-2:])]
    return shortened


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


def training_lines(view: CheckpointView, encoding: str | None) -> list[str]:
    """Return the training metrics of the user's example, with the curve of the kept losses."""
    metadata = view.metadata
    statistics = loss_statistics(metadata)
    losses, rates = numbers(metadata.get("loss_history")), numbers(metadata.get("learning_rates"))
    kept = f" (the last {HISTORY_LIMIT} are kept here)"
    lines = [
        f"Current Loss: {show_loss(view.loss)}",
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
        f"Current LR: {show_rate(view.learning_rate)}",
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


def run_lines(row: Mapping[str, Any], view: CheckpointView) -> list[str]:
    """Return which run, code and machine wrote the checkpoint."""
    system = section(view.metadata, "system_info")
    versions = ("python", "torch", "transformers", "accelerate")
    return [
        f"Run ID: {show_text(row['run_id'])}",
        f"Branch: {show_text(view.manifest.branch if view.manifest else None)}",
        *_begun_from(row),
        f"Git Commit: {show_text(row['git_commit'])}",
        f"Parameters: {show_count(row['num_parameters'])}",
        f"Device: {show_text(system.get('device'))}",
        f"World Size: {show_text(system.get('world_size'))}",
        "Versions: " + ", ".join(f"{name} {show_text(system.get(name))}" for name in versions),
    ]


def brief_lines(
    row: Mapping[str, Any], metadata: Mapping[str, Any], num_files: int, bucket_uri: str
) -> list[str]:
    """Return in a few lines what else matters first: progress, speed, size, upload."""
    progress = section(metadata, "training_progress")
    errors = [line for line in upload_details(row) if line.startswith("  error: ")]
    return [
        f"Max Steps: {show_count(number(progress.get('max_steps')))}  "
        f"Tokens Seen: {show_count(row['tokens_seen'])}  "
        f"Tokens/s: {show_count(row['tokens_per_second'])}  MFU: {show_share(row['mfu'])}",
        f"Run ID: {show_text(row['run_id'])}  Parameters: {show_count(row['num_parameters'])}  "
        f"Size: {format_bytes(row['size_bytes'])} in {num_files} files",
        *_begun_from(row),
        "  ".join(upload_lines(row, bucket_uri)),
        *errors,
    ]


def _begun_from(row: Mapping[str, Any]) -> list[str]:
    return [f"Initialized From: {show_text(row['init_from'])}"] if row["init_from"] else []


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
    return [head, *kept]


def upload_details(row: Mapping[str, Any]) -> list[str]:
    """Return what the journal says of the upload besides its state."""
    return plain_lines((row["upload"] or {}).get("details", {}))


def file_rows(files: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the files with their sizes and hashes, and the sum."""
    rows = [
        {
            "file": printable(file["name"]),
            "size": format_bytes(file["size_bytes"]),
            "crc32c": printable(file["crc32c"], _CELL_CHARACTERS),
        }
        for file in files
    ]
    if not rows:
        return []
    total = math.fsum(number(file["size_bytes"]) or 0.0 for file in files)
    return [*rows, {"file": "total", "size": format_bytes(total), "crc32c": ""}]


# compare

Formatter = Callable[[Any], str]
COMPARED: tuple[tuple[str, str, Formatter], ...] = (
    ("Step", "step", show_count),
    ("Epoch", "epoch", show_count),
    ("Files Processed", "files_processed", show_count),
    ("Time (UTC)", "timestamp", lambda time: show_time(time)[:16]),
    ("Loss", "current_loss", show_loss),
    ("Best Loss", "best_loss", show_loss),
    ("Validation Loss", "validation_loss", show_loss),
    ("Perplexity", "validation_perplexity", show_loss),
    ("Best Validation Loss", "best_validation_loss", show_loss),
    ("Learning Rate", "learning_rate", show_rate),
    ("Samples Seen", "samples_seen", show_count),
    ("Tokens Seen", "tokens_seen", show_count),
    ("Tokens/s", "tokens_per_second", show_count),
    ("MFU", "mfu", show_share),
    ("Machine Time", "machine_seconds", format_duration),
    ("Cost", "dollars", format_dollars),
    ("Parameters", "num_parameters", show_count),
    ("Size", "size_bytes", format_bytes),
    ("Run ID", "run_id", show_text),
    ("Git Commit", "git_commit", lambda commit: show_text(commit)[:12]),
)


def compare_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the table of `compare`: a row for each figure, its change from first to last."""
    names = [column.name for column in compare_columns(len(rows))]
    table = []
    for label, key, show in COMPARED:
        values = [row[key] for row in rows]
        change = ABSENT
        first, last = number(values[0]), number(values[-1])
        if first is not None and last is not None:
            change = ("+" if last > first else "") + show(last - first)
        table.append([label, *(show(value) for value in values), change])
    table.append(["Upload", *(row["state"] for row in rows), ABSENT])
    return [dict(zip(names, cells, strict=True)) for cells in table]


def compare_columns(num_rows: int) -> list[Column]:
    """Return the columns of `compare`: the last checkpoint matters most, then the first."""
    ranks = {1: 3, num_rows: 2}
    checkpoints = [
        Column(f"[{index}]", ranks.get(index, 4 + num_rows - index), "number")
        for index in range(1, num_rows + 1)
    ]
    return [Column(FIGURE), *checkpoints, Column("change", 4 + num_rows, "number")]


def drift_rows(pair: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the drift of the weights from one checkpoint to the next, layer by layer."""
    if pair["total"] is None:
        return []
    return [
        {
            "layer": printable(name, _CELL_CHARACTERS),
            "elements": show_count(figures["num_elements"]),
            "norm": format_figure(figures["norm"], ".4g"),
            "change": format_figure(figures["change"], ".3e"),
            "cosine": format_figure(figures["cosine"], ".8f"),
            "NaN before": show_count(figures["older_nan"]),
            "NaN": show_count(figures["nan"]),
        }
        for name, figures in {**pair["layers"], "total": pair["total"]}.items()
    ]


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
