"""A directory and gs:// behave alike: whole objects, checked bytes, errors that tell what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from tests.gcs_server import FakeGcsServer, Fault
from tests.memory_bucket import STORED
from tests.utils.uploads.waiting import Clock, wait_until
from utils.base.errors import (
    AccessDeniedError,
    ConflictError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
    UsageError,
)
from utils.base.uri import BUCKETS, join_uri
from utils.storage import bucket as bucket_module
from utils.storage import gcs as gcs_bucket
from utils.storage.bucket import (
    SEND_BLOCK_BYTES,
    Bucket,
    Meter,
    ObjectInfo,
    crc32c_of_bytes,
    crc32c_of_file,
)
from utils.storage.directory import DirectoryBucket
from utils.storage.open import open_bucket

CHUNK = 256 * 1024
HOSTILE_NAMES = ["", ".", "./", "..", "../a", "a/../b", "/etc/passwd", "a/../../b", "a\0b"]


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryBucket:
    return DirectoryBucket(tmp_path / "bucket")


@pytest.fixture
def remote(gcs: FakeGcsServer) -> Iterator[Bucket]:
    bucket = open_bucket("gs://runs/team/a", retry_seconds=5)
    yield bucket
    bucket.close()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A third kind, which a test registers."""
    monkeypatch.setitem(BUCKETS, "mem", "tests.memory_bucket:MemoryBucket")
    STORED.clear()
    return open_bucket("mem://runs/team/a")


