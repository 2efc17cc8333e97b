"""Checkpoints: write, commit, verify, restore, set aside.

    train state -> checkpoint directory (committed) -> restore -> train state

A checkpoint is written into a temporary sibling, every file synced and hashed, the manifest last,
then renamed: it is there whole or not at all. The files are those that stock
`Accelerator.load_state` and `AutoModelForCausalLM.from_pretrained` read, plus our own. The main
process writes alone; random states of all ranks are gathered to it. A committed checkpoint never
changes; deleting one removes its manifest first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load as load_tensors
from filelock import FileLock, Timeout

from configs.training_config import PROJECT_DIRECTORY, TrainingConfig
from utils.data_utils import DataState
from utils.errors import CheckpointError, LockedError
from utils.journal import Journal, UploadState
from utils.layout import (
    ARCHIVE_SUFFIX,
    DATA_STATE_FILE,
    MANIFEST_FILE,
    METADATA_FILE,
    METRICS_HISTORY_FILE,
    SAVING_PREFIX,
    SET_ASIDE_FOLDER,
    TRAINING_CONFIG_FILE,
    CheckpointName,
    FileEntry,
    Manifest,
    RunPaths,
    find_checkpoints,
    free_name,
    parse_checkpoint_name,
    read_json,
    read_manifest,
    write_json,
)
from utils.metadata import HISTORY_LIMIT, find_best, loss_trend, read_local_checkpoints
from utils.ranks import gather_to_main
from utils.retention import Action, CheckpointFacts, plan_retention
from utils.storage import crc32c_of_file, fsync_directory
from utils.training_utils import Progress, TrainState

OPTIMIZER_FILE = "optimizer.bin"
SCHEDULER_FILE = "scheduler.bin"
SCHEDULER_BACKUP_FILE = "scheduler_state.pt"
SCALER_FILE = "scaler.pt"
SAFE_WEIGHTS_FILE = "model.safetensors"
BIN_WEIGHTS_FILE = "pytorch_model.bin"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunIdentity:
    """Which run a checkpoint belongs to.

    Attributes:
        run_id: Id of the run.
        branch: How often it was resumed from an older checkpoint than its newest.
    """

    run_id: str
    branch: int = 0


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
    random_states = gather_to_main(capture_random_state(state))
    if random_states is None:
        return None
    name = CheckpointName(state.progress.step, data_state.epoch, data_state.files_consumed)
    target = directory / str(name)
    temporary = directory / f"{SAVING_PREFIX}{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_tensors(state, temporary, config.save_format, random_states)
        _write_facts(state, data_state, config, identity, temporary)
        for file_name, data in tokenizer_files.items():
            (temporary / file_name).write_bytes(data)
        manifest = Manifest(
            identity.run_id, name.step, identity.branch, len(random_states), _seal(temporary)
        )
        write_json(temporary / MANIFEST_FILE, manifest.to_json())
        fsync_directory(temporary)
        temporary.rename(target)
        fsync_directory(directory)
    except OSError as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(directory).free / 2**20
        raise CheckpointError(
            f"{name} could not be saved: {exc.strerror or exc} ({free:.0f} MiB free in "
            f"{directory}). Older checkpoints are intact."
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
) -> None:
    write_json(directory / TRAINING_CONFIG_FILE, config.to_json())
    # JSON keeps every float exactly; a float32 is a float.
    progress = {**asdict(state.progress), "interval_loss": state.interval_loss.item()}
    history = progress.pop("history")
    write_json(directory / METRICS_HISTORY_FILE, {**history, "progress": progress}, indent=None)
    write_json(directory / DATA_STATE_FILE, data_state.to_json())
    metadata = build_metadata(state, data_state, config, identity)
    write_json(directory / METADATA_FILE, metadata)


def build_metadata(
    state: TrainState, data_state: DataState, config: TrainingConfig, identity: RunIdentity
) -> dict[str, Any]:
    """Return what `metadata.json` says of the state as it is."""
    progress = state.progress
    losses = progress.history["loss_history"]
    best = progress.best_validation_loss
    return {
        "step": progress.step,
        "epoch": data_state.epoch,
        "current_loss": losses[-1] if losses else None,
        "best_loss": progress.best_loss,
        "loss_history": losses[-HISTORY_LIMIT:],
        "learning_rates": progress.history["learning_rates"][-HISTORY_LIMIT:],
        "validation_metrics": {
            "current_avg_loss": losses[-1] if losses else None,
            "steps_since_best": progress.step - progress.best_loss_step,
            "loss_trend": loss_trend(losses),
            "validation_loss": progress.validation_loss,
            "perplexity": _perplexity(progress.validation_loss),
            "best_validation_loss": best,
        },
        "training_progress": {
            "completed_steps": progress.step,
            "total_epochs": data_state.epoch,
            "files_processed": data_state.files_consumed,
            "max_steps": config.max_steps,
            "tokens_seen": progress.tokens_seen,
            "samples_seen": progress.sample_index,
            "global_batch_size": progress.global_batch_size,
            "tokens_per_second": (progress.history["tokens_per_second"] or [None])[-1],
        },
        "system_info": system_info(state),
        "timestamp": datetime.now(timezone.utc).isoformat(),
        "run_id": identity.run_id,
        "git_commit": git_commit(),
    }


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else float(np.exp(min(loss, 700.0)))


def system_info(state: TrainState) -> dict[str, Any]:
    """Return the machine and the versions, for `metadata.json`."""
    import accelerate
    import transformers

    device = state.accelerator.device
    return {
        "cuda_available": torch.cuda.is_available(),
        "device_count": torch.cuda.device_count(),
        "mixed_precision": state.accelerator.mixed_precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world_size": state.accelerator.num_processes,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "num_parameters": sum(p.numel() for p in state.core_model.parameters()),
    }


def git_commit() -> str | None:
    """Return the commit of this project's checkout, None where there is none."""
    try:
        result = subprocess.run(  # noqa: S603
            ["git", "-C", str(PROJECT_DIRECTORY), "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _seal(directory: Path) -> dict[str, FileEntry]:
    """Sync every file of a directory and return its size and checksum."""
    files = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = FileEntry(path.stat().st_size, crc32c_of_file(path))
    return files


def verify_checkpoint(checkpoint: Path) -> Manifest:
    """Return the manifest after comparing every file with it.

    Raises:
        CheckpointError: The checkpoint is incomplete or a file is not what was written.
    """
    manifest = read_manifest(checkpoint)
    for name, entry in manifest.files.items():
        path = checkpoint / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{checkpoint.name}: {name} is missing.")
        size = path.stat().st_size
        if size != entry.size:
            raise CheckpointError(
                f"{checkpoint.name}: {name} has {size} bytes, its manifest says {entry.size}."
            )
        if crc32c_of_file(path) != entry.crc32c:
            raise CheckpointError(
                f"{checkpoint.name}: {name} is damaged (its crc32c is not the manifest's)."
            )
    return manifest


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
        _restore_learning_rate(state)
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
    state.interval_loss.fill_(progress.pop("interval_loss"))
    state.progress = Progress(**progress, history=history)


def _restore_learning_rate(state: TrainState) -> None:
    """Set the coming step's rate by the schedule as it is now; it may be longer than it was."""
    for group, base, factor in zip(
        state.optimizer.param_groups,
        state.scheduler.base_lrs,
        state.scheduler.lr_lambdas,
        strict=True,
    ):
        group["lr"] = base * factor(state.scheduler.last_epoch)


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


@contextlib.contextmanager
def hold_output_directory(paths: RunPaths) -> Iterator[None]:
    """Hold the output directory of a run, so that no other trainer works in it.

    Raises:
        LockedError: A live process holds it; the message names it.
    """
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    owner = paths.lock.with_suffix(".owner")
    lock = FileLock(paths.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout as exc:
        holder = owner.read_text("utf-8").strip() if owner.is_file() else "unknown process"
        raise LockedError(
            f"{paths.checkpoints} is in use by another trainer ({holder}). "
            "Wait for it, or choose another --set output_dir or run_name."
        ) from exc
    try:
        owner.write_text(f"process {os.getpid()} on {platform.node()}\n", "utf-8")
        yield
    finally:
        lock.release()


def remove_leftovers(directory: Path) -> None:
    """Remove what an interrupted save, archive or deletion left behind."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name.startswith(SAVING_PREFIX) and path.is_dir():
            log.info("Removing %s, left by an interrupted save.", path.name)
            shutil.rmtree(path, ignore_errors=True)
        elif parse_checkpoint_name(path.name.removesuffix(ARCHIVE_SUFFIX)) and path.is_file():
            log.info("Removing %s, left by an interrupted upload.", path.name)
            path.unlink()


def find_latest(directory: Path) -> Path | None:
    """Return the checkpoint of the highest step that verifies; set aside those that do not."""
    for name in reversed(find_checkpoints(directory)):
        checkpoint = directory / str(name)
        try:
            verify_checkpoint(checkpoint)
        except CheckpointError as exc:
            moved = set_aside(checkpoint, directory)
            log.warning("%s It was set aside as %s; trying the one before.", exc, moved)
        else:
            return checkpoint
    return None


def set_aside(checkpoint: Path, directory: Path) -> Path:
    """Move a checkpoint out of the way without losing it; return where it is now."""
    folder = directory / SET_ASIDE_FOLDER
    folder.mkdir(exist_ok=True)
    target = free_name(folder, checkpoint.name)
    checkpoint.rename(target)
    fsync_directory(directory)
    return target


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first, so that no half of it ever looks complete."""
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
    fsync_directory(checkpoint)
    # The name is freed in one step; what a crash leaves under the new one is a leftover.
    doomed = checkpoint.with_name(f"{SAVING_PREFIX}deleted-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def apply_retention(
    directory: Path, journal: Journal, config: TrainingConfig, *, run_id: str, is_uploading_on: bool
) -> list[str]:
    """Delete the checkpoints that the retention rules give up; return their names."""
    views = [
        view
        for view in read_local_checkpoints(directory)
        if view.manifest is not None and view.manifest.run_id == run_id
    ]
    best = find_best(views)
    facts = []
    for view in views:
        upload = view.upload.state if view.upload else None
        facts.append(
            CheckpointFacts(
                str(view.name),
                view.name.step,
                is_best=view is best,
                is_verified=upload is UploadState.VERIFIED,
                is_uploading=upload in (UploadState.ARCHIVING, UploadState.UPLOADING),
            )
        )
    deleted = []
    for decision in plan_retention(
        facts,
        keep_checkpoints=config.keep_checkpoints,
        max_unverified=config.max_unverified,
        is_uploading_on=is_uploading_on,
    ):
        if decision.action is Action.KEEP:
            continue
        if decision.action is Action.SUPERSEDE:
            log.warning("Giving up %s without an upload: %s.", decision.name, decision.reason)
            journal.record(decision.name, run_id, UploadState.SUPERSEDED, reason=decision.reason)
        delete_checkpoint(directory / decision.name)
        log.info("Cleaned up %s (%s).", decision.name, decision.reason)
        deleted.append(decision.name)
    return deleted
