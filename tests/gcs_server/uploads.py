"""Uploads of the JSON API: multipart and resumable.

A resumable session keeps whole quanta of 256 KiB of what arrives, as the service does, so a
connection that breaks leaves a position that the client must ask for. Whatever a client does
to a session next cuts off a request that still hangs in it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from .blobs import Blob, BlobWriter
from .errors import ApiError, ConnectionCut
from .messages import Request, RequestBody, Response, json_response
from .multipart import HEAD_LIMIT_BYTES, copy_media, parse_related_head
from .resources import object_resource
from .state import Call, State
from .store import StoredObject

QUANTUM_BYTES = 256 * 1024
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+|\*)|\*)/(\d+|\*)")


def upload_multipart(call: Call) -> Response:
    """Metadata and content in one body."""
    body, content_type = call.request.body, call.request.headers.get("Content-Type", "")
    head = parse_related_head(body.peek(HEAD_LIMIT_BYTES), content_type)
    metadata = dict(head.metadata)
    if head.media_type:
        metadata.setdefault("contentType", head.media_type)
    with call.state.store.new_writer() as writer:
        copy_media(body, head, writer.write)
        blob = writer.finish()
    expected = call.request.number("ifGenerationMatch")
    return _store(call, blob, metadata, expected)[0]


def peek_name(request: Request) -> str:
    """The object's name from the metadata in the body, which stays unread; may be empty."""
    start = request.body.peek(HEAD_LIMIT_BYTES)
    content_type = request.headers.get("Content-Type", "")
    if content_type.startswith("multipart/"):
        return str(parse_related_head(start, content_type).metadata.get("name", ""))
    try:
        metadata = json.loads(start or b"{}")
    except ValueError:
        return ""
    return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


@dataclass
class UploadSession:
    """A resumable upload. `turn` is the number of the request that may write to it."""

    bucket: str
    name: str
    metadata: dict[str, Any]
    expected: int | None
    """The generation that it is to replace, 0 for none, None for any."""
    writer: BlobWriter
    lock: threading.Lock = field(default_factory=threading.Lock)
    turn: int = 0
    stored: StoredObject | None = None
    """The object, once the upload is complete."""

    def begin_turn(self) -> int:
        """Take the session over from any request that still hangs in it."""
        with self.lock:
            self.turn += 1
            return self.turn

    def receive(self, body: RequestBody, turn: int, skip: int, *, last: bool) -> None:
        """Append a body without its first `skip` bytes; the last one to its very end.

        Raises:
            ConnectionCut: The body broke off, or another request took the session over. The
                whole quanta received so far are kept.
        """
        pending = b""
        while data := body.read():
            dropped = min(skip, len(data))
            skip -= dropped
            pending += data[dropped:]
            whole = len(pending) - len(pending) % QUANTUM_BYTES
            if whole:
                self._write(pending[:whole], turn)
                pending = pending[whole:]
        if last:
            self._write(pending, turn)

    def _write(self, data: bytes, turn: int) -> None:
        with self.lock:
            self.require_turn(turn)
            self.writer.write(data)

    def require_turn(self, turn: int) -> None:
        """Cut off a request whose turn is over."""
        if turn != self.turn:
            raise ConnectionCut("another request took the upload over")


def start_resumable(call: Call) -> Response:
    """Open a session; preconditions are checked now and again at the end."""
    request, store = call.request, call.state.store
    metadata = request.json()
    media_type = request.headers.get("X-Upload-Content-Type")
    if media_type:
        metadata.setdefault("contentType", media_type)
    expected = request.number("ifGenerationMatch")
    store.require_generation(call.bucket, call.name, expected)
    session = UploadSession(call.bucket, call.name, metadata, expected, store.new_writer())
    session_id = call.state.uploads.add(session)
    location = (
        f"{request.base_url}{request.path}?uploadType=resumable"
        f"&name={quote(call.name, safe='')}&upload_id={session_id}"
    )
    headers = {"Location": location, "X-GUploader-UploadID": session_id}
    return Response(200, headers)


