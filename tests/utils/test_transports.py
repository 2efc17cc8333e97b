"""Ways to the bucket: the real gsutil against a fake server, and how it is called and ended."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gcs_server import FakeGcsServer, Fault
from utils import transports
from utils.errors import (
    AccessDeniedError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from utils.storage import ObjectInfo, crc32c_of_bytes
from utils.transports import BucketTransport, GsutilTransport, Transport, build_transport

Install = Callable[[str], None]


@pytest.fixture
def install_gsutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a gsutil of one's own first on PATH."""

    def install(script: str) -> None:
        program = tmp_path / "bin/gsutil"
        program.parent.mkdir(exist_ok=True)
        program.write_text(script)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return install


RECORDER = f"""#!{sys.executable} -SE
import json, os, sys
with open({{record!r}}, "a") as file:
    json.dump({{{{"arguments": sys.argv[1:], "session": os.getsid(0), "pid": os.getpid(),
               "input": sys.stdin.read()}}}}, file)
    file.write("\\n")
sys.stdout.write({{output!r}})
sys.stderr.write({{errors!r}})
sys.exit({{code}})
"""


class Recorder:
    """A gsutil that writes down how it was called."""

    def __init__(self, install: Install, path: Path) -> None:
        self._install, self._path = install, path
        self.answer()

    def answer(self, output: str = "", errors: str = "", code: int = 0) -> None:
        self._install(
            RECORDER.format(record=str(self._path), output=output, errors=errors, code=code)
        )

    @property
    def calls(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]


@pytest.fixture
def recorder(install_gsutil: Install, tmp_path: Path) -> Recorder:
    return Recorder(install_gsutil, tmp_path / "calls.jsonl")


STAT_OUTPUT = """gs://runs/a/x:
    Creation time:          Thu, 01 Jan 2026 00:00:00 GMT
    Content-Length:         1234
    Content-Type:           application/gzip
    Hash (crc32c):          4waSgw==
    Hash (md5):             JfnnlDI7RTiF9RgfG2JNCw==
    Generation:             1767225600000000
"""


def test_arguments_are_a_list_and_the_session_its_own(recorder: Recorder, tmp_path: Path) -> None:
    transport = build_transport("gs://runs/a/", "gsutil", user_project="payer")
    source = tmp_path / "-rf $(touch pwned); 'x' [1].tar.gz"
    source.write_bytes(b"x")

    transport.put("$(x)", source)
    recorder.answer(STAT_OUTPUT)
    info = transport.stat("x")
    transport.read("x")
    transport.delete("x")

    put, *others = recorder.calls
    escaped = str(source).replace("[1]", "[[]1]")  # gsutil takes [1] for a pattern
    assert put["arguments"] == ["-u", "payer", "-q", "cp", "--", escaped, "gs://runs/a/$(x)"]
    assert [call["arguments"][2:] for call in others] == [  # type: ignore[index]
        ["stat", "gs://runs/a/x"],
        ["-q", "cat", "gs://runs/a/x"],
        ["-q", "rm", "gs://runs/a/x"],
    ]
    for call in recorder.calls:
        assert call["session"] == call["pid"] != os.getsid(0)
        assert call["input"] == ""
    assert info == ObjectInfo("x", 1234, "4waSgw==")
    assert not (tmp_path / "pwned").exists()
    assert not Path("pwned").exists()


