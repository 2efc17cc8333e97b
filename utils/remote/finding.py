"""A trained model that is somewhere else: in a directory, in a bucket, on the Hugging Face Hub.

    directory, gs:// archive or folder, Hub name -> model source

What has to be downloaded is kept below `cache_dir/models` and verified. No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from configs.model_config import CONFIG_FILE
from configs.training_config import TrainingConfig
from utils.base.errors import StorageError, UsageError
from utils.base.progress import OnProgress
from utils.base.text import printable
from utils.base.uri import local_path, require_place
from utils.checkpoints.layout import (
    MANIFEST_FILE,
    RunPaths,
    parse_checkpoint_name,
    read_manifest,
)
from utils.data.transfer import find_objects, get_tree
from utils.remote.archive_reading import read_sidecar
from utils.remote.download import download_checkpoint
from utils.remote.listing import choose_remote, parse_remote_name
from utils.remote.loading import ModelSource
from utils.storage.open import open_bucket

MODELS_FOLDER = "models"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


log = logging.getLogger(__name__)


def find_placed_model(
    text: str, config: TrainingConfig, on_progress: OnProgress
) -> ModelSource | None:
    """Return the model of a directory or of a bucket's URI, downloaded; None for any other text.

    Raises:
        UsageError: There is no such model.
        CheckpointError: It is damaged or incomplete.
        StorageError: The bucket cannot be read.
    """
    require_place(text)
    path = Path(text).expanduser()
    if path.is_dir() and path.name not in ("", ".."):
        return model_in_directory(path)
    remote = parse_remote_name(text)
    if remote is None:
        return None
    if local_path(text) is None and not is_checkpoint_word(remote[1]):
        return _folder_in_bucket(text, RunPaths.of(config).cache / MODELS_FOLDER, on_progress)
    return model_in_bucket(*remote, config, on_progress)


def model_on_hub(text: str) -> ModelSource:
    """Return the model of a name on the Hub; nothing is asked there yet.

    Raises:
        UsageError: It cannot be one.
    """
    if not _HUB_NAME.fullmatch(text):
        raise UsageError(f"{printable(text)}: there is no such directory, checkpoint or bucket.")
    return ModelSource(text, text)


def is_checkpoint_word(which: str) -> bool:
    """Tell whether a text can mean nothing but a checkpoint."""
    return (
        which in ("latest", "best")
        or which.removeprefix("step").isdecimal()
        or bool(parse_checkpoint_name(which))
    )


def model_in_directory(path: Path) -> ModelSource:
    """Return the model of a directory.

    Raises:
        UsageError: It holds none.
        CheckpointError: Its manifest cannot be read.
    """
    if (path / MANIFEST_FILE).is_file():
        return ModelSource(path.resolve().name, str(path), read_manifest(path))
    if (path / CONFIG_FILE).is_file():
        return ModelSource(path.resolve().name, str(path))
    raise UsageError(
        f"{printable(str(path))} is neither a checkpoint (no {MANIFEST_FILE}) nor a model of "
        f"transformers (no {CONFIG_FILE})."
    )


def model_in_bucket(
    uri: str, which: str, config: TrainingConfig, on_progress: OnProgress
) -> ModelSource:
    """Return a checkpoint of a bucket, downloaded.

    Raises:
        UsageError: There is none.
        CheckpointError: It is damaged or incomplete.
        StorageError: The bucket cannot be read.
    """
    models = RunPaths.of(config).cache / MODELS_FOLDER
    bucket = open_bucket(uri, config.gcs_user_project)
    with contextlib.closing(bucket):
        while True:
            name = str(choose_remote(bucket, which, None))
            # An archive that another one has replaced under the same name is another directory.
            checksum = read_sidecar(bucket, name).archive.crc32c
            directory = models / _short_hash(f"{uri}\n{checksum}")
            with _alone_in(directory) as has_waited:
                if not has_waited:  # else the bucket may hold something else by now
                    path = download_checkpoint(bucket, name, directory, None, on_progress)
                    return replace(model_in_directory(path), bucket_uri=uri)


def _folder_in_bucket(uri: str, models: Path, on_progress: OnProgress) -> ModelSource:
    """Return a folder of transformers that lies in a bucket as single files."""
    directory = models / _short_hash(uri) / uri.rstrip("/").rpartition("/")[2]
    while True:
        found = find_objects(uri)
        with contextlib.closing(found.bucket):
            if not any(info.name == CONFIG_FILE for info in found.objects):
                raise UsageError(
                    f"{uri} holds no {CONFIG_FILE}: it is no exported model. A checkpoint is "
                    f"{uri.rstrip('/')}/latest, or its name there."
                )
            with _alone_in(directory.parent) as has_waited:
                if not has_waited:  # else the bucket may hold something else by now
                    get_tree(found, directory, on_progress)
                    return model_in_directory(directory)


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[bool]:
    """Wait until no other command downloads to a directory; tell whether that took a wait.

    Raises:
        StorageError: The cache cannot be written.
    """
    lock, has_waited = FileLock(directory.with_name(f".{directory.name}.lock")), False
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("Another command downloads the same model: waiting for it.")
            lock.acquire()
            has_waited = True
    except OSError as exc:
        raise StorageError(f"{directory} cannot be written: {exc.strerror or exc}.") from exc
    try:
        yield has_waited
    finally:
        lock.release()


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
