"""Weights and optimizer of a checkpoint: their files, whole or in parts; any rows of either.

    what a rank saves -> its files -> rows of any rank, or whole tensors

One process, or one of many that hold the same, writes `model.safetensors` (or `pytorch_model.bin`)
and `optimizer.bin`. Where ranks hold parts of the state, each writes its rows
(`utils/models/parts.py`), and `optimizer_rest.bin` has what `optimizer.bin` has besides: groups and
counters. Either kind can be read whole, or as the rows of one rank among any number: a sharded rank
reads its own from memory maps, and never the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load as load_tensors

from utils.base.errors import CheckpointError, UnreadableCheckpointError, first_line
from utils.checkpoints.files import CheckpointFiles
from utils.checkpoints.layout import BIN_WEIGHTS_FILE, SAFE_WEIGHTS_FILE, Manifest
from utils.models.parts import (
    MODEL_PREFIX,
    OPTIMIZER_PREFIX,
    LoadedTensors,
    Part,
    PartFiles,
    RowChoice,
    TensorReader,
    WholeFile,
    find_part_files,
    part_file,
    part_header,
    read_tensors,
)
from utils.training.division import HeldState

OPTIMIZER_FILE = "optimizer.bin"
OPTIMIZER_REST_FILE = "optimizer_rest.bin"
"""With parts: what `optimizer.bin` has besides the tensors that ranks hold rows of."""


def add_state(
    files: CheckpointFiles, held: HeldState, part: Part, save_format: str
) -> CheckpointFiles:
    """Return the files of a checkpoint with what a rank saves of weights and optimizer.

    `files` are all others that this rank writes. `part` says which files are its own, where it
    saves rows; `save_format` is for whole weights.
    """
    pickles = dict(files.pickles)
    if held.rows is None:
        weights = {}
        pickles[OPTIMIZER_FILE] = held.optimizer
        if save_format == "safetensors":
            weights[SAFE_WEIGHTS_FILE] = _without_shared(held.weights)
        else:
            pickles[BIN_WEIGHTS_FILE] = held.weights
        return replace(files, weights=weights, pickles=pickles)
    if part.rank == 0:
        pickles[OPTIMIZER_REST_FILE] = held.optimizer
    weights, headers = {}, {}
    for prefix, tensors in ((MODEL_PREFIX, held.weights), (OPTIMIZER_PREFIX, held.moments)):
        name = part_file(prefix, part)
        weights[name] = tensors
        headers[name] = part_header({key: held.shapes[key] for key in tensors}, held.rows)
    return replace(files, weights=weights, pickles=pickles, headers=headers, is_part=True)


def _without_shared(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous weights without second names for the same memory (tied weights)."""
    found: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in weights.items():
        found.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: weights[name].contiguous() for name in found.values()}


