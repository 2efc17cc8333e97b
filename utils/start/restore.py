"""The beginning of an attempt: the first checkpoint that can be used goes into the train state.

    plan -> candidate, verified or downloaded -> configuration and data compared -> train state

A candidate whose files are damaged is set aside and the next one tried, if the plan allows it. One
that is whole but does not fit this configuration is refused: an older one would not fit either.
`commit_start` moves what no longer belongs to the branch into `set-aside/`, where nothing is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.config_changes import SCHEDULE_KEYS, ConfigChanges, compare_configs, list_changes
from configs.config_files import TRAINING_CONFIG_FILE
from configs.model_config import CONFIG_FILE, find_dropouts, find_model_changes
from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.console import LiveLine
from utils.base.errors import CheckpointError, ConfigError, StorageError, UnreadableCheckpointError
from utils.base.text import FOREIGN_ERRORS, format_bytes
from utils.checkpoint_utils import (
    SavedState,
    read_checkpoint,
    restore_state,
    seed_random_state,
)
from utils.checkpoints.journal import Journal
from utils.checkpoints.layout import (
    METADATA_FILE,
    SAVING_PREFIX,
    Manifest,
    RunPaths,
    read_json,
    read_manifest,
)
from utils.checkpoints.run_record import RunRecord, write_run_record
from utils.checkpoints.store import set_aside, verify_checkpoint
from utils.data.data_state import DataState
from utils.data_utils import TrainingData
from utils.remote.download import download_checkpoint
from utils.start.facts import RunFacts
from utils.start.machine_sharing import on_every_machine
from utils.start.resume import (
    Candidate,
    Plan,
    Start,
    fresh_start,
    resolve_start,
)
from utils.storage.open import open_bucket
from utils.training_utils import TrainingProgress, TrainState, learning_rate_share

log = logging.getLogger("train")

SMALL_JUMP = 1.5  # a learning rate that changes by less is no cause for a warning
_MODEL_KEYS = ("model", "model_overrides", "pad_vocab_to_multiple_of")
_LATER_KEYS = ("max_steps", "lr_scheduler_kwargs")
_DRAWING_KEYS = ("torch_compile", "attn_implementation", "use_regional_compilation")


def begin(
    plan: Plan,
    config: TrainingConfig,
    state: TrainState,
    data: TrainingData,
    args: argparse.Namespace,
) -> Start:
    """Restore the first candidate of a plan that can be used; every rank calls this.

    Nothing is moved here but damaged checkpoints; `commit_start` does the rest. `state` is changed
    in place. `args` says what the command line accepts: `accept_data_change`,
    `accept_config_change`, `accept_missing_random_state`.

    Raises:
        CheckpointError: No candidate can be used.
        ConfigError: The configuration trains something else than the checkpoint's.
        DataError: The data are not those of the checkpoint.
        StorageError: The bucket does not give the only candidate.
    """
    paths, forgives = RunPaths.of(config), bool(args.accept_missing_random_state)
    if not plan.candidates:
        rank = state.accelerator.process_index
        if rank:  # the weights were drawn from the same seed on all
            seed_random_state(config.seed, 0, rank)
        return fresh_start(plan, paths)
    for candidate in plan.candidates:
        _require_same_keys(candidate, config, is_accepted=args.accept_config_change)
        found = ranks.compute_on_main(
            functools.partial(
                bring,
                plan,
                candidate,
                paths,
                forgive_random_states=forgives,
                user_project=config.gcs_user_project,
            )
        )
        if found is None:
            continue
        checkpoint, manifest = found
        with on_every_machine(
            checkpoint, manifest, paths.checkpoints, forgive_random_states=forgives
        ) as here:
            saved = _read(here, manifest, state, forgives)
            if isinstance(saved, UnreadableCheckpointError):
                _pass_over(plan, replace(candidate, path=checkpoint), paths, saved)
                continue
            model_config, size = state.core_model.config, state.accelerator.num_processes
            changes = _find_changes(here, config, model_config, size)
            _accept(here, changes, is_accepted=args.accept_config_change)
            _tell_learning_rate(changes.before, config, manifest.step)
        restore_state(state, saved, config)
        start = ranks.compute_on_main(
            functools.partial(resolve_start, plan, paths, checkpoint, manifest)
        )
        bad_shards = _place_in_data(
            state.progress, saved.data_state, data, is_change_accepted=args.accept_data_change
        )
        log.info("Resumed from %s (step %d).", checkpoint, state.progress.step)
        return replace(start, bad_shards=bad_shards)
    raise CheckpointError(
        f"None of the {len(plan.candidates)} checkpoints of this run can be used. Name another "
        "one with --resume, or begin anew with --set run_name=NAME."
    )


def commit_start(start: Start, paths: RunPaths, record: RunRecord) -> None:
    """Note the run, its branch and this attempt; set aside what does not belong to it."""
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    if start.checkpoint is None and paths.journal.is_file():
        # Another run's states; they belong to the checkpoints that are set aside.
        paths.set_aside.mkdir(exist_ok=True)
        paths.journal.rename(paths.set_aside / f"uploads-before-{start.identity.run_id}.jsonl")
    write_run_record(paths, record)
    for name, reason in start.obsolete.items():
        moved = set_aside(paths.checkpoints / name, paths.checkpoints)
        log.info("Set %s aside as %s: %s.", name, moved, reason)


def require_shared_directory(directory: Path, token: str) -> None:
    """Refuse to go on where not every rank sees what the main one writes; every rank calls this.

    `token` is the same on every rank, and of no other attempt.

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


