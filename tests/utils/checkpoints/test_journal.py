"""The journal outlives crashes: nothing recorded is lost, nothing torn is believed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from filelock import FileLock

from configs.config_files import PROJECT_DIRECTORY
from tests.processes import run_python
from utils.checkpoints import journal as journal_module
from utils.checkpoints.journal import Journal, UploadState

RUN = "20260101-0a1b2c3d"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "checkpoints/uploads.jsonl")


def test_what_is_recorded_is_read_back_by_another_process(journal: Journal) -> None:
    assert journal.latest() == {}
    journal.record("a", RUN, UploadState.UPLOADING, bytes=5, uri="gs://b/a\nb")
    (written,) = Journal(journal.path).entries()
    facts = (written.checkpoint, written.run_id, written.state)
    assert facts == ("a", RUN, UploadState.UPLOADING)
    assert written.details == {"bytes": 5, "uri": "gs://b/a\nb"}
    assert datetime.fromisoformat(written.time).utcoffset() == timedelta(0)


def test_a_line_is_on_disk_before_record_returns(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bytes]] = []

    def note(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        synced.append((name, journal.path.read_bytes()))

    monkeypatch.setattr(os, "fsync", note)
    journal.record("a", RUN, UploadState.VERIFIED)
    first = journal.path.read_bytes()
    journal.record("a", RUN, UploadState.UPLOADING, sync=False, sent=1)
    journal.record("a", RUN, UploadState.VERIFIED)
    last = journal.path.read_bytes()
    assert first.endswith(b"\n")
    assert synced == [
        ("uploads.jsonl", first),
        ("checkpoints", first),
        ("uploads.jsonl", last),
    ]


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
            journal.record(
                f"{worker}", RUN, UploadState.UPLOADING, number=number, text="x" * 10_000
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append, range(8)))

    lines = [json.loads(line) for line in journal.path.read_text("utf-8").splitlines()]
    assert len(lines) == 80
    for worker in range(8):
        mine = [line["number"] for line in lines if line["checkpoint"] == str(worker)]
        assert mine == list(range(10))


def summary(journal: Journal) -> list[tuple[str, str]]:
    return [(entry.checkpoint, entry.state.value) for entry in journal.entries()]


def test_compacting_keeps_what_readers_ask_for(journal: Journal) -> None:
    for name, state in [
        ("a", UploadState.FAILED),
        ("a", UploadState.QUEUED),
        ("b", UploadState.QUEUED),
        ("a", UploadState.SUPERSEDED),
        ("a", UploadState.FAILED),
        ("a", UploadState.VERIFIED),
        ("b", UploadState.VERIFIED),
        ("b", UploadState.QUEUED),
        ("b", UploadState.UPLOADING),
        ("a", UploadState.REMOVED),
    ]:
        journal.record(name, RUN, state)
    latest = journal.latest()
    journal.compact()
    assert summary(journal) == [
        ("a", "superseded"),
        ("a", "failed"),
        ("a", "verified"),
        ("b", "verified"),
        ("b", "uploading"),
        ("a", "removed"),
    ]
    assert journal.latest() == latest
    assert {path.name for path in journal.path.parent.iterdir()} == {
        "uploads.jsonl",
        "uploads.jsonl.lock",
    }


def test_a_compacted_journal_is_on_disk_before_it_takes_the_place_of_the_old_one(
    journal: Journal, disk_calls: list[str]
) -> None:
    journal.record("a", RUN, UploadState.VERIFIED)
    disk_calls.clear()
    journal.compact()
    new, folder = ".uploads.jsonl.new", journal.path.parent.name
    assert disk_calls == [f"fsync {new}", f"replace {new}", f"fsync {folder}"]


def test_compacting_says_how_many_lines_could_not_be_read(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.record("a", RUN, UploadState.QUEUED)
    with journal.path.open("ab") as file:
        file.write(b'{"checkpoint": "b"\n\xff\n')
    journal.record("c", RUN, UploadState.QUEUED)
    journal.compact()
    assert summary(journal) == [("a", "queued"), ("c", "queued")]
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "2 could not be read" in warning.message


def test_progress_stays_within_the_limit(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", 1000)
    journal.record("done", RUN, UploadState.VERIFIED, bytes=1)
    for number in range(100):
        journal.record("a", RUN, UploadState.UPLOADING, sync=False, sent=number)
        assert journal.path.stat().st_size <= 1000
    assert journal.latest()["a"].details["sent"] == 99
    assert journal.latest()["done"].details == {"bytes": 1}


def test_what_must_be_kept_raises_the_limit(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", 1000)
    compactions: list[int] = []
    replace = Path.replace

    def count(path: Path, target: Path) -> Path:
        compactions.append(1)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", count)
    for number in range(200):
        journal.record(f"checkpoint {number}", RUN, UploadState.VERIFIED)
    assert len(journal.latest()) == 200
    assert 1 <= len(compactions) < 10


def test_a_disk_too_full_to_compact_keeps_the_journal_and_takes_the_line(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", 100)

    def fail(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    for number in range(50):
        journal.record("a", RUN, UploadState.UPLOADING, number=number)
    assert len(list(journal.entries())) == 50
    assert 0 < len(caplog.records) < 10
    assert not list(journal.path.parent.glob(".*"))


def test_a_lock_that_is_stuck_does_not_stop_a_run(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "JOURNAL_LOCK_SECONDS", 0.01)
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", 0)
    journal.path.parent.mkdir()
    with FileLock(f"{journal.path}.lock"):
        for number in range(3):
            journal.record("a", RUN, UploadState.QUEUED, number=number)
        journal.compact()
    assert len(list(journal.entries())) == 3
    assert "without its lock" in caplog.text


KILLED_WHILE_COMPACTING = """
import os, signal, sys
from pathlib import Path
from utils.checkpoints.journal import Journal
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
replace = Path.replace
if sys.argv[2] == "before":
    Path.replace = kill
