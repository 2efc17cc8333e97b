"""The figures of checkpoints for the viewer: summary, statistics, throughput, files, differences.

    checkpoint views -> plain values, ready for text and for JSON

A damaged file stops nothing: a figure that is not known is None, and what is wrong is returned as
text. No torch here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from configs.config_files import TRAINING_CONFIG_FILE
from utils.base.text import number, parse_time, to_json_text
from utils.checkpoints.layout import METRICS_HISTORY_FILE
from utils.checkpoints.views import CheckpointView, find_best, find_latest_view, read_json_part
from utils.costs.costs import Costs, summarize_costs
from utils.costs.spending import Spending
from utils.tracking.metrics_log import loss_trend
from utils.tracking.plots import Curves, curves_from_history, curves_from_metadata


def summarize_all(
    views: Sequence[CheckpointView],
    every: Sequence[CheckpointView] | None,
    hourly_price: float | None = None,
) -> list[dict[str, Any]]:
    """Return what is shown of each checkpoint, ready for JSON; ages count to now.

    `every` is all checkpoints there, by step. Without them (None), which one is the latest or the
    best is not known.
    """
    marked = {"is_latest": find_latest_view(every or ()), "is_best": find_best(every or ())}
    rows, now = [], datetime.now(UTC)
    for view in views:
        row = summarize(view, hourly_price)
        written = parse_time(row["timestamp"])
        row["age_seconds"] = max(0.0, (now - written).total_seconds()) if written else None
        for key, chosen in marked.items():
            is_chosen = chosen is not None and view.name == chosen.name
            row[key] = None if every is None else is_chosen
        rows.append(row)
    return rows


def summarize(view: CheckpointView, hourly_price: float | None = None) -> dict[str, Any]:
    """Return the figures of one checkpoint; None where one is not known."""
    costs = measure_costs(view, hourly_price)
    metadata = view.metadata
    progress, system = section(metadata, "training_progress"), section(metadata, "system_info")
    validation = section(metadata, "validation_metrics")
    return {
        "name": str(view.name),
        "step": view.name.step,
        "epoch": view.name.epoch,
        "files_processed": view.name.files,
        "timestamp": metadata.get("timestamp"),
        "current_loss": view.loss,
        "best_loss": number(metadata.get("best_loss")),
        "validation_loss": view.validation_loss,
        "validation_perplexity": number(validation.get("perplexity")),
        "best_validation_loss": number(validation.get("best_validation_loss")),
        "learning_rate": view.learning_rate,
        "samples_seen": number(progress.get("samples_seen")),
        "tokens_seen": number(progress.get("tokens_seen")),
        "tokens_per_second": number(progress.get("tokens_per_second")),
        "mfu": number(progress.get("mfu")),
        "device": system.get("device"),
        "num_parameters": number(system.get("num_parameters")),
        "costs": None if costs is None else asdict(costs),
        "run_id": view.manifest.run_id if view.manifest else metadata.get("run_id"),
        "init_from": section(metadata, "base").get("name"),
        "git_commit": metadata.get("git_commit"),
        # Sizes in a foreign file may be too large to compute with.
        "size_bytes": None if number(view.total_bytes) is None else view.total_bytes,
        "archive_bytes": view.archive_bytes,
        "path": str(view.path) if view.path else None,
        "upload": summarize_upload(view),
        "problem": view.problem,
    }


def summarize_upload(view: CheckpointView) -> dict[str, Any] | None:
    """Return the upload state of a checkpoint, None for a local one that no journal names."""
    if view.upload is not None:
        entry = view.upload
        return {"state": entry.state.value, "time": entry.time, "details": entry.details}
    if view.archive_bytes is not None:
        return {"state": "in bucket", "time": None, "details": {}}
    return None


def loss_statistics(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return length, mean, population standard deviation and trend of the kept loss history."""
    losses = numbers(metadata.get("loss_history"))
    mean = deviation = None
    with contextlib.suppress(OverflowError, ZeroDivisionError):
        mean = math.fsum(losses) / len(losses)
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / len(losses))
    return {
        "length": len(losses),
        "average": mean,
        "standard_deviation": deviation,
        "trend": loss_trend(losses),
    }


