"""What a checkpoint holds: collected from the train state, brought back into it.

    train state -> files of a checkpoint -> restore -> train state

The files are those that stock `Accelerator.load_state` and `AutoModelForCausalLM.from_pretrained`
read, plus our own. The main process writes alone; random states of all ranks are gathered to it.
Where ranks hold rows of weights and moments, each writes them into files of its own
(`utils/checkpoints/state_files.py`), and the main one the rest. Both kinds are brought back at any
number of ranks, however they divide the state; a rank that needs rows reads those alone.
"""

from __future__ import annotations

import functools
import json
import logging
import platform
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load as load_tensors

from configs.config_files import PROJECT_DIRECTORY, TRAINING_CONFIG_FILE
from configs.model_config import CONFIG_FILE, with_older_keys
from configs.training_config import TrainingConfig
from utils.base.errors import CheckpointError, UnreadableCheckpointError
from utils.base.text import number, perplexity_of
from utils.checkpoints.files import CheckpointFiles
from utils.checkpoints.layout import (
    DATA_STATE_FILE,
    METADATA_FILE,
    METRICS_HISTORY_FILE,
    RANDOM_STATES_PREFIX,
    CheckpointName,
    Manifest,
    RunIdentity,
    read_json,
)
from utils.checkpoints.state_files import (
    add_state,
    mapped_errors,
    read_optimizer,
    read_weights,
    require_file,
)
from utils.data.data_state import DataState
from utils.models.parts import Part, RowChoice
from utils.tracking.metrics_log import HISTORY_LIMIT, loss_trend
from utils.training_utils import TrainingProgress, TrainState, device_name, mean_loss

SCHEDULER_FILE = "scheduler.bin"
SCHEDULER_BACKUP_FILE = "scheduler_state.pt"
SCALER_FILE = "scaler.pt"
GENERATION_CONFIG_FILE = "generation_config.json"

log = logging.getLogger(__name__)


def random_states_file(rank: int) -> str:
    """Return the name of a rank's random state file."""
    return f"{RANDOM_STATES_PREFIX}{rank}.pkl"


