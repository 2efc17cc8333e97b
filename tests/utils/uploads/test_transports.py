"""Ways to the bucket: what all of them do, real gsutil and gcloud too, and what each does alone."""

from __future__ import annotations

import gc
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest

from tests.gcs_server import FakeGcsServer, Fault
from utils.base.errors import (
    AccessDeniedError,
    ConflictError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from utils.checkpoints.layout import SAVING_PREFIX
from utils.storage import gcs
from utils.storage.bucket import Bucket, Meter, ObjectInfo, crc32c_of_bytes
from utils.storage.open import open_bucket
from utils.uploads import command_transports, transport_choice, transports
from utils.uploads.parallel_upload import put_parallel
from utils.uploads.transport_choice import open_transport, probe_transport
from utils.uploads.transports import BucketTransport, Transport, TransportOptions, put_bytes
from utils.uploads.watched_command import START_SECONDS

SMALL, BLOCK = 64 * 1024, 256 * 1024
LARGE = 5 * BLOCK + 1000
NAME = "Check points/a b.tar.gz"


def writer(data: bytes, step: int = 100_000) -> Callable[[IO[bytes]], None]:
    def write(sink: IO[bytes]) -> None:
        for start in range(0, len(data), step):
            sink.write(data[start : start + step])

    return write


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an object of one MB be a large one."""
    monkeypatch.setattr(transports, "SMALL_BYTES", SMALL)
    monkeypatch.setattr(command_transports, "SMALL_BYTES", SMALL)
    monkeypatch.setattr(gcs, "STREAM_CHUNK_BYTES", BLOCK)
    monkeypatch.setattr(transports, "put_parallel", partial(put_parallel, part_bytes=BLOCK))


@pytest.fixture
def cloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unclosed_sockets: None
) -> Iterator[FakeGcsServer]:
    """A server with the bucket `runs`, for the Python client, gcloud and gsutil."""
    from google.cloud.storage import retry

    fast = retry.DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.05)
    monkeypatch.setattr(retry, "DEFAULT_RETRY", fast)
    with FakeGcsServer(tmp_path / "gcs", tls=True) as server:
        environment = {
            **server.client_environment(),
            **server.gcloud_environment(tmp_path),
            **server.gsutil_environment(tmp_path, {"GSUtil:resumable_threshold": "262144"}),
        }
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        server.create_bucket("runs")
        server.create_bucket("locked", writable=False)
        yield server


class Way:
    """A transport, and another way to see what it did."""

    def __init__(self, transport: Transport, bucket: Bucket, scratch: Path) -> None:
        self.transport, self.bucket, self.scratch = transport, bucket, scratch

    def version(self, name: str) -> ObjectInfo | None:
        return BucketTransport(TransportOptions(self.bucket.uri), Meter()).stat(name)

    def names(self) -> list[str]:
        return [info.name for info in self.bucket.list()]


OpenWay = Callable[..., Way]


@pytest.fixture
def open_way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenWay]:
    """Open transports by kind, such as directory or python-4 (with 4 streams)."""
    opened: list[Way] = []

    def build(kind: str, **fields: Any) -> Way:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        name, _, streams = kind.partition("-")
        if name in ("gcloud", "gsutil") and shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
        if name != "directory":
            request.getfixturevalue("cloud")
        uri = str(tmp_path / "bucket") if name == "directory" else "gs://runs/my team"
        settings = {"streams": int(streams or 1), "retry_seconds": 10.0, "stall_seconds": 30.0}
        options = TransportOptions(uri, name, scratch=str(scratch), **{**settings, **fields})
        opened.append(Way(open_transport(options), open_bucket(uri), scratch))
        return opened[-1]

    yield build
    for way in opened:
        way.transport.close()


PROGRAMS = [pytest.param(name, marks=pytest.mark.gsutil) for name in ("gcloud", "gsutil")]


@pytest.fixture(params=["directory", "python-4", "python-1", *PROGRAMS])
def way(request: pytest.FixtureRequest, open_way: OpenWay, small_units: None) -> Way:
    return open_way(request.param)


# What every transport does.


def test_what_is_put_is_there_whole_small_or_large(way: Way) -> None:
    for name, data in ((NAME, os.urandom(1000)), ("large", os.urandom(LARGE))):
        way.transport.put(name, writer(data), None, len(data))
        assert way.bucket.read_bytes(name) == data
    found = way.transport.stat("large")
    assert found == way.version("large")
    assert found is not None
    assert (found.size, found.crc32c) == (LARGE, crc32c_of_bytes(data))
    way.transport.remove_unfinished(".", only="large")
    assert set(way.names()) == {NAME, "large"}
    assert list(way.scratch.iterdir()) == []


@pytest.fixture(params=["directory", "python-4", *PROGRAMS])
def reader(request: pytest.FixtureRequest, open_way: OpenWay) -> Way:
    return open_way(request.param)


def test_what_is_there_can_be_seen_read_copied_and_removed(reader: Way) -> None:
    transport = reader.transport
    reader.bucket.put_bytes(NAME, b"data")
    assert transport.stat(NAME) == reader.version(NAME)
    assert transport.read(NAME) == b"data"
    transport.copy(NAME, "set aside/a b")
    assert reader.bucket.read_bytes("set aside/a b") == b"data"
    transport.delete(NAME)
    assert reader.names() == ["set aside/a b"]
    assert transport.stat(NAME) is None
    assert transport.read(NAME) is None
    transport.delete(NAME)


@pytest.mark.parametrize("size", [1000, LARGE])
def test_only_the_version_that_was_seen_is_replaced(way: Way, size: int) -> None:
    way.bucket.put_bytes("a", b"first")
    stale = way.version("a")
    way.bucket.delete("a")
    way.bucket.put_bytes("a", b"second, and longer")
    data = os.urandom(size)
    for expected in (None, stale):
        with pytest.raises(ConflictError):
            way.transport.put("a", writer(data), expected, size)
        assert way.bucket.read_bytes("a") == b"second, and longer"
    way.transport.put("a", writer(data), way.version("a"), size)
    assert way.bucket.read_bytes("a") == data
    seen = way.version("a")
    way.bucket.delete("a")
    with pytest.raises(ConflictError):
        way.transport.put("a", writer(data), seen, size)
    assert way.bucket.stat("a") is None


def test_an_error_while_writing_comes_out_and_nothing_changes(way: Way) -> None:
    raised = FileNotFoundError(2, "of the checkpoint")
    way.bucket.put_bytes("a", b"old")

    def write(sink: IO[bytes]) -> None:
        for _ in range(16):
            sink.write(os.urandom(BLOCK + 5))
        raise raised

    with pytest.raises(FileNotFoundError) as caught:
        way.transport.put("a", write, way.version("a"), 32 * BLOCK)
    assert caught.value is raised
    del caught  # as the traceback, it holds the writer
    raised.__traceback__ = None
    gc.collect()  # nor does anything that is collected later finish it
    way.transport.remove_unfinished(".", only="a")
    assert way.names() == ["a"]
    assert way.bucket.read_bytes("a") == b"old"
    assert list(way.scratch.iterdir()) == []
    files = [path.name for path in Path(way.bucket.uri).rglob("*") if path.is_file()]
    assert files in ([], ["a"])  # those of a directory


# No local archive, but for gsutil.


@pytest.mark.parametrize("kind", ["directory", "python-4", "python-1"])
def test_a_stream_needs_no_local_file(
    open_way: OpenWay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_units: None,
    kind: str,
) -> None:
    way = open_way(kind)
    places = [way.scratch, tmp_path / "temporary"]
    places[1].mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(places[1]))
    seen: set[Path] = set()

    def write(sink: IO[bytes]) -> None:
        for _ in range(8):
            sink.write(os.urandom(BLOCK))
            seen.update(path for place in places for path in place.iterdir())

    way.transport.put("a", write, None, 8 * BLOCK)
    assert seen == set()


RECORDER = f"""#!{sys.executable} -SE
import json, os, sys
record = {{record!r}}
path = sys.argv[-2].replace("[[]", "[").replace("[*]", "*")
with open(record, "a") as file:
    json.dump({{{{"arguments": sys.argv[1:], "session": os.getsid(0), "pid": os.getpid(),
               "input": sys.stdin.read(),
               "file": os.path.exists(path) and os.path.getsize(path)}}}}, file)
    file.write("\\n")
sys.stdout.write({{output!r}})
sys.stderr.write({{errors!r}})
sys.exit({{code}})
"""


class Recorder:
    """A gsutil, or gcloud, that writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._path = folder, folder / "calls.jsonl"
        folder.mkdir()
        self.answer()

    def answer(self, output: str = "", errors: str = "", code: int = 0) -> None:
        script = RECORDER.format(record=str(self._path), output=output, errors=errors, code=code)
        for name in ("gsutil", "gcloud"):
            program = self.folder / name
            program.write_text(script)
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{found.folder}{os.pathsep}{os.environ['PATH']}")
    return found


STAT_OUTPUT = """gs://runs/a/x:
    Creation time:          Thu, 01 Jan 2026 00:00:00 GMT
    Content-Length:         1234
    Content-Type:           application/gzip
    Hash (crc32c):          4waSgw==
    Hash (md5):             JfnnlDI7RTiF9RgfG2JNCw==
    Generation:             1767225600000000
"""
GSUTIL_WORDS = ["-o", "Boto:num_retries=4", "-o", "GSUtil:parallel_composite_upload_threshold=0"]


@pytest.mark.parametrize("fails", [False, True])
def test_gsutil_has_a_local_archive_only_while_it_runs(
    recorder: Recorder, small_units: None, tmp_path: Path, fails: bool
) -> None:
    recorder.answer(errors="503", code=int(fails))
    scratch = tmp_path / "runs *[1]" / "new"  # which is made
    scratch.parent.mkdir()
    link = tmp_path / "link"
    link.symlink_to(scratch.parent)
    options = TransportOptions("gs://runs", "gsutil", scratch=str(link / "new"))
    transport = open_transport(options)
    try:
        transport.put("folder/-x.tar.gz", writer(bytes(LARGE)), None, LARGE)
        assert not fails
    except TransientStorageError:
        assert fails
    (call,) = recorder.calls
    archive = f"{tmp_path}/runs [*][[]1]/new/{SAVING_PREFIX}-x.tar.gz"
    assert call["arguments"][-4:] == ["cp", "--", archive, "gs://runs/folder/-x.tar.gz"]
    assert call["arguments"][4:7] == ["-q", "-h", "x-goog-if-generation-match:0"]
    assert (call["input"], call["file"]) == ("", LARGE)
    assert list(scratch.iterdir()) == []


def test_an_archive_that_may_not_fit_is_refused_before_it_is_written(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12345678))
    transport = open_transport(TransportOptions("gs://runs", "gsutil", scratch=str(tmp_path)))
    with pytest.raises(StorageError, match="up to 12345679 bytes in .*, where 12345678 are free"):
        transport.put("a", lambda sink: pytest.fail("written"), None, 12345679)


