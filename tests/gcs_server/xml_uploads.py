"""Multipart uploads of the XML API, as `transfer_manager.upload_chunks_concurrently` does them.

POST ?uploads                     start
PUT ?partNumber=N&uploadId=ID     one part; parts may come in any order, and more than once
GET ?uploadId=ID                  list the parts
POST ?uploadId=ID                 complete: the parts that the body names become the object
DELETE ?uploadId=ID               abort
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

from .blobs import Blob, iterate_blocks
from .context import Call
from .errors import ApiError
from .messages import Response
from .preconditions import Preconditions
from .uploads import parse_hash_header

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
FIELD_HEADERS = {
    "Content-Type": "contentType",
    "Cache-Control": "cacheControl",
    "Content-Encoding": "contentEncoding",
    "Content-Disposition": "contentDisposition",
    "Content-Language": "contentLanguage",
}


@dataclass
class PartsUpload:
    """An upload in parts that is not complete."""

    bucket: str
    name: str
    fields: dict[str, Any]
    preconditions: Preconditions
    parts: dict[int, Blob] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def discard(self) -> None:
        """Remove all parts."""
        with self.lock:
            for blob in self.parts.values():
                blob.path.unlink(missing_ok=True)
            self.parts.clear()


def start(call: Call) -> Response:
    """Open an upload."""
    headers = call.request.headers
    fields: dict[str, Any] = {FIELD_HEADERS[k]: headers[k] for k in FIELD_HEADERS if k in headers}
    prefix = "x-goog-meta-"
    custom = {k[len(prefix) :]: v for k, v in headers.items() if k.lower().startswith(prefix)}
    if custom:
        fields["metadata"] = custom
    upload = PartsUpload(call.bucket, call.name, fields, Preconditions.from_headers(headers))
    upload_id = call.state.parts_uploads.add(upload)
    return _xml("InitiateMultipartUploadResult", call, f"<UploadId>{upload_id}</UploadId>")


def receive_part(call: Call) -> Response:
    """Keep one part, in place of an earlier one of that number."""
    upload = _find(call)
    number = int(call.request.query["partNumber"])
    with call.state.store.new_writer() as writer:
        while data := call.request.body.read():
            writer.write(data)
        blob = writer.finish()
    try:
        _check_hash(call, blob)
    except ApiError:
        blob.path.unlink()
        raise
    with upload.lock:
        replaced, upload.parts[number] = upload.parts.get(number), blob
    if replaced is not None:
        replaced.path.unlink(missing_ok=True)
    headers = {"ETag": _etag(blob), "X-Goog-Hash": f"crc32c={blob.crc32c},md5={blob.md5}"}
    return Response(200, headers)


def list_parts(call: Call) -> Response:
    """The parts received so far."""
    parts = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{_etag(blob)}</ETag>"
        f"<Size>{blob.size}</Size></Part>"
        for number, blob in sorted(_find(call).parts.items())
    )
    return _xml("ListPartsResult", call, parts)


def complete(call: Call) -> Response:
    """Join the parts that the body names, in the order of their numbers."""
    upload = _find(call)
    body = call.request.body.read_all().decode()
    blobs = [_named_part(upload, part) for part in re.findall(r"<Part>.*?</Part>", body, re.S)]
    if not blobs:
        raise ApiError(400, "No parts are named.", "MalformedXML")
    minimum = call.state.minimum_part_bytes
    if any(blob.size < minimum for blob in blobs[:-1]):
        raise ApiError(400, f"A part is smaller than {minimum} bytes.", "EntityTooSmall")
    with call.state.store.new_writer(composite=True) as writer:
        for blob in blobs:
            with blob.path.open("rb") as file:
                for block in iterate_blocks(file):
                    writer.write(block)
        joined = writer.finish()
    stored = call.state.store.commit(
        call.bucket, call.name, joined, upload.fields, upload.preconditions, len(blobs)
    )
    call.state.parts_uploads.remove(call.request.query["uploadId"])
    upload.discard()
    response = _xml("CompleteMultipartUploadResult", call, "")
    response.headers["X-Goog-Generation"] = str(stored.generation)
    response.committed = True
    return response


def abort(call: Call) -> Response:
    """Drop the upload and its parts."""
    _find(call)
    call.state.parts_uploads.remove(call.request.query["uploadId"]).discard()
    return Response(204)


def _find(call: Call) -> PartsUpload:
    return call.state.parts_uploads.get(call.request.query.get("uploadId", ""))


def _named_part(upload: PartsUpload, element: str) -> Blob:
    number = re.search(r"<PartNumber>\s*(\d+)\s*</PartNumber>", element)
    etag = re.search(r"<ETag>\s*(?:\"|&quot;)?(.*?)(?:\"|&quot;)?\s*</ETag>", element)
    blob = upload.parts.get(int(number.group(1))) if number else None
    if blob is None or etag is None or etag.group(1) != _etag(blob).strip('"'):
        raise ApiError(400, f"No such part: {element}", "InvalidPart")
    return blob


def _check_hash(call: Call, blob: Blob) -> None:
    wanted = parse_hash_header(call.request.headers.get("X-Goog-Hash", ""))
    if "Content-MD5" in call.request.headers:
        wanted["md5"] = call.request.headers["Content-MD5"]
    for kind, found in (("crc32c", blob.crc32c), ("md5", blob.md5)):
        if wanted.get(kind, found) != found:
            raise ApiError(400, f"The {kind} you specified is not {found}.", "BadDigest")


def _etag(blob: Blob) -> str:
    return f'"{blob.md5}"'


def _xml(element: str, call: Call, content: str) -> Response:
    text = (
        f"<?xml version='1.0' encoding='UTF-8'?><{element} xmlns='{NAMESPACE}'>"
        f"<Bucket>{escape(call.bucket)}</Bucket><Key>{escape(call.name)}</Key>{content}</{element}>"
    )
    return Response(200, {"Content-Type": "application/xml; charset=UTF-8"}, text.encode())
