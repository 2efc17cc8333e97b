"""The fake Google Cloud Storage that tests start, script and look into."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from ssl import SSLContext
from typing import Any

from . import environments
from .faults import Fault
from .listener import Listener
from .request_log import RequestRecord
from .service import Service
from .state import State
from .store import Store, StoredObject
from .tls import build_context, write_certificate


class FakeGcsServer:
    """A server over plain HTTP and, with `tls`, over a second port with HTTPS.

    Both ports serve the same buckets, so that what gsutil uploads over TLS can be checked by
    the Python client over HTTP. Use it as a context manager; the files of the objects are
    removed at the end.
    """

    def __init__(self, directory: Path, *, tls: bool = False) -> None:
        self._directory = directory
        self._state = State(Store(directory / "objects"))
        self._service = Service(self._state)
        self._tls = tls
        self._ports = {"http": 0, "https": 0}
        self._listeners: list[Listener] = []
        self._certificate: Path | None = None
        self._key: Path | None = None

    def __enter__(self) -> FakeGcsServer:
        self.start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Stop, and remove the files; a fault of the server itself fails the test."""
        self.stop()
        for upload in self._state.uploads.unfinished():
            upload.writer.discard()
        self._state.store.clear()
        if self._service.failures and error_type is None:
            raise RuntimeError("the fake server failed") from self._service.failures[0]

    def start(self) -> None:
        """Listen; after a `stop`, on the same ports and with the same objects."""
        self._service.faults.closing.clear()
        contexts: dict[str, SSLContext | None] = {"http": None}
        if self._tls:
            if self._certificate is None or self._key is None:
                self._certificate, self._key = write_certificate(self._directory / "tls")
            contexts["https"] = build_context(self._certificate, self._key)
        for scheme, context in contexts.items():
            listener = Listener(self._service, self._ports[scheme], context)
            self._ports[scheme] = listener.port
            self._listeners.append(listener)
            listener.start()

    def stop(self) -> None:
        """Refuse connections, cut those that are open, and wait for their threads."""
        self._service.faults.close()
        while self._listeners:
            self._listeners.pop().stop()

    # Addresses and clients.

    @property
    def port(self) -> int:
        return self._ports["http"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_port(self) -> int:
        """The port of HTTPS."""
        self._require_tls()
        return self._ports["https"]

    @property
    def certificate(self) -> Path:
        """The certificate of the HTTPS port, in PEM."""
        return self._require_tls()

    def client_environment(self) -> dict[str, str]:
        """Variables for `google.cloud.storage.Client`."""
        return environments.client_environment(self.url)

    def gcloud_environment(self, directory: Path) -> dict[str, str]:
        """Variables for `gcloud storage`, whose configuration goes below `directory`."""
        return environments.gcloud_environment(directory, self.url)

    def gsutil_environment(
        self, directory: Path, options: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Variables for gsutil, whose configuration goes below `directory`; needs `tls`.

        `options` are boto settings as {"Section:option": value}.
        """
        return environments.gsutil_environment(
            directory, self.tls_port, self._require_tls(), options or {}
        )

    # Buckets and objects.

    def create_bucket(
        self,
        name: str,
        *,
        writable: bool = True,
        without: Collection[str] = (),
        requester_pays: bool = False,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        """Make an empty bucket.

        Args:
            name: Its name.
            writable: Whether clients may create, change and delete objects.
            without: Permissions that are lacking besides, such as `storage.objects.delete`
                (which overwriting needs too) or `storage.buckets.get`.
            requester_pays: Whether requests without a user project are refused.
            fields: Settings that `buckets.get` tells, such as `retentionPolicy`.
        """
        self._state.store.create_bucket(
            name,
            writable=writable,
            without=without,
            requester_pays=requester_pays,
            fields=fields or {},
        )

    def put_object(self, bucket: str, name: str, data: bytes) -> StoredObject:
        with self._state.store.new_writer() as writer:
            writer.write(data)
            blob = writer.finish()
        return self._state.store.commit(bucket, name, blob)

    def read_object(self, bucket: str, name: str) -> bytes:
        """The content of an object."""
        with self._state.store.open(self.get_object(bucket, name)) as file:
            return file.read()

    def get_object(self, bucket: str, name: str) -> StoredObject:
        """The record of an object: size, generation, `blob.crc32c`, `blob.path`, ...

        Raises:
            ApiError: 404.
        """
        return self._state.store.get(bucket, name)

    def list_objects(self, bucket: str, prefix: str = "") -> list[str]:
        return [name for name in self._state.store.names(bucket) if name.startswith(prefix)]

    def delete_object(self, bucket: str, name: str) -> None:
        self._state.store.delete(bucket, name)

    def unfinished_uploads(self) -> list[str]:
        """The names of objects of which a resumable upload is begun, not complete."""
        return [upload.name for upload in self._state.uploads.unfinished()]

    # Behaviour and observation.

    @property
    def settings(self) -> State:
        """`max_page_size` can be set on it."""
        return self._state

    def add_fault(self, fault: Fault) -> Fault:
        """Script a fault, and return it so that the test can wait for it or release it."""
        return self._service.faults.add(fault)

    def clear_faults(self) -> None:
        self._service.faults.clear()

    def requests(self, operation: str = "", name: str | None = None) -> list[RequestRecord]:
        """The requests so far, all or those of an operation ("upload": all uploads) or name."""
        return [
            record
            for record in self._service.log.records()
            if (record.operation + ".").startswith(operation + "." if operation else "")
            and name in (None, record.name)
        ]

    def clear_requests(self) -> None:
        self._service.log.clear()

    def wait_for_request(
        self, predicate: Callable[[RequestRecord], bool], timeout_seconds: float = 10
    ) -> RequestRecord | None:
        """Wait for a request, past or to come; None when the time is over."""
        return self._service.log.wait_for(predicate, timeout_seconds)

    def _require_tls(self) -> Path:
        if self._certificate is None:
            raise RuntimeError("The server has no TLS port: start it with tls=True.")
        return self._certificate
