"""A directory, local or mounted, that behaves like a bucket."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from utils.base.errors import AccessDeniedError, ConflictError, ObjectNotFoundError, UsageError
from utils.base.files import walk_folders
from utils.storage.bucket import (
    Meter,
    ObjectInfo,
    WriteStream,
    crc32c_of_bytes,
    crc32c_of_file,
    fsync_directory,
    map_file_error,
    metered_blocks,
    write_file,
)

TEMPORARY_PREFIX = ".tmp-"
STREAM_SUFFIX = ".part"
MAX_TEMPORARY_BYTES = 100
# A mounted bucket that has no such call at all; anything else it says is a failure.
UNSUPPORTED_ERRORS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
UNSUPPORTED_RENAME_ERRORS = UNSUPPORTED_ERRORS | {errno.EXDEV, errno.EEXIST}
SYNC_BYTES = 64 * 2**20

log = logging.getLogger(__name__)

Commit = Callable[[Path, Path], None]
"""Makes a temporary file the object's own."""


class DirectoryBucket:
    """A directory (local or mounted) that behaves like a bucket.

    A version of an object is its content. Conditional writes of one machine exclude each other; on
    a file system that several machines mount, creating excludes too, but two that replace the same
    version within the same millisecond may both succeed where it has no `flock`.
    """

    def __init__(self, root: Path, meter: Meter | None = None) -> None:
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)
        self._meter = meter or Meter()
        self._dangling: set[str] = set()

    def _path(self, name: str) -> Path:
        pure = PurePosixPath(name)
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in name:
            raise UsageError(f"{name!r} is not a valid object name.")
        return self.root / pure

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose name starts with `prefix`, sorted by name; links are followed."""
        directory = self.root / prefix.rpartition("/")[0]
        found = []
        with self._mapped_errors(prefix):
            for folder, folders, files in walk_folders(directory, _raise_unless_gone):
                folders[:] = [name for name in folders if not name.startswith(TEMPORARY_PREFIX)]
                for file in files:
                    name = (folder / file).relative_to(self.root).as_posix()
                    if name.startswith(prefix) and not file.startswith(TEMPORARY_PREFIX):
                        found.append(name)
        for name in sorted(found):
            info = self.stat(name)
            if info is not None:
                yield info
            elif self._path(name).is_symlink() and name not in self._dangling:
                self._dangling.add(name)
                log.warning("%s/%s is a link to nothing: left out.", self.uri, name)

    def stat(self, name: str) -> ObjectInfo | None:
        """Return the object's size and time, or None; directories keep no checksum."""
        path = self._path(name)
        with contextlib.suppress(ObjectNotFoundError), self._mapped_errors(name):
            if path.is_file():
                facts = path.stat()
                return ObjectInfo(name, facts.st_size, None, facts.st_mtime_ns)
        return None

    def crc32c(self, name: str) -> str:
        """Return the checksum of the file's bytes, read from the directory."""
        with self._mapped_errors(name):
            return crc32c_of_file(self._path(name), self._meter.show_life)

    def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes, or `length` of them from `start`."""
        with self._mapped_errors(name), self._path(name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    def get_file(self, name: str, path: Path) -> str:
        """Copy the object to `path`; return its checksum."""
        with self._mapped_errors(name):
            shutil.copyfile(self._path(name), path)
        return crc32c_of_file(path)

    def fetch(self, name: str, scratch: Path) -> Path:
        """Return the object's own file; nothing is copied."""
        path = self._path(name)
        with self._mapped_errors(name), path.open("rb"):
            return path

    def put_file(self, name: str, path: Path) -> ObjectInfo:
        """Copy the file in under a temporary name, sync it, rename it."""
        with self._written_aside(name, _replace) as temporary, self._mapped_errors(name):
            shutil.copyfile(path, temporary)
        target = self._path(name)
        return ObjectInfo(name, target.stat().st_size, crc32c_of_file(target))

    def put_stream(self, name: str, write: WriteStream, expected: ObjectInfo | None) -> None:
        """Write into a temporary file, sync it, rename it where `expected` is still there.

        The temporary name belongs to the object: what a killed writer left is written over.
        """

        def commit(temporary: Path, target: Path) -> None:
            with _alone_in(target.parent):
                if _version(self.stat(name)) != _version(expected):
                    raise ConflictError(f"{target} was changed by another process.")
                _replace(temporary, target)

        mapped_errors = functools.partial(self._mapped_errors, name)
        with self._written_aside(name, commit, mark="") as temporary:
            write_file(
                temporary, write, mapped_errors, lambda file: _MeteredFile(file, self._meter)
            )

    def copy(self, name: str, target: str) -> None:
        """Copy an object within the directory."""
        self.put_file(target, self._path(name))

    def remove_unfinished(self, folder: str, keep: frozenset[str]) -> None:
        """Remove what killed writers left in a folder, but for the objects in `keep`.

        Objects whose name begins with a dot are written at any time, and are left alone.
        """
        spared = tuple(f"{TEMPORARY_PREFIX}{PurePosixPath(name).name}" for name in keep)
        with self._mapped_errors(folder):
            directory = self._path(folder)
            for path in directory.glob(f"{TEMPORARY_PREFIX}[!.]*{STREAM_SUFFIX}"):
                if not path.name.startswith(spared):
                    path.unlink(missing_ok=True)

    def put_bytes(self, name: str, data: bytes) -> ObjectInfo:
        """Write a small object."""
        self._write_small(name, data, _replace)
        return ObjectInfo(name, len(data), crc32c_of_bytes(data))

    def read_version(self, name: str) -> tuple[bytes, ObjectInfo]:
        """Return a small object's bytes and their checksum."""
        data = self.read_bytes(name)
        return data, ObjectInfo(name, len(data), crc32c_of_bytes(data))

    def put_bytes_if(self, name: str, data: bytes, expected: ObjectInfo | None) -> ObjectInfo:
        """Write a small object where the directory still holds `expected`."""
        target = self._path(name)
        self._meter.pass_on(len(data))
        with self._mapped_errors(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(target.parent):
                if expected is not None:
                    self._require_version(name, expected)
                self._write_small(name, data, _create if expected is None else _replace)
        return ObjectInfo(name, len(data), crc32c_of_bytes(data))

    def delete(self, name: str) -> None:
        """Remove the object; one that does not exist is no error."""
        with self._mapped_errors(name):
            self._path(name).unlink(missing_ok=True)

    def delete_if(self, name: str, expected: ObjectInfo) -> None:
        """Remove the object where the directory still holds `expected`."""
        target = self._path(name)
        with self._mapped_errors(name), _alone_in(target.parent):
            if target.exists():
                self._require_version(name, expected)
                target.unlink()

    def deletion_notes(self) -> Sequence[str]:
        """Say that a directory keeps nothing."""
        return ["A directory: what is deleted is gone at once."]

    def close(self) -> None:
        """Nothing to release."""

    def _write_small(self, name: str, data: bytes, commit: Commit) -> None:
        with self._written_aside(name, commit) as temporary, self._mapped_errors(name):
            temporary.write_bytes(data)

    @contextlib.contextmanager
    def _written_aside(self, name: str, commit: Commit, mark: str | None = None) -> Iterator[Path]:
        """Give the object what is written into a temporary file; nothing where that fails."""
        target = self._path(name)
        mark = f"-{uuid.uuid4().hex}" if mark is None else mark
        begin = os.fsencode(target.name)[:MAX_TEMPORARY_BYTES].decode("utf-8", "ignore")
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{begin}{mark}{STREAM_SUFFIX}")
        with self._mapped_errors(name):
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with self._mapped_errors(name):
                with temporary.open("rb") as file:
                    _sync(file)
                commit(temporary, target)
                fsync_directory(target.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _require_version(self, name: str, expected: ObjectInfo) -> None:
        try:
            _, found = self.read_version(name)
        except ObjectNotFoundError as exc:
            raise ConflictError(f"{self.uri}/{name} is gone.") from exc
        if (found.size, found.crc32c) != (expected.size, expected.crc32c):
            raise ConflictError(f"{self.uri}/{name} was changed by another process.")

    @contextlib.contextmanager
    def _mapped_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as exc:
            raise ObjectNotFoundError(f"{self.uri}/{name} does not exist.") from exc
        except PermissionError as exc:
            raise AccessDeniedError(f"{self.uri}/{name}: {exc.strerror}.") from exc
        except OSError as exc:
            raise map_file_error(exc, f"{self.uri}/{name}") from exc


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keep the conditional writes of other processes and threads out, where the system can."""
    descriptor = None
    try:
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _create(temporary: Path, target: Path) -> None:
    try:
        try:
            os.link(temporary, target)  # unlike a rename, it replaces nothing
        except FileExistsError:
            raise
        except OSError:
            # Some mounted buckets have no links; a reader may then see half of the object.
            with target.open("xb") as file:
                file.write(temporary.read_bytes())
    except FileExistsError as exc:
        raise ConflictError(f"{target} exists.") from exc


def _replace(temporary: Path, target: Path) -> None:
    try:
        temporary.replace(target)
    except OSError as exc:
        # Only where there is no rename: on a full disk a copy would destroy what it replaces.
        if exc.errno not in UNSUPPORTED_RENAME_ERRORS:
            raise
        # A reader may see half of it; the caller's checksum still guards the copy.
        shutil.copyfile(temporary, target)
        with target.open("rb") as file:
            _sync(file)


def _sync(file: IO[bytes]) -> None:
    """Make a file durable, where the file system knows what that is."""
    try:
        os.fsync(file.fileno())
    except OSError as exc:
        if exc.errno not in UNSUPPORTED_ERRORS:
            raise


def _version(info: ObjectInfo | None) -> tuple[int, int | None] | None:
    return None if info is None else (info.size, info.generation)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


class _MeteredFile:
    """A binary file that is written to in blocks, each of them metered.

    It is synced on the way: what is metered has arrived, but for the last bytes, and one sync at
    the end would take long without a sign of life.
    """

    def __init__(self, file: IO[bytes], meter: Meter) -> None:
        self._file, self._meter = file, meter
        self._unsynced = 0

    def write(self, data: bytes) -> int:
        for block in metered_blocks(data, self._meter):
            self._file.write(block)
            self._unsynced += len(block)
        if self._unsynced >= SYNC_BYTES:
            self._unsynced = 0
            self._file.flush()
            _sync(self._file)
        return len(data)
