"""The fake Google Cloud Storage behaves like the real one towards the real clients.

What the google-cloud-storage client does with it, faults included, is in tests/utils/storage and
tests/utils/uploads; here are the command-line tools, and what those tests take for granted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.gcs_server import FakeGcsServer, Fault

QUANTUM = 256 * 1024
OBJECTS = "/storage/v1/b/runs/o"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeGcsServer]:
    with FakeGcsServer(tmp_path, tls=True) as server:
        server.create_bucket("runs")
        yield server


def test_a_resumable_session_keeps_whole_quanta(server: FakeGcsServer) -> None:
    data = os.urandom(3 * QUANTUM + 100)
    start = f"{server.url}/upload{OBJECTS}?uploadType=resumable&name=a"
    total, url = len(data), requests.post(start, timeout=5).headers["Location"]

    def put(content_range: str, body: bytes = b"") -> requests.Response:
        headers = {"Content-Range": content_range}
        return requests.put(url, data=body, headers=headers, timeout=5, allow_redirects=False)

    empty = put(f"bytes */{total}")
    assert (empty.status_code, "Range" in empty.headers) == (308, False)
    odd = put(f"bytes 0-{QUANTUM + 9}/{total}", data[: QUANTUM + 10])
    assert (odd.status_code, odd.headers["Range"]) == (308, f"bytes=0-{QUANTUM - 1}")
    gap = put(f"bytes {2 * QUANTUM}-{total - 1}/{total}", data[2 * QUANTUM :])
    assert (gap.status_code, "exceeds already uploaded size" in gap.text) == (400, True)
    overlap = put(f"bytes 0-{2 * QUANTUM - 1}/*", data[: 2 * QUANTUM])
    assert overlap.headers["Range"] == f"bytes=0-{2 * QUANTUM - 1}"
    assert server.unfinished_uploads() == ["a"]
    done = put(f"bytes {2 * QUANTUM}-{total - 1}/{total}", data[2 * QUANTUM :])
    again = put(f"bytes */{total}")
    assert (done.status_code, again.status_code) == (200, 200)
    assert done.json() == again.json()
    assert server.read_object("runs", "a") == data
    assert server.unfinished_uploads() == []


def test_a_fault_hits_what_it_names_and_as_often_as_it_says(server: FakeGcsServer) -> None:
    fault = server.add_fault(Fault("status", 1, "object", name="ckpt/*", skip=1, status=429))
    server.put_object("runs", "a", b"x")
    server.put_object("runs", "ckpt/a", b"x")
    paths = [OBJECTS, f"{OBJECTS}/a", *[f"{OBJECTS}/ckpt%2Fa"] * 3]
    codes = [requests.get(server.url + path, timeout=5).status_code for path in paths]
    assert codes == [200, 200, 200, 429, 200]
    assert fault.fired == 1


def test_a_mistake_of_the_server_fails_the_test(tmp_path: Path) -> None:
    server = FakeGcsServer(tmp_path)
    server.start()
    server.create_bucket("runs")
    address = f"{server.url}{OBJECTS}/a/compose"
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.post(address, json={"sourceObjects": [{"unnamed": 1}]}, timeout=5)
    with pytest.raises(RuntimeError, match="fake server failed"):
        server.__exit__(None)


@pytest.mark.gsutil
@pytest.mark.parametrize("program", ["gsutil", "gcloud"])
def test_the_real_programs_bring_a_file_there_and_back(
    server: FakeGcsServer, tmp_path: Path, program: str
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    is_gsutil = program == "gsutil"
    environment = (server.gsutil_environment if is_gsutil else server.gcloud_environment)(tmp_path)
    verbs = ["gsutil"] if is_gsutil else ["gcloud", "storage"]
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(9_000_000))  # above 8 MiB: a resumable upload

    def call(*words: object) -> str:
        result = subprocess.run(  # noqa: S603 - fixed words, no shell
            [*verbs, *map(str, words)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    fault = server.add_fault(Fault("reset", after_bytes=5_000_000, operation="upload"))
    call("cp", source, "gs://runs/dir/a")
    assert fault.fired == 1
    assert server.read_object("runs", "dir/a") == source.read_bytes()
    server.put_object("runs", "dir/sub/b", b"b")
    assert call("ls", "gs://runs/dir").split() == ["gs://runs/dir/a", "gs://runs/dir/sub/"]
    call("cp", "gs://runs/dir/a", target)
    assert target.read_bytes() == source.read_bytes()
    call("rm", "gs://runs/dir/a")
    assert server.list_objects("runs") == ["dir/sub/b"]
