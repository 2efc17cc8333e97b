"""The checkpoints of a run: when and what to save, then uploads and retention.

    state, position in the data -> saver -> commit -> uploader -> bucket, verified; old ones go

Everything that follows a commit happens in the saver's thread; training waits for none of it. Every
rank has this: they agree on when to save. The main one writes, commits and uploads; with sharded
state each writes its part.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.training_config import TrainingConfig
from utils import checkpoint_utils
from utils.base import ranks
from utils.base.errors import SaveError
from utils.base.machine import available_memory
from utils.base.text import format_bytes, format_duration
from utils.checkpoints.files import CheckpointFiles
from utils.checkpoints.journal import Journal
from utils.checkpoints.layout import Manifest, RunIdentity, RunPaths, read_manifest
from utils.checkpoints.saver import CheckpointSaver, Rendezvous
from utils.checkpoints.store import apply_retention
from utils.checkpoints.writer import WriterProcess
from utils.costs.spending import SpendingMeter
from utils.data_utils import TrainingData
from utils.start import restore
from utils.start.resume import plan_start
from utils.training.stopping import StopRequest
from utils.training_utils import TrainState
from utils.uploads.transports import TransportOptions
from utils.uploads.uploader import Uploader, find_unfinished

SAVE_RETRY_SECONDS = 60.0
SNAPSHOT_MEMORY_SHARE = 0.9
LEAVING_SHARE = 0.1  # of the grace period, for ending threads and releasing what is held
Tell = Callable[[str, str, int | None], None]

log = logging.getLogger("train")


@dataclass(frozen=True)
class SavingOptions:
    """How checkpoints are written and uploaded.

    Without a `transport` nothing is uploaded; with `is_upload_in_background=False`, training waits
    for uploads. `writer` is a process that has been started already.
    """

    transport: TransportOptions | None = None
    is_upload_in_background: bool = True
    writer: WriterProcess | None = None


@dataclass(frozen=True)
class SavedParts:
    """What a checkpoint is made of.

    `data` is for the position in them; `tokenizer_files` (file name -> bytes) are there on the main
    process.
    """

    state: TrainState
    data: TrainingData
    identity: RunIdentity
    meter: SpendingMeter
    tokenizer_files: Mapping[str, bytes]

    def collect(self, config: TrainingConfig) -> CheckpointFiles | None:
        """Return what this rank writes, None where it writes nothing; every rank calls this."""
        state, position = self.state, self.state.progress.sample_index
        gathered = ranks.gather_to_main(
            (checkpoint_utils.capture_random_state(), sorted(self.data.bad_shards))
        )
        files = None
        if gathered is not None:
            log.info("Saving checkpoint at step %d.", state.progress.step)
            state.progress.spending = self.meter.read().to_json()
            bad_shards = {shard for _, shards in gathered for shard in shards}
            files = checkpoint_utils.collect_files(
                state,
                self.data.describe(position, sorted(bad_shards)),
                config,
                self.identity,
                [states for states, _ in gathered],
                self.tokenizer_files,
            )
        return checkpoint_utils.add_held_state(
            state, self.data.describe(position), config, self.identity, files
        )


class RunSaving:
    """The checkpoints of one attempt of a run; every rank makes one at the same point.

    `stop` ends waits for uploads; with it the ranks agree. `tell` is called with what happens to
    checkpoints: title, line, step it belongs to (None: now).

    Raises:
        CheckpointError: With sharded state: the ranks do not see the same output directory.
    """

    def __init__(
        self,
        config: TrainingConfig,
        parts: SavedParts,
        stop: StopRequest,
        options: SavingOptions,
        tell: Tell,
    ) -> None:
        self.config, self.parts, self.state = config, parts, parts.state
        self.paths = RunPaths.of(config)
        self._stop, self._options, self._tell = stop, options, tell
        self._identity = parts.identity
        self._journal = Journal(self.paths.journal)
        is_sharded = self.state.division.rows is not None
        rendezvous = self._arrange_rendezvous() if is_sharded else None
        is_main = self.state.accelerator.is_main_process
        self.is_writing = is_main or is_sharded
        """Whether this rank writes."""
        self.uploader: Uploader | None = None
        """None on other ranks than the main one, and where nothing is uploaded."""
        if is_main and options.transport is not None:
            self.uploader = self._build_uploader(options.transport)
        self.saver = CheckpointSaver(
            self.paths.checkpoints,
            self.state.accelerator.device,
            self._after_commit,
            background=config.background_save,
            rendezvous=rendezvous,
            writer=options.writer,
        )
        self.saved_step = self.state.progress.step
        """The step that was saved last, or gone on from."""
        self._saved_at = time.monotonic()
        self._failed_at: float | None = None
        self._sharers = ranks.ranks_on_this_machine() if is_sharded else 1
        self.snapshot_bytes = self.state.division.snapshot_bytes()
        """What a checkpoint of this rank takes, about."""
        if self.is_writing:
            self.saver.prepare(self.snapshot_bytes, self._usable_memory())

    def _arrange_rendezvous(self) -> Rendezvous:
        """Return where the savers of all ranks meet: a group of their own, for their threads."""
        token = ranks.broadcast_from_main(secrets.token_hex(4))
        restore.require_shared_directory(self.paths.checkpoints, token)
        group = ranks.new_host_group()
        return Rendezvous(token, lambda answer: ranks.gather_to_main(answer, group))

    def is_due(self) -> bool:
        """Tell whether `save_seconds` have passed, or a failed save is to be tried again."""
        seconds = self.config.save_seconds
        due = seconds is not None and time.monotonic() - self._saved_at >= seconds
        return ranks.any_rank(due or self._is_retry_due())

    def save(self, *, is_last: bool = False) -> float:
        """Begin to save a checkpoint, written while training goes on; return the seconds waited.

        A save that is due while the one before is still being written waits or is skipped, as
        `save_overlap` says; the last one of an attempt always waits. A state that is saved already
        is not saved twice. Call `saver.fence` before the optimizer changes the state.
        """
        step = self.state.progress.step
        if step == self.saved_step:
            return 0.0
        started = time.perf_counter()
        if ranks.any_rank(self.saver.is_busy):
            if self.config.save_overlap == "skip" and not is_last:
                log.warning(
                    "Step %d is not saved: the save before it is still being written.", step
                )
                return 0.0
            self.wait()
        files = self.parts.collect(self.config)
        if files is not None:
            self.saver.save(files, self._usable_memory())
            if not self._options.is_upload_in_background:
                self.saver.wait()
                if self.uploader is not None:
                    self.uploader.drain(math.inf, log.debug, self.must_leave)
        self._saved_at, self.saved_step = time.monotonic(), step
        seconds = time.perf_counter() - started
        log.debug("Training waited %.1f ms for the save.", seconds * 1e3)
        return seconds

    def save_last(self) -> None:
        """Save what is not saved yet, wait until it is written; try a failed save once more."""
        self.save(is_last=True)
        self.wait()
        if ranks.any_rank(self.failure is not None):
            log.info("Saving once more.")
            self.saved_step = -1
            self.save(is_last=True)

    def wait(self) -> None:
        """Wait until nothing is being written; no rank waits in one collective for long."""
        while ranks.any_rank(not self.saver.wait(0.5)):
            pass

    @property
    def failure(self) -> SaveError | None:
        """Why the last save failed, None if it did not or is not over."""
        return None if self.saver.is_busy else self.saver.failure

    def leave_at(self) -> float:
        """Return the `time.monotonic()` by which a request wants the end; infinite without one."""
        requested_at = self._stop.requested_at if self._stop.reason is not None else None
        if requested_at is None:
            return math.inf
        return requested_at + (1 - LEAVING_SHARE) * self.config.grace_seconds

    def must_leave(self) -> bool:
        """Tell whether the time that a request leaves is over."""
        return time.monotonic() >= self.leave_at()

    def find_newest(self, before_step: int) -> tuple[Path, Manifest] | None:
        """Return this run's newest checkpoint that verifies, of a step below `before_step`."""
        plan = plan_start(self.paths, resume="latest")
        earlier = (one for one in plan.candidates if one.name.step < before_step)
        found = (restore.bring(plan, one, self.paths) for one in earlier)
        return next(filter(None, found), None)

    def apply_retention(self) -> None:
        """Let go of the checkpoints that the retention rules give up."""
        deleted = apply_retention(
            self.paths.checkpoints,
            self._journal,
            self.config,
            run_id=self._identity.run_id,
            is_uploading_on=self.uploader is not None,
        )
        if self.uploader is not None:
            self.uploader.forget(deleted)

    def close(self) -> None:
        """Let a save in progress finish, then stop every thread and process."""
        self.saver.close()
        if self.uploader is not None:
            self.uploader.close()

    def _is_retry_due(self) -> bool:
        """Tell whether the last save failed and a minute has passed since."""
        if self.failure is None:
            self._failed_at = None
            return False
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            self._tell("checkpoints", str(self.failure), None)
        if time.monotonic() - self._failed_at < SAVE_RETRY_SECONDS:
            return False
        self._failed_at = None
        return True

    def _after_commit(self, checkpoint: Path) -> None:
        size = format_bytes(read_manifest(checkpoint).total_bytes)
        seconds = format_duration(self.saver.last_seconds or 0.0)
        saved = self.saver.last_committed
        self._tell(
            "checkpoints",
            f"{checkpoint.name} saved: {size} in {seconds}",
            saved.step if saved else None,
        )
        if self.uploader is not None:
            self.uploader.submit(checkpoint)
        self.apply_retention()

    def _build_uploader(self, transport: TransportOptions) -> Uploader:
        self._journal.compact()
        uploader = Uploader(
            transport,
            self._journal,
            compression=self.config.upload_compression,
            should_sweep=True,
            tell=lambda line: self._tell("uploads", line, None),
        )
        for checkpoint in find_unfinished(self.paths.checkpoints, self._journal, transport.uri):
            uploader.submit(checkpoint)
        return uploader

    def _usable_memory(self) -> int:
        return int(available_memory() * SNAPSHOT_MEMORY_SHARE) // self._sharers
