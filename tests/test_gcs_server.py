"""The fake Google Cloud Storage behaves like the real one towards the real clients.

The tests with google-cloud-storage are fast because they pass `retry` and `timeout`: without
them the client waits 1, 2, 4, ... s between attempts, up to 120 s, and 60 s for an answer.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import requests
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import InvalidOperation
from google.cloud import storage
from google.cloud.storage import transfer_manager
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY

from tests.gcs_server import FakeGcsServer, Fault
from tests.gcs_server.errors import ApiError
from tests.gcs_server.faults import Kind
from tests.gcs_server.listing import ListQuery, list_page
from tests.gcs_server.objects import parse_range
from tests.gcs_server.preconditions import Preconditions

QUANTUM = 256 * 1024
FAST_RETRY = DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.05).with_timeout(5)
FAST = {"retry": FAST_RETRY, "timeout": (1, 2)}
ONCE = {"retry": None, "timeout": (1, 0.5)}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeGcsServer]:
    with FakeGcsServer(tmp_path / "server") as server:
        server.create_bucket("runs")
        yield server


@pytest.fixture
def client(server: FakeGcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[storage.Client]:
    for key, value in server.client_environment().items():
        monkeypatch.setenv(key, value)
    client = storage.Client(project="test", credentials=AnonymousCredentials())
    yield client
    client.close()


@pytest.fixture
def bucket(client: storage.Client) -> storage.Bucket:
    return client.bucket("runs")


def noise(size: int) -> bytes:
    return hashlib.shake_128(str(size).encode()).digest(size)


def crc32c_of(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def upload(blob: storage.Blob, data: bytes, **options: object) -> None:
    """A resumable upload if the blob has a chunk size; the client decides by `size` alone."""
    size = None if blob.chunk_size else len(data)
    blob.upload_from_file(io.BytesIO(data), size=size, **{**FAST, **options})


# The Python client: uploads.


@pytest.mark.parametrize("size", [0, 1, QUANTUM - 1, QUANTUM, 3 * QUANTUM + 17])
@pytest.mark.parametrize("chunk_size", [None, QUANTUM])
def test_upload_arrives_whole_with_hashes(
    server: FakeGcsServer, bucket: storage.Bucket, size: int, chunk_size: int | None
) -> None:
    data = noise(size)
    blob = bucket.blob("checkpoints/a.tar.gz", chunk_size=chunk_size)
    upload(blob, data, content_type="application/gzip")
    assert server.read_object("runs", blob.name) == data
    assert (blob.size, blob.crc32c) == (size, crc32c_of(data))
    assert base64.b64decode(blob.md5_hash) == hashlib.md5(data, usedforsecurity=False).digest()
    assert blob.content_type == "application/gzip"
    first = server.requests("upload", blob.name)[0]
    assert first.operation == ("upload.start" if chunk_size else "upload.multipart")


def test_upload_of_unknown_size_arrives_whole(
    server: FakeGcsServer, bucket: storage.Bucket
) -> None:
    data = noise(2 * QUANTUM + 5)
    with bucket.blob("stream").open("wb", chunk_size=QUANTUM, **FAST) as file:
        file.write(data)
    assert server.read_object("runs", "stream") == data


def test_names_survive_quoting(server: FakeGcsServer, bucket: storage.Bucket) -> None:
    name = "a b/\u00fc?#%2F&+/-rf"
    for chunk_size in (None, QUANTUM):
        upload(bucket.blob(name, chunk_size=chunk_size), b"x")
    assert server.list_objects("runs") == [name]
    assert bucket.blob(name).download_as_bytes(**FAST) == b"x"
    assert {record.name for record in server.requests("upload")} == {name}


def test_generation_preconditions_are_enforced(
    server: FakeGcsServer, bucket: storage.Bucket
) -> None:
    blob = bucket.blob("a")
    for chunk_size in (None, QUANTUM):
        blob.chunk_size = chunk_size
        upload(blob, b"one", if_generation_match=blob.generation or 0)
        with pytest.raises(exceptions.PreconditionFailed):
            upload(bucket.blob("a", chunk_size=chunk_size), b"two", if_generation_match=0)
    with pytest.raises(exceptions.PreconditionFailed):
        blob.delete(if_generation_match=1, **FAST)
    assert server.read_object("runs", "a") == b"one"
    blob.delete(if_generation_match=blob.generation, **FAST)
    assert server.list_objects("runs") == []


def test_generations_rise_when_the_clock_goes_back(tmp_path: Path) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    times = iter([now, now, now - timedelta(days=1), now])
    with FakeGcsServer(tmp_path, clock=lambda: next(times)) as server:
        server.create_bucket("runs")
        made = [server.put_object("runs", "a", b"") for _ in range(3)]
    assert [stored.generation for stored in made] == sorted({m.generation for m in made})
    assert made[1].created < made[0].created


def test_xml_multipart_upload(
    server: FakeGcsServer, bucket: storage.Bucket, tmp_path: Path
) -> None:
    data, path = noise(5 * QUANTUM + 9), tmp_path / "archive"
    path.write_bytes(data)
    options = {
        "chunk_size": QUANTUM,
        "worker_type": transfer_manager.THREAD,
        "max_workers": 3,
        "retry": FAST_RETRY,
    }
    blob = bucket.blob("dir/archive")
    blob.metadata = {"run_id": "r1"}
    with pytest.raises(InvalidResponse) as caught:
        transfer_manager.upload_chunks_concurrently(path, blob, **options)
    assert "smaller than 5242880" in caught.value.response.text
    assert server.unfinished_uploads() == []  # the client aborted it

    server.settings.minimum_part_bytes = QUANTUM
    server.add_fault(Fault("status", times=2, operation="upload.xml_part"))
    transfer_manager.upload_chunks_concurrently(path, blob, **options)
    assert server.read_object("runs", "dir/archive") == data
    blob.reload(**FAST)
    assert (blob.crc32c, blob.md5_hash, blob.component_count) == (crc32c_of(data), None, 6)
    assert blob.metadata == {"run_id": "r1"}


# The Python client: everything else.


def test_downloads(server: FakeGcsServer, bucket: storage.Bucket) -> None:
    data = noise(3 * QUANTUM + 1)
    server.put_object("runs", "a", data)
    server.put_object("runs", "empty", b"")
    blob = bucket.blob("a")
    for checksum in ("md5", "crc32c"):
        buffer = io.BytesIO()
        blob.download_to_file(buffer, checksum=checksum, **FAST)
        assert buffer.getvalue() == data
    assert blob.download_as_bytes(start=10, end=19, **FAST) == data[10:20]
    assert blob.download_as_bytes(start=len(data) - 3, **FAST) == data[-3:]
    assert bucket.blob("a", chunk_size=QUANTUM).download_as_bytes(**FAST) == data
    assert bucket.blob("empty").download_as_bytes(**FAST) == b""
    with pytest.raises(exceptions.RequestRangeNotSatisfiable):
        blob.download_as_bytes(start=len(data), **FAST)
    with pytest.raises(exceptions.NotFound):
        bucket.blob("missing").download_as_bytes(**FAST)


def test_list_pages_with_prefix_and_delimiter(
    server: FakeGcsServer, bucket: storage.Bucket
) -> None:
    names = [f"Checkpoints/{step:04d}.tar.gz" for step in range(7)]
    for name in [*names, "Checkpoints/old/x", "other"]:
        server.put_object("runs", name, name.encode())
    server.settings.max_page_size = 2
    assert [blob.name for blob in bucket.list_blobs(prefix="Checkpoints/0", **FAST)] == names
    assert len(server.requests("object.list")) == 4
    listing = bucket.list_blobs(prefix="Checkpoints/", delimiter="/", **FAST)
    assert [blob.name for blob in listing] == names
    assert listing.prefixes == {"Checkpoints/old/"}
    later = bucket.list_blobs(start_offset="Checkpoints/0005.tar.gz", max_results=3, **FAST)
    assert [blob.name for blob in later] == [*names[5:], "Checkpoints/old/x"]


def test_metadata_compose_copy_and_delete(server: FakeGcsServer, bucket: storage.Bucket) -> None:
    parts = [bucket.blob("p1"), bucket.blob("p2")]
    for blob, data in zip(parts, (b"one", b"two"), strict=True):
        upload(blob, data)
    whole = bucket.blob("whole")
    whole.content_type = "text/plain"
    whole.compose(parts, if_generation_match=0, **FAST)
    assert server.read_object("runs", "whole") == b"onetwo"
    assert (whole.component_count, whole.crc32c) == (2, crc32c_of(b"onetwo"))
    whole.metadata = {"step": "10"}
    whole.patch(if_metageneration_match=1, **FAST)
    assert bucket.get_blob("whole", **FAST).metadata == {"step": "10"}
    copied = bucket.copy_blob(whole, bucket, "copied", **FAST)
    assert (copied.metadata, copied.content_type) == ({"step": "10"}, "text/plain")
    token, done, total = bucket.blob("rewritten").rewrite(whole, **FAST)
    assert (token, done, total) == (None, 6, 6)
    bucket.delete_blobs([*parts, whole], **FAST)
    assert server.list_objects("runs") == ["copied", "rewritten"]
    assert bucket.get_blob("whole", **FAST) is None


def test_batch_deletes(server: FakeGcsServer, client: storage.Client) -> None:
    for name in ("a", "b"):
        server.put_object("runs", name, b"")
    with client.batch():
        client.bucket("runs").delete_blobs([client.bucket("runs").blob(n) for n in "ab"])
    assert server.list_objects("runs") == []
    assert [record.status for record in server.requests("object.delete")] == [204, 204]


def test_permissions(server: FakeGcsServer, client: storage.Client) -> None:
    server.create_bucket("public", writable=False)
    server.create_bucket("keep", without={"storage.objects.delete", "storage.buckets.get"})
    server.create_bucket("paid", requester_pays=True)
    wanted = ["storage.objects.create", "storage.objects.get", "storage.objects.delete"]
    assert client.bucket("runs").test_iam_permissions(wanted, **FAST) == wanted
    assert client.bucket("public").test_iam_permissions(wanted, **FAST) == wanted[1:2]
    assert client.get_bucket("runs", **FAST).location == "US-CENTRAL1"
    with pytest.raises(exceptions.NotFound):
        client.get_bucket("absent", **FAST)
    with pytest.raises(exceptions.Forbidden):
        client.get_bucket("keep", **FAST)
    with pytest.raises(exceptions.Forbidden):
        upload(client.bucket("public").blob("a"), b"x")
    upload(client.bucket("keep").blob("a"), b"x")
    with pytest.raises(exceptions.Forbidden):  # overwriting deletes
        upload(client.bucket("keep").blob("a"), b"y")
    with pytest.raises(exceptions.BadRequest, match="requester pays"):
        upload(client.bucket("paid").blob("a"), b"x")
    upload(client.bucket("paid", user_project="p").blob("a"), b"x")


# The resumable protocol, byte by byte.


def test_resumable_session_keeps_whole_quanta(server: FakeGcsServer) -> None:
    data = noise(3 * QUANTUM + 100)
    total = len(data)
    started = requests.post(
        f"{server.url}/upload/storage/v1/b/runs/o?uploadType=resumable",
        json={"name": "a"},
        timeout=5,
    )
    url = started.headers["Location"]

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
    assert requests.delete(url, timeout=5).status_code == 499
    assert put(f"bytes */{total}").status_code == 404


def test_killed_upload_leaves_no_object(server: FakeGcsServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.putrequest("POST", "/upload/storage/v1/b/runs/o?uploadType=media&name=a")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"only a part")
    connection.close()
    record = server.wait_for_request(lambda record: record.finished)
    assert record is not None
    assert record.status is None
    assert server.list_objects("runs") == []


def test_wrong_hash_is_refused(server: FakeGcsServer) -> None:
    url = f"{server.url}/upload/storage/v1/b/runs/o?uploadType=media&name=a"
    headers = {"X-Goog-Hash": "crc32c=AAAAAA=="}
    refused = requests.post(url, data=b"x", headers=headers, timeout=5)
    assert (refused.status_code, server.list_objects("runs")) == (400, [])


# Faults.


@pytest.mark.parametrize("status", [429, 503])
def test_status_fault_fires_as_often_as_asked(
    server: FakeGcsServer, bucket: storage.Bucket, status: int
) -> None:
    fault = server.add_fault(
        Fault("status", times=2, status=status, retry_after=1, operation="upload")
    )
    upload(bucket.blob("a"), b"data")
    assert [record.status for record in server.requests("upload")] == [status, status, 200]
    assert fault.fired == 2
    direct = server.add_fault(Fault("status", status=status, retry_after=7))
    answer = requests.get(f"{server.url}/storage/v1/b/runs/o", timeout=5)
    assert (answer.headers["Retry-After"], direct.wait_fired(0)) == ("7", True)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_final_errors_are_not_retried(
    server: FakeGcsServer, bucket: storage.Bucket, status: int
) -> None:
    server.add_fault(Fault("status", times=None, status=status, method="POST"))
    # On a 401 the client asks for new credentials, which anonymous ones cannot give.
    with pytest.raises((exceptions.ClientError, InvalidOperation)) as caught:
        upload(bucket.blob("a"), b"data")
    assert getattr(caught.value, "code", 401) == status
    assert len(server.requests("upload")) == 1


def test_unavailable_for_ever_ends_at_the_deadline(
    server: FakeGcsServer, bucket: storage.Bucket
) -> None:
    server.add_fault(Fault("status", times=None, operation="object.get"))
    with pytest.raises(exceptions.RetryError):
        bucket.blob("a").reload(retry=FAST_RETRY.with_timeout(0.2), timeout=(1, 2))
    server.clear_faults()
    assert not bucket.blob("a").exists(**FAST)


def test_fault_matches_operation_name_method_and_skips(
    server: FakeGcsServer, bucket: storage.Bucket
) -> None:
    fault = Fault("status", 1, "upload.chunk", method="PUT", name="ckpt/*", bucket="r*", skip=1)
    server.add_fault(fault)
    for name in ("other", "ckpt/a"):
        upload(bucket.blob(name, chunk_size=QUANTUM), noise(3 * QUANTUM - 1))
    chunks = [record.status for record in server.requests("upload.chunk")]
    assert chunks == [308, 308, 200, 308, 503, 308, 200]
    assert fault.fired == 1


@pytest.mark.parametrize("chunk_size", [None, 4 * QUANTUM])
@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_upload_survives_a_cut_connection(
    server: FakeGcsServer, bucket: storage.Bucket, chunk_size: int | None, kind: Kind
) -> None:
    data = noise(12 * QUANTUM)
    fault = server.add_fault(Fault(kind, times=2, after_bytes=QUANTUM + 1000, operation="upload"))
    upload(bucket.blob("a", chunk_size=chunk_size), data)
    assert fault.fired == 2
    assert server.read_object("runs", "a") == data
    assert [r.status for r in server.requests("upload") if r.faults] == [None, None]


def exchange(server: FakeGcsServer, method: str, path: str, body: bytes = b"") -> bytes:
    """One request by a client that neither retries nor dresses errors up."""
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    ) as connection:
        connection.request(method, path, body)
        with connection.getresponse() as response:
            return response.read()


def test_reset_reaches_the_client_as_a_reset(server: FakeGcsServer) -> None:
    server.add_fault(Fault("reset", times=2))
    server.put_object("runs", "a", b"x")
    with pytest.raises(ConnectionResetError):
        exchange(server, "POST", "/upload/storage/v1/b/runs/o?uploadType=media&name=a", b"body")
    with pytest.raises(ConnectionResetError):
        exchange(server, "GET", "/storage/v1/b/runs/o/a?alt=media")
    assert exchange(server, "GET", "/storage/v1/b/runs/o/a?alt=media") == b"x"


@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_download_goes_on_after_a_cut(
    server: FakeGcsServer, bucket: storage.Bucket, kind: Kind
) -> None:
    data = noise(8 * QUANTUM)
    server.put_object("runs", "a", data)
    server.add_fault(Fault(kind, after_bytes=5000, operation="object.download"))
    buffer = io.BytesIO()
    bucket.blob("a").download_to_file(buffer, **FAST)
    assert buffer.getvalue() == data
    assert len(server.requests("object.download")) == 2


def test_lost_answer_of_a_guarded_upload_is_found_by_its_hash(
    server: FakeGcsServer, bucket: storage.Bucket
) -> None:
    fault = server.add_fault(Fault("lost_answer", operation="upload"))
    blob = bucket.blob("a")
    with pytest.raises(exceptions.PreconditionFailed):
        upload(blob, b"data", if_generation_match=0)
    blob.reload(**FAST)
    assert (blob.crc32c, fault.fired) == (crc32c_of(b"data"), 1)
    assert [record.status for record in server.requests("upload")] == [None, 412]


def test_lost_answer_of_a_resumable_upload_is_repaired_by_the_session(
    server: FakeGcsServer, bucket: storage.Bucket
) -> None:
    server.add_fault(Fault("lost_answer", operation="upload"))
    blob = bucket.blob("a", chunk_size=QUANTUM)
    upload(blob, noise(2 * QUANTUM), if_generation_match=0)
    assert blob.generation == server.get_object("runs", "a").generation


@pytest.mark.parametrize("status", [404, 410])
def test_a_lost_session_stays_lost_and_another_one_works(
    server: FakeGcsServer, status: int
) -> None:
    fault = server.add_fault(Fault("lost_session", status=status))

    def begin() -> str:
        url = f"{server.url}/upload/storage/v1/b/runs/o?uploadType=resumable&name=a"
        return requests.post(url, json={}, timeout=5).headers["Location"]

    first = begin()
    answers = [requests.put(first, data=b"data", timeout=5).status_code for _ in range(2)]
    assert (answers, fault.fired) == ([status, 404], 1)
    assert server.unfinished_uploads() == []
    assert requests.put(begin(), data=b"data", timeout=5).status_code == 200
    assert server.read_object("runs", "a") == b"data"


def test_stall_ends_at_the_clients_timeout_or_when_released(
    server: FakeGcsServer, bucket: storage.Bucket
) -> None:
    data = noise(8 * QUANTUM)
    server.put_object("runs", "a", data)
    fault = server.add_fault(Fault("stall", times=None, after_bytes=1000, operation="object"))
    with pytest.raises(requests.exceptions.ConnectionError, match="Read timed out"):
        bucket.blob("a").download_as_bytes(**ONCE)
    assert fault.wait_fired(5)
    received: list[bytes] = []
    options = {"retry": None, "timeout": 10}
    thread = threading.Thread(
        target=lambda: received.append(bucket.blob("a").download_as_bytes(**options))
    )
    thread.start()
    assert fault.wait_fired(5, times=2)
    assert received == []
    fault.release()
    thread.join()
    assert received == [data]


def test_stalled_upload_is_taken_over_by_the_next_attempt(
    server: FakeGcsServer, bucket: storage.Bucket
) -> None:
    data = noise(6 * QUANTUM)
    fault = server.add_fault(Fault("stall", after_bytes=QUANTUM + 1, operation="upload.chunk"))
    upload(bucket.blob("a", chunk_size=8 * QUANTUM), data, timeout=(1, 0.3))
    fault.release()
    assert server.read_object("runs", "a") == data


def test_corrupted_bytes_are_noticed(server: FakeGcsServer, bucket: storage.Bucket) -> None:
    data = noise(QUANTUM * 2)
    server.put_object("runs", "a", data)
    server.add_fault(Fault("corrupt", after_bytes=QUANTUM))
    with pytest.raises(DataCorruption):
        bucket.blob("a").download_as_bytes(**FAST)
    server.add_fault(Fault("corrupt", after_bytes=QUANTUM, operation="upload"))
    with pytest.raises(exceptions.BadRequest, match="doesn't match calculated"):
        upload(bucket.blob("b"), data)
    assert server.list_objects("runs") == ["a"]


def test_slow_paces_the_body(server: FakeGcsServer, bucket: storage.Bucket) -> None:
    server.put_object("runs", "a", noise(20_000))
    server.add_fault(Fault("slow", bytes_per_second=50_000))
    started = time.monotonic()
    bucket.blob("a").download_as_bytes(**FAST)
    assert 0.35 < time.monotonic() - started < 2


def test_server_can_be_down_and_come_back(server: FakeGcsServer, bucket: storage.Bucket) -> None:
    upload(bucket.blob("a"), b"x")
    server.stop()
    with pytest.raises(requests.exceptions.ConnectionError):
        bucket.blob("a").reload(**ONCE)
    server.start()
    assert bucket.blob("a").download_as_bytes(**FAST) == b"x"


def test_stop_ends_stalled_requests(server: FakeGcsServer) -> None:
    fault = server.add_fault(Fault("stall", operation="object.list"))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", "/storage/v1/b/runs/o")
    assert fault.wait_fired(5)
    server.stop()
    connection.close()


def test_a_mistake_of_the_server_fails_the_test(tmp_path: Path) -> None:
    server = FakeGcsServer(tmp_path)
    server.start()
    server.create_bucket("runs")
    url = f"{server.url}/storage/v1/b/runs/o/a/compose"
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.post(url, json={"sourceObjects": [{"unnamed": 1}]}, timeout=5)
    with pytest.raises(RuntimeError, match="fake server failed"):
        server.__exit__(None)


# Pure logic.


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("delimiter", ["", "/"])
@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b/"])
def test_pages_join_to_the_whole_listing(size: int, delimiter: str, prefix: str) -> None:
    names = ["a", "a/", "a/b", "a/b/", "a/b/c", "a/b/d/e", "a/c", "ab", "b/1", "b/2"]
    whole = list_page(names, ListQuery(prefix, delimiter))
    token, found, prefixes = "", [], []
    while True:
        page = list_page(names, ListQuery(prefix, delimiter, page_token=token, max_results=size))
        assert len(page.names) + len(page.prefixes) <= size
        found += page.names
        prefixes += page.prefixes
        token = page.next_token
        if not token:
            break
    assert (found, prefixes) == (whole.names, whole.prefixes)
    listed = [name for name in names if name.startswith(prefix)]
    assert listed == [n for n in listed if n in found or n.startswith(tuple(prefixes) or "\0")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", None),
        ("items=0-1", None),
        ("bytes=0-0", (0, 1)),
        ("bytes=3-", (3, 7)),
        ("bytes=3-99", (3, 7)),
        ("bytes=-4", (6, 4)),
        ("bytes=-40", (0, 10)),
    ],
)
def test_ranges(value: str, expected: tuple[int, int] | None) -> None:
    assert parse_range(value, 10) == expected


@pytest.mark.parametrize(
    ("query", "existing", "reading", "status"),
    [
        ({}, None, False, None),
        ({"ifGenerationMatch": "0"}, None, False, None),
        ({"ifGenerationMatch": "0"}, (5, 1), False, 412),
        ({"ifGenerationMatch": "5"}, (5, 1), False, None),
        ({"ifGenerationMatch": "5"}, None, False, 412),
        ({"ifGenerationNotMatch": "5"}, (5, 1), False, 412),
        ({"ifGenerationNotMatch": "5"}, (5, 1), True, 304),
        ({"ifGenerationNotMatch": "0"}, None, False, 412),
        ({"ifMetagenerationMatch": "2"}, (5, 1), False, 412),
        ({"ifMetagenerationMatch": "1"}, (5, 1), False, None),
        ({"ifGenerationMatch": "x"}, None, False, 400),
    ],
)
def test_preconditions(
    query: dict[str, str], existing: tuple[int, int] | None, reading: bool, status: int | None
) -> None:
    try:
        Preconditions.from_query(query).check(existing, reading=reading)
        found = None
    except ApiError as error:
        found = error.status
    assert found == status


# The command-line tools.


def run_tool(
    server: FakeGcsServer, tmp_path: Path, *command: object, kill_at: Fault | None = None
) -> subprocess.CompletedProcess[str]:
    """Run gsutil or gcloud in a process group of its own, which is killed when a fault fires."""
    words = [str(word) for word in command]
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    if words[0] == "gsutil":
        environment = server.gsutil_environment(tmp_path)
    else:
        environment = server.gcloud_environment(tmp_path)
    with subprocess.Popen(  # noqa: S603 - fixed words, no shell
        words,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            if kill_at is not None and kill_at.wait_fired(60):
                os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[FakeGcsServer]:
    with FakeGcsServer(tmp_path / "tls-server", tls=True) as server:
        server.create_bucket("runs")
        yield server


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Large enough for gsutil (8 MiB) and gcloud (8 MiB) to upload it resumably."""
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(noise(9_000_000))
    return path


