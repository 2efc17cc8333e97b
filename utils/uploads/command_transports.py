"""The transports that run a command: gcloud and gsutil, with the user's own credentials.

They run in a session of their own, so that Ctrl-C in the terminal does not reach them, and are
ended when they make no progress: a stall is killed, slowness is not. No shell, no credentials in
arguments.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path, PurePosixPath

from utils.base.errors import ObjectNotFoundError, StorageError, TransientStorageError
from utils.base.text import parse_json
from utils.base.uri import join_uri
from utils.checkpoints.layout import SAVING_PREFIX
from utils.storage.bucket import (
    Meter,
    ObjectInfo,
    WriteStream,
    mapped_file_errors,
    write_file,
)
from utils.uploads.transports import SMALL_BYTES, Transport, TransportOptions
from utils.uploads.watched_command import START_SECONDS, WatchedCommand

log = logging.getLogger(__name__)


class _CommandTransport(Transport):
    """What gsutil and gcloud have in common."""

    _quiet: tuple[str, ...] = ()

    def __init__(self, words: list[str], options: TransportOptions, meter: Meter) -> None:
        self.uri = options.uri.rstrip("/")
        self._options = options
        self._command = WatchedCommand(words, self.uri, options.stall_seconds, meter)

    def copy(self, object_name: str, target: str) -> None:
        """Copy an object within the bucket."""
        self._command.run(
            "cp", [self._object(object_name), self._object(target)], options=self._quiet
        )

    def read(self, object_name: str) -> bytes | None:
        """Return a small object's bytes, or None where there is none."""
        try:
            return self._command.run("cat", [self._object(object_name)], options=self._quiet)
        except ObjectNotFoundError:
            return None

    def delete(self, object_name: str, expected: ObjectInfo | None = None) -> None:
        """Remove an object."""
        options, words = self._quiet, [self._object(object_name)]
        if expected is not None:
            options, words = self._expecting(expected, words)
        with contextlib.suppress(ObjectNotFoundError):
            self._command.run("rm", words, options=options)

    def _expecting(
        self, expected: ObjectInfo | None, words: list[str]
    ) -> tuple[tuple[str, ...], list[str]]:
        """Return the options before and the words after a verb that ask for a version."""
        raise NotImplementedError

    @classmethod
    def _require(cls, program: str | None, hint: str) -> str:
        if program is None:
            raise StorageError(
                f"{cls.name} is not installed. {hint}, or --set upload_transport=python."
            )
        return program

    def _object(self, object_name: str) -> str:
        uri = join_uri(self.uri, object_name)
        if found := re.search(r"[][*?#]", uri):
            raise StorageError(
                f"{uri}: {self.name} takes {found[0]!r} for a part of a pattern or of a version. "
                "Use another name, or --set upload_transport=python."
            )
        return uri


class GcloudTransport(_CommandTransport):
    """Through `gcloud storage`: about 1 s a call."""

    name = "gcloud"
    _quiet = ("--no-user-output-enabled",)  # dots of its progress would pass for progress

    def __init__(self, options: TransportOptions, meter: Meter) -> None:
        program = self._require(shutil.which("gcloud"), "Install it")
        billing = [f"--billing-project={options.user_project}"] if options.user_project else []
        super().__init__([program, "--quiet", *billing, "storage"], options, meter)

    def put(
        self, object_name: str, write: WriteStream, expected: ObjectInfo | None, max_bytes: int
    ) -> None:
        """Upload as a stream; nothing is stored on the way."""
        options, words = self._expecting(expected, ["-", self._object(object_name)])
        try:
            self._command.run("cp", words, options=options, write=write)
        except ObjectNotFoundError as exc:
            # Its words are the same where the service has lost the upload's session.
            if not self._has_bucket():
                raise
            raise TransientStorageError(f"the upload's session was lost: {exc}") from exc

    def _has_bucket(self) -> bool:
        """Tell whether the bucket is there, even where it may not be looked at."""
        bucket = self.uri.removeprefix("gs://").partition("/")[0]
        try:
            self._command.run("buckets describe", [f"gs://{bucket}"])
        except ObjectNotFoundError:
            return False
        except StorageError as exc:
            log.debug("%s cannot be described: %s", bucket, exc)
        return True

    def _expecting(
        self, expected: ObjectInfo | None, words: list[str]
    ) -> tuple[tuple[str, ...], list[str]]:
        return self._quiet, [f"--if-generation-match={_generation(expected)}", *words]

    def stat(self, object_name: str) -> ObjectInfo | None:
        """Return size, crc32c and generation as gcloud describes them."""
        try:
            text = self._command.run(
                "objects describe", [self._object(object_name), "--format=json"]
            )
        except ObjectNotFoundError:
            return None
        try:
            found = parse_json(text)
            size, crc32c, generation = (found[k] for k in ("size", "crc32c_hash", "generation"))
            return ObjectInfo(object_name, int(size), str(crc32c), int(generation))
        except (ValueError, KeyError, TypeError) as exc:
            where = self._object(object_name)
            raise StorageError(f"gcloud describes {where} without size or crc32c.") from exc


