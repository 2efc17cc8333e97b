"""Uploads never stop training, are never forgotten, and count only when the bucket has them."""

from __future__ import annotations

import functools
import gzip
import logging
import math
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from tests.sample_checkpoints import RUN_ID, make_checkpoint
from tests.utils.uploads.waiting import WAIT_SECONDS, wait_until
from utils.base.errors import (
    AccessDeniedError,
    CheckpointError,
    StorageError,
    TransientStorageError,
)
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import (
    UPLOAD_LOCK_PREFIX,
    archive_object,
    local_archive,
    sidecar_object,
)
from utils.checkpoints.store import hold_upload
from utils.storage.bucket import crc32c_of_file
from utils.storage.retrying import FIRST_RETRY_SECONDS
from utils.uploads import uploader as uploader_module
from utils.uploads.job import ProgressReport, UploadJob, UploadResult
from utils.uploads.process import InterruptedUploadError
from utils.uploads.transports import TransportOptions
from utils.uploads.uploader import (
    LATER_SECONDS,
    UPLOAD_ATTEMPTS,
    Uploader,
    find_unfinished,
)

NAMES = [f"checkpoint-epoch0-step{step}-files0" for step in (10, 20, 30)]
MEGABYTE = 2**20
CANARY = "canary-5f2c"
RESULT = UploadResult(2 * MEGABYTE, "AAAAAA==", 0.5, MEGABYTE)
DOWN = TransientStorageError("503 Backend Error")

OnProgress = Callable[[ProgressReport], None]


class Gate:
    """Holds an upload until it is opened, or until the uploader is closed."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, on_progress: OnProgress, must_end: Callable[[], bool]) -> None:
        self.entered.set()
        end = time.monotonic() + WAIT_SECONDS
        while not self.opened.wait(0.01):
            assert time.monotonic() < end
            if must_end():
                raise InterruptedUploadError

    def wait(self) -> None:
        assert self.entered.wait(WAIT_SECONDS)


class Performer:
    """Uploads nowhere; what goes wrong stands in the script of a checkpoint, one entry a try."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.times: dict[str, list[float]] = defaultdict(list)
        self.jobs: list[UploadJob] = []
        self.script: dict[str, list[Any]] = defaultdict(list)
        self.always: Any = None

    def __call__(
        self, job: UploadJob, on_progress: OnProgress, must_end: Callable[[], bool]
    ) -> UploadResult:
        name = Path(job.checkpoint).name
        self.tried.append(name)
        self.times[name].append(time.monotonic())
        self.jobs.append(job)
        act = self.script[name].pop(0) if self.script[name] else self.always
        if isinstance(act, Exception):
            raise act
        if act is not None:
            act(on_progress, must_end)
        return RESULT

    def hold(self, name: str) -> Gate:
        self.script[name].append(gate := Gate())
        return gate


class Run:
    """A run's checkpoints, its journal, and uploaders that upload nowhere."""

    def __init__(self, folder: Path) -> None:
        self.options = TransportOptions(str(folder / "bucket"), "directory")
        self.journal = Journal(folder / "checkpoints/uploads.jsonl")
        self.performer = Performer()
        self.opened: list[Uploader] = []

    @functools.cached_property
    def checkpoints(self) -> list[Path]:
        """Three of them; the oldest has the lowest loss."""
        return [make_checkpoint(self.journal.path.parent, step) for step in (10, 20, 30)]

    def open(self, **changes: Any) -> Uploader:
        """Return an uploader; one with `perform=None` uploads to a directory."""
        wanted = {"first_backoff_seconds": 0.001, "perform": self.performer, **changes}
        self.opened.append(Uploader(self.options, wanted.pop("journal", self.journal), **wanted))
        return self.opened[-1]

    def upload(self, *checkpoints: Path, **changes: Any) -> Uploader:
        """Upload one after the other; return the uploader, which has tried all of them."""
        uploader = self.open(**changes)
        for checkpoint in checkpoints:
            uploader.submit(checkpoint)
            drain(uploader)
        return uploader

    def hold_first(self, checkpoints: Sequence[Path] = ()) -> tuple[Uploader, Gate]:
        """Submit them; the first one is on its way, and held, when the others come."""
        checkpoints = checkpoints or self.checkpoints
        gate = self.performer.hold(checkpoints[0].name)
        uploader = self.open()
        for checkpoint in checkpoints:
            uploader.submit(checkpoint)
            gate.wait()
        return uploader, gate

    def states(self, name: str) -> list[str]:
        """Return the states of a checkpoint, the oldest first."""
        entries = self.journal.entries()
        return [entry.state.value for entry in entries if entry.checkpoint == name]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    found = Run(tmp_path)
    yield found
    for uploader in found.opened:
        uploader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "uploader"]


