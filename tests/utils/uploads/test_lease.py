"""One trainer at a time on a prefix: the second is refused by name, a dead one does not block."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.gcs_server import FakeGcsServer, Fault
from tests.sample_checkpoints import RUN_ID
from tests.utils.uploads.waiting import WAIT_SECONDS, Clock, started, wait_until
from utils.base.errors import ConflictError, LockedError, TransientStorageError
from utils.storage.bucket import Bucket, ObjectInfo
from utils.storage.directory import DirectoryBucket
from utils.storage.open import open_bucket
from utils.uploads import lease as prefix_lease
from utils.uploads.lease import (
    LEASE_OBJECT,
    POLLS_PER_WATCH,
    LeaseRecord,
    PrefixLease,
    hold_prefix,
)

BEAT = 0.05


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryBucket:
    return DirectoryBucket(tmp_path / "bucket")


@pytest.fixture(params=["directory", "gs"])
def bucket(request: pytest.FixtureRequest) -> Iterator[Bucket]:
    if request.param == "gs":
        request.getfixturevalue("gcs")
        found = open_bucket("gs://runs/team/a", retry_seconds=5)
    else:
        found = request.getfixturevalue("directory")
    yield found
    found.close()


def record_in(bucket: Bucket) -> LeaseRecord:
    return LeaseRecord.from_bytes(bucket.read_bytes(LEASE_OBJECT), 1.0)


def put_holder(bucket: Bucket, **changes: Any) -> LeaseRecord:
    """Leave the lease of a holder on another machine."""
    record = LeaseRecord(
        run_id="run-1",
        host="node-7",
        pid=4711,
        machine="node-7/boot/pid:[1]",
        process_start="100",
        token="aa",  # noqa: S106
        heartbeat_seconds=BEAT,
    )
    record = replace(record, **changes)
    bucket.put_bytes(LEASE_OBJECT, record.to_bytes())
    return record


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Watching a holder takes no time; beats come as they do."""
    found = Clock()
    monkeypatch.setattr(prefix_lease, "time", found)
    return found


def wait_for_beat(bucket: Bucket) -> None:
    beat = record_in(bucket).beat
    wait_until(lambda: record_in(bucket).beat > beat)


# What the holder does.


def test_the_lease_names_its_holder_and_goes_at_the_end(bucket: Bucket, clock: Clock) -> None:
    with hold_prefix(bucket, RUN_ID, heartbeat_seconds=30) as lease:
        assert (lease.is_held, lease.lost) == (True, None)
        record = record_in(bucket)
        assert (record.run_id, record.host, record.pid) == (RUN_ID, platform.node(), os.getpid())
        assert record.heartbeat_seconds == 30
    assert bucket.stat(LEASE_OBJECT) is None
    assert not lease.is_held
    with hold_prefix(bucket, RUN_ID):
        assert record_in(bucket).token != record.token
    assert not clock.now  # nobody was waited for


def test_the_lease_goes_when_the_run_fails(directory: DirectoryBucket) -> None:
    with pytest.raises(ValueError, match="the run"), hold_prefix(directory, RUN_ID):
        raise ValueError("the run")
    assert directory.stat(LEASE_OBJECT) is None
    assert not any(thread.name == "prefix-lease" for thread in threading.enumerate())


def test_the_holder_beats_and_names_the_run_that_was_chosen_since(bucket: Bucket) -> None:
    with hold_prefix(bucket, "run-1", heartbeat_seconds=0.01) as lease:
        token = record_in(bucket).token
        lease.run_id = "run-2"
        wait_until(lambda: record_in(bucket).run_id == "run-2" and record_in(bucket).beat >= 3)
        assert record_in(bucket).token == token
        assert lease.lost is None


# Two at once.


