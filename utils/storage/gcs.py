"""A bucket of Google Cloud Storage. The one place that knows google.cloud."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from utils.base.errors import (
    AccessDeniedError,
    ConflictError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
    UsageError,
)
from utils.storage.bucket import (
    SEND_BLOCK_BYTES,
    Meter,
    ObjectInfo,
    StreamSink,
    WriteStream,
    crc32c_of_bytes,
    crc32c_of_file,
)

CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 60.0
POOL_CONNECTIONS = 32
STREAM_CHUNK_BYTES = 16 * 2**20
SESSIONS = 3  # of one upload, where the service loses them
_UPLOAD_ID = re.compile(r"(upload_id=)[^&\s)'\"]+")


class GcsBucket:
    """A bucket of Google Cloud Storage, through the google-cloud-storage client.

    Application Default Credentials or a service account where there are any, anonymous where
    there are none; `STORAGE_EMULATOR_HOST` is honoured by the client itself.
    """

    def __init__(
        self, uri: str, user_project: str | None, retry_seconds: float, meter: Meter
    ) -> None:
        bucket_name, _, prefix = uri.removeprefix("gs://").partition("/")
        if not bucket_name:
            raise UsageError(f"{uri!r} names no bucket: use gs://bucket/prefix.")
        self.uri = uri.rstrip("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._client, self._meter = _build_gcs_client(meter), meter
        self._bucket = self._client.bucket(bucket_name, user_project=user_project or None)
        self._options = _gcs_request_options(retry_seconds)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose name starts with `prefix`, page by page, sorted by name.

        What the Cloud Console makes for an empty folder, an empty object whose name ends with a
        slash, is a folder here too, and no object.
        """
        with self._mapped_errors(prefix):
            blobs = self._client.list_blobs(
                self._bucket,
                prefix=self._prefix + prefix,
                fields="items(name,size,crc32c,generation),nextPageToken",
                **self._options,
            )
            for blob in blobs:
                if blob.size or not blob.name.endswith("/"):
                    yield self._info(blob)

    def stat(self, name: str) -> ObjectInfo | None:
        """Return size, checksum and generation, or None where there is no such object."""
        with self._mapped_errors(name):
            blob = self._bucket.get_blob(self._prefix + name, **self._options)
        return None if blob is None else self._info(blob)

    def crc32c(self, name: str) -> str:
        """Return the checksum that the bucket itself keeps."""
        info = self.stat(name)
        if info is None or info.crc32c is None:
            raise ObjectNotFoundError(f"{self.uri}/{name} does not exist.")
        return info.crc32c

    def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes, or `length` of them from `start`."""
        if length == 0:
            return b""
        end = None if length is None else start + length - 1
        with self._mapped_errors(name):
            blob = self._blob(name)
            data: bytes = blob.download_as_bytes(start=start or None, end=end, **self._options)
        return data

    def get_file(self, name: str, path: Path) -> str:
        """Download to `path`; the client checks the bytes against the stored checksum."""
        with self._mapped_errors(name):
            self._blob(name).download_to_filename(str(path), checksum="crc32c", **self._options)
        return crc32c_of_file(path)

    def fetch(self, name: str, scratch: Path) -> Path:
        """Download to `scratch`."""
        self.get_file(name, scratch)
        return scratch

    def put_file(self, name: str, path: Path) -> ObjectInfo:
        """Upload the file; above 8 MiB as a resumable upload."""
        options = {"checksum": "crc32c", **self._options}
        return self._upload(name, lambda blob: blob.upload_from_filename(str(path), **options))

    def put_stream(self, name: str, write: WriteStream, expected: ObjectInfo | None) -> None:
        """Write as one resumable upload, chunk by chunk."""
        with self._mapped_errors(name):
            writer = self._blob(name).open(
                "wb",
                chunk_size=STREAM_CHUNK_BYTES,
                ignore_flush=True,
                if_generation_match=_generation(expected),
                checksum="crc32c",
                **self._options,
            )
        sink: Any = StreamSink(writer, lambda: self._mapped_errors(name))
        try:
            write(sink)
            with self._mapped_errors(name):
                writer.close()
        except BaseException:
            # Or the garbage collector would close it: send the rest, and commit. (`terminate` of
            # version 3.17 asks the wrong address; the service drops the session after a week.)
            writer._buffer.close()  # noqa: SLF001
            raise

    def compose(
        self, name: str, parts: Sequence[ObjectInfo], expected: ObjectInfo | None
    ) -> ObjectInfo:
        """Join up to 32 objects of the bucket to one, where it still holds `expected`."""
        with self._mapped_errors(name):
            blob = self._blob(name)
            blob.compose(
                [self._blob(part.name) for part in parts],
                if_source_generation_match=[part.generation for part in parts],
                if_generation_match=_generation(expected),
                **self._options,
            )
        return self._info(blob)

    def copy(self, name: str, target: str) -> None:
        """Copy an object within the bucket."""
        with self._mapped_errors(name):
            source, blob = self._blob(name), self._blob(target)
            token, *_ = blob.rewrite(source, **self._options)
            while token is not None:
                token, *_ = blob.rewrite(source, token=token, **self._options)

    def put_bytes(self, name: str, data: bytes) -> ObjectInfo:
        """Write an object; above 8 MiB as a resumable upload."""
        options = {"checksum": "crc32c", **self._options}
        return self._upload(name, lambda blob: blob.upload_from_string(data, **options))

    def read_version(self, name: str) -> tuple[bytes, ObjectInfo]:
        """Return a small object's bytes and their generation, both of one answer."""
        with self._mapped_errors(name):
            blob = self._blob(name)
            data: bytes = blob.download_as_bytes(checksum="crc32c", **self._options)
        info = ObjectInfo(name, len(data), crc32c_of_bytes(data), int(blob.generation or 0))
        return data, info

    def put_bytes_if(self, name: str, data: bytes, expected: ObjectInfo | None) -> ObjectInfo:
        """Write a small object where the bucket still holds the generation of `expected`."""
        condition = {"if_generation_match": _generation(expected)}
        options = {"checksum": "crc32c", **condition, **self._options}
        try:
            return self._upload(name, lambda blob: blob.upload_from_string(data, **options))
        except ConflictError:
            # Where the answer to the first attempt was lost, the next one meets its own object.
            found = self.stat(name)
            if found is None or (found.size, found.crc32c) != (len(data), crc32c_of_bytes(data)):
                raise
            return found

    def delete(self, name: str) -> None:
        """Remove the object; one that does not exist is no error."""
        self._delete(name)

    def delete_if(self, name: str, expected: ObjectInfo) -> None:
        """Remove the object where the bucket still holds the generation of `expected`."""
        try:
            self._delete(name, if_generation_match=_generation(expected))
        except ConflictError:
            if self.stat(name) is not None:  # none: gone before, or the first answer was lost
                raise

    def _delete(self, name: str, **condition: int) -> None:
        with contextlib.suppress(ObjectNotFoundError), self._mapped_errors(name):
            self._blob(name).delete(**condition, **self._options)
            self._meter.show_life()

    def deletion_notes(self) -> Sequence[str]:
        """Say what the bucket's settings do with objects that are deleted."""
        try:
            with self._mapped_errors(""):
                self._bucket.reload(**self._options)
        except StorageError as exc:
            return [f"The settings of {self.uri} cannot be read: {exc}"]
        return _describe_deletion(self._bucket)

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def _upload(self, name: str, send: Callable[[Any], None]) -> ObjectInfo:
        """Have a blob sent, in a new session where the service has lost the one it was sent in."""
        for number in range(1, SESSIONS + 1):
            blob = self._blob(name)
            try:
                with self._mapped_errors(name):
                    send(blob)
                break
            except TransientStorageError as exc:
                if number == SESSIONS or "upload_id" not in _query_of(exc.__cause__):
                    raise
        return self._info(blob)

    def _blob(self, name: str) -> Any:
        return self._bucket.blob(self._prefix + name)

    def _info(self, blob: Any) -> ObjectInfo:
        name = blob.name.removeprefix(self._prefix)
        return ObjectInfo(name, int(blob.size or 0), blob.crc32c, int(blob.generation or 0))

    @contextlib.contextmanager
    def _mapped_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as exc:  # every library underneath raises its own family
            raise _map_gcs_error(exc, f"{self.uri}/{name}" if name else self.uri) from exc


