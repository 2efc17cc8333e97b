"""The upload journal: what happened to each checkpoint after its commit.

One JSON object a line in `uploads.jsonl`, appended and synced, so that it outlives any crash and
other processes can read it while it is written. Processes that append take turns by a lock file
beside it; readers need no lock. A torn last line (a crash in the middle of an append) is skipped by
readers and closed with a line break by the next writer.

The journal is bounded: once it has outgrown its limit, a new file with the lines that still matter
takes its place by one rename. A crash leaves the old file or the new one, whole; a reader of the
old one can read it to its end. No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from utils.base.files import append_line, read_regular_file
from utils.base.text import FOREIGN_ERRORS, parse_json
from utils.storage.bucket import fsync_directory

COMPACT_BYTES = 2**20
COMPACT_GROWTH = 2
JOURNAL_LOCK_SECONDS = 10.0
LOCK_POLL_SECONDS = 0.005

log = logging.getLogger(__name__)


class UploadState(StrEnum):
    """Where a checkpoint is on its way to the bucket."""

    QUEUED = "queued"
    ARCHIVING = "archiving"
    UPLOADING = "uploading"
    VERIFIED = "verified"
    FAILED = "failed"
    SUPERSEDED = "superseded"
    REMOVED = "removed"

    @property
    def is_pending(self) -> bool:
        """Whether an upload is still owed."""
        return self in _PENDING


_PENDING = (UploadState.QUEUED, UploadState.ARCHIVING, UploadState.UPLOADING, UploadState.FAILED)
_KEPT_STATES = (UploadState.VERIFIED, UploadState.SUPERSEDED, UploadState.FAILED)


@dataclass(frozen=True)
class JournalEntry:
    """One line of the journal.

    `time` is UTC, ISO 8601, for display only. `details` is what belongs to the state. Uploading:
    attempt, uri, sent and size (bytes of the archive, the size as soon as it is known), read and
    total (bytes of the checkpoint's files), bytes_per_second, eta_seconds. Failed: error, attempts,
    permanent, next_try (UTC, None for never). Verified: bytes, crc32c, uri, bucket,
    manifest_crc32c, seconds, transport, bytes_per_second. Superseded: reason.
    """

    checkpoint: str
    run_id: str
    state: UploadState
    time: str
    details: dict[str, Any]


def utc_now() -> str:
    """Return the current time in UTC as ISO 8601 with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Journal:
    """Appends to and reads one `uploads.jsonl`; safe from several threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._threads = threading.Lock()
        self._bytes_after_compaction = 0

    def record(
        self, checkpoint: str, run_id: str, state: UploadState, *, sync: bool = True, **details: Any
    ) -> None:
        """Append one line, made of the fields of `JournalEntry`.

        With `sync`, the line is on disk before this returns; progress need not be.

        Raises:
            OSError: It cannot be written.
        """
        facts = {"checkpoint": checkpoint, "run_id": run_id, "state": state.value}
        line = json.dumps({"time": utc_now(), **facts, **details})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone() as is_alone:
            size = self._append(line.encode("utf-8"), sync=sync)
            limit = max(COMPACT_BYTES, COMPACT_GROWTH * self._bytes_after_compaction)
            if is_alone and size > limit:
                self._compact()

    def compact(self) -> None:
        """Leave out the lines that no reader needs any more.

        Kept are the newest entry of each checkpoint, and its newest verified, superseded and failed
        ones.
        """
        if not self.path.is_file():
            return
        with self._alone() as is_alone:
            if is_alone:
                self._compact()

    def entries(self) -> Iterator[JournalEntry]:
        """Yield every readable line, oldest first."""
        for line in self._read_lines():
            entry = parse_entry(line)
            if entry is not None:
                yield entry

    def latest(self) -> dict[str, JournalEntry]:
        """Return the newest entry of each checkpoint."""
        return {entry.checkpoint: entry for entry in self.entries()}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep other writers out; False where the lock cannot be had.

        A lock that is stuck must not stop a run: its line is then appended all the same, and can
        be lost at worst to a compaction at that moment.
        """
        from filelock import FileLock, Timeout  # 40 ms that no reader needs

        lock = FileLock(self.path.with_name(f"{self.path.name}.lock"))
        with self._threads:
            try:
                lock.acquire(timeout=JOURNAL_LOCK_SECONDS, poll_interval=LOCK_POLL_SECONDS)
            except (Timeout, OSError, NotImplementedError) as exc:
                log.warning("%s is written without its lock: %s", self.path, exc)
                yield False
                return
            try:
                yield True
            finally:
                lock.release()

    def _append(self, line: bytes, *, sync: bool) -> int:
        """Append a line; return the size of the file."""
        is_new = not self.path.exists()
        if not is_new and not self.path.is_file():
            raise OSError(errno.EINVAL, "it is no regular file", str(self.path))
        size = append_line(self.path, line, sync=sync)
        if is_new:
            fsync_directory(self.path.parent)
        return size

    def _compact(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.new")
        try:
            lines = self._read_lines()
            kept = _lines_to_keep(lines)
            with temporary.open("wb") as file:
                file.writelines(line + b"\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
                self._bytes_after_compaction = file.tell()
            temporary.replace(self.path)
            fsync_directory(self.path.parent)
        except OSError as exc:  # nothing is lost: the journal stays longer than it need be
            log.warning("%s cannot be compacted: %s.", self.path, exc.strerror or exc)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._bytes_after_compaction = self.path.stat().st_size
            return
        unreadable = sum(1 for line in lines if line.strip() and parse_entry(line) is None)
        log.log(
            logging.WARNING if unreadable else logging.DEBUG,
            "%s was compacted from %d to %d lines; %d could not be read and were dropped.",
            self.path,
            len(lines),
            len(kept),
            unreadable,
        )

    def _read_lines(self) -> list[bytes]:
        try:
            return read_regular_file(self.path).splitlines()
        except FileNotFoundError:
            return []


def _lines_to_keep(lines: list[bytes]) -> list[bytes]:
    """Return the lines that readers still need, in their order."""
    needed: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines):
        entry = parse_entry(line)
        if entry is None:
            continue
        needed[entry.checkpoint, "newest"] = number
        if entry.state in _KEPT_STATES:
            needed[entry.checkpoint, entry.state.value] = number
    return [lines[number] for number in sorted(set(needed.values()))]


def parse_entry(line: bytes) -> JournalEntry | None:
    """Return the entry that a line of the journal holds, None where it holds none."""
    try:
        value = parse_json(line)
        return JournalEntry(
            checkpoint=str(value.pop("checkpoint")),
            run_id=str(value.pop("run_id")),
            state=UploadState(value.pop("state")),
            time=str(value.pop("time")),
            details=value,
        )
    except FOREIGN_ERRORS:
        return None