def bring(
    plan: Plan,
    candidate: Candidate,
    paths: RunPaths,
    *,
    forgive_random_states: bool = False,
    user_project: str | None = None,
) -> tuple[Path, Manifest] | None:
    """Return a candidate as a verified directory on this machine, downloaded where it is not here.

    A download is committed into the run's directories. None: the candidate cannot be used, and the
    plan lets the next one be tried. With `forgive_random_states`, damaged ones are no error.

    Raises:
        CheckpointError: It is damaged or incomplete, and no other may be tried.
        StorageError: The bucket does not give it, and no other may be tried.
    """
    try:
        if candidate.path is None:
            return _download(candidate, paths, user_project)
        return candidate.path, verify_checkpoint(
            candidate.path, forgive_random_states=forgive_random_states
        )
    except (CheckpointError, StorageError) as exc:
        _pass_over(plan, candidate, paths, exc)
        return None


def _download(
    candidate: Candidate, paths: RunPaths, user_project: str | None
) -> tuple[Path, Manifest]:
    log.info("Downloading %s.", candidate)
    _make_way(candidate, paths)
    with (
        contextlib.closing(LiveLine()) as live,
        contextlib.closing(open_bucket(candidate.bucket_uri, user_project)) as bucket,
    ):

        def show(stage: str, done: int, total: int | None) -> None:
            live.show(f"{stage} {candidate.name}: {format_bytes(done)} of {format_bytes(total)}")

        path = download_checkpoint(
            bucket, str(candidate.name), paths.checkpoints, Journal(paths.journal), show
        )
    return path, read_manifest(path)


def _make_way(candidate: Candidate, paths: RunPaths) -> None:
    """Set aside what has the name of a checkpoint to be downloaded and is not the same."""
    taken = paths.checkpoints / str(candidate.name)
    if not taken.exists():
        return
    with contextlib.suppress(CheckpointError):
        if verify_checkpoint(taken).identity == candidate.identity:
            return
    moved = set_aside(taken, paths.checkpoints)
    log.warning("%s was set aside as %s: its name is needed for %s.", taken, moved, candidate)


def _pass_over(
    plan: Plan, candidate: Candidate, paths: RunPaths, error: CheckpointError | StorageError
) -> None:
    """Set a candidate aside so that the next one may be tried; raise where none may be."""
    if not plan.can_walk_back:
        raise error
    if not ranks.is_main_rank():
        return
    if candidate.path is None or candidate.path.resolve().parent != paths.checkpoints.resolve():
        log.warning("%s Trying the one before.", error)
        return
    moved = set_aside(candidate.path, paths.checkpoints)
    log.warning("%s It was set aside as %s; trying the one before.", error, moved)


