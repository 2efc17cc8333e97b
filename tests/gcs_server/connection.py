"""One client connection: HTTP/1.1 in and out, with connections that end as faults demand."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from .blobs import BLOCK_BYTES
from .errors import ConnectionCut
from .faults import Gate
from .messages import RequestBody, Response, build_request
from .service import Exchange

if TYPE_CHECKING:
    from .listener import Listener

logger = logging.getLogger(__name__)
REASON_308 = "Resume Incomplete"


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
        request = build_request(
            self.command, self.path, self.headers, body, f"{self.server.scheme}://{host}"
        )
        exchange = None
        try:
            exchange = self.server.service.begin(request)
            self._send(exchange, self.server.service.answer(exchange))
        except ConnectionCut as cut:
            self._cut(cut)
        finally:
            if exchange is not None:
                self.server.service.log.finish(exchange.record)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = serve  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        logger.debug(format, *args)

    def _send(self, exchange: Exchange, response: Response) -> None:
        exchange.record.status = response.status
        # Body faults count the bytes of one body: the request's, if it has one.
        gate = None if exchange.request.body.length else Gate(exchange.faults)
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
