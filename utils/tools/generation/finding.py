"""The model that a user means, wherever it is.

    checkpoint's name, directory, gs:// archive or folder, Hub name -> model source

A directory is taken first, then a bucket's URI, then a checkpoint of the run (here, else in its
bucket), then a name on the Hugging Face Hub. What has to be downloaded is kept below
`cache_dir/models` and verified. No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from configs.model_config import CONFIG_FILE
from configs.training_config import TrainingConfig
from utils.base.errors import StorageError, UsageError
from utils.base.progress import OnProgress
from utils.base.text import printable
from utils.base.uri import join_uri, local_path, require_place
from utils.checkpoints.layout import (
    MANIFEST_FILE,
    RunPaths,
    parse_checkpoint_name,
    read_manifest,
    validate_run_name,
)
from utils.data.transfer import find_objects, get_tree
from utils.remote.archive_reading import read_sidecar
from utils.remote.download import download_checkpoint
from utils.remote.listing import choose_remote, parse_remote_name
from utils.storage.open import open_bucket
from utils.tools.generation.loading import ModelSource
from utils.tools.viewer.shelf import open_shelf

MODELS_FOLDER = "models"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


log = logging.getLogger(__name__)


def find_model(
    text: str,
    config: TrainingConfig,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> ModelSource:
    """Return where the model is that a user means; what is in a bucket is downloaded.

    Args:
        text: A checkpoint's name, step, `latest` or `best`; a directory of a checkpoint or of an
            exported model; `gs://BUCKET/PREFIX/NAME` of an archive or of an exported model; or a
            name on the Hub.
        config: Says where the run's checkpoints are, and its bucket.
        on_progress: Told of a download: stage, bytes done, bytes in all.

    Raises:
        UsageError: There is no such model, or it is not clear which one is meant.
        CheckpointError: It is damaged or incomplete.
        StorageError: The bucket cannot be read.
    """
    require_place(text)
    path = Path(text).expanduser()
    if path.is_dir() and path.name not in ("", ".."):
        return _from_directory(path)
    models = RunPaths.of(config).cache / MODELS_FOLDER
    remote = parse_remote_name(text)
    if remote is not None:
        uri, which = remote
        if local_path(text) is None and not _is_checkpoint(which):
            return _from_bucket_folder(text, models, on_progress)
        return _from_bucket(uri, which, models, config, on_progress)
    with open_shelf(config) as shelf:
        problem = ""
        try:
            return _from_directory(Path(shelf.where) / str(shelf.select(text).name))
        except UsageError as exc:
            problem = str(exc)
    if _is_checkpoint(text):
        if not config.checkpoint_uri:
            raise UsageError(problem)
        uri = join_uri(config.checkpoint_uri, validate_run_name(config.run_name))
        try:
            return _from_bucket(uri, text, models, config, on_progress)
        except UsageError as exc:
            raise UsageError(f"In {shelf.where}: {problem} In the bucket: {exc}") from exc
    if not _HUB_NAME.fullmatch(text):
        raise UsageError(f"{printable(text)}: there is no such directory, checkpoint or bucket.")
    return ModelSource(text, text)


def _is_checkpoint(which: str) -> bool:
    """Tell whether a text can mean nothing but a checkpoint."""
    return (
        which in ("latest", "best")
        or which.removeprefix("step").isdecimal()
        or bool(parse_checkpoint_name(which))
    )


def _from_directory(path: Path) -> ModelSource:
    if (path / MANIFEST_FILE).is_file():
        return ModelSource(path.resolve().name, str(path), read_manifest(path))
    if (path / CONFIG_FILE).is_file():
        return ModelSource(path.resolve().name, str(path))
    raise UsageError(
        f"{printable(str(path))} is neither a checkpoint (no {MANIFEST_FILE}) nor a model of "
        f"transformers (no {CONFIG_FILE})."
    )


def _from_bucket(
    uri: str, which: str, models: Path, config: TrainingConfig, on_progress: OnProgress
) -> ModelSource:
    bucket = open_bucket(uri, config.gcs_user_project or None)
    is_name = parse_checkpoint_name(which) is not None
    with contextlib.closing(bucket):
        while True:
            name = which if is_name else str(choose_remote(bucket, which, None))
            # An archive that another one has replaced under the same name is another directory.
            checksum = read_sidecar(bucket, name).archive.crc32c
            directory = models / _short_hash(f"{uri}\n{checksum}")
            with _alone_in(directory) as has_waited:
                if not has_waited:  # else the bucket may hold something else by now
                    path = download_checkpoint(bucket, name, directory, None, on_progress)
                    return _from_directory(path)


def _from_bucket_folder(uri: str, models: Path, on_progress: OnProgress) -> ModelSource:
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
                    return _from_directory(directory)


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