def test_both_ports_serve_the_same_objects(tls_server: FakeGcsServer) -> None:
    tls_server.put_object("runs", "a", b"x")
    path = "/storage/v1/b/runs/o/a?alt=media"
    url = f"https://127.0.0.1:{tls_server.tls_port}"
    with requests.Session() as session:
        session.trust_env = False
        secure = session.get(url + path, verify=str(tls_server.certificate), timeout=5)
        assert secure.content == session.get(tls_server.url + path, timeout=5).content == b"x"
        with pytest.raises(requests.exceptions.SSLError):
            session.get(url + path, timeout=5)


@pytest.mark.gsutil
@pytest.mark.parametrize("size", [0, 1000, 9_000_000])
def test_gsutil_round_trip(tls_server: FakeGcsServer, tmp_path: Path, size: int) -> None:
    source, target, uri = tmp_path / "source", tmp_path / "target", "gs://runs/dir/a"
    source.write_bytes(noise(size))
    up = run_tool(tls_server, tmp_path, "gsutil", "cp", source, uri)
    assert up.returncode == 0, up.stderr
    assert tls_server.read_object("runs", "dir/a") == source.read_bytes()
    down = run_tool(tls_server, tmp_path, "gsutil", "cp", uri, target)
    assert down.returncode == 0, down.stderr
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.gsutil
def test_gsutil_ls_stat_cat_rm(tls_server: FakeGcsServer, tmp_path: Path) -> None:
    for name in ("Checkpoints/a", "Checkpoints/b", "other"):
        tls_server.put_object("runs", name, name.encode())
    tls_server.settings.max_page_size = 1
    listed = run_tool(tls_server, tmp_path, "gsutil", "ls", "gs://runs")
    assert set(listed.stdout.split()) == {"gs://runs/other", "gs://runs/Checkpoints/"}
    stat = run_tool(tls_server, tmp_path, "gsutil", "stat", "gs://runs/other")
    stored = tls_server.get_object("runs", "other")
    assert stored.blob.crc32c in stat.stdout
    assert str(stored.generation) in stat.stdout
    missing = run_tool(tls_server, tmp_path, "gsutil", "-q", "stat", "gs://runs/missing")
    assert missing.returncode == 1
    cat = run_tool(tls_server, tmp_path, "gsutil", "cat", "gs://runs/other")
    assert cat.stdout == "other"
    removed = run_tool(tls_server, tmp_path, "gsutil", "rm", "-r", "gs://runs/Checkpoints")
    assert removed.returncode == 0, removed.stderr
    assert tls_server.list_objects("runs") == ["other"]