@pytest.fixture(params=["directory", "gs", "mem"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    names = {"directory": "directory", "gs": "remote", "mem": "memory"}
    found: Bucket = request.getfixturevalue(names[request.param])
    return found


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# What every kind of bucket does.


def test_crc32c_is_written_as_gcs_writes_it(tmp_path: Path) -> None:
    # The check value of CRC-32C (RFC 3720, B.4) is 0xE3069283.
    assert crc32c_of_bytes(b"123456789") == "4waSgw=="
    assert crc32c_of_file(write(tmp_path / "a", b"123456789")) == "4waSgw=="


def test_what_is_put_is_there_whole(bucket: Bucket, tmp_path: Path) -> None:
    data, name = os.urandom(100_000), "Checkpoints/a.tar.gz"
    bucket.put_bytes(name, b"an older one")
    info = bucket.put_file(name, write(tmp_path / "a", data))
    assert (info.name, info.size) == (name, len(data))
    assert info.crc32c == bucket.crc32c(name) == crc32c_of_bytes(data)
    assert bucket.get_file(name, tmp_path / "back") == crc32c_of_bytes(data)
    assert (tmp_path / "back").read_bytes() == bucket.read_bytes(name) == data
    found = bucket.stat(name)
    assert found is not None
    assert found.size == len(data)
    bucket.delete(name)
    assert bucket.stat(name) is None
    assert list(bucket.list()) == []


def test_a_range_is_read(bucket: Bucket) -> None:
    bucket.put_bytes("a", b"0123456789")
    assert bucket.read_bytes("a", 3) == b"3456789"
    assert bucket.read_bytes("a", 0, 2) == b"01"
    assert bucket.read_bytes("a", 8, 9) == b"89"
    assert bucket.read_bytes("a", 4, 0) == b""


def test_objects_are_listed_by_name_below_their_prefix(bucket: Bucket) -> None:
    for name in ["b/2", "a/1", "b/10", "a.x", "ab", "b/sub/3", "z"]:
        bucket.put_bytes(name, name.encode())
    names = ["a.x", "a/1", "ab", "b/10", "b/2", "b/sub/3", "z"]
    assert [info.name for info in bucket.list()] == names
    assert [info.name for info in bucket.list("b/")] == ["b/10", "b/2", "b/sub/3"]
    assert [info.name for info in bucket.list("b/1")] == ["b/10"]
    assert [info.name for info in bucket.list("a")] == ["a.x", "a/1", "ab"]
    assert list(bucket.list("none/")) == []
    assert [info.size for info in bucket.list("b/")] == [4, 3, 7]


def test_what_is_not_there(bucket: Bucket, tmp_path: Path) -> None:
    assert bucket.stat("none") is None
    bucket.delete("none")
    for read in (
        lambda: bucket.read_bytes("none"),
        lambda: bucket.crc32c("none"),
        lambda: bucket.get_file("none", tmp_path / "back"),
    ):
        with pytest.raises(ObjectNotFoundError, match="none"):
            read()


def test_an_object_is_written_or_removed_only_where_it_is_the_one_that_was_seen(
    bucket: Bucket,
) -> None:
    written = bucket.put_bytes_if("a/b", b"1", None)
    assert (written.name, written.size, written.crc32c) == ("a/b", 1, crc32c_of_bytes(b"1"))
    data, seen = bucket.read_version("a/b")
    assert (data, seen) == (b"1", written)
    newer = bucket.put_bytes_if("a/b", b"2", seen)
    for stale in (seen, None):
        with pytest.raises(ConflictError, match="a/b"):
            bucket.put_bytes_if("a/b", b"3", stale)
    with pytest.raises(ConflictError):
        bucket.delete_if("a/b", seen)
    assert bucket.read_version("a/b") == (b"2", newer)
    assert [info.name for info in bucket.list()] == ["a/b"]
    bucket.delete_if("a/b", newer)
    with pytest.raises(ConflictError):
        bucket.put_bytes_if("a/b", b"3", newer)
    assert bucket.stat("a/b") is None
    bucket.delete_if("a/b", newer)
    bucket.delete_if("folder/none", newer)
    with pytest.raises(ObjectNotFoundError):
        bucket.read_version("a/b")


@pytest.mark.parametrize("is_new", [True, False])
def test_of_many_conditional_writers_one_wins(bucket: Bucket, is_new: bool) -> None:
    expected = None if is_new else bucket.put_bytes_if("a", b"before", None)
    won: list[bytes] = []
    start = threading.Barrier(8)

    def write_own(number: int) -> None:
        data = f"writer {number}".encode()
        start.wait(10)
        try:
            bucket.put_bytes_if("a", data, expected)
        except ConflictError:
            return
        won.append(data)

    threads = [threading.Thread(target=write_own, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [bucket.read_bytes("a")]


@pytest.mark.parametrize("uri", ["", "s3://bucket", "gs://", "gs:///a", "http://x"])
def test_what_is_no_bucket_is_refused(uri: str) -> None:
    with pytest.raises(UsageError):
        open_bucket(uri)


def test_uris_are_joined_with_one_slash() -> None:
    assert join_uri("gs://b/p/", "a") == "gs://b/p/a"
    assert join_uri("bucket", "", "run", "") == "bucket/run"


# Streams.


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs_bucket, "STREAM_CHUNK_BYTES", CHUNK)


@pytest.mark.parametrize("size", [0, CHUNK, 3 * CHUNK + 1])
def test_a_stream_of_any_length_arrives(bucket: Bucket, small_chunks: None, size: int) -> None:
    data = os.urandom(size)

    def write_in_pieces(sink: IO[bytes]) -> None:
        for start in range(0, size, 100_000):
            block = data[start : start + 100_000]
            assert sink.write(block) == len(block)

    bucket.put_stream("a/b", write_in_pieces, None)
    assert bucket.read_bytes("a/b") == data
    assert [info.name for info in bucket.list()] == ["a/b"]


# A meter.


def test_a_meter_holds_all_that_passes_to_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(bucket_module, "time", clock)
    meter = Meter(1_000_000)
    for _ in range(4):
        meter.pass_on(50_000)
    assert clock.now == pytest.approx(0.2)
    clock.now = 500.0  # a pause is not made up for
    meter.pass_on(200_000)
    assert clock.now == pytest.approx(500.2)
    meter.count(10**12)  # another process has sent it
    assert clock.now == pytest.approx(500.2)
    Meter().pass_on(10**12)
    assert clock.now == pytest.approx(500.2)
    assert meter.sent == 10**12 + 400_000


class Blocks(Meter):
    """Keeps the size of every block that is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def pass_on(self, count: int) -> None:
        super().pass_on(count)
        self.sizes.append(count)


@pytest.mark.parametrize("uri", ["bucket", "gs://runs"])
def test_what_is_sent_is_metered_block_by_block(
    gcs: FakeGcsServer, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent in one call, a body on a slow line would be taken for one on a dead line."""
    monkeypatch.chdir(tmp_path)
    meter = Blocks()
    bucket = open_bucket(uri, meter=meter)
    bucket.put_stream("a", lambda sink: sink.write(bytes(1_000_000)), None)
    assert 1_000_000 <= meter.sent < 1_010_000
    assert max(meter.sizes) == SEND_BLOCK_BYTES
    bucket.close()


# A directory.


@pytest.mark.parametrize("commit", ["replace", "link"])
def test_an_object_is_on_disk_before_it_has_its_name_and_its_name_before_the_call_returns(
    directory: DirectoryBucket, tmp_path: Path, disk_calls: list[str], commit: str
) -> None:
    writes: list[Callable[[], object]] = [
        lambda: directory.put_bytes("a", b"1"),
        lambda: directory.put_file("a", write(tmp_path / "source", b"1")),
        lambda: directory.put_stream("a", lambda sink: sink.write(b"1"), directory.stat("a")),
    ]
    if commit == "link":
        writes = [lambda: directory.put_bytes_if("a", b"1", None)]
    for put in writes:
        disk_calls.clear()
        put()
        done = [call for call in disk_calls if not call.startswith("unlink")]
        assert [call.split()[0] for call in done] == ["fsync", commit, "fsync"]
        assert done[0].split()[1] == done[1].split()[1] != "a"
        assert done[2] == f"fsync {directory.root.name}"


def test_a_long_stream_is_synced_on_its_way(
    directory: DirectoryBucket, monkeypatch: pytest.MonkeyPatch, disk_calls: list[str]
) -> None:
    monkeypatch.setattr("utils.storage.directory.SYNC_BYTES", 100)
    synced: list[int] = []

    def send(sink: IO[bytes]) -> None:
        for _ in range(4):
            sink.write(bytes(60))
            synced.append(len(disk_calls))

    directory.put_stream("a", send, None)
    assert synced == [0, 1, 1, 2]


def operations(bucket: Bucket, source: Path, name: str = "a") -> list[Callable[[], object]]:
    return [
        lambda: bucket.put_bytes(name, b"1"),
        lambda: bucket.put_file(name, source),
        lambda: bucket.read_bytes(name),
        lambda: bucket.get_file(name, source.with_name("back")),
        lambda: bucket.stat(name),
        lambda: bucket.read_version(name),
        lambda: bucket.delete(name),
        lambda: list(bucket.list()),
    ]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_leaves_the_directory_is_refused(
    directory: DirectoryBucket, tmp_path: Path, name: str
) -> None:
    write(tmp_path / "b", b"outside")
    source = write(tmp_path / "source", b"x")
    before = sorted(tmp_path.rglob("*"))
    for use in (
        *operations(directory, source, name)[:-1],
        lambda: directory.crc32c(name),
        lambda: directory.put_bytes_if(name, b"x", None),
        lambda: directory.delete_if(name, ObjectInfo(name, 1)),
    ):
        with pytest.raises(UsageError, match="not a valid object name"):
            use()
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "b").read_bytes() == b"outside"


def test_a_strange_but_harmless_name_is_only_a_name(bucket: Bucket) -> None:
    names = ["-rf", "a b", "a*b", "a[1] #2?", "$(x)", "new\nline", "\u00fc/\u0661"]
    for name in names:
        bucket.put_bytes(name, name.encode())
    assert [info.name for info in bucket.list()] == sorted(names)
    assert all(bucket.read_bytes(name) == name.encode() for name in names)


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes: a short write first, then EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_leaves_the_old_object_and_nothing_else(
    directory: DirectoryBucket, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", bytes(100_000))
    directory.put_bytes("a", b"old")
    with largest_file(50_000), pytest.raises(StorageError, match="File too large"):
        directory.put_file("a", source)
    with largest_file(50_000), pytest.raises(StorageError, match="File too large"):
        directory.put_bytes("a", bytes(100_000))
    for size in (51_000, 100_000):  # noticed while it is closed, or before
        seen = directory.stat("a")
        with largest_file(50_000), pytest.raises(StorageError, match="File too large"):
            directory.put_stream("a", lambda sink, size=size: sink.write(bytes(size)), seen)
    assert [path.name for path in directory.root.iterdir()] == ["a"]
    assert directory.read_bytes("a") == b"old"


def test_what_killed_streams_left_is_not_listed_and_is_removed_but_for_what_is_of_use(
    directory: DirectoryBucket,
) -> None:
    directory.put_bytes("folder/a", b"1")
    names = [".tmp-b.part", ".tmp-b-12ab.part", ".tmp-c.part", ".tmp-.lease-1.part", "d.part"]
    for name in names:
        write(directory.root / "folder" / name, b"half")
    write(directory.root / ".tmp-e.part", b"half")
    assert [info.name for info in directory.list()] == ["folder/a", "folder/d.part"]
    directory.remove_unfinished("folder", frozenset({"folder/c"}))
    left = sorted(path.name for path in (directory.root / "folder").iterdir())
    assert left == [".tmp-.lease-1.part", ".tmp-c.part", "a", "d.part"]
    assert (directory.root / ".tmp-e.part").exists()
    directory.remove_unfinished("none", frozenset())


@pytest.mark.parametrize("write_one", ["put_bytes", "put_file", "put_bytes_if", "put_stream"])
def test_what_a_killed_write_leaves_is_not_listed_and_is_removed(
    directory: DirectoryBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_one: str
) -> None:
    write(tmp_path / "source", b"new")
    arguments: dict[str, tuple[Any, ...]] = {
        "put_bytes": (b"new",),
        "put_file": (tmp_path / "source",),
        "put_bytes_if": (b"new", None),
        "put_stream": (lambda sink: sink.write(b"new"), None),
    }

    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a kill runs no clean-up
        patch.setattr(os, "fsync", die)
        for _ in range(2):
            with pytest.raises(SystemExit):
                getattr(directory, write_one)("folder/a", *arguments[write_one])
    left = [path.name for path in (directory.root / "folder").iterdir()]
    assert left == [".tmp-a.part"] if write_one == "put_stream" else left  # it is used again
    assert list(directory.list()) == []
    directory.remove_unfinished("folder", frozenset())
    assert list((directory.root / "folder").iterdir()) == []
    directory.put_bytes("folder/" + "n" * 255, b"1")  # the longest name that there can be


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EEXIST])
def test_a_mounted_directory_without_rename_still_gets_its_object(
    directory: DirectoryBucket, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    synced = []
    monkeypatch.setattr(os, "replace", failing(number))
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    directory.put_bytes("a", b"1")
    assert [path.name for path in directory.root.iterdir()] == ["a"]
    assert directory.read_bytes("a") == b"1"
    assert (directory.root / "a").stat().st_ino in synced  # the copy, too
    before = directory.stat("a")
    directory.put_stream("a", lambda sink: sink.write(b"22"), before)
    assert directory.read_bytes("a") == b"22"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_rename_or_sync_that_fails_leaves_what_was_there(
    directory: DirectoryBucket, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    directory.put_bytes("a", b"1")
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(TransientStorageError):
        directory.put_bytes("a", b"2")
    assert [path.name for path in directory.root.iterdir()] == ["a"]
    assert directory.read_bytes("a") == b"1"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP])
def test_a_mounted_directory_without_sync_or_locks_still_gets_its_objects(
    directory: DirectoryBucket, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    monkeypatch.setattr(fcntl, "flock", failing(number))
    monkeypatch.setattr("utils.storage.directory.SYNC_BYTES", 1)
    before = directory.put_bytes_if("a", b"1", None)
    directory.put_bytes_if("a", b"2", before)
    directory.put_stream("b", lambda sink: sink.write(b"333"), None)
    assert (directory.read_bytes("a"), directory.read_bytes("b")) == (b"2", b"333")


def test_a_mounted_directory_without_links_still_creates_only_once(
    directory: DirectoryBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    directory.put_bytes_if("a", b"1", None)
    with pytest.raises(ConflictError, match="a exists"):
        directory.put_bytes_if("a", b"2", None)
    assert [path.name for path in directory.root.iterdir()] == ["a"]
    assert directory.read_bytes("a") == b"1"


@pytest.mark.parametrize("operation", ["put_bytes_if", "put_stream", "delete_if"])
def test_a_conditional_write_waits_for_that_of_another_process(
    directory: DirectoryBucket, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    before = directory.put_bytes_if("a", b"1", None)
    change, after = {
        "put_bytes_if": (lambda: directory.put_bytes_if("a", b"2", before), b"2"),
        "put_stream": (
            lambda: directory.put_stream("a", lambda sink: sink.write(b"2"), directory.stat("a")),
            b"2",
        ),
        "delete_if": (lambda: directory.delete_if("a", before), None),
    }[operation]
    descriptor = os.open(directory.root, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    flock, asked = fcntl.flock, threading.Event()

    def note(file: int, operation: int) -> None:
        asked.set()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", note)
    thread = threading.Thread(target=change)
    thread.start()
    assert asked.wait(10)
    assert directory.read_bytes("a") == b"1"
    os.close(descriptor)
    thread.join(10)
    assert (directory.read_bytes("a") if directory.stat("a") else None) == after


def test_other_failures_of_the_file_system_are_storage_errors(
    directory: DirectoryBucket, tmp_path: Path
) -> None:
    directory.put_bytes("file", b"1")
    with pytest.raises(StorageError, match="file/below"):
        directory.put_bytes("file/below", b"1")
    assert directory.stat("file/below") is None
    for use in (directory.stat, directory.read_bytes, directory.delete):
        with pytest.raises(StorageError, match="name too long"):
            use("n" * 300)


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """Take the right to enter `path` from this process, whoever runs it."""
    path.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        path.chmod(0o700)


def test_a_directory_without_rights_is_access_denied(
    directory: DirectoryBucket, tmp_path: Path
) -> None:
    directory.put_bytes("a", b"1")
    source = write(tmp_path / "source", b"1")
    with without_rights(directory.root):
        conditional = lambda: directory.put_bytes_if("b", b"1", None)  # noqa: E731
        for use in [*operations(directory, source), conditional]:
            with pytest.raises(AccessDeniedError, match="Permission denied"):
                use()
    assert directory.read_bytes("a") == b"1"


# gs://, through the real client against the fake server.


def test_a_long_list_is_read_page_by_page_below_the_uri(gcs: FakeGcsServer, remote: Bucket) -> None:
    gcs.settings.max_page_size = 3
    stored = gcs.put_object("runs", "team/a/00", b"123456789")
    for name in ["team/b/x", "team/ab", *(f"team/a/{number:02}" for number in range(1, 8))]:
        gcs.put_object("runs", name, b"x")
    found = list(remote.list())
    assert [info.name for info in found] == [f"{number:02}" for number in range(8)]
    assert found[0] == remote.stat("00") == ObjectInfo("00", 9, "4waSgw==", stored.generation)
    assert len(gcs.requests("object.list")) == 3
    whole = open_bucket("gs://runs/")
    assert whole.uri == "gs://runs"
    whole.put_bytes("a", b"1")
    assert gcs.read_object("runs", "a") == b"1"
    whole.close()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, AccessDeniedError),
        (403, AccessDeniedError),
        (412, ConflictError),
        (400, StorageError),
    ],
)
def test_a_refusal_is_told_apart_and_not_tried_again(
    gcs: FakeGcsServer, remote: Bucket, tmp_path: Path, status: int, error: type[StorageError]
) -> None:
    gcs.put_object("runs", "team/a/a", b"1")
    gcs.add_fault(Fault("status", times=None, status=status))
    for use in operations(remote, write(tmp_path / "source", b"1")):
        gcs.clear_requests()
        with pytest.raises(StorageError, match="gs://runs/team/a") as caught:
            use()
        assert type(caught.value) is error
        assert len(gcs.requests()) == 1


LARGE = 9 * 2**20  # above 8 MiB: a resumable upload


@pytest.mark.parametrize("status", [404, 410])
def test_a_lost_session_is_begun_anew(
    gcs: FakeGcsServer, remote: Bucket, tmp_path: Path, status: int
) -> None:
    data = os.urandom(LARGE)
    fault = gcs.add_fault(Fault("lost_session", times=2, status=status))
    if status == 404:
        remote.put_file("a", write(tmp_path / "source", data))
    else:
        remote.put_bytes_if("a", data, None)
    assert fault.fired == 2
    assert gcs.read_object("runs", "team/a/a") == data
    assert len(gcs.requests("upload.start")) == 3


@pytest.mark.parametrize("status", [404, 410])
def test_sessions_that_are_lost_again_and_again_are_given_up_for_now(
    gcs: FakeGcsServer, remote: Bucket, status: int
) -> None:
    gcs.add_fault(Fault("lost_session", times=None, status=status))
    with pytest.raises(TransientStorageError, match=f"gs://runs/team/a.*{status}") as caught:
        remote.put_bytes("a", bytes(LARGE))
    assert "upload_id=..." in str(caught.value)  # who knows the address may write to it
    assert len(gcs.requests("upload.start")) == 3
    with pytest.raises(TransientStorageError, match=f"gs://runs/team/a/d.*{status}"):
        remote.put_stream("d", lambda sink: sink.write(bytes(LARGE)), None)
    assert gcs.list_objects("runs") == []


@pytest.mark.parametrize("operation", ["upload.start", "upload.multipart"])
def test_no_such_bucket_is_not_tried_again(
    gcs: FakeGcsServer, remote: Bucket, operation: str
) -> None:
    gcs.add_fault(Fault("status", times=None, status=404, operation=operation))
    data = bytes(LARGE if operation == "upload.start" else 1)
    with pytest.raises(ObjectNotFoundError):
        remote.put_bytes("a", data)
    assert len(gcs.requests()) == 1


def test_a_version_that_is_replaced_while_it_is_read_is_no_missing_object(
    gcs: FakeGcsServer, remote: Bucket
) -> None:
    gcs.put_object("runs", "team/a/a", b"old" * 100_000)
    cut = gcs.add_fault(Fault("reset", operation="object.download", after_bytes=100_000))
    busy = gcs.add_fault(Fault("status", operation="object.download", times=None, skip=1))
    caught: list[BaseException] = []

    def read() -> None:
        try:
            remote.read_bytes("a")
        except StorageError as exc:
            caught.append(exc)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: cut.fired and busy.fired)
    gcs.put_object("runs", "team/a/a", b"new")
    gcs.clear_faults()
    reader.join()
    assert [type(exc) for exc in caught] == [TransientStorageError]
    assert remote.read_bytes("a") == b"new"


def test_a_copy_whose_token_is_lost_is_worth_another_try(
    gcs: FakeGcsServer, remote: Bucket
) -> None:
    remote.put_bytes("a", b"1")
    gcs.add_fault(Fault("status", status=410, operation="object.rewrite"))
    with pytest.raises(TransientStorageError):
        remote.copy("a", "b")
    remote.copy("a", "b")
    assert remote.read_bytes("b") == b"1"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_two_bad_answers_are_survived_by_every_operation(
    gcs: FakeGcsServer, remote: Bucket, tmp_path: Path, status: int
) -> None:
    gcs.put_object("runs", "team/a/a", b"1")
    for use in operations(remote, write(tmp_path / "source", b"1")):
        fault = gcs.add_fault(Fault("status", times=2, status=status))
        use()
        assert fault.fired == 2


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_for_ever_is_given_up(
    gcs: FakeGcsServer, tmp_path: Path, status: int
) -> None:
    gcs.put_object("runs", "a", b"1")
    gcs.add_fault(Fault("status", times=None, status=status))
    impatient = open_bucket("gs://runs", retry_seconds=0.1)
    for use in operations(impatient, write(tmp_path / "source", b"1")):
        with pytest.raises(TransientStorageError, match=f"gs://runs.*{status}"):
            use()
    gcs.stop()
    with pytest.raises(TransientStorageError, match="no connection"):
        impatient.read_bytes("a")
    impatient.close()


def test_a_connection_cut_in_the_middle_changes_no_byte(
    gcs: FakeGcsServer, remote: Bucket, tmp_path: Path
) -> None:
    data = os.urandom(300_000)
    gcs.add_fault(Fault("reset", operation="upload", after_bytes=100_000))
    assert remote.put_file("a", write(tmp_path / "a", data)).crc32c == crc32c_of_bytes(data)
    for kind in ("reset", "truncate"):
        fault = gcs.add_fault(Fault(kind, operation="object.download", after_bytes=100_000))
        assert remote.get_file("a", tmp_path / "back") == crc32c_of_bytes(data)
        assert fault.fired == 1


def test_bytes_that_changed_on_the_way_are_never_taken(
    gcs: FakeGcsServer, remote: Bucket, tmp_path: Path, small_chunks: None
) -> None:
    source = write(tmp_path / "a", bytes(50_000))
    gcs.add_fault(Fault("corrupt", times=None, operation="upload", after_bytes=20_000))
    with pytest.raises(StorageError):
        remote.put_file("a", source)
    assert remote.stat("a") is None
    with pytest.raises(StorageError):
        remote.put_stream("b", lambda sink: sink.write(os.urandom(2 * CHUNK)), None)

    gcs.clear_faults()
    remote.put_file("a", source)
    gcs.add_fault(Fault("corrupt", times=None, operation="object.download", after_bytes=20_000))
    with pytest.raises(TransientStorageError):
        remote.get_file("a", tmp_path / "back")


@pytest.mark.parametrize("is_new", [True, False])
def test_an_answer_lost_after_the_commit_is_no_conflict(
    gcs: FakeGcsServer, remote: Bucket, is_new: bool
) -> None:
    expected = None if is_new else remote.put_bytes_if("a", b"before", None)
    fault = gcs.add_fault(Fault("lost_answer", operation="upload"))
    info = remote.put_bytes_if("a", b"with a token", expected)
    assert fault.fired == 1
    assert remote.read_version("a") == (b"with a token", info)
    newer = remote.put_bytes_if("a", b"next", info)
    fault = gcs.add_fault(Fault("lost_answer", operation="object.delete"))
    remote.delete_if("a", newer)
    assert fault.fired == 1
    assert remote.stat("a") is None


def test_only_a_version_of_this_bucket_can_be_expected(
    directory: DirectoryBucket, remote: Bucket
) -> None:
    info = directory.put_bytes("a", b"1")
    remote.put_bytes("a", b"1")
    for use in (lambda: remote.put_bytes_if("a", b"2", info), lambda: remote.delete_if("a", info)):
        with pytest.raises(StorageError, match="which version"):
            use()
    assert remote.read_bytes("a") == b"1"
