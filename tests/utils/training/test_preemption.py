"""The notice of a preemption arrives once; whatever else the server does disturbs nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from utils.training import preemption
from utils.training.preemption import NOTICE, PreemptionWatch, metadata_address

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_GET(self) -> None:
        self.server.requests.append(self)
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        answer(self)

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    def log_message(self, *arguments: object) -> None:
        pass


class MetadataServer(ThreadingHTTPServer):
    """Gives the answers in turn, the last one for ever."""

    daemon_threads = True

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = list(answers)
        self.requests: list[Handler] = []
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that has left


def say(value: str, *, status: int = 200, flavor: str | None = "Google") -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(status)
        if flavor is not None:
            handler.send_header("Metadata-Flavor", flavor)
        handler.send_header("ETag", f"tag-of-{value}")
        handler.send_header("Content-Length", str(len(value)))
        handler.end_headers()
        handler.wfile.write(value.encode())

    return answer


def hang(handler: Handler) -> None:
    handler.server.released.wait(60)


def hang_in_the_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "4")
    handler.end_headers()
    handler.wfile.write(b"TR")
    hang(handler)


def cut_off(handler: Handler) -> None:
    handler.connection.close()


def speak_no_http(handler: Handler) -> None:
    handler.wfile.write(b"hello\r\n\r\n")


Serve = Callable[..., MetadataServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[MetadataServer] = []

    def start(*answers: Answer) -> MetadataServer:
        server = MetadataServer(answers)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        return server

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


class Notices:
    """Collects what the watch says."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.came = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.came.set()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def watch(notices: Notices, address: str | None, poll_seconds: float = 5.0) -> PreemptionWatch:
    return PreemptionWatch(notices, address, poll_seconds=poll_seconds, first_retry_seconds=0.005)


def watching_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "preemption"]


def test_a_value_that_changes_is_the_notice_and_the_request_asks_for_the_change(
    serve: Serve,
) -> None:
    changes = threading.Event()

    def change(handler: Handler) -> None:
        changes.wait(10)
        say("TRUE")(handler)

    server, notices = serve(say("FALSE"), say("FALSE"), change), Notices()
    with watch(notices, server.address):
        wait_until(lambda: len(server.requests) == 3)
        assert notices.reasons == []
        changes.set()
        assert notices.came.wait(10)
    assert notices.reasons == [NOTICE]
    first, second, third = server.requests
    assert urlsplit(first.path).path == "/computeMetadata/v1/instance/preempted"
    assert first.query == {}  # what holds already is said at once
    expected = {"wait_for_change": ["true"], "timeout_sec": ["5"], "last_etag": ["tag-of-FALSE"]}
    assert second.query == third.query == expected
    assert {request.headers["Metadata-Flavor"] for request in server.requests} == {"Google"}


def test_a_machine_that_is_being_preempted_already_says_so_once(serve: Serve) -> None:
    server, notices = serve(say("TRUE")), Notices()
    with watch(notices, server.address):
        assert notices.came.wait(10)
        for thread in watching_threads():
            thread.join(10)
    assert notices.reasons == [NOTICE]
    assert len(server.requests) == 1


