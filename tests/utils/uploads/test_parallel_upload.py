"""Uploads in parts: whole, in order, taken up again, and with nothing left of them."""

from __future__ import annotations

import os
import threading
import tracemalloc
from collections.abc import Iterator
from typing import IO, Any

import pytest

from tests.gcs_server import FakeGcsServer, Fault
from tests.utils.uploads.waiting import end_in_time, wait_until
from utils.base.errors import (
    AccessDeniedError,
    ConflictError,
    TransientStorageError,
)
from utils.storage.bucket import Meter, ObjectInfo, crc32c_of_bytes
from utils.storage.gcs import GcsBucket
from utils.storage.open import open_bucket
from utils.uploads.parallel_upload import parts_prefix, put_parallel, remove_parts

NAME = "Checkpoints/a.tar.gz"
PREFIX = "Checkpoints/.parts/a.tar.gz/"
PART = 1000


@pytest.fixture
def bucket(gcs: FakeGcsServer) -> Iterator[GcsBucket]:
    opened = open_bucket("gs://runs", retry_seconds=5)
    assert isinstance(opened, GcsBucket)
    yield opened
    opened.close()


def put(bucket: GcsBucket, data: bytes, *, streams: int = 4, part_bytes: int = PART) -> None:
    def write(sink: IO[bytes]) -> None:
        for start in range(0, len(data), 777):  # the parts are whole, whatever comes at a time
            block = memoryview(data)[start : start + 777]
            assert sink.write(block) == len(block)

    put_parallel(bucket, NAME, write, None, streams=streams, part_bytes=part_bytes)


def parts_sent(gcs: FakeGcsServer) -> list[str]:
    """The numbers of the parts that were uploaded, without those that were refused."""
    records = gcs.requests("upload")
    names = [record.name for record in records if record.status == 200]
    return sorted(name.removeprefix(PREFIX) for name in names)


@pytest.mark.parametrize(
    ("count", "lacking"),
    [
        (1, PART),  # nothing at all
        (1, 7),
        (2, 0),
        (32, 0),
        (33, 7),
        pytest.param(1100, 7, marks=pytest.mark.slow),
    ],
)
def test_parts_become_one_object_in_order(
    gcs: FakeGcsServer, bucket: GcsBucket, count: int, lacking: int
) -> None:
    data = os.urandom(count * PART - lacking)
    put(bucket, data)
    assert gcs.read_object("runs", NAME) == data
    assert gcs.get_object("runs", NAME).blob.crc32c == crc32c_of_bytes(data)
    assert len(parts_sent(gcs)) == count
    remove_parts(bucket, PREFIX)
    assert gcs.list_objects("runs") == [NAME]


# Interruptions.


def test_an_interrupted_upload_goes_on(gcs: FakeGcsServer, bucket: GcsBucket) -> None:
    data = os.urandom(6 * PART)
    gcs.add_fault(Fault("status", times=None, operation="upload", name="*/00004", status=403))
    with pytest.raises(AccessDeniedError):
        put(bucket, data, streams=1)
    assert parts_sent(gcs) == [f"{n:05}" for n in range(4)]
    assert NAME not in gcs.list_objects("runs")
    gcs.clear_faults()
    gcs.clear_requests()
    put(bucket, data, streams=1)
    assert parts_sent(gcs) == ["00004", "00005"]
    assert gcs.read_object("runs", NAME) == data


def test_a_part_that_is_another_one_is_replaced(gcs: FakeGcsServer, bucket: GcsBucket) -> None:
    data = os.urandom(4 * PART)
    gcs.put_object("runs", f"{PREFIX}00000", data[:PART])
    gcs.put_object("runs", f"{PREFIX}00001", bytes(PART))  # the right size, other bytes
    gcs.put_object("runs", f"{PREFIX}00002", data[:10])
    gcs.put_object("runs", f"{PREFIX}00009", b"of a longer one")
    put(bucket, data)
    assert parts_sent(gcs) == ["00001", "00002", "00003"]
    assert gcs.read_object("runs", NAME) == data


def test_a_part_that_changes_before_the_end_is_not_taken(
    gcs: FakeGcsServer, bucket: GcsBucket
) -> None:
    data = os.urandom(4 * PART)

    def write(sink: IO[bytes]) -> None:
        sink.write(data)
        wait_until(lambda: any(one.finished for one in gcs.requests(name=f"{PREFIX}00000")))
        gcs.put_object("runs", f"{PREFIX}00000", bytes(PART))

    with pytest.raises(ConflictError):
        put_parallel(bucket, NAME, write, None, streams=4, part_bytes=PART)
    assert NAME not in gcs.list_objects("runs")


