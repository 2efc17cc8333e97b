"""The directory of checkpoints: hold it, verify, set aside, delete, keep by rule.

    checkpoint directory (committed) -> restore, uploader

A checkpoint is complete when its manifest is there; deleting one takes its name away first. No
torch here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from configs.training_config import TrainingConfig
from utils.base.archive_formats import ARCHIVE_SUFFIXES
from utils.base.errors import CheckpointError, LockedError
from utils.base.files import (
    LOCK_SUFFIX,
    read_regular_file,
    remove_abandoned,
    removing_empty_folders,
)
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import (
    DOWNLOAD_PREFIX,
    MANIFEST_FILE,
    RANDOM_STATES_PREFIX,
    SAVING_PREFIX,
    SET_ASIDE_FOLDER,
    UPLOAD_LOCK_PREFIX,
    FileEntry,
    Manifest,
    RunPaths,
    parse_checkpoint_name,
    read_manifest,
    strip_archive_suffix,
    upload_lock,
)
from utils.checkpoints.retention import Action, Decision, decide_retention
from utils.checkpoints.views import read_local_checkpoints
from utils.data.shard_index import (
    INDEX_OBJECT,
    find_tokenizer_files,
    get_json,
    read_recorded_files,
    recorded_checksums,
)
from utils.storage.bucket import crc32c_of_file, fsync_directory
from utils.storage.directory import DirectoryBucket

OUTPUT_LOCK_SECONDS = 3.0

MAX_OWNER_BYTES = 1000

log = logging.getLogger(__name__)


def verify_checkpoint(
    checkpoint: Path,
    *,
    forgive_random_states: bool = False,
    is_wanted: Callable[[str], bool] = lambda name: True,
    on_block: Callable[[], None] = lambda: None,
) -> Manifest:
    """Return the manifest after comparing every file with it.

    Files that are not wanted by name are not read. With `forgive_random_states`, damaged ones are
    no error. The manifest that is returned names neither. `on_block` is called now and then.

    Raises:
        CheckpointError: The checkpoint is incomplete or a file is not what was written.
    """
    manifest = read_manifest(checkpoint)
    numbers = parse_checkpoint_name(checkpoint.name)
    if numbers is not None and numbers.step != manifest.step:
        raise CheckpointError(f"{checkpoint.name}: its manifest is of step {manifest.step}.")
    if not manifest.files:
        raise CheckpointError(f"{checkpoint.name}: its manifest names no files.")
    wanted = {name: entry for name, entry in manifest.files.items() if is_wanted(name)}
    usable = dict(wanted)
    for name, entry in wanted.items():
        try:
            _verify_file(checkpoint, name, entry, on_block)
        except CheckpointError as exc:
            if not (forgive_random_states and name.startswith(RANDOM_STATES_PREFIX)):
                raise
            log.warning("%s It is left out, as accepted.", exc)
            del usable[name]
    return replace(manifest, files=usable)


def _verify_file(
    checkpoint: Path, name: str, entry: FileEntry, on_block: Callable[[], None]
) -> None:
    path = checkpoint / name
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{checkpoint.name}: {name} is missing.")
    size = path.stat().st_size
    if size != entry.size:
        raise CheckpointError(
            f"{checkpoint.name}: {name} has {size} bytes, its manifest says {entry.size}."
        )
    if crc32c_of_file(path, on_block) != entry.crc32c:
        raise CheckpointError(
            f"{checkpoint.name}: {name} is damaged (its crc32c is not the manifest's)."
        )


@contextlib.contextmanager
def hold_output_directory(paths: RunPaths) -> Iterator[None]:
    """Hold the output directory of a run, so that no other trainer works in it.

    One that is made for this and has nothing in it afterwards is removed.

    Raises:
        LockedError: A live process holds it; the message names it.
    """
    with removing_empty_folders(paths.checkpoints):
        paths.checkpoints.mkdir(parents=True, exist_ok=True)
        with _hold_made_directory(paths):
            yield


@contextlib.contextmanager
def _hold_made_directory(paths: RunPaths) -> Iterator[None]:
    lock, owner = FileLock(paths.lock), _owner_file(paths)
    try:
        # A trainer that was just killed holds it until the last of its threads has ended.
        lock.acquire(timeout=OUTPUT_LOCK_SECONDS)
    except Timeout as exc:
        raise LockedError(
            f"{paths.checkpoints} is in use by another process ({_read_owner(paths)}). "
            "Wait for it, or choose another --set output_dir or run_name."
        ) from exc
    try:
        owner.write_text(f"process {os.getpid()} on {platform.node()}\n", "utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            if {*paths.checkpoints.iterdir()} <= {paths.lock, owner}:  # nothing began
                owner.unlink(missing_ok=True)
                paths.lock.unlink(missing_ok=True)  # still held: whoever waits for it looks again
        lock.release()


def _owner_file(paths: RunPaths) -> Path:
    return paths.lock.with_suffix(".owner")


def _read_owner(paths: RunPaths) -> str:
    try:
        return read_regular_file(_owner_file(paths), MAX_OWNER_BYTES).decode("utf-8").strip()
    except (OSError, ValueError):
        return "unknown process"


def remove_leftovers(directory: Path) -> None:
    """Remove what an interrupted save, archive or deletion left behind."""
    if not directory.is_dir():
        return
    for prefix in (UPLOAD_LOCK_PREFIX, DOWNLOAD_PREFIX):
        remove_abandoned(directory, prefix)
    for path in list(directory.iterdir()):
        if path.with_suffix(LOCK_SUFFIX).exists():
            continue  # a download goes on
        if path.name.startswith(SAVING_PREFIX) and path.is_dir():
            log.info("Removing %s, left by an interrupted save.", path.name)
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(SAVING_PREFIX) and path.name.endswith(ARCHIVE_SUFFIXES):
            name = strip_archive_suffix(path.name.removeprefix(SAVING_PREFIX))
            if not upload_lock(directory / name).exists():
                log.info("Removing %s, left by an interrupted upload.", path.name)
                path.unlink(missing_ok=True)
        elif parse_checkpoint_name(path.name) and not (path / MANIFEST_FILE).is_file():
            # A deletion that stopped halfway, or an incomplete copy made by hand.
            log.warning(
                "%s is incomplete. It was set aside as %s.", path, set_aside(path, directory)
            )


@contextlib.contextmanager
def hold_upload(checkpoint: Path) -> Iterator[bool]:
    """Keep others from uploading or giving up a checkpoint; False where one of them does."""
    path = upload_lock(checkpoint)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as exc:  # a full disk must not stop uploads
        log.warning("%s is used without its lock: %s", checkpoint.name, exc)
    try:
        yield True
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # still held: whoever waits for it looks again
        lock.release()


def set_aside(checkpoint: Path, directory: Path) -> Path:
    """Move a checkpoint out of the way without losing it; return where it is now."""
    folder = directory / SET_ASIDE_FOLDER
    folder.mkdir(exist_ok=True)
    target, count = folder / checkpoint.name, 1
    while target.exists():
        count += 1
        target = folder / f"{checkpoint.name}.{count}"
    checkpoint.rename(target)
    fsync_directory(folder)  # its new name before the old one goes
    fsync_directory(directory)
    return target


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; its name goes first, so that no half of it ever looks complete.

    Taking the name away is one step. What a crash leaves behind, the next attempt removes.
    """
    doomed = checkpoint.with_name(f"{SAVING_PREFIX}deleted-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    fsync_directory(checkpoint.parent)
    if doomed.is_symlink():  # what it points to belongs to somebody else
        doomed.unlink()
        return
    shutil.rmtree(doomed)


def apply_retention(
    directory: Path, journal: Journal, config: TrainingConfig, *, run_id: str, is_uploading_on: bool
) -> list[str]:
    """Delete the checkpoints that the retention rules give up; return their names."""

    def decide() -> list[Decision]:
        views = read_local_checkpoints(directory)
        return decide_retention(views, config, run_id=run_id, is_uploading_on=is_uploading_on)

    deleted = []
    for decision in decide():
        if decision.action is Action.KEEP:
            continue
        checkpoint = directory / decision.name
        with hold_upload(checkpoint) as is_idle:
            # Its upload may have begun since, which is never disturbed, or have ended.
            if not is_idle or decision not in decide():
                continue
            if decision.action is Action.SUPERSEDE:
                log.warning("Giving up %s without an upload: %s.", decision.name, decision.reason)
                journal.record(
                    decision.name, run_id, UploadState.SUPERSEDED, reason=decision.reason
                )
            delete_checkpoint(checkpoint)
        log.info("Cleaned up %s (%s).", decision.name, decision.reason)
        deleted.append(decision.name)
    return deleted


def require_recorded_tokenizer(name: str) -> None:
    """Raise where a tokenizer is not what `index.json` or `manifest.json` beside it recorded.

    `name` is a directory, or a tokenizer's file in one; any other name is left alone.

    Raises:
        DataError: It is not, or `index.json` cannot be read.
        CheckpointError: `manifest.json` cannot be read.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return
    directory = path if path.is_dir() else path.parent
    bucket = DirectoryBucket(directory)
    checksums = recorded_checksums(get_json(bucket, INDEX_OBJECT) or {})
    if (directory / MANIFEST_FILE).is_file():
        files = read_manifest(directory).files
        checksums.update({name: entry.crc32c for name, entry in files.items()})
    names = find_tokenizer_files(checksums if path == directory else [path.name])
    read_recorded_files(bucket, names, checksums)