def query_resumable(call: Call) -> Response:
    """Say how much of a session has arrived; complete it when all has (`bytes */N`)."""
    session = _session(call)
    turn = session.begin_turn()
    total = call.request.headers["Content-Range"].rpartition("/")[2]
    if session.stored is None and total == str(session.writer.size):
        return _complete(call, session, turn)
    return _progress(call, session)


def receive_chunk(call: Call) -> Response:
    """Append a chunk, or all the content; complete the upload with its last byte."""
    session = _session(call)
    turn = session.begin_turn()
    if session.stored is not None:
        return _progress(call, session)
    first, total = _parse_chunk_range(call.request)
    persisted = session.writer.size
    if first > persisted:
        message = (
            "Invalid request. According to the Content-Range header, the upload offset is "
            f"{first} byte(s), which exceeds already uploaded size of {persisted} byte(s)."
        )
        raise ApiError(400, message)
    last = total is not None and first + call.request.body.length >= total
    session.receive(call.request.body, turn, persisted - first, last=last)
    return _complete(call, session, turn) if last else _progress(call, session)


def cancel_resumable(call: Call) -> Response:
    """Drop a session; the service answers 499."""
    drop_session(call.state, call.request)
    return Response(499)


def drop_session(state: State, request: Request) -> None:
    """Forget the session that a request is for, and what it has received."""
    session = state.uploads.remove(request.query.get("upload_id", ""))
    session.begin_turn()
    if session.stored is None:
        session.writer.discard()


def _session(call: Call) -> UploadSession:
    return call.state.uploads.get(call.request.query.get("upload_id", ""))


def _parse_chunk_range(request: Request) -> tuple[int, int | None]:
    """The first byte's position and the total, None while the client does not know it."""
    value = request.headers.get("Content-Range")
    if value is None:
        return 0, request.body.length
    found = CONTENT_RANGE.fullmatch(value.strip())
    if found is None or found.group(1) is None:
        raise ApiError(400, f"Invalid Content-Range: {value!r}")
    first, last, total = found.groups()
    if total != "*":
        return int(first), int(total)
    # "bytes 0-*/*": the end of the body is the end of the content.
    return int(first), int(first) + request.body.length if last == "*" else None


def _progress(call: Call, session: UploadSession) -> Response:
    if session.stored is not None:
        return json_response(object_resource(session.stored, call.request.base_url))
    headers = {}
    if session.writer.size:
        headers["Range"] = f"bytes=0-{session.writer.size - 1}"
    return Response(308, headers)


def _complete(call: Call, session: UploadSession, turn: int) -> Response:
    """Make the object; the session keeps it, so that a lost answer is not repeated work."""
    with session.lock:
        session.require_turn(turn)
        blob = session.writer.finish()
        try:
            response, session.stored = _store(call, blob, session.metadata, session.expected)
        except ApiError:
            call.state.uploads.remove(call.request.query["upload_id"])
            raise
        return response


def _store(
    call: Call, blob: Blob, metadata: Mapping[str, Any], expected: int | None
) -> tuple[Response, StoredObject]:
    try:
        _check_hashes(call.request, metadata, blob)
    except ApiError:
        blob.path.unlink()
        raise
    content_type = metadata.get("contentType")
    stored = call.state.store.commit(call.bucket, call.name, blob, content_type, expected)
    resource = object_resource(stored, call.request.base_url)
    return json_response(resource, committed=True), stored


def _check_hashes(request: Request, metadata: Mapping[str, Any], blob: Blob) -> None:
    """Refuse content that is not what the client said it sends."""
    wanted = {"crc32c": metadata.get("crc32c"), "md5": metadata.get("md5Hash")}
    for part in request.headers.get("X-Goog-Hash", "").split(","):
        kind, _, digest = part.strip().partition("=")
        wanted[kind] = digest
    for kind, found in (("crc32c", blob.crc32c), ("md5", blob.md5)):
        if wanted.get(kind) and found and wanted[kind] != found:
            message = f"Provided {kind} hash {wanted[kind]!r} doesn't match calculated {found!r}."
            raise ApiError(400, message)
