"""The model that a user means, wherever it is.

    checkpoint's name, directory, gs:// archive or folder, Hub name -> model source

A directory is taken first, then a bucket's URI, then a checkpoint of the run (here, else in its
bucket), then a name on the Hugging Face Hub. No torch here.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from configs.training_config import TrainingConfig
from utils.base.errors import CheckpointError, UsageError
from utils.base.progress import OnProgress
from utils.checkpoints.layout import RunIdentity, RunPaths, find_checkpoints, read_manifest
from utils.checkpoints.views import near_checkpoint, no_such_checkpoint
from utils.remote.finding import (
    find_placed_model,
    is_checkpoint_word,
    model_in_bucket,
    model_in_directory,
    model_on_hub,
)
from utils.remote.listing import is_part_of, list_remote, read_sidecars
from utils.remote.loading import ModelSource
from utils.storage.open import open_bucket
from utils.tools.viewer.shelf import open_shelf


@dataclass(frozen=True)
class AverageSpan:
    """Which checkpoints are averaged: so many, up to the named one; or those of these steps."""

    count: int | None = None
    first: int = 0
    last: int = 0


def find_model(
    text: str,
    config: TrainingConfig,
    on_progress: OnProgress = lambda stage, done, total: None,
    *,
    is_run_named: bool = False,
) -> ModelSource:
    """Return where the model is that a user means; what is in a bucket is downloaded.

    Args:
        text: A checkpoint's name, step, `latest` or `best`; a directory of a checkpoint or of an
            exported model; `gs://BUCKET/PREFIX/NAME` of an archive or of an exported model; or a
            name on the Hub.
        config: Says where the run's checkpoints are, and its bucket.
        on_progress: Told of a download: stage, bytes done, bytes in all.
        is_run_named: The command line names the run, so a name on the Hub needs its owner.

    Raises:
        UsageError: There is no such model, or it is not clear which one is meant.
        CheckpointError: It is damaged or incomplete.
        StorageError: The bucket cannot be read.
    """
    found = find_placed_model(text, config, on_progress)
    if found is not None:
        return found
    with open_shelf(config) as shelf:
        problem = ""
        try:
            return model_in_directory(Path(shelf.where) / str(shelf.select(text).name))
        except UsageError as exc:
            problem = str(exc)
        if near_checkpoint(text, shelf.names) and not is_checkpoint_word(text):
            raise no_such_checkpoint(text, shelf.names)
        if is_run_named and "/" not in text and not is_checkpoint_word(text):
            raise UsageError(f"{problem} A model on the Hugging Face Hub is given as OWNER/NAME.")
    if is_checkpoint_word(text):
        if not config.bucket_uri:
            raise UsageError(problem)
        try:
            return model_in_bucket(config.bucket_uri, text, config, on_progress)
        except UsageError as exc:
            raise UsageError(f"{problem} In the bucket: {exc}") from exc
    return model_on_hub(text)


def find_average(
    source: ModelSource, span: AverageSpan, config: TrainingConfig, on_progress: OnProgress
) -> ModelSource:
    """Return the newest of a span of a branch's checkpoints, with the mean of their weights.

    They are looked for beside `source`, in the run's directory and in its bucket.

    Raises:
        UsageError: It is no checkpoint, or there are too few.
        CheckpointError: One of them is damaged.
        StorageError: The bucket cannot be read.
    """
    manifest = source.manifest
    if manifest is None or source.directory is None:
        raise UsageError(f"--average: {source.name} is no checkpoint of a run.")
    uri = source.bucket_uri or config.bucket_uri
    last = manifest.step if span.count else span.last
    found: dict[int, Path | str] = {}  # a name is in the bucket
    if uri:
        found |= _branch_in_bucket(uri, manifest.identity, range(span.first, last + 1), config)
    for directory in (RunPaths.of(config).checkpoints, source.directory.parent):
        found |= _branch_in_directory(directory, manifest.identity)
    steps = sorted(step for step in found if span.first <= step <= last)[-(span.count or 0) :]
    if len(steps) < (span.count or 2):
        shown = ", ".join(map(str, steps)) or "none"
        raise UsageError(
            f"--average: {span.count or 'at least 2'} checkpoints of the branch of {source.name} "
            f"are needed up to step {last}; there are {len(steps)} (steps: {shown})."
        )
    paths = []
    for step in steps:
        place = found[step]
        if isinstance(place, str):
            place = Path(model_in_bucket(uri, place, config, on_progress).location)
        paths.append(place)
    newest = model_in_directory(paths[-1])
    name = f"{newest.name} (mean of {len(paths)})"
    return replace(newest, name=name, bucket_uri=source.bucket_uri, averaged=tuple(paths))


def _branch_in_directory(directory: Path, identity: RunIdentity) -> dict[int, Path]:
    """Return the checkpoints of a branch in a directory, by step."""
    found = {}
    for name in find_checkpoints(directory):
        path = directory / str(name)
        with contextlib.suppress(CheckpointError):
            if identity.includes(read_manifest(path).identity, name.step):
                found[name.step] = path
    return found


def _branch_in_bucket(
    uri: str, identity: RunIdentity, steps: range, config: TrainingConfig
) -> dict[int, str]:
    """Return the names of a branch's checkpoints of these steps in a bucket, by step."""
    with contextlib.closing(open_bucket(uri, config.gcs_user_project)) as bucket:
        listing = list_remote(bucket)
        views = read_sidecars(bucket, listing, [n for n in listing.complete if n.step in steps])
    return {view.name.step: str(view.name) for view in views if is_part_of(identity, view)}
