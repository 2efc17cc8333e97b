"""Scripted faults: which requests go wrong, in which way, and how often.

    status       answer with `status` (503, 429, 401, 403, 404, ...) in place of the real answer;
                 the request body is read to its end first
    reset        TCP reset after `after_bytes` body bytes
    truncate     orderly close after `after_bytes` body bytes
    stall        nothing moves after `after_bytes` body bytes until `release()`
    slow         from `after_bytes` on, `bytes_per_second`
    corrupt      one bit of the byte at `after_bytes` is flipped
    lost_answer  the change is made, then the connection is closed without an answer; fires only
                 on requests that create, change or delete an object
    lost_session the session of a resumable upload is dropped and its request answered with `status`
                 (404 or 410), which later requests to that session get as 404; fires only on those
                 of a session that has begun

"Body bytes" are those of the request's body when it has one, else those of the answer's. These
faults hit the content of objects on its way, up or down, and leave other requests alone (the
start of an upload, a listing) unless `operation` names one of those exactly.

A fault is counted when it fires: `times=2` means it fires twice (None: for ever), and a body of
fewer than `after_bytes` bytes passes unharmed and uncounted. A test can wait until it has `fired`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from .errors import ConnectionCut

Kind = Literal[
    "status", "reset", "truncate", "stall", "slow", "corrupt", "lost_answer", "lost_session"
]
CONTENT_OPERATIONS = frozenset({"upload.multipart", "upload.chunk", "object.download"})
SESSION_OPERATIONS = frozenset({"upload.chunk", "upload.query"})
BODY_KINDS = frozenset({"reset", "truncate", "stall", "slow", "corrupt"})


@dataclass(eq=False)
class Fault:
    """One scripted fault; see the module for the kinds. Patterns are those of `fnmatch`."""

    kind: Kind
    times: int | None = 1
    """How often it fires; None: for ever."""
    operation: str = "*"
    """A pattern, or the first word of a name: "upload" matches "upload.start" too."""
    name: str = "*"
    """A pattern for the object's name; * crosses slashes."""
    skip: int = 0
    """How many matching requests pass first."""
    status: int = 503
    after_bytes: int = 0
    bytes_per_second: int = 64 * 1024
    fired: int = field(default=0, init=False)
    _seen: int = field(default=0, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _released: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def matches(self, operation: str, name: str) -> bool:
        """Whether the fault may hit such a request."""
        return self._matches_operation(operation) and fnmatchcase(name, self.name)

    def release(self) -> None:
        """Let stalled requests go on, now and later."""
        self._released.set()

    def hold(self, closing: threading.Event) -> None:
        """Wait until the fault is released; when the server closes, cut the connection."""
        while not self._released.wait(0.02):
            if closing.is_set():
                raise ConnectionCut("the server stops")

    def begin(self) -> bool:
        """Count a matching request; True once the first `skip` have passed."""
        with self._lock:
            self._seen += 1
            return self._seen > self.skip

    def fire(self) -> bool:
        """Use it once, unless it is used up."""
        with self._lock:
            if self.times is not None and self.fired >= self.times:
                return False
            self.fired += 1
            return True

    def _matches_operation(self, operation: str) -> bool:
        if self.kind == "lost_session" and operation not in SESSION_OPERATIONS:
            return False
        if operation == self.operation:
            return True
        if self.kind in BODY_KINDS and operation not in CONTENT_OPERATIONS:
            return False
        in_group = operation.startswith(self.operation + ".")
        return in_group or fnmatchcase(operation, self.operation)


class FaultPlan:
    """All faults of a server."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self.closing = threading.Event()

    def add(self, fault: Fault) -> Fault:
        """Script a fault, and return it so that the test can wait for it or release it."""
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        faults, self._faults = self._faults, []
        for fault in faults:
            fault.release()

    def begin(self, operation: str, name: str) -> RequestFaults:
        """The faults that may hit this request."""
        faults = [fault for fault in list(self._faults) if fault.matches(operation, name)]
        return RequestFaults([fault for fault in faults if fault.begin()], self.closing)


class RequestFaults:
    """The faults that may hit one request; each hits it once at most."""

    def __init__(self, faults: list[Fault], closing: threading.Event) -> None:
        self._waiting = faults
        self.closing = closing

    def claim(self, kind: Kind) -> Fault | None:
        """The first fault of the kind that is not used up; it has then fired."""
        for fault in list(self._waiting):
            if fault.kind == kind and self.fire(fault):
                return fault
        return None

    def body_faults(self) -> Iterator[Fault]:
        """Those that wait for a position in the body."""
        return (fault for fault in list(self._waiting) if fault.kind in BODY_KINDS)

    def fire(self, fault: Fault) -> bool:
        """Use the fault, if it is not used up; it is not offered to this request again."""
        self._waiting.remove(fault)
        return fault.fire()


class Gate:
    """The place all body bytes pass on their way; here the body faults fire."""

    def __init__(self, faults: RequestFaults) -> None:
        self._faults = faults
        self._position = 0
        self._bytes_per_second: int | None = None
        self._flip_next_bit = False

    def allowance(self, size: int) -> int:
        """Fire what is due here; return how many of `size` bytes may pass before the next."""
        for fault in self._faults.body_faults():
            if fault.after_bytes > self._position:
                size = min(size, fault.after_bytes - self._position)
            elif self._faults.fire(fault):
                self._apply(fault)
        if self._bytes_per_second is not None:
            size = min(size, max(1, self._bytes_per_second // 20))
        return size

    def passed(self, data: bytes) -> bytes:
        """Count bytes, pace them, and return them as they arrive at the other side."""
        self._position += len(data)
        if self._bytes_per_second is not None:
            self._faults.closing.wait(len(data) / self._bytes_per_second)
        if self._flip_next_bit and data:
            self._flip_next_bit = False
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    def _apply(self, fault: Fault) -> None:
        if fault.kind in ("reset", "truncate"):
            raise ConnectionCut(f"scripted {fault.kind}", reset=fault.kind == "reset")
        if fault.kind == "stall":
            fault.hold(self._faults.closing)
        elif fault.kind == "slow":
            self._bytes_per_second = fault.bytes_per_second
        else:
            self._flip_next_bit = True
