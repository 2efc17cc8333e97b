"""Can this machine do the run: memory of the device, host memory, disk."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.machine import available_memory, existing_parent
from utils.base.text import count_of, format_bytes
from utils.checkpoints.layout import RunPaths
from utils.data.shard_cache import token_dtype
from utils.data.shard_index import DataSource
from utils.models.estimates import (
    MemoryEstimate,
    ModelShape,
    StepSetup,
    estimate_training_memory,
)
from utils.start.checks import Check
from utils.start.facts import RunFacts
from utils.training.sharding import resolve_sharding
from utils.uploads.transports import TransportOptions

MEMORY_RESERVE = 0.95
FORMULA_TOLERANCE = 1.15


def estimate_memory(facts: RunFacts) -> MemoryEstimate:
    """Return what training takes on one device."""
    config, model_config = facts.config, facts.model_config
    how = resolve_sharding(config, facts.world_size)
    shape = ModelShape.of(model_config, facts.counts.total, facts.counts.embedding)
    return estimate_training_memory(
        shape,
        replace(
            StepSetup.of(
                config, shape.kind, facts.precision, facts.device.type, facts.accumulation
            ),
            world_size=facts.world_size,
            is_sharded=how is not None and not how.zero_stage,
            is_resharded=how is None or how.reshard_after_forward,
            zero_stage=0 if how is None else how.zero_stage,
        ),
    )


def find_free_memory(device: torch.device) -> tuple[int, str]:
    """Return (free bytes, where) of the memory that training on this device takes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    where = "the memory of this machine" + ("" if device.type == "mps" else " (no GPU)")
    local = ranks.ranks_on_this_machine()
    if local > 1:
        where += f", for each of {local} ranks"
    return available_memory() // local, where


def check_memory(
    config: TrainingConfig, need: MemoryEstimate, device: torch.device, ratio: float | None = None
) -> Check:
    """Compare the estimated memory of training with what the device has.

    `ratio` is measured over estimated memory of a small step, None where none was measured.
    """
    available, where = find_free_memory(device)
    # What the formula does not know of, it is not to be trusted with.
    total = need.total * (ratio if ratio is not None and ratio > FORMULA_TOLERANCE else 1.0)
    text = (
        f"about {format_bytes(total)} needed ({format_bytes(need.state + need.casts)} weights and "
        f"optimizer, {format_bytes(need.gradients)} gradients, {format_bytes(need.activations)} "
        f"activations, {format_bytes(need.logits)} logits, not all at once), "
        f"{format_bytes(available)} free in {where}"
    )
    if ratio is not None:
        text += f"; a small step took {ratio:.2f}x of its estimate"
    if total <= available * MEMORY_RESERVE:
        return Check("memory", "ok", text)
    advice = "Use a GPU with more memory"
    if need.state + need.gradients < available * MEMORY_RESERVE:
        advice += (
            ", lower per_device_train_batch_size, or set gradient_checkpointing=true "
            "(keep the step's size with global_batch_size)"
        )
    else:
        world_size = ranks.launched_world_size()
        if world_size > 1 and resolve_sharding(config, world_size) is None:
            advice += ", share the state among the ranks (--set sharding=fsdp2)"
        advice += ", or a smaller model (--set model=..., model_overrides.num_hidden_layers=...)"
    return Check("memory", "fail", f"{text}. {advice}.")


def check_snapshot(facts: RunFacts) -> Check:
    """Compare the host memory that a snapshot of the state takes with what is free."""
    if not facts.config.background_save:
        return Check("saving", "ok", "in the foreground: training waits for each checkpoint")
    need, free = facts.checkpoint_bytes, available_memory()
    text = f"{format_bytes(need)} of host memory for saves in the background, {format_bytes(free)}"
    if need <= free * MEMORY_RESERVE:
        return Check("saving", "ok", f"{text} free")
    return Check(
        "saving", "warn", f"{text} free: they go through a file in output_dir, which is slower"
    )


def check_folders(config: TrainingConfig) -> list[Check]:
    """Try to write where checkpoints, logs and shards go; return what fails.

    Nothing is left. A read-only or full disk, a quota, no inodes, a file in place of a folder: the
    system says which.
    """
    paths, found = RunPaths.of(config), []
    for key, path in (
        ("output_dir", paths.checkpoints),
        ("logging_dir", paths.logs),
        ("cache_dir", paths.cache),
    ):
        folder = existing_parent(path)
        try:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                file.write(b"\0")
        except OSError as exc:
            reason = exc.strerror or exc
            text = f"{folder} cannot be written: {reason}. Set {key} elsewhere."
            found.append(Check("disk", "fail", text))
    return found


def check_cache(config: TrainingConfig, sources: Sequence[DataSource], vocab_size: int) -> Check:
    """Compare what the largest shards of one shuffle window take with the space for the cache."""
    itemsize = np.dtype(token_dtype(vocab_size)).itemsize
    shards = [shard for source in sources for shard in source.index.training]
    sizes = sorted((shard.tokens * itemsize for shard in shards), reverse=True)
    window = sizes[: config.shuffle_window_shards]
    need = sum(window) + max((shard.size for shard in shards), default=0)
    cache = RunPaths.of(config).cache
    folder = existing_parent(cache)
    free = shutil.disk_usage(folder).free
    there = sum(path.stat().st_size for path in cache.glob("*/*.tokens"))
    text = (
        f"{format_bytes(need)} for a window of {count_of(len(window), 'shard')} and a download, "
        f"{format_bytes(free)} free in {folder}"
    )
    if free + there >= need:
        return Check("cache", "ok", text)
    advice = "Free some, lower shuffle_window_shards, or set cache_dir elsewhere."
    return Check("cache", "fail", f"{text}. {advice}")


def check_disk(facts: RunFacts, transport: TransportOptions | None) -> Check:
    """Compare the space that checkpoints take with what is free."""
    config, one = facts.config, facts.checkpoint_bytes
    has_archive = transport is not None and transport.name == "gsutil"
    copies = config.keep_checkpoints + 2 + has_archive  # the best, and one being written
    folder = existing_parent(RunPaths.of(config).checkpoints)
    free = shutil.disk_usage(folder).free
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < one:
        text = f"a checkpoint has files of up to {format_bytes(one)}, `ulimit -f` allows"
        return Check("disk", "fail", f"{text} {format_bytes(limit)}. Raise that limit.")
    text = f"{copies} x {format_bytes(one)} for checkpoints, {format_bytes(free)} free in {folder}"
    waiting = config.max_unverified if transport is not None else 0
    if free >= (copies + waiting) * one:
        return Check("disk", "ok", text)
    if free >= copies * one:
        text += f"; {waiting} more have no room while the bucket cannot be reached"
        return Check("disk", "warn", text)
    return Check(
        "disk", "fail", f"{text}. Free some, lower keep_checkpoints, or set output_dir elsewhere."
    )
