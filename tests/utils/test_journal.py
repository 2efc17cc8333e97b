"""The journal outlives crashes: nothing recorded is lost, nothing torn is believed."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from utils.journal import Journal, UploadState

RUN = "20260101-0a1b2c3d"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "checkpoints/uploads.jsonl")


def test_what_is_recorded_is_read_back_by_another_process(journal: Journal) -> None:
    written = journal.record("a", RUN, UploadState.UPLOADING, bytes=5, uri="gs://b/a\nb")
    assert list(Journal(journal.path).entries()) == [written]
    assert written.details == {"bytes": 5, "uri": "gs://b/a\nb"}
    time = datetime.fromisoformat(written.time)
    assert time.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - time) < timedelta(minutes=1)


def test_a_journal_that_is_not_there_is_empty(journal: Journal) -> None:
    assert list(journal.entries()) == []
    assert journal.latest() == {}


def test_a_line_is_on_disk_before_record_returns(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(journal.path.read_bytes()))
    journal.record("a", RUN, UploadState.VERIFIED)
    assert synced == [journal.path.read_bytes()]
    assert synced[0].endswith(b"\n")


def test_the_newest_entry_of_each_checkpoint_counts(journal: Journal) -> None:
    for name, state in [
        ("a", UploadState.QUEUED),
        ("b", UploadState.QUEUED),
        ("a", UploadState.VERIFIED),
        ("b", UploadState.FAILED),
        ("a", UploadState.REMOVED),
    ]:
        journal.record(name, RUN, state)
    states = {name: entry.state for name, entry in journal.latest().items()}
    assert states == {"a": UploadState.REMOVED, "b": UploadState.FAILED}


def test_an_append_torn_at_any_byte_loses_itself_alone(journal: Journal) -> None:
    journal.record("a", RUN, UploadState.QUEUED)
    before = journal.path.read_bytes()
    journal.record("b", RUN, UploadState.VERIFIED, error="x")
    whole = journal.path.read_bytes()

    for cut in range(len(before), len(whole) - 1):
        journal.path.write_bytes(whole[:cut])
        assert set(journal.latest()) == {"a"}
        journal.record("c", RUN, UploadState.FAILED)
        # Without its line break alone, the torn line is whole again.
        assert set(journal.latest()) - {"b"} == {"a", "c"}

    journal.path.write_bytes(whole[:-1])
    journal.record("c", RUN, UploadState.FAILED)
    assert set(journal.latest()) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"5",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"checkpoint": "a"',
        b'{"checkpoint": "a", "run_id": "r", "time": "t", "state": "teleported"}',
        b'{"checkpoint": "a", "run_id": "r", "time": "t", "state": []}',
        b'{"checkpoint": "a", "run_id": "r", "time": "t"}',
        b'{"checkpoint": "a", "run_id": "r", "state": "verified"}',
        b"[" * 100_000,
    ],
)
def test_lines_that_are_not_ours_change_nothing(journal: Journal, line: bytes) -> None:
    journal.record("a", RUN, UploadState.QUEUED)
    with journal.path.open("ab") as file:
        file.write(line + b"\n")
    journal.record("b", RUN, UploadState.QUEUED)
    states = {name: entry.state for name, entry in journal.latest().items()}
    assert states == {"a": UploadState.QUEUED, "b": UploadState.QUEUED}


def test_threads_append_whole_lines(journal: Journal) -> None:
    def append(worker: int) -> None:
        for number in range(10):
            journal.record(f"{worker}", RUN, UploadState.UPLOADING, number=number, text="x" * 20000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append, range(8)))

    lines = [json.loads(line) for line in journal.path.read_text("utf-8").splitlines()]
    assert len(lines) == 80
    for worker in range(8):
        mine = [line["number"] for line in lines if line["checkpoint"] == str(worker)]
        assert mine == list(range(10))


def test_an_upload_is_owed_until_it_is_verified_or_given_up() -> None:
    pending = {state for state in UploadState if state.is_pending}
    settled = {UploadState.VERIFIED, UploadState.SUPERSEDED, UploadState.REMOVED}
    assert pending == set(UploadState) - settled
