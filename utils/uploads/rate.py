"""How fast a bucket takes bytes: a short upload, timed before a run begins. No torch here."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from dataclasses import replace

from utils.base.errors import StorageError
from utils.uploads.transport_choice import open_transport
from utils.uploads.transports import Transport, TransportOptions, put_bytes

TRY_BYTES = (2**20, 12 * 2**20)
ENOUGH_SECONDS = 1.0

log = logging.getLogger(__name__)


def measure_upload_rate(options: TransportOptions, folder: str) -> float | None:
    """Return the bytes a second that a transport reaches; None where that cannot be measured.

    A small object first, and a larger one where that was quick; the time of a small request is
    taken off. Both are removed again.
    """
    name = f"{folder}/.probe-{secrets.token_hex(4)}"
    try:
        # The run's own directory is not there before it begins, and not made by a dry run.
        with contextlib.closing(open_transport(replace(options, scratch=None))) as transport:
            try:
                return _measure(transport, name)
            finally:
                with contextlib.suppress(StorageError):
                    transport.delete(name)
                    transport.remove_unfinished(folder, only=name)
    except StorageError as exc:
        log.debug("The rate of uploads cannot be measured: %s", exc)
        return None


def _measure(transport: Transport, name: str) -> float:
    overhead = _put(transport, name, 1)
    rate = 0.0
    for size in TRY_BYTES:
        seconds = _put(transport, name, size)
        # The request's own time is at most what a single byte took, and never all of it.
        rate = size / max(seconds - overhead, seconds / 10)
        if seconds >= ENOUGH_SECONDS + overhead:
            break
    return rate


def _put(transport: Transport, name: str, size: int) -> float:
    data, expected = secrets.token_bytes(size), transport.stat(name)
    begin = time.perf_counter()
    put_bytes(transport, name, data, expected)
    return time.perf_counter() - begin
