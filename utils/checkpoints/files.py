"""The files of a checkpoint, written, synced, hashed and sealed by a manifest; not yet committed.

    snapshot (host memory) -> temporary sibling of the checkpoint directory

The training process prepares a `CheckpointFiles`; whoever writes it (the writer process, or a
thread where there can be none) needs nothing else: no model, no optimizer, no configuration.
"""

from __future__ import annotations

import math
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from utils.checkpoints.layout import (
    MANIFEST_FILE,
    METRICS_HISTORY_FILE,
    CheckpointName,
    FileEntry,
    Manifest,
    json_file_text,
    write_json,
)
from utils.storage.bucket import crc32c_of_file, fsync_directory


@dataclass(frozen=True)
class CheckpointFiles:
    """What a checkpoint consists of, by file name.

    The manifest has no files yet. `weights` are state dicts for safetensors (contiguous tensors,
    none of them twice), with `headers` where theirs are not the usual one; `pickles` go to
    `torch.save`. In `documents`, which become JSON, a tensor is a list of numbers, and an object
    with `to_json` what that returns. `raw` is written as it is. With `is_part`, other ranks write
    the rest of the checkpoint into the same directory; the manifest comes when all have written.
    """

    name: CheckpointName
    manifest: Manifest
    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    pickles: dict[str, Any] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    is_part: bool = False

    @property
    def tensors(self) -> tuple[Any, Any, Any]:
        """The parts that hold tensors."""
        return self.weights, self.pickles, self.documents

    def with_tensors(self, parts: tuple[Any, Any, Any]) -> CheckpointFiles:
        """Return the same files with other tensors, in the form of `tensors`."""
        weights, pickles, documents = parts
        return replace(self, weights=weights, pickles=pickles, documents=documents)


def write_files(files: CheckpointFiles, directory: Path) -> Manifest:
    """Write a checkpoint, or a rank's part of one, into `directory`; return its manifest.

    Every file is synced and hashed from what was written; the manifest comes last. That of a part
    names its own files, and is not written: `seal` does that for all parts. A whole checkpoint
    replaces what is in the directory.

    Raises:
        OSError: The disk is full or cannot be written. safetensors and torch raise errors of
            their own for that.
    """
    if not files.is_part:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=files.is_part)
    for name, data in files.raw.items():
        (directory / name).write_bytes(data)
    for name, document in files.documents.items():
        indent = None if name == METRICS_HISTORY_FILE else 1
        text = json_file_text(document, indent=indent, default=_to_plain)
        (directory / name).write_text(text, "utf-8")
    for name, weights in files.weights.items():
        save_tensors(weights, directory / name, files.headers.get(name))
    for name, value in files.pickles.items():
        torch.save(value, directory / name)
    written = [*files.raw, *files.documents, *files.weights, *files.pickles]
    manifest = replace(files.manifest, files=sync_files(directory, written))
    if not files.is_part:
        seal(directory, manifest)
    return manifest


def save_tensors(
    weights: dict[str, torch.Tensor], path: Path, header: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, readable to those whom the umask allows.

    safetensors lets nobody but the owner read its files.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(weights, str(path), header or {"format": "pt"})
    path.chmod(stat.S_IMODE(mode))


def seal(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a directory whose files are all there, and sync the directory."""
    write_json(directory / MANIFEST_FILE, manifest.to_json())
    fsync_directory(directory)


def _to_plain(value: Any) -> object:
    if not isinstance(value, torch.Tensor):
        return value.to_json()
    numbers = value.tolist()
    if isinstance(numbers, list):
        return [number if math.isfinite(number) else None for number in numbers]
    return numbers if math.isfinite(numbers) else None


def sync_files(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Sync files of a directory and return their sizes and checksums."""
    files = {}
    for name in sorted(names):
        path = directory / name
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = FileEntry(path.stat().st_size, crc32c_of_file(path))
    return files