def _read(
    checkpoint: Path, manifest: Manifest, state: TrainState, forgive_random_states: bool
) -> SavedState | UnreadableCheckpointError:
    """Return what a checkpoint holds, or why the main process cannot read it; on every rank.

    Raises:
        CheckpointError: Another rank cannot read what the main one can.
    """
    accelerator = state.accelerator
    saved, failure = None, None
    try:
        saved = read_checkpoint(
            checkpoint,
            manifest,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            accept_missing_random_state=forgive_random_states,
            part=state.division.rows,
        )
    except UnreadableCheckpointError as exc:
        failure = str(exc)
    failures = ranks.broadcast_from_main(ranks.gather_to_main(failure)) or [failure]
    if saved is not None and not any(failures):
        return saved
    if failures[0] is not None:
        return UnreadableCheckpointError(failures[0])
    rank = next(number for number, text in enumerate(failures) if text)
    raise CheckpointError(
        f"Rank {rank}: {failures[rank]} All ranks of a machine need the same output_dir."
    )


def require_same_training(plan: Plan, facts: RunFacts, *, is_accepted: bool) -> None:
    """Refuse early what `begin` would refuse, as far as files here or a sidecar say why.

    Raises:
        ConfigError: Another configuration trained the first candidate, and that was not accepted.
    """
    for candidate in plan.candidates[:1]:
        _require_same_keys(candidate, facts.config, is_accepted=is_accepted)
        path = candidate.path
        if path is None:
            continue
        with contextlib.suppress(CheckpointError, OSError, *FOREIGN_ERRORS):  # `begin` says it
            changes = _find_changes(path, facts.config, facts.model_config, facts.world_size)
            _require_accepted(path.name, changes, is_accepted=is_accepted)


def _find_changes(
    checkpoint: Path, config: TrainingConfig, model_config: Any, world_size: int
) -> ConfigChanges:
    """Return how a configuration differs from the one of a checkpoint.

    What leaves all steps up to the checkpoint as they were is free.
    """
    trained_with, metadata = (
        read_json(checkpoint / file) for file in (TRAINING_CONFIG_FILE, METADATA_FILE)
    )
    before: Any = None
    with contextlib.suppress(OSError, ValueError):
        before = read_json(checkpoint / CONFIG_FILE)
    changes = compare_configs(trained_with, config)
    judge_changes(
        changes,
        find_model_changes(before, model_config),
        has_dropout=bool(find_dropouts(model_config)),
        is_compiled=config.torch_compile,
    )
    later = [key for key in _LATER_KEYS if key in changes.guarded]
    if later and _has_same_past(trained_with, config, metadata["step"]):
        changes.free.update({key: changes.guarded.pop(key) for key in later})
    batch = metadata["training_progress"]["global_batch_size"]
    global_batch, _ = config.resolve_batch(world_size)
    if batch not in (0, global_batch):
        text = f"{batch} -> {global_batch} (global_batch_size={batch} keeps it)"
        changes.guarded["samples a step"] = text
    return changes


def _accept(checkpoint: Path, changes: ConfigChanges, *, is_accepted: bool) -> None:
    """List what differs from the checkpoint's configuration; refuse what trains differently."""
    for change in list_changes(changes.free):
        log.info("Changed since the checkpoint: %s.", change)
    _require_accepted(checkpoint.name, changes, is_accepted=is_accepted)
    for change in list_changes(changes.guarded):
        log.warning("Changed since the checkpoint, as accepted: %s.", change)


def _require_same_keys(candidate: Candidate, config: TrainingConfig, *, is_accepted: bool) -> None:
    """Refuse a checkpoint in the bucket before it is downloaded, as far as its sidecar says why."""
    if candidate.path is None and candidate.view is not None and candidate.view.config:
        changes = compare_configs(candidate.view.config, config)
        # What the checkpoint's own files may show to be no difference is judged with them.
        for key in (*_MODEL_KEYS, *_LATER_KEYS):
            changes.guarded.pop(key, None)
        _require_accepted(str(candidate.name), changes, is_accepted=is_accepted)


