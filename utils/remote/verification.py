"""Whether what should be in the bucket is there: journal, directory and bucket compared.

    journal, checkpoint directory, archive and sidecar in the bucket -> a report for each checkpoint

A plain check compares what is known: sizes, the checksums that the bucket keeps, manifests. A deep
one reads every file here, and every archive as a stream that goes nowhere: nothing of it is written
and nothing is loaded. No torch here.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.base.errors import CheckpointError, StorageError
from utils.base.progress import OnProgress
from utils.base.uri import join_uri, normalize_uri
from utils.checkpoints.journal import JournalEntry, UploadState
from utils.checkpoints.layout import (
    REMOTE_FOLDER,
    SET_ASIDE_FOLDER,
    CheckpointName,
    Manifest,
    find_checkpoints,
    json_file_text,
    parse_checkpoint_name,
    read_manifest,
    sidecar_object,
)
from utils.checkpoints.store import verify_checkpoint
from utils.checkpoints.views import is_verified_in
from utils.remote.archive_reading import (
    ArchiveBytes,
    Sidecar,
    Unpacking,
    read_sidecar,
    retry_download,
)
from utils.remote.listing import find_damage, list_remote
from utils.storage.bucket import READ_BLOCK_BYTES, Bucket, Nowhere, ObjectInfo, crc32c_of_bytes
from utils.uploads.lease import LEASE_OBJECT
from utils.uploads.uploader import GIVEN_UP


@dataclass
class CheckpointReport:
    """What is right and what is wrong with one checkpoint."""

    name: CheckpointName
    run_id: str = ""
    """Its run; empty where unknown."""
    is_local: bool = False
    right: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def is_verified(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong


@dataclass(frozen=True)
class Orphan:
    """An object below `Checkpoints/` that belongs to no complete checkpoint of the run."""

    object_name: str
    problem: str


class Verifier:
    """Compares checkpoints with what the bucket holds.

    Args:
        directory: The checkpoints of this machine; it need not exist.
        uploads: Newest journal entry of each checkpoint.
        run_id: The run; None where nothing on this machine says which.
        is_deep: Read every byte, here and there.
        on_progress: Told what is read.
    """

    def __init__(
        self,
        directory: Path,
        uploads: Mapping[str, JournalEntry],
        bucket: Bucket,
        *,
        run_id: str | None,
        is_deep: bool,
        on_progress: OnProgress,
    ) -> None:
        self._directory, self._uploads = directory, uploads
        self._bucket, self._listing = bucket, list_remote(bucket)
        self._run_id, self._is_deep, self._on_progress = run_id, is_deep, on_progress

    def names(self) -> list[CheckpointName]:
        """Return the checkpoints that are here, there, or said to be there, by step."""
        names = {*find_checkpoints(self._directory), *self._listing.sidecars}
        for text, entry in self._uploads.items():
            name = parse_checkpoint_name(text)
            if name is not None and self._is_said_to_be_there(entry):
                names.add(name)
        return sorted(names)

    def check(self, name: CheckpointName) -> CheckpointReport:
        """Return what is right and wrong with one checkpoint.

        Raises:
            StorageError: The bucket cannot be read.
        """
        report = CheckpointReport(name)
        manifest = self._check_local(report)
        sidecar = self._check_bucket(report)
        if sidecar is not None:
            self._compare_sidecar(report, sidecar, manifest)
        self._check_journal(report)
        if sidecar is None or self._run_id not in (None, sidecar.manifest.run_id):
            return report
        if self._is_deep and name in self._listing.archives:
            self._check_archive(report, sidecar)
        return report

    def split(
        self, reports: Iterable[CheckpointReport]
    ) -> tuple[list[CheckpointReport], list[Orphan]]:
        """Return the reports of this run, and what else lies below `Checkpoints/`."""
        own, orphans = [], []
        for report in reports:
            is_foreign = self._run_id and report.run_id and report.run_id != self._run_id
            if is_foreign and not report.is_local:
                orphans.append(Orphan(sidecar_object(str(report.name)), f"of run {report.run_id}"))
            else:
                own.append(report)
        archives, sidecars = self._listing.archives, self._listing.sidecars
        for name in sorted(archives.keys() - sidecars.keys()):
            orphans.append(Orphan(archives[name].name, "an archive without its sidecar"))
        for name in sorted(sidecars.keys() - archives.keys()):
            orphans.append(Orphan(sidecars[name].name, "a sidecar without its archive"))
        return own, [*orphans, *_group(self._listing.others)]

    def _is_said_to_be_there(self, entry: JournalEntry) -> bool:
        uri = normalize_uri(self._bucket.uri)
        is_here = self._run_id in (None, entry.run_id) and entry.details.get("bucket", uri) == uri
        return entry.state is UploadState.VERIFIED and is_here

    def _check_local(self, report: CheckpointReport) -> Manifest | None:
        path = self._directory / str(report.name)
        if not path.is_dir():
            return None
        report.is_local = True
        try:
            manifest = read_manifest(path)
            report.run_id = manifest.run_id
            self._require_files(path, manifest)
        except CheckpointError as exc:
            report.wrong.append(f"here: {exc}")
            return None
        found = "every byte as in its manifest" if self._is_deep else "sizes as in its manifest"
        report.right.append(f"here: {len(manifest.files)} files, {found}")
        return manifest

    def _require_files(self, path: Path, manifest: Manifest) -> None:
        if self._is_deep:
            total, done = manifest.total_bytes, 0

            def on_block() -> None:
                nonlocal done
                self._on_progress(f"{path.name} here", done, total)
                done = min(total, done + READ_BLOCK_BYTES)  # the last block of a file is smaller

            verify_checkpoint(path, on_block=on_block)
            self._on_progress(f"{path.name} here", total, total)
            return
        for name, entry in manifest.files.items():
            file = path / name
            if not file.is_file() or file.stat().st_size != entry.size:
                raise CheckpointError(f"{name} is missing or not of {entry.size} bytes.")

    def _check_bucket(self, report: CheckpointReport) -> Sidecar | None:
        archive = self._listing.archives.get(report.name)
        entry = self._uploads.get(str(report.name))
        if report.name not in self._listing.sidecars:
            if archive is not None:
                report.wrong.append("bucket: no sidecar beside its archive, the upload did not end")
            elif entry is not None and entry.state in GIVEN_UP:
                report.right.append(f"bucket: not there, {entry.state.value} on purpose")
            else:
                report.wrong.append("bucket: not there")
            return None
        if archive is None:
            report.wrong.append("bucket: a sidecar without its archive")
        try:
            sidecar = read_sidecar(self._bucket, str(report.name))
        except CheckpointError as exc:
            report.wrong.append(f"bucket: {exc}")
            return None
        report.run_id = report.run_id or sidecar.manifest.run_id
        if archive is None:
            return sidecar
        difference = sidecar.find_difference(archive.size, archive.crc32c)
        if difference is not None:
            report.wrong.append(f"bucket: its archive is damaged ({difference})")
        else:
            kept = "size" if archive.crc32c is None else "size and crc32c"
            report.right.append(f"bucket: archive, {kept} as in its sidecar")
        return sidecar

    def _compare_sidecar(
        self, report: CheckpointReport, sidecar: Sidecar, manifest: Manifest | None
    ) -> None:
        if manifest is not None:
            if sidecar.manifest == manifest:
                report.right.append("sidecar: the manifest of the files here")
            elif sidecar.manifest.run_id != manifest.run_id:
                report.wrong.append(f"sidecar: it is of run {sidecar.manifest.run_id}")
            else:
                report.wrong.append("sidecar: its manifest is not that of the files here")
        entry = self._uploads.get(str(report.name))
        if entry is None or not self._is_said_to_be_there(entry):
            return
        recorded = (entry.details.get("bytes"), entry.details.get("crc32c"))
        if recorded not in ((None, None), (sidecar.archive.size, sidecar.archive.crc32c)):
            report.wrong.append("sidecar: its archive is not the one in the journal")
        found = crc32c_of_bytes(json_file_text(sidecar.manifest.to_json()).encode("utf-8"))
        if entry.details.get("manifest_crc32c", found) != found:
            report.wrong.append("sidecar: its manifest is not the one in the journal")

    def _check_journal(self, report: CheckpointReport) -> None:
        entry = self._uploads.get(str(report.name))
        path = self._directory / str(report.name)
        if entry is None:
            if report.is_local:
                report.wrong.append("journal: nothing of it, its upload is owed")
        elif entry.state.is_pending:
            error = f": {entry.details['error']}" if entry.details.get("error") else ""
            report.wrong.append(f"journal: {entry.state.value}{error}")
        elif entry.state is not UploadState.VERIFIED:
            report.right.append(f"journal: {entry.state.value}")
        elif not report.is_local or is_verified_in(self._bucket.uri, path, entry):
            report.right.append("journal: verified")
        else:
            report.wrong.append("journal: verified with other files or in another bucket")

    def _check_archive(self, report: CheckpointReport, sidecar: Sidecar) -> None:
        name = str(report.name)
        source = join_uri(self._bucket.uri, sidecar.archive_object)
        retrying = functools.partial(retry_download, name, source)
        try:
            retrying(lambda: self._read_archive(sidecar, source, retrying))
        except CheckpointError as exc:
            report.wrong.append(f"archive: {exc}")
        except StorageError as exc:
            report.wrong.append(f"archive: it cannot be read: {exc}")
        else:
            report.right.append("archive: every byte read, every file as in its manifest")

    def _read_archive(
        self, sidecar: Sidecar, source: str, retrying: Callable[[Callable[[], bytes]], bytes]
    ) -> None:
        archive = ArchiveBytes(
            self._bucket,
            sidecar,
            lambda stage, done, total: self._on_progress(f"{sidecar.name} there", done, total),
        )
        archive.require_expected_object()
        stream = _ArchiveStream(lambda: retrying(archive.read_block))
        refusal: CheckpointError | None = None
        try:
            unpacking = Unpacking(sidecar, source, lambda name: contextlib.nullcontext(Nowhere()))
            unpacking.run(io.BufferedReader(stream))
        except CheckpointError as exc:
            refusal = exc
        stream.read_rest()
        archive.require_whole()  # bytes that were damaged say more than what they unpack to
        if refusal is not None:
            raise refusal


def _group(others: Iterable[ObjectInfo]) -> list[Orphan]:
    """Return an orphan for each object, and one for all that lie in a folder of their own."""
    groups: dict[str, list[ObjectInfo]] = {}
    for info in others:
        folder = info.name.rpartition("/")[0]
        name = info.name if folder == REMOTE_FOLDER else f"{folder}/"
        if info.name != LEASE_OBJECT:
            groups.setdefault(name, []).append(info)
    orphans = []
    for name, infos in groups.items():
        what = "not ours"
        if "/." in name:
            what = "of an upload that was interrupted or goes on"
        elif name.startswith(f"{REMOTE_FOLDER}/{SET_ASIDE_FOLDER}/"):
            what = "set aside, of an older branch"
        size = sum(info.size for info in infos)
        orphans.append(Orphan(name, f"{what}: {len(infos)} objects, {size} bytes"))
    return orphans


class _ArchiveStream(io.RawIOBase):
    """An archive in the bucket as a file that is read once, in order."""

    def __init__(self, read_block: Callable[[], bytes]) -> None:
        self._read_block, self._block = read_block, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block:
            self._block = memoryview(self._read_block())
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def read_rest(self) -> None:
        """Read what is left, for its checksum alone."""
        while self._read_block():
            pass


def find_unconfirmed(
    directory: Path, uploads: Mapping[str, JournalEntry], bucket: Bucket
) -> dict[Path, str]:
    """Return the checkpoints here that only the journal has as verified, and what the bucket lacks.

    A bucket that keeps no checksums is read for them.
    """
    unconfirmed, listing = {}, list_remote(bucket)
    for name in find_checkpoints(directory):
        path, entry = directory / str(name), uploads.get(str(name))
        if entry is None or not is_verified_in(bucket.uri, path, entry):
            continue
        try:
            manifest = read_manifest(path)
            problem = find_damage(bucket, listing, name, manifest=manifest, should_read=True)
        except CheckpointError as exc:
            problem = str(exc)
        if problem is not None:
            unconfirmed[path] = problem
    return unconfirmed
