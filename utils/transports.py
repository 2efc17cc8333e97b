"""Ways for an archive to reach the bucket, behind one small protocol.

`directory` and `python` write through `utils.storage`; `gsutil` runs the user's own gsutil with
the user's own credentials, in a session of its own so that Ctrl-C in the terminal does not reach
it, and with a deadline. No shell, no credentials in arguments. No torch here.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Protocol

from utils.errors import (
    AccessDeniedError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from utils.storage import (
    DEFAULT_RETRY_SECONDS,
    Bucket,
    ObjectInfo,
    is_gcs_uri,
    join_uri,
    open_bucket,
)

GSUTIL_CALL_SECONDS = 300.0
GSUTIL_START_SECONDS = 15.0
GSUTIL_SLOWEST_BYTES_PER_SECOND = 1e6


class Transport(Protocol):
    """Puts files into one bucket URI and says what is there."""

    name: str
    uri: str

    def put(self, object_name: str, path: Path) -> None:
        """Upload a file."""

    def stat(self, object_name: str) -> ObjectInfo | None:
        """Return size and crc32c of an object, or None where there is none."""

    def read(self, object_name: str) -> bytes | None:
        """Return a small object's bytes, or None where there is none."""

    def delete(self, object_name: str) -> None:
        """Remove an object; one that does not exist is no error."""

    def close(self) -> None:
        """Release connections."""


class BucketTransport:
    """Through `utils.storage`: a directory, or google-cloud-storage."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.uri = bucket.uri
        self.name = "python" if is_gcs_uri(bucket.uri) else "directory"

    def put(self, object_name: str, path: Path) -> None:
        """Upload a file."""
        self._bucket.put_file(object_name, path)

    def stat(self, object_name: str) -> ObjectInfo | None:
        """Return size and crc32c; a directory's file is read for its checksum."""
        info = self._bucket.stat(object_name)
        if info is None or info.crc32c is not None:
            return info
        return ObjectInfo(info.name, info.size, self._bucket.crc32c(object_name), info.generation)

    def read(self, object_name: str) -> bytes | None:
        """Return a small object's bytes, or None where there is none."""
        try:
            return self._bucket.read_bytes(object_name)
        except ObjectNotFoundError:
            return None

    def delete(self, object_name: str) -> None:
        """Remove an object."""
        self._bucket.delete(object_name)

    def close(self) -> None:
        """Close the bucket."""
        self._bucket.close()


class GsutilTransport:
    """Through the gsutil program: about 2 s a call, every failure returns 1."""

    name = "gsutil"

    def __init__(
        self, uri: str, program: str, user_project: str | None, retry_seconds: float
    ) -> None:
        self.uri = uri
        self._call_seconds = min(GSUTIL_CALL_SECONDS, GSUTIL_START_SECONDS + retry_seconds)
        self._command = [program, *(["-u", user_project] if user_project else [])]
        if retry_seconds < GSUTIL_START_SECONDS:  # a probe: one second try, not gsutil's 23
            self._command += ["-o", "Boto:num_retries=1", "-o", "Boto:max_retry_delay=1"]

    def put(self, object_name: str, path: Path) -> None:
        """Upload a file; killed when it takes longer than a very slow line would."""
        seconds = self._call_seconds + path.stat().st_size / GSUTIL_SLOWEST_BYTES_PER_SECOND
        self._run(["-q", "cp", "--", glob.escape(str(path)), self._object(object_name)], seconds)

    def stat(self, object_name: str) -> ObjectInfo | None:
        """Return size and crc32c as `gsutil stat` prints them."""
        try:
            text = self._run(["stat", self._object(object_name)]).decode("utf-8", "replace")
        except ObjectNotFoundError:
            return None
        size = re.search(r"^\s*Content-Length:\s*(\d+)", text, re.MULTILINE)
        crc32c = re.search(r"^\s*Hash \(crc32c\):\s*(\S+)", text, re.MULTILINE)
        if size is None or crc32c is None:
            raise StorageError(f"gsutil stat {self._object(object_name)}: no size or crc32c.")
        return ObjectInfo(object_name, int(size[1]), crc32c[1])

    def read(self, object_name: str) -> bytes | None:
        """Return a small object's bytes, or None where there is none."""
        try:
            return self._run(["-q", "cat", self._object(object_name)])
        except ObjectNotFoundError:
            return None

    def delete(self, object_name: str) -> None:
        """Remove an object."""
        with contextlib.suppress(ObjectNotFoundError):
            self._run(["-q", "rm", self._object(object_name)])

    def close(self) -> None:
        """Nothing to release."""

    def _object(self, object_name: str) -> str:
        return join_uri(self.uri, object_name)

    def _run(self, arguments: list[str], seconds: float | None = None) -> bytes:
        seconds = self._call_seconds if seconds is None else seconds
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(  # noqa: S603
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired as exc:
                _kill_session(process)
                raise TransientStorageError(
                    f"gsutil {_verb(arguments)} {self.uri} took longer than {seconds:.0f} s and "
                    "was ended."
                ) from exc
            errors.seek(0)
            message = errors.read().decode("utf-8", "replace")
        if process.returncode != 0:
            raise _gsutil_error(message, f"gsutil {_verb(arguments)} {self.uri}")
        return output


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()


def _verb(arguments: list[str]) -> str:
    return next(word for word in arguments if not word.startswith("-"))


def _gsutil_error(message: str, call: str) -> StorageError:
    lines = [line for line in message.splitlines() if line.strip()]
    detail = f"{call}: {lines[-1].strip()[:300] if lines else 'failed'}"
    if re.search(r"with no configured\s+credentials", message):  # 403, told in four lines
        return AccessDeniedError(f"{call}: no credentials. Run: gcloud auth login")
    if re.search(r"AccessDenied|Forbidden|\b40[13]\b|Anonymous caller|does not have", message):
        return AccessDeniedError(detail)
    if re.search(r"BucketNotFound|NotFoundException|No URLs matched|\b404\b", message):
        return ObjectNotFoundError(detail)
    return TransientStorageError(detail)


def find_gsutil() -> str | None:
    """Return the gsutil program: on PATH, or beside this Python (in the virtual environment)."""
    beside = Path(sys.executable).with_name("gsutil")
    return shutil.which("gsutil") or (str(beside) if beside.is_file() else None)


def build_transport(
    uri: str,
    transport: str = "auto",
    user_project: str | None = None,
    retry_seconds: float = DEFAULT_RETRY_SECONDS,
) -> Transport:
    """Return the transport that a configuration asks for.

    `auto` is the directory itself for a directory; for gs:// gsutil where it is found, else the
    google-cloud-storage client.

    Raises:
        StorageError: The transport does not fit the URI, or gsutil is not installed.
    """
    if not is_gcs_uri(uri):
        if transport not in ("auto", "directory"):
            raise StorageError(f"upload_transport {transport} needs a gs:// URI, not {uri}.")
        return BucketTransport(open_bucket(uri))
    if transport == "directory":
        raise StorageError(f"upload_transport directory needs a directory, not {uri}.")
    program = find_gsutil()
    if transport == "gsutil" and program is None:
        raise StorageError(
            "gsutil is not installed. Run: bash setup.sh (it puts gsutil into venv/), "
            "or --set upload_transport=python."
        )
    if transport in ("auto", "gsutil") and program is not None:
        return GsutilTransport(uri.rstrip("/"), program, user_project, retry_seconds)
    return BucketTransport(open_bucket(uri, user_project, retry_seconds))