def _join_optimizer(moments: Mapping[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict, put together from its moments (INDEX.NAME) and the rest."""
    state: dict[int, dict[str, Any]] = {index: dict(v) for index, v in rest["state"].items()}
    for name in sorted(moments):
        index, _, key = name.partition(".")
        state[int(index)][key] = moments[name]
    return {**rest, "state": state}


@contextlib.contextmanager
def mapped_errors(checkpoint: Path, name: str) -> Iterator[None]:
    """Make whatever the libraries raise for a damaged file one error."""
    try:
        yield
    except Exception as exc:  # torch.load, safetensors and json raise many families
        raise UnreadableCheckpointError(
            f"{checkpoint.name}: {name} cannot be read: {first_line(exc)}"
        ) from exc


def require_file(checkpoint: Path, manifest: Manifest, name: str) -> None:
    """Refuse a file that the manifest does not name.

    Raises:
        UnreadableCheckpointError: It does not.
    """
    if name not in manifest.files:
        raise UnreadableCheckpointError(f"{checkpoint.name}: {name} is not in its manifest.")


def find_parts(checkpoint: Path, manifest: Manifest, prefix: str) -> list[Path]:
    """Return the files of all parts; none where the checkpoint has whole files.

    Raises:
        UnreadableCheckpointError: Some are missing.
    """
    with mapped_errors(checkpoint, f"{prefix}-part-*"):
        return [checkpoint / name for name in find_part_files(manifest.files, prefix)]


def read_weights(
    checkpoint: Path, manifest: Manifest, part: RowChoice | None = None
) -> dict[str, torch.Tensor]:
    """Return the weights: whole, or the rows of a part.

    Raises:
        UnreadableCheckpointError: A file is missing or cannot be read.
    """
    with contextlib.ExitStack() as stack:
        reader, source = _open_weights(checkpoint, manifest, stack, is_mapped=part is not None)
        with mapped_errors(checkpoint, source):
            return read_tensors(reader, part)


def read_average(checkpoints: Sequence[tuple[Path, Manifest]]) -> dict[str, torch.Tensor]:
    """Return the mean of the weights of verified checkpoints, in float32.

    One tensor of one of them is in memory at a time, besides the mean. What is no floating point
    number comes from the last one.

    Raises:
        UnreadableCheckpointError: A file is missing or cannot be read.
        CheckpointError: They are of models of other shapes.
    """
    with contextlib.ExitStack() as stack:
        readers = []
        for checkpoint, manifest in checkpoints:
            reader, _ = _open_weights(checkpoint, manifest, stack, is_mapped=True)
            readers.append(reader)
        shapes = [{name: reader.shape(name) for name in reader.names} for reader in readers]
        for (checkpoint, _), other in zip(checkpoints[1:], shapes[1:], strict=True):
            for name in sorted(shapes[0].keys() | other.keys()):
                one, two = (found.get(name, "not there") for found in (shapes[0], other))
                if one != two:
                    raise CheckpointError(
                        f"{checkpoints[0][0].name} and {checkpoint.name} have no mean: {name} is "
                        f"{one} in one, {two} in the other."
                    )
        return {name: _mean(name, readers) for name in shapes[0]}


def _mean(name: str, readers: Sequence[TensorReader]) -> torch.Tensor:
    last = readers[-1].read(name)
    if not last.is_floating_point():
        return last.clone()
    total = torch.zeros(last.shape)
    for reader in readers:
        total += reader.read(name)
    return total / len(readers)


def _open_weights(
    checkpoint: Path, manifest: Manifest, stack: contextlib.ExitStack, *, is_mapped: bool
) -> tuple[TensorReader, str]:
    """Return what reads the weights until `stack` closes it, and its files as messages name them.

    `is_mapped` maps a pickle into memory and does not read it.
    """
    parts = find_parts(checkpoint, manifest, MODEL_PREFIX)
    name = SAFE_WEIGHTS_FILE if SAFE_WEIGHTS_FILE in manifest.files else BIN_WEIGHTS_FILE
    if not parts:
        require_file(checkpoint, manifest, name)
    source = f"{MODEL_PREFIX}-part-*" if parts else name
    with mapped_errors(checkpoint, source):
        if parts:
            return PartFiles(parts, stack), source
        if name == SAFE_WEIGHTS_FILE:
            return WholeFile(checkpoint / name, stack), source
        return LoadedTensors(_load_pickle(checkpoint / name, is_mapped=is_mapped)), source


def read_optimizer(
    checkpoint: Path, manifest: Manifest, part: RowChoice | None = None
) -> dict[str, Any]:
    """Return the optimizer's state dict, its tensors whole or the rows of a part.

    Raises:
        UnreadableCheckpointError: A file is missing or cannot be read.
    """
    parts = find_parts(checkpoint, manifest, OPTIMIZER_PREFIX)
    name = OPTIMIZER_REST_FILE if parts else OPTIMIZER_FILE
    require_file(checkpoint, manifest, name)
    with mapped_errors(checkpoint, name):
        state: dict[str, Any] = _load_pickle(checkpoint / name, is_mapped=part is not None)
        if not parts:
            return state if part is None else _rows_of_optimizer(state, part)
    with mapped_errors(checkpoint, f"{OPTIMIZER_PREFIX}-part-*"), contextlib.ExitStack() as stack:
        return _join_optimizer(read_tensors(PartFiles(parts, stack), part), state)


def _load_pickle(path: Path, *, is_mapped: bool) -> Any:
    """Return a pickle's value; where it is mapped, its tensors are not read yet."""
    if not is_mapped:
        return load_tensors(path, map_location="cpu")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _rows_of_optimizer(optimizer: dict[str, Any], part: RowChoice) -> dict[str, Any]:
    """Return an optimizer's state with the rows of a part in place of whole tensors."""

    def rows(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return (value[slice(*part.rows_of(name, len(value)))] if value.dim() else value).clone()

    state = {
        index: {key: rows(f"{index}.{key}", value) for key, value in values.items()}
        for index, values in optimizer["state"].items()
    }
    return {**optimizer, "state": state}
