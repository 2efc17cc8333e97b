"""What there is of a run's checkpoints, here and in its bucket, for the upload manager.

    journal, checkpoint directory, bucket -> overview; what cannot be read is named in it

No torch here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from configs.training_config import TrainingConfig
from utils.base.errors import PretrainError, UsageError
from utils.checkpoints.journal import Journal, JournalEntry
from utils.checkpoints.layout import RunIdentity, RunPaths
from utils.checkpoints.retention import Decision, decide_retention
from utils.checkpoints.run_record import find_run_identity
from utils.checkpoints.views import CheckpointView, describe_lack, read_local_checkpoints
from utils.command_line.arguments import NAME_THE_RUN
from utils.remote.listing import read_remote_checkpoints
from utils.storage.bucket import Bucket
from utils.storage.open import open_bucket
from utils.uploads.status import build_queue, build_upload_rows, last_errors
from utils.uploads.uploader import find_unfinished

LISTING_RETRY_SECONDS = 5.0
READING_RETRY_SECONDS = 60.0


def require_uri(config: TrainingConfig) -> str:
    """Return the run's bucket.

    Raises:
        UsageError: The configuration names none.
    """
    if not config.bucket_uri:
        raise UsageError("checkpoint_uri is empty: --set checkpoint_uri=gs://... or a directory.")
    return config.bucket_uri


def opened_bucket(
    config: TrainingConfig, retry_seconds: float = READING_RETRY_SECONDS
) -> contextlib.closing[Bucket]:
    """Open the run's bucket for a while."""
    project = config.gcs_user_project
    return contextlib.closing(open_bucket(require_uri(config), project, retry_seconds))


def read_overview(config: TrainingConfig, paths: RunPaths) -> dict[str, Any]:
    """Return every checkpoint here and in the bucket, the queue, and the last errors.

    Raises:
        UsageError: There is no run, neither here nor in its bucket.
    """
    uri = config.bucket_uri
    journal, problems = Journal(paths.journal), []
    entries: list[JournalEntry] = []
    local: list[CheckpointView] = []
    identity: RunIdentity | None = None
    try:
        entries = list(journal.entries())
    except OSError as exc:
        problems.append(f"{paths.journal} cannot be read: {exc.strerror or exc}")
    uploads = {entry.checkpoint: entry for entry in entries}
    try:
        identity = find_run_identity(paths)
        local = read_local_checkpoints(paths.checkpoints, uploads)
        if paths.checkpoints.exists() and not paths.checkpoints.is_dir():
            problems.append(f"{paths.checkpoints} is no directory")
    except OSError as exc:
        problems.append(f"{paths.checkpoints} cannot be read: {exc.strerror or exc}")
    remote, problem = read_remote(config)
    if not problems:
        require_run(paths, uri, remote, problem)
    decisions: list[Decision] = []
    if identity is not None:
        decisions = decide_retention(
            local, config, run_id=identity.run_id, is_uploading_on=bool(uri)
        )
    owed = find_unfinished(paths.checkpoints, journal, uri, uploads) if uri and local else []
    return {
        "run_id": identity.run_id if identity else None,
        "directory": str(paths.checkpoints),
        "bucket": uri or None,
        "bucket_problem": problem,
        "problems": problems,
        "checkpoints": build_upload_rows(
            local, remote, uri=uri, bucket_problem=problem, decisions=decisions
        ),
        "queue": build_queue([path.name for path in owed], uploads),
        "errors": last_errors(entries, uploads),
    }


def read_remote(config: TrainingConfig) -> tuple[list[CheckpointView], str | None]:
    """Return the checkpoints in the bucket, or none and why it could not be read."""
    try:
        with opened_bucket(config, LISTING_RETRY_SECONDS) as bucket:
            return read_remote_checkpoints(bucket), None
    except PretrainError as exc:
        return [], str(exc)


def require_run(
    paths: RunPaths, uri: str, remote: Sequence[CheckpointView], problem: str | None
) -> None:
    """Refuse what looks like success where there is no run, neither here nor in its bucket.

    Raises:
        UsageError: The run's directory does not exist, and its bucket, if any, has no checkpoint.
    """
    is_unknown = bool(uri and problem)
    if not (paths.checkpoints.exists() or remote or is_unknown):
        raise UsageError(f"{describe_places(paths.checkpoints, uri)} {NAME_THE_RUN}")


def describe_places(*places: object) -> str:
    """Say of each place that is one that it has no checkpoints."""
    return " ".join(describe_lack(str(place)) for place in places if place)
