"""Files to and from a bucket: put, get, list, remove; verified, in parallel, and again at will.

    directory or file <--> gs://bucket/prefix or another directory

Whatever is already there with the same size and crc32c is not copied again, so the same command
goes on where it was interrupted. A file appears whole or not at all. Within one run an upload of
more than 8 MiB goes on inside the file after a lost connection; a new process begins that one
file again, because the client keeps its upload session in memory only. `index.json` is copied
last and removed first: while it is there, so is what it lists, and a file that is not what it says
is not copied. Names that could leave the directory or confuse a shell or a terminal are refused
before anything is changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from utils.base.console import DISK_ERRORS
from utils.base.errors import DataError, StorageError, UsageError
from utils.base.files import walk_folders
from utils.base.progress import OnProgress
from utils.base.text import printable
from utils.base.uri import local_path, split_uri
from utils.data.shard_index import INDEX_OBJECT, get_json, recorded_checksums
from utils.storage.bucket import Bucket, ObjectInfo, crc32c_of_file
from utils.storage.directory import TEMPORARY_PREFIX, DirectoryBucket
from utils.storage.open import open_bucket

TRANSFER_THREADS = 8
MAX_PART_BYTES = 255  # of a file's or folder's name on the usual disks
MAX_NAME_BYTES = 1024
_FORBIDDEN = frozenset("*?[]#$`\"'<>|&;\\")


@dataclass(frozen=True)
class TransferReport:
    """What a transfer did."""

    files: int
    bytes: int
    skipped_files: int
    """Those of the files that were there already."""


@dataclass(frozen=True)
class Found:
    """The objects that a URI means: those below it, or the one of that name."""

    bucket: Bucket
    objects: tuple[ObjectInfo, ...]
    is_tree: bool = True
    """False for the one of that name."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(info.size for info in self.objects)


def require_safe_name(name: str) -> str:
    """Return an object name that is also a safe relative path.

    Raises:
        UsageError: It could leave its directory, or confuse a shell, a tool or a terminal.
    """
    parts = name.split("/")
    is_safe = (
        all(part not in ("", ".", "..") and not part.startswith("-") for part in parts)
        and name.isprintable()
        and not _FORBIDDEN & set(name)
    )
    try:
        longest = max(len(part.encode("utf-8")) for part in parts)
        is_safe &= longest <= MAX_PART_BYTES and len(name.encode("utf-8")) <= MAX_NAME_BYTES
    except UnicodeEncodeError:
        is_safe = False
    if not is_safe:
        raise UsageError(
            f"{printable(repr(name))} is not a name to copy: no part may be empty, . or .., begin "
            f"with -, or have over {MAX_PART_BYTES} bytes, and no unprintable character or "
            f"{''.join(sorted(_FORBIDDEN))} may be in it. Nothing was changed."
        )
    return name


def find_objects(uri: str) -> Found:
    """Return what is below a URI, or the single object that it names.

    Raises:
        UsageError: There is nothing.
        StorageError: The bucket cannot be listed.
    """
    bucket = open_bucket(uri)
    objects = tuple(bucket.list())
    if objects:
        return Found(bucket, objects)
    bucket.close()
    place = split_uri(uri)
    if place is not None:
        parent, name = place
        bucket = open_bucket(parent)
        info = bucket.stat(name)
        if info is not None:
            return Found(bucket, (info,), is_tree=False)
        bucket.close()
    raise UsageError(f"{uri}: nothing is there.")


