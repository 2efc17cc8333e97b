"""JSON resources: how buckets and objects look in the answers of the JSON API."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from .store import Bucket, StoredObject


def hash_header(stored: StoredObject) -> str:
    """The value of `X-Goog-Hash`."""
    md5 = f",md5={stored.blob.md5}" if stored.blob.md5 else ""
    return f"crc32c={stored.blob.crc32c}{md5}"


def object_resource(stored: StoredObject, base_url: str) -> dict[str, Any]:
    """The object resource; one that was composed has no MD5."""
    path = f"b/{quote(stored.bucket, safe='')}/o/{quote(stored.name, safe='')}"
    media = f"{base_url}/download/storage/v1/{path}?generation={stored.generation}&alt=media"
    created = _format_time(stored.created)
    resource: dict[str, Any] = {
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
        "etag": str(stored.generation),
        "contentType": stored.content_type,
        "storageClass": "STANDARD",
        "timeCreated": created,
        "updated": created,
    }
    if stored.blob.md5 is not None:
        resource["md5Hash"] = stored.blob.md5
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
        "timeCreated": _format_time(bucket.created),
        "updated": _format_time(bucket.created),
        "billing": {"requesterPays": bucket.requester_pays},
        "iamConfiguration": {"uniformBucketLevelAccess": {"enabled": True}},
    }


def _format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, as the service writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
