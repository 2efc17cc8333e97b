"""Uploads of the JSON API: multipart and resumable.

A resumable session keeps whole quanta of 256 KiB of what arrives, as the service does, so a
connection that breaks leaves a position that the client must ask for. Whatever a client does
to a session next cuts off a request that still hangs in it.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from email import message_from_bytes
from typing import Any
from urllib.parse import quote

from .errors import ApiError, ConnectionCut
from .messages import Call, Request, RequestBody, Response, State, json_response
from .objects import object_resource
from .store import Blob, BlobWriter, StoredObject

QUANTUM_BYTES = 256 * 1024
HEAD_BYTES = 64 * 1024
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+|\*)|\*)/(\d+|\*)")


def upload_multipart(call: Call) -> Response:
    """Metadata and content in one body; clients send no large content in this way.

    Clients differ: gsutil quotes the boundary with single quotes, and ends lines with a bare
    newline where the Python client sends CRLF. Both are understood.
    """
    content_type = call.request.headers.get("Content-Type", "")
    found = re.search(r"boundary=(\"[^\"]+\"|'[^']+'|[^;\s]+)", content_type)
    if found is None:
        raise ApiError(400, f"Content-Type has no boundary: {content_type!r}")
    boundary = re.escape(found.group(1).strip("\"'").encode())
    related = re.search(
        rb"--%s[ \t]*(\r?\n)(.*?)\1\1(.*?)\1--%s[ \t]*\1(.*?)\1\1(.*)\1--%s--" % ((boundary,) * 3),
        call.request.body.read_all(),
        re.DOTALL,
    )
    if related is None:
        raise ApiError(400, "The body does not have two parts.")
    _, _, metadata, headers, content = related.groups()
    media_type = message_from_bytes(headers)["Content-Type"]
    writer = call.state.store.new_writer()
    writer.write(content)
    blob = writer.finish()
    expected = call.request.number("ifGenerationMatch")
    return _store(call, blob, {"contentType": media_type, **json.loads(metadata)}, expected)[0]


def peek_name(request: Request) -> str:
    """The object's name from the metadata in the body, which stays unread; may be empty."""
    found = re.search(rb'"name": *("(?:[^"\\]|\\.)*")', request.body.peek(HEAD_BYTES))
    return str(json.loads(found.group(1))) if found else ""


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
    session_id = secrets.token_urlsafe(24)
    call.state.uploads[session_id] = session
    location = (
        f"{request.base_url}{request.path}?uploadType=resumable"
        f"&name={quote(call.name, safe='')}&upload_id={session_id}"
    )
    headers = {"Location": location, "X-GUploader-UploadID": session_id}
    return Response(200, headers)


def query_resumable(call: Call) -> Response:
    """Say how much of a session has arrived; complete it when all has (`bytes */N`)."""
    session = _session(call.state, call.request)
    turn = session.begin_turn()
    total = call.request.headers["Content-Range"].rpartition("/")[2]
    if session.stored is None and total == str(session.writer.size):
        return _complete(call, session, turn)
    return _progress(call, session)


def receive_chunk(call: Call) -> Response:
    """Append a chunk, or all the content; complete the upload with its last byte."""
    session = _session(call.state, call.request)
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


def drop_session(state: State, request: Request) -> None:
    """Forget the session that a request is for."""
    _session(state, request).begin_turn()
    del state.uploads[request.query["upload_id"]]


def _session(state: State, request: Request) -> UploadSession:
    session = state.uploads.get(request.query.get("upload_id", ""))
    if session is None:
        raise ApiError(404, "No such upload.")
    return session


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
            del call.state.uploads[call.request.query["upload_id"]]
            raise
        return response


def _store(
    call: Call, blob: Blob, metadata: Mapping[str, Any], expected: int | None
) -> tuple[Response, StoredObject]:
    _check_hash(call.request, metadata, blob)
    content_type = metadata.get("contentType")
    stored = call.state.store.commit(call.bucket, call.name, blob, content_type, expected)
    resource = object_resource(stored, call.request.base_url)
    return json_response(resource, committed=True), stored


def _check_hash(request: Request, metadata: Mapping[str, Any], blob: Blob) -> None:
    """Refuse content that is not what the client said it sends."""
    header = re.search(r"crc32c=([^,\s]+)", request.headers.get("X-Goog-Hash", ""))
    wanted = header.group(1) if header else metadata.get("crc32c")
    if wanted and wanted != blob.crc32c:
        raise ApiError(400, f"Provided crc32c {wanted!r} doesn't match calculated {blob.crc32c!r}.")
