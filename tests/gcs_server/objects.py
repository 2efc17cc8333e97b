"""Operations of the JSON API on buckets and objects, apart from uploads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any
from urllib.parse import quote

from .errors import ApiError
from .messages import Call, FileSlice, Response, json_response
from .store import BLOCK_BYTES, Bucket, StoredObject

MAX_COMPOSE_SOURCES = 32


def get_bucket(call: Call) -> Response:
    """`buckets.get`."""
    return json_response(
        bucket_resource(call.state.store.bucket(call.bucket), call.request.base_url)
    )


def storage_layout(call: Call) -> Response:
    """`buckets.getStorageLayout`, which gcloud asks for before it lists."""
    layout = {"kind": "storage#storageLayout", "bucket": call.bucket, "location": "US-CENTRAL1"}
    return json_response({**layout, "hierarchicalNamespace": {"enabled": False}})


def list_objects(call: Call) -> Response:
    store, query = call.state.store, call.request.query
    limit = min(int(query.get("maxResults") or 1000), call.state.max_page_size)
    names, prefixes, token = list_page(
        store.names(call.bucket),
        query.get("prefix", ""),
        query.get("delimiter", ""),
        query.get("pageToken", ""),
        limit,
    )
    found = [store.find(call.bucket, name) for name in names]
    items = [object_resource(one, call.request.base_url) for one in found if one is not None]
    answer: dict[str, Any] = {"kind": "storage#objects", "items": items}
    if prefixes:
        answer["prefixes"] = prefixes
    if token:
        answer["nextPageToken"] = token
    return json_response(answer)


def list_page(
    names: Iterable[str], prefix: str, delimiter: str, token: str, limit: int
) -> tuple[list[str], list[str], str]:
    """Return names, prefixes that stand for names below them, and the token of the next page.

    `token` is the last name of the page before; `limit` is for names and prefixes together.
    """
    found: dict[str, bool] = {}
    for name in names:
        if name <= token or not name.startswith(prefix):
            continue
        end = name.find(delimiter, len(prefix)) if delimiter else -1
        entry = name if end < 0 else name[: end + len(delimiter)]
        if entry not in found and len(found) == limit:
            break
        found[entry], token = end < 0, name
    else:
        token = ""
    return [e for e in found if found[e]], [e for e in found if not found[e]], token


def get_object(call: Call) -> Response:
    """`objects.get` of the metadata."""
    return json_response(object_resource(_find(call), call.request.base_url))


def download(call: Call) -> Response:
    """`objects.get` of the content, or of a range of it."""
    stored = _find(call)
    headers = {
        "Content-Type": stored.content_type,
        "Accept-Ranges": "bytes",
        "ETag": str(stored.generation),
        "Last-Modified": format_datetime(stored.created, usegmt=True),
        "X-Goog-Generation": str(stored.generation),
        "X-Goog-Metageneration": "1",
        "X-Goog-Hash": f"crc32c={stored.blob.crc32c},md5={stored.blob.md5}",
        "X-Goog-Stored-Content-Encoding": "identity",
        "X-Goog-Stored-Content-Length": str(stored.size),
    }
    part = parse_range(call.request.headers.get("Range", ""), stored.size)
    start, length = part or (0, stored.size)
    if part:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{stored.size}"
    file = call.state.store.open(stored)
    return Response(206 if part else 200, headers, FileSlice(file, start, length))


def delete(call: Call) -> Response:
    """`objects.delete`."""
    generation, expected = (
        call.request.number("generation"),
        call.request.number("ifGenerationMatch"),
    )
    call.state.store.delete(call.bucket, call.name, generation, expected)
    return Response(204, committed=True)


def compose(call: Call) -> Response:
    """`objects.compose`: up to 32 objects of the bucket, one after the other."""
    resource = call.request.json()
    sources = [_compose_source(call, entry) for entry in resource.get("sourceObjects", [])]
    if not 1 <= len(sources) <= MAX_COMPOSE_SOURCES:
        raise ApiError(400, f"{len(sources)} source objects; 1 to {MAX_COMPOSE_SOURCES} allowed.")
    content_type = resource.get("destination", {}).get("contentType")
    stored = _join(call, sources, content_type)
    return json_response(object_resource(stored, call.request.base_url), committed=True)


def rewrite(call: Call) -> Response:
    """`objects.rewrite`, within a bucket and always done in one step."""
    source = call.state.store.get(
        call.bucket, call.source_name, call.request.number("sourceGeneration")
    )
    stored = _join(call, [source], source.content_type)
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
    return call.state.store.get(call.bucket, call.name, call.request.number("generation"))


def _compose_source(call: Call, entry: dict[str, Any]) -> StoredObject:
    source = call.state.store.get(call.bucket, entry["name"])
    expected = entry.get("objectPreconditions", {}).get("ifGenerationMatch")
    if expected is not None:
        call.state.store.require_generation(call.bucket, entry["name"], int(expected))
    return source


def _join(call: Call, sources: list[StoredObject], content_type: str | None) -> StoredObject:
    store = call.state.store
    writer = store.new_writer()
    for source in sources:
        with store.open(source) as file:
            while block := file.read(BLOCK_BYTES):
                writer.write(block)
    expected = call.request.number("ifGenerationMatch")
    return store.commit(call.bucket, call.name, writer.finish(), content_type, expected)


def object_resource(stored: StoredObject, base_url: str) -> dict[str, Any]:
    path = f"b/{quote(stored.bucket, safe='')}/o/{quote(stored.name, safe='')}"
    media = f"{base_url}/download/storage/v1/{path}?generation={stored.generation}&alt=media"
    created = _format_time(stored.created)
    return {
        "kind": "storage#object",
        "id": f"{stored.bucket}/{stored.name}/{stored.generation}",
        "selfLink": f"{base_url}/storage/v1/{path}",
        "mediaLink": media,
        "name": stored.name,
        "bucket": stored.bucket,
        "generation": str(stored.generation),
        "metageneration": "1",
        "size": str(stored.size),
        "crc32c": stored.blob.crc32c,
        "md5Hash": stored.blob.md5,
        "etag": str(stored.generation),
        "contentType": stored.content_type,
        "storageClass": "STANDARD",
        "timeCreated": created,
        "updated": created,
    }


def bucket_resource(bucket: Bucket, base_url: str) -> dict[str, Any]:
    """The bucket resource: one region, uniform access, and the settings it was made with."""
    return {
        **bucket.fields,
        "kind": "storage#bucket",
        "id": bucket.name,
        "name": bucket.name,
        "selfLink": f"{base_url}/storage/v1/b/{bucket.name}",
        "projectNumber": "1",
        "metageneration": "1",
        "location": "US-CENTRAL1",
        "locationType": "region",
        "storageClass": "STANDARD",
        "etag": "CAE=",
        "timeCreated": _format_time(bucket.created),
        "updated": _format_time(bucket.created),
        "billing": {"requesterPays": bucket.requester_pays},
        "iamConfiguration": {"uniformBucketLevelAccess": {"enabled": True}},
    }


def _format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, as the service writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
