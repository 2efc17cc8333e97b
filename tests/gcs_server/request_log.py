"""What was asked of the server, for tests to look at."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class RequestRecord:
    """One request; filled in while it is served, complete when `finished` is set."""

    operation: str
    """The server's name for what was asked: upload.start, object.get, ...; see `routes`."""
    name: str
    headers: dict[str, str]
    status: int | None = None
    """None while none was sent, which stays so when the connection was cut before."""
    request_bytes: int = 0
    """Body bytes received."""
    response_bytes: int = 0
    """Body bytes sent."""
    faults: list[str] = field(default_factory=list)
    """The kinds of the faults that fired."""
    finished: bool = False


class RequestLog:
    """All requests in the order of their arrival; safe to use from many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._records: list[RequestRecord] = []

    def add(self, record: RequestRecord) -> None:
        with self._changed:
            self._records.append(record)
            self._changed.notify_all()

    def finish(self, record: RequestRecord) -> None:
        with self._changed:
            record.finished = True
            self._changed.notify_all()

    def records(self) -> list[RequestRecord]:
        with self._changed:
            return list(self._records)

    def clear(self) -> None:
        with self._changed:
            self._records.clear()

    def wait_for(
        self, predicate: Callable[[RequestRecord], bool], timeout_seconds: float
    ) -> RequestRecord | None:
        """Wait for a request of which the predicate is true; None when the time is over."""

        def find() -> RequestRecord | None:
            return next((record for record in self._records if predicate(record)), None)

        with self._changed:
            return self._changed.wait_for(find, timeout_seconds)
