"""A checkpoint back from the bucket: verified, unpacked, committed as if it had been saved here.

    sidecar, archive in the bucket -> archive (verified) -> files (verified) -> checkpoint directory

Nothing is opened before the archive's size and crc32c are those of its sidecar. All of it happens
in a `.saving-download-*` directory; the rename at the end commits. What a crash leaves of one, the
next download or training there removes.
The journal then has the checkpoint as verified, so that it is not uploaded again. No torch here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils.base.errors import CheckpointError, TransientStorageError
from utils.base.files import scratch_directory
from utils.base.progress import OnProgress
from utils.base.uri import join_uri, normalize_uri
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import (
    DOWNLOAD_PREFIX,
    MANIFEST_FILE,
    Manifest,
    require_checkpoint_name,
)
from utils.checkpoints.store import verify_checkpoint
from utils.remote.archive_reading import (
    ArchiveBytes,
    Sidecar,
    Unpacking,
    read_sidecar,
    retry_download,
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

    One that is there already and is the same is left as it is. `journal` takes the entry that it is
    verified in the bucket; None where `directory` is no run's.

    Raises:
        UsageError: `name` is not a checkpoint's name.
        CheckpointError: It is not complete in the bucket, damaged, not the one it should be, or
            cannot be put here; nothing is left behind.
        StorageError: The bucket could not be read.
    """
    require_checkpoint_name(name)
    retrying = functools.partial(retry_download, name, bucket.uri)
    sidecar = retrying(lambda: read_sidecar(bucket, name))
    source = join_uri(bucket.uri, sidecar.archive_object)
    target = directory / name
    if target.is_symlink() or target.exists():
        _require_same(target, sidecar.manifest, source)
        return target
    try:
        with scratch_directory(directory, DOWNLOAD_PREFIX) as scratch:
            _require_space(directory, sidecar)
            archive = scratch / f"{name}{sidecar.format.suffix}"
            download = ArchiveBytes(bucket, sidecar, on_progress)
            with archive.open("wb") as file:
                retrying(lambda: _write_archive(download, file))
            unpacked = scratch / name
            unpacked.mkdir()
            Unpacking(sidecar, source, lambda file: _new_file(unpacked / file), on_progress).run(
                archive
            )
            fsync_directory(unpacked)
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
        reason = f"{journal.path} cannot be written ({exc.strerror or exc})"
        log.warning("%s; %s will be uploaded again.", reason, sidecar.name)
