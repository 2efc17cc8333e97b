"""Checkpoints sent to a run's bucket and brought back, for the upload manager.

    checkpoint directories -> uploader -> bucket -> verified, unpacked -> a directory

What is done is recorded in the same journal as the trainer's uploads. No torch here.
"""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path

from configs.training_config import TrainingConfig
from utils.base.console import LiveLine
from utils.base.errors import CheckpointError, LockedError, StorageError
from utils.base.progress import ProgressDisplay
from utils.base.text import printable
from utils.checkpoints.journal import Journal
from utils.checkpoints.layout import REMOTE_FOLDER, RunPaths
from utils.checkpoints.run_record import find_run_identity
from utils.checkpoints.store import hold_output_directory
from utils.remote.archive_reading import read_sidecar
from utils.remote.download import download_checkpoint
from utils.remote.listing import choose_remote
from utils.remote.verification import find_unconfirmed
from utils.tools.uploads.overview import LISTING_RETRY_SECONDS, opened_bucket
from utils.uploads.transport_choice import configured_transport, probe_transport
from utils.uploads.uploader import Uploader

_LINE_SECONDS = 30.0

log = logging.getLogger(__name__)


def find_lost(config: TrainingConfig, paths: RunPaths, journal: Journal) -> list[Path]:
    """Return the checkpoints here that are verified by the journal alone."""
    try:
        with opened_bucket(config, LISTING_RETRY_SECONDS) as bucket:
            lost = find_unconfirmed(paths.checkpoints, journal.latest(), bucket)
    except StorageError as exc:
        log.warning("The bucket cannot be read (%s): the journal alone decides.", exc)
        return []
    for checkpoint, problem in lost.items():
        log.warning("%s is uploaded again: %s.", checkpoint.name, problem.rstrip("."))
    return list(lost)


def upload(
    config: TrainingConfig, journal: Journal, checkpoints: list[Path], *, is_shown: bool
) -> dict[str, str]:
    """Upload checkpoints, newest first; return name -> error of those that failed."""
    wanted = configured_transport(config, journal.path.parent)
    if wanted.name in ("auto", "python"):  # which one works, and whether it may make parts
        wanted, _ = probe_transport(wanted, REMOTE_FOLDER, LISTING_RETRY_SECONDS)
    uploader = Uploader(wanted, journal, compression=config.upload_compression)
    line = LiveLine(enabled=is_shown, plain_seconds=_LINE_SECONDS)
    with uploader, contextlib.closing(line) as live:
        for checkpoint in checkpoints:
            try:
                uploader.submit(checkpoint)
            except CheckpointError as exc:
                uploader.failures[checkpoint.name] = str(exc)
        uploader.drain(math.inf, live.show)
    return uploader.failures


def bring_back(
    config: TrainingConfig, paths: RunPaths, text: str, directory: Path, *, is_shown: bool
) -> tuple[Path, bool]:
    """Bring the checkpoint that a user means from the bucket into a directory.

    Returns:
        Where it is, and whether it was there before.

    Raises:
        LockedError: The directory is the run's, and a trainer holds it.
        CheckpointError: There is no such checkpoint, or it is of another run.
    """
    is_own = directory.resolve() == paths.checkpoints.resolve()
    # No trainer may begin meanwhile: it would take the files so far for what a crash has left.
    held = hold_output_directory(paths) if is_own else contextlib.nullcontext()
    shown = ProgressDisplay(enabled=is_shown)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held)
        except LockedError as exc:
            raise LockedError(f"{exc} Or download elsewhere: --to DIR.") from exc
        bucket, display = stack.enter_context(opened_bucket(config)), stack.enter_context(shown)
        identity = find_run_identity(paths)  # once held: a trainer may have been here until now
        name = str(choose_remote(bucket, text, identity))
        if is_own and identity is not None:
            found = read_sidecar(bucket, name).manifest.run_id
            if found != identity.run_id:
                raise CheckpointError(
                    f"{name} in {bucket.uri} is of run {printable(found)}, the run here is "
                    f"{identity.run_id}. Nothing was downloaded. Choose another place: --to DIR."
                )
        was_here = (directory / name).exists()
        journal = Journal(paths.journal) if is_own else None
        return download_checkpoint(bucket, name, directory, journal, display.update), was_here
