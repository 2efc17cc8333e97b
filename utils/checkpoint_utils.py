"""Checkpoints: write, commit, restore.

    train state -> checkpoint directory (committed) -> restore -> train state

A checkpoint is written into a temporary sibling, every file synced and hashed, the manifest last,
then renamed: it is there whole or not at all. The files are those that stock
`Accelerator.load_state` and `AutoModelForCausalLM.from_pretrained` read, plus our own. The main
process writes alone; random states of all ranks are gathered to it.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load as load_tensors

from configs.training_config import TrainingConfig
from utils.checkpoint_metadata import build_metadata
from utils.data_state import DataState
from utils.errors import CheckpointError
from utils.layout import (
    DATA_STATE_FILE,
    MANIFEST_FILE,
    METADATA_FILE,
    METRICS_HISTORY_FILE,
    SAVING_PREFIX,
    TRAINING_CONFIG_FILE,
    CheckpointName,
    FileEntry,
    Manifest,
    RunIdentity,
    read_json,
    write_json,
)
from utils.ranks import gather_to_main
from utils.storage import crc32c_of_file, fsync_directory
from utils.training_utils import Progress, TrainState

OPTIMIZER_FILE = "optimizer.bin"
SCHEDULER_FILE = "scheduler.bin"
SCHEDULER_BACKUP_FILE = "scheduler_state.pt"
SCALER_FILE = "scaler.pt"
SAFE_WEIGHTS_FILE = "model.safetensors"
BIN_WEIGHTS_FILE = "pytorch_model.bin"

log = logging.getLogger(__name__)


def random_states_file(rank: int) -> str:
    """Return the name of a rank's random state file."""
    return f"random_states_{rank}.pkl"


