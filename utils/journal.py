"""The upload journal: what happened to each checkpoint after its commit.

One JSON object a line in `uploads.jsonl`, appended and synced, so that it outlives any crash and
other processes can read it while it is written. A torn last line (a crash in the middle of an
append) is skipped by readers and closed with a line break by the next writer. No torch here.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any


class UploadState(str, Enum):
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


@dataclass(frozen=True)
class JournalEntry:
    """One line of the journal.

    Attributes:
        checkpoint: The checkpoint's name.
        run_id: The run that wrote it.
        state: What happened.
        time: UTC, ISO 8601; for display only.
        details: Destination, bytes, attempts, error: what belongs to this state.
    """

    checkpoint: str
    run_id: str
    state: UploadState
    time: str
    details: dict[str, Any]


def utc_now() -> str:
    """Return the current time in UTC as ISO 8601 with seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Journal:
    """Appends to and reads one `uploads.jsonl`; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def record(
        self, checkpoint: str, run_id: str, state: UploadState, **details: Any
    ) -> JournalEntry:
        """Append one line and sync it before returning."""
        entry = JournalEntry(checkpoint, run_id, state, utc_now(), details)
        line = json.dumps(
            {
                "time": entry.time,
                "checkpoint": checkpoint,
                "run_id": run_id,
                "state": state.value,
                **details,
            }
        )
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() and not self._ends_with_line_break():
                    file.write(b"\n")
                file.write(line.encode("utf-8") + b"\n")
                file.flush()
                os.fsync(file.fileno())
        return entry

    def entries(self) -> Iterator[JournalEntry]:
        """Yield every readable line, oldest first."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            entry = _parse(line)
            if entry is not None:
                yield entry

    def latest(self) -> dict[str, JournalEntry]:
        """Return the newest entry of each checkpoint."""
        return {entry.checkpoint: entry for entry in self.entries()}

    def _ends_with_line_break(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _parse(line: bytes) -> JournalEntry | None:
    try:
        value = json.loads(line)
        return JournalEntry(
            checkpoint=str(value.pop("checkpoint")),
            run_id=str(value.pop("run_id")),
            state=UploadState(value.pop("state")),
            time=str(value.pop("time")),
            details=value,
        )
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
