"""Uploads never stop training, are never forgotten, and count only when the bucket has them."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gcs_server import FakeGcsServer, Fault
from tests.sample_checkpoints import RUN_ID, make_checkpoint, seal
from utils.errors import AccessDeniedError, TransientStorageError
from utils.journal import Journal, UploadState
from utils.layout import Manifest, archive_object, card_object, read_json, read_manifest
from utils.storage import DirectoryBucket, ObjectInfo, crc32c_of_file, open_bucket
from utils.transports import BucketTransport, Transport
from utils.uploader import MAX_ATTEMPTS, Uploader, find_unfinished

NAMES = [f"checkpoint-epoch0-step{step}-files0" for step in (10, 20, 30)]
WAIT_SECONDS = 20.0

Put = Callable[[str, Path], None]


class ScriptedTransport:
    """The directory transport, whose puts go wrong as scripted: one entry a put, None is well."""

    name = "scripted"

    def __init__(self, root: Path) -> None:
        self.bucket = DirectoryBucket(root)
        self._inner = BucketTransport(self.bucket)
        self.uri = self._inner.uri
        self.faults: list[Exception | Callable[[Put, str, Path], None] | None] = []
        self.repeat: Exception | Callable[[Put, str, Path], None] | None = None
        self.puts: list[str] = []

    def put(self, object_name: str, path: Path) -> None:
        self.puts.append(object_name)
        fault = self.faults.pop(0) if self.faults else self.repeat
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            fault(self._inner.put, object_name, path)
        else:
            self._inner.put(object_name, path)

    def stat(self, object_name: str) -> ObjectInfo | None:
        return self._inner.stat(object_name)

    def read(self, object_name: str) -> bytes | None:
        return self._inner.read(object_name)

    def delete(self, object_name: str) -> None:
        self._inner.delete(object_name)

    def close(self) -> None:
        self._inner.close()


class Gate:
    """Holds a put until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, put: Put, name: str, path: Path) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT_SECONDS)
        put(name, path)


@pytest.fixture
def transport(tmp_path: Path) -> ScriptedTransport:
    return ScriptedTransport(tmp_path / "bucket")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "checkpoints/uploads.jsonl")


@pytest.fixture
def open_uploader(transport: ScriptedTransport, journal: Journal) -> Iterator[Callable[..., Any]]:
    opened = []

    def build(using: Transport | None = None, **options: Any) -> Uploader:
        options = {"first_backoff_seconds": 0.001, **options}
        opened.append(Uploader(using or transport, options.pop("journal", journal), **options))
        return opened[-1]

    yield build
    for uploader in opened:
        uploader.close()


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    return [make_checkpoint(tmp_path / "checkpoints", step) for step in (10, 20, 30)]


def drain(uploader: Uploader) -> None:
    assert uploader.drain(WAIT_SECONDS, lambda names: None) == []


def states(journal: Journal, name: str) -> list[str]:
    return [entry.state.value for entry in journal.entries() if entry.checkpoint == name]


def change_run(checkpoint: Path, run_id: str) -> None:
    manifest = read_json(checkpoint / "manifest.json")
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "run_id": run_id}))


UPLOADED = ["queued", "archiving", "uploading", "verified"]


def test_a_checkpoint_ends_verified_with_archive_and_card_in_the_bucket(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
    tmp_path: Path,
) -> None:
    uploader = open_uploader()
    uploader.submit(checkpoints[0])
    drain(uploader)

    assert states(journal, NAMES[0]) == UPLOADED
    assert (uploader.verified, uploader.failures, uploader.pending) == ([NAMES[0]], {}, [])
    archive = transport.bucket.root / archive_object(NAMES[0])
    card = json.loads(transport.bucket.read_bytes(card_object(NAMES[0])))
    facts = {"size": archive.stat().st_size, "crc32c": crc32c_of_file(archive)}
    assert card["archive"] == facts
    assert card["metadata"] == read_json(checkpoints[0] / "metadata.json")
    manifest = read_manifest(checkpoints[0])
    assert Manifest.from_json(card["manifest"], "card") == manifest
    details = journal.latest()[NAMES[0]].details
    assert details["crc32c"] == facts["crc32c"]
    assert details["uri"] == str(archive)
    assert details["bytes"] == facts["size"]

    subprocess.run(["tar", "xzf", archive, "-C", tmp_path], check=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / NAMES[0]).iterdir()} == {
        path.name: path.read_bytes() for path in checkpoints[0].iterdir()
    }
    # Nothing but the checkpoints and the journal stays on this machine.
    left = {path.name for path in checkpoints[0].parent.iterdir()}
    assert left == {*NAMES, "uploads.jsonl"}


