"""How far the weights moved from one checkpoint to the next, layer by layer.

    weights of two checkpoints, whole or in parts -> norm, change, cosine, NaN a layer

Files are loaded only where they are what their manifest says, by crc32c, and pickles with
`weights_only`. Tensors are read one at a time from memory maps and summed in blocks of float64, so
host memory is bounded by one tensor of each checkpoint. torch and safetensors are imported when
weights are read and not before.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import CheckpointError, PretrainError
from utils.base.text import printable
from utils.checkpoints.layout import BIN_WEIGHTS_FILE, SAFE_WEIGHTS_FILE, Manifest
from utils.models.parts import MODEL_PREFIX, PartFiles, find_part_files
from utils.storage.bucket import crc32c_of_file

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = (SAFE_WEIGHTS_FILE, BIN_WEIGHTS_FILE)
BLOCK_ELEMENTS = 2**18  # 2 MiB of float64: a block stays in the cache
TOTAL = "total"

_LAYER = re.compile(r"(.*?\.\d+)\..*")
_LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    pickle.UnpicklingError,
)


@dataclass
class Drift:
    """Sums over the elements of a layer, and what follows from them.

    Elements that are not finite on either side are counted and take no part in the sums.

    Attributes:
        num_tensors: Tensors that both checkpoints have.
        num_elements: Elements of them.
        older_nonfinite: NaN and infinite elements of the older checkpoint.
        newer_nonfinite: The same in the newer one.
    """

    num_tensors: int = 0
    num_elements: int = 0
    older_nonfinite: int = 0
    newer_nonfinite: int = 0
    _older_squares: float = 0.0
    _newer_squares: float = 0.0
    _difference_squares: float = 0.0
    _products: float = 0.0

    def add(self, other: Drift) -> None:
        """Take in another one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, Any]:
        """Return the figures; None where one is not defined.

        `change` is the norm of the difference as a share of the older norm; `cosine` is that of the
        angle between the older and the newer weights.
        """
        older, newer = math.sqrt(self._older_squares), math.sqrt(self._newer_squares)
        cosine = self._products / (older * newer) if older and newer else None
        return {
            "num_tensors": self.num_tensors,
            "num_elements": self.num_elements,
            "older_norm": older,
            "norm": newer,
            "change": math.sqrt(self._difference_squares) / older if older else None,
            "cosine": None if cosine is None else max(-1.0, min(1.0, cosine)),
            "older_nan": self.older_nonfinite,
            "nan": self.newer_nonfinite,
        }


