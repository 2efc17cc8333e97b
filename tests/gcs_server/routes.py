"""Which operation a request asks for. Faults and the request log use the operations' names.

    bucket.get  bucket.layout
    object.list  object.get  object.download  object.delete  object.compose  object.rewrite
    upload.multipart
    upload.start  upload.chunk  upload.query     (resumable)

"upload" stands for all uploads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from . import objects, uploads
from .messages import Operation, Request

Condition = Callable[[Request], bool]
GET, CREATE = "storage.objects.get", "storage.objects.create"
DELETE, LIST, BUCKET = "storage.objects.delete", "storage.objects.list", "storage.buckets.get"


@dataclass(frozen=True)
class Route:
    """One line of the table; the first that fits is taken."""

    method: str
    template: str
    operation: str
    permission: str
    """What the caller must be allowed to do in the bucket."""
    call: Operation
    condition: Condition = lambda request: True

    def match(self, request: Request) -> re.Match[str] | None:
        """Match the path; `{word}` in the template stands for one segment of it."""
        if self.method != request.method or not self.condition(request):
            return None
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.template)
        return re.fullmatch(pattern, request.path)


def _query(key: str, value: str) -> Condition:
    return lambda request: request.query.get(key) == value


def _is_status_query(request: Request) -> bool:
    return request.headers.get("Content-Range", "").startswith("bytes */")


PLACE = "/storage/v1/b/{bucket}"
OBJECTS, OBJECT = PLACE + "/o", PLACE + "/o/{name}"
REWRITE = PLACE + "/o/{source_name}/rewriteTo/b/(?P=bucket)/o/{name}"
UPLOAD = "(?:/resumable)?/upload" + OBJECTS
MEDIA, MULTIPART = _query("alt", "media"), _query("uploadType", "multipart")
RESUMABLE = _query("uploadType", "resumable")

ROUTES = (
    Route("GET", PLACE, "bucket.get", BUCKET, objects.get_bucket),
    Route("GET", PLACE + "/storageLayout", "bucket.layout", LIST, objects.storage_layout),
    Route("GET", OBJECTS, "object.list", LIST, objects.list_objects),
    Route("GET", OBJECT, "object.download", GET, objects.download, MEDIA),
    Route("GET", "/download" + OBJECT, "object.download", GET, objects.download),
    Route("GET", OBJECT, "object.get", GET, objects.get_object),
    Route("DELETE", OBJECT, "object.delete", DELETE, objects.delete),
    Route("POST", OBJECT + "/compose", "object.compose", CREATE, objects.compose),
    Route("POST", REWRITE, "object.rewrite", CREATE, objects.rewrite),
    Route("POST", UPLOAD, "upload.multipart", CREATE, uploads.upload_multipart, MULTIPART),
    Route("POST", UPLOAD, "upload.start", CREATE, uploads.start_resumable, RESUMABLE),
    Route("PUT", UPLOAD, "upload.query", CREATE, uploads.query_resumable, _is_status_query),
    Route("PUT", UPLOAD, "upload.chunk", CREATE, uploads.receive_chunk),
)


def find_route(request: Request) -> tuple[Route, dict[str, str]] | None:
    """The route of a request, with the decoded names in its path."""
    for route in ROUTES:
        if found := route.match(request):
            return route, {key: unquote(value) for key, value in found.groupdict().items()}
    return None