else:
    Path.replace = lambda path, target: (replace(path, target), kill())
Journal(Path(sys.argv[1])).compact()
"""


@pytest.mark.parametrize(("moment", "lines"), [("before", 3), ("after", 1)])
def test_a_kill_around_the_rename_leaves_one_whole_journal(
    journal: Journal, moment: str, lines: int
) -> None:
    for number in range(3):
        journal.record("a", RUN, UploadState.UPLOADING, number=number)
    result = run_python("-c", KILLED_WHILE_COMPACTING, journal.path, moment)
    assert result.returncode == -signal.SIGKILL
    assert [entry.details["number"] for entry in journal.entries()] == [0, 1, 2][-lines:]
    journal.record("b", RUN, UploadState.QUEUED)
    journal.compact()
    assert summary(journal) == [("a", "uploading"), ("b", "queued")]
    assert not list(journal.path.parent.glob(".*"))


APPEND = """
import sys
from pathlib import Path
from utils.checkpoints.journal import Journal, UploadState
journal = Journal(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    journal.record(f"{sys.argv[2]}-{number}", "run", UploadState.QUEUED, sync=False)
    journal.record(f"{sys.argv[2]}-{number}", "run", UploadState.UPLOADING, sync=False)
"""


def test_no_line_of_two_processes_is_lost_while_a_third_compacts(journal: Journal) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", APPEND, str(journal.path), name, "100"], cwd=PROJECT_DIRECTORY
        )
        for name in ("a", "b")
    ]
    while any(writer.poll() is None for writer in writers):
        journal.compact()
    assert [writer.returncode for writer in writers] == [0, 0]
    latest = journal.latest()
    assert set(latest) == {f"{name}-{number}" for name in "ab" for number in range(100)}
    assert {entry.state for entry in latest.values()} == {UploadState.UPLOADING}
