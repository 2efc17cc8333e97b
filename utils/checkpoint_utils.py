"""What a checkpoint holds: collected from the train state, brought back into it.

    train state -> files of a checkpoint -> restore -> train state

The files are those that stock `Accelerator.load_state` and `AutoModelForCausalLM.from_pretrained`
read, plus our own. The main process writes alone; random states of all ranks are gathered to it.
Where the state is sharded, each rank writes its rows of weights and moments into files of its own
(`utils/checkpoints/state_files.py`), and the main one the rest. Both kinds are brought back at any
number of ranks, sharded or not; a sharded rank reads its own rows alone.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load as load_tensors

from configs.model_config import CONFIG_FILE, with_older_keys
from configs.training_config import TrainingConfig
from utils.base.errors import CheckpointError, UnreadableCheckpointError
from utils.checkpoint_metadata import build_metadata
from utils.checkpoints.files import CheckpointFiles
from utils.checkpoints.layout import (
    BIN_WEIGHTS_FILE,
    DATA_STATE_FILE,
    METADATA_FILE,
    METRICS_HISTORY_FILE,
    RANDOM_STATES_PREFIX,
    SAFE_WEIGHTS_FILE,
    TRAINING_CONFIG_FILE,
    CheckpointName,
    Manifest,
    RunIdentity,
    read_json,
)
from utils.checkpoints.state_files import (
    OPTIMIZER_FILE,
    OPTIMIZER_REST_FILE,
    as_sharded,
    mapped_errors,
    part_files,
    ranged_files,
    read_optimizer,
    read_weights,
    require_file,
    restore_rows,
    split_optimizer,
)
from utils.data.data_state import DataState
from utils.models.parts import Part, RowChoice
from utils.training_utils import Progress, TrainState

SCHEDULER_FILE = "scheduler.bin"
SCHEDULER_BACKUP_FILE = "scheduler_state.pt"
SCALER_FILE = "scaler.pt"
GENERATION_CONFIG_FILE = "generation_config.json"

log = logging.getLogger(__name__)


def random_states_file(rank: int) -> str:
    """Return the name of a rank's random state file."""
    return f"{RANDOM_STATES_PREFIX}{rank}.pkl"


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


def collect_files(
    state: TrainState,
    data_state: DataState,
    config: TrainingConfig,
    identity: RunIdentity,
    random_states: Sequence[dict[str, Any]],
    tokenizer_files: Mapping[str, bytes],
) -> CheckpointFiles:
    """Return what a checkpoint of the state as it is consists of, without parts of sharded state.

    Tensors are the live ones: the caller copies or writes them before the next update. Everything
    else is captured here.

    Args:
        state: What to save.
        data_state: Position in the data.
        config: The run's configuration.
        identity: Run id and branch.
        random_states: Of `capture_random_state`, by rank.
        tokenizer_files: File name -> bytes, copied in so that `AutoTokenizer` loads.
    """
    model: Any = state.core_model
    weights: dict[str, dict[str, torch.Tensor]] = {}
    pickles: dict[str, Any] = {}
    if state.zero is not None:
        pickles[OPTIMIZER_REST_FILE] = state.zero.optimizer_rest()
    elif state.is_sharded:
        pickles[OPTIMIZER_REST_FILE] = split_optimizer(state.optimizer.state_dict())[1]
    elif config.save_format == "safetensors":
        weights[SAFE_WEIGHTS_FILE] = _without_shared(model.state_dict())
    else:
        pickles[BIN_WEIGHTS_FILE] = model.state_dict()
    if state.row_choice is None:
        pickles[OPTIMIZER_FILE] = state.optimizer.state_dict()
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
    step, epoch, files = state.progress.step, data_state.epoch, data_state.files_consumed
    return CheckpointFiles(
        CheckpointName(step, epoch, files),
        Manifest(identity.run_id, step, identity.branch, len(random_states), forks=identity.forks),
        weights,
        pickles,
        documents={
            TRAINING_CONFIG_FILE: config.to_json(),
            METRICS_HISTORY_FILE: _progress_document(state),
            DATA_STATE_FILE: data_state,
            METADATA_FILE: build_metadata(state, data_state, config, identity),
        },
        raw={**_model_files(model), **tokenizer_files},
    )


