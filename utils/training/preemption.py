"""The notice that a Google Compute Engine machine gives before it takes itself away.

    metadata server -> preemption notice -> stop request

A Spot VM has about 30 s from the notice to its end. The machine's metadata server holds
`instance/preempted` (FALSE, then TRUE) and keeps a request with `wait_for_change` open until the
value differs from the one with `last_etag`, or until `timeout_sec` is over; 503 is normal while the
host is maintained. https://cloud.google.com/compute/docs/metadata/querying-metadata

Nothing connects to anywhere but on such a machine, or where GCE_METADATA_HOST names a server. What
goes wrong here never disturbs the run. No torch here.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from utils.base.retrying import FIRST_RETRY_SECONDS, backoff

HOST_VARIABLE = "GCE_METADATA_HOST"  # google-auth honours it too
METADATA_ADDRESS = "169.254.169.254"  # not the name: nothing is resolved where it is unknown
PRODUCT_NAME_FILE = Path("/sys/class/dmi/id/product_name")
PRODUCT_NAME = "Google Compute Engine"

PREEMPTED_PATH = "/computeMetadata/v1/instance/preempted"
FLAVOR_HEADER, FLAVOR = "Metadata-Flavor", "Google"
NOTICE = "preemption notice"

CONNECT_SECONDS = 2.0
_POLL_SECONDS = 10.0  # short: a connection that died unseen must not cost all of the 30 s
MARGIN_SECONDS = 5.0
_LONGEST_RETRY_SECONDS = 5.0  # a notice is worth little after that
_CLOSE_SECONDS = 1.0

log = logging.getLogger(__name__)


def metadata_address() -> str | None:
    """Return `host` or `host:port` of this machine's metadata server; None where it has none."""
    named = os.environ.get(HOST_VARIABLE)
    if named:
        return named
    try:
        product = PRODUCT_NAME_FILE.read_text("utf-8", errors="replace")
    except OSError:
        return None
    return METADATA_ADDRESS if PRODUCT_NAME in product else None


class PreemptionWatch:
    """Waits for the notice in a thread, while it is entered.

    Args:
        on_notice: Called once, in that thread, with the reason for a stop.
        address: What `metadata_address` returns; None for no watch at all.
        poll_seconds: How long the server may keep one request open.
        first_retry_seconds: Wait after the first error, doubled up to 5 s; also the least time
            between two requests.
    """

    def __init__(
        self,
        on_notice: Callable[[str], None],
        address: str | None,
        *,
        poll_seconds: float = _POLL_SECONDS,
        first_retry_seconds: float = FIRST_RETRY_SECONDS,
    ) -> None:
        self._on_notice, self._address = on_notice, address
        self._poll_seconds, self._first_retry = poll_seconds, first_retry_seconds
        self._etag: str | None = None
        self._socket: socket.socket | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PreemptionWatch:
        """Begin to watch."""
        if self._address is not None:
            self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching."""
        self.close()

    def close(self) -> None:
        """Stop watching; returns within about 1 s, whatever the server does."""
        with self._lock:
            self._closing.set()
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)  # ends a read in the thread
        if self._thread is not None:
            # A name that is being resolved cannot be interrupted; the thread ends after it.
            self._thread.join(_CLOSE_SECONDS)

    def _watch(self) -> None:
        delays = self._delays()
        while not self._closing.is_set():
            started = time.monotonic()
            try:
                preempted = self._ask()
            except (OSError, http.client.HTTPException, ValueError) as exc:
                log.debug("The metadata server does not answer as expected: %r", exc)
                self._closing.wait(next(delays))
                continue
            if preempted:
                log.warning("This machine is being preempted.")
                self._on_notice(NOTICE)
                return
            delays = self._delays()
            # A server that does not know wait_for_change answers at once, for ever.
            self._closing.wait(started + self._first_retry - time.monotonic())

    def _delays(self) -> Iterator[float]:
        return backoff(
            self._first_retry, longest_seconds=max(_LONGEST_RETRY_SECONDS, self._first_retry)
        )

    def _ask(self) -> bool:
        """Return whether the server says TRUE, now at the first time, then as soon as it does."""
        assert self._address is not None
        query = ""
        if self._etag is not None:
            # The value that the tag stands for is known: no change between two requests is missed.
            fields = {
                "wait_for_change": "true",
                "timeout_sec": f"{self._poll_seconds:.0f}",
                "last_etag": self._etag,
            }
            query = "?" + urllib.parse.urlencode(fields)
        # http.client knows of no proxies.
        connection = http.client.HTTPConnection(self._address, timeout=CONNECT_SECONDS)
        with contextlib.closing(connection):
            connection.connect()
            self._hold(connection.sock)
            try:
                connection.request("GET", PREEMPTED_PATH + query, headers={FLAVOR_HEADER: FLAVOR})
                response = connection.getresponse()
                value = response.read(64).strip().upper()
            finally:
                self._hold(None)
        if response.status != http.client.OK or response.headers.get(FLAVOR_HEADER) != FLAVOR:
            raise http.client.HTTPException(f"status {response.status}, {value!r}")
        self._etag = response.headers.get("ETag", "0")
        return value == b"TRUE"

    def _hold(self, connected: socket.socket | None) -> None:
        """Let `close` reach the socket while the thread reads from it."""
        with self._lock:
            self._socket = connected
            if connected is not None:
                if self._closing.is_set():
                    raise OSError("closing")
                connected.settimeout(self._poll_seconds + MARGIN_SECONDS)