# Files of this machine that fail.


@pytest.mark.parametrize(
    ("scratch", "error", "message"),
    [
        ("a-file", StorageError, "local archive in .*a-file: File exists"),
        ("a-file/below", StorageError, "local archive in .*a-file/below: Not a directory"),
        ("/proc/none", StorageError, "local archive in /proc/none: No such file or directory"),
        ("a-folder-there", StorageError, "a-folder-there/.saving-a: Is a directory"),
        ("full", TransientStorageError, "full/.saving-a: No space left on device"),
    ],
)
def test_a_local_archive_that_cannot_be_written_is_an_error_of_the_upload(
    recorder: Recorder,
    small_units: None,
    tmp_path: Path,
    scratch: str,
    error: type[StorageError],
    message: str,
) -> None:
    (tmp_path / "a-file").touch()
    (tmp_path / "a-folder-there" / f"{SAVING_PREFIX}a").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / f"{SAVING_PREFIX}a").symlink_to("/dev/full")
    options = TransportOptions("gs://runs", "gsutil", scratch=str(tmp_path / scratch))
    with pytest.raises(StorageError, match=message) as caught:
        open_transport(options).put("a", writer(bytes(LARGE)), None, LARGE)
    assert type(caught.value) is error
    assert not (recorder.folder / "calls.jsonl").exists()


