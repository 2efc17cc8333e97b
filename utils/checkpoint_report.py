"""The figures of a checkpoint for the viewer: summary, statistics, files, differences, curves.

    checkpoint views (metadata.py) -> plain values, ready for text and for JSON

Nothing here stops at a damaged file: a figure that is not known is None, and what is wrong comes
back as text. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from utils.errors import CheckpointError
from utils.layout import METRICS_HISTORY_FILE, TRAINING_CONFIG_FILE
from utils.metadata import (
    CheckpointView,
    find_best,
    find_latest_view,
    loss_trend,
    number,
    read_json_object,
)
from utils.plots import TrainingCurves, curves_from_history, curves_from_metadata


def summarize_all(views: Sequence[CheckpointView]) -> list[dict[str, Any]]:
    """Return what is shown of each checkpoint, ready for JSON."""
    latest, best = find_latest_view(views), find_best(views)
    return [
        {**summarize(view), "is_latest": view is latest, "is_best": view is best} for view in views
    ]


def summarize(view: CheckpointView) -> dict[str, Any]:
    """Return the figures of one checkpoint; None where one is not known."""
    metadata = view.metadata
    progress, system = section(metadata, "training_progress"), section(metadata, "system_info")
    validation = section(metadata, "validation_metrics")
    rates = metadata.get("learning_rates")
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
        "learning_rate": number(rates[-1]) if isinstance(rates, list) and rates else None,
        "tokens_seen": number(progress.get("tokens_seen")),
        "tokens_per_second": number(progress.get("tokens_per_second")),
        "num_parameters": number(system.get("num_parameters")),
        "run_id": view.manifest.run_id if view.manifest else metadata.get("run_id"),
        "git_commit": metadata.get("git_commit"),
        "size_bytes": view.total_bytes,
        "archive_bytes": view.archive_bytes,
        "path": str(view.path) if view.path else None,
        "upload": summarize_upload(view),
        "problem": view.problem,
    }


def summarize_upload(view: CheckpointView) -> dict[str, Any] | None:
    """Return the upload state of a local checkpoint, or that a remote one is in the bucket."""
    if view.upload is not None:
        entry = view.upload
        return {"state": entry.state.value, "time": entry.time, "details": entry.details}
    if view.archive_bytes is not None:
        return {"state": "in bucket", "time": None, "details": {}}
    return None


def loss_statistics(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return length, mean, population standard deviation and trend of the kept loss history."""
    losses = numbers(metadata.get("loss_history"))
    mean = math.fsum(losses) / len(losses) if losses else None
    deviation = None
    if mean is not None:
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / len(losses))
    return {
        "length": len(losses),
        "average": mean,
        "standard_deviation": deviation,
        "trend": loss_trend(losses),
    }


def read_part(view: CheckpointView, name: str) -> tuple[dict[str, Any], str | None]:
    """Return (a JSON file of the checkpoint, what is wrong with it); empty for a remote one."""
    if view.path is None:
        return {}, None
    try:
        return read_json_object(view.path / name), None
    except CheckpointError as exc:
        return {}, str(exc)


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


def config_differences(
    views: Sequence[CheckpointView],
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return (configuration key -> its value in each checkpoint, where they differ; notes)."""
    if any(view.path is None for view in views):
        return {}, ["configurations are in the archives, not in the bucket's cards"]
    parts = [read_part(view, TRAINING_CONFIG_FILE) for view in views]
    notes = [f"{view.name}: {part[1]}" for view, part in zip(views, parts, strict=True) if part[1]]
    configs = [values for values, problem in parts if problem is None]
    if notes:
        return {}, notes
    keys = sorted(set().union(*configs))
    differing = (key for key in keys if any(c.get(key) != configs[0].get(key) for c in configs))
    return {key: [config.get(key) for config in configs] for key in differing}, []


def read_curves(view: CheckpointView) -> tuple[TrainingCurves, str | None]:
    """Return (the curves up to a checkpoint, why they are not whole).

    All logged points are in training_metrics.json; metadata.json has the last ones only.
    """
    history, problem = read_part(view, METRICS_HISTORY_FILE)
    if view.path is None:
        problem = "the whole history is in the archive"
    elif problem is None and not isinstance(history.get("steps"), list):
        problem = f"{METRICS_HISTORY_FILE} has no steps"
    if problem is None:
        return curves_from_history(str(view.name), history), None
    return curves_from_metadata(str(view.name), view.metadata), problem


def section(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a nested object, empty where there is none."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def numbers(value: object) -> list[float]:
    """Return the finite numbers of a list that may hold anything."""
    found = [number(item) for item in value] if isinstance(value, list) else []
    return [item for item in found if item is not None]
