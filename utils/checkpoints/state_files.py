"""Weights and optimizer of a checkpoint: their files, whole or in parts; any rows of either.

    sharded model and optimizer -> files of this rank -> rows of any rank, or whole tensors

One process, or one of many that hold the same, writes `model.safetensors` (or `pytorch_model.bin`)
and `optimizer.bin`. Where ranks hold parts of the state, each writes its rows
(`utils/models/parts.py`), and `optimizer_rest.bin` has what `optimizer.bin` has besides: groups and
counters. Either kind can be read whole, or as the rows of one rank among any number: a sharded rank
reads its own from memory maps, and never the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load as load_tensors

from utils.base.errors import UnreadableCheckpointError, first_line
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
from utils.training.sharding import is_part, like_parameter, local_tensor

OPTIMIZER_FILE = "optimizer.bin"
OPTIMIZER_REST_FILE = "optimizer_rest.bin"
"""With parts: what `optimizer.bin` has besides the tensors that ranks hold rows of."""


def part_files(
    model: torch.nn.Module, optimizer: dict[str, Any], part: Part
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, str]]]:
    """Return (tensors, headers) of the files that a rank writes, by file name.

    Args:
        model: Sharded.
        optimizer: Its optimizer's state dict.
        part: Of this rank.
    """
    moments, _ = split_optimizer(optimizer)
    files, headers = {}, {}
    for prefix, tensors in (
        (MODEL_PREFIX, _without_second_names(model)),
        (OPTIMIZER_PREFIX, moments),
    ):
        name = part_file(prefix, part)
        held = _held_rows(tensors, part)
        files[name] = {key: local_tensor(tensor).contiguous() for key, tensor in held.items()}
        headers[name] = part_header({key: tuple(held[key].shape) for key in held}, part)
    return files, headers


def ranged_files(
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    rows: RowChoice,
    part: Part,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, str]]]:
    """Return (tensors, headers) of the files that a rank writes, by file name, of any rows.

    Args:
        weights: The rank's rows, by name.
        moments: The same of the optimizer, as INDEX.NAME.
        shapes: Of the whole tensors of both.
        rows: Where the rows of both belong.
        part: Which file is this rank's.
    """
    files, headers = {}, {}
    for prefix, held in ((MODEL_PREFIX, weights), (OPTIMIZER_PREFIX, moments)):
        name = part_file(prefix, part)
        files[name] = held
        headers[name] = part_header({key: shapes[key] for key in held}, rows)
    return files, headers


def split_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the sharded tensors of an optimizer's state, as INDEX.NAME, and all the rest."""
    moments, rest = {}, {}
    for index, values in state["state"].items():
        moments.update({f"{index}.{key}": v for key, v in values.items() if is_part(v)})
        rest[index] = {key: value for key, value in values.items() if not is_part(value)}
    return moments, {**state, "state": rest}


def _join_optimizer(moments: Mapping[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer; what `split_optimizer` does, undone."""
    state: dict[int, dict[str, Any]] = {index: dict(v) for index, v in rest["state"].items()}
    for name in sorted(moments):
        index, _, key = name.partition(".")
        state[int(index)][key] = moments[name]
    return {**rest, "state": state}


def _without_second_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's weights by their first names: tied ones have several."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _held_rows(tensors: Mapping[str, torch.Tensor], part: Part) -> dict[str, torch.Tensor]:
    """Return the tensors that this rank writes rows of: if it has any; rank 0 whole tensors too."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if (local_tensor(tensor).numel() if is_part(tensor) else part.rank == 0)
    }


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
    parts = find_parts(checkpoint, manifest, MODEL_PREFIX)
    name = SAFE_WEIGHTS_FILE if SAFE_WEIGHTS_FILE in manifest.files else BIN_WEIGHTS_FILE
    if not parts:
        require_file(checkpoint, manifest, name)
    source = f"{MODEL_PREFIX}-part-*" if parts else name
    with mapped_errors(checkpoint, source), contextlib.ExitStack() as stack:
        reader: TensorReader
        if parts:
            reader = PartFiles(parts, stack)
        elif name == SAFE_WEIGHTS_FILE:
            reader = WholeFile(checkpoint / name, stack)
        else:
            reader = LoadedTensors(_load_pickle(checkpoint / name, part))
        return read_tensors(reader, part)


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
        state: dict[str, Any] = _load_pickle(checkpoint / name, part)
        if not parts:
            return state if part is None else _rows_of_optimizer(state, part)
    with mapped_errors(checkpoint, f"{OPTIMIZER_PREFIX}-part-*"), contextlib.ExitStack() as stack:
        return _join_optimizer(read_tensors(PartFiles(parts, stack), part), state)


def _load_pickle(path: Path, part: RowChoice | None) -> Any:
    """Return a pickle's value; for a rank that takes rows of it, mapped and not read."""
    if part is None:
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


def restore_rows(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> None:
    """Bring this rank's rows into a sharded model."""
    own = _without_second_names(model)
    missing, unexpected = sorted(set(own) - set(rows)), sorted(set(rows) - set(own))
    if missing or unexpected:
        raise ValueError(f"missing weights {missing}, unexpected {unexpected}")
    for name, tensor in own.items():
        local = local_tensor(tensor.detach())
        if local.shape != rows[name].shape:
            raise ValueError(
                f"{name}: rows of shape {list(rows[name].shape)}, this rank has "
                f"{list(local.shape)} of {list(tensor.shape)}"
            )
        local.copy_(rows[name])


def as_sharded(optimizer: dict[str, Any], parameters: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return an optimizer's state of rows as one of tensors that are sharded as the weights are."""

    def convert(value: Any, parameter: torch.Tensor) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        if value.shape != local_tensor(parameter).shape:
            raise ValueError(f"moments of shape {list(value.shape)} for {list(parameter.shape)}")
        return like_parameter(value, parameter)

    state = {
        index: {key: convert(value, parameters[index]) for key, value in values.items()}
        for index, values in optimizer["state"].items()
    }
    return {**optimizer, "state": state}