@pytest.mark.parametrize("name", ["gsutil", "gcloud"])
def test_a_program_that_has_no_temporary_directory_is_an_error_of_the_upload(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match="no temporary file: No such file or directory"):
        open_transport(TransportOptions("gs://runs", name)).stat("a")


def test_credentials_that_cannot_be_read_are_an_error_of_the_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    with pytest.raises(AccessDeniedError, match="credentials cannot be read: .*Is a directory"):
        open_transport(TransportOptions("gs://runs", "python"))


# How the programs are called.


def test_arguments_are_a_list_without_secrets_and_the_session_its_own(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_AUTH_ACCESS_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(key, "canary-5f2c")
    wanted = TransportOptions("gs://runs/a/", "gsutil", user_project="payer")
    transport = open_transport(wanted)
    put_bytes(transport, "$(touch pwned); 'x'", b"data", ObjectInfo("x", 1, "", 42))
    recorder.answer(STAT_OUTPUT)
    assert transport.stat("x") == ObjectInfo("x", 1234, "4waSgw==", 1767225600000000)
    transport.read("x")
    transport.copy("x", "y")
    transport.delete("x")
    gcloud = open_transport(replace(wanted, name="gcloud"))
    put_bytes(gcloud, "-x", b"data", ObjectInfo("-x", 4, "", 7))

    calls = recorder.calls
    for call in calls[:-1]:
        assert call["arguments"][:6] == ["-u", "payer", *GSUTIL_WORDS]
    target = "gs://runs/a/$(touch pwned); 'x'"
    assert [call["arguments"][6:] for call in calls[:-1]] == [
        ["-q", "-h", "x-goog-if-generation-match:42", "cp", "-", target],
        ["stat", "gs://runs/a/x"],
        ["-q", "cat", "gs://runs/a/x"],
        ["-q", "cp", "gs://runs/a/x", "gs://runs/a/y"],
        ["-q", "rm", "gs://runs/a/x"],
    ]
    assert calls[-1]["arguments"] == [
        "--quiet",
        "--billing-project=payer",
        "storage",
        "--no-user-output-enabled",
        "cp",
        "--if-generation-match=7",
        "-",
        "gs://runs/a/-x",
    ]
    assert [call["input"] for call in calls] == ["data", "", "", "", "", "data"]
    for call in calls:
        assert call["session"] == call["pid"] != os.getsid(0)
    assert not Path("pwned").exists()
    assert "canary" not in json.dumps(calls)


@pytest.mark.parametrize("name", ["gsutil", "gcloud"])
@pytest.mark.parametrize("hostile", ["a*", "a?", "a[1]", "a#1767225600000000", "-*"])
def test_a_name_that_a_program_takes_for_a_pattern_is_refused(
    recorder: Recorder, name: str, hostile: str
) -> None:
    transport = open_transport(TransportOptions("gs://runs", name))
    for use in (
        lambda: put_bytes(transport, hostile, b"x", None),
        lambda: transport.stat(hostile),
        lambda: transport.read(hostile),
        lambda: transport.delete(hostile),
        lambda: transport.copy("x", hostile),
        lambda: transport.copy(hostile, "x"),
    ):
        with pytest.raises(StorageError, match=f"{name} takes .* for a part of a pattern"):
            use()
    assert not (recorder.folder / "calls.jsonl").exists()


def test_what_is_missing_is_none_and_may_be_deleted(recorder: Recorder) -> None:
    recorder.answer(errors="No URLs matched: gs://runs/x", code=1)
    transport = open_transport(TransportOptions("gs://runs", "gsutil"))
    assert transport.stat("x") is None
    assert transport.read("x") is None
    transport.delete("x")


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        ("gsutil", STAT_OUTPUT.replace("crc32c", "sha1"), "no size or crc32c"),
        ("gcloud", '{"size": "1", "generation": "1"}', "without size or crc32c"),
        ("gcloud", "[]", "without size or crc32c"),
        ("gcloud", "", "without size or crc32c"),
    ],
)
def test_a_stat_without_checksum_is_no_proof(
    recorder: Recorder, name: str, output: str, message: str
) -> None:
    recorder.answer(output)
    with pytest.raises(StorageError, match=message):
        open_transport(TransportOptions("gs://runs", name)).stat("x")