def test_no_credential_of_the_environment_becomes_an_argument(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_AUTH_ACCESS_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(key, "canary-5f2c")
    (tmp_path / "a").write_bytes(b"x")
    build_transport("gs://runs", "gsutil").put("a", tmp_path / "a")
    assert "canary" not in json.dumps(recorder.calls)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            "You are attempting to access protected data with no configured\n"
            "credentials. Please visit https://cloud.google.com/console#/project\n"
            'and sign up for an account, and then run the "gcloud auth login"\n'
            "command to configure gsutil to use these credentials.",
            AccessDeniedError,
        ),
        ("AccessDeniedException: 403 insufficient permissions", AccessDeniedError),
        ("ServiceException: 401 Anonymous caller does not have storage.objects", AccessDeniedError),
        ("BucketNotFoundException: 404 gs://runs bucket does not exist.", ObjectNotFoundError),
        ("CommandException: No URLs matched: gs://runs/x", ObjectNotFoundError),
        ("ServiceException: 503 Backend Error", TransientStorageError),
        ("ResumableUploadException: 429 Too Many Requests", TransientStorageError),
        ("", TransientStorageError),
    ],
)
def test_a_failure_says_whether_to_try_again(
    recorder: Recorder, tmp_path: Path, message: str, error: type[StorageError]
) -> None:
    recorder.answer(errors=f"Copying ...\n{message}\n\n", code=1)
    (tmp_path / "a").write_bytes(b"x")
    transport = build_transport("gs://runs", "gsutil")
    with pytest.raises(StorageError, match=r"^gsutil cp ") as caught:
        transport.put("x", tmp_path / "a")
    assert type(caught.value) is error
    assert message in str(caught.value) or "gcloud auth login" in str(caught.value)


def test_what_is_missing_is_none_and_may_be_deleted(recorder: Recorder) -> None:
    recorder.answer(errors="No URLs matched: gs://runs/x", code=1)
    transport = build_transport("gs://runs", "gsutil")
    assert transport.stat("x") is None
    assert transport.read("x") is None
    transport.delete("x")


def test_a_stat_without_checksum_is_no_proof(recorder: Recorder) -> None:
    recorder.answer(STAT_OUTPUT.replace("crc32c", "sha1"))
    with pytest.raises(StorageError, match="no size or crc32c"):
        build_transport("gs://runs", "gsutil").stat("x")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def test_a_call_that_takes_too_long_is_killed_with_all_its_children(
    install_gsutil: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "GSUTIL_CALL_SECONDS", 1.0)
    install_gsutil(
        f"#!/bin/sh\ntrap '' TERM INT HUP\nsleep 600 &\necho $$ $! > {tmp_path}/pids\nwait\n"
    )
    (tmp_path / "a").write_bytes(b"x")
    started = time.monotonic()
    with pytest.raises(TransientStorageError, match=r"gsutil cp gs://runs took longer than 1 s"):
        build_transport("gs://runs", "gsutil").put("x", tmp_path / "a")
    assert time.monotonic() - started < 30

    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [pid for pid in pids if is_running(pid)] == []


def test_a_large_file_has_more_time(
    install_gsutil: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "GSUTIL_CALL_SECONDS", 0.0)
    monkeypatch.setattr(transports, "GSUTIL_SLOWEST_BYTES_PER_SECOND", 100.0)
    install_gsutil("#!/bin/sh\nexit 0\n")
    (tmp_path / "large").write_bytes(bytes(3000))  # 30 s
    build_transport("gs://runs", "gsutil").put("x", tmp_path / "large")


# Which one is built.


def test_a_directory_is_its_own_transport(tmp_path: Path) -> None:
    for choice in ("auto", "directory"):
        transport = build_transport(str(tmp_path), choice)
        assert (transport.name, transport.uri) == ("directory", str(tmp_path))


