"""Which run a command line means, and its configuration.

    words, what the run recorded (run.json, a checkpoint, a sidecar) -> configuration

A command that looks at a run, and an attempt that goes on without `--config`, take the run's own
configuration from where the run is found; what the words say replaces it. No torch here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.config_files import TRAINING_CONFIG_FILE, parse_assignment
from configs.training_config import TrainingConfig, get_training_config
from utils.base.errors import ConfigError, StorageError, UsageError
from utils.base.text import printable
from utils.base.uri import join_uri, normalize_uri, require_path, split_uri
from utils.checkpoints.layout import MANIFEST_FILE, RUN_FILE, RunPaths, sidecar_object
from utils.checkpoints.run_record import (
    RunValues,
    describe_other_runs,
    find_run_values,
    read_checkpoint_values,
    usable_values,
)
from utils.checkpoints.views import select_checkpoint
from utils.remote.listing import NEWEST_SIDECARS, parse_remote_name, read_remote_checkpoints
from utils.storage.open import open_bucket

DEFAULT_CONFIG = "test"
LOOK_RETRY_SECONDS = 4.0
_PLACE_OPTIONS = ("output_dir", "logging_dir", "run_name")
_PLACE_KEYS = (*_PLACE_OPTIONS, "cache_dir", "checkpoint_uri", "data_uri", "gcs_user_project")

log = logging.getLogger(__name__)


def load_config(args: argparse.Namespace) -> TrainingConfig:
    """Return the configuration of a command line of train.py.

    `config_source` of `args` becomes the record that it is from, None where it is from a file.
    """
    if args.stop_after is not None and args.stop_after < 1:
        raise UsageError(f"--stop-after must be at least 1, got {args.stop_after}.")
    if args.json and not args.dry_run:
        raise UsageError("--json is for --dry-run.")
    overrides = dict(parse_assignment(text) for text in args.set)
    if args.max_steps is not None:
        overrides["max_steps"] = args.max_steps
    if args.hourly_price is not None:
        overrides["hourly_price"] = args.hourly_price
    if args.debug:
        overrides["log_level"] = "debug"
    args.config_source = None
    if args.config is None and args.resume is not None:
        alone = config_alone(args.config, overrides)
        found, place = _find_resumed(args.resume, alone)
        if found is not None:
            args.config_source = found.source
            _require_bucket(found, overrides)
            if place is None:
                return _config_in(RunPaths.of(alone).checkpoints, found, overrides, alone)
            return found.to_config({**place, **overrides})
        others = describe_other_runs(Path(alone.output_dir), alone.run_name, "--set run_name=")
        if others:
            raise UsageError(f"{others} To begin a new one: --config NAME.")
    return _named_config(args.config, overrides, is_bucket_needed=True)


def config_alone(name: str | None, words: Mapping[str, Any]) -> TrainingConfig:
    """Return the configuration that says where a run is looked for.

    Other values may contradict it, and not what the run recorded.
    """
    return _named_config(name, {key: words[key] for key in words if key in _PLACE_KEYS})


def _named_config(
    name: str | None, words: Mapping[str, Any], *, is_bucket_needed: bool = False
) -> TrainingConfig:
    """Return the configuration that `--config` names; that of a checkpoint is as its run is found.

    Raises:
        UsageError: `is_bucket_needed`, and nothing says where the bucket of a checkpoint's run is.
    """
    path = Path(name or "")
    checkpoint = path.parent if path.name == TRAINING_CONFIG_FILE else path
    if name is None or not os.path.isfile(checkpoint / MANIFEST_FILE):  # noqa: PTH113 - Path.is_file raises for too long a name
        return get_training_config(name or DEFAULT_CONFIG, words)
    found, place = _find_in_checkpoint(checkpoint)
    if is_bucket_needed:
        _require_bucket(found, words)
    return found.to_config({**place, **words})


def _find_resumed(
    resume: str, alone: TrainingConfig
) -> tuple[RunValues | None, dict[str, Any] | None]:
    """Return what was recorded of the run that an attempt goes on with, and where it goes on.

    `alone` is what the words say without it. Without a record nothing is there yet; without a place
    it goes on in the directory that `alone` names.

    Raises:
        UsageError: It is not known, and has to be said.
        StorageError: The bucket that it is in cannot be read.
    """
    if os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE"):
        raise UsageError("--resume on several machines needs --config: not all have the record.")
    named = parse_remote_name(resume)
    if named is not None:
        uri, which = named
        found, is_there = _find_in_bucket(uri, which, alone)
        if found is None and is_there:
            raise UsageError(
                f"--resume {resume}: the bucket does not say with which configuration it was "
                "trained (an earlier version uploaded it). Say it: --config NAME."
            )
        name = found.values.get("run_name", "") if found else ""
        if name and not uri.endswith(f"/{name}"):  # a copy under another name
            parent, name = split_uri(uri) or (uri, "")
            return found, {"checkpoint_uri": parent, "run_name": name}
        return found, {"checkpoint_uri": uri.removesuffix(f"/{name}") if name else uri}
    if Path(resume).name != resume:
        is_there = Path(resume).is_dir()  # else the start says so
        return _find_in_checkpoint(Path(resume)) if is_there else (None, {})
    directory = RunPaths.of(alone).checkpoints
    found = find_run_values(directory)
    if found is not None:
        return found, None
    place = {"output_dir": alone.output_dir, "run_name": alone.run_name}
    if alone.bucket_uri:
        with contextlib.suppress(StorageError):  # it is read again, and said, before the start
            found, _ = _find_in_bucket(alone.bucket_uri, resume, alone)
            place["checkpoint_uri"] = alone.checkpoint_uri
    return found, place


def _without_place(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return words without those that say where a run is."""
    return {key: words[key] for key in words if key not in ("output_dir", "run_name")}