def capture_random_state() -> dict[str, Any]:
    """Return this rank's random states, in the form that Accelerate reads."""
    states: dict[str, Any] = {
        "step": 0,  # micro-steps since the last update: a save is between two updates
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


def collect_files(
    state: TrainState,
    data_state: DataState,
    config: TrainingConfig,
    identity: RunIdentity,
    random_states: Sequence[dict[str, Any]],
    tokenizer_files: Mapping[str, bytes],
) -> CheckpointFiles:
    """Return the files that the main process alone writes, without weights and optimizer.

    Tensors are the live ones: the caller copies or writes them before the next update. Everything
    else is captured here. `random_states` is what `capture_random_state` returned, by rank;
    `tokenizer_files` (file name -> bytes) are copied in so that `AutoTokenizer` loads.
    """
    pickles: dict[str, Any] = {}
    pickles[SCHEDULER_FILE] = state.scheduler.state_dict()
    pickles[SCHEDULER_BACKUP_FILE] = {
        "step": state.progress.step,
        "learning_rate": state.learning_rate,
        "scheduler": state.scheduler.state_dict(),
    }
    if state.accelerator.scaler is not None:
        pickles[SCALER_FILE] = state.accelerator.scaler.state_dict()
    for rank, states in enumerate(random_states):
        pickles[random_states_file(rank)] = states
    return replace(
        _no_files(state, data_state, identity),
        pickles=pickles,
        documents={
            TRAINING_CONFIG_FILE: config.to_json(),
            METRICS_HISTORY_FILE: _progress_document(state),
            DATA_STATE_FILE: data_state,
            METADATA_FILE: build_metadata(state, data_state, config, identity),
        },
        raw={**_model_files(state.core_model), **tokenizer_files},
    )


def add_held_state(
    state: TrainState,
    data_state: DataState,
    config: TrainingConfig,
    identity: RunIdentity,
    files: CheckpointFiles | None,
) -> CheckpointFiles | None:
    """Return all that this rank writes of a checkpoint; None for nothing. All ranks call this.

    `files` is what `collect_files` returned on the main process, None on the others; the rest is
    as it was given to that.
    """
    held = state.division.held_state()
    if held is None:
        return files
    part = Part(state.accelerator.process_index, state.accelerator.num_processes)
    files = files or _no_files(state, data_state, identity)
    return add_state(files, held, part, config.save_format)


def _no_files(state: TrainState, data_state: DataState, identity: RunIdentity) -> CheckpointFiles:
    """Return name and manifest of a checkpoint that has no files yet."""
    step, world_size = state.progress.step, state.accelerator.num_processes
    return CheckpointFiles(
        CheckpointName(step, data_state.epoch, data_state.files_consumed),
        Manifest(identity.run_id, step, identity.branch, world_size, forks=identity.forks),
    )


def _progress_document(state: TrainState) -> dict[str, Any]:
    """Return `training_metrics.json`: histories and counters; lists are copied, they grow."""
    progress = state.progress
    counters = {entry.name: getattr(progress, entry.name) for entry in fields(progress)}
    del counters["history"]
    counters["bad_steps"] = list(progress.bad_steps)
    # JSON keeps every float exactly; a float32 is a float.
    counters["interval"] = state.interval.clone()
    counters["spike_window"] = state.guard.losses.clone()
    return {**{key: list(values) for key, values in progress.history.items()}, "progress": counters}


def _model_files(model: Any) -> dict[str, bytes]:
    values = with_older_keys(json.loads(model.config.to_json_string()))
    files = {CONFIG_FILE: f"{json.dumps(values, indent=2, sort_keys=True)}\n"}
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        files[GENERATION_CONFIG_FILE] = generation_config.to_json_string()
    return {name: text.encode("utf-8") for name, text in files.items()}


def build_metadata(
    state: TrainState, data_state: DataState, config: TrainingConfig, identity: RunIdentity
) -> dict[str, Any]:
    """Return what `metadata.json` says of the state as it is."""
    progress = state.progress
    losses = progress.history["loss_history"]
    recent = losses[-HISTORY_LIMIT:]
    best = progress.best_validation_loss
    # A save on request does not evaluate: an older loss is not that of this state.
    is_measured = progress.validation_step == progress.step
    validation_loss = progress.validation_loss if is_measured else None
    if progress.history["steps"][-1:] == [progress.step]:
        loss, rate = losses[-1], progress.history["tokens_per_second"][-1]
    else:  # between two log lines: what came after the last one
        loss, rate = number(mean_loss(state)), state.tokens_per_second
    return {
        "step": progress.step,
        "epoch": data_state.epoch,
        "current_loss": loss,
        "current_learning_rate": state.last_learning_rate,
        "best_loss": progress.best_loss,
        "loss_history": recent,
        "learning_rates": progress.history["learning_rates"][-HISTORY_LIMIT:],
        "validation_metrics": {
            "current_avg_loss": loss,
            "steps_since_best": progress.step - progress.best_loss_step,
            "loss_trend": loss_trend([loss for loss in recent if loss is not None]),
            "validation_loss": validation_loss,
            "perplexity": None if validation_loss is None else perplexity_of(validation_loss),
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
            "tokens_per_second": rate,
            "mfu": state.utilization(config.sequence_length).at(rate),
        },
        "bad_steps": list(progress.bad_steps),
        "spending": progress.spending,
        "base": progress.base,
        "system_info": system_info(state),
        "timestamp": datetime.now(UTC).isoformat(),
        "run_id": identity.run_id,
        "git_commit": git_commit(),
    }


def system_info(state: TrainState) -> dict[str, Any]:
    """Return the machine and the versions, for `metadata.json`."""
    import accelerate
    import transformers

    device = state.accelerator.device
    return {
        "cuda_available": torch.cuda.is_available(),
        "device_count": torch.cuda.device_count(),
        "mixed_precision": state.accelerator.mixed_precision,
        "device": device_name(device),
        "world_size": state.accelerator.num_processes,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "num_parameters": sum(p.numel() for p in state.core_model.parameters()),
    }


@functools.cache
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
    return result.stdout.strip() if result.returncode == 0 else None


@dataclass(frozen=True)
class SavedState:
    """What the files of a checkpoint hold, in host memory, not yet brought into a train state.

    Weights and the optimizer's tensors are whole, or the rows that were asked for.
    """

    name: str
    manifest: Manifest
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    metrics: dict[str, Any]
    data_state: DataState
    random_state: dict[str, Any] | None
    optim: str


def read_checkpoint(
    checkpoint: Path,
    manifest: Manifest,
    *,
    rank: int,
    world_size: int,
    accept_missing_random_state: bool = False,
    part: RowChoice | None = None,
) -> SavedState:
    """Return what a verified checkpoint holds for one rank.

    Nothing is read that the manifest does not name. `part` reads only these rows of weights and
    moments. With `accept_missing_random_state`, random states that cannot be read are None.

    Raises:
        UnreadableCheckpointError: A file is missing or cannot be read.
    """

    def read(name: str, load: Callable[[Path], Any]) -> Any:
        require_file(checkpoint, manifest, name)
        with mapped_errors(checkpoint, name):
            return load(checkpoint / name)

    def load_random_state() -> Any:
        if world_size != manifest.world_size:
            return None
        try:
            return read(random_states_file(rank), load_tensors)
        except UnreadableCheckpointError:
            if accept_missing_random_state:
                return None
            raise

    return SavedState(
        checkpoint.name,
        manifest,
        weights=read_weights(checkpoint, manifest, part),
        optimizer=read_optimizer(checkpoint, manifest, part),
        scheduler=read(SCHEDULER_FILE, load_tensors),
        scaler=read(SCALER_FILE, load_tensors) if SCALER_FILE in manifest.files else None,
        metrics=read(METRICS_HISTORY_FILE, read_json),
        data_state=read(DATA_STATE_FILE, lambda path: DataState.from_json(read_json(path))),
        random_state=load_random_state(),
        optim=read(TRAINING_CONFIG_FILE, read_json).get("optim", TrainingConfig.optim),
    )


def restore_state(state: TrainState, saved: SavedState, config: TrainingConfig) -> None:
    """Bring what was saved into the train state of this rank.

    The learning rate follows the current configuration's schedule at the restored step. Of another
    optimizer nothing is taken over: this one begins with what it gathers from now on. Where
    there is no random state for this rank (another number of ranks than the checkpoint's), it is
    seeded from (seed, step, rank).

    Raises:
        CheckpointError: It does not fit this model or optimizer.
    """
    own = [{**group, "params": None} for group in state.optimizer.param_groups]
    optimizer = saved.optimizer
    if saved.optim != config.optim:
        optimizer = {**state.optimizer.state_dict(), "state": {}}
        log.warning(
            "%s has the state of %s: %s begins anew.", saved.name, saved.optim, config.optim
        )
    try:
        state.division.restore(saved.weights, optimizer)
        state.scheduler.load_state_dict(saved.scheduler)
        if state.accelerator.scaler is not None and saved.scaler is not None:
            state.accelerator.scaler.load_state_dict(saved.scaler)
        _restore_progress(state, saved.metrics)
        _restore_settings(state, own)
        _restore_random_state(state, saved, config)
    except Exception as exc:  # load_state_dict raises many families
        # The message of load_state_dict is a title, with its first finding on the next line.
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(exc).__name__
        raise CheckpointError(
            f"{saved.name} does not fit this model or configuration: {reason}"
        ) from exc


def _restore_progress(state: TrainState, metrics: Mapping[str, Any]) -> None:
    history = {key: list(values) for key, values in metrics.items() if key != "progress"}
    progress = dict(metrics["progress"])
    state.interval.copy_(torch.tensor(progress.pop("interval")))
    state.guard.restore(progress.pop("spike_window"))
    state.guard.forget()
    state.progress = TrainingProgress(**progress, history=history)


def _restore_settings(state: TrainState, own: list[dict[str, Any]]) -> None:
    """Put the configuration's settings back over the saved ones: they may have been changed.

    `own` are the optimizer's groups as they were before it was restored.
    """
    groups, scheduler = state.optimizer.param_groups, state.scheduler
    scheduler.base_lrs = [settings["initial_lr"] for settings in own]
    for group, settings, share in zip(groups, own, scheduler.lr_lambdas, strict=True):
        rate = settings["initial_lr"] * share(scheduler.last_epoch)
        group.update({**settings, "params": group["params"], "lr": rate})


def _restore_random_state(state: TrainState, saved: SavedState, config: TrainingConfig) -> None:
    rank, world_size = state.accelerator.process_index, state.accelerator.num_processes
    if saved.random_state is not None:
        restore_random_state(saved.random_state)
        return
    if rank == 0:
        reason = f"was written by {saved.manifest.world_size} ranks, now there are {world_size}"
        if world_size == saved.manifest.world_size:
            reason = "has no usable random state"
        log.warning(
            "%s %s: the data go on exactly, random states are seeded anew from (seed, step, rank).",
            saved.name,
            reason,
        )
    seed_random_state(config.seed, saved.manifest.step, rank)


def seed_random_state(seed: int, step: int, rank: int) -> None:
    """Seed Python, NumPy and torch from (seed, step, rank): each rank draws other dropout."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