def test_checkpoints_are_uploaded_one_after_the_other(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    checkpoints: list[Path],
) -> None:
    uploader = open_uploader()
    for checkpoint in checkpoints:
        uploader.submit(checkpoint)
    drain(uploader)
    assert uploader.verified == NAMES
    assert transport.puts == [
        name
        for checkpoint in NAMES
        for name in (archive_object(checkpoint), card_object(checkpoint))
    ]


def test_the_card_is_written_only_after_the_archive_is_verified(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    checkpoints: list[Path],
) -> None:
    seen = []

    def look(put: Put, name: str, path: Path) -> None:
        seen.append([info.name for info in transport.bucket.list()])
        put(name, path)

    transport.repeat = look
    uploader = open_uploader(background=False)
    uploader.submit(checkpoints[0])
    assert seen == [[], [archive_object(NAMES[0])]]


@pytest.mark.parametrize("failing_put", ["archive", "card"])
def test_two_transient_failures_are_survived(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
    failing_put: str,
) -> None:
    fault = TransientStorageError("503")
    transport.faults = [fault, fault] if failing_put == "archive" else [None, fault, None, fault]
    uploader = open_uploader()
    uploader.submit(checkpoints[0])
    drain(uploader)
    attempt = ["archiving", "uploading"]
    assert states(journal, NAMES[0]) == ["queued", *attempt, *attempt, *attempt, "verified"]
    attempts = [e.details["attempt"] for e in journal.entries() if "attempt" in e.details]
    assert attempts == [1, 1, 2, 2, 3, 3]
    assert (uploader.verified, uploader.failures) == ([NAMES[0]], {})


def test_a_failure_for_ever_is_bounded_and_kept_and_the_next_goes_on(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
) -> None:
    transport.faults = [TransientStorageError("gs://x: 503 Backend Error")] * MAX_ATTEMPTS
    uploader = open_uploader()
    uploader.submit(checkpoints[0])
    uploader.submit(checkpoints[1])
    drain(uploader)

    assert transport.puts.count(archive_object(NAMES[0])) == MAX_ATTEMPTS
    assert uploader.failures == {NAMES[0]: "gs://x: 503 Backend Error (5 attempts)"}
    assert uploader.verified == [NAMES[1]]
    last = journal.latest()[NAMES[0]]
    assert (last.state, last.run_id) == (UploadState.FAILED, RUN_ID)
    assert last.details["error"] == uploader.failures[NAMES[0]]
    assert last.state.is_pending
    assert sorted(path.name for path in checkpoints[0].parent.glob("checkpoint*")) == NAMES
    uri = transport.bucket.uri
    assert [path.name for path in find_unfinished(journal.path.parent, journal, uri)] == [
        NAMES[0],
        NAMES[2],
    ]