def drain(uploader: Uploader) -> None:
    assert uploader.drain(WAIT_SECONDS, lambda text: None) == []


def fail_on_full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def give_up(uploader: Uploader, journal: Journal, checkpoint: Path) -> None:
    """As retention does it."""
    journal.record(checkpoint.name, RUN_ID, UploadState.SUPERSEDED)
    shutil.rmtree(checkpoint)
    uploader.forget([checkpoint.name])


# To the bucket, by a process of its own.


def test_a_checkpoint_ends_verified_with_archive_and_sidecar_in_the_bucket(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    caplog.set_level(logging.DEBUG)
    uploader = run.upload(run.checkpoints[0], perform=None)

    assert "Verified" in caplog.text
    assert run.states(NAMES[0])[0] == "queued"
    assert run.states(NAMES[0])[-1] == "verified"
    assert (uploader.verified, uploader.failures, uploader.pending) == ([NAMES[0]], {}, [])
    archive = tmp_path / "bucket" / archive_object(NAMES[0])
    details = run.journal.latest()[NAMES[0]].details
    assert details["bytes"] == archive.stat().st_size
    assert details["crc32c"] == crc32c_of_file(archive)
    assert (details["uri"], details["bucket"]) == (str(archive), run.options.uri)
    assert details["manifest_crc32c"] == crc32c_of_file(run.checkpoints[0] / "manifest.json")
    assert details["transport"] == "directory"
    assert (tmp_path / "bucket" / sidecar_object(NAMES[0])).is_file()
    subprocess.run(["tar", "xzf", archive, "-C", tmp_path], check=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / NAMES[0]).iterdir()} == {
        path.name: path.read_bytes() for path in run.checkpoints[0].iterdir()
    }
    texts = [
        caplog.text.encode(),
        run.journal.path.read_bytes(),
        gzip.decompress(archive.read_bytes()),
    ]
    assert not [text for text in texts if CANARY.encode() in text]
    # Nothing but the checkpoints, the journal and its lock stays on this machine.
    left = {path.name for path in run.checkpoints[0].parent.iterdir()} - {"uploads.jsonl.lock"}
    assert left == {*NAMES, "uploads.jsonl"}


# Which is next.


def test_when_uploads_lag_behind_the_newest_and_the_best_go_first(run: Run, tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.0, 50: 2.0}
    paths = {
        step: make_checkpoint(
            tmp_path / "checkpoints",
            step,
            current_loss=loss,
            validation_metrics={"validation_loss": loss},
        )
        for step, loss in losses.items()
    }
    uploader, gate = run.hold_first(list(paths.values()))
    assert uploader.pending[0] == paths[10].name
    gate.opened.set()
    drain(uploader)
    assert run.performer.tried == [paths[step].name for step in (10, 50, 20, 40, 30)]


# What fails for now.


def test_what_fails_twice_and_then_does_not_leaves_no_failure(run: Run) -> None:
    told: list[str] = []
    run.performer.script[NAMES[0]] = [DOWN, DOWN]
    uploader = run.upload(run.checkpoints[0], tell=told.append)
    attempt = ["archiving", "failed"]
    assert run.states(NAMES[0]) == ["queued", *attempt, *attempt, "archiving", "verified"]
    attempts = [e.details["attempt"] for e in run.journal.entries() if "attempt" in e.details]
    assert attempts == [1, 2, 3]
    assert (uploader.verified, uploader.failures) == ([NAMES[0]], {})
    assert told[:2] == [f"{NAMES[0]}: upload failed, trying again in 0 s: 503 Backend Error"] * 2
    assert told[2].startswith(f"{NAMES[0]} uploaded and verified: 2.0 MiB in ")


