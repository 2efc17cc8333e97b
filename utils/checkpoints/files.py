"""The files of a checkpoint, written, synced, hashed and sealed by a manifest; not yet committed.

    snapshot (host memory) -> temporary sibling of the checkpoint directory

The training process prepares a `CheckpointFiles`; whoever writes it (the writer process, or a
thread where there can be none) needs nothing else: no model, no optimizer, no configuration.
"""

from __future__ import annotations

import errno
import io
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import TensorSpec

from utils.base.files import pass_by_cache
from utils.checkpoints.layout import (
    MANIFEST_FILE,
    METRICS_HISTORY_FILE,
    CheckpointName,
    FileEntry,
    Manifest,
    json_file_text,
    write_json,
)
from utils.storage.bucket import crc32c_of_file, encode_crc32c, fsync_directory

DIRECT_BLOCK_BYTES = 4 * 2**20
# Copied for the hash, which takes only `bytes`: within a cache of the core.
HASHED_BYTES = 256 * 1024


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
        OSError: The disk is full or cannot be written.
    """
    if not files.is_part:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=files.is_part)
    data = dict(files.raw)
    for name, document in files.documents.items():
        indent = None if name == METRICS_HISTORY_FILE else 1
        data[name] = json_file_text(document, indent=indent, default=_to_plain).encode()
    writes: dict[str, Callable[[DurableFile], object]] = {
        **{name: methodcaller("write", content) for name, content in data.items()},
        **{
            name: partial(write_tensors, weights, header=files.headers.get(name))
            for name, weights in files.weights.items()
        },
        **{name: partial(torch.save, value) for name, value in files.pickles.items()},
    }
    written = {name: write_durably(directory / name, write) for name, write in writes.items()}
    manifest = replace(files.manifest, files=dict(sorted(written.items())))
    if not files.is_part:
        seal(directory, manifest)
    return manifest


class DurableFile:
    """A new file whose bytes go past the page cache to the disk, hashed on the way.

    The end, which fills no block, goes through the cache, and so does everything where the file
    system refuses the other way.

    Errors of the disk wait for `finish`: within torch.save, torch's own ("unexpected pos"), raised
    as its writer is closed, would take their place.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._block = mmap.mmap(-1, DIRECT_BLOCK_BYTES)  # aligned to pages, as O_DIRECT wants it
        self._filled = self._size = self._checksum = 0
        self._error: OSError | None = None
        self._is_direct = pass_by_cache(file)

    def write(self, data: bytes | memoryview) -> int:
        """Take bytes; return their number."""
        rest = memoryview(data)
        while len(rest) and self._error is None:
            end = min(self._filled + len(rest), DIRECT_BLOCK_BYTES)
            taken = end - self._filled
            self._block[self._filled : end] = rest[:taken]
            self._filled, rest = end, rest[taken:]
            if end == DIRECT_BLOCK_BYTES:
                self._write_block()
        return len(data)

    def flush(self) -> None:
        """Do nothing: `finish` does."""

    def finish(self) -> FileEntry:
        """Write the end and sync; return size and checksum.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        if self._error is None:
            self._is_direct = pass_by_cache(self._file, is_wanted=False)
            self._write_block()
        if self._error is not None:
            raise self._error
        os.fsync(self._file.fileno())
        return FileEntry(self._size, encode_crc32c(self._checksum))

    def _write_block(self) -> None:
        with memoryview(self._block)[: self._filled] as block:
            for start in range(0, len(block), HASHED_BYTES):
                piece = bytes(block[start : start + HASHED_BYTES])
                self._checksum = google_crc32c.extend(self._checksum, piece)
            try:
                self._write_all(block)
            except OSError as exc:
                self._error = exc
        self._size += self._filled
        self._filled = 0

    def _write_all(self, rest: memoryview) -> None:
        while len(rest):
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as exc:
                if exc.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._is_direct = pass_by_cache(self._file, is_wanted=False)


def write_durably(path: Path, write: Callable[[DurableFile], object]) -> FileEntry:
    """Write a file by what `write` writes into it, synced; return its size and checksum.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    with path.open("wb", buffering=0) as raw:
        file = DurableFile(raw)
        write(file)
        return file.finish()


def write_tensors(
    weights: dict[str, torch.Tensor], file: DurableFile, header: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors does, which writes to paths alone.

    The format: https://huggingface.co/docs/safetensors. The largest elements come first, so that
    all are aligned.
    """
    order = sorted(weights, key=lambda name: (-weights[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": header or {"format": "pt"}}
    end = 0
    for name in order:
        tensor = weights[name]
        begin, end = end, end + tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.")
        spec = TensorSpec(dtype=dtype, shape=tensor.shape, data_ptr=0, data_len=tensor.nbytes)
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(weights[name].cpu().reshape(-1).view(torch.uint8).numpy().data)


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
