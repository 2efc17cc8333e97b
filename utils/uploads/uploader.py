"""The uploader: brings each committed checkpoint to the bucket, verified, while training goes on.

    checkpoint directory (committed) -> queue -> upload process -> bucket, verified -> journal

One worker thread takes checkpoints from a queue and has each uploaded by a process of its own. What
happens is in the journal before and after, so that a restart, or another process, knows what is
still owed. A failed upload never stops training and is never forgotten: while its error is
transient it is tried again with growing, jittered waits, then now and then, and at once when
another upload has shown that the bucket is back. When uploads lag behind saves, the newest and the
best go first; retention gives up the oldest. One process at a time uploads a checkpoint. No torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from utils.base.archive_formats import COMPRESSIONS
from utils.base.errors import PretrainError, TransientStorageError
from utils.base.text import count_of, format_bytes, format_duration
from utils.base.uri import join_uri, normalize_uri
from utils.checkpoints.journal import Journal, JournalEntry, UploadState
from utils.checkpoints.layout import (
    MANIFEST_FILE,
    Manifest,
    archive_object,
    find_checkpoints,
    local_archive,
    parse_checkpoint_name,
    read_manifest,
)
from utils.checkpoints.store import hold_upload
from utils.checkpoints.views import (
    CheckpointView,
    find_best,
    is_verified_in,
    read_local_checkpoints,
)
from utils.storage.bucket import crc32c_of_file
from utils.storage.retrying import ARCHIVE_FACTOR, FIRST_RETRY_SECONDS, backoff
from utils.uploads.job import ProgressReport, UploadJob, UploadResult
from utils.uploads.process import InterruptedUploadError, run_in_process
from utils.uploads.transport_choice import tool_words
from utils.uploads.transports import TransportOptions

UPLOAD_ATTEMPTS = 5
JITTER = 0.5
LATER_SECONDS = 600.0
LOCKED_SECONDS = 5.0
PROGRESS_SECONDS = 2.0
_CLOSE_SECONDS = 3.0
MAX_THREADS = 4
GIVEN_UP = (UploadState.SUPERSEDED, UploadState.REMOVED)

log = logging.getLogger(__name__)

Perform = Callable[[UploadJob, Callable[[ProgressReport], None], Callable[[], bool]], UploadResult]


@dataclass(eq=False)
class _Item:
    """A checkpoint on its way.

    Attributes:
        delays: Mean seconds before each next attempt.
        ready_at: When it may be tried next, on the monotonic clock.
        is_late: It has failed `UPLOAD_ATTEMPTS` times: it is tried again, but not waited for.
        is_elsewhere: Another process uploads it.
    """

    path: Path
    delays: Iterator[float]
    attempts: int = 0
    ready_at: float = 0.0
    is_late: bool = False
    is_elsewhere: bool = False

    @property
    def step(self) -> int:
        name = parse_checkpoint_name(self.path.name)
        return name.step if name else -1


class Uploader:
    """Uploads checkpoints in the background; a context manager that stops at its exit.

    Args:
        transport: Where to and how; its name is not auto for gs://.
        should_sweep: Remove what other interrupted uploads left in the bucket; only for the one
            that holds the bucket's lease.
        first_backoff_seconds: Mean wait before the second attempt; the next are 4 times longer.
        perform: Does one upload; in a process of its own by default.
        tell: Called in the worker's thread with a line about each upload that ended.
    """

    def __init__(
        self,
        transport: TransportOptions,
        journal: Journal,
        *,
        compression: str = "fast",
        should_sweep: bool = False,
        first_backoff_seconds: float = FIRST_RETRY_SECONDS,
        perform: Perform | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.failures: dict[str, str] = {}
        """Checkpoint name -> why it is not in the bucket."""
        self.verified: list[str] = []
        """Names of the checkpoints that this uploader brought to the bucket."""
        self.bytes_per_second: float | None = None
        """Speed of the last upload that was verified, None before one was."""
        self._transport, self._journal = transport, journal
        self._compression, self._should_sweep = compression, should_sweep
        self._suffix, self._tell = COMPRESSIONS[compression].suffix, tell
        self._first_backoff, self._perform = first_backoff_seconds, perform or run_in_process
        self._queue: list[_Item] = []
        self._active: _Item | None = None
        self._progress: _Progress | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Uploader:
        """Return the uploader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the worker; what is still queued stays in the journal."""
        self.close()

    def submit(self, checkpoint: Path) -> None:
        """Queue a committed checkpoint."""
        run_id = read_manifest(checkpoint).run_id
        self._record(checkpoint.name, run_id, UploadState.QUEUED, uri=self._transport.uri)
        log.info("Queued %s for upload.", checkpoint.name)
        with self._changed:
            self._queue.append(_Item(checkpoint, backoff(self._first_backoff, ARCHIVE_FACTOR)))
            self._changed.notify_all()

    def forget(self, names: Iterable[str]) -> None:
        """Take checkpoints that were given up out of the queue."""
        with self._changed:
            gone = set(names)
            self._queue = [item for item in self._queue if item.path.name not in gone]
            for name in gone:
                self.failures.pop(name, None)

    @property
    def pending_paths(self) -> list[Path]:
        """What is in flight or queued; not what failed and is tried again later."""
        with self._changed:
            items = [*([self._active] if self._active else []), *self._queue]
            return [item.path for item in items if not item.is_late]

    @property
    def pending(self) -> list[str]:
        """Names of what is in flight or queued."""
        return [path.name for path in self.pending_paths]

    def describe(self) -> str:
        """Return what is in flight and how far it is, and how many wait."""
        progress, names = self._progress, self.pending
        if progress is None:
            return f"uploading {', '.join(names)}"
        waiting = [name for name in names if name != progress.name]
        return f"{progress.describe()}{f', {len(waiting)} waiting' if waiting else ''}"

    def drain(
        self,
        deadline_seconds: float,
        on_wait: Callable[[str], None],
        must_leave: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Wait until all is uploaded or the deadline is over; return what is still pending.

        What failed before is tried once more. `on_wait` is called about once a second with what is
        going on; `must_leave` is asked as often, and ends the wait.
        """
        end = time.monotonic() + deadline_seconds
        self._try_late_ones()
        while pending := self.pending:
            remaining = end - time.monotonic()
            if remaining <= 0 or must_leave():
                break
            on_wait(self.describe())
            with self._changed:
                self._changed.wait(min(1.0, remaining))
        self._forgive()
        return pending

    def _forgive(self) -> None:
        """Drop failures of checkpoints that another process has brought to the bucket since."""
        directory = self._journal.path.parent
        with contextlib.suppress(OSError):
            latest = self._journal.latest() if self.failures else {}
            for name in list(self.failures):
                if is_verified_in(self._transport.uri, directory / name, latest.get(name)):
                    log.info("%s was brought to the bucket by another process.", name)
                    del self.failures[name]

    def close(self) -> None:
        """Stop at once; what is left stays in the journal for the next run."""
        self._closing.set()
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(_CLOSE_SECONDS)

    def _work(self) -> None:
        while (item := self._take()) is not None:
            self._try(item)
            with self._changed:
                self._active = self._progress = None
                self._changed.notify_all()

    def _take(self) -> _Item | None:
        """Wait for something to do; None when closed."""
        with self._changed:
            while not self._closing.is_set():
                now = time.monotonic()
                ready = [item for item in self._queue if item.ready_at <= now]
                if ready:
                    self._active = self._choose(ready)
                    self._queue.remove(self._active)
                    self._active.is_late = False  # whoever drains waits for it
                    return self._active
                waits = [item.ready_at - now for item in self._queue]
                self._changed.wait(min(waits) if waits else None)
        return None

    def _choose(self, ready: list[_Item]) -> _Item:
        """Return the newest, then the best, then the next newest."""
        views: list[CheckpointView] = []
        if len(ready) > 1:
            with contextlib.suppress(OSError):
                views = read_local_checkpoints(ready[0].path.parent, {})
        newest, best = views[-1:], [view for view in [find_best(views)] if view is not None]
        first = [view.path for view in (*best, *newest)]

        def rank(item: _Item) -> tuple[bool, int, int]:
            place = first.index(item.path) if item.path in first else -1
            return not item.is_late, place, item.step

        return max(ready, key=rank)

    def _try(self, item: _Item) -> None:
        """Try once; what is not over then is in the queue again."""
        checkpoint = item.path
        run_id = ""
        try:
            with hold_upload(checkpoint) as is_alone:
                if not is_alone:
                    if not item.is_elsewhere:
                        log.info("%s is being uploaded by another process.", checkpoint.name)
                    item.is_elsewhere = True
                    self._requeue(item, LOCKED_SECONDS)
                    return
                item.attempts += 1
                manifest = read_manifest(checkpoint)
                run_id = manifest.run_id
                self._upload(item, manifest)
        except InterruptedUploadError:  # no failure: the journal says where it was
            log.debug("The upload of %s goes on at the next run.", checkpoint.name)
            with contextlib.suppress(OSError):
                # Its writer was killed.
                local_archive(checkpoint, self._suffix).unlink(missing_ok=True)
        except TransientStorageError as exc:
            self._try_later(item, run_id, str(exc))
        except OSError as exc:  # of the journal: the disk may be full
            self._try_later(item, run_id, f"{exc.filename or checkpoint}: {exc.strerror or exc}.")
        except PretrainError as exc:
            self._fail(item, run_id, str(exc))
        except Exception as exc:  # noqa: BLE001 - a worker that dies would lose the queue silently
            log.debug("Upload of %s failed.", checkpoint.name, exc_info=True)
            self._fail(item, run_id, f"{type(exc).__name__}: {exc}")

    def _upload(self, item: _Item, manifest: Manifest) -> None:
        checkpoint, name, uri = item.path, item.path.name, self._transport.uri
        entry = self._journal.latest().get(name)
        if is_verified_in(uri, checkpoint, entry):
            log.info("%s was brought to the bucket by another process.", name)
            self._succeed(item)
            return
        job = UploadJob(
            str(checkpoint),
            self._transport,
            self._compression,
            max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2)),
            self._should_sweep,
            tuple(self.pending) + tuple(self.failures),
        )
        self._record(name, manifest.run_id, UploadState.ARCHIVING, attempt=item.attempts)
        size = format_bytes(manifest.total_bytes)
        log.info("Uploading %s (%s) to %s%s.", name, size, uri, tool_words(self._transport.name))
        self._progress = _Progress(name)
        result = self._perform(
            job, lambda report: self._follow(item, manifest.run_id, report), self._closing.is_set
        )
        speed = min(result.sent, result.size) / max(1e-6, result.seconds)
        if result.sent:  # what was there already says nothing of the line
            self.bytes_per_second = speed
        self._journal.record(
            name,
            manifest.run_id,
            UploadState.VERIFIED,
            bytes=result.size,
            crc32c=result.crc32c,
            uri=join_uri(uri, archive_object(name, result.suffix)),
            bucket=normalize_uri(uri),
            manifest_crc32c=crc32c_of_file(checkpoint / MANIFEST_FILE),
            seconds=round(result.seconds, 3),
            transport=self._transport.name,
            bytes_per_second=round(speed),
        )
        self._succeed(item)
        took = f"{format_bytes(result.size)} in {format_duration(result.seconds)}"
        self._tell(f"{name} uploaded and verified: {took}")
        log.info("Verified %s in the bucket (crc32c %s): %s.", name, result.crc32c, took)

    def _follow(self, item: _Item, run_id: str, report: ProgressReport) -> None:
        """Keep the progress in the journal, for other processes."""
        progress = self._progress
        if progress is not None and progress.update(report):
            self._record(
                item.path.name,
                run_id,
                UploadState.UPLOADING if report.sent else UploadState.ARCHIVING,
                sync=False,
                attempt=item.attempts,
                uri=join_uri(self._transport.uri, archive_object(item.path.name, self._suffix)),
                **progress.facts(),
            )

    def _succeed(self, item: _Item) -> None:
        self.failures.pop(item.path.name, None)
        self.verified.append(item.path.name)
        self._try_late_ones()

    def _try_late_ones(self) -> None:
        """Give what failed before one more attempt."""
        with self._changed:
            for item in self._queue:
                if item.is_late:
                    item.is_late, item.ready_at = False, 0.0
                    item.attempts = min(item.attempts, UPLOAD_ATTEMPTS - 1)
            self._changed.notify_all()

    def _try_later(self, item: _Item, run_id: str, error: str) -> None:
        name, is_late = item.path.name, item.attempts >= UPLOAD_ATTEMPTS
        if not is_late:
            seconds = _jittered(next(item.delays))
            log.warning("Upload of %s failed, trying again in %.0f s: %s", name, seconds, error)
            self._tell(f"{name}: upload failed, trying again in {seconds:.0f} s: {error}")
        else:
            seconds = _jittered(LATER_SECONDS)
            self._give_up(item, f"{error} ({count_of(item.attempts, 'attempt')})")
        again = datetime.now(UTC) + timedelta(seconds=seconds)
        self._record_failure(item, run_id, error, again.isoformat(timespec="seconds"))
        self._requeue(item, seconds, is_late)

    def _requeue(self, item: _Item, seconds: float, is_late: bool = False) -> None:
        with self._changed:
            self._active = None  # in the same moment: who drains finds it once
            item.ready_at, item.is_late = time.monotonic() + seconds, is_late
            if not self._closing.is_set():
                self._queue.append(item)

    def _fail(self, item: _Item, run_id: str, error: str) -> None:
        name = item.path.name
        if not item.path.exists() and _was_given_up(self._journal, name):
            log.warning("%s was given up while it waited for its upload.", name)
            return
        self._record_failure(item, run_id, error, None)
        self._give_up(item, error)

    def _give_up(self, item: _Item, error: str) -> None:
        """Say that a checkpoint is not in the bucket, at least not soon."""
        name = item.path.name
        self.failures[name] = error
        log.error("%s was not uploaded: %s It is kept in %s.", name, error, item.path.parent)
        self._tell(f"{name} was not uploaded: {error}")

    def _record_failure(self, item: _Item, run_id: str, error: str, next_try: str | None) -> None:
        """Write down that an attempt failed; for good where there is no next one."""
        self._record(
            item.path.name,
            run_id,
            UploadState.FAILED,
            error=error,
            attempts=item.attempts,
            permanent=next_try is None,
            next_try=next_try,
        )

    def _record(self, name: str, run_id: str, state: UploadState, **details: Any) -> None:
        try:
            self._journal.record(name, run_id, state, **details)
        except OSError as exc:  # the disk may be full; the worker must outlive it
            log.error("%s cannot be written: %s.", self._journal.path, exc.strerror or exc)


