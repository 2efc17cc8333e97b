"""JSON resources: how buckets and objects look in the answers of the JSON API."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from .store import Bucket, StoredObject

WRITABLE_FIELDS = frozenset(
    {
        "cacheControl",
        "contentDisposition",
        "contentEncoding",
        "contentLanguage",
        "contentType",
        "customTime",
        "metadata",
        "storageClass",
    }
)


def writable_fields(resource: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a resource sent by a client that are kept."""
    return {key: value for key, value in resource.items() if key in WRITABLE_FIELDS}


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, as the service writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def object_etag(stored: StoredObject) -> str:
    """A tag that changes with the content and with the metadata."""
    return base64.b64encode(f"{stored.generation}/{stored.metageneration}".encode()).decode()


def hash_header(stored: StoredObject) -> str:
    """The value of `X-Goog-Hash`."""
    md5 = f",md5={stored.blob.md5}" if stored.blob.md5 else ""
    return f"crc32c={stored.blob.crc32c}{md5}"


def object_resource(stored: StoredObject, base_url: str) -> dict[str, Any]:
    """The object resource; a composite object has a component count and no MD5."""
    path = f"b/{quote(stored.bucket, safe='')}/o/{quote(stored.name, safe='')}"
    media = f"{base_url}/download/storage/v1/{path}?generation={stored.generation}&alt=media"
    resource: dict[str, Any] = {
        "storageClass": "STANDARD",
        "contentType": "application/octet-stream",
        **stored.fields,
        "kind": "storage#object",
        "id": f"{stored.bucket}/{stored.name}/{stored.generation}",
        "selfLink": f"{base_url}/storage/v1/{path}",
        "mediaLink": media,
        "name": stored.name,
        "bucket": stored.bucket,
        "generation": str(stored.generation),
        "metageneration": str(stored.metageneration),
        "size": str(stored.size),
        "crc32c": stored.blob.crc32c,
        "etag": object_etag(stored),
        "timeCreated": format_time(stored.created),
        "timeFinalized": format_time(stored.created),
        "timeStorageClassUpdated": format_time(stored.created),
        "updated": format_time(stored.updated),
    }
    if stored.blob.md5 is not None:
        resource["md5Hash"] = stored.blob.md5
    if stored.component_count is not None:
        resource["componentCount"] = stored.component_count
    return resource


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
        "timeCreated": format_time(bucket.created),
        "updated": format_time(bucket.created),
        "billing": {"requesterPays": bucket.requester_pays},
        "iamConfiguration": {
            "uniformBucketLevelAccess": {"enabled": True},
            "publicAccessPrevention": "inherited",
        },
    }
