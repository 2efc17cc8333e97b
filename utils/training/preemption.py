"""The notice that a Google Compute Engine machine gives before it takes itself away.

    metadata server -> preemption notice -> stop request

A Spot VM has about 30 s from the notice to its end. The machine's metadata server holds
`instance/preempted` (FALSE, then TRUE) and is asked once a second; 503 is normal while the host is
maintained. https://cloud.google.com/compute/docs/metadata/querying-metadata

Nothing connects to anywhere but on such a machine, or where GCE_METADATA_HOST names a server. What
goes wrong here never disturbs the run. No torch here.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

HOST_VARIABLE = "GCE_METADATA_HOST"  # google-auth honours it too
METADATA_ADDRESS = "169.254.169.254"  # not the name: nothing is resolved where it is unknown
PRODUCT_NAME_FILE = Path("/sys/class/dmi/id/product_name")
PRODUCT_NAME = "Google Compute Engine"

PREEMPTED_PATH = "/computeMetadata/v1/instance/preempted"
FLAVOR_HEADER, FLAVOR = "Metadata-Flavor", "Google"
NOTICE = "preemption notice"

QUESTION_SECONDS = 1.0
ANSWER_SECONDS = 2.0

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

    `on_notice` is called once, in that thread, with the reason for a stop. Without an `address`
    nothing is watched.
    """

    def __init__(self, on_notice: Callable[[str], None], address: str | None) -> None:
        self._on_notice, self._address = on_notice, address
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PreemptionWatch:
        """Begin to watch."""
        if self._address is not None:
            self._thread = threading.Thread(
                target=self._watch, args=[self._address], name="preemption", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop watching; a server that does not answer is not waited for any longer than before."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(ANSWER_SECONDS)

    def _watch(self, address: str) -> None:
        while not self._closing.is_set():
            try:
                is_preempted = _ask(address)
            except (OSError, http.client.HTTPException, ValueError) as exc:
                log.debug("The metadata server does not answer as expected: %r", exc)
            else:
                if is_preempted:
                    log.warning("This machine is being preempted.")
                    self._on_notice(NOTICE)
                    return
            self._closing.wait(QUESTION_SECONDS)


def _ask(address: str) -> bool:
    """Return whether the server says TRUE."""
    # http.client knows of no proxies.
    with contextlib.closing(http.client.HTTPConnection(address, timeout=ANSWER_SECONDS)) as server:
        server.request("GET", PREEMPTED_PATH, headers={FLAVOR_HEADER: FLAVOR})
        response = server.getresponse()
        value = response.read(64).strip().upper()
    if response.status != http.client.OK or response.headers.get(FLAVOR_HEADER) != FLAVOR:
        raise http.client.HTTPException(f"status {response.status}, {value!r}")
    return value == b"TRUE"
