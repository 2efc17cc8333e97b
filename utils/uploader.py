"""The uploader: archives each committed checkpoint and brings it to the bucket, verified.

    checkpoint directory (committed) -> archive (tar.gz) -> bucket, verified -> card beside it

One worker thread takes checkpoints from a queue. What it does is in the journal before and after,
so that a restart knows what is still owed. A failed upload never stops training and is never
forgotten: it is retried with backoff while the error is transient, then kept in `failures`, in the
journal and in the exit code. The card (`NAME.json`: manifest and metadata) is written only after
the archive in the bucket has the size and crc32c that were computed while it was made. An object
of another run is never overwritten. No torch here.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from utils.archive import ArchiveInfo, write_archive
from utils.errors import CheckpointError, PretrainError, StorageError, TransientStorageError
from utils.journal import Journal, UploadState
from utils.layout import (
    ARCHIVE_SUFFIX,
    MANIFEST_FILE,
    METADATA_FILE,
    SAVING_PREFIX,
    Manifest,
    archive_object,
    card_object,
    find_checkpoints,
    read_json,
    read_manifest,
)
from utils.metadata import is_verified_in
from utils.storage import crc32c_of_file, join_uri, normalize_uri
from utils.transports import Transport

MAX_ATTEMPTS = 5
FIRST_BACKOFF_SECONDS = 1.0
BACKOFF_FACTOR = 4.0
CLOSE_SECONDS = 2.0

log = logging.getLogger(__name__)


class _ClosingError(Exception):
    """The uploader was closed while an archive was being made."""


class Uploader:
    """Uploads checkpoints in a background thread; a context manager that waits at its exit.

    Args:
        transport: How and where to.
        journal: Where every state is recorded.
        background: False uploads within `submit`, before it returns.
        first_backoff_seconds: Wait before the second attempt; the next ones are 4 times longer.
    """

    def __init__(
        self,
        transport: Transport,
        journal: Journal,
        *,
        background: bool = True,
        first_backoff_seconds: float = FIRST_BACKOFF_SECONDS,
    ) -> None:
        self.failures: dict[str, str] = {}
        """Checkpoint name -> why it is not in the bucket."""
        self.verified: list[str] = []
        """Names of the checkpoints that this uploader brought to the bucket."""
        self.bytes_per_second: float | None = None
        """Speed of the last upload that was verified, None before one was."""
        self.newest_first = False
        """Whether the newest of the queue goes up next; else they go in order."""
        self._transport, self._journal = transport, journal
        self._backoff = first_backoff_seconds
        self._queue: deque[Path] = deque()
        self._active: Path | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
            self._thread.start()

    def __enter__(self) -> Uploader:
        """Return the uploader itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the worker; what is still queued stays in the journal."""
        self.close()

    def submit(self, checkpoint: Path) -> None:
        """Queue a committed checkpoint."""
        run_id = read_manifest(checkpoint).run_id
        self._journal.record(checkpoint.name, run_id, UploadState.QUEUED, uri=self._transport.uri)
        log.info("Queued %s for upload.", checkpoint.name)
        if self._thread is None:
            self._upload(checkpoint)
            return
        with self._changed:
            self._queue.append(checkpoint)
            self._changed.notify_all()

    @property
    def pending_paths(self) -> list[Path]:
        """What is queued or in flight, in order."""
        with self._changed:
            active = [self._active] if self._active else []
            return [*active, *self._queue]

    @property
    def pending(self) -> list[str]:
        """Names of what is queued or in flight, in order."""
        return [path.name for path in self.pending_paths]

    def drain(
        self,
        deadline_seconds: float,
        on_wait: Callable[[list[str]], None],
        must_leave: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Wait until all is uploaded or the deadline is over; return what is still pending.

        Args:
            deadline_seconds: How long to wait at most.
            on_wait: Called about once a second with the names still pending.
            must_leave: Asked as often; once it says so, the deadline is over.
        """
        end = time.monotonic() + deadline_seconds
        while pending := self.pending:
            remaining = end - time.monotonic()
            if remaining <= 0 or must_leave():
                break
            on_wait(pending)
            with self._changed:
                self._changed.wait(min(1.0, remaining))
        return pending

    def close(self) -> None:
        """Stop after the step in flight; what is left stays in the journal for the next start."""
        self._closing.set()
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)  # a daemon: it may wait for a bucket for ever
        self._transport.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing.is_set():
                    self._changed.wait()
                if self._closing.is_set():
                    return
                self._active = self._queue.pop() if self.newest_first else self._queue.popleft()
            self._upload(self._active)
            with self._changed:
                self._active = None
                self._changed.notify_all()

    def _upload(self, checkpoint: Path) -> None:
        try:
            manifest = read_manifest(checkpoint)
            self._upload_with_retries(checkpoint, manifest)
        except _ClosingError:  # no failure: the journal says where it was
            log.debug("The archive of %s is made at the next start.", checkpoint.name)
        except PretrainError as exc:
            self._fail(checkpoint, str(exc))
        except Exception as exc:  # noqa: BLE001 - a worker that dies would lose the queue silently
            log.debug("Upload of %s failed.", checkpoint.name, exc_info=True)
            self._fail(checkpoint, f"{type(exc).__name__}: {exc}")

    def _upload_with_retries(self, checkpoint: Path, manifest: Manifest) -> None:
        delay = self._backoff
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                self._upload_once(checkpoint, manifest, attempt)
            except TransientStorageError as exc:
                if attempt == MAX_ATTEMPTS or self._closing.is_set():
                    raise StorageError(f"{exc} ({attempt} attempts)") from exc
                log.warning(
                    "Upload of %s failed, trying again in %.0f s: %s", checkpoint.name, delay, exc
                )
                if self._closing.wait(delay):
                    raise StorageError(f"{exc} ({attempt} attempts)") from exc
                delay *= BACKOFF_FACTOR
            else:
                return

    def _upload_once(self, checkpoint: Path, manifest: Manifest, attempt: int) -> None:
        name = checkpoint.name
        self._require_own_prefix(name, manifest)
        archive = checkpoint.with_name(f"{SAVING_PREFIX}{name}{ARCHIVE_SUFFIX}")
        uri = join_uri(self._transport.uri, archive_object(name))
        try:
            self._record(manifest, name, UploadState.ARCHIVING, attempt=attempt)
            log.info("Archiving %s.", name)
            info = self._write_archive(checkpoint, manifest, archive)
            self._record(
                manifest, name, UploadState.UPLOADING, attempt=attempt, bytes=info.size, uri=uri
            )
            log.info(
                "Uploading %s (%.1f MB) to %s by %s.",
                name, info.size / 1e6, uri, self._transport.name,
            )  # fmt: skip
            started = time.monotonic()
            self._transport.put(archive_object(name), archive)
            self._verify(name, info)
            self.bytes_per_second = info.size / max(1e-6, time.monotonic() - started)
            self._put_card(checkpoint, manifest, info)
            self._record(
                manifest,
                name,
                UploadState.VERIFIED,
                bytes=info.size,
                crc32c=info.crc32c,
                uri=uri,
                bucket=normalize_uri(self._transport.uri),
                manifest_crc32c=crc32c_of_file(checkpoint / MANIFEST_FILE),
            )
            self.failures.pop(name, None)
            self.verified.append(name)
            log.info("Verified %s in the bucket (crc32c %s).", name, info.crc32c)
        finally:
            if archive.exists():
                archive.unlink()
                log.info("Cleaned up the local archive of %s.", name)

    def _require_own_prefix(self, name: str, manifest: Manifest) -> None:
        card = self._transport.read(card_object(name))
        if card is None:
            return
        try:
            owner = json.loads(card)["manifest"]["run_id"]
        except (ValueError, KeyError, TypeError):
            owner = "unknown"
        if owner != manifest.run_id:
            raise CheckpointError(
                f"{join_uri(self._transport.uri, card_object(name))} belongs to run {owner}, not "
                f"{manifest.run_id}, and is not overwritten. Give this run a name of its own: "
                "--set run_name=NAME."
            )

    def _write_archive(self, checkpoint: Path, manifest: Manifest, archive: Path) -> ArchiveInfo:
        free = shutil.disk_usage(archive.parent).free
        if free < manifest.total_bytes:
            raise StorageError(
                f"The archive of {checkpoint.name} needs up to {manifest.total_bytes} bytes, "
                f"{free} are free in {archive.parent}."
            )
        try:
            with archive.open("wb") as file:
                return write_archive(checkpoint, manifest, file, self._closing.is_set)
        except OSError as exc:
            if self._closing.is_set():
                raise _ClosingError from exc
            raise StorageError(f"{archive} cannot be written: {exc.strerror or exc}.") from exc

    def _verify(self, name: str, info: ArchiveInfo) -> None:
        stored = self._transport.stat(archive_object(name))
        if stored is None or (stored.size, stored.crc32c) != (info.size, info.crc32c):
            found = "nothing" if stored is None else f"{stored.size} bytes, crc32c {stored.crc32c}"
            raise TransientStorageError(
                f"the bucket holds {found} instead of {info.size} bytes, crc32c {info.crc32c}"
            )

    def _put_card(self, checkpoint: Path, manifest: Manifest, info: ArchiveInfo) -> None:
        card = {
            "manifest": manifest.to_json(),
            "metadata": read_json(checkpoint / METADATA_FILE),
            "archive": {"size": info.size, "crc32c": info.crc32c},
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "card.json"
            path.write_text(json.dumps(card, indent=1), "utf-8")
            self._transport.put(card_object(checkpoint.name), path)

    def _record(self, manifest: Manifest, name: str, state: UploadState, **details: Any) -> None:
        self._journal.record(name, manifest.run_id, state, **details)

    def _fail(self, checkpoint: Path, error: str) -> None:
        if not checkpoint.exists() and self._was_given_up(checkpoint.name):
            log.warning("%s was given up while it waited for its upload.", checkpoint.name)
            return
        self.failures[checkpoint.name] = error
        run_id = ""
        try:
            run_id = read_manifest(checkpoint).run_id
        except CheckpointError as exc:
            log.debug("%s", exc)
        try:
            self._journal.record(checkpoint.name, run_id, UploadState.FAILED, error=error)
        except OSError as exc:  # the disk may be full; the worker must outlive it
            log.error("%s cannot be written: %s.", self._journal.path, exc.strerror or exc)
        log.error("%s was not uploaded: %s It is kept in %s.", checkpoint.name, error,
                  checkpoint.parent)  # fmt: skip

    def _was_given_up(self, name: str) -> bool:
        given_up = (name, UploadState.SUPERSEDED)
        return any((entry.checkpoint, entry.state) == given_up for entry in self._journal.entries())


def find_unfinished(directory: Path, journal: Journal, uri: str) -> list[Path]:
    """Return the local checkpoints that are owed to the bucket `uri`, by step.

    Owed is what the journal has not as verified there or given up, also what it does not know at
    all: a crash between commit and queueing.
    """
    latest = journal.latest()
    owed = []
    for name in find_checkpoints(directory):
        checkpoint, entry = directory / str(name), latest.get(str(name))
        given_up = entry is not None and entry.state in (
            UploadState.SUPERSEDED,
            UploadState.REMOVED,
        )
        if not given_up and not is_verified_in(uri, checkpoint, entry):
            owed.append(checkpoint)
    return owed