def test_what_fails_for_ever_is_tried_so_often_then_kept_and_the_next_goes_on(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    run.performer.script[NAMES[0]] = [DOWN] * 100
    uploader = run.open(tell=told.append)
    uploader.submit(run.checkpoints[0])
    wait_until(lambda: uploader.failures and not uploader.pending)
    assert run.performer.tried == [NAMES[0]] * UPLOAD_ATTEMPTS
    assert uploader.failures == {NAMES[0]: f"503 Backend Error ({UPLOAD_ATTEMPTS} attempts)"}
    assert f"It is kept in {run.checkpoints[0].parent}" in caplog.text
    retries = [record.args for record in caplog.records if "trying again" in record.msg]
    waits = [args[1] for args in retries if isinstance(args, tuple)]
    assert len(waits) == UPLOAD_ATTEMPTS - 1
    for number, wait in enumerate(waits):
        assert isinstance(wait, float)
        assert 0.5 <= wait / (0.001 * 4**number) <= 1.5
    jittered = [uploader_module._jittered(FIRST_RETRY_SECONDS) for _ in range(200)]
    assert 0.5 <= min(jittered) < 0.75 < 1.25 < max(jittered) <= 1.5

    wait_until(
        lambda: told[-1:] == [f"{NAMES[0]} was not uploaded: 503 Backend Error (5 attempts)"]
    )
    assert run.states(NAMES[0]).count("failed") == UPLOAD_ATTEMPTS
    last = run.journal.latest()[NAMES[0]]
    assert (last.state, last.run_id) == (UploadState.FAILED, RUN_ID)
    assert last.state.is_pending
    assert {key: last.details[key] for key in ("error", "attempts", "permanent")} == {
        "error": "503 Backend Error",
        "attempts": UPLOAD_ATTEMPTS,
        "permanent": False,
    }
    later = datetime.fromisoformat(last.details["next_try"]) - datetime.now(UTC)
    half = timedelta(seconds=LATER_SECONDS / 2)
    assert half - timedelta(seconds=5) < later < 3 * half

    uploader.submit(run.checkpoints[1])
    wait_until(lambda: uploader.verified == [NAMES[1]])
    owed = find_unfinished(run.journal.path.parent, run.journal, run.options.uri)
    assert [path.name for path in owed] == [NAMES[0], NAMES[2]]


def test_draining_tries_once_more_and_does_not_wait_for_what_fails_again(run: Run) -> None:
    run.performer.script[NAMES[0]] = [DOWN] * (UPLOAD_ATTEMPTS + 1)
    gate = run.performer.hold(NAMES[0])
    uploader = run.open()
    uploader.submit(run.checkpoints[0])
    wait_until(lambda: uploader.failures and not uploader.pending)
    drain(uploader)
    assert len(run.performer.tried) == UPLOAD_ATTEMPTS + 1
    assert set(uploader.failures) == {NAMES[0]}
    # What is on its way is waited for.
    assert uploader.drain(WAIT_SECONDS, lambda text: gate.opened.set()) == []
    assert (uploader.verified, uploader.failures) == ([NAMES[0]], {})


def test_late_ones_are_tried_at_once_when_the_bucket_is_back(run: Run) -> None:
    run.performer.always = DOWN
    uploader = run.open()
    for checkpoint in run.checkpoints[:2]:
        uploader.submit(checkpoint)
    wait_until(lambda: len(uploader.failures) == 2)
    run.performer.always = None
    uploader.submit(run.checkpoints[2])
    wait_until(lambda: len(uploader.verified) == 3)
    assert uploader.verified == [NAMES[2], NAMES[1], NAMES[0]]
    assert uploader.failures == {}


def test_late_ones_come_after_those_that_were_not_tried_yet(run: Run) -> None:
    run.performer.script[NAMES[2]] = [DOWN] * UPLOAD_ATTEMPTS
    uploader = run.open()
    uploader.submit(run.checkpoints[2])
    wait_until(lambda: uploader.failures and not uploader.pending)
    gate = Gate()

    def refuse(on_progress: OnProgress, must_end: Callable[[], bool]) -> None:
        gate(on_progress, must_end)
        raise AccessDeniedError("403")  # the bucket is not back

    run.performer.script[NAMES[1]] = [refuse]
    uploader.submit(run.checkpoints[1])
    gate.wait()
    uploader.submit(run.checkpoints[0])
    uploader._queue[0].ready_at = 0.0  # its time has come
    gate.opened.set()
    wait_until(lambda: len(uploader.verified) == 2)
    assert run.performer.tried[-2:] == [NAMES[0], NAMES[2]]


# What fails for good.


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (AccessDeniedError("403 Forbidden"), "403 Forbidden"),
        (StorageError("quota"), "quota"),
        (CheckpointError("belongs to run x"), "belongs to run x"),
        (RuntimeError("bug"), "RuntimeError: bug"),
    ],
)
def test_a_permanent_error_is_not_tried_again_and_the_others_go_on(
    run: Run, error: Exception, text: str
) -> None:
    run.performer.script[NAMES[0]] = [error]
    uploader = run.upload(*run.checkpoints)
    assert run.performer.tried == NAMES
    assert uploader.failures == {NAMES[0]: text}
    assert uploader.verified == NAMES[1:]
    details = run.journal.latest()[NAMES[0]].details
    assert details == {"error": text, "attempts": 1, "permanent": True, "next_try": None}
    assert run.states(NAMES[0]) == ["queued", "archiving", "failed"]


