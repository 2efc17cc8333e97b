"""Two runs compared bit by bit: batches, metrics, and every tensor of a checkpoint.

No torch until tensors are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoints.layout import BATCHES_FILE, DATA_STATE_FILE, METRICS_FILE, read_json
from utils.checkpoints.store import verify_checkpoint
from utils.tools.proofs.started_runs import read_records
from utils.tracking.metrics_log import read_metrics

COMPARED_METRICS = ("loss", "grad_norm", "learning_rate", "validation_loss")
TENSOR_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl")
STRAIGHT, INTERRUPTED = "straight", "interrupted"  # what the two runs are called


@dataclass(frozen=True)
class Comparison:
    """What was compared, how much of it there was, and every place where the two differ."""

    what: str
    extent: str
    differences: tuple[str, ...] = ()


def values_by_step(path: Path, key: str) -> dict[int, set[str]]:
    """Return every value that a file of JSON lines has for a step, exactly as JSON text.

    What was trained again after a kill occurs more than once; a set with two values is a step that
    did not repeat itself.
    """
    values: dict[int, set[str]] = {}
    for record in read_records(path)[0]:
        if key in record and "event" not in record:
            values.setdefault(record["step"], set()).add(json.dumps(record[key]))
    return values


def compare_values(
    what: str,
    straight: Mapping[int, set[str]],
    other: Mapping[int, set[str]],
    steps: Sequence[int] | None,
) -> Comparison:
    """Compare one value a step; both must have `steps`, None: those that both happen to have."""
    wanted = sorted(straight.keys() & other.keys()) if steps is None else steps
    differences = []
    for step in wanted:
        left, right = straight.get(step, set()), other.get(step, set())
        if not left or not right:
            differences.append(f"step {step} is missing in the {INTERRUPTED if left else STRAIGHT}")
        elif left != right or len(left) > 1:
            differences.append(f"step {step}: {_join(left)} and {_join(right)}")
    return Comparison(what, f"{len(wanted)} steps", tuple(differences))


def _join(values: set[str]) -> str:
    return " / ".join(sorted(values))


def compare_logs(straight: Path, other: Path, steps: int) -> list[Comparison]:
    """Compare batches and metrics of two log directories, step by step."""
    every = range(1, steps + 1)
    left, right = (values_by_step(logs / BATCHES_FILE, "crc32c") for logs in (straight, other))
    found = [compare_values("batches (crc32c)", left, right, every)]
    for key in COMPARED_METRICS:
        left, right = (values_by_step(logs / METRICS_FILE, key) for logs in (straight, other))
        wanted = None if key == "validation_loss" else every
        found.append(compare_values(key, left, right, wanted))
    curves = [read_metrics(logs / METRICS_FILE).series("loss")[0] for logs in (straight, other)]
    wrong = [
        f"the {name} run's curve has steps {steps_of}"
        for name, steps_of in zip((STRAIGHT, INTERRUPTED), curves, strict=True)
        if steps_of != list(every)
    ]
    return [*found, Comparison("curve", "each step once, in order", tuple(wrong))]


def compare_checkpoints(straight: Path, other: Path) -> list[Comparison]:
    """Compare every tensor, number and random state of two checkpoints, and their data positions.

    Raises:
        CheckpointError: One of them does not verify.
    """
    left, right = verify_checkpoint(straight), verify_checkpoint(other)
    names = sorted(
        name for name in left.files.keys() | right.files.keys() if name.endswith(TENSOR_SUFFIXES)
    )
    found = []
    for name in [*names, DATA_STATE_FILE]:
        paths = [checkpoint / name for checkpoint in (straight, other)]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            found.append(Comparison(name, "-", tuple(f"{path} is missing" for path in missing)))
            continue
        values = [_load(path) for path in paths]
        extent = f"{_count_leaves(values[0])} values"
        found.append(Comparison(name, extent, tuple(_differences(values[0], values[1], ""))))
    return found


def _load(path: Path) -> Any:
    """Return what a file of a verified checkpoint holds."""
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    from accelerate.utils import load

    return load(path, map_location="cpu", mmap=True)


def _count_leaves(value: Any) -> int:
    children = _children(value)
    return 1 if children is None else sum(map(_count_leaves, children.values()))


def _children(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    return dict(enumerate(value)) if isinstance(value, (list, tuple)) else None


def _differences(left: Any, right: Any, where: str) -> Iterator[str]:
    """Name everything in which two nested values differ, bit by bit."""
    parts, others = _children(left), _children(right)
    if parts is not None and others is not None:
        for key in sorted({*parts, *others}, key=str):
            if key not in parts or key not in others:
                yield f"{where}/{key} is only in one of them"
            else:
                yield from _differences(parts[key], others[key], f"{where}/{key}")
    elif type(left) is not type(right) or not _have_same_bits(left, right):
        yield where or "/"


def _have_same_bits(left: Any, right: Any) -> bool:
    """Tell whether two values of one type are the same; NaN is NaN, 0.0 is not -0.0."""
    import numpy as np
    import torch

    if isinstance(left, torch.Tensor):
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        pair = (
            value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (left, right)
        )
        return torch.equal(*pair)
    if isinstance(left, np.ndarray):
        same_kind = (left.dtype, left.shape) == (right.dtype, right.shape)
        return same_kind and left.tobytes() == right.tobytes()
    return repr(left) == repr(right) if isinstance(left, float) else bool(left == right)
