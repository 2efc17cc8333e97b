"""Files of tensors that ranks have written in parts, and files of whole tensors, read as one thing.

    rows of this rank -> PREFIX-part-00001-of-00004.safetensors -> rows of any rank, or all of them

A tensor is divided along its first dimension as torch's fully_shard does it: into parts of the same
number of rows, rounded up; the last ones may have fewer, or none. A part says in its header where
its rows belong, in the form of torch's HuggingFaceStorageWriter, so that torch's own
HuggingFaceStorageReader reads a directory of parts too, at any number of ranks. No part is a
pickle, and rows are read from memory maps: a rank that restores reads its own alone. torch and
safetensors are imported when tensors are read and not before.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.text import parse_json

if TYPE_CHECKING:
    import torch

MODEL_PREFIX = "model"
OPTIMIZER_PREFIX = "optimizer"
OFFSETS_HEADER = "DCP_SHARDING_INFO"

_PART_FILE = re.compile(r"([a-z]+)-part-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Part:
    """Which part of the state a rank holds.

    `rank` counts from 0.
    """

    rank: int
    count: int

    def rows_of(self, name: str, length: int) -> tuple[int, int]:
        """Return (first, one after the last) of the rows of any tensor of `length` rows."""
        size = -(-length // self.count)
        return min(self.rank * size, length), min((self.rank + 1) * size, length)


@dataclass(frozen=True)
class RowRanges:
    """Rows of each tensor, where they are not those that fully_shard gives a rank.

    `ranges` are (first, one after the last) by name; tensors that are not named are whole.
    """

    ranges: Mapping[str, tuple[int, int]]

    def rows_of(self, name: str, length: int) -> tuple[int, int]:
        """Return the rows of a tensor."""
        return self.ranges.get(name, (0, length))


RowChoice = Part | RowRanges


def part_file(prefix: str, part: Part) -> str:
    """Return the name of the file with a rank's part."""
    return f"{prefix}-part-{part.rank + 1:05d}-of-{part.count:05d}.safetensors"


def find_part_files(names: Iterable[str], prefix: str) -> list[str]:
    """Return the files of all parts, in their order; none where there are none.

    Raises:
        ValueError: Some are missing, or they are of two different divisions.
    """
    matches = [match for match in map(_PART_FILE.fullmatch, names) if match and match[1] == prefix]
    found = sorted(match[0] for match in matches)
    if found:
        count = int(matches[0][3])
        if found != [part_file(prefix, Part(rank, count)) for rank in range(count)]:
            raise ValueError(f"of {count} parts of {prefix} there are only {', '.join(found)}")
    return found


def part_header(shapes: Mapping[str, tuple[int, ...]], part: RowChoice) -> dict[str, str]:
    """Return the header of a part's file: one entry, safetensors writes several in any order.

    `shapes` are those of the whole tensors that the file has rows of. A scalar is whole.
    """
    info = {
        name: {
            "saved_offsets": [part.rows_of(name, shape[0])[0], *[0] * (len(shape) - 1)]
            if shape
            else [],
            "shape": list(shape),
        }
        for name, shape in shapes.items()
    }
    return {OFFSETS_HEADER: json.dumps(info)}


class WholeFile:
    """A safetensors file of whole tensors.

    `stack` closes it.
    """

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._file = _open(path, stack)
        self.names = list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a tensor, or some of its rows."""
        tensor: torch.Tensor = (
            self._file.get_tensor(name) if rows is None else _rows(self._file, name, *rows)
        )
        return tensor


@dataclass(frozen=True)
class _Piece:
    file: Any
    begin: int
    end: int


class PartFiles:
    """The files of all parts.

    `paths` are those that `find_part_files` found; `stack` closes them.

    Raises:
        ValueError: They do not make up whole tensors.
    """

    def __init__(self, paths: Iterable[Path], stack: contextlib.ExitStack) -> None:
        self._pieces: dict[str, list[_Piece]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            self._add(_open(path, stack), path.name)
        for name, pieces in self._pieces.items():
            self._require_whole(name, pieces)
        self.names = list(self._pieces)

    def _add(self, file: Any, source: str) -> None:
        info = parse_json((file.metadata() or {}).get(OFFSETS_HEADER, "{}"))
        for name in file.keys():  # noqa: SIM118 - not a dict
            held = tuple(file.get_slice(name).get_shape())
            shape = tuple(int(size) for size in info[name]["shape"])
            begin = int(info[name]["saved_offsets"][0]) if shape else 0
            if held[1:] != shape[1:] or self._shapes.setdefault(name, shape) != shape:
                raise ValueError(f"{source}: {name} has another shape than in other parts")
            self._pieces.setdefault(name, []).append(
                _Piece(file, begin, begin + held[0] if shape else 1)
            )

    def _require_whole(self, name: str, pieces: list[_Piece]) -> None:
        end = 0
        for piece in sorted(pieces, key=lambda piece: piece.begin):
            if piece.begin != end:
                raise ValueError(f"rows {end} to {piece.begin} of {name} are in no part, or twice")
            end = piece.end
        if end != (self._shapes[name] or (1,))[0]:
            raise ValueError(f"rows {end} and more of {name} are in no part")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self._shapes[name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a whole tensor, or some of its rows."""
        import torch

        pieces, shape = self._pieces[name], self._shapes[name]
        if not shape:
            scalar: torch.Tensor = pieces[0].file.get_tensor(name)
            return scalar
        begin, end = (0, shape[0]) if rows is None else rows
        parts = [
            _rows(
                piece.file,
                name,
                max(begin, piece.begin) - piece.begin,
                min(end, piece.end) - piece.begin,
            )
            for piece in sorted(pieces, key=lambda piece: piece.begin)
            if piece.begin < end and begin < piece.end
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else _rows(pieces[0].file, name, 0, 0)


class LoadedTensors:
    """Tensors of a pickle that is mapped into memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.names = list(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a tensor, or some of its rows; other rows are not kept in memory."""
        tensor = self._tensors[name]
        return tensor if rows is None else tensor[slice(*rows)].clone()


TensorReader = WholeFile | PartFiles | LoadedTensors


def read_tensors(reader: TensorReader, part: RowChoice | None) -> dict[str, torch.Tensor]:
    """Return all tensors, whole or, of those with rows, the rows of a part."""
    found = {}
    for name in reader.names:
        shape = reader.shape(name)
        rows = part.rows_of(name, shape[0]) if part is not None and shape else None
        found[name] = reader.read(name, rows)
    return found


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    from safetensors import safe_open

    return stack.enter_context(safe_open(str(path), framework="pt"))


def _rows(file: Any, name: str, begin: int, end: int) -> torch.Tensor:
    tensor: torch.Tensor = file.get_slice(name)[begin:end]
    return tensor