@pytest.mark.parametrize("when", ["queued", "late", "in flight"])
def test_what_was_given_up_is_no_failure(run: Run, when: str) -> None:
    uploader = run.open()
    if when == "late":
        run.performer.script[NAMES[1]] = [DOWN] * UPLOAD_ATTEMPTS
        uploader.submit(run.checkpoints[1])
        wait_until(lambda: uploader.failures)
    gate = run.performer.hold(NAMES[1] if when == "in flight" else NAMES[0])
    run.performer.script[NAMES[1]] += [DOWN] * 9  # what is gone fails again, and for good
    for checkpoint in run.checkpoints[1::-1] if when == "in flight" else run.checkpoints[:2]:
        uploader.submit(checkpoint)
        gate.wait()
    give_up(uploader, run.journal, run.checkpoints[1])
    if when != "in flight":
        assert uploader.pending == NAMES[:1]
    gate.opened.set()
    drain(uploader)
    assert (uploader.failures, uploader.verified) == ({}, [NAMES[0]])


def test_one_that_vanished_without_being_given_up_is_a_failure(run: Run) -> None:
    uploader, gate = run.hold_first()
    shutil.rmtree(run.checkpoints[1])
    gate.opened.set()
    drain(uploader)
    assert set(uploader.failures) == {NAMES[1]}
    assert run.states(NAMES[1])[-1] == "failed"
    assert set(uploader.verified) == {NAMES[0], NAMES[2]}


# The journal.


