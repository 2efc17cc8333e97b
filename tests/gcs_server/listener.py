"""The listening socket, plain or TLS, and the threads of its connections."""

from __future__ import annotations

import logging
import socket
import ssl
import sys
import threading
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from .connection import Connection
from .service import Service

logger = logging.getLogger(__name__)


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