class _Progress:
    """How far the upload in flight is, and how fast it goes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._report = ProgressReport("uploading", 0, 0, 0, None, 0)
        self._began = time.monotonic()
        self._told = 0.0

    def update(self, report: ProgressReport) -> bool:
        """Take a report; tell whether it is time to write it down."""
        if report.stage != self._report.stage:
            self._began = time.monotonic()
        self._report = report
        if time.monotonic() - self._told < PROGRESS_SECONDS:
            return False
        self._told = time.monotonic()
        return True

    def facts(self) -> dict[str, Any]:
        """Return the figures of the last report."""
        report = self._report
        seconds, share = max(1e-3, time.monotonic() - self._began), self._share()
        return {
            "stage": report.stage,
            "sent": report.sent,
            "read": report.read,
            "total": report.total,
            "size": report.size,
            "bytes_per_second": round(report.sent / seconds),
            "eta_seconds": round(seconds * (1 - share) / share) if share > 0 else None,
        }

    def describe(self) -> str:
        """Return one line for people."""
        facts = self.facts()
        text = f"{facts['stage']} {self.name}"
        if facts["stage"] != "uploading" or not facts["total"]:
            return text
        text += f": {self._share():.0%}"
        if facts["sent"]:
            text += f" at {format_bytes(facts['bytes_per_second'])}/s"
        if facts["eta_seconds"] is not None:
            text += f", {format_duration(facts['eta_seconds'])} left"
        return text

    def _share(self) -> float:
        """Return how much of the archive is sent or, until its size is known, made."""
        report = self._report
        done, total = (report.sent, report.size) if report.size else (report.read, report.total)
        return min(1.0, done / max(1, total))


def _was_given_up(journal: Journal, name: str) -> bool:
    given_up = (name, UploadState.SUPERSEDED)
    with contextlib.suppress(OSError):
        return any((entry.checkpoint, entry.state) == given_up for entry in journal.entries())
    return False


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - spreads load, no secret


def find_unfinished(
    directory: Path,
    journal: Journal,
    uri: str,
    uploads: Mapping[str, JournalEntry] | None = None,
) -> list[Path]:
    """Return the local checkpoints that are owed to the bucket `uri`, by step.

    Owed is what the journal has not as verified there or given up, also what it does not know at
    all: a crash between commit and queueing. `uploads` are the journal's newest entries, where they
    have been read.
    """
    latest = journal.latest() if uploads is None else uploads
    owed = []
    for name in find_checkpoints(directory):
        checkpoint, entry = directory / str(name), latest.get(str(name))
        is_given_up = entry is not None and entry.state in GIVEN_UP
        if not is_given_up and not is_verified_in(uri, checkpoint, entry):
            owed.append(checkpoint)
    return owed