def test_gs_goes_by_gsutil_where_it_is_found_else_by_the_client(
    gcs: FakeGcsServer, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for choice in ("auto", "gsutil"):
        assert isinstance(build_transport("gs://runs/a/", choice), GsutilTransport)
    monkeypatch.setattr(transports, "find_gsutil", lambda: None)
    for choice in ("auto", "python"):
        transport = build_transport("gs://runs", choice)
        assert (transport.name, transport.uri) == ("python", "gs://runs")
        transport.close()
    with pytest.raises(StorageError, match="gsutil is not installed"):
        build_transport("gs://runs", "gsutil")


@pytest.mark.parametrize(
    ("uri", "choice"), [("bucket", "gsutil"), ("bucket", "python"), ("gs://runs", "directory")]
)
def test_a_transport_that_does_not_fit_the_uri_is_refused(uri: str, choice: str) -> None:
    with pytest.raises(StorageError, match=f"upload_transport {choice} needs a"):
        build_transport(uri, choice)


# What every transport does. The real gsutil costs about 1.5 s a call.


@pytest.fixture
def gsutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcsServer]:
    if shutil.which("gsutil") is None:
        pytest.skip("gsutil is not installed")
    with FakeGcsServer(tmp_path / "gcs", tls=True) as server:
        for key, value in server.gsutil_environment(tmp_path).items():
            monkeypatch.setenv(key, value)
        server.create_bucket("runs")
        server.create_bucket("locked", writable=False)
        yield server


@pytest.fixture(params=["directory", "python", pytest.param("gsutil", marks=pytest.mark.gsutil)])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transport]:
    if request.param == "directory":
        built = build_transport(str(tmp_path / "bucket"))
    else:
        request.getfixturevalue("gcs" if request.param == "python" else "gsutil")
        built = build_transport("gs://runs/team", request.param)
    assert built.name == request.param
    yield built
    built.close()


def test_what_is_put_can_be_verified_read_and_deleted(transport: Transport, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "a").write_bytes(data)
    assert transport.stat("Checkpoints/a.tar.gz") is None
    transport.put("Checkpoints/a.tar.gz", tmp_path / "a")
    info = transport.stat("Checkpoints/a.tar.gz")
    assert info is not None
    assert (info.size, info.crc32c) == (len(data), crc32c_of_bytes(data))
    assert transport.read("Checkpoints/a.tar.gz") == data
    transport.delete("Checkpoints/a.tar.gz")
    assert transport.read("Checkpoints/a.tar.gz") is None
    transport.delete("Checkpoints/a.tar.gz")


@pytest.mark.gsutil
def test_gsutil_takes_names_that_look_like_options_and_patterns(
    gsutil: FakeGcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "a").write_bytes(b"in brackets")
    monkeypatch.chdir(tmp_path)
    Path("-rf").write_bytes(b"a dash")
    transport = build_transport("gs://runs/team", "gsutil")
    transport.put("-x", Path("-rf"))
    transport.put("y", folder / "a")
    assert gsutil.read_object("runs", "team/-x") == b"a dash"
    assert gsutil.read_object("runs", "team/y") == b"in brackets"


@pytest.mark.gsutil
def test_gsutil_refusals_are_told_apart(gsutil: FakeGcsServer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(AccessDeniedError, match="gs://locked"):
        build_transport("gs://locked", "gsutil").put("a", tmp_path / "a")
    with pytest.raises(ObjectNotFoundError, match="gs://nowhere"):
        build_transport("gs://nowhere", "gsutil").put("a", tmp_path / "a")


@pytest.mark.gsutil
def test_gsutil_that_hangs_on_a_silent_server_is_ended(
    gsutil: FakeGcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"x")
    fault = gsutil.add_fault(Fault("stall", operation="upload", times=None))
    monkeypatch.setattr(transports, "GSUTIL_CALL_SECONDS", 6.0)
    transport = build_transport("gs://runs", "gsutil")
    with pytest.raises(TransientStorageError, match="took longer than 6 s"):
        transport.put("a", tmp_path / "a")
    assert fault.fired >= 1
    assert gsutil.list_objects("runs") == []


def test_a_bucket_transport_gives_the_checksum_that_a_directory_lacks(tmp_path: Path) -> None:
    transport = build_transport(str(tmp_path))
    assert isinstance(transport, BucketTransport)
    (tmp_path / "a").write_bytes(b"123456789")
    info = transport.stat("a")
    assert info is not None
    assert info.crc32c == "4waSgw=="