def test_a_journal_that_cannot_be_written_loses_no_upload(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploader = run.open()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", fail_on_full_disk)
        uploader.submit(run.checkpoints[0])
        wait_until(lambda: uploader.failures and not uploader.pending)
    assert "No space left on device" in uploader.failures[NAMES[0]]
    assert uploader.verified == []  # it could not be remembered
    assert len(run.performer.tried) == UPLOAD_ATTEMPTS
    uploader.submit(run.checkpoints[1])
    drain(uploader)
    assert set(uploader.verified) == set(NAMES[:2])
    assert uploader.failures == {}
    assert run.journal.latest()[NAMES[0]].state is UploadState.VERIFIED


def test_a_journal_that_cannot_be_read_stops_nothing_else(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploader = run.open()
    gate = run.performer.hold(NAMES[2])
    uploader.submit(run.checkpoints[2])
    gate.wait()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_read_lines", fail_on_full_disk)
        uploader.submit(run.checkpoints[0])
        uploader.submit(run.checkpoints[1])
        shutil.rmtree(run.checkpoints[1])
        gate.opened.set()
        wait_until(lambda: len(uploader.failures) == 2 and not uploader.pending)
        assert "No space left" in uploader.failures[NAMES[0]]
    drain(uploader)
    assert set(uploader.verified) == {NAMES[0], NAMES[2]}
    assert set(uploader.failures) == {NAMES[1]}


def test_progress_is_in_the_journal_and_not_synced(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader_module, "PROGRESS_SECONDS", 0.0)
    synced: list[bool] = []
    record = Journal.record

    def watch(self: Journal, name: str, run_id: str, state: UploadState, **details: Any) -> Any:
        synced.append(details.get("sync", True))
        return record(self, name, run_id, state, **details)

    monkeypatch.setattr(Journal, "record", watch)

    def progress(on_progress: OnProgress, must_end: Callable[[], bool]) -> None:
        on_progress(ProgressReport("archiving", 0, 4000, 0, None, 0))
        on_progress(ProgressReport("uploading", 4000, 4000, 1500, 2000, 0))

    run.performer.script[NAMES[0]] = [progress]
    run.upload(run.checkpoints[0])
    found = ["queued", "archiving", "archiving", "uploading", "verified"]
    assert run.states(NAMES[0]) == found
    assert synced == [True, True, False, False, True]
    (details,) = [e.details for e in run.journal.entries() if e.state is UploadState.UPLOADING]
    expected = {"stage": "uploading", "sent": 1500, "read": 4000, "total": 4000, "attempt": 1}
    assert {key: details[key] for key in expected} == expected
    assert details["uri"].endswith(archive_object(NAMES[0]))


def test_progress_is_told_now_and_then_with_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(uploader_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = uploader_module._Progress("a")
    assert progress.describe() == "uploading a"
    assert progress.update(ProgressReport("archiving", 0, 4000, 0, None, 0))
    assert progress.describe() == "archiving a"
    now[0] += 1
    assert not progress.update(ProgressReport("uploading", 0, 4000, 0, None, 0))
    now[0] += 1
    assert progress.update(ProgressReport("uploading", 2000, 4000, 1024, None, 0))
    assert progress.describe() == "uploading a: 50% at 1.0 KiB/s, 1.0s left"
    assert progress.facts()["bytes_per_second"] == 1024
    assert not progress.update(ProgressReport("uploading", 4000, 4000, 1536, 2048, 0))
    assert progress.describe() == "uploading a: 75% at 1.5 KiB/s, 0.0s left"


def test_the_speed_is_that_of_what_was_sent(run: Run) -> None:
    results = [
        UploadResult(1000, "AAAAAA==", 2.0, 1000),
        UploadResult(1000, "AAAAAA==", 2.0, 400),  # parts of it were there
        UploadResult(1000, "AAAAAA==", 0.001, 0),  # all of it was
    ]
    uploader = run.open(perform=lambda job, on_progress, must_end: results.pop(0))
    assert uploader.bytes_per_second is None
    for checkpoint, speed in zip(run.checkpoints, (500, 200, 200), strict=True):
        uploader.submit(checkpoint)
        drain(uploader)
        assert uploader.bytes_per_second == speed
    assert run.journal.latest()[NAMES[0]].details["bytes_per_second"] == 500


# The end of a run, and the next one.


def test_drain_ends_at_its_deadline_or_when_asked_and_names_what_is_pending(run: Run) -> None:
    uploader, gate = run.hold_first()
    texts: list[str] = []
    assert uploader.drain(0.05, texts.append) == NAMES
    assert texts[0] == f"uploading {NAMES[0]}, 2 waiting"
    assert uploader.drain(0.0, texts.append) == NAMES
    assert uploader.drain(math.inf, texts.append, lambda: True) == NAMES
    gate.opened.set()
    drain(uploader)
    assert set(uploader.verified) == set(NAMES)


def test_closing_ends_what_is_in_flight_and_the_next_start_finds_all_of_it(run: Run) -> None:
    uploader, gate = run.hold_first()
    uploader.close()
    assert [run.states(name)[-1] for name in NAMES] == ["archiving", "queued", "queued"]
    assert find_unfinished(run.journal.path.parent, run.journal, run.options.uri) == run.checkpoints
    assert (uploader.failures, uploader.verified) == ({}, [])
    assert not list(run.journal.path.parent.glob(".uploading-*"))

    following = run.open()
    for checkpoint in run.checkpoints:
        following.submit(checkpoint)
    drain(following)
    assert set(following.verified) == set(NAMES)


def test_closing_interrupts_the_wait_for_the_next_attempt(run: Run) -> None:
    run.performer.always = DOWN
    uploader = run.open(first_backoff_seconds=3600.0)
    uploader.submit(run.checkpoints[0])
    wait_until(lambda: "failed" in run.states(NAMES[0]))
    uploader.close()
    assert not uploader._thread.is_alive()


@pytest.mark.parametrize(
    ("recorded", "owed"),
    [
        ([], True),
        (["queued"], True),
        (["queued", "archiving"], True),
        (["queued", "archiving", "uploading"], True),
        (["queued", "failed"], True),
        (["queued", "failed", "queued", "archiving", "uploading", "verified"], False),
        (["superseded"], False),
        (["verified", "removed"], False),
    ],
)
def test_a_restart_knows_what_is_owed(run: Run, recorded: list[str], owed: bool) -> None:
    checkpoints = run.checkpoints
    for name in NAMES[1:]:
        run.journal.record(name, RUN_ID, UploadState.VERIFIED)
    for state in recorded:
        run.journal.record(NAMES[0], RUN_ID, UploadState(state))
    (make_checkpoint(run.journal.path.parent, 5) / "manifest.json").unlink()  # it is not complete
    found = find_unfinished(run.journal.path.parent, run.journal, "bucket")
    assert found == (checkpoints[:1] if owed else [])
    later = make_checkpoint(run.journal.path.parent, 100)
    found = find_unfinished(run.journal.path.parent, run.journal, "bucket")
    assert found == [*(checkpoints[:1] if owed else []), later]


def test_what_is_owed_is_told_to_the_job_so_that_it_is_not_swept_away(run: Run) -> None:
    run.performer.script[NAMES[1]] = [AccessDeniedError("403")]
    uploader = run.upload(run.checkpoints[1], should_sweep=True, compression="small")
    gate = run.performer.hold(NAMES[0])
    uploader.submit(run.checkpoints[0])
    gate.wait()
    uploader.submit(run.checkpoints[2])
    gate.opened.set()
    drain(uploader)
    job = run.performer.jobs[-1]
    assert set(job.owed) == {NAMES[1], NAMES[2]}
    assert (job.should_sweep, job.compression) == (True, "small")


# Two processes on one directory.


def test_what_another_process_is_uploading_is_left_to_it_while_it_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(uploader_module, "LOCKED_SECONDS", 0.02)
    with hold_upload(run.checkpoints[0]) as is_alone:
        assert is_alone
        uploader = run.open()
        uploader.submit(run.checkpoints[0])
        wait_until(lambda: "is being uploaded by another process" in caplog.text)
        uploader.submit(run.checkpoints[1])  # and does not wait for it
        wait_until(lambda: uploader.verified == [NAMES[1]])
    drain(uploader)
    assert run.performer.tried == uploader.verified == [NAMES[1], NAMES[0]]
    assert not list(run.checkpoints[0].parent.glob(".uploading-*"))


def test_the_lock_file_goes_while_it_is_held(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could be the one that the next process has just locked."""
    release, found = FileLock.release, []

    def look(self: Any, *arguments: Any, **options: Any) -> None:
        found.append(Path(self.lock_file).exists())
        release(self, *arguments, **options)

    monkeypatch.setattr(FileLock, "release", look)
    with hold_upload(run.checkpoints[0]):
        pass
    assert found[:1] == [False]


def test_a_lock_that_cannot_be_had_does_not_stop_an_upload(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FileLock, "acquire", fail_on_full_disk)
    theirs = run.checkpoints[0].with_name(f"{UPLOAD_LOCK_PREFIX}{NAMES[0]}.lock")
    theirs.touch()
    with hold_upload(run.checkpoints[0]) as is_alone:
        assert is_alone
    assert f"{NAMES[0]} is used without its lock" in caplog.text
    assert theirs.exists()


def test_a_failure_that_another_process_has_mended_is_none_any_more(run: Run) -> None:
    run.performer.always = AccessDeniedError("403")
    uploader = run.open()
    for path in run.checkpoints[:2]:
        uploader.submit(path)
    drain(uploader)
    mended, failed = run.checkpoints[0].name, run.checkpoints[1].name
    assert set(uploader.failures) == {mended, failed}
    with run.open(perform=lambda *_: RESULT) as other:
        other.submit(run.checkpoints[0])
        drain(other)
    drain(uploader)
    assert set(uploader.failures) == {failed}


def test_what_another_process_brought_there_meanwhile_is_not_sent_again(run: Run) -> None:
    uploader, gate = run.hold_first(run.checkpoints[:2])
    with run.open(perform=lambda *_: RESULT) as other:
        other.submit(run.checkpoints[1])
        drain(other)
    gate.opened.set()
    drain(uploader)
    assert (run.performer.tried, uploader.verified) == (NAMES[:1], NAMES[:2])


def test_the_local_archive_of_an_upload_that_is_ended_is_removed(run: Run) -> None:
    begun = threading.Event()

    def perform(job: UploadJob, on_progress: OnProgress, must_end: Any) -> UploadResult:
        local_archive(run.checkpoints[0]).write_bytes(b"half")
        begun.set()
        while not must_end():
            time.sleep(0.01)
        raise InterruptedUploadError

    uploader = run.open(perform=perform)
    uploader.submit(run.checkpoints[0])
    assert begun.wait(WAIT_SECONDS)
    uploader.close()
    assert not local_archive(run.checkpoints[0]).exists()