def _generation(expected: ObjectInfo | None) -> int:
    """Return the generation to ask for; 0 means that there is no object."""
    if expected is None:
        return 0
    if not expected.generation:
        raise StorageError(f"{expected.name}: the server did not say which version of it there is.")
    return expected.generation


def _describe_deletion(bucket: Any) -> list[str]:
    """Say what the settings of a bucket do with objects that are deleted."""
    notes = []
    if bucket.retention_period:
        lock = "locked" if bucket.retention_policy_locked else "not locked"
        notes.append(
            f"Retention policy ({lock}): objects younger than {_days(bucket.retention_period)} "
            "cannot be deleted."
        )
    soft_delete = bucket.soft_delete_policy.retention_duration_seconds
    if soft_delete:
        notes.append(
            f"Soft deletion: what is deleted can be restored for {_days(soft_delete)}, and is paid "
            "for until then."
        )
    if bucket.versioning_enabled:
        notes.append(
            "Object versioning: what is deleted stays as an older version, and is paid for."
        )
    return notes or ["What is deleted is gone at once: no retention, soft deletion or versions."]


def _days(seconds: float) -> str:
    return f"{seconds / 86400:g} days"


def _build_gcs_client(meter: Meter) -> Any:
    # Or the client's first use asks for the bucket's own metadata in a thread nobody waits for.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    import google.auth
    import google.auth.exceptions
    from google.cloud import storage

    if os.environ.get("STORAGE_EMULATOR_HOST"):
        client = storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "emulator"))
    else:
        try:
            credentials, project = google.auth.default(scopes=storage.Client.SCOPE[:1])
            client = storage.Client(project=project or "none", credentials=credentials)
        except google.auth.exceptions.DefaultCredentialsError:
            client = storage.Client.create_anonymous_client()
        except OSError as exc:
            raise AccessDeniedError(f"The credentials cannot be read: {exc}.") from exc
    adapter = _build_adapter(meter)
    for scheme in ("https://", "http://"):
        client._http.mount(scheme, adapter)  # noqa: SLF001 - its session, there is no other way
    return client


