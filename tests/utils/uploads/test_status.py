"""What is shown of an upload is right, short, and harmless whatever the journal holds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from utils.checkpoints.journal import JournalEntry, UploadState
from utils.uploads.status import build_queue, describe_progress, last_errors

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


def entry(
    state: UploadState = UploadState.UPLOADING, name: str = "a", age: float = 1.0, **details: Any
) -> JournalEntry:
    time = (NOW - timedelta(seconds=age)).isoformat(timespec="seconds")
    return JournalEntry(name, "run", state, time, details)


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ({}, ""),  # the state stands beside it
        ({"age": 90}, "no news for 1m30s"),
        ({"read": 5, "total": 20}, "25%"),
        ({"read": 20, "total": 20, "sent": 1, "size": 10}, "10%"),
        ({"read": 5, "total": 0}, ""),
        ({"read": 50, "total": 20}, "100%"),
        ({"read": 0, "total": 20, "bytes_per_second": 0.0}, "0%, 0 B/s"),
        (
            {"read": 1, "total": 2, "bytes_per_second": 2048, "eta_seconds": 5},
            "50%, 2.0 KiB/s, 5.0s left",
        ),
        ({"read": "\x1b[2J", "total": [], "eta_seconds": float("nan")}, ""),
        ({"read": 10**400, "total": True, "bytes_per_second": {}}, ""),
    ],
)
def test_progress_in_words(details: dict[str, Any], text: str) -> None:
    assert describe_progress(entry(**details), NOW)["text"] == text


def test_progress_at_no_time_has_no_news() -> None:
    odd = JournalEntry("a", "run", UploadState.UPLOADING, "yesterday", {})
    assert describe_progress(odd, NOW)["text"] == ""


def test_the_queue_begins_with_what_is_under_way() -> None:
    uploads = {
        "b": entry(UploadState.FAILED, attempts=3, permanent=True, error="403 \x1b[2J"),
        "c": entry(UploadState.ARCHIVING, attempt=1),
        "d": entry(UploadState.FAILED, next_try=None),
    }
    queue = build_queue(["a", "b", "c", "d"], uploads)
    assert [(one["place"], one["checkpoint"]) for one in queue] == [
        (1, "c"),
        (2, "a"),
        (3, "b"),
        (4, "d"),
    ]
    assert [one["next try"] for one in queue] == [
        "now",
        "in its turn",
        "at the next run, or with the command retry",
        "at the next run",
    ]
    assert queue[2]["error"] == "403 ?[2J"


def test_the_last_errors_are_of_what_is_still_owed() -> None:
    entries = [
        entry(UploadState.FAILED, "mended", 50, error="1"),
        entry(UploadState.VERIFIED, "mended", 40),
        entry(UploadState.FAILED, "again", 30, error="2"),
        entry(UploadState.FAILED, "again", 20, error="3", attempts=5),
        entry(UploadState.UPLOADING, "again", 10),
        *[entry(UploadState.FAILED, f"old {number}", 100 + number) for number in range(9)],
    ]
    uploads = {one.checkpoint: one for one in entries}
    errors = last_errors(entries, uploads)
    assert len(errors) == 5
    assert (errors[-1]["checkpoint"], errors[-1]["error"], errors[-1]["attempts"]) == (
        "again",
        "3",
        5,
    )
