"""What an operation works on: the state of the service and one request's target."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import ApiError
from .messages import Request, Response
from .store import Store

if TYPE_CHECKING:
    from .uploads import UploadSession


class Sessions:
    """Resumable uploads by their id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: dict[str, UploadSession] = {}

    def add(self, session: UploadSession) -> str:
        session_id = secrets.token_urlsafe(24)
        with self._lock:
            self._sessions[session_id] = session
        return session_id

    def get(self, session_id: str) -> UploadSession:
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None:
            raise ApiError(404, f"No such upload: {session_id!r}")
        return session

    def remove(self, session_id: str) -> UploadSession:
        """Forget the session and return it, or 404."""
        session = self.get(session_id)
        with self._lock:
            self._sessions.pop(session_id, None)
        return session

    def unfinished(self) -> list[UploadSession]:
        """Those that have not become an object, the oldest first."""
        with self._lock:
            return [session for session in self._sessions.values() if session.stored is None]


@dataclass
class State:
    """Everything the service knows, and the settings that tests may change."""

    store: Store
    uploads: Sessions = field(default_factory=Sessions)
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
