"""Operations of the JSON API on buckets and objects, apart from uploads."""

from __future__ import annotations

import re
from email.utils import format_datetime
from typing import Any
from urllib.parse import parse_qsl

from .blobs import iterate_blocks
from .context import Call
from .errors import ApiError
from .listing import ListQuery, list_page
from .messages import FileSlice, Response, json_response
from .preconditions import Preconditions
from .resources import (
    bucket_resource,
    hash_header,
    object_etag,
    object_resource,
    writable_fields,
)
from .store import StoredObject

MAX_COMPOSE_SOURCES = 32


def get_bucket(call: Call) -> Response:
    """`buckets.get`."""
    return json_response(
        bucket_resource(call.state.store.bucket(call.bucket), call.request.base_url)
    )


def list_buckets(call: Call) -> Response:
    """`buckets.list`, on one page."""
    items = [bucket_resource(b, call.request.base_url) for b in call.state.store.buckets()]
    return json_response({"kind": "storage#buckets", "items": items})


def storage_layout(call: Call) -> Response:
    """`buckets.getStorageLayout`, which gcloud asks for before it lists."""
    layout = {"kind": "storage#storageLayout", "bucket": call.bucket, "location": "US-CENTRAL1"}
    return json_response({**layout, "hierarchicalNamespace": {"enabled": False}})


def test_permissions(call: Call) -> Response:
    """`buckets.testIamPermissions`: those of the asked permissions that the caller has."""
    # The parameter is repeated, so the parsed query, which keeps one value each, will not do.
    asked = [value for key, value in parse_qsl(call.request.raw_query) if key == "permissions"]
    held = call.state.store.bucket(call.bucket).permissions
    answer: dict[str, Any] = {"kind": "storage#testIamPermissionsResponse"}
    granted = [permission for permission in asked if permission in held]
    return json_response({**answer, "permissions": granted} if granted else answer)


def list_objects(call: Call) -> Response:
    """`objects.list`: one page."""
    store, url = call.state.store, call.request.base_url
    query = ListQuery.from_query(call.request.query, call.state.max_page_size)
    page = list_page(store.names(call.bucket), query)
    found = [store.find(call.bucket, name) for name in page.names]
    answer: dict[str, Any] = {
        "kind": "storage#objects",
        "items": [object_resource(stored, url) for stored in found if stored is not None],
    }
    if page.prefixes:
        answer["prefixes"] = page.prefixes
    if page.next_token:
        answer["nextPageToken"] = page.next_token
    return json_response(answer)


def get_object(call: Call) -> Response:
    """`objects.get` of the metadata."""
    return json_response(object_resource(_find(call), call.request.base_url))


def download(call: Call) -> Response:
    """`objects.get` of the content, or of a range of it."""
    stored = _find(call)
    headers = _download_headers(stored)
    part = parse_range(call.request.headers.get("Range", ""), stored.size)
    start, length = part or (0, stored.size)
    if part:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{stored.size}"
    file = call.state.store.open(stored)
    return Response(206 if part else 200, headers, FileSlice(file, start, length))


def delete(call: Call) -> Response:
    """`objects.delete`."""
    generation = call.request.generation()
    call.state.store.delete(call.bucket, call.name, generation, call.preconditions())
    return Response(204, committed=True)


def patch(call: Call) -> Response:
    """`objects.patch` and `objects.update`."""
    changes = writable_fields(call.request.json())
    stored = call.state.store.patch(call.bucket, call.name, changes, call.preconditions())
    return json_response(object_resource(stored, call.request.base_url), committed=True)


def compose(call: Call) -> Response:
    """`objects.compose`: up to 32 objects of the bucket, one after the other."""
    resource = call.request.json()
    sources = [_compose_source(call, entry) for entry in resource.get("sourceObjects", [])]
    if not 1 <= len(sources) <= MAX_COMPOSE_SOURCES:
        raise ApiError(400, f"{len(sources)} source objects; 1 to {MAX_COMPOSE_SOURCES} allowed.")
    fields = writable_fields(resource.get("destination", {}))
    components = sum(source.component_count or 1 for source in sources)
    stored = _join(call, sources, fields, components)
    return json_response(object_resource(stored, call.request.base_url), committed=True)


def copy(call: Call) -> Response:
    """`objects.copy`, within a bucket or to another one."""
    return json_response(object_resource(_copy(call), call.request.base_url), committed=True)


def rewrite(call: Call) -> Response:
    """`objects.rewrite`, always done in one step."""
    stored = _copy(call)
    answer = {
        "kind": "storage#rewriteResponse",
        "totalBytesRewritten": str(stored.size),
        "objectSize": str(stored.size),
        "done": True,
        "resource": object_resource(stored, call.request.base_url),
    }
    return json_response(answer, committed=True)


def parse_range(value: str, size: int) -> tuple[int, int] | None:
    """The start and length of a `Range` header: a-b, a- or -n; None for any other value.

    Raises:
        ApiError: 416 when no byte of the object is in the range.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", value.strip())
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
    if start >= end:
        raise ApiError(416, f"The requested range cannot be satisfied: {value} of {size} bytes.")
    return start, end - start


def _find(call: Call) -> StoredObject:
    stored = call.state.store.get(call.bucket, call.name, call.request.generation())
    call.preconditions().check(stored.versions, reading=True)
    return stored


def _download_headers(stored: StoredObject) -> dict[str, str]:
    headers = {
        "Content-Type": stored.fields.get("contentType", "application/octet-stream"),
        "Content-Disposition": "attachment",
        "Accept-Ranges": "bytes",
        "ETag": object_etag(stored),
        "Last-Modified": format_datetime(stored.created, usegmt=True),
        "X-Goog-Generation": str(stored.generation),
        "X-Goog-Metageneration": str(stored.metageneration),
        "X-Goog-Hash": hash_header(stored),
        "X-Goog-Storage-Class": "STANDARD",
        "X-Goog-Stored-Content-Encoding": stored.fields.get("contentEncoding", "identity"),
        "X-Goog-Stored-Content-Length": str(stored.size),
    }
    if "contentEncoding" in stored.fields:
        headers["Content-Encoding"] = stored.fields["contentEncoding"]
    return headers


def _compose_source(call: Call, entry: dict[str, Any]) -> StoredObject:
    generation = entry.get("generation")
    number = None if generation is None else int(generation)
    source = call.state.store.get(call.bucket, entry["name"], number)
    conditions = {key: str(value) for key, value in entry.get("objectPreconditions", {}).items()}
    Preconditions.from_query(conditions).check(source.versions)
    return source


def _copy(call: Call) -> StoredObject:
    store, query = call.state.store, call.request.query
    generation = query.get("sourceGeneration")
    store.bucket(call.source_bucket).require("storage.objects.get")
    source = store.get(
        call.source_bucket, call.source_name, int(generation) if generation else None
    )
    Preconditions.from_query(query, "ifSource").check(source.versions)
    fields = writable_fields(call.request.json()) or dict(source.fields)
    return _join(call, [source], fields, source.component_count)


def _join(
    call: Call, sources: list[StoredObject], fields: dict[str, Any], components: int | None
) -> StoredObject:
    store = call.state.store
    with store.new_writer(composite=components is not None) as writer:
        for source in sources:
            with store.open(source) as file:
                for block in iterate_blocks(file):
                    writer.write(block)
        blob = writer.finish()
    return store.commit(call.bucket, call.name, blob, fields, call.preconditions(), components)
