"""The files of a checkpoint, written, synced, hashed and sealed by a manifest; not yet committed.

    snapshot (host memory) -> temporary sibling of the checkpoint directory

The training process prepares a `CheckpointFiles`; whoever writes it (the writer process, or a
thread where there can be none) needs nothing else: no model, no optimizer, no configuration.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from utils.layout import (
    MANIFEST_FILE,
    METRICS_HISTORY_FILE,
    CheckpointName,
    FileEntry,
    Manifest,
    write_json,
)
from utils.storage import crc32c_of_file, fsync_directory


@dataclass(frozen=True)
class CheckpointFiles:
    """What a checkpoint consists of, by file name.

    Attributes:
        name: The checkpoint's name.
        manifest: The manifest without its files.
        weights: State dicts for safetensors: contiguous tensors, none of them twice.
        pickles: Objects for `torch.save`.
        documents: Objects for JSON; a tensor in them becomes a list of numbers, an object with
            `to_json` what that returns.
        raw: Bytes that are written as they are.
    """

    name: CheckpointName
    manifest: Manifest
    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    pickles: dict[str, Any] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Any, Any, Any]:
        """The parts that hold tensors."""
        return self.weights, self.pickles, self.documents

    def with_tensors(self, parts: tuple[Any, Any, Any]) -> CheckpointFiles:
        """Return the same files with other tensors, in the form of `tensors`."""
        weights, pickles, documents = parts
        return replace(self, weights=weights, pickles=pickles, documents=documents)


def write_files(files: CheckpointFiles, directory: Path) -> Manifest:
    """Write a checkpoint into `directory`, replacing what is there; return its manifest.

    Every file is synced and hashed from what was written; the manifest comes last.

    Raises:
        OSError: The disk is full or cannot be written. safetensors and torch raise errors of
            their own for that.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, data in files.raw.items():
        (directory / name).write_bytes(data)
    for name, document in files.documents.items():
        indent = None if name == METRICS_HISTORY_FILE else 1
        text = json.dumps(document, indent=indent, default=_to_plain)
        (directory / name).write_text(f"{text}\n", "utf-8")
    for name, weights in files.weights.items():
        from safetensors.torch import save_file

        save_file(weights, str(directory / name), metadata={"format": "pt"})
    for name, value in files.pickles.items():
        torch.save(value, directory / name)
    manifest = replace(files.manifest, files=_seal(directory))
    write_json(directory / MANIFEST_FILE, manifest.to_json())
    fsync_directory(directory)
    return manifest


def _to_plain(value: Any) -> object:
    if not isinstance(value, torch.Tensor):
        return value.to_json()
    numbers = value.tolist()
    if isinstance(numbers, list):
        return [number if math.isfinite(number) else None for number in numbers]
    return numbers if math.isfinite(numbers) else None


def _seal(directory: Path) -> dict[str, FileEntry]:
    """Sync every file of a directory and return its size and checksum."""
    files = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = FileEntry(path.stat().st_size, crc32c_of_file(path))
    return files