@pytest.mark.parametrize("count", [3, 40])
def test_a_part_that_is_removed_before_the_end_is_sent_again(
    gcs: FakeGcsServer, bucket: GcsBucket, count: int
) -> None:
    data = os.urandom(count * PART)

    def write(sink: IO[bytes]) -> None:
        sink.write(data)
        wait_until(lambda: f"{PREFIX}00001" in gcs.list_objects("runs"))
        gcs.delete_object("runs", f"{PREFIX}00001")

    with pytest.raises(TransientStorageError, match="a part was removed before it was composed"):
        put_parallel(bucket, NAME, write, None, streams=4, part_bytes=PART)
    assert NAME not in gcs.list_objects("runs")
    put(bucket, data)
    assert gcs.read_object("runs", NAME) == data
    assert parts_sent(gcs).count("00001") == 2


@pytest.mark.parametrize("part", [0, 5, 39])
def test_a_part_that_fails_ends_the_upload_with_its_error(
    gcs: FakeGcsServer, bucket: GcsBucket, part: int
) -> None:
    name = f"*/{part:05}"
    gcs.add_fault(Fault("status", times=None, operation="upload", name=name, status=403))
    raised = end_in_time(lambda: put(bucket, bytes(40 * PART)))
    assert type(raised) is AccessDeniedError
    assert f"{part:05}" in str(raised)
    assert NAME not in gcs.list_objects("runs")
    assert len(parts_sent(gcs)) < part + 8  # the others are not begun


class FailingBucket:
    """Fails with part 1 first, and then with part 0."""

    parts: Any

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())

    def put_bytes(self, name: str, data: bytes) -> ObjectInfo:
        if name.endswith("00001"):
            raise AccessDeniedError("the first")
        wait_until(lambda: self.parts._error is not None)
        raise TransientStorageError("what came of it")


def test_of_several_errors_the_first_is_raised() -> None:
    failing: Any = FailingBucket()

    def write(sink: IO[bytes]) -> None:
        failing.parts = sink
        sink.write(bytes(2 * PART))

    with pytest.raises(AccessDeniedError, match="the first"):
        put_parallel(failing, NAME, write, None, streams=2, part_bytes=PART)


# What is left, and what is held.


def test_parts_are_removed_but_for_those_of_use(gcs: FakeGcsServer, bucket: GcsBucket) -> None:
    names = [f"Checkpoints/.parts/{name}/00000" for name in ("a", "ab", "c", "d e")]
    for name in [*names, "Checkpoints/a", "Other/.parts/a/00000"]:
        gcs.put_object("runs", name, b"x")
    remove_parts(bucket, parts_prefix("Checkpoints/c"))
    assert names[2] not in gcs.list_objects("runs")
    remove_parts(bucket, "Checkpoints/.parts/", ["Checkpoints/a", "Checkpoints/d e"])
    assert gcs.list_objects("runs") == sorted(
        [names[0], names[3], "Checkpoints/a", "Other/.parts/a/00000"]
    )
    remove_parts(bucket, "Checkpoints/.parts/")
    assert gcs.list_objects("runs") == ["Checkpoints/a", "Other/.parts/a/00000"]


def test_one_part_that_stays_ends_the_removal_and_each_that_goes_is_a_sign_of_life(
    gcs: FakeGcsServer,
) -> None:
    meter = Meter()
    bucket = open_bucket("gs://runs", meter=meter)
    assert isinstance(bucket, GcsBucket)
    for number in range(100):
        gcs.put_object("runs", f"Checkpoints/.parts/a/{number:05}", b"x")
    refused = gcs.add_fault(Fault("status", None, "object.delete", name="*/0000[3-9]", status=403))
    with pytest.raises(AccessDeniedError):
        remove_parts(bucket, "Checkpoints/.parts/")
    removed = 100 - len(gcs.list_objects("runs"))
    assert meter.signs_of_life == removed < 80
    assert refused.fired
    gcs.clear_faults()
    remove_parts(bucket, "Checkpoints/.parts/")
    assert meter.signs_of_life == 100
    bucket.close()


class HoldingBucket(FailingBucket):
    """Counts the parts that are under way, and lets none of them go before all may."""

    def __init__(self, streams: int) -> None:
        self._streams, self._lock, self._all_here = streams, threading.Lock(), threading.Event()
        self.under_way = self.most = 0

    def put_bytes(self, name: str, data: bytes) -> ObjectInfo:
        with self._lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            if self.under_way == self._streams:
                self._all_here.set()
        assert self._all_here.wait(10)
        with self._lock:
            self.under_way -= 1
        return ObjectInfo(name, len(data), None, 1)

    def compose(self, *_: object) -> None:
        """Do nothing."""


def test_no_more_than_the_parts_under_way_and_one_are_held() -> None:
    part, streams = 2**20, 3
    bucket: Any = HoldingBucket(streams)
    block = bytes(part // 8)

    def write(sink: IO[bytes]) -> None:
        for _ in range(8 * 20):
            sink.write(block)

    tracemalloc.start()
    try:
        put_parallel(bucket, NAME, write, None, streams=streams, part_bytes=part)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bucket.most == streams
    assert peak < (streams + 1.9) * part
