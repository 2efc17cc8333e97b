"""What a run holds before it decides where it begins: its directory, and its prefix of the bucket.

Until both are held, another trainer may save, upload or finish there: what the checks found before
may not hold any more, and decides nothing.
"""

from __future__ import annotations

import argparse
import contextlib

from configs.training_config import TrainingConfig
from utils.base.console import configure_logging
from utils.base.uri import join_uri
from utils.checkpoints import store
from utils.checkpoints.layout import RunPaths
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
    configure_logging(config.log_level, quiet=args.quiet, file=paths.train_log)
    store.remove_leftovers(paths.checkpoints)
    held = None
    if config.checkpoint_uri:
        uri = join_uri(config.checkpoint_uri, config.run_name)
        bucket = open_bucket(uri, config.gcs_user_project or None, LEASE_RETRY_SECONDS)
        stack.callback(bucket.close)
        held = stack.enter_context(lease.hold_prefix(bucket, run_id))
    plan = decide_start(config, args.resume, fresh=args.fresh)
    if held is not None:
        held.run_id = plan.identity.run_id
    return plan
