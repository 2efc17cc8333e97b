"""A checkpoint back from the bucket: verified, unpacked, committed as if it had been saved here.

    sidecar, archive in the bucket -> archive (verified) -> files (verified) -> checkpoint directory

The sidecar (`NAME.json`) says what the archive and every file must be; without one the upload never
finished. Nothing is opened before the archive's size and crc32c are the sidecar's. Nothing is
written that the sidecar's manifest does not name, no more of it than the manifest says, and nothing
is ever unpickled. All of it happens in a `.saving-*` directory, which the next run removes after
a crash; the rename at the end commits. The journal then has the checkpoint as verified, so that it
is not uploaded again. No torch here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils.base.errors import CheckpointError, TransientStorageError
from utils.base.progress import OnProgress
from utils.base.uri import join_uri, normalize_uri
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import (
    MANIFEST_FILE,
    SAVING_PREFIX,
    Manifest,
    require_checkpoint_name,
)
from utils.checkpoints.store import verify_checkpoint
from utils.remote.archive_reading import (
    ArchiveBytes,
    Retrying,
    Sidecar,
    read_sidecar,
    unpack_archive,
)
from utils.storage.bucket import Bucket, crc32c_of_file, fsync_directory

log = logging.getLogger(__name__)


def download_checkpoint(
    bucket: Bucket,
    name: str,
    directory: Path,
    journal: Journal | None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Path:
    """Bring a checkpoint from the bucket into `directory`; return where it is.

    One that is there already and is the same is left as it is.

    Args:
        bucket: The run's bucket.
        name: The checkpoint's name.
        directory: The run's checkpoints, or any other directory.
        journal: Takes the entry that it is verified in the bucket; None where it is no run's
            directory.
        on_progress: Told what is done.

    Raises:
        UsageError: `name` is not a checkpoint's name.
        CheckpointError: It is not complete in the bucket, damaged, not the one it should be, or
            cannot be put here; nothing is left behind.
        StorageError: The bucket could not be read.
    """
    require_checkpoint_name(name)
    retrying = Retrying(name, bucket.uri)
    sidecar = retrying.run(lambda: read_sidecar(bucket, name))
    source = join_uri(bucket.uri, sidecar.archive_object)
    target = directory / name
    if target.is_symlink() or target.exists():
        _require_same(target, sidecar.manifest, source)
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _require_space(directory, sidecar)
        with tempfile.TemporaryDirectory(
            prefix=f"{SAVING_PREFIX}download-", dir=directory, ignore_cleanup_errors=True
        ) as scratch:
            archive = Path(scratch) / f"{name}{sidecar.format.suffix}"
            download = ArchiveBytes(bucket, sidecar, on_progress)
            with archive.open("wb") as file:
                retrying.run(lambda: _write_archive(download, file))
            unpacked = Path(scratch) / name
            _unpack(sidecar, source, archive, unpacked, on_progress)
            unpacked.rename(target)
        fsync_directory(directory)
    except OSError as exc:
        raise CheckpointError(
            f"{name} cannot be written to {directory}: {exc.strerror or exc}. Nothing was left "
            "there; it is still in the bucket."
        ) from exc
    if journal is not None:
        _record(journal, bucket, sidecar, target)
    log.info("Downloaded %s from %s, verified.", name, source)
    return target


def _require_same(target: Path, manifest: Manifest, source: str) -> None:
    problem = "another one"
    try:
        if verify_checkpoint(target) == manifest:
            return
    except CheckpointError as exc:
        problem = f"not a whole one: {exc}"
    raise CheckpointError(
        f"{target} exists and is not what {source} holds, but {problem.rstrip('.')}. Nothing was "
        "changed. Move it away to download it."
    )


def _require_space(directory: Path, sidecar: Sidecar) -> None:
    archive, files = sidecar.archive.size, sidecar.manifest.total_bytes
    free = shutil.disk_usage(directory).free
    if free < archive + files:
        raise CheckpointError(
            f"{sidecar.name} needs {archive + files} bytes in {directory} (archive {archive}, "
            f"files {files}); {free} are free. Free some space, or choose another --set output_dir."
        )


def _write_archive(download: ArchiveBytes, file: IO[bytes]) -> None:
    """Write the archive's bytes; another call goes on where the one before stopped."""
    download.require_expected_object()
    while block := download.read_block():
        file.write(block)
    file.flush()
    try:
        download.require_whole()
    except TransientStorageError:
        file.seek(0)
        file.truncate()
        raise


def _unpack(
    sidecar: Sidecar, source: str, archive: Path, directory: Path, on_progress: OnProgress
) -> None:
    """Write the archive's files into a new directory."""
    directory.mkdir()
    unpack_archive(sidecar, source, archive, lambda name: _new_file(directory / name), on_progress)
    fsync_directory(directory)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _record(journal: Journal, bucket: Bucket, sidecar: Sidecar, checkpoint: Path) -> None:
    """Write what the uploader writes after an upload, so that none follows."""
    try:
        journal.record(
            sidecar.name,
            sidecar.manifest.run_id,
            UploadState.VERIFIED,
            bytes=sidecar.archive.size,
            crc32c=sidecar.archive.crc32c,
            uri=join_uri(bucket.uri, sidecar.archive_object),
            bucket=normalize_uri(bucket.uri),
            manifest_crc32c=crc32c_of_file(checkpoint / MANIFEST_FILE),
        )
    except OSError as exc:
        log.warning(
            "%s cannot be written (%s); %s will be uploaded again.",
            journal.path,
            exc.strerror or exc,
            sidecar.name,
        )
