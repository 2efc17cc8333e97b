"""A checkpoint that ranks wrote in parts, as one process would have written it.

    checkpoint in parts, verified -> whole files, the others copied -> committed elsewhere

A committed checkpoint never changes: the whole one lies in another directory, under the same name.
Transformers loads it, and a run goes on from it by path. Weights and optimizer are in host memory
one after the other, so two thirds of a checkpoint's size are enough.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from utils.base.errors import CheckpointError
from utils.checkpoints.files import seal, sync_files, write_durably, write_tensors
from utils.checkpoints.layout import SAFE_WEIGHTS_FILE, SAVING_PREFIX, Manifest
from utils.checkpoints.state_files import (
    OPTIMIZER_FILE,
    OPTIMIZER_REST_FILE,
    read_optimizer,
    read_weights,
)
from utils.checkpoints.store import verify_checkpoint
from utils.models.parts import MODEL_PREFIX, OPTIMIZER_PREFIX, find_part_files
from utils.storage.bucket import fsync_directory


def consolidate(checkpoint: Path, output: Path) -> Path:
    """Write a checkpoint in parts as a whole one; return where it is.

    The checkpoint is verified first.

    Raises:
        CheckpointError: It is damaged, has no parts, or is there already.
        OSError: The disk is full or cannot be written.
    """
    manifest = verify_checkpoint(checkpoint)
    parts = _part_names(checkpoint, manifest)
    target = output / checkpoint.name
    if target.exists():
        raise CheckpointError(f"{target} is there already. Remove it, or choose another --output.")
    temporary = output / f"{SAVING_PREFIX}{checkpoint.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_whole(checkpoint, manifest, parts, temporary)
        temporary.rename(target)
        fsync_directory(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _part_names(checkpoint: Path, manifest: Manifest) -> set[str]:
    """Return the names of the files that whole files replace."""
    try:
        weights = find_part_files(manifest.files, MODEL_PREFIX)
        moments = find_part_files(manifest.files, OPTIMIZER_PREFIX)
    except ValueError as exc:
        raise CheckpointError(f"{checkpoint.name}: {exc}.") from exc
    if not weights:
        raise CheckpointError(
            f"{checkpoint.name} is not in parts: there is nothing to put together."
        )
    return {*weights, *moments, OPTIMIZER_REST_FILE}


def _write_whole(checkpoint: Path, manifest: Manifest, parts: set[str], directory: Path) -> None:
    kept = manifest.files.keys() - parts
    for name in kept:
        shutil.copyfile(checkpoint / name, directory / name)
    files = sync_files(directory, kept)
    for name, read, write in (
        (SAFE_WEIGHTS_FILE, read_weights, write_tensors),
        (OPTIMIZER_FILE, read_optimizer, torch.save),
    ):
        files[name] = write_durably(directory / name, partial(write, read(checkpoint, manifest)))
    seal(directory, replace(manifest, files=dict(sorted(files.items()))))
