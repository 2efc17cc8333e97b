"""The listening socket, plain or TLS, its connections, and HTTP/1.1 in and out of them.

Connections end as faults demand.
"""

from __future__ import annotations

import logging
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qsl

from .errors import ConnectionCut
from .faults import Gate
from .messages import Request, RequestBody, Response
from .service import Exchange, Service
from .store import BLOCK_BYTES

logger = logging.getLogger(__name__)
REASON_308 = "Resume Incomplete"


class Listener(ThreadingHTTPServer):
    """Accepts connections on 127.0.0.1 and serves each in a thread that `stop` waits for."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 64

    def __init__(self, service: Service, port: int, tls: ssl.SSLContext | None) -> None:
        """Bind the port (0: any free one); `tls` makes it an HTTPS port."""
        self.service = service
        self.scheme = "https" if tls else "http"
        self._tls = tls
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._no_shutdown: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Connection)
        self._thread = threading.Thread(target=self._run, name=f"fake-gcs-{self.scheme}")

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.socket.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            _shut_down(connection)
        self.server_close()

    def server_bind(self) -> None:
        """Bind without the base's look-up of the host's name, which can hang without DNS."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.port

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; the TLS handshake is left to the connection's thread."""
        connection, address = super().get_request()
        if self._tls is not None:
            connection = self._tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        with self._lock:
            self._connections.add(connection)
        return connection, address

    def skip_shutdown(self, connection: socket.socket) -> None:
        """Close this connection with nothing before, so that SO_LINGER 0 sends a reset."""
        with self._lock:
            self._no_shutdown.add(connection)

    def shutdown_request(self, request: Any) -> None:
        """End a connection, in order or with a reset."""
        with self._lock:
            self._connections.discard(request)
            in_order = request not in self._no_shutdown
            self._no_shutdown.discard(request)
        if in_order:
            _shut_down(request)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what is a mistake of the server; clients that die are part of the tests."""
        error = sys.exc_info()[1]
        logger.debug("error in a connection from %s: %r", client_address, error)
        if error is not None and not isinstance(error, OSError):
            self.service.failures.append(error)

    def _run(self) -> None:
        self.serve_forever(poll_interval=0.05)


def _shut_down(connection: socket.socket) -> None:
    try:
        # The plain socket's own, because an SSLSocket would forget its TLS state under a reader.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        logger.debug("the connection is gone")


class Connection(BaseHTTPRequestHandler):
    """Serves the requests of a connection one after the other."""

    protocol_version = "HTTP/1.1"
    server_version = "FakeGcs"
    disable_nagle_algorithm = True
    server: Listener

    def setup(self) -> None:
        """Finish the TLS handshake here, in the connection's own thread."""
        handshake = getattr(self.request, "do_handshake", None)
        if handshake is not None:
            handshake()
        super().setup()

    def serve(self) -> None:
        """Serve one request of any method."""
        if self.headers.get("Transfer-Encoding"):
            self.send_error(411, "This server wants a Content-Length")
            self.close_connection = True
            return
        host = self.headers.get("Host", f"127.0.0.1:{self.server.port}")
        body = RequestBody(self.rfile, int(self.headers.get("Content-Length", 0)))
        path, _, query = self.path.partition("?")
        values = dict(parse_qsl(query, keep_blank_values=True))
        url = f"{self.server.scheme}://{host}"
        request = Request(self.command, path, values, self.headers, body, url)
        exchange = None
        try:
            exchange = self.server.service.begin(request)
            self._send(exchange, self.server.service.answer(exchange))
        except ConnectionCut as cut:
            self._cut(cut)
        finally:
            if exchange is not None:
                exchange.record.finished = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = serve  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        logger.debug(format, *args)

    def _send(self, exchange: Exchange, response: Response) -> None:
        exchange.record.status = response.status
        # Body faults count the bytes of one body: the request's, if it has one.
        gate = None if exchange.call.request.body.length else Gate(exchange.faults)
        try:
            self.send_response(response.status, REASON_308 if response.status == 308 else None)
            for key, value in response.headers.items():
                self.send_header(key, value)
            if response.status not in (204, 304):
                self.send_header("Content-Length", str(response.length))
            self.end_headers()
            if self.command == "HEAD":
                return
            for block in _body_blocks(response, gate):
                exchange.record.response_bytes += len(block)
                self.wfile.write(block)
        except OSError as exc:
            raise ConnectionCut(f"the client went away: {exc}") from exc
        finally:
            response.close()

    def _cut(self, cut: ConnectionCut) -> None:
        logger.debug("connection cut: %s", cut)
        self.close_connection = True
        if cut.reset:
            linger_zero = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_zero)
            self.server.skip_shutdown(self.connection)


def _body_blocks(response: Response, gate: Gate | None) -> Iterator[bytes]:
    """The body of an answer, through the gate, which is asked for an empty body too."""
    body, sent = response.body, 0
    if not isinstance(body, bytes):
        body.file.seek(body.start)
    while True:
        size = gate.allowance(BLOCK_BYTES) if gate else BLOCK_BYTES
        size = min(size, response.length - sent)
        if not size:
            return
        data = body[sent : sent + size] if isinstance(body, bytes) else body.file.read(size)
        if not data:
            raise ConnectionCut("the file of the object is shorter than its size")
        sent += len(data)
        yield gate.passed(data) if gate else data
