"""Bodies of `multipart/related` uploads: metadata, then the content as a stream.

Clients differ: gsutil quotes the boundary with single quotes, and ends lines with a bare
newline where the Python client sends CRLF. Both are understood.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from typing import Any

from .errors import ApiError
from .messages import RequestBody

HEAD_LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True)
class RelatedHead:
    """What comes before the content of an upload."""

    metadata: dict[str, Any]
    media_type: str | None
    media_offset: int
    end: bytes
    """What follows the content."""


def parse_related_head(start: bytes, content_type: str) -> RelatedHead:
    """Parse the metadata part and the headers of the content's part.

    Args:
        start: The first bytes of the body; all of the head must be in them.
        content_type: The request's own.
    """
    found = re.search(r"boundary=(\"[^\"]+\"|'[^']+'|[^;\s]+)", content_type)
    if found is None:
        raise ApiError(400, f"Content-Type has no boundary: {content_type!r}")
    boundary = b"--" + found.group(1).strip("\"'").encode()
    opening = re.compile(re.escape(boundary) + rb"[ \t]*(\r\n|\n)")
    first = opening.search(start)
    second = opening.search(start, first.end()) if first else None
    if first is None or second is None:
        raise ApiError(400, f"Two parts must begin within {HEAD_LIMIT_BYTES} bytes.")
    newline = second.group(1)
    _, metadata_at = _part_headers(start, first.end(), newline)
    media_headers, media_at = _part_headers(start, second.end(), newline)
    metadata = json.loads(start[metadata_at : second.start()] or b"{}")
    return RelatedHead(
        metadata, media_headers["Content-Type"], media_at, newline + boundary + b"--"
    )


def copy_media(body: RequestBody, head: RelatedHead, write: Callable[[bytes], None]) -> None:
    """Pass the content of an upload to `write`; the body must not have been read before."""
    skip = head.media_offset
    while skip:
        data = body.read(skip)
        if not data:
            raise ApiError(400, "The body ends before its second part.")
        skip -= len(data)
    held_back = len(head.end) + 16
    tail = b""
    while data := body.read():
        tail += data
        if len(tail) > held_back:
            write(tail[:-held_back])
            tail = tail[-held_back:]
    end = tail.rfind(head.end)
    if end < 0:
        raise ApiError(400, "The closing boundary is missing.")
    write(tail[:end])


def _part_headers(data: bytes, start: int, newline: bytes) -> tuple[Message, int]:
    """The headers of a part, and where its content begins."""
    if data.startswith(newline, start):
        return Message(), start + len(newline)
    end = data.find(newline * 2, start)
    if end < 0:
        raise ApiError(400, "A part has no end of its headers.")
    return message_from_bytes(data[start:end]), end + 2 * len(newline)