FAULTS: dict[str, Answer] = {
    "404": say("TRUE", status=404),
    "503": say("TRUE", status=503),
    "redirect": say("TRUE", status=302),
    "another flavor": say("TRUE", flavor="Other"),
    "no flavor": say("TRUE", flavor=None),
    "empty": say(""),
    "another value": say("TRUE or not"),
    "cut off": cut_off,
    "no HTTP": speak_no_http,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_is_no_answer_of_a_metadata_server_is_no_notice_and_is_asked_again(
    serve: Serve, fault: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    server, notices = serve(fault, fault, fault, say("TRUE")), Notices()
    with watch(notices, server.address):
        assert notices.came.wait(10)
    assert notices.reasons == [NOTICE]
    assert len(server.requests) == 4
    assert [record.message for record in caplog.records] == ["This machine is being preempted."]


def test_an_answer_may_take_longer_than_a_connection(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "CONNECT_SECONDS", 0.05)

    def say_late(handler: Handler) -> None:
        time.sleep(0.15)
        say("TRUE")(handler)

    server, notices = serve(say_late), Notices()
    with watch(notices, server.address):
        assert notices.came.wait(10)
    assert len(server.requests) == 1


def test_a_request_that_hangs_is_given_up_and_made_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "MARGIN_SECONDS", 0.05)
    server, notices = serve(hang, hang_in_the_body, say("TRUE")), Notices()
    with watch(notices, server.address, poll_seconds=0.0):
        assert notices.came.wait(10)
    assert len(server.requests) == 3


def test_a_refused_connection_is_tried_again_with_growing_pauses(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, notices = serve(say("TRUE")), Notices()
    address = server.address
    server.shutdown()
    server.server_close()
    pauses: list[float] = []
    watched = PreemptionWatch(notices, address)
    monkeypatch.setattr(watched._closing, "wait", pauses.append)
    with watched:
        wait_until(lambda: len(pauses) >= 6)
    assert pauses[:6] == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0]
    assert notices.reasons == []


def test_a_server_that_answers_at_once_is_not_asked_without_a_pause(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, notices = serve(say("FALSE")), Notices()
    watched = PreemptionWatch(notices, server.address, first_retry_seconds=30)
    pauses: list[float] = []
    monkeypatch.setattr(watched._closing, "wait", pauses.append)
    with watched:
        wait_until(lambda: len(pauses) >= 3)
    assert all(25 < pause <= 30 for pause in pauses)


@pytest.mark.parametrize("answer", [hang, hang_in_the_body])
def test_closing_does_not_wait_for_a_server_that_hangs(serve: Serve, answer: Answer) -> None:
    server, notices = serve(say("FALSE"), answer), Notices()
    watched = watch(notices, server.address, poll_seconds=60)
    with watched:
        wait_until(lambda: len(server.requests) == 2)
        started = time.monotonic()
    assert time.monotonic() - started < 0.9
    assert watching_threads() == []
    watched.close()  # again: nothing


def test_closing_does_not_wait_for_the_next_attempt(serve: Serve) -> None:
    server = serve(say("FALSE", status=503))
    with PreemptionWatch(Notices(), server.address, first_retry_seconds=60):
        wait_until(lambda: bool(server.requests))
        started = time.monotonic()
    assert time.monotonic() - started < 0.9
    assert watching_threads() == []


def test_proxies_are_not_used(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server, proxy, notices = serve(say("TRUE")), serve(say("FALSE")), Notices()
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, f"http://{proxy.address}")
    with watch(notices, server.address):
        assert notices.came.wait(10)
    assert proxy.requests == []


@pytest.mark.parametrize("address", ["127.0.0.1:no-port", "a" * 300])
def test_an_address_that_cannot_be_disturbs_nothing(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    pauses: list[float] = []
    watched = PreemptionWatch(Notices(), address)
    monkeypatch.setattr(watched._closing, "wait", pauses.append)
    with watched:
        wait_until(lambda: len(pauses) >= 2)
    assert watching_threads() == []


def test_without_an_address_there_is_no_thread() -> None:
    with watch(Notices(), None):
        assert watching_threads() == []


@pytest.mark.parametrize(
    ("variable", "product", "expected"),
    [
        (None, None, None),
        (None, "PowerEdge R740\n", None),
        (None, "Google Compute Engine\n", "169.254.169.254"),
        (None, "Google\n", None),
        ("127.0.0.1:8080", None, "127.0.0.1:8080"),
        ("metadata.test", "Google Compute Engine\n", "metadata.test"),
        ("", "PowerEdge R740\n", None),
    ],
)
def test_only_such_a_machine_or_the_variable_has_an_address(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    product: str | None,
    expected: str | None,
) -> None:
    file = tmp_path / "product_name"
    if product is not None:
        file.write_text(product, "utf-8")
    monkeypatch.setattr(preemption, "PRODUCT_NAME_FILE", file)
    monkeypatch.delenv(preemption.HOST_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(preemption.HOST_VARIABLE, variable)
    assert metadata_address() == expected