class _MeteredBody:
    """The body of a request, read block by block as it is sent."""

    def __init__(self, data: bytes, meter: Meter) -> None:
        self._data, self._meter, self._position = memoryview(data), meter, 0

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int = SEND_BLOCK_BYTES) -> bytes:
        block = self._data[self._position : self._position + size]
        self._position += len(block)
        self._meter.pass_on(len(block))
        return bytes(block)


def _build_adapter(meter: Meter) -> Any:
    """Return what sends the bodies of requests in blocks.

    A body that is sent in one call has to be gone within the timeout, so that a slow line would
    look like a dead one. In blocks, the timeout is for each of them.
    """
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):  # type: ignore[misc]
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> Any:
            return super().init_poolmanager(*args, blocksize=SEND_BLOCK_BYTES, **kwargs)

        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(request.body, bytes):
                request.body = _MeteredBody(request.body, meter)
            return super().send(request, *args, **kwargs)

    return Adapter(pool_maxsize=POOL_CONNECTIONS)


def _gcs_request_options(retry_seconds: float) -> dict[str, Any]:
    from google.cloud.storage.retry import DEFAULT_RETRY

    # Every write here is idempotent: the same name gets the same bytes.
    return {
        "retry": DEFAULT_RETRY.with_timeout(retry_seconds),
        "timeout": (min(CONNECT_TIMEOUT_SECONDS, max(retry_seconds, 1.0)), READ_TIMEOUT_SECONDS),
    }


def _map_gcs_error(exc: Exception, where: str) -> StorageError:
    """Return the StorageError that tells callers what to do about a client library error."""
    import requests
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    cause = exc.cause if isinstance(exc, api.RetryError) and exc.cause else exc
    code = getattr(cause, "code", None)
    if isinstance(cause, InvalidResponse):
        code = cause.response.status_code
    detail = f"{where}: {_innermost_reason(cause)}"
    # The last of these: anonymous and asked to log in.
    if code in (401, 403) or isinstance(cause, (auth.RefreshError, auth.InvalidOperation)):
        return AccessDeniedError(detail)
    # An upload session, a copy or the version that is being read is lost: it can be begun anew.
    if code == 410 or (code == 404 and {"upload_id", "generation"} & _query_of(cause)):
        return TransientStorageError(detail)
    if code == 404:
        return ObjectNotFoundError(detail)
    if code in (409, 412):
        return ConflictError(detail)
    lost = (requests.exceptions.RequestException, OSError, auth.TransportError, DataCorruption)
    is_busy = code in (408, 429) or (isinstance(code, int) and code >= 500)
    if is_busy or isinstance(cause, (*lost, api.RetryError)):
        return TransientStorageError(detail)
    return StorageError(detail)


def _query_of(exc: BaseException | None) -> set[str]:
    """Return the keys in the query of the request that an error answers."""
    request = getattr(getattr(exc, "response", None), "request", None)
    return set(parse_qs(urlsplit(getattr(request, "url", None) or "").query))


def _innermost_reason(exc: BaseException) -> str:
    """Return one readable line; connection errors wrap their reason several times.

    Whoever knows the address of an upload session may write to it, so logs must not have it.
    """
    import requests

    inner = exc
    if isinstance(exc, requests.exceptions.ConnectionError):
        while inner.__cause__ or inner.__context__:
            inner = inner.__cause__ or inner.__context__ or inner
    text = _UPLOAD_ID.sub(r"\1...", str(inner).strip())
    if isinstance(exc, requests.exceptions.ConnectionError):
        return f"no connection ({text})."
    return text.splitlines()[0][:300] if text else type(exc).__name__