# Which one is opened, and which works.


def test_a_directory_is_its_own_transport(tmp_path: Path) -> None:
    for choice in ("auto", "directory"):
        transport = open_transport(TransportOptions(str(tmp_path), choice))
        assert (transport.name, transport.uri) == ("directory", str(tmp_path))
    assert probe(str(tmp_path)) == (TransportOptions(str(tmp_path), "auto"), None)
    assert list((tmp_path / "Checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "choice"), [("bucket", "gsutil"), ("bucket", "python"), ("gs://runs", "directory")]
)
def test_a_transport_that_does_not_fit_the_uri_is_refused(uri: str, choice: str) -> None:
    with pytest.raises(StorageError, match=f"upload_transport {choice} needs a"):
        open_transport(TransportOptions(uri, choice))


@pytest.mark.parametrize("name", ["gcloud", "gsutil"])
def test_a_program_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(StorageError, match=f"{name} is not installed"):
        open_transport(TransportOptions("gs://runs", name))


def probe(uri: str, name: str = "auto", **fields: Any) -> tuple[TransportOptions, str | None]:
    return probe_transport(TransportOptions(uri, name, **fields), "Checkpoints", 2)


def test_auto_takes_the_first_that_works(cloud: FakeGcsServer, recorder: Recorder) -> None:
    found = probe("gs://runs/team")
    assert found == (TransportOptions("gs://runs/team", "python"), None)
    assert cloud.list_objects("runs") == []
    assert not (recorder.folder / "calls.jsonl").exists()


def test_auto_takes_the_next_one_where_one_does_not_work_and_probes_in_a_hurry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TransportOptions] = []

    def refuse(options: TransportOptions, meter: Meter) -> Transport:
        asked.append(options)
        raise AccessDeniedError("403")

    def accept(options: TransportOptions, meter: Meter) -> Transport:
        return BucketTransport(TransportOptions(str(tmp_path)), meter)

    monkeypatch.setitem(transport_choice.TRANSPORTS, "gs", {"python": refuse, "gsutil": accept})
    found = probe("gs://runs/team", stall_seconds=77.0)
    # What it was asked for is kept; only the probe itself is in a hurry.
    assert found == (TransportOptions("gs://runs/team", "gsutil", stall_seconds=77.0), None)
    assert (asked[0].retry_seconds, asked[0].stall_seconds) == (2, START_SECONDS + 2)


