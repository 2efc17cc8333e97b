"""The notice of a preemption arrives once; whatever else the server does disturbs nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from utils.training import preemption
from utils.training.preemption import NOTICE, PreemptionWatch, metadata_address

Answer = Callable[["Handler"], None]
PATIENCE_SECONDS = 60


class Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_GET(self) -> None:
        self.server.requests.append(self)
        self.server.asked.set()
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        answer(self)

    def log_message(self, *arguments: object) -> None:
        pass


class MetadataServer(ThreadingHTTPServer):
    """Gives the answers in turn, the last one for ever."""

    daemon_threads = True

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = list(answers)
        self.requests: list[Handler] = []
        self.asked = threading.Event()
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
        handler.send_header("Content-Length", str(len(value)))
        handler.end_headers()
        handler.wfile.write(value.encode())

    return answer


def hang(handler: Handler) -> None:
    handler.server.released.wait(PATIENCE_SECONDS)


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


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "QUESTION_SECONDS", 0.005)


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


def watching_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "preemption"]


def test_the_value_is_asked_for_until_it_is_the_notice_and_then_no_more(serve: Serve) -> None:
    server, notices = serve(say("FALSE"), say("FALSE"), say("TRUE")), Notices()
    with PreemptionWatch(notices, server.address):
        assert notices.came.wait(PATIENCE_SECONDS)
        for thread in watching_threads():
            thread.join(PATIENCE_SECONDS)
    assert notices.reasons == [NOTICE]
    assert [request.path for request in server.requests] == [preemption.PREEMPTED_PATH] * 3
    assert {request.headers["Metadata-Flavor"] for request in server.requests} == {"Google"}


FAULTS: dict[str, Answer] = {
    "404": say("TRUE", status=404),
    "another flavor": say("TRUE", flavor="Other"),
    "no flavor": say("TRUE", flavor=None),
    "empty": say(""),
    "cut off": cut_off,
    "no HTTP": speak_no_http,
    "hangs": hang,
    "hangs in the body": hang_in_the_body,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_answer_of_a_metadata_server_is_no_notice_and_is_asked_again(
    serve: Serve, fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "hangs" in fault:
        monkeypatch.setattr(preemption, "ANSWER_SECONDS", 0.2)
    server, notices = serve(FAULTS[fault], FAULTS[fault], say("TRUE")), Notices()
    with PreemptionWatch(notices, server.address):
        assert notices.came.wait(PATIENCE_SECONDS)
    assert notices.reasons == [NOTICE]
    assert len(server.requests) >= 3
    assert [record.message for record in caplog.records] == ["This machine is being preempted."]


def test_between_two_questions_is_a_pause_which_the_end_cuts_short(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "QUESTION_SECONDS", 1e6)
    monkeypatch.setattr(preemption, "ANSWER_SECONDS", PATIENCE_SECONDS)
    server = serve(say("FALSE"))
    with PreemptionWatch(Notices(), server.address):
        assert server.asked.wait(PATIENCE_SECONDS)
    assert watching_threads() == []
    assert len(server.requests) == 1


def test_an_address_that_cannot_be_disturbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = threading.Event()
    watched = PreemptionWatch(Notices(), "127.0.0.1:no-port")
    monkeypatch.setattr(watched._closing, "wait", lambda seconds: paused.set())
    with watched:
        assert paused.wait(PATIENCE_SECONDS)


def test_without_an_address_there_is_no_thread() -> None:
    with PreemptionWatch(Notices(), None):
        assert watching_threads() == []


@pytest.mark.parametrize(
    ("variable", "product", "expected"),
    [
        (None, None, None),
        (None, "Google Compute Engine\n", "169.254.169.254"),
        (None, "Google\n", None),
        ("127.0.0.1:8080", None, "127.0.0.1:8080"),
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