class GsutilTransport(_CommandTransport):
    """Through gsutil: about 2 s a call.

    An archive is stored first: gsutil resumes an upload that broke off only from a file.
    """

    name = "gsutil"
    _quiet = ("-q",)  # but not for `stat`, which then says nothing at all

    def __init__(self, options: TransportOptions, meter: Meter) -> None:
        program = self._require(find_gsutil(), "Run: bash setup.sh (it puts gsutil into venv/)")
        words = [program, *(["-u", options.user_project] if options.user_project else [])]
        # Its own retries are short, ours follow; parts that a killed gsutil left would stay.
        retries = 1 if options.retry_seconds < START_SECONDS else 4
        words += ["-o", f"Boto:num_retries={retries}"]
        words += ["-o", "GSUtil:parallel_composite_upload_threshold=0"]
        super().__init__(words, options, meter)

    def put(
        self, object_name: str, write: WriteStream, expected: ObjectInfo | None, max_bytes: int
    ) -> None:
        """Upload from a local file; as a stream what is small or held to a rate."""
        target = self._object(object_name)
        options, words = self._expecting(expected, ["-", target])
        if max_bytes <= SMALL_BYTES or self._options.max_bytes_per_second is not None:
            self._command.run("cp", words, options=options, write=write)
            return
        archive = self._find_room(object_name, max_bytes)
        try:
            write_file(archive, write, partial(mapped_file_errors, str(archive)))
            words = ["--", glob.escape(str(archive)), target]
            self._command.run("cp", words, options=options, file=archive)
        except ObjectNotFoundError as exc:
            if archive.exists():
                raise
            raise TransientStorageError(f"{archive} was removed by another process.") from exc
        finally:
            with contextlib.suppress(OSError):  # left over, it is no reason to upload again
                archive.unlink(missing_ok=True)

    def _find_room(self, object_name: str, max_bytes: int) -> Path:
        """Return where the local archive of an object is to lie."""
        scratch = self._options.scratch
        where = scratch or "the temporary directory"
        with mapped_file_errors(f"gsutil needs a local archive in {where}"):
            folder = Path(scratch or tempfile.gettempdir()).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        if free < max_bytes:
            raise TransientStorageError(
                f"gsutil needs a local archive: up to {max_bytes} bytes in {folder}, where {free} "
                "are free. Free some space, or use --set upload_transport=python, which needs none."
            )
        return folder / f"{SAVING_PREFIX}{PurePosixPath(object_name).name}"

    def _expecting(
        self, expected: ObjectInfo | None, words: list[str]
    ) -> tuple[tuple[str, ...], list[str]]:
        return ("-q", "-h", f"x-goog-if-generation-match:{_generation(expected)}"), words

    def stat(self, object_name: str) -> ObjectInfo | None:
        """Return size, crc32c and generation as `gsutil stat` prints them."""
        try:
            text = self._command.run("stat", [self._object(object_name)]).decode("utf-8", "replace")
        except ObjectNotFoundError:
            return None
        patterns = (r"Content-Length:\s*(\d+)", r"Hash \(crc32c\):\s*(\S+)", r"Generation:\s*(\d+)")
        found = [re.search(rf"^\s*{pattern}", text, re.MULTILINE) for pattern in patterns]
        if not all(found):
            raise StorageError(f"gsutil stat {self._object(object_name)}: no size or crc32c.")
        size, crc32c, generation = (match[1] for match in found if match)
        return ObjectInfo(object_name, int(size), crc32c, int(generation))


def _generation(expected: ObjectInfo | None) -> int:
    return 0 if expected is None else expected.generation or 0


def find_gsutil() -> str | None:
    """Return the gsutil of the PATH, or the one that setup.sh put beside this Python."""
    beside = Path(sys.executable).with_name("gsutil")
    return shutil.which("gsutil") or (str(beside) if beside.is_file() else None)