def read_part(view: CheckpointView, name: str) -> tuple[dict[str, Any], str | None]:
    """Return (a JSON file of a checkpoint, what is wrong with it).

    Of one in a bucket only the configuration is known.
    """
    if view.path is not None:
        return read_json_part(view.path / name, view.manifest)
    return view.config if name == TRAINING_CONFIG_FILE else {}, None


def data_position(data_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data position without the list of shards, which may be long."""
    position = {key: value for key, value in data_state.items() if key not in ("format", "shards")}
    shards = data_state.get("shards")
    if isinstance(shards, list):
        position["num_shards"] = len(shards)
    return position


def check_files(view: CheckpointView) -> tuple[list[dict[str, Any]], list[str]]:
    """Return (the manifest's files, which of them are missing or of another size)."""
    files: list[dict[str, Any]] = []
    problems: list[str] = []
    for name, entry in sorted(view.manifest.files.items()) if view.manifest else []:
        files.append({"name": name, "size_bytes": entry.size, "crc32c": entry.crc32c})
        if view.path is None:
            continue
        try:
            size = (view.path / name).stat().st_size
        except OSError as exc:
            problems.append(f"{name} cannot be found ({exc.strerror})")
            continue
        if size != entry.size:
            problems.append(f"{name} has {size} bytes, the manifest says {entry.size}")
    return files, problems


def measure_costs(view: CheckpointView, hourly_price: float | None = None) -> Costs | None:
    """Return what the run had cost at the save, None where that was not recorded.

    `hourly_price` is dollars an hour for time that the run itself had no price for.
    """
    progress = section(view.metadata, "training_progress")
    keys = ("tokens_seen", "tokens_per_second", "completed_steps", "max_steps")
    tokens, rate, steps, max_steps = (number(progress.get(key)) for key in keys)
    remaining = None
    if tokens and rate and steps and max_steps is not None:
        with contextlib.suppress(OverflowError, ZeroDivisionError):
            remaining = max(0.0, max_steps - steps) * (tokens / steps) / rate
    spending = Spending.from_json(view.metadata.get("spending"))
    return summarize_costs(
        spending, tokens_seen=tokens, remaining_seconds=remaining, hourly_price=hourly_price
    )


def config_differences(
    views: Sequence[CheckpointView],
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return (key of the configuration -> its differing values; why that is not known)."""
    if any(view.path is None and not view.config for view in views):
        return {}, ["configurations are in the archives, not in the bucket's sidecars"]
    parts = [read_part(view, TRAINING_CONFIG_FILE) for view in views]
    notes = [f"{view.name}: {part[1]}" for view, part in zip(views, parts, strict=True) if part[1]]
    if notes:
        return {}, notes
    differences = {}
    for key in sorted(set().union(*(config for config, _ in parts))):
        values = [config.get(key) for config, _ in parts]
        # As text: values from outside may be nested deeper than `==` can follow.
        if len({to_json_text(value, indent=None) for value in values}) > 1:
            differences[key] = values
    return differences, []


def read_curves(view: CheckpointView, label: str) -> tuple[Curves, str | None]:
    """Return (the curves up to a checkpoint, why they are incomplete).

    training_metrics.json has all logged points, metadata.json the last ones.
    """
    history, problem = read_part(view, METRICS_HISTORY_FILE)
    if view.path is None:
        problem = "the full history is in the archive only"
    elif problem is None and not isinstance(history.get("steps"), list):
        problem = f"{METRICS_HISTORY_FILE} has no steps"
    if isinstance(history.get("steps"), list):
        return curves_from_history(label, history), problem
    return curves_from_metadata(label, view.metadata), problem


def section(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a nested object, empty where there is none."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def numbers(value: object) -> list[float]:
    """Return the finite numbers of a list that may hold anything."""
    found = [number(item) for item in value] if isinstance(value, list) else []
    return [item for item in found if item is not None]
