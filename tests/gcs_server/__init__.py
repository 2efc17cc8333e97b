"""A fake Google Cloud Storage on 127.0.0.1 for the real clients, with scripted faults.

    with FakeGcsServer(tmp_path, tls=True) as server:
        server.create_bucket("runs")
        server.add_fault(Fault("status", times=2, operation="upload", status=503))
        subprocess.run(["gsutil", "cp", "file", "gs://runs/a"],
                       env={**os.environ, **server.gsutil_environment(tmp_path)})
        assert server.read_object("runs", "a") == ...

The way of a request:

    listener    sockets, TLS, threads, HTTP in and out
    service     route, permission, faults, record
    objects, uploads     the operations
    store       buckets and objects; bytes in files

It speaks as much of the JSON API as the project's own uploads, downloads and listings need, through
google-cloud-storage, gsutil and gcloud; it enforces preconditions on generations and keeps hashes.
"""

from __future__ import annotations

from .errors import ApiError
from .faults import Fault
from .server import FakeGcsServer

__all__ = ["ApiError", "FakeGcsServer", "Fault"]
