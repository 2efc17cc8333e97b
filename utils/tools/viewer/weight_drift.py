"""How far the weights moved from one checkpoint to the next, layer by layer.

    weights of two checkpoints, whole or in parts -> norm, change, cosine, NaN of each layer

Files are read only where their crc32c is their manifest's. Tensors come one at a time and are
summed in blocks of float64, so host memory is bounded by one tensor of each checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any

import torch

from utils.base.errors import CheckpointError
from utils.checkpoints.layout import BIN_WEIGHTS_FILE, SAFE_WEIGHTS_FILE
from utils.checkpoints.state_files import find_parts, mapped_errors
from utils.checkpoints.store import verify_checkpoint
from utils.models.parts import MODEL_PREFIX, LoadedTensors, PartFiles, TensorReader, WholeFile

WEIGHT_FILES = (SAFE_WEIGHTS_FILE, BIN_WEIGHTS_FILE)
BLOCK_ELEMENTS = 2**18  # 2 MiB of float64: a block stays in the cache
TOTAL = "total"
# What is summed over the elements of a tensor; those that are not finite are only counted.
SUMS = (
    "num_tensors",
    "num_elements",
    "older_nan",
    "nan",
    "older_squares",
    "squares",
    "products",
    "difference_squares",
)

_LAYER = re.compile(r"(.*?\.\d+)\..*")


def measure_drift(older: Path, newer: Path) -> dict[str, Any]:
    """Compare the weights of two checkpoint directories.

    Returns:
        `layers` in the order of their names, each with its `figures_of`; their `total`; and
        `problems`: tensors that cannot be compared.

    Raises:
        CheckpointError: Weights are missing, damaged, or cannot be read.
    """
    layers: dict[str, torch.Tensor] = {}
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    problems = []
    with contextlib.ExitStack() as stack:
        before, after = open_weights(older, stack), open_weights(newer, stack)
        old_names, new_names = set(before.names), set(after.names)
        for name in sorted(old_names & new_names, key=_natural_order):
            with mapped_errors(older, name):
                left = before.read(name)
            with mapped_errors(newer, name):
                right = after.read(name)
            if left.shape != right.shape:
                shapes = f"{list(left.shape)} and {list(right.shape)}"
                problems.append(f"{name} has different shapes: {shapes}")
                continue
            sums, layer = _sums_of(left, right), layer_of(name)
            layers[layer] = layers.get(layer, 0) + sums
            total += sums
    for names, where in ((old_names - new_names, older), (new_names - old_names, newer)):
        problems += [f"{name} is only in {where.name}" for name in sorted(names)]
    figures = {name: figures_of(sums) for name, sums in layers.items()}
    return {"layers": figures, TOTAL: figures_of(total), "problems": problems}


def open_weights(checkpoint: Path, stack: contextlib.ExitStack) -> TensorReader:
    """Return the weights of a checkpoint, whole or in parts, open for reading.

    Raises:
        CheckpointError: They are missing, damaged, or cannot be read.
    """
    manifest = verify_checkpoint(checkpoint, is_wanted=_has_weights)
    parts = find_parts(checkpoint, manifest, MODEL_PREFIX)
    name = next((name for name in WEIGHT_FILES if name in manifest.files), None)
    with mapped_errors(checkpoint, f"{MODEL_PREFIX}-part-*" if parts else str(name)):
        if parts:
            return PartFiles(parts, stack)
        if name == SAFE_WEIGHTS_FILE:
            return WholeFile(checkpoint / name, stack)
        if name == BIN_WEIGHTS_FILE:
            state = torch.load(checkpoint / name, "cpu", weights_only=True, mmap=True)
            tensors = {k: v for k, v in dict(state).items() if isinstance(v, torch.Tensor)}
            for key, tensor in tensors.items():
                if not tensor.is_contiguous():  # strides of 0 make any size out of one element
                    raise ValueError(f"{key} is not a plain tensor")
            return LoadedTensors(tensors)
    raise CheckpointError(f"{checkpoint.name} has no weights ({' or '.join(WEIGHT_FILES)}).")


def _has_weights(name: str) -> bool:
    return name in WEIGHT_FILES or name.startswith(f"{MODEL_PREFIX}-part-")


def layer_of(tensor: str) -> str:
    """Return the layer of a tensor: its name to the first number, else without its last part."""
    match = _LAYER.fullmatch(tensor)
    if match is not None:
        return match[1]
    return tensor.rpartition(".")[0] or tensor


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(part[:18]), part) if part.isdecimal() else (0, 0, part) for part in parts]


def _sums_of(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the `SUMS` over the elements of a tensor in two checkpoints."""
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    total[0], total[1] = 1, left.numel()
    flat = (left.detach().reshape(-1), right.detach().reshape(-1))
    for begin in range(0, left.numel(), BLOCK_ELEMENTS):
        older, newer = (part[begin : begin + BLOCK_ELEMENTS].to(torch.float64) for part in flat)
        total[2] += (~torch.isfinite(older)).sum()
        total[3] += (~torch.isfinite(newer)).sum()
        usable = torch.isfinite(older) & torch.isfinite(newer)
        older, newer = older[usable], newer[usable]
        for index, (one, other) in enumerate(
            ((older, older), (newer, newer), (older, newer), (newer - older, newer - older)), 4
        ):
            total[index] += torch.dot(one, other)
    return total


def figures_of(sums: torch.Tensor) -> dict[str, Any]:
    """Return the figures that follow from the `SUMS` of a layer; None where one is not defined.

    `change` is the norm of the difference as a share of the older norm; `cosine` is that of the
    angle between the older and the newer weights; `nan` counts NaN and infinite elements.
    """
    values = dict(zip(SUMS, sums.tolist(), strict=True))
    older, newer = math.sqrt(values["older_squares"]), math.sqrt(values["squares"])
    cosine = values["products"] / (older * newer) if older and newer else None
    return {
        **{key: int(values[key]) for key in SUMS[:4]},
        "older_norm": older,
        "norm": newer,
        "change": math.sqrt(values["difference_squares"]) / older if older else None,
        "cosine": None if cosine is None else max(-1.0, min(1.0, cosine)),
    }
