"""Which operation a request asks for. Faults and the request log use the operations' names.

    bucket.list  bucket.get  bucket.layout  bucket.test_permissions
    object.list  object.get  object.download  object.delete  object.patch
    object.compose  object.rewrite  object.copy
    upload.media  upload.multipart
    upload.start  upload.chunk  upload.query  upload.cancel                   (resumable)
    upload.xml_start  upload.xml_part  upload.xml_list  upload.xml_complete  upload.xml_abort
    batch

A pattern for all uploads is "upload", for all steps of XML uploads "upload.xml_*".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from . import batch, objects, uploads, xml_uploads
from .context import Operation
from .errors import ApiError
from .messages import Request

Condition = Callable[[Request], bool]
GET, CREATE = "storage.objects.get", "storage.objects.create"
UPDATE, DELETE = "storage.objects.update", "storage.objects.delete"
LIST, BUCKET = "storage.objects.list", "storage.buckets.get"


@dataclass(frozen=True)
class Route:
    """One line of the table; the first that fits is taken."""

    method: str
    pattern: re.Pattern[str]
    operation: str
    permission: str
    """What the caller must be allowed to in the bucket; empty: nothing."""
    call: Operation
    condition: Condition


@dataclass(frozen=True)
class Match:
    """The route of a request, with the decoded names in its path."""

    route: Route
    bucket: str = ""
    name: str = ""
    source_bucket: str = ""
    source_name: str = ""


def _always(_: Request) -> bool:
    return True


def _query(key: str, value: str | None = None) -> Condition:
    """True if the query has the key, with that value if one is given."""
    return lambda request: request.query.get(key) == value if value else key in request.query


def _is_status_query(request: Request) -> bool:
    return request.headers.get("Content-Range", "").startswith("bytes */")


def _route(
    method: str,
    template: str,
    operation: str,
    permission: str,
    call: Operation,
    condition: Condition = _always,
) -> Route:
    """`{word}` stands for one path segment, `{word...}` for the rest of the path."""
    pattern = re.sub(r"\{(\w+)\.\.\.\}", r"(?P<\1>.+)", template)
    pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)
    return Route(method, re.compile(pattern), operation, permission, call, condition)


API, OBJECTS, OBJECT = (
    "/storage/v1/b",
    "/storage/v1/b/{bucket}/o",
    "/storage/v1/b/{bucket}/o/{name}",
)
SOURCE = "/storage/v1/b/{source_bucket}/o/{source_name}"
UPLOAD = "(?:/resumable)?/upload" + OBJECTS
XML = "/{bucket}/{name...}"

ROUTES = (
    _route("GET", API, "bucket.list", "", objects.list_buckets),
    _route("GET", API + "/{bucket}", "bucket.get", BUCKET, objects.get_bucket),
    _route("GET", API + "/{bucket}/storageLayout", "bucket.layout", LIST, objects.storage_layout),
    _route(
        "GET",
        API + "/{bucket}/iam/testPermissions",
        "bucket.test_permissions",
        "",
        objects.test_permissions,
    ),
    _route("GET", OBJECTS, "object.list", LIST, objects.list_objects),
    _route("GET", OBJECT, "object.download", GET, objects.download, _query("alt", "media")),
    _route("GET", "/download" + OBJECT, "object.download", GET, objects.download),
    _route("GET", OBJECT, "object.get", GET, objects.get_object),
    _route("DELETE", OBJECT, "object.delete", DELETE, objects.delete),
    _route("PATCH", OBJECT, "object.patch", UPDATE, objects.patch),
    _route("PUT", OBJECT, "object.patch", UPDATE, objects.patch),
    _route("POST", OBJECT + "/compose", "object.compose", CREATE, objects.compose),
    _route(
        "POST",
        SOURCE + "/rewriteTo/b/{bucket}/o/{name}",
        "object.rewrite",
        CREATE,
        objects.rewrite,
    ),
    _route("POST", SOURCE + "/copyTo/b/{bucket}/o/{name}", "object.copy", CREATE, objects.copy),
    _route(
        "POST", UPLOAD, "upload.media", CREATE, uploads.upload_media, _query("uploadType", "media")
    ),
    _route(
        "POST",
        UPLOAD,
        "upload.multipart",
        CREATE,
        uploads.upload_multipart,
        _query("uploadType", "multipart"),
    ),
    _route(
        "POST",
        UPLOAD,
        "upload.start",
        CREATE,
        uploads.start_resumable,
        _query("uploadType", "resumable"),
    ),
    _route("PUT", UPLOAD, "upload.query", CREATE, uploads.query_resumable, _is_status_query),
    _route("PUT", UPLOAD, "upload.chunk", CREATE, uploads.receive_chunk),
    _route("DELETE", UPLOAD, "upload.cancel", CREATE, uploads.cancel_resumable),
    _route("POST", "/batch(?:/storage/v1)?", "batch", "", batch.run_batch),
    _route("POST", XML, "upload.xml_start", CREATE, xml_uploads.start, _query("uploads")),
    _route("PUT", XML, "upload.xml_part", CREATE, xml_uploads.receive_part, _query("partNumber")),
    _route("GET", XML, "upload.xml_list", CREATE, xml_uploads.list_parts, _query("uploadId")),
    _route("POST", XML, "upload.xml_complete", CREATE, xml_uploads.complete, _query("uploadId")),
    _route("DELETE", XML, "upload.xml_abort", CREATE, xml_uploads.abort, _query("uploadId")),
)


def find_route(request: Request) -> Match:
    """The route of a request, or 400, which clients do not retry, saying what is lacking."""
    for route in ROUTES:
        found = route.pattern.fullmatch(request.path) if route.method == request.method else None
        if found and route.condition(request):
            names = {key: unquote(value) for key, value in found.groupdict().items()}
            return Match(route, **names)
    raise ApiError(400, f"This server does not know {request.method} {request.path}.")