@pytest.mark.gsutil
def test_gsutil_parallel_composite_upload(
    tls_server: FakeGcsServer, tmp_path: Path, archive: Path
) -> None:
    command = ["gsutil", "-o", "GSUtil:parallel_composite_upload_threshold=2M"]
    command += ["-o", "GSUtil:parallel_composite_upload_component_size=2M", "cp", str(archive)]
    done = run_tool(tls_server, tmp_path, *command, "gs://runs/a")
    assert done.returncode == 0, done.stderr
    assert tls_server.list_objects("runs") == ["a"]
    stored = tls_server.get_object("runs", "a")
    assert (stored.component_count, stored.blob.md5) == (5, None)
    assert tls_server.read_object("runs", "a") == archive.read_bytes()

    fault = tls_server.add_fault(Fault("stall", operation="object.compose"))
    killed = run_tool(tls_server, tmp_path, *command, "gs://runs/b", kill_at=fault)
    assert killed.returncode == -signal.SIGKILL
    names = tls_server.list_objects("runs")
    assert len([name for name in names if "/gsutil/tmp/" in name]) == 5
    assert "b" not in names


@pytest.mark.gsutil
def test_gsutil_precondition(tls_server: FakeGcsServer, tmp_path: Path, archive: Path) -> None:
    command = ["gsutil", "-h", "x-goog-if-generation-match:0", "cp", archive, "gs://runs/a"]
    assert run_tool(tls_server, tmp_path, *command).returncode == 0
    again = run_tool(tls_server, tmp_path, *command)
    assert again.returncode == 1
    assert "412" in again.stderr


