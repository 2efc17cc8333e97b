"""Batches: several requests of the JSON API in one `multipart/mixed` body."""

from __future__ import annotations

import io
from email import message_from_bytes
from http.client import responses

from .context import Call
from .errors import ApiError
from .messages import FileSlice, Request, RequestBody, Response, build_request
from .multipart import split_mixed

BOUNDARY = "batch_fake_gcs_server"


def run_batch(call: Call) -> Response:
    """Answer the parts one after the other; each has its own status and may meet faults."""
    content_type = call.request.headers.get("Content-Type", "")
    parts = split_mixed(call.request.body.read_all(), content_type)
    chunks = []
    for content_id, message in parts:
        response = call.answer(_embedded_request(message, call.request.base_url))
        chunks.append(_embedded_response(content_id, response))
    body = b"".join(chunks) + f"--{BOUNDARY}--\r\n".encode()
    headers = {"Content-Type": f'multipart/mixed; boundary="{BOUNDARY}"'}
    return Response(200, headers, body)


def _embedded_request(message: bytes, base_url: str) -> Request:
    line, _, rest = message.lstrip().replace(b"\r\n", b"\n").partition(b"\n")
    words = line.decode().split()
    if len(words) < 2:
        raise ApiError(400, f"Not a request line in a batch: {line!r}")
    headers = message_from_bytes(rest.partition(b"\n\n")[0])
    content = rest.partition(b"\n\n")[2]
    body = RequestBody(io.BytesIO(content), len(content))
    return build_request(words[0], words[1], headers, body, base_url)


def _embedded_response(content_id: str, response: Response) -> bytes:
    body = response.body
    if isinstance(body, FileSlice):
        response.close()
        raise ApiError(400, "Content cannot be downloaded in a batch.")
    lines = [
        f"--{BOUNDARY}",
        "Content-Type: application/http",
        f"Content-ID: <response-{content_id.strip('<>')}>",
        "",
        f"HTTP/1.1 {response.status} {responses.get(response.status, 'Unknown')}",
        *(f"{key}: {value}" for key, value in response.headers.items()),
        f"Content-Length: {len(body)}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body + b"\r\n"
