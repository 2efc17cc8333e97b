"""Requests and answers, apart from the connection they travel on, and what operations work on.

A request body is a stream; an answer's body is bytes or a slice of an open file. Both pass the
gate of the request's faults.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import ConnectionCut
from .faults import Gate
from .store import BLOCK_BYTES, Store

if TYPE_CHECKING:
    from .uploads import UploadSession


class RequestBody:
    """A body of known length that is read once, from the front."""

    def __init__(self, raw: Any, length: int) -> None:
        self._raw = raw
        self._unread = length
        self._ahead = b""
        self.length = length
        self.gate: Gate | None = None

    def peek(self, size: int) -> bytes:
        """The next bytes, at most `size`, without consuming them or passing the gate."""
        while len(self._ahead) < size and self._unread:
            self._ahead += self._receive(size - len(self._ahead))
        return self._ahead[:size]

    def read(self, size: int = BLOCK_BYTES) -> bytes:
        """Some bytes, at most `size`; empty at the end only.

        Raises:
            ConnectionCut: The client went away, or a fault says so.
        """
        if self.gate is not None:
            size = self.gate.allowance(size)
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
        elif self._unread:
            data = self._receive(size)
        else:
            return b""
        return data if self.gate is None else self.gate.passed(data)

    def read_all(self) -> bytes:
        return b"".join(iter(self.read, b""))

    def drain(self) -> None:
        """Throw away the rest, past all faults, so that the connection can be used again."""
        self.gate = None
        while self.read():
            pass

    def _receive(self, size: int) -> bytes:
        try:
            data: bytes = self._raw.read1(min(size, self._unread))
        except OSError as exc:
            raise ConnectionCut(f"the client went away: {exc}") from exc
        if not data:
            raise ConnectionCut("the client closed the connection within a body")
        self._unread -= len(data)
        return data


@dataclass
class Request:
    """One HTTP request. `path` is still percent-encoded, so that a slash in a name differs."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Message
    body: RequestBody
    base_url: str
    """Scheme and host as the client sees them, for the links in answers."""

    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.body.read_all() or b"{}")
        return value

    def number(self, key: str) -> int | None:
        """A number in the query, None where there is none."""
        value = self.query.get(key)
        return None if value is None else int(value)


@dataclass
class FileSlice:
    """A part of an open file; whoever sends or drops it closes the file."""

    file: BinaryIO
    start: int
    length: int


@dataclass
class Response:
    """One answer; `committed` says that the request changed an object."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | FileSlice = b""
    committed: bool = False

    @property
    def length(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body.length

    def close(self) -> None:
        if isinstance(self.body, FileSlice):
            self.body.file.close()


def json_response(resource: object, status: int = 200, *, committed: bool = False) -> Response:
    """An answer with a JSON body."""
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    return Response(status, headers, json.dumps(resource).encode(), committed)


@dataclass
class State:
    """Everything the service knows, and the settings that tests may change."""

    store: Store
    uploads: dict[str, UploadSession] = field(default_factory=dict)
    """Resumable uploads by their id."""
    max_page_size: int = 1000
    """The upper limit of a page of a listing."""


@dataclass
class Call:
    """One request that is about to be answered."""

    state: State
    request: Request
    bucket: str
    name: str
    """The object; the destination, where there are two; empty where there is none."""
    source_name: str


Operation = Callable[[Call], Response]