def collect_part(
    state: TrainState, data_state: DataState, identity: RunIdentity, rest: CheckpointFiles | None
) -> CheckpointFiles:
    """Return the files that this rank writes of a checkpoint of sharded state.

    Args:
        state: What to save.
        data_state: Position in the data.
        identity: Run id and branch.
        rest: Of `collect_files`, on the main process; None on the others.
    """
    part = Part(state.accelerator.process_index, state.accelerator.num_processes)
    step, epoch, consumed = state.progress.step, data_state.epoch, data_state.files_consumed
    files = rest or CheckpointFiles(
        CheckpointName(step, epoch, consumed),
        Manifest(identity.run_id, step, identity.branch, part.count, forks=identity.forks),
    )
    if state.zero is not None:
        held = state.zero.held_rows()
        weights, headers = ranged_files(held.weights, held.moments, held.shapes, held.rows, part)
    else:
        weights, headers = part_files(state.core_model, state.optimizer.state_dict(), part)
    return replace(files, weights=weights, headers=headers, is_part=True)


def _without_shared(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous weights without second names for the same memory (tied weights)."""
    found: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in weights.items():
        found.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: weights[name].contiguous() for name in found.values()}


def _progress_document(state: TrainState) -> dict[str, Any]:
    """Return `training_metrics.json`: histories and counters; lists are copied, they grow."""
    progress = state.progress
    counters = {
        entry.name: getattr(progress, entry.name)
        for entry in fields(progress)
        if entry.name != "history"
    }
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


@dataclass(frozen=True)
class SavedState:
    """What the files of a checkpoint hold, in host memory, not yet brought into a train state.

    Weights and the optimizer's tensors are whole, or the rows of `part`.
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
    part: RowChoice | None = None


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

    Args:
        checkpoint: Its directory.
        manifest: Its manifest; nothing that it does not name is read.
        rank: This process.
        world_size: All processes now.
        accept_missing_random_state: Return None for random states that cannot be read.
        part: Read these rows of weights and moments only; None: all.

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
        part=part,
    )


def restore_state(state: TrainState, saved: SavedState, config: TrainingConfig) -> None:
    """Bring what was saved into the train state of this rank.

    The learning rate follows the current configuration's schedule at the restored step. Where
    there is no random state for this rank (another number of ranks than the checkpoint's), it is
    seeded from (seed, step, rank).

    Raises:
        CheckpointError: It does not fit this model or optimizer.
    """
    try:
        if state.zero is not None:
            state.zero.restore(saved.weights, saved.optimizer)
        elif saved.part is None:
            _restore_weights(state.core_model, saved.weights)
            state.optimizer.load_state_dict(saved.optimizer)
        else:
            restore_rows(state.core_model, saved.weights)
            parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
            state.optimizer.load_state_dict(as_sharded(saved.optimizer, parameters))
        state.scheduler.load_state_dict(saved.scheduler)
        if state.accelerator.scaler is not None and saved.scaler is not None:
            state.accelerator.scaler.load_state_dict(saved.scaler)
        _restore_progress(state, saved.metrics)
        _restore_settings(state, config)
        _restore_random_state(state, saved, config)
    except Exception as exc:  # load_state_dict raises many families
        # load_state_dict has a title, and its first finding in the line below.
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(exc).__name__
        raise CheckpointError(
            f"{saved.name} does not fit this model or configuration: {reason}"
        ) from exc


def _restore_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    found = model.load_state_dict(weights, strict=False)
    # A second name for the same memory (tied weights) is not in the file.
    memory = model.state_dict()
    given = {memory[name].data_ptr() for name in weights if name in memory}
    missing = [name for name in found.missing_keys if memory[name].data_ptr() not in given]
    if missing or found.unexpected_keys:
        raise ValueError(f"missing weights {missing}, unexpected {found.unexpected_keys}")


def _restore_progress(state: TrainState, metrics: Mapping[str, Any]) -> None:
    history = {key: list(values) for key, values in metrics.items() if key != "progress"}
    progress = dict(metrics["progress"])
    state.interval.copy_(torch.tensor(progress.pop("interval")))
    state.guard.restore(progress.pop("spike_window"))
    state.guard.forget()
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
    words = np.random.SeedSequence([config.seed, saved.manifest.step, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
