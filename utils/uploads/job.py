"""One upload, from a committed checkpoint to its sidecar in the bucket.

    checkpoint -> archive (stream) -> bucket -> verified there -> sidecar (NAME.json)

The sidecar is written last and only when the archive in the bucket has the size and crc32c that
were computed while it was made. What is there already is not sent again: an archive whose answer
was lost, or one without its sidecar. An object of another run is never overwritten; one of a branch
that this one has left is copied aside first. Every write names the version that it replaces, so
that a late writer cannot overwrite a newer object. No torch here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from configs.config_files import TRAINING_CONFIG_FILE
from utils.base.archive_formats import ARCHIVE_FORMATS, COMPRESSIONS
from utils.base.errors import CheckpointError, ConflictError, StorageError, TransientStorageError
from utils.base.text import FOREIGN_ERRORS, parse_json
from utils.base.uri import join_uri, local_path
from utils.checkpoints.layout import (
    ARCHIVE_SUFFIX,
    METADATA_FILE,
    REMOTE_FOLDER,
    SET_ASIDE_FOLDER,
    FileEntry,
    Manifest,
    archive_object,
    read_manifest,
    sidecar_object,
)
from utils.checkpoints.views import find_sidecar_damage, read_json_part
from utils.storage.bucket import Meter, Nowhere, ObjectInfo, map_file_error
from utils.uploads.archive import write_archive
from utils.uploads.transport_choice import OpenTransport, open_transport
from utils.uploads.transports import Transport, TransportOptions, put_bytes
from utils.uploads.watched_command import StallTimer

# A stream of what does not compress grows by less than this, and so does a tar of many files.
ARCHIVE_GROWTH = 1.01
ARCHIVE_OVERHEAD_BYTES = 2**20
# Without progress: less than what the process that waits for the result allows.
TIDY_SECONDS = 10.0
TIDY_POLL_SECONDS = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UploadJob:
    """What to upload and how; plain values, so that it can be sent to another process.

    Attributes:
        transport: The way to the bucket; its name is not auto for gs://.
        should_sweep: Remove what other interrupted uploads left, but for those in `owed`.
        owed: Names of checkpoints that are still to be uploaded.
    """

    checkpoint: str
    transport: TransportOptions
    compression: str = "fast"
    threads: int = 1
    should_sweep: bool = False
    owed: tuple[str, ...] = ()


@dataclass(frozen=True)
class UploadResult:
    """A verified archive: its bytes, base64 crc32c and the end of its name.

    `sent` has the bytes of it that were sent, 0 where it was there already.
    """

    size: int
    crc32c: str
    seconds: float
    sent: int
    suffix: str = ARCHIVE_SUFFIX


@dataclass(frozen=True)
class ProgressReport:
    """How far an upload is.

    Attributes:
        stage: checking, archiving (nothing is sent yet), uploading, or verifying.
        read: Bytes of the checkpoint that are in the archive, of `total`.
        size: Bytes of the archive, None while it is being made.
        signs_of_life: Changes while something is done that neither reads nor sends.
    """

    stage: str
    read: int
    total: int
    sent: int
    size: int | None
    signs_of_life: int


@dataclass
class UploadProgress:
    """How far this process is with an upload; the attributes are those of `ProgressReport`."""

    stage: str = "checking"
    read: int = 0
    total: int = 0
    size: int | None = None
    meter: Meter = field(default_factory=Meter)

    def report(self) -> ProgressReport:
        """Return how far it is now."""
        meter, stage = self.meter, self.stage
        if stage == "archiving" and meter.sent:
            stage = "uploading"
        return ProgressReport(
            stage, self.read, self.total, meter.sent, self.size, meter.signs_of_life
        )


def run_job(
    job: UploadJob, progress: UploadProgress, open_way: OpenTransport = open_transport
) -> UploadResult:
    """Upload one checkpoint, and keep `progress` up to date meanwhile.

    Raises:
        CheckpointError: The checkpoint is damaged, or its name in the bucket belongs to another.
        StorageError: The bucket could not be written; transient where another try may help.
    """
    checkpoint = Path(job.checkpoint)
    manifest = read_manifest(checkpoint)
    progress.meter = Meter(job.transport.max_bytes_per_second)
    progress.total = manifest.total_bytes
    with contextlib.closing(open_way(job.transport, progress.meter)) as transport:
        try:
            return _Upload(job, checkpoint, manifest, transport, progress).run()
        except OSError as exc:
            raise map_file_error(exc, str(exc.filename or checkpoint.name)) from exc


@dataclass
class _Upload:
    """The steps of one upload."""

    job: UploadJob
    checkpoint: Path
    manifest: Manifest
    transport: Transport
    progress: UploadProgress
    info: FileEntry | None = None
    sent: int = 0

    def __post_init__(self) -> None:
        self.suffix = COMPRESSIONS[self.job.compression].suffix
        self.archive = archive_object(self.checkpoint.name, self.suffix)
        self.sidecar = sidecar_object(self.checkpoint.name)

    def run(self) -> UploadResult:
        started = time.monotonic()
        stored = self.transport.stat(self.archive)
        data = self.transport.read(self.sidecar)
        found = None if data is None else _FoundSidecar.parse(data)
        described = stored
        if found and found.suffix != self.suffix:
            described = self.transport.stat(archive_object(self.checkpoint.name, found.suffix))
        is_same = found is not None and found.manifest == self.manifest
        if found and is_same and found.has_own_metadata and found.is_of(described):
            assert found.archive is not None
            return self._done(found.archive, started, found.suffix)
        if data is not None:
            self._make_way(data, found, described)
        if stored is not None and self._measure() == _info_of(stored):
            log.info("The archive of %s is in the bucket already.", self.checkpoint.name)
        else:
            self._put(stored)
        return self._finish(started)

    def _make_way(
        self, data: bytes, found: _FoundSidecar | None, stored: ObjectInfo | None
    ) -> None:
        """Take away a sidecar that is not this checkpoint's, and the archive that it describes.

        Raises:
            CheckpointError: It must not be overwritten.
            TransientStorageError: It is being changed at this moment.
        """
        where = join_uri(self.transport.uri, self.sidecar)
        owner, own = found.manifest.identity if found else None, self.manifest.identity
        # Branches are numbered as they begin: a later one goes on where earlier ones were left.
        if owner is None or owner.run_id != own.run_id or owner.branch > own.branch:
            theirs, ours = f"run {owner.run_id if owner else 'unknown'}", own.run_id
            if owner is not None and owner.run_id == own.run_id:
                theirs, ours = f"branch {owner.branch} of this run", f"branch {own.branch}"
            raise CheckpointError(
                f"{where} belongs to {theirs}, not {ours}, and is not overwritten. "
                "Give this run a name of its own: --set run_name=NAME."
            )
        seen = self.transport.stat(self.sidecar)
        if self.transport.read(self.sidecar) != data:
            raise TransientStorageError(f"{where} was changed by another process.")
        is_whole = found is not None and found.is_of(stored)
        archive = stored.name if stored else self.archive
        is_another = found is None or found.manifest != self.manifest
        if is_another and (is_whole or owner.branch != own.branch):
            self._set_aside(owner.branch, [archive, self.sidecar] if is_whole else [self.sidecar])
        try:
            # Before the archive: a sidecar is never there without the archive that it describes.
            self.transport.delete(self.sidecar, seen)
            if archive != self.archive:
                self.transport.delete(archive, stored)
        except ConflictError as exc:
            raise TransientStorageError(str(exc)) from exc

    def _set_aside(self, branch: int, names: list[str]) -> None:
        """Copy what is there to where nothing replaces it."""
        folder = self._free_folder(f"{REMOTE_FOLDER}/{SET_ASIDE_FOLDER}/branch-{branch}")
        level = logging.WARNING if branch == self.manifest.identity.branch else logging.INFO
        message = "The bucket has another %s, of branch %d of this run. It is copied to %s."
        log.log(level, message, self.checkpoint.name, branch, join_uri(self.transport.uri, folder))
        for name in names:
            self.transport.copy(name, f"{folder}/{PurePosixPath(name).name}")

    def _free_folder(self, folder: str) -> str:
        """Return a folder in which this checkpoint has not been set aside yet."""
        sidecar = PurePosixPath(self.sidecar).name
        names = itertools.chain([folder], (f"{folder}-{n}" for n in itertools.count(2)))
        return next(name for name in names if self.transport.stat(f"{name}/{sidecar}") is None)

    def _write(self, sink: IO[bytes]) -> None:
        self.progress.read = 0
        self.info = None
        self.info = write_archive(
            self.checkpoint,
            self.manifest,
            sink,
            compression=self.job.compression,
            threads=self.job.threads,
            on_read=self._count,
        )
        self.progress.size = self.info.size

    def _count(self, count: int) -> None:
        self.progress.read += count

    def _measure(self) -> FileEntry:
        """Return what the archive would be."""
        sink: Any = Nowhere()
        self._write(sink)
        assert self.info is not None
        return self.info

    def _put(self, stored: ObjectInfo | None) -> None:
        most = int(self.manifest.total_bytes * ARCHIVE_GROWTH) + ARCHIVE_OVERHEAD_BYTES
        self.progress.stage, self.progress.size = "archiving", None
        try:
            self.transport.put(self.archive, self._write, stored, most)
        except (ConflictError, TransientStorageError) as exc:
            # The object may have been written all the same, and only the answer was lost.
            arrived = None
            with contextlib.suppress(StorageError):
                arrived = self.transport.stat(self.archive)
            if self.info is not None and _info_of(arrived) == self.info:
                log.info("%s arrived, though its answer did not: %s", self.archive, exc)
                return
            if isinstance(exc, ConflictError):
                raise TransientStorageError(str(exc)) from exc  # look again at what is there
            raise
        finally:
            self.sent = self.progress.meter.sent

    def _finish(self, started: float) -> UploadResult:
        assert self.info is not None
        self.progress.stage = "verifying"
        stored = self.transport.stat(self.archive)
        if _info_of(stored) != self.info:
            found = f"{stored.size} bytes, crc32c {stored.crc32c}" if stored else "nothing"
            raise TransientStorageError(
                f"the bucket holds {found} instead of {self.info.size} bytes, crc32c "
                f"{self.info.crc32c}."
            )
        metadata, problem = read_json_part(self.checkpoint / METADATA_FILE, self.manifest)
        if problem is not None:
            raise CheckpointError(f"{self.checkpoint.name}: {problem}.")
        config, _ = read_json_part(self.checkpoint / TRAINING_CONFIG_FILE, self.manifest)
        other_format = {} if self.suffix == ARCHIVE_SUFFIX else {"format": self.suffix}
        sidecar = {
            "manifest": self.manifest.to_json(),
            "metadata": metadata,
            "config": config,
            "archive": {"size": self.info.size, "crc32c": self.info.crc32c, **other_format},
        }
        data = json.dumps(sidecar, indent=1).encode("utf-8")
        try:
            put_bytes(self.transport, self.sidecar, data, None)  # `_make_way` made room for it
        except ConflictError as exc:
            if self.transport.read(self.sidecar) != data:
                raise TransientStorageError(str(exc)) from exc
        return self._done(self.info, started, self.suffix)

    def _done(self, info: FileEntry, started: float, suffix: str) -> UploadResult:
        self._remove_unfinished()
        seconds = time.monotonic() - started
        return UploadResult(info.size, info.crc32c, seconds, self.sent, suffix)

    def _remove_unfinished(self) -> None:
        """Remove what this upload, or others before it, left on the way.

        The upload is done and counts, whatever becomes of this: a bucket that does not let go is
        left alone as soon as it makes no progress.
        """
        owed = (archive_object(name, self.suffix) for name in self.job.owed)
        keep = frozenset(owed) - {self.archive}
        only = None if self.job.should_sweep else self.archive
        problem: BaseException | None = TransientStorageError(
            f"no answer for {TIDY_SECONDS:.0f} s."
        )

        def tidy() -> None:
            nonlocal problem
            try:
                self.transport.remove_unfinished(REMOTE_FOLDER, keep, only)
                problem = None
            except BaseException as exc:  # noqa: BLE001 - raised below, where it is none of these
                problem = exc

        thread = threading.Thread(target=tidy, name="tidy", daemon=True)
        thread.start()
        timer = StallTimer(TIDY_SECONDS)
        while thread.is_alive() and not timer.is_over:
            thread.join(TIDY_POLL_SECONDS)
            timer.see(self.progress.meter.signs_of_life)
        if isinstance(problem, (StorageError, OSError)):
            uri = join_uri(self.transport.uri, REMOTE_FOLDER, self.transport.remains)
            remove = "rm" if local_path(uri) else "python scripts/prepare_data.py rm"
            log.warning(
                "%s is verified in the bucket. What uploads left beside it was not removed: %s "
                "It does no harm but takes space; the next run tries again. To remove it while no "
                "upload goes on: %s %s",
                *(self.checkpoint.name, problem, remove, uri),
            )
        elif problem is not None:
            raise problem


@dataclass(frozen=True)
class _FoundSidecar:
    """A sidecar as it is in the bucket, as far as it can be read."""

    manifest: Manifest
    archive: FileEntry | None
    suffix: str = ARCHIVE_SUFFIX
    has_own_metadata: bool = True

    @classmethod
    def parse(cls, data: bytes) -> _FoundSidecar | None:
        try:
            sidecar = parse_json(data)
            manifest = Manifest.from_json(sidecar["manifest"], "the sidecar")
            has_own_metadata = find_sidecar_damage(sidecar.get("metadata"), manifest) is None
        except (CheckpointError, *FOREIGN_ERRORS):
            return None
        try:
            archive = sidecar["archive"]
            suffix = ARCHIVE_FORMATS[archive.get("format", ARCHIVE_SUFFIX)].suffix
            info = FileEntry(int(archive["size"]), str(archive["crc32c"]))
            return cls(manifest, info, suffix, has_own_metadata)
        except FOREIGN_ERRORS:
            return cls(manifest, None)

    def is_of(self, stored: ObjectInfo | None) -> bool:
        """Tell whether it describes this archive."""
        return self.archive is not None and self.archive == _info_of(stored)


def _info_of(stored: ObjectInfo | None) -> FileEntry | None:
    return None if stored is None else FileEntry(stored.size, str(stored.crc32c))
