"""The beginning of a start: the first checkpoint that can be used is brought into the train state.

    plan -> candidate, verified -> configuration and data compared -> train state

A candidate whose files are damaged is set aside and the next one tried, if the plan allows it. One
that is whole but does not fit this configuration is refused: an older one would not fit either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.model_config import CONFIG_FILE, describe_model_changes, find_dropouts
from configs.training_config import ConfigChanges, TrainingConfig, compare_configs
from utils.base import ranks
from utils.base.console import LiveLine
from utils.base.errors import CheckpointError, ConfigError, StorageError, UnreadableCheckpointError
from utils.base.text import format_bytes
from utils.checkpoint_utils import SavedState, read_checkpoint, restore_state
from utils.checkpoints.layout import (
    SAVING_PREFIX,
    TRAINING_CONFIG_FILE,
    Manifest,
    RunPaths,
    read_json,
)
from utils.data.data_state import DataState
from utils.start import resume
from utils.start.machine_sharing import on_every_machine
from utils.storage.open import open_bucket
from utils.training_utils import TrainState

log = logging.getLogger("train")

_MODEL_KEYS = ("model:", "model_overrides:", "pad_vocab_to_multiple_of:")
_DRAWING_KEYS = ("torch_compile:", "attn_implementation:", "use_regional_compilation:")


@dataclass(frozen=True)
class Consent:
    """What the user accepts that a resume would otherwise refuse.

    Attributes:
        data_change: Go on although the shards are not the checkpoint's.
        config_change: Go on although the configuration trains something else.
        missing_random_state: Go on although the random states cannot be read.
    """

    data_change: bool = False
    config_change: bool = False
    missing_random_state: bool = False


@dataclass(frozen=True)
class Beginning:
    """Where a start has begun.

    Attributes:
        start: Run, branch, checkpoint.
        saved: What the checkpoint held, None at step 0.
    """

    start: resume.Start
    saved: SavedState | None = None


def begin(
    plan: resume.Plan,
    paths: RunPaths,
    config: TrainingConfig,
    state: TrainState,
    global_batch: int,
    consent: Consent,
) -> Beginning:
    """Restore the first candidate of a plan that can be used; every rank calls this.

    Nothing is moved here but damaged checkpoints; `resume.commit_start` does the rest.

    Raises:
        CheckpointError: No candidate can be used.
        ConfigError: The configuration trains something else than the checkpoint's.
        StorageError: The bucket does not give the only candidate.
    """
    if not plan.candidates:
        return Beginning(resume.fresh_start(plan, paths))
    for candidate in plan.candidates:
        found = ranks.compute_on_main(lambda c=candidate: _obtain(plan, c, paths, config, consent))  # type: ignore[misc]
        if found is None:
            continue
        checkpoint, manifest = found
        with on_every_machine(
            checkpoint,
            manifest,
            paths.checkpoints,
            forgive_random_states=consent.missing_random_state,
        ) as here:
            saved = _read(plan, candidate, here, manifest, paths, state, consent)
            if saved is None:
                continue
            _require_same_config(
                here, saved, state, config, global_batch, accept=consent.config_change
            )
        restore_state(state, saved, config)
        start = ranks.compute_on_main(
            lambda c=checkpoint, m=manifest: resume.resolve_start(plan, paths, c, m)  # type: ignore[misc]
        )
        return Beginning(start, saved)
    raise CheckpointError(
        f"None of the {len(plan.candidates)} checkpoints of this run can be used. Begin anew with "
        "--fresh, or name another one with --resume."
    )


def require_shared_directory(directory: Path, token: str) -> None:
    """Refuse to go on where not every rank sees what the main one writes; every rank calls this.

    Args:
        directory: Where checkpoints lie.
        token: The same on every rank, and of no other start.

    Raises:
        CheckpointError: On the main process.
    """
    probe = directory / f"{SAVING_PREFIX}shared.{token}"
    if ranks.is_main_rank():
        probe.mkdir(parents=True, exist_ok=True)
    ranks.broadcast_from_main(None)
    seen = ranks.gather_to_main(probe.is_dir())
    if ranks.is_main_rank():
        probe.rmdir()

    def judge() -> None:
        blind = [rank for rank, sees in enumerate(seen or []) if not sees]
        if blind:
            raise CheckpointError(
                f"Rank {blind[0]} does not see output_dir {directory} of rank 0. Sharded state is "
                "saved by all ranks into one directory: put it on a disk that all machines share."
            )

    ranks.compute_on_main(judge)


def _obtain(
    plan: resume.Plan,
    candidate: resume.Candidate,
    paths: RunPaths,
    config: TrainingConfig,
    consent: Consent,
) -> tuple[Path, Manifest] | None:
    """Return a verified directory; None where it cannot be used and the next may be tried."""
    live = LiveLine(enabled=True)

    def show(stage: str, done: int, total: int | None) -> None:
        live.show(f"{stage} {candidate.name}: {format_bytes(done)} of {format_bytes(total)}")

    try:
        if candidate.path is None:
            log.info("Bringing %s.", candidate)
        return resume.obtain(
            candidate,
            paths,
            on_progress=show,
            forgive_random_states=consent.missing_random_state,
            open_bucket=lambda uri: open_bucket(uri, config.gcs_user_project or None),
        )
    except (CheckpointError, StorageError) as exc:
        if not plan.walks_back:
            raise
        resume.discard(candidate, paths, str(exc))
        return None
    finally:
        live.close()


def _read(
    plan: resume.Plan,
    candidate: resume.Candidate,
    checkpoint: Path,
    manifest: Manifest,
    paths: RunPaths,
    state: TrainState,
    consent: Consent,
) -> SavedState | None:
    """Return what a checkpoint holds; None where the main process cannot read it."""
    accelerator = state.accelerator
    saved, failure = None, None
    try:
        saved = read_checkpoint(
            checkpoint,
            manifest,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            accept_missing_random_state=consent.missing_random_state,
            part=state.division.rows,
        )
    except UnreadableCheckpointError as exc:
        failure = str(exc)
    failures = ranks.broadcast_from_main(ranks.gather_to_main(failure)) or [failure]
    if not any(failures):
        return saved
    if failures[0] is None:
        rank = next(number for number, text in enumerate(failures) if text)
        raise CheckpointError(
            f"Rank {rank}: {failures[rank]} All ranks of a machine need the same output_dir."
        )
    if not plan.walks_back:
        raise UnreadableCheckpointError(failures[0])
    if accelerator.is_main_process:
        local = resume.Candidate(candidate.name, candidate.identity, checkpoint)
        resume.discard(local, paths, failures[0])
    return None


def _require_same_config(
    checkpoint: Path,
    saved: SavedState,
    state: TrainState,
    config: TrainingConfig,
    global_batch: int,
    *,
    accept: bool,
) -> None:
    """List what differs from the checkpoint's configuration; refuse what trains differently.

    Raises:
        ConfigError: There is such a difference, and it was not accepted.
    """
    model_config = state.core_model.config
    changes = judge_changes(
        compare_configs(read_json(checkpoint / TRAINING_CONFIG_FILE), config),
        describe_model_changes(_read_model(checkpoint), model_config),
        draws=bool(find_dropouts(model_config)),
        compiles=config.torch_compile,
    )
    guarded = list(changes.guarded)
    batch = saved.metrics["progress"]["global_batch_size"]
    if batch not in (0, global_batch):
        guarded.append(
            f"samples a step: {batch} -> {global_batch} (global_batch_size={batch} keeps it)"
        )
    for change in changes.free:
        log.info("Changed since the checkpoint: %s.", change)
        if change.startswith("max_steps:") and config.lr_scheduler_type != "constant":
            log.info(
                "The schedule is now: warm-up to step %d, then %s to %.3g at step %d.",
                config.warmup_steps,
                config.lr_scheduler_type,
                config.learning_rate * config.min_lr_rate,
                config.max_steps,
            )
    if guarded and not accept:
        raise ConfigError(
            f"{checkpoint.name} was trained with another configuration: {'; '.join(guarded)}. "
            "Put it back, go on all the same with --accept-config-change, begin anew with --fresh, "
            "or give this run folders of its own with --set run_name=NAME."
        )
    for change in guarded:
        log.warning("Changed since the checkpoint, as accepted: %s.", change)


def _read_model(checkpoint: Path) -> Any:
    """Return what a checkpoint says of its model; None where that cannot be read."""
    try:
        return read_json(checkpoint / CONFIG_FILE)
    except (OSError, ValueError):
        return None


def judge_changes(
    changes: ConfigChanges, of_model: list[str] | None, *, draws: bool, compiles: bool
) -> ConfigChanges:
    """Return changes of a configuration, judged by the model that it comes to.

    Args:
        changes: As the configurations name them.
        of_model: Of `describe_model_changes`; None where they are not known. Another name of the
            same model is a free change, the same name of another model is none.
        draws: Whether the model has dropout, whose random numbers depend on how it is computed.
        compiles: Whether it is compiled now.
    """
    free, guarded = list(changes.free), list(changes.guarded)
    named = [change for change in guarded if change.startswith(_MODEL_KEYS)]
    if of_model == []:
        guarded = [change for change in guarded if change not in named]
        free += named
    elif of_model and not named:
        guarded += [f"the model's {change}" for change in of_model]
    if draws:
        keys = _DRAWING_KEYS if compiles else (*_DRAWING_KEYS[:2],)
        drawn = [change for change in free if change.startswith(keys)]
        free = [change for change in free if change not in drawn]
        guarded += [f"{change} (dropout draws other numbers)" for change in drawn]
    return ConfigChanges(tuple(free), tuple(guarded))


def place_in_data(
    state: TrainState,
    saved: SavedState,
    current: Callable[[], DataState],
    samples_per_epoch: int,
    *,
    accept_change: bool,
) -> tuple[int, ...]:
    """Put the position in the data where the checkpoint was; return the shards known as bad.

    Args:
        state: Restored already.
        saved: What the checkpoint held.
        current: Describes the data as they are now.
        samples_per_epoch: Of the data as they are now.
        accept_change: Other shards are no error: the run goes on at the next epoch.

    Raises:
        DataError: The data are not those of the checkpoint.
    """
    before = saved.data_state
    changes = before.describe_changes(current())
    if changes and accept_change:
        state.progress.sample_index = (before.epoch + 1) * samples_per_epoch
        log.warning(
            "The data changed (%s): going on at epoch %d of the new data.",
            changes,
            before.epoch + 1,
        )
        return ()
    before.require_same_order(current())
    return before.bad_shards
