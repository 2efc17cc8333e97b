"""The fake Google Cloud Storage that tests start, script and look into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from ssl import SSLContext

from . import environments
from .listener import Listener
from .messages import State
from .service import RequestRecord, Service
from .store import Store, StoredObject
from .tls import build_context


class FakeGcsServer:
    """A server over plain HTTP and, with `tls`, over a second port with HTTPS.

    Both ports serve the same buckets, so that what gsutil uploads over TLS can be checked by
    the Python client over HTTP. Use it as a context manager; the files of the objects are
    removed at the end.
    """

    def __init__(self, directory: Path, *, tls: bool = False) -> None:
        self._state = State(Store(directory / "objects"))
        self._service = Service(self._state)
        self.settings = self._state
        store, service = self._state.store, self._service
        self.create_bucket, self.get_object, self.delete_object = (
            store.create_bucket,
            store.get,
            store.delete,
        )
        self.add_fault, self.clear_faults = service.faults.add, service.faults.clear
        self.clear_requests = service.records.clear
        self._certificate = directory / "certificate.pem"
        self._contexts: dict[str, SSLContext | None] = {"http": None}
        if tls:
            self._contexts["https"] = build_context(self._certificate)
        self._ports = {"http": 0, "https": 0}
        self._listeners: list[Listener] = []

    def __enter__(self) -> FakeGcsServer:
        self.start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Stop, and remove the files; a fault of the server itself fails the test."""
        self.stop()
        self._state.store.clear()
        if self._service.failures and error_type is None:
            raise RuntimeError("the fake server failed") from self._service.failures[0]

    def start(self) -> None:
        """Listen; after a `stop`, on the same ports and with the same objects."""
        self._service.faults.closing.clear()
        for scheme, context in self._contexts.items():
            listener = Listener(self._service, self._ports[scheme], context)
            self._ports[scheme] = listener.port
            self._listeners.append(listener)
            listener.start()

    def stop(self) -> None:
        """Refuse connections, cut those that are open, and wait for their threads."""
        self._service.faults.closing.set()
        while self._listeners:
            self._listeners.pop().stop()

    # Addresses and clients.

    @property
    def port(self) -> int:
        return self._ports["http"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

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
            directory, self._ports["https"], self._certificate, options or {}
        )

    # Buckets and objects.

    def put_object(self, bucket: str, name: str, data: bytes) -> StoredObject:
        writer = self._state.store.new_writer()
        writer.write(data)
        return self._state.store.commit(bucket, name, writer.finish())

    def read_object(self, bucket: str, name: str) -> bytes:
        """The content of an object."""
        with self._state.store.open(self.get_object(bucket, name)) as file:
            return file.read()

    def list_objects(self, bucket: str, prefix: str = "") -> list[str]:
        return [name for name in self._state.store.names(bucket) if name.startswith(prefix)]

    def unfinished_uploads(self) -> list[str]:
        """The names of objects of which a resumable upload is begun, not complete."""
        uploads = list(self._state.uploads.values())
        return [upload.name for upload in uploads if upload.stored is None]

    # Behaviour and observation.

    def requests(self, operation: str = "", name: str | None = None) -> list[RequestRecord]:
        """The requests so far, all or those of an operation ("upload": all uploads) or name."""
        return [
            record
            for record in list(self._service.records)
            if (record.operation + ".").startswith(operation + "." if operation else "")
            and name in (None, record.name)
        ]