@pytest.mark.gsutil
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "status", "times": 2, "operation": "upload.chunk"},
        {"kind": "status", "status": 429, "retry_after": 1},
        {"kind": "reset", "after_bytes": 5_000_000},
        {"kind": "lost_answer"},
        {"kind": "slow", "bytes_per_second": 9_000_000},
    ],
    ids=["503 twice", "429", "reset", "lost answer", "slow"],
)
def test_gsutil_upload_survives(
    tls_server: FakeGcsServer, tmp_path: Path, archive: Path, options: dict[str, Any]
) -> None:
    fault = tls_server.add_fault(Fault(**{"operation": "upload", **options}))
    done = run_tool(tls_server, tmp_path, "gsutil", "cp", archive, "gs://runs/a")
    assert done.returncode == 0, done.stderr
    assert fault.fired == fault.times
    assert tls_server.read_object("runs", "a") == archive.read_bytes()


@pytest.mark.gsutil
def test_gsutil_notices_corrupted_content(
    tls_server: FakeGcsServer, tmp_path: Path, archive: Path
) -> None:
    tls_server.add_fault(Fault("corrupt", after_bytes=5_000_000, operation="upload"))
    up = run_tool(tls_server, tmp_path, "gsutil", "cp", archive, "gs://runs/a")
    assert "HashMismatchException" in up.stderr
    assert tls_server.list_objects("runs") == []  # gsutil deletes it
    tls_server.put_object("runs", "a", archive.read_bytes())
    tls_server.add_fault(Fault("corrupt", after_bytes=10, operation="object.download"))
    down = run_tool(tls_server, tmp_path, "gsutil", "cp", "gs://runs/a", tmp_path / "target")
    assert "HashMismatchException" in down.stderr
    assert not (tmp_path / "target").exists()


