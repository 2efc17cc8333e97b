"""Where an exported model goes: a folder, a file, or a bucket; whole or not at all.

    staging directory (files written, checked) -> publish -> folder | file | gs://bucket/prefix

On a disk the staging directory lies beside the target, is synced and renamed. Into a bucket
`config.json` goes last and is removed first: without it nobody takes what is there for a model.
Nothing is replaced unless asked, and then only what has nothing but the files of an exported model.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from configs.model_config import CONFIG_FILE
from utils.base.errors import LockedError, SaveError, UsageError
from utils.base.files import scratch_directory
from utils.base.progress import OnProgress
from utils.base.text import printable
from utils.base.uri import BUCKET_PLACES, local_path, require_place, split_uri
from utils.checkpoints.layout import MANIFEST_FILE
from utils.data.shard_index import find_tokenizer_files
from utils.data.transfer import put_tree
from utils.storage.bucket import Bucket, fsync_directory
from utils.storage.open import open_bucket

GGUF_SUFFIX = ".gguf"
EXPORT_PLACES = f"a folder, a .gguf file, {BUCKET_PLACES} or hub:OWNER/NAME"
GGUF_MAGIC = b"GGUF"
SCRATCH_PREFIX = "export-"
_EXPORT_FILE = re.compile(
    r"config\.json|generation_config\.json|README\.md|spiece\.model|vocab\.txt"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


def is_export_file(name: str) -> bool:
    """Tell whether an exported model may have a file of this name."""
    return bool(_EXPORT_FILE.fullmatch(name) or find_tokenizer_files([name]))


def open_target(
    output: str, scratch: Path, *, overwrite: bool, user_project: str | None = None
) -> DiskTarget | BucketTarget:
    """Return the folder, file or bucket of an `--output`; one that ends in `.gguf` is a file.

    What goes into a bucket is written to `scratch` first; `user_project` pays for the bucket.

    Raises:
        UsageError: It is none of these.
    """
    require_place(output, "--output", EXPORT_PLACES)
    is_file = output.endswith(GGUF_SUFFIX)
    if local_path(output) is None:
        parent, name = split_uri(output) or ("", "")
        if is_file and not name:
            raise UsageError(f"--output {printable(output)} names no object in a bucket.")
        bucket = open_bucket(parent if is_file else output, user_project)
        return BucketTarget(bucket, output, scratch, name if is_file else None, overwrite)
    if not output.strip():
        raise UsageError(f"--output {printable(output)}: give {EXPORT_PLACES}.")
    return DiskTarget(Path(output).expanduser().resolve(), is_file, overwrite)


@dataclass(frozen=True)
class DiskTarget:
    """A folder on this machine, or a file: then the staging directory's one file goes there.

    With `overwrite`, an exported model that is there is replaced.
    """

    path: Path
    is_file: bool
    overwrite: bool

    @property
    def location(self) -> str:
        """What a user calls it."""
        return str(self.path)

    def require_free(self) -> None:
        """Refuse what is there already, or is no place for a model, before anything costs time.

        Raises:
            UsageError: It is.
        """
        if not self.path.exists() and self._beside("replaced").exists():
            self._beside("replaced").rename(self.path)  # killed between the renames of `publish`
        for parent in self.path.parents:
            if parent.exists() and not parent.is_dir():
                raise UsageError(f"--output {self}: {printable(str(parent))} is a file.")
            if (parent / MANIFEST_FILE).is_file():
                raise UsageError(f"--output {self} lies in a checkpoint, which never changes.")
        if not self.path.exists() or self._is_empty_directory():
            return
        if not self.overwrite:
            raise UsageError(
                f"--output {self} is there already. Choose another one, or add --overwrite."
            )
        problem = _why_no_file(self.path) if self.is_file else _why_no_folder(self.path)
        if problem:
            raise UsageError(f"--output {self} {problem}: not replaced. Choose another one.")

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Return an empty directory beside the target."""
        room = self._beside("exporting")
        try:
            room.mkdir(parents=True, exist_ok=True)
            lock = FileLock(room / ".lock")
            lock.acquire(timeout=0)
        except Timeout as exc:
            raise LockedError(f"Another export to {self} is running.") from exc
        except OSError as exc:
            raise SaveError(f"{self} cannot be written: {exc.strerror or exc}.") from exc
        staged = room / self.path.name
        try:
            shutil.rmtree(staged, ignore_errors=True)  # of an export that was killed
            staged.mkdir()
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            lock.release()
            shutil.rmtree(room, ignore_errors=True)

    def publish(self, staged: Path, on_progress: OnProgress) -> None:
        """Rename what is staged, which is synced already, to the target."""
        self.require_free()  # something may have come there while the model was written
        replaced = self._beside("replaced")
        if self.is_file:
            (staged / self.path.name).replace(self.path)
        elif not self.path.exists() or self._is_empty_directory():
            if self.path.exists():
                self.path.rmdir()
            staged.rename(self.path)
        else:
            shutil.rmtree(replaced, ignore_errors=True)
            self.path.rename(replaced)
            try:
                staged.rename(self.path)
            except BaseException:
                replaced.rename(self.path)
                raise
        fsync_directory(self.path.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def __str__(self) -> str:
        return printable(self.location)

    def _beside(self, what: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{what}")

    def _is_empty_directory(self) -> bool:
        return not self.is_file and self.path.is_dir() and not any(self.path.iterdir())


@dataclass(frozen=True)
class BucketTarget:
    """A prefix of a bucket, or one object.

    Attributes:
        bucket: The bucket at the prefix, or at the object's parent.
        location: The URI as it was given.
        name: The object's name; None for a prefix.
    """

    bucket: Bucket
    location: str
    scratch: Path
    name: str | None
    overwrite: bool

    def require_free(self) -> None:
        """Refuse what is there already, before anything costs time.

        Raises:
            UsageError: Something is, and it is not to be replaced.
            StorageError: The bucket cannot be reached.
        """
        names = self._names_there()
        if not names:
            return
        if not self.overwrite:
            raise UsageError(
                f"--output {printable(self.location)} holds {printable(names[0])} already "
                f"({len(names)} objects). Choose another one, or add --overwrite."
            )
        # An upload that was interrupted has no config.json: the same command goes on.
        problem = None if self.name else _why_foreign(names)
        if problem:
            raise UsageError(
                f"--output {printable(self.location)} {problem}: not replaced. Choose another one."
            )

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        """Return an empty directory on this machine, which is gone afterwards."""
        return scratch_directory(self.scratch, SCRATCH_PREFIX)

    def publish(self, staged: Path, on_progress: OnProgress) -> None:
        """Upload the files, each verified, `config.json` last."""
        self.require_free()  # something may have come there while the model was written
        new = {path.name for path in staged.iterdir()}
        there = self._names_there() if self.name is None else []
        # While files of two models are there, it is no model.
        for name in sorted(there, key=lambda name: name != CONFIG_FILE):
            if name == CONFIG_FILE or name not in new:
                self.bucket.delete(name)
        put_tree(staged, self.bucket, on_progress, last_name=CONFIG_FILE)

    def _names_there(self) -> list[str]:
        if self.name is not None:
            return [self.name] if self.bucket.stat(self.name) is not None else []
        return sorted(info.name for info in self.bucket.list())


def _why_no_folder(path: Path) -> str | None:
    if not path.is_dir():
        return "is a file"
    entries = list(path.iterdir())
    if any(entry.is_dir() for entry in entries):
        return "has folders in it"
    names = sorted(entry.name for entry in entries)
    foreign = _why_foreign(names)
    if foreign is None and CONFIG_FILE not in names:
        return f"holds no {CONFIG_FILE}"
    # Any project may have a config.json beside its README.md.
    return foreign or (None if any(map(_is_weights, names)) else "holds no weights of a model")


def _is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


def _why_no_file(path: Path) -> str | None:
    if not path.is_file():
        return "is no file"
    with path.open("rb") as file:
        is_gguf = file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    return None if is_gguf else "is no GGUF file"


def _why_foreign(names: Iterable[str]) -> str | None:
    """Return why names are not those of an exported model, which may be replaced."""
    foreign = next((name for name in names if not is_export_file(name)), None)
    return f"holds {printable(foreign)}, which no exported model has" if foreign else None
