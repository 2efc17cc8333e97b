"""A fake Google Cloud Storage on 127.0.0.1 for the real clients, with scripted faults.

    with FakeGcsServer(tmp_path, tls=True) as server:
        server.create_bucket("runs")
        server.add_fault(Fault("status", times=2, operation="upload", status=503))
        subprocess.run(["gsutil", "cp", "file", "gs://runs/a"],
                       env={**os.environ, **server.gsutil_environment(tmp_path)})
        assert server.read_object("runs", "a") == ...

The way of a request:

    listener    sockets, TLS, threads
    connection  HTTP in and out
    service     route, permission, faults, record
    objects, uploads, xml_uploads, batch     the operations
    store       buckets and objects; bytes in files (`blobs`)

It speaks the JSON API and the XML API's multipart uploads, enforces preconditions, and keeps
hashes. It has no object versions, no ACLs, no encryption keys and no transcoding of gzip.
"""

from __future__ import annotations

from .errors import ApiError
from .faults import Fault
from .request_log import RequestRecord
from .server import FakeGcsServer
from .store import StoredObject

__all__ = ["ApiError", "FakeGcsServer", "Fault", "RequestRecord", "StoredObject"]