@dataclass
class DriftReport:
    """What became of every layer, in the order of their names, and what could not be compared."""

    layers: dict[str, Drift] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the layers, their total, and the problems."""
        total = Drift()
        for drift in self.layers.values():
            total.add(drift)
        rows = {name: drift.to_json() for name, drift in self.layers.items()}
        return {"layers": rows, TOTAL: total.to_json(), "problems": self.problems}


def layer_of(tensor: str) -> str:
    """Return the layer of a tensor: its name to the first number, else without its last part."""
    match = _LAYER.fullmatch(tensor)
    if match is not None:
        return match[1]
    return tensor.rpartition(".")[0] or tensor


def measure_drift(
    older: Path, older_manifest: Manifest, newer: Path, newer_manifest: Manifest
) -> DriftReport:
    """Compare the weights of two checkpoints.

    Args:
        older: Directory of the older one.
        older_manifest: Its manifest.
        newer: Directory of the newer one.
        newer_manifest: Its manifest.

    Raises:
        CheckpointError: Weights are missing, damaged, or cannot be read.
        PretrainError: torch or safetensors is not installed.
    """
    _require_libraries()
    report = DriftReport()
    with _Weights(older, older_manifest) as before, _Weights(newer, newer_manifest) as after:
        for name in sorted(before.names & after.names, key=_natural_order):
            left, right = before.read(name), after.read(name)
            if left.shape != right.shape:
                shapes = f"{list(left.shape)} and {list(right.shape)}"
                report.problems.append(f"{name} has other shapes: {shapes}")
                continue
            report.layers.setdefault(layer_of(name), Drift()).add(_drift_of(left, right))
        for names, where in (
            (before.names - after.names, older.name),
            (after.names - before.names, newer.name),
        ):
            alone = sorted(names, key=_natural_order)
            report.problems += [f"{name} is only in {where}" for name in alone]
    return report


def _require_libraries() -> None:
    try:
        import safetensors
        import torch

        del safetensors, torch
    except ImportError as exc:
        raise PretrainError(f"--weights needs torch and safetensors: {exc}.") from exc


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(part[:18]), part) if part.isdecimal() else (0, 0, part) for part in parts]


def _drift_of(left: torch.Tensor, right: torch.Tensor) -> Drift:
    """Return the drift of one tensor of any floating point type."""
    import torch

    drift = Drift(num_tensors=1, num_elements=left.numel())
    flat = (left.detach().reshape(-1), right.detach().reshape(-1))
    for begin in range(0, left.numel(), BLOCK_ELEMENTS):
        older, newer = (part[begin : begin + BLOCK_ELEMENTS].to(torch.float64) for part in flat)
        older_finite, newer_finite = torch.isfinite(older), torch.isfinite(newer)
        drift.older_nonfinite += older.numel() - int(older_finite.sum())
        drift.newer_nonfinite += newer.numel() - int(newer_finite.sum())
        usable = older_finite & newer_finite
        if not usable.all():
            older, newer = older[usable], newer[usable]
        difference = newer - older
        drift._older_squares += float(torch.dot(older, older))
        drift._newer_squares += float(torch.dot(newer, newer))
        drift._products += float(torch.dot(older, newer))
        drift._difference_squares += float(torch.dot(difference, difference))
    return drift


class _Weights(contextlib.ExitStack):
    """The weights of one checkpoint, open.

    Args:
        path: Its directory.
        manifest: Its manifest.

    Raises:
        CheckpointError: They are missing, damaged, or cannot be read.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__()
        self._read: Callable[[str], torch.Tensor]
        self._file = path / f"{MODEL_PREFIX}-part-*"
        with _mapped_errors(self._file):
            parts = [path / part for part in find_part_files(manifest.files, MODEL_PREFIX)]
            for part in parts:
                require_intact(part, manifest)
            if parts:
                reader = PartFiles(parts, self)
                self.names, self._read = set(reader.names), reader.read
                return
        name = next((name for name in WEIGHT_FILES if name in manifest.files), None)
        if name is None:
            raise CheckpointError(f"{path.name} has no weights ({' or '.join(WEIGHT_FILES)}).")
        self._file = path / name
        require_intact(self._file, manifest)
        with _mapped_errors(self._file):
            if self._file.suffix == ".safetensors":
                from safetensors import safe_open

                opened = self.enter_context(safe_open(str(self._file), framework="pt"))
                self.names, self._read = set(opened.keys()), opened.get_tensor
            else:
                tensors = _load_pickle(self._file)
                self.names, self._read = set(tensors), tensors.__getitem__

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        with _mapped_errors(self._file):
            tensor: torch.Tensor = self._read(name)
            return tensor


@contextlib.contextmanager
def _mapped_errors(file: Path) -> Iterator[None]:
    """Make whatever the libraries raise for a damaged file one error."""
    from safetensors import SafetensorError

    try:
        yield
    except (*_LOAD_ERRORS, SafetensorError) as exc:
        where = f"{file.parent.name}: {file.name}"
        raise CheckpointError(f"{where} cannot be read ({printable(exc)}).") from exc


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict; every one has to lie in the file."""
    import torch

    value = torch.load(file, "cpu", weights_only=True, mmap=True)
    if not isinstance(value, Mapping):
        raise ValueError("it holds no state dict")
    tensors = {str(name): item for name, item in value.items() if isinstance(item, torch.Tensor)}
    for name, tensor in tensors.items():
        # A view with strides of 0 can have more elements than any machine has memory.
        is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
        size = tensor.numel() * tensor.element_size()
        if not is_dense or size > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is no plain tensor")
    return tensors


def require_intact(file: Path, manifest: Manifest) -> None:
    """Refuse a file that is not what the manifest says.

    Raises:
        CheckpointError: It is missing, no regular file, or of another size or crc32c.
    """
    expected = manifest.files[file.name]
    try:
        facts = file.stat()
        is_intact = (
            stat.S_ISREG(facts.st_mode)
            and facts.st_size == expected.size
            and crc32c_of_file(file) == expected.crc32c
        )
    except OSError as exc:
        raise CheckpointError(
            f"{file.parent.name}: {file.name} cannot be read ({exc.strerror or exc})."
        ) from exc
    if not is_intact:
        raise CheckpointError(f"{file.parent.name}: {file.name} is not what its manifest says.")