def _require_bucket(found: RunValues, words: Mapping[str, Any]) -> None:
    if found.lost_uri and not words.get("checkpoint_uri"):
        raise UsageError(
            f"{found.source}: the bucket of this run, {printable(found.lost_uri)}, is a relative "
            "path, and it is not known from where. Say it: --set checkpoint_uri=DIRECTORY."
        )


def _find_in_checkpoint(checkpoint: Path) -> tuple[RunValues, dict[str, Any]]:
    """Return the configuration of a checkpoint; one in a run's own directory goes on there."""
    found = read_checkpoint_values(checkpoint)
    is_plain = checkpoint.name == checkpoint.resolve().name
    directory = (checkpoint if is_plain else checkpoint.resolve()).parent
    if not (directory / RUN_FILE).is_file():
        return found, {}
    own = found.to_config({})
    placed = _placed_at(directory, own)
    values = {key: getattr(placed, key) for key in _PLACE_KEYS}
    return found, {key: values[key] for key in values if values[key] != getattr(own, key)}


def _find_in_bucket(uri: str, which: str, alone: TrainingConfig) -> tuple[RunValues | None, bool]:
    """Return the configuration of a checkpoint in a bucket, and whether any checkpoint is there."""
    project = alone.gcs_user_project
    with contextlib.closing(open_bucket(uri, project, LOOK_RETRY_SECONDS)) as bucket:
        views = read_remote_checkpoints(bucket, newest=NEWEST_SIDECARS)
    known = [view for view in views if view.config]
    with contextlib.suppress(UsageError, ConfigError):
        view = select_checkpoint(which, known)
        return usable_values(view.config, join_uri(uri, sidecar_object(str(view.name)))), True
    return None, bool(views)