def test_the_waits_between_attempts_grow(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    checkpoints: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    class Closing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return self.is_set()

    monkeypatch.setattr("utils.uploader.threading.Event", Closing)
    transport.repeat = TransientStorageError("503")
    uploader = open_uploader(background=False, first_backoff_seconds=1.0)
    uploader.submit(checkpoints[0])
    assert waits == [1.0, 4.0, 16.0, 64.0]


@pytest.mark.parametrize(
    "error", [AccessDeniedError("403 Forbidden"), PermissionError(13, "Permission denied")]
)
def test_a_permanent_error_is_not_tried_again(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
    error: Exception,
) -> None:
    transport.faults = [error]
    uploader = open_uploader()
    uploader.submit(checkpoints[0])
    drain(uploader)
    assert transport.puts == [archive_object(NAMES[0])]
    assert states(journal, NAMES[0]) == ["queued", "archiving", "uploading", "failed"]
    assert str(error) in uploader.failures[NAMES[0]]


def test_wrong_bytes_in_the_bucket_are_never_verified(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
) -> None:
    def damage(put: Put, name: str, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        transport.bucket.put_bytes(name, bytes(data))

    transport.repeat = damage
    uploader = open_uploader()
    uploader.submit(checkpoints[0])
    drain(uploader)
    assert uploader.verified == []
    assert "the bucket holds" in uploader.failures[NAMES[0]]
    assert "verified" not in states(journal, NAMES[0])
    assert transport.bucket.stat(card_object(NAMES[0])) is None
    assert transport.puts == [archive_object(NAMES[0])] * MAX_ATTEMPTS


def test_a_put_that_stored_nothing_is_never_verified(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    checkpoints: list[Path],
) -> None:
    transport.repeat = lambda put, name, path: None
    uploader = open_uploader(background=False)
    uploader.submit(checkpoints[0])
    assert "the bucket holds nothing instead of" in uploader.failures[NAMES[0]]


def test_an_answer_that_was_lost_costs_one_more_attempt(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    checkpoints: list[Path],
) -> None:
    def lose_answer(put: Put, name: str, path: Path) -> None:
        put(name, path)
        raise TransientStorageError("connection reset")

    transport.faults = [lose_answer]
    uploader = open_uploader()
    uploader.submit(checkpoints[0])
    drain(uploader)
    assert uploader.verified == [NAMES[0]]


@pytest.mark.parametrize(
    ("card", "owner"),
    [
        ({"manifest": {"run_id": "20250101-ffffffff"}}, "20250101-ffffffff"),
        ({"something": "else"}, "unknown"),
        ([], "unknown"),
    ],
)
def test_an_object_of_another_run_is_never_overwritten(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    checkpoints: list[Path],
    card: object,
    owner: str,
) -> None:
    theirs = json.dumps(card).encode()
    transport.bucket.put_bytes(card_object(NAMES[0]), theirs)
    transport.bucket.put_bytes(archive_object(NAMES[0]), b"their archive")
    uploader = open_uploader()
    uploader.submit(checkpoints[0])
    drain(uploader)
    assert transport.puts == []
    assert transport.bucket.read_bytes(card_object(NAMES[0])) == theirs
    assert transport.bucket.read_bytes(archive_object(NAMES[0])) == b"their archive"
    assert f"belongs to run {owner}" in uploader.failures[NAMES[0]]
    assert "run_name" in uploader.failures[NAMES[0]]


def test_an_upload_that_was_complete_may_be_repeated(
    open_uploader: Callable[..., Uploader],
    checkpoints: list[Path],
) -> None:
    for _ in range(2):
        uploader = open_uploader()
        uploader.submit(checkpoints[0])
        drain(uploader)
        assert uploader.verified == [NAMES[0]]


def test_a_bug_in_one_upload_does_not_stop_the_others(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
) -> None:
    transport.faults = [RuntimeError("bug")]
    uploader = open_uploader()
    for checkpoint in checkpoints:
        uploader.submit(checkpoint)
    drain(uploader)
    assert uploader.failures == {NAMES[0]: "RuntimeError: bug"}
    assert uploader.verified == NAMES[1:]
    assert states(journal, NAMES[0])[-1] == "failed"


class FullDiskJournal(Journal):
    """A journal on a disk that is full for everything that concerns one checkpoint."""

    def record(self, checkpoint: str, run_id: str, state: UploadState, **details: Any) -> Any:
        if checkpoint == NAMES[0] and state is not UploadState.QUEUED:
            raise OSError(28, "No space left on device")
        return super().record(checkpoint, run_id, state, **details)


def test_a_journal_that_cannot_be_written_does_not_stop_the_others(
    open_uploader: Callable[..., Uploader],
    journal: Journal,
    checkpoints: list[Path],
) -> None:
    uploader = open_uploader(journal=FullDiskJournal(journal.path))
    uploader.submit(checkpoints[0])
    uploader.submit(checkpoints[1])
    drain(uploader)
    assert "No space left" in uploader.failures[NAMES[0]]
    assert uploader.verified == [NAMES[1]]
    assert journal.latest()[NAMES[0]].state.is_pending


def test_a_disk_that_fills_up_while_archiving_fails_the_upload_and_leaves_nothing(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
) -> None:
    (checkpoints[0] / "optimizer.bin").write_bytes(hashlib.shake_128(b"").digest(500_000))
    seal(checkpoints[0], 10)
    uploader = open_uploader(background=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        uploader.submit(checkpoints[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written: File too large" in uploader.failures[NAMES[0]]
    assert states(journal, NAMES[0]) == ["queued", "archiving", "failed"]
    assert transport.puts == []
    assert not list(checkpoints[0].parent.glob("*.tar.gz"))


def test_too_little_space_is_seen_before_anything_is_written(
    open_uploader: Callable[..., Uploader],
    journal: Journal,
    checkpoints: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    uploader = open_uploader(background=False)
    uploader.submit(checkpoints[0])
    need = read_manifest(checkpoints[0]).total_bytes
    assert f"needs up to {need} bytes, 1000 are free" in uploader.failures[NAMES[0]]
    assert states(journal, NAMES[0])[-1] == "failed"


def test_a_checkpoint_damaged_after_its_commit_is_not_called_verified(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    checkpoints: list[Path],
) -> None:
    (checkpoints[0] / "model.safetensors").write_bytes(b"weightz" * 100)
    uploader = open_uploader(background=False)
    uploader.submit(checkpoints[0])
    assert "model.safetensors is damaged" in uploader.failures[NAMES[0]]
    assert transport.puts == []


@pytest.mark.parametrize("is_given_up", [True, False])
def test_a_checkpoint_that_is_gone_when_its_turn_comes_is_a_failure_unless_given_up(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
    is_given_up: bool,
) -> None:
    gate = Gate()
    transport.faults = [gate]
    uploader = open_uploader()
    for checkpoint in checkpoints:
        uploader.submit(checkpoint)
    assert gate.entered.wait(WAIT_SECONDS)
    if is_given_up:
        journal.record(NAMES[1], RUN_ID, UploadState.SUPERSEDED)
    shutil.rmtree(checkpoints[1])
    gate.opened.set()
    drain(uploader)
    assert set(uploader.failures) == (set() if is_given_up else {NAMES[1]})
    assert uploader.verified == [NAMES[0], NAMES[2]]
    assert states(journal, NAMES[1])[-1] == ("superseded" if is_given_up else "failed")


# Restarts.


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
def test_a_restart_knows_what_is_owed(
    journal: Journal, checkpoints: list[Path], recorded: list[str], owed: bool
) -> None:
    for name in NAMES[1:]:
        journal.record(name, RUN_ID, UploadState.VERIFIED)
    for state in recorded:
        journal.record(NAMES[0], RUN_ID, UploadState(state))
    assert find_unfinished(journal.path.parent, journal, "bucket") == (
        checkpoints[:1] if owed else []
    )


def test_what_is_owed_comes_by_step_and_only_where_it_is_complete(
    journal: Journal, checkpoints: list[Path]
) -> None:
    (checkpoints[1] / "manifest.json").unlink()
    make_checkpoint(journal.path.parent, 100)
    names = [path.name for path in find_unfinished(journal.path.parent, journal, "bucket")]
    assert names == [NAMES[0], NAMES[2], "checkpoint-epoch0-step100-files0"]


def test_the_next_start_completes_an_upload_killed_between_archive_and_card(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
) -> None:
    transport.bucket.put_bytes(archive_object(NAMES[0]), b"half an archive")
    for state in ("queued", "archiving", "uploading"):
        journal.record(NAMES[0], RUN_ID, UploadState(state))
    for name in NAMES[1:]:
        journal.record(name, RUN_ID, UploadState.VERIFIED)
    uploader = open_uploader()
    for checkpoint in find_unfinished(journal.path.parent, journal, "bucket"):
        uploader.submit(checkpoint)
    drain(uploader)
    assert uploader.verified == [NAMES[0]]
    card = json.loads(transport.bucket.read_bytes(card_object(NAMES[0])))
    info = transport.stat(archive_object(NAMES[0]))
    assert info is not None
    assert card["archive"] == {"size": info.size, "crc32c": info.crc32c}


# The end of a start.


def test_drain_gives_up_at_its_deadline_and_names_what_is_pending(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
) -> None:
    gate = Gate()
    transport.faults = [gate]
    uploader = open_uploader()
    for checkpoint in checkpoints:
        uploader.submit(checkpoint)
    assert gate.entered.wait(WAIT_SECONDS)
    waited: list[list[str]] = []
    assert uploader.drain(0.05, waited.append) == NAMES
    assert waited[0] == NAMES
    assert uploader.drain(0.0, waited.append) == NAMES

    gate.opened.set()
    drain(uploader)
    assert uploader.verified == NAMES


def test_closing_leaves_what_was_queued_in_the_journal(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
) -> None:
    gate = Gate()
    transport.faults = [gate]
    uploader = open_uploader()
    for checkpoint in checkpoints:
        uploader.submit(checkpoint)
    assert gate.entered.wait(WAIT_SECONDS)
    opener = threading.Timer(0.05, gate.opened.set)
    opener.start()
    uploader.close()
    opener.join()
    # What was in flight is finished or failed; the rest waits for the next start.
    assert [states(journal, name)[-1] for name in NAMES[1:]] == ["queued", "queued"]
    assert [path.name for path in find_unfinished(journal.path.parent, journal, "bucket")][
        -2:
    ] == NAMES[1:]
    assert not [t for t in threading.enumerate() if t.name == "uploader"]


def test_closing_interrupts_the_wait_for_the_next_attempt(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
) -> None:
    tried = threading.Event()

    def fail(put: Put, name: str, path: Path) -> None:
        tried.set()
        raise TransientStorageError("503")

    transport.repeat = fail
    uploader = open_uploader(first_backoff_seconds=3600.0)
    uploader.submit(checkpoints[0])
    assert tried.wait(WAIT_SECONDS)
    uploader.close()
    assert not [t for t in threading.enumerate() if t.name == "uploader"]
    assert journal.latest()[NAMES[0]].state is UploadState.FAILED


def test_as_a_context_manager_it_stops_its_worker(
    transport: ScriptedTransport, journal: Journal, checkpoints: list[Path]
) -> None:
    with Uploader(transport, journal) as uploader:
        uploader.submit(checkpoints[0])
        drain(uploader)
    assert not [t for t in threading.enumerate() if t.name == "uploader"]


def test_without_a_worker_submit_returns_when_all_is_done(
    open_uploader: Callable[..., Uploader],
    transport: ScriptedTransport,
    journal: Journal,
    checkpoints: list[Path],
) -> None:
    threads = set(threading.enumerate())
    uploader = open_uploader(background=False)
    assert set(threading.enumerate()) == threads
    uploader.submit(checkpoints[0])
    assert uploader.verified == [NAMES[0]]
    assert states(journal, NAMES[0]) == UPLOADED
    transport.repeat = TransientStorageError("503")
    uploader.submit(checkpoints[1])
    assert NAMES[1] in uploader.failures
    assert uploader.pending == []


# Over a real connection.


def test_an_upload_over_a_bad_connection_arrives_whole(
    gcs: FakeGcsServer,
    open_uploader: Callable[..., Uploader],
    checkpoints: list[Path],
    journal: Journal,
) -> None:
    (checkpoints[0] / "optimizer.bin").write_bytes(hashlib.shake_128(b"").digest(400_000))
    seal(checkpoints[0], 10)
    faults = [
        gcs.add_fault(Fault("status", operation="upload", times=2, status=503)),
        gcs.add_fault(Fault("reset", operation="upload", after_bytes=200_000)),
        gcs.add_fault(Fault("lost_answer", operation="upload")),
    ]
    uploader = open_uploader(BucketTransport(open_bucket("gs://runs/a")))
    uploader.submit(checkpoints[0])
    drain(uploader)
    assert [fault.fired for fault in faults] == [2, 1, 1]
    assert states(journal, NAMES[0])[-1] == "verified"
    stored = gcs.get_object("runs", f"a/{archive_object(NAMES[0])}")
    card = json.loads(gcs.read_object("runs", f"a/{card_object(NAMES[0])}"))
    assert card["archive"] == {"size": stored.size, "crc32c": stored.blob.crc32c}
    assert gcs.unfinished_uploads() == []


def test_a_refusing_bucket_is_asked_once_and_told_apart(
    gcs: FakeGcsServer,
    open_uploader: Callable[..., Uploader],
    checkpoints: list[Path],
) -> None:
    gcs.create_bucket("locked", writable=False)
    uploader = open_uploader(BucketTransport(open_bucket("gs://locked/a")))
    uploader.submit(checkpoints[0])
    drain(uploader)
    assert "gs://locked/a/Checkpoints" in uploader.failures[NAMES[0]]
    assert len(gcs.requests("upload")) == 1
