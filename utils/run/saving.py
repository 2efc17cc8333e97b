"""What the main process does with checkpoints: saves, uploads, retention, and how a run ends.

    files of a checkpoint -> saver -> commit -> uploader -> bucket, verified; old ones go

Everything that follows a commit happens in the saver's thread; training waits for none of it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.console import LiveLine
from utils.base.errors import CheckpointError, ExitCode, SaveError
from utils.base.machine import available_memory
from utils.base.text import format_bytes, format_duration
from utils.checkpoints.files import CheckpointFiles
from utils.checkpoints.journal import Journal
from utils.checkpoints.layout import (
    Manifest,
    RunIdentity,
    RunPaths,
    find_checkpoints,
    read_manifest,
)
from utils.checkpoints.saver import CheckpointSaver, Rendezvous
from utils.checkpoints.store import apply_retention, set_aside, verify_checkpoint
from utils.checkpoints.writer import WriterProcess
from utils.run.grace import describe_outcome, plan_grace
from utils.uploads.transports import TransportOptions
from utils.uploads.uploader import Uploader, find_unfinished

RETRY_SECONDS = 60.0
MEMORY_SHARE = 0.9
Tell = Callable[[str, str, int | None], None]

log = logging.getLogger("train")


class RunSaving:
    """The checkpoints of one start of a run, on its main process.

    With sharded state every rank has one, without a way to the bucket on the others: it writes the
    rank's part, and the main one's commits.

    Args:
        config: The run's configuration.
        paths: Its directories.
        identity: Run and branch that it writes to.
        device: Where the state's tensors are.
        transport: The way to the bucket; None uploads nothing.
        background_upload: False uploads before `save` returns.
        tell: Called with what happens to checkpoints: title, line, step it belongs to (None: now).
        rendezvous: Of all ranks' savers, where the state is sharded.
        writer: A writer process that has been started already.
    """

    def __init__(
        self,
        config: TrainingConfig,
        paths: RunPaths,
        identity: RunIdentity,
        device: torch.device,
        *,
        transport: TransportOptions | None = None,
        background_upload: bool = True,
        tell: Tell = lambda title, line, step: None,
        rendezvous: Rendezvous | None = None,
        writer: WriterProcess | None = None,
    ) -> None:
        self._config, self._paths, self._identity = config, paths, identity
        self._tell = tell
        self._journal = Journal(paths.journal)
        self._uploader: Uploader | None = None
        if transport is not None:
            self._uploader = self._build_uploader(transport)
        self._waits_for_uploads = not background_upload
        self._saver = CheckpointSaver(
            paths.checkpoints,
            device,
            self._after_commit,
            background=config.background_save,
            rendezvous=rendezvous,
            writer=writer,
        )
        self._failed_at: float | None = None
        self._sharers = 1 if rendezvous is None else ranks.ranks_on_this_machine()

    def prepare(self, snapshot_bytes: int) -> None:
        """Make room for snapshots before the first one is due."""
        self._saver.prepare(snapshot_bytes, self._usable_memory())

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._saver.is_busy

    def save(self, files: CheckpointFiles, must_leave: Callable[[], bool] = lambda: False) -> None:
        """Begin to save; returns when training may go on, up to `fence`.

        Args:
            files: What to save.
            must_leave: Ends a wait for the upload, where there is one.
        """
        self._saver.save(files, self._usable_memory())
        if self._waits_for_uploads:
            self._saver.wait()
            if self._uploader is not None:
                self._uploader.drain(math.inf, log.debug, must_leave)

    def fence(self) -> None:
        """Call before the optimizer changes the state."""
        self._saver.fence()

    def wait(self, seconds: float) -> bool:
        """Wait until the checkpoint is written or the time is over; tell whether it is written."""
        return self._saver.wait(seconds)

    @property
    def failure(self) -> SaveError | None:
        """Why the last save failed, None if it did not or is not over."""
        return None if self._saver.is_busy else self._saver.failure

    def is_retry_due(self) -> bool:
        """Tell whether the last save failed and a minute has passed since."""
        if self.failure is None:
            self._failed_at = None
            return False
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            self._tell("checkpoints", str(self.failure), None)
        if time.monotonic() - self._failed_at < RETRY_SECONDS:
            return False
        self._failed_at = None
        return True

    def plan_leaving(self, remaining_seconds: float, snapshot_bytes: int) -> None:
        """Say what the grace period is enough for."""
        uploader = self._uploader
        if uploader is None:
            seconds = max(0.0, remaining_seconds)
            log.info("%.0f s of grace: saving on this disk; uploading is off.", seconds)
            return
        pending = []
        for path in uploader.pending_paths:
            with contextlib.suppress(CheckpointError):  # one that was given up is gone
                pending.append((path.name, read_manifest(path).total_bytes))
        plan = plan_grace(
            remaining_seconds,
            self._saver.last_seconds,
            snapshot_bytes,
            uploader.bytes_per_second,
            sorted(pending, key=lambda item: item[0]),
        )
        log.info("%s", plan.describe())

    def finish(
        self,
        live: LiveLine,
        upload_seconds: float,
        *,
        is_leaving: bool,
        must_leave: Callable[[], bool] = lambda: False,
    ) -> ExitCode:
        """Wait for the save in progress and for uploads; say what is not in the bucket.

        Args:
            live: Shows what is waited for.
            upload_seconds: How long to wait for uploads.
            is_leaving: Whether a request to stop ends this start: then what is left is normal.
            must_leave: Asked once a second; a request that came in the meantime ends the wait.

        Raises:
            SaveError: The last save failed.
        """
        while not self._saver.wait(0.5):
            live.show("writing the checkpoint")
        uploader, saved = self._uploader, self._saver.last_committed
        if uploader is None:
            self._require_saved()
            if is_leaving and saved is not None:
                log.info("Saved %s on this disk; uploading is off.", saved)
            return ExitCode.DONE
        if uploader.pending:
            count = len(uploader.pending)
            log.info(
                "Waiting up to %s for %d upload%s.",
                format_duration(upload_seconds),
                count,
                "" if count == 1 else "s",
            )
        left = uploader.drain(upload_seconds, live.show, must_leave)
        is_leaving = is_leaving or must_leave()
        self.apply_retention()
        missing = list(dict.fromkeys([*left, *uploader.failures]))
        if is_leaving:
            log.info(
                "%s", describe_outcome(str(saved) if saved else None, uploader.verified, missing)
            )
        self._require_saved()
        if not missing:
            return ExitCode.DONE
        if not is_leaving:
            self._report_missing(left, missing)
        return ExitCode.NOT_VERIFIED

    def _require_saved(self) -> None:
        if self._saver.failure is not None:
            raise self._saver.failure

    def _report_missing(self, left: list[str], missing: list[str]) -> None:
        for name in left:
            log.error("%s was not uploaded before the deadline.", name)
        kept = [name for name in missing if (self._paths.checkpoints / name).is_dir()]
        log.error(
            "%d checkpoints are not verified in the bucket. Kept in %s: %s. "
            "Then: python scripts/upload_manager.py upload-all",
            len(missing),
            self._paths.checkpoints,
            ", ".join(kept) or "none",
        )

    def find_newest(self, before_step: int) -> tuple[Path, Manifest] | None:
        """Return this run's newest checkpoint that verifies, of a step below `before_step`."""
        for name in reversed(find_checkpoints(self._paths.checkpoints)):
            if name.step >= before_step:
                continue
            path = self._paths.checkpoints / str(name)
            try:
                manifest = verify_checkpoint(path)
                if self._identity.includes(manifest.identity, name.step):
                    return path, manifest
            except CheckpointError as exc:
                moved = set_aside(path, self._paths.checkpoints)  # its name will be needed
                log.warning("%s It was set aside as %s; trying the one before.", exc, moved)
        return None

    def apply_retention(self) -> None:
        """Let go of the checkpoints that the retention rules give up."""
        deleted = apply_retention(
            self._paths.checkpoints,
            self._journal,
            self._config,
            run_id=self._identity.run_id,
            is_uploading_on=self._uploader is not None,
        )
        if self._uploader is not None:
            self._uploader.forget(deleted)

    def close(self) -> None:
        """Let a save in progress finish, then stop every thread and process."""
        self._saver.close()
        if self._uploader is not None:
            self._uploader.close()

    def _after_commit(self, checkpoint: Path) -> None:
        size = format_bytes(read_manifest(checkpoint).total_bytes)
        seconds = format_duration(self._saver.last_seconds or 0.0)
        saved = self._saver.last_committed
        self._tell(
            "checkpoints",
            f"{checkpoint.name} saved: {size} in {seconds}",
            saved.step if saved else None,
        )
        if self._uploader is not None:
            self._uploader.submit(checkpoint)
        self.apply_retention()

    def _build_uploader(self, transport: TransportOptions) -> Uploader:
        self._journal.compact()
        uploader = Uploader(
            transport,
            self._journal,
            compression=self._config.upload_compression,
            sweeps=True,
            tell=lambda line: self._tell("uploads", line, None),
        )
        for checkpoint in find_unfinished(self._paths.checkpoints, self._journal, transport.uri):
            uploader.submit(checkpoint)
        return uploader

    def _usable_memory(self) -> int:
        return int(available_memory() * MEMORY_SHARE) // self._sharers