def read_run_config(
    args: argparse.Namespace, run: str | Path | None = None, *, is_run_needed: bool = True
) -> TrainingConfig:
    """Return the configuration of the run that the words of `add_run_arguments` name.

    It is what the run recorded, with the values of the words in place of some; of the configuration
    file where nothing is recorded, which is told if `is_run_needed` and there are other runs.
    `run` is the run's own directory in place of the words'.

    Raises:
        ConfigError: A file or value is wrong.
        UsageError: The words contradict each other, or name no directory.
    """
    words = dict(parse_assignment(text) for text in args.set)
    options = {key: getattr(args, key, None) for key in _PLACE_OPTIONS}
    words.update({key: value for key, value in options.items() if value is not None})
    if run is None and args.run:
        run = _only_run(args.run, words)
    if run is not None:
        words = _without_place(words)
    alone = config_alone(args.config, words)
    directory = RunPaths.of(alone).checkpoints if run is None else Path(run)
    found = find_run_values(directory)
    if found is None:
        config = _named_config(args.config, words)
        if run is None:
            others = describe_other_runs(Path(alone.output_dir), alone.run_name, "--run-name ")
        else:
            others = describe_other_runs(directory, "", f"--run {directory}/")
        if others and is_run_needed:
            log.warning("%s", others)
        return config if run is None else _placed_at(directory, config)
    if found.lost_uri and "checkpoint_uri" not in words:
        text = "It is not known where the bucket of this run, %s, is: --set checkpoint_uri=..."
        log.warning(text, printable(found.lost_uri))
    config = _config_in(directory, found, words, None if run else alone)
    if args.config is not None:
        _tell_other_places(args.config, alone, config)
    return config


def _config_in(
    directory: Path, found: RunValues, words: Mapping[str, Any], alone: TrainingConfig | None
) -> TrainingConfig:
    """Return the configuration of the run in a directory, which `alone` names if it is not None."""
    if alone is not None and "run_name" not in found.values:
        return found.to_config(
            {**words, "output_dir": alone.output_dir, "run_name": alone.run_name}
        )
    return _placed_at(directory, found.to_config(_without_place(words)))


def _only_run(runs: Sequence[str], words: Mapping[str, Any]) -> str:
    require_path(runs[0], "--run")
    if len(runs) > 1:
        raise UsageError("--run: this command looks at one run, name one directory.")
    if "output_dir" in words or "run_name" in words:
        raise UsageError("--run is the whole directory: it takes no --output-dir or --run-name.")
    if not Path(runs[0]).is_dir():
        raise UsageError(f"--run {printable(runs[0])}: there is no such directory.")
    is_checkpoint = Path(runs[0], MANIFEST_FILE).is_file()
    return str(Path(runs[0]).resolve().parent) if is_checkpoint else runs[0]


def _placed_at(directory: Path, config: TrainingConfig) -> TrainingConfig:
    """Return the configuration of a run whose checkpoints are in a directory, maybe a copy.

    Bucket and logs stay those of the run, also where the directory has another name.
    """
    name, full = config.run_name, directory.resolve()
    if name and full.name == name:
        parent = directory.parent if directory.name == name else full.parent
        return replace(config, output_dir=str(parent))
    return replace(
        config,
        output_dir=str(directory),
        run_name="",
        checkpoint_uri=config.bucket_uri,
        logging_dir=str(Path(config.logging_dir, name)),
        cache_dir=str(Path(config.cache_dir, name)),
    )


def _tell_other_places(name: str, alone: TrainingConfig, config: TrainingConfig) -> None:
    """Warn where a run's data or bucket are not those of the configuration that was named."""
    keys = ("checkpoint_uri", "data_uri")
    pairs = {key: (getattr(config, key), getattr(alone, key)) for key in keys}
    pairs = {key: pair for key, pair in pairs.items() if _spelled(pair[0]) != _spelled(pair[1])}
    if pairs:
        told = "; ".join(f"{key} is {own}, not {said}" for key, (own, said) in pairs.items())
        words = [word for key in pairs for word in ("--set", f"{key}={as_setting(pairs[key][1])}")]
        text = "This run's own %s as --config %s says. To use those: %s"
        log.warning(text, printable(told), name, printable(shlex.join(words)))


def as_setting(value: Any) -> str:
    """Return a value as `--set` reads it."""
    is_plain = isinstance(value, str) and parse_assignment(f"key={value}")[1] == value
    return value if is_plain else json.dumps(value)


def _spelled(uri: Any) -> Any:
    return normalize_uri(uri) if isinstance(uri, str) and uri else uri
