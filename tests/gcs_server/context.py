"""What an operation works on: the state of the service and one request's target."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from .errors import ApiError
from .messages import Request, Response
from .preconditions import Preconditions
from .store import Store

if TYPE_CHECKING:
    from .uploads import UploadSession
    from .xml_uploads import PartsUpload

Session = TypeVar("Session")


class Sessions(Generic[Session]):
    """Uploads in progress by their id."""

    def __init__(self) -> None:
        """Begin with none."""
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def add(self, session: Session) -> str:
        """Keep a session under a new id."""
        session_id = secrets.token_urlsafe(24)
        with self._lock:
            self._sessions[session_id] = session
        return session_id

    def get(self, session_id: str) -> Session:
        """The session, or 404."""
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None:
            raise ApiError(404, f"No such upload: {session_id!r}", "NoSuchUpload")
        return session

    def remove(self, session_id: str) -> Session:
        """Forget the session and return it, or 404."""
        session = self.get(session_id)
        with self._lock:
            self._sessions.pop(session_id, None)
        return session

    def active(self) -> list[Session]:
        """All sessions, the oldest first."""
        with self._lock:
            return list(self._sessions.values())


@dataclass
class State:
    """Everything the service knows, and the settings that tests may change."""

    store: Store
    uploads: Sessions[UploadSession] = field(default_factory=Sessions)
    parts_uploads: Sessions[PartsUpload] = field(default_factory=Sessions)
    max_page_size: int = 1000
    """The upper limit of a page of a listing."""
    minimum_part_bytes: int = 5 * 1024 * 1024
    """The least size of each part but the last of an XML multipart upload."""


@dataclass
class Call:
    """One request that is about to be answered."""

    state: State
    request: Request
    bucket: str
    name: str
    """The object; the destination, where there are two; empty where there is none."""
    source_bucket: str
    source_name: str
    answer: Callable[[Request], Response]
    """Answers another request, for batches."""

    def preconditions(self) -> Preconditions:
        """Those on the object, from the query."""
        return Preconditions.from_query(self.request.query)


Operation = Callable[[Call], Response]