def put_tree(
    source: Path,
    bucket: Bucket,
    on_progress: OnProgress | None = None,
    last_name: str = INDEX_OBJECT,
) -> TransferReport:
    """Copy a file, or everything below a directory, into a bucket.

    `last_name` is copied when all others are there.

    Raises:
        UsageError: There is nothing to copy, or a name is refused.
        DataError: A file is not what an `index.json` among them says, or that cannot be read.
        StorageError: Something could not be copied or is not the same in the bucket.
    """
    files = {require_safe_name(name): path for name, path in _local_files(source).items()}
    stored = {info.name: info for info in bucket.list()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    origin = DirectoryBucket(source if source.is_dir() else source.parent)
    recorded = _find_recorded(origin, files)

    def put(name: str) -> bool:
        path = files[name]
        checksum = crc32c_of_file(path)
        _require_recorded(origin, name, checksum, recorded)
        if _is_same(bucket, stored.get(name), sizes[name], checksum):
            return False
        info = bucket.put_file(name, path)
        if (info.size, info.crc32c) != (sizes[name], checksum):
            raise StorageError(
                f"{bucket.uri}/{name} is not what {path} was: {info.size} bytes, crc32c "
                f"{info.crc32c}; expected {sizes[name]}, {checksum}. Run the same command again."
            )
        return True

    return _transfer("Uploading", put, sizes, on_progress, last_name)


def get_tree(
    found: Found, directory: Path, on_progress: OnProgress | None = None
) -> TransferReport:
    """Copy objects into a directory.

    Raises:
        UsageError: A name is refused, or a file is where the directory should be.
        DataError: A file is not what an `index.json` among them says, or that cannot be read.
        StorageError: Something could not be copied or is not what the bucket says.
    """
    for path in (directory, *directory.absolute().parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{directory}: {path} is a file; a directory is needed.")
    infos = {require_safe_name(info.name): info for info in found.objects}
    root = directory.resolve()
    _require_inside(root, infos)
    for name in infos:
        above = next(
            (str(path) for path in PurePosixPath(name).parents if str(path) in infos), None
        )
        if above is not None:
            raise UsageError(
                f"{found.bucket.uri} has {above!r} and {name!r}, and a file cannot be a directory "
                "too. Nothing was changed."
            )
    recorded = _find_recorded(found.bucket, infos)

    def get(name: str) -> bool:
        info, path = infos[name], root / name
        checksum = info.crc32c or found.bucket.crc32c(name)
        _require_recorded(found.bucket, name, checksum, recorded)
        is_candidate = path.is_file() and path.stat().st_size == info.size
        if is_candidate and crc32c_of_file(path) == checksum:
            return False
        _download(found.bucket, info, checksum, path)
        return True

    return _transfer("Downloading", get, {n: i.size for n, i in infos.items()}, on_progress)


def remove_objects(found: Found, on_progress: OnProgress | None = None) -> None:
    """Delete objects, and the directories that this leaves empty.

    Raises:
        UsageError: It would be the root, the home or the current directory, or lies elsewhere.
        StorageError: Something could not be deleted.
    """
    bucket = found.bucket
    directory = local_path(bucket.uri) if found.is_tree else None
    if directory is not None:
        root = directory.resolve()
        if Path.cwd().is_relative_to(root) or Path.home().is_relative_to(root):
            raise UsageError(f"{root} holds the current or the home directory: not removed.")
        _require_inside(root, (info.name for info in found.objects))
    sizes = {info.name: info.size for info in found.objects}
    first = [name for name in sizes if PurePosixPath(name).name == INDEX_OBJECT]
    for name in first:
        bucket.delete(name)

    def remove(name: str) -> bool:
        bucket.delete(name)
        return True

    _transfer("Removing", remove, sizes, on_progress)
    if directory is not None:
        _remove_empty_directories(directory)


def _require_inside(root: Path, names: Iterable[str]) -> None:
    for name in names:
        if not (root / name).parent.resolve().is_relative_to(root):
            raise UsageError(f"{root}/{name} leads out of the directory by a link.")


def _find_recorded(bucket: Bucket, names: Iterable[str]) -> dict[str, str]:
    """Return name -> crc32c of files, as far as an `index.json` among them has it."""
    found = {}
    for name in names:
        path = PurePosixPath(name)
        if path.name == INDEX_OBJECT:
            checksums = recorded_checksums(get_json(bucket, name) or {})
            found.update({str(path.parent / own): value for own, value in checksums.items()})
    return found


def _require_recorded(
    bucket: Bucket, name: str, checksum: str, recorded: Mapping[str, str]
) -> None:
    if recorded.get(name, checksum) != checksum:
        raise DataError(
            f"{bucket.uri}/{name} is damaged or was replaced: its crc32c is {checksum}, "
            f"{INDEX_OBJECT} beside it says {recorded[name]}. It and {INDEX_OBJECT} were not "
            "copied. Put the right file there, or prepare the data again."
        )


def _is_same(bucket: Bucket, info: ObjectInfo | None, size: int, checksum: str) -> bool:
    if info is None or info.size != size:
        return False
    return (info.crc32c or bucket.crc32c(info.name)) == checksum


def _download(bucket: Bucket, info: ObjectInfo, checksum: str, path: Path) -> None:
    # The same name each time: a killed download leaves one file, which the next one replaces.
    digest = hashlib.sha256(info.name.encode("utf-8")).hexdigest()[:16]
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{digest}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        got = bucket.get_file(info.name, temporary)
        if (temporary.stat().st_size, got) != (info.size, checksum):
            raise StorageError(
                f"{bucket.uri}/{info.name} changed while it was copied. Run the same command again."
            )
        temporary.replace(path)
    except (OSError, StorageError) as exc:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = exc if isinstance(exc, OSError) else exc.__cause__
        # A bucket that is read tells a full disk here as an error of its own.
        if isinstance(cause, OSError) and (cause is exc or cause.errno in DISK_ERRORS):
            raise StorageError(f"{path}: {cause.strerror or cause}.") from exc
        raise


def _local_files(source: Path) -> dict[str, Path]:
    if source.is_file():
        return {source.name: source}
    if not source.is_dir():
        raise UsageError(f"{source}: no such file or directory.")
    found = {}
    for folder, _, names in walk_folders(source):
        for name in names:
            path = folder / name
            if not name.startswith(TEMPORARY_PREFIX) and path.is_file():
                found[path.relative_to(source).as_posix()] = path
    if not found:
        raise UsageError(f"{source}: there are no files to copy.")
    return found


def _transfer(
    stage: str,
    copy: Callable[[str], bool],
    sizes: dict[str, int],
    on_progress: OnProgress | None,
    last_name: str = INDEX_OBJECT,
) -> TransferReport:
    """Copy in parallel, `last_name` last; the first failure ends it."""
    total = sum(sizes.values())
    last = [name for name in sizes if PurePosixPath(name).name == last_name]
    done_bytes = num_copied = 0
    with ThreadPoolExecutor(TRANSFER_THREADS, "transfer") as pool:
        for names in ([name for name in sizes if name not in set(last)], last):
            futures = {pool.submit(copy, name): name for name in names}
            try:
                for future in as_completed(futures):
                    num_copied += future.result()
                    done_bytes += sizes[futures[future]]
                    if on_progress:
                        on_progress(stage, done_bytes, total)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return TransferReport(len(sizes), total, len(sizes) - num_copied)


def _remove_empty_directories(root: Path) -> None:
    for folder, _, _ in os.walk(root, topdown=False):
        path = Path(folder)
        if not any(path.iterdir()):
            path.rmdir()
