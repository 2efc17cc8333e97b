"""The fake Google Cloud Storage behaves like the real one towards the real clients.

What the google-cloud-storage client does with it, faults included, is in tests/utils/storage and
tests/utils/uploads; here are the command-line tools, and what those tests take for granted.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.gcs_server import FakeGcsServer, Fault
from tests.gcs_server.objects import list_page, parse_range

QUANTUM = 256 * 1024
OBJECTS = "/storage/v1/b/runs/o"
MEDIA = f"{OBJECTS}/a?alt=media"
RESUMABLE = f"/upload{OBJECTS}?uploadType=resumable&name=a"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeGcsServer]:
    with FakeGcsServer(tmp_path / "server", tls=True) as server:
        server.create_bucket("runs")
        yield server


def noise(size: int) -> bytes:
    return hashlib.shake_128(str(size).encode()).digest(size)


def begin(server: FakeGcsServer, metadata: dict[str, str] | None = None) -> str:
    """Return the address of a new upload session of the object `a`."""
    return requests.post(server.url + RESUMABLE, json=metadata, timeout=5).headers["Location"]


def exchange(server: FakeGcsServer, method: str, path: str, body: bytes = b"") -> bytes:
    """One request by a client that neither retries nor dresses errors up."""
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    ) as connection:
        connection.request(method, path, body)
        with connection.getresponse() as response:
            return response.read()


# The protocol, byte by byte.


def test_a_resumable_session_keeps_whole_quanta(server: FakeGcsServer) -> None:
    data = noise(3 * QUANTUM + 100)
    total, url = len(data), begin(server)

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


def test_an_upload_that_is_killed_leaves_no_object(server: FakeGcsServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.putrequest("PUT", begin(server).removeprefix(server.url))
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"only a part")
    connection.close()
    record = server.wait_for_request(
        lambda record: record.operation == "upload.chunk" and record.finished
    )
    assert record is not None
    assert record.status is None
    assert server.list_objects("runs") == []


def test_bytes_that_are_not_those_of_their_hash_are_refused(server: FakeGcsServer) -> None:
    url = begin(server, {"crc32c": "AAAAAA=="})
    assert requests.put(url, data=b"x", timeout=5).status_code == 400
    assert server.list_objects("runs") == []


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize("delimiter", ["", "/"])
@pytest.mark.parametrize("prefix", ["", "a", "a/"])
def test_pages_join_to_the_whole_listing(limit: int, delimiter: str, prefix: str) -> None:
    names = ["a", "a/", "a/b", "a/b/", "a/b/c", "a/b/d/e", "a/c", "ab", "b/1", "b/2"]
    token, found, prefixes = "", [], []
    while True:
        page, folders, token = list_page(names, prefix, delimiter, token, limit)
        assert 0 < len(page) + len(folders) <= limit
        found += page
        prefixes += folders
        if not token:
            break
    assert len(set(prefixes)) == len(prefixes)
    wanted = [name for name in names if name.startswith(prefix)]
    assert found == [name for name in wanted if not delimiter or "/" not in name[len(prefix) :]]
    assert all(name in found or name.startswith(tuple(prefixes)) for name in wanted)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", None), ("items=0-1", None), ("bytes=0-0", (0, 1)), ("bytes=3-99", (3, 7))]
    + [("bytes=3-", (3, 7)), ("bytes=-4", (6, 4)), ("bytes=-40", (0, 10))],
)
def test_ranges(value: str, expected: tuple[int, int] | None) -> None:
    assert parse_range(value, 10) == expected


# Faults.


def test_a_fault_hits_what_it_names_and_as_often_as_it_says(server: FakeGcsServer) -> None:
    fault = server.add_fault(Fault("status", 1, "object", name="ckpt/*", skip=1, status=429))
    server.put_object("runs", "a", b"x")
    server.put_object("runs", "ckpt/a", b"x")
    paths = [OBJECTS, f"{OBJECTS}/a", *[f"{OBJECTS}/ckpt%2Fa"] * 3]
    codes = [requests.get(server.url + path, timeout=5).status_code for path in paths]
    assert codes == [200, 200, 200, 429, 200]
    assert fault.fired == 1


def test_a_reset_reaches_the_client_as_a_reset(server: FakeGcsServer) -> None:
    path = begin(server).removeprefix(server.url)
    server.add_fault(Fault("reset", times=2))
    server.put_object("runs", "a", b"x")
    with pytest.raises(ConnectionResetError):
        exchange(server, "PUT", path, b"body")
    with pytest.raises(ConnectionResetError):
        exchange(server, "GET", MEDIA)
    assert exchange(server, "GET", MEDIA) == b"x"


def test_a_lost_answer_comes_after_the_change(server: FakeGcsServer) -> None:
    server.add_fault(Fault("lost_answer"))
    url = begin(server)
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.put(url, data=b"data", timeout=5)
    assert server.read_object("runs", "a") == b"data"
    assert [record.status for record in server.requests("upload")] == [200, None]


@pytest.mark.parametrize("status", [404, 410])
def test_a_lost_session_stays_lost_and_another_one_works(
    server: FakeGcsServer, status: int
) -> None:
    fault = server.add_fault(Fault("lost_session", status=status))
    first = begin(server)
    answers = [requests.put(first, data=b"data", timeout=5).status_code for _ in range(2)]
    assert (answers, fault.fired) == ([status, 404], 1)
    assert server.unfinished_uploads() == []
    assert requests.put(begin(server), data=b"data", timeout=5).status_code == 200
    assert server.read_object("runs", "a") == b"data"


def test_a_stall_lasts_until_it_is_released(server: FakeGcsServer) -> None:
    data = noise(QUANTUM)
    server.put_object("runs", "a", data)
    fault = server.add_fault(Fault("stall", after_bytes=1000, operation="object"))
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(exchange(server, "GET", MEDIA)))
    reader.start()
    assert fault.wait_fired(5)
    assert received == []
    fault.release()
    reader.join()
    assert received == [data]


def test_a_server_can_stop_amid_a_stall_and_come_back(server: FakeGcsServer) -> None:
    server.put_object("runs", "a", b"x")
    fault = server.add_fault(Fault("stall", operation="object.list"))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", OBJECTS)
    assert fault.wait_fired(5)
    server.stop()
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        exchange(server, "GET", MEDIA)
    server.start()
    assert exchange(server, "GET", MEDIA) == b"x"


def test_a_mistake_of_the_server_fails_the_test(tmp_path: Path) -> None:
    server = FakeGcsServer(tmp_path)
    server.start()
    server.create_bucket("runs")
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.post(
            f"{server.url}{OBJECTS}/a/compose",
            json={"sourceObjects": [{"unnamed": 1}]},
            timeout=5,
        )
    with pytest.raises(RuntimeError, match="fake server failed"):
        server.__exit__(None)


# The command-line tools.


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
    source.write_bytes(noise(9_000_000))  # above 8 MiB: a resumable upload

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