def test_where_nothing_works_all_reasons_are_told(cloud: FakeGcsServer, recorder: Recorder) -> None:
    recorder.answer(errors="no way", code=1)
    with pytest.raises(AccessDeniedError) as caught:
        probe("gs://locked")
    message = str(caught.value)
    assert "storage.objects.create" in message
    assert "gcloud cp gs://locked: no way" in message
    assert "gsutil cp gs://locked: no way" in message


@pytest.mark.parametrize("lacking", ["storage.objects.delete", "storage.objects.list"])
def test_where_parts_could_not_be_removed_there_are_none(
    cloud: FakeGcsServer, small_units: None, lacking: str
) -> None:
    cloud.create_bucket("keeping", without=[lacking])
    found, warning = probe("gs://keeping", "python")
    assert found == TransportOptions("gs://keeping", "python", streams=1)
    assert warning is not None
    assert "cannot be listed and deleted" in warning
    assert lacking in warning
    transport = open_transport(found)
    data = os.urandom(LARGE)
    transport.put("Checkpoints/a", writer(data), None, LARGE)
    transport.close()
    assert cloud.read_object("keeping", "Checkpoints/a") == data
    assert [name for name in cloud.list_objects("keeping") if ".parts" in name] == []


@pytest.mark.parametrize("name", ["python", *PROGRAMS])
@pytest.mark.parametrize(
    ("bucket", "error"), [("locked", AccessDeniedError), ("nowhere", ObjectNotFoundError)]
)
def test_a_refusal_is_found_at_once(
    cloud: FakeGcsServer, name: str, bucket: str, error: type[StorageError]
) -> None:
    if name != "python" and shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    with pytest.raises(StorageError, match=f"gs://{bucket}") as caught:
        probe(f"gs://{bucket}", name)
    assert type(caught.value) is error
    assert len(cloud.requests("upload")) <= 1