@pytest.mark.gsutil
def test_gsutil_fails_at_once_without_permission_or_bucket(
    tls_server: FakeGcsServer, tmp_path: Path, archive: Path
) -> None:
    tls_server.create_bucket("public", writable=False)
    refused = run_tool(tls_server, tmp_path, "gsutil", "cp", archive, "gs://public/a")
    assert refused.returncode == 1
    assert len(tls_server.requests("upload")) == 1
    absent = run_tool(tls_server, tmp_path, "gsutil", "cp", archive, "gs://absent/a")
    assert "BucketNotFoundException: 404" in absent.stderr


@pytest.mark.gsutil
def test_killed_gsutil_leaves_no_object_and_goes_on_next_time(
    tls_server: FakeGcsServer, tmp_path: Path, archive: Path
) -> None:
    fault = tls_server.add_fault(Fault("stall", after_bytes=5_000_000, operation="upload"))
    command = ["gsutil", "cp", archive, "gs://runs/a"]
    killed = run_tool(tls_server, tmp_path, *command, kill_at=fault)
    assert killed.returncode == -signal.SIGKILL
    assert (tls_server.list_objects("runs"), tls_server.unfinished_uploads()) == ([], ["a"])
    tls_server.clear_requests()
    assert run_tool(tls_server, tmp_path, *command).returncode == 0
    assert tls_server.requests("upload.start") == []
    assert tls_server.requests("upload.chunk")[-1].request_bytes < 9_000_000
    assert tls_server.read_object("runs", "a") == archive.read_bytes()


@pytest.mark.gsutil
def test_gcloud_storage_round_trip(
    tls_server: FakeGcsServer, tmp_path: Path, archive: Path
) -> None:
    def gcloud(*words: object) -> subprocess.CompletedProcess[str]:
        return run_tool(tls_server, tmp_path, "gcloud", "storage", *words)

    tls_server.add_fault(Fault("reset", after_bytes=5_000_000, operation="upload"))
    up = gcloud("cp", archive, "gs://runs/dir/a")
    assert up.returncode == 0, up.stderr
    assert tls_server.read_object("runs", "dir/a") == archive.read_bytes()
    assert gcloud("ls", "gs://runs/**").stdout.split() == ["gs://runs/dir/a"]
    down = gcloud("cp", "gs://runs/dir/a", tmp_path / "target")
    assert down.returncode == 0, down.stderr
    assert (tmp_path / "target").read_bytes() == archive.read_bytes()
    assert gcloud("rm", "gs://runs/dir/a").returncode == 0
    assert tls_server.list_objects("runs") == []