def _require_accepted(name: str, changes: ConfigChanges, *, is_accepted: bool) -> None:
    if changes.guarded and not is_accepted:
        is_shorter = "max_steps" in changes.guarded
        option = f" (--max-steps {changes.before['max_steps']})" if is_shorter else ""
        raise ConfigError(
            f"{name} was trained with another configuration: "
            f"{'; '.join(list_changes(changes.guarded))}. "
            f"Restore it{option}, continue anyway with --accept-config-change, or begin anew "
            "with --set run_name=NAME."
        )


def _has_same_past(before: Mapping[str, Any], config: TrainingConfig, step: int) -> bool:
    """Tell whether all steps up to a checkpoint have the learning rate that they had.

    So it is in the stable part of warmup_stable_decay: a decay may begin at any checkpoint there.
    """
    one, other = map(learning_rate_share, (_old_schedule(before), config))
    return config.max_steps >= step and all(one(past) == other(past) for past in range(step))


def _old_schedule(before: Mapping[str, Any]) -> TrainingConfig:
    keys = ("max_steps", *SCHEDULE_KEYS)
    return TrainingConfig(**{key: before[key] for key in keys if key in before})


def _tell_learning_rate(before: Mapping[str, Any], config: TrainingConfig, step: int) -> None:
    """Say how a change of the schedule moves the learning rate; warn where it jumps."""
    old = _old_schedule(before)
    was, now = (one.learning_rate * learning_rate_share(one)(step) for one in (old, config))
    if now == was:
        return
    text = (
        f"The learning rate after step {step} is {now:.2e} where it would have been {was:.2e}. The "
        f"schedule is now: warm-up to step {config.warmup_steps}, then {config.lr_scheduler_type} "
        f"to step {config.max_steps}."
    )
    if max(was, now) <= SMALL_JUMP * min(was, now):
        log.info("%s", text)
    elif was and step >= config.warmup_steps:
        kept = [f"learning_rate={was:.3g}", "lr_scheduler_type=constant"]
        if config.muon_learning_rate is not None:
            share = was / old.learning_rate
            kept.append(f"muon_learning_rate={share * config.muon_learning_rate:.3g}")
        if config.lr_scheduler_kwargs:
            kept.append("lr_scheduler_kwargs={}")
        log.warning(
            "%s A jump may undo what was learnt while it fell. To keep the old rate: %s "
            "--accept-config-change.",
            text,
            " ".join(f"--set {setting}" for setting in kept),
        )
    else:
        log.warning("%s", text)


def judge_changes(
    changes: ConfigChanges, of_model: dict[str, str] | None, *, has_dropout: bool, is_compiled: bool
) -> None:
    """Judge changes of a configuration by the model that it comes to: free ones, guarded ones.

    `of_model` is what `find_model_changes` returns, None where they are not known: another name
    of the same model is a free change, the same name of another model is none. Random numbers of
    dropout depend on how the model is computed.
    """
    free, guarded = changes.free, changes.guarded
    named = [key for key in _MODEL_KEYS if key in guarded]
    if of_model == {}:
        free.update({key: guarded.pop(key) for key in named})
    elif of_model and not named:
        guarded.update({f"the model's {key}": change for key, change in of_model.items()})
    if has_dropout:
        keys = _DRAWING_KEYS if is_compiled else _DRAWING_KEYS[:2]
        for key in [key for key in free if key in keys]:
            guarded[key] = f"{free.pop(key)} (dropout draws other numbers)"


def _place_in_data(
    progress: TrainingProgress, before: DataState, data: TrainingData, *, is_change_accepted: bool
) -> tuple[int, ...]:
    """Put the position in the data where the checkpoint was; return the shards known as bad.

    Raises:
        DataError: The data are not those of the checkpoint.
    """
    current = data.describe(progress.sample_index)
    changes = before.describe_changes(current)
    if changes and is_change_accepted:
        progress.sample_index = (before.epoch + 1) * data.order.samples_per_epoch
        log.warning(
            "The data changed (%s): going on at epoch %d of the new data.",
            changes,
            before.epoch + 1,
        )
        return ()
    before.require_same_order(current)
    return before.bad_shards