def capture_random_state(state: TrainState) -> dict[str, Any]:
    """Return this rank's random states, in the form that Accelerate reads."""
    states: dict[str, Any] = {
        "step": state.accelerator.step,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["torch_cuda_manual_seed"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_state(states: Mapping[str, Any]) -> None:
    """Bring back what `capture_random_state` returned."""
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if torch.cuda.is_available() and "torch_cuda_manual_seed" in states:
        torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"])


def save_checkpoint(
    state: TrainState,
    data_state: DataState,
    config: TrainingConfig,
    identity: RunIdentity,
    directory: Path,
    tokenizer_files: Mapping[str, bytes],
) -> Path | None:
    """Write and commit a checkpoint of the state as it is.

    Args:
        state: What to save; every rank calls this.
        data_state: Position in the data.
        config: The run's configuration.
        identity: Run id and branch.
        directory: Where checkpoints lie.
        tokenizer_files: File name -> bytes, copied in so that `AutoTokenizer` loads.

    Returns:
        The checkpoint's directory on the main process, None on the others.

    Raises:
        CheckpointError: It could not be written; what was begun is removed.
    """
    gathered = gather_to_main((capture_random_state(state), state.interval_loss.item()))
    if gathered is None:
        return None
    random_states = [states for states, _ in gathered]
    interval_losses = [loss for _, loss in gathered]
    name = CheckpointName(state.progress.step, data_state.epoch, data_state.files_consumed)
    target = directory / str(name)
    temporary = directory / f"{SAVING_PREFIX}{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_tensors(state, temporary, config.save_format, random_states)
        _write_facts(state, data_state, config, identity, temporary, interval_losses)
        for file_name, data in tokenizer_files.items():
            (temporary / file_name).write_bytes(data)
        manifest = Manifest(
            identity.run_id, name.step, identity.branch, len(random_states), _seal(temporary)
        )
        write_json(temporary / MANIFEST_FILE, manifest.to_json())
        fsync_directory(temporary)
        temporary.rename(target)
        fsync_directory(directory)
    except Exception as exc:  # safetensors and torch wrap a full disk in errors of their own
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(directory).free / 2**20
        reason = getattr(exc, "strerror", None) or exc
        raise CheckpointError(
            f"{name} could not be saved: {reason} ({free:.0f} MiB free in {directory}). Older "
            "checkpoints are intact."
        ) from exc
    return target


def _write_tensors(
    state: TrainState, directory: Path, save_format: str, random_states: list[Any]
) -> None:
    model: Any = state.core_model
    if save_format == "safetensors":
        from safetensors.torch import save_model

        save_model(model, str(directory / SAFE_WEIGHTS_FILE), metadata={"format": "pt"})
    else:
        torch.save(model.state_dict(), directory / BIN_WEIGHTS_FILE)
    torch.save(state.optimizer.state_dict(), directory / OPTIMIZER_FILE)
    torch.save(state.scheduler.state_dict(), directory / SCHEDULER_FILE)
    torch.save(
        {
            "step": state.progress.step,
            "learning_rate": state.learning_rate,
            "scheduler": state.scheduler.state_dict(),
        },
        directory / SCHEDULER_BACKUP_FILE,
    )
    if state.accelerator.scaler is not None:
        torch.save(state.accelerator.scaler.state_dict(), directory / SCALER_FILE)
    for rank, states in enumerate(random_states):
        torch.save(states, directory / random_states_file(rank))
    model.config.save_pretrained(directory)
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        generation_config.save_pretrained(directory)


def _write_facts(
    state: TrainState,
    data_state: DataState,
    config: TrainingConfig,
    identity: RunIdentity,
    directory: Path,
    interval_losses: list[float],
) -> None:
    write_json(directory / TRAINING_CONFIG_FILE, config.to_json())
    # JSON keeps every float exactly; a float32 is a float.
    progress = {**asdict(state.progress), "interval_losses": interval_losses}
    history = progress.pop("history")
    write_json(directory / METRICS_HISTORY_FILE, {**history, "progress": progress}, indent=None)
    write_json(directory / DATA_STATE_FILE, data_state.to_json())
    metadata = build_metadata(state, data_state, config, identity)
    write_json(directory / METADATA_FILE, metadata)


def _seal(directory: Path) -> dict[str, FileEntry]:
    """Sync every file of a directory and return its size and checksum."""
    files = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = FileEntry(path.stat().st_size, crc32c_of_file(path))
    return files


def restore_checkpoint(
    state: TrainState, checkpoint: Path, manifest: Manifest, config: TrainingConfig
) -> None:
    """Bring back everything that `save_checkpoint` wrote, on this rank.

    The learning rate follows the current configuration's schedule at the restored step. With
    another number of ranks than the checkpoint's, each rank's random state is seeded from
    (seed, step, rank) instead.

    Raises:
        CheckpointError: A file is missing or does not fit this model or optimizer.
    """
    try:
        _load_weights(state, checkpoint)
        optimizer_state = load_tensors(checkpoint / OPTIMIZER_FILE, map_location="cpu")
        state.optimizer.load_state_dict(optimizer_state)
        state.scheduler.load_state_dict(load_tensors(checkpoint / SCHEDULER_FILE))
        if state.accelerator.scaler is not None and (checkpoint / SCALER_FILE).is_file():
            state.accelerator.scaler.load_state_dict(load_tensors(checkpoint / SCALER_FILE))
        _restore_progress(state, checkpoint)
        _restore_settings(state, config)
        _restore_rank(state, checkpoint, manifest, config)
    except CheckpointError:
        raise
    except Exception as exc:  # torch.load and load_state_dict raise many families
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise CheckpointError(f"{checkpoint.name} cannot be loaded: {reason}") from exc


def _load_weights(state: TrainState, checkpoint: Path) -> None:
    model = state.core_model
    if (checkpoint / SAFE_WEIGHTS_FILE).is_file():
        from safetensors.torch import load_model

        load_model(model, str(checkpoint / SAFE_WEIGHTS_FILE), strict=True)
    else:
        model.load_state_dict(load_tensors(checkpoint / BIN_WEIGHTS_FILE, map_location="cpu"))


def _restore_progress(state: TrainState, checkpoint: Path) -> None:
    history = read_json(checkpoint / METRICS_HISTORY_FILE)
    progress = history.pop("progress")
    losses = progress.pop("interval_losses")
    same_ranks = len(losses) == state.accelerator.num_processes
    rank = state.accelerator.process_index
    state.interval_loss.fill_(losses[rank] if same_ranks else sum(losses) / len(losses))
    state.progress = Progress(**progress, history=history)


def _restore_settings(state: TrainState, config: TrainingConfig) -> None:
    """Put the configuration's settings back over the saved ones: they may have been changed."""
    groups = state.optimizer.param_groups
    state.scheduler.base_lrs = [config.learning_rate] * len(groups)
    for group, factor in zip(groups, state.scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = config.learning_rate
        group["lr"] = config.learning_rate * factor(state.scheduler.last_epoch)
        group["betas"] = (config.adam_beta1, config.adam_beta2)
        group["eps"] = config.adam_epsilon
        # Only matrices decay (`build_optimizer`).
        group["weight_decay"] = config.weight_decay if group is groups[0] else 0.0


def _restore_rank(
    state: TrainState, checkpoint: Path, manifest: Manifest, config: TrainingConfig
) -> None:
    rank, world_size = state.accelerator.process_index, state.accelerator.num_processes
    if world_size == manifest.world_size:
        restore_random_state(load_tensors(checkpoint / random_states_file(rank)))
        return
    if rank == 0:
        log.warning(
            "%s was written by %d ranks, now there are %d: the data go on exactly, random states "
            "are seeded anew from (seed, step, rank).",
            checkpoint.name,
            manifest.world_size,
            world_size,
        )
    words = np.random.SeedSequence([config.seed, manifest.step, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def read_data_state(checkpoint: Path) -> DataState:
    """Return the position in the data of a checkpoint.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return DataState.from_json(read_json(checkpoint / DATA_STATE_FILE))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(f"{checkpoint.name}: {DATA_STATE_FILE} cannot be read.") from exc
