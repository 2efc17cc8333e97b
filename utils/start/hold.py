"""What a run holds before it decides where it begins: its directory, and its prefix of the bucket.

Until both are held, another trainer may save, upload or finish there: what the checks found before
may not hold any more, and decides nothing.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from configs.training_config import TrainingConfig
from utils.base.console import configure_logging
from utils.base.files import removing_empty_folders
from utils.base.uri import join_uri, local_path
from utils.checkpoints import store
from utils.checkpoints.layout import REMOTE_FOLDER, RunPaths
from utils.start.resume import Plan, decide_start
from utils.storage.open import open_bucket
from utils.uploads import lease

LEASE_RETRY_SECONDS = 10.0


def hold_and_plan(
    stack: contextlib.ExitStack, args: argparse.Namespace, config: TrainingConfig, run_id: str
) -> Plan:
    """Hold the run's directory and bucket, then decide where to begin; for the main process.

    `run_id` names the holder of the bucket until the plan says which run it is.

    Raises:
        LockedError: Another trainer holds one of them.
        PretrainError: Of `decide_start`.
    """
    paths = RunPaths.of(config)
    stack.enter_context(store.hold_output_directory(paths))
    stack.enter_context(_logging_to_file(config, quiet=args.quiet))
    store.remove_leftovers(paths.checkpoints)
    held = None
    if uri := config.bucket_uri:
        bucket = open_bucket(uri, config.gcs_user_project, LEASE_RETRY_SECONDS)
        stack.callback(bucket.close)
        held = stack.enter_context(lease.hold_prefix(bucket, run_id))
    plan = decide_start(config, args.resume, fresh=args.fresh)
    if held is not None:
        held.run_id = plan.identity.run_id
    return plan


@contextlib.contextmanager
def _logging_to_file(config: TrainingConfig, *, quiet: bool) -> Iterator[None]:
    """Log to train.log too; a new one is not left where no run began."""
    paths = RunPaths.of(config)
    is_new = not paths.train_log.exists()
    configure_logging(config.log_level, quiet=quiet, file=paths.train_log)
    try:
        yield
    finally:
        if is_new and not paths.run_file.exists():
            configure_logging(config.log_level, quiet=quiet)
            paths.train_log.unlink(missing_ok=True)


def leaving_no_empty_folders(config: TrainingConfig) -> contextlib.AbstractContextManager[None]:
    """Remove afterwards the folders that were made for a run and have nothing in them."""
    paths = RunPaths.of(config)
    bucket = local_path(join_uri(config.bucket_uri, REMOTE_FOLDER)) if config.bucket_uri else None
    folders = [paths.checkpoints, paths.logs, paths.cache]
    return removing_empty_folders(*folders, *([bucket] if bucket else []))