# Faults of the server.


@pytest.mark.parametrize("kind", ["python-1", "python-4", *PROGRAMS])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "status", "times": 2},
        {"kind": "reset", "times": 2, "after_bytes": 100_000},
        {"kind": "truncate", "times": 2, "after_bytes": 100_000},
        {"kind": "lost_answer", "name": "my team/a", "operation": "*"},
    ],
)
def test_faults_on_the_way_change_no_byte(
    open_way: OpenWay,
    small_units: None,
    cloud: FakeGcsServer,
    kind: str,
    options: dict[str, Any],
) -> None:
    way, data = open_way(kind, retry_seconds=60), os.urandom(LARGE)
    fault = cloud.add_fault(Fault(**{"operation": "upload", **options}))
    try:
        way.transport.put("a", writer(data), None, LARGE)
    except (ConflictError, TransientStorageError):
        assert fault.kind == "lost_answer"  # who put it looks, and finds it there
    assert fault.fired == fault.times
    found = way.transport.stat("a")
    assert found is not None
    assert found.crc32c == crc32c_of_bytes(data)


@pytest.mark.parametrize("kind", ["python-1", "python-4", *PROGRAMS])
def test_a_server_that_stalls_or_stays_down_is_given_up(
    open_way: OpenWay,
    small_units: None,
    cloud: FakeGcsServer,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(gcs, "READ_TIMEOUT_SECONDS", 0.3)
    is_python = kind.startswith("python")
    way = open_way(kind, retry_seconds=1.0 if is_python else 5.0, stall_seconds=5.0)
    cloud.add_fault(Fault("stall" if is_python else "status", times=None, operation="upload"))
    with pytest.raises(TransientStorageError):
        way.transport.put("a", writer(bytes(LARGE)), None, LARGE)
    assert way.names() == []
    assert list(way.scratch.iterdir()) == []


@pytest.mark.gsutil
@pytest.mark.parametrize("name", ["gcloud", "gsutil"])
@pytest.mark.parametrize("status", [404, 410])
def test_programs_that_lose_their_session_are_worth_another_try(
    open_way: OpenWay, cloud: FakeGcsServer, name: str, status: int
) -> None:
    way = open_way(name)
    fault = cloud.add_fault(Fault("lost_session", times=None, status=status))
    with pytest.raises(TransientStorageError, match=str(status)):
        put_bytes(way.transport, "a", b"data", None)
    assert fault.fired >= 1
    cloud.clear_faults()
    put_bytes(way.transport, "a", b"data", None)
    assert cloud.read_object("runs", "my team/a") == b"data"


@pytest.mark.parametrize(
    ("described", "error"),
    [
        ("HTTPError 403: Permission denied", TransientStorageError),
        ("gs://runs not found: 404.", ObjectNotFoundError),
    ],
)
def test_gcloud_says_the_same_of_a_lost_session_and_of_no_bucket(
    recorder: Recorder, described: str, error: type[StorageError]
) -> None:
    script = (
        "#!/bin/sh\n"
        f'case "$*" in *describe*) echo "{described}" >&2;; '
        '*) echo "gs://runs not found: 404." >&2;; esac\nexit 1\n'
    )
    (recorder.folder / "gcloud").write_text(script)
    with pytest.raises(StorageError, match="not found: 404") as caught:
        put_bytes(open_transport(TransportOptions("gs://runs/a", "gcloud")), "a", b"data", None)
    assert type(caught.value) is error