def test_a_second_trainer_is_refused_and_told_who_is_there(
    bucket: Bucket, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock.meanwhile = lambda: wait_for_beat(bucket)
    with hold_prefix(bucket, "run-1", heartbeat_seconds=0.01) as first:
        with pytest.raises(LockedError) as caught, hold_prefix(bucket, "run-2"):
            pass
        assert first.lost is None
        assert record_in(bucket).run_id == "run-1"
    assert clock.now == pytest.approx(2 * 0.01 / POLLS_PER_WATCH)  # at its first beat
    message = str(caught.value)
    assert f"{bucket.uri} is in use" in message
    assert f"run run-1, process {os.getpid()} on {platform.node()}" in message
    assert "--set run_name=" in message
    assert caplog.text.count("see whether that trainer is alive") == 1


@pytest.mark.parametrize("had_holder", [True, False])
def test_of_two_that_start_at_once_one_wins_and_the_other_names_it(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, had_holder: bool
) -> None:
    if had_holder:  # a dead one
        put_holder(bucket)
    put = bucket.put_bytes_if

    def put_too_late(name: str, data: bytes, expected: ObjectInfo | None) -> ObjectInfo:
        put_holder(bucket, run_id="run-3", token="cc")  # noqa: S106
        return put(name, data, expected)

    monkeypatch.setattr(bucket, "put_bytes_if", put_too_late)
    with pytest.raises(LockedError, match=r"run run-3, process 4711 on node-7"):
        PrefixLease(bucket, "run-2", BEAT).acquire()
    assert record_in(bucket).run_id == "run-3"


def test_who_ends_during_the_wait_makes_room_at_once(bucket: Bucket, clock: Clock) -> None:
    put_holder(bucket, heartbeat_seconds=60)
    clock.meanwhile = lambda: bucket.delete(LEASE_OBJECT)
    with hold_prefix(bucket, "run-2") as lease:
        assert lease.is_held
    assert clock.now == 2 * 60 / POLLS_PER_WATCH


# Dead holders.


def test_a_dead_holder_elsewhere_delays_by_two_of_its_heartbeats(
    bucket: Bucket, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    put_holder(bucket, heartbeat_seconds=60)
    with hold_prefix(bucket, "run-2", heartbeat_seconds=30) as lease:
        assert clock.now == pytest.approx(120)
        assert lease.is_held
        assert record_in(bucket).run_id == "run-2"
    assert "run run-1, process 4711 on node-7) gave no sign of life" in caplog.text


HOLDER = """
import sys
from utils.uploads.lease import hold_prefix
from utils.storage.open import open_bucket
with hold_prefix(open_bucket(sys.argv[1]), "run-1", heartbeat_seconds=60):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_holder_of_this_machine_is_not_waited_for(
    bucket: Bucket, clock: Clock, is_reaped: bool
) -> None:
    with started(HOLDER, bucket.uri) as (process, line):
        assert line == "held\n"
        assert record_in(bucket).pid == process.pid
        process.kill()
        if is_reaped:
            process.wait(WAIT_SECONDS)
        else:  # a zombie until its parent asks
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with hold_prefix(bucket, "run-2"):
            assert (record_in(bucket).run_id, clock.now) == ("run-2", 0)


def test_another_process_with_a_dead_holders_id_does_not_block(
    directory: DirectoryBucket, clock: Clock
) -> None:
    with hold_prefix(directory, "run-1"):
        record = record_in(directory)
    assert record.process_start
    put_holder(directory, **{**asdict(record), "process_start": "1"})
    with hold_prefix(directory, "run-2"):
        assert (record_in(directory).run_id, clock.now) == ("run-2", 0)


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "another/boot/pid:[1]"},
        {"machine": ""},
        {"pid": 0},
        {"pid": -1},
        {"process_start": "", "pid": os.getpid()},
    ],
)
def test_a_holder_that_may_be_alive_is_waited_for(
    directory: DirectoryBucket,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with hold_prefix(directory, "run-1"):
        record = record_in(directory)
    own = {**asdict(record), "pid": ended.pid}
    put_holder(directory, **own)
    with hold_prefix(directory, "run-2"):
        assert not clock.now
    put_holder(directory, **{**own, **change})
    if change == {"machine": ""}:  # machines that cannot say which they are are not the same
        monkeypatch.setattr(prefix_lease, "_machine_id", lambda: "")
    with hold_prefix(directory, "run-2"):
        assert clock.now


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"pid": "x", "heartbeat_seconds": 1e999}'],
)
def test_garbage_in_the_leases_place_is_a_dead_holder(
    directory: DirectoryBucket, data: bytes
) -> None:
    directory.put_bytes(LEASE_OBJECT, data)
    with hold_prefix(directory, "run-2", heartbeat_seconds=BEAT) as lease:
        assert lease.is_held
        assert record_in(directory).run_id == "run-2"


def test_what_a_lease_says_cannot_steer_a_terminal() -> None:
    data = json.dumps({"run_id": "a\x1b[2J", "host": "b\nc", "pid": True}).encode()
    assert str(LeaseRecord.from_bytes(data, 1.0)) == "run a?[2J, process 0 on b?c"
    assert LeaseRecord.from_bytes(b'{"heartbeat_seconds": 1e9}', 1.0).heartbeat_seconds == 300


# A bucket that makes trouble.


def test_without_the_right_to_write_a_run_goes_on_with_a_warning(
    gcs: FakeGcsServer, caplog: pytest.LogCaptureFixture
) -> None:
    gcs.create_bucket("locked", writable=False)
    locked = open_bucket("gs://locked/a", retry_seconds=5)
    with hold_prefix(locked, RUN_ID) as lease:
        assert (lease.is_held, lease.lost) == (False, None)
    assert "A second trainer on gs://locked/a would not be noticed" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    locked.close()


def test_without_the_right_to_replace_the_holder_warns_once(
    gcs: FakeGcsServer, caplog: pytest.LogCaptureFixture
) -> None:
    gcs.create_bucket("once", without=["storage.objects.delete"])
    bucket = open_bucket("gs://once/a", retry_seconds=5)
    with hold_prefix(bucket, RUN_ID, heartbeat_seconds=0.02):
        wait_until(lambda: len(gcs.requests("upload")) > 3)
    assert caplog.text.count("would take this one for dead") == 1
    assert "was not removed" in caplog.text
    assert "waits " in caplog.text
    bucket.close()


def test_beats_that_fail_are_tried_again_in_silence(
    gcs: FakeGcsServer, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = open_bucket("gs://runs/a", retry_seconds=0.02)
    with hold_prefix(bucket, RUN_ID, heartbeat_seconds=0.02) as lease:
        fault = gcs.add_fault(Fault("status", times=None, operation="upload", status=503))
        wait_until(lambda: fault.fired >= 4)
        gcs.clear_faults()
        beat = record_in(bucket).beat
        wait_until(lambda: record_in(bucket).beat > beat)
        assert lease.lost is None
    assert bucket.stat(LEASE_OBJECT) is None
    assert not caplog.records
    bucket.close()


def test_a_beat_whose_answer_was_lost_loses_nothing(
    directory: DirectoryBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = directory.put_bytes_if
    lost = threading.Event()

    def put_and_fail_once(name: str, data: bytes, expected: ObjectInfo | None) -> ObjectInfo:
        info = put(name, data, expected)
        if expected is not None and not lost.is_set():
            lost.set()
            raise TransientStorageError("the connection is gone")
        return info

    monkeypatch.setattr(directory, "put_bytes_if", put_and_fail_once)
    with hold_prefix(directory, RUN_ID, heartbeat_seconds=0.01) as lease:
        assert lost.wait(WAIT_SECONDS)
        beat = record_in(directory).beat
        wait_until(lambda: record_in(directory).beat > beat + 1)
        assert lease.lost is None
    assert directory.stat(LEASE_OBJECT) is None


def test_a_watch_begins_anew_after_the_bucket_was_down(
    directory: DirectoryBucket, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The holder cannot beat while the bucket is down, so that its silence then means nothing.
    record = put_holder(directory, heartbeat_seconds=40)
    read, failures = directory.read_version, [3]

    def read_or_fail(name: str) -> tuple[bytes, ObjectInfo]:
        if clock.now and failures[0]:
            failures[0] -= 1
            raise TransientStorageError("503")
        return read(name)

    monkeypatch.setattr(directory, "read_version", read_or_fail)
    with hold_prefix(directory, "run-2"):
        assert clock.now == pytest.approx(3 * 10 + 80)

    put_holder(directory, heartbeat_seconds=40)
    failures[0] = 100
    with pytest.raises(TransientStorageError), hold_prefix(directory, "run-2"):
        pass
    assert directory.read_bytes(LEASE_OBJECT) == record.to_bytes()
    assert failures[0] > 90


def test_a_lease_that_somebody_removed_is_written_again(directory: DirectoryBucket) -> None:
    with hold_prefix(directory, RUN_ID, heartbeat_seconds=0.02) as lease:
        directory.delete(LEASE_OBJECT)
        wait_until(lambda: directory.stat(LEASE_OBJECT) is not None)
        assert lease.lost is None
    assert directory.stat(LEASE_OBJECT) is None


# Taken over while it stalled.


def take_over(bucket: Bucket) -> LeaseRecord:
    record = LeaseRecord("run-9", "node-9", 9, "", "", "bb", BEAT)
    while True:
        _, seen = bucket.read_version(LEASE_OBJECT)
        with contextlib.suppress(ConflictError):
            bucket.put_bytes_if(LEASE_OBJECT, record.to_bytes(), seen)
            return record


def test_a_holder_that_was_taken_over_says_so_and_touches_nothing(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    with hold_prefix(bucket, RUN_ID, heartbeat_seconds=0.02) as lease:
        usurper = take_over(bucket)
        wait_until(lambda: lease.lost is not None)
        assert lease.lost is not None
        assert "taken over by another trainer (run run-9, process 9 on node-9)" in lease.lost
        lease._thread.join(WAIT_SECONDS)
        assert not lease._thread.is_alive()
    assert record_in(bucket) == usurper
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_holder_taken_over_since_its_last_beat_leaves_the_new_lease(bucket: Bucket) -> None:
    with hold_prefix(bucket, RUN_ID, heartbeat_seconds=30):
        usurper = take_over(bucket)
    assert record_in(bucket) == usurper
