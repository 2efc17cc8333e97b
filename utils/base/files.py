"""Files that others append to, that may be a pipe or a device, or lie in linked folders; scratch.

    metrics.jsonl, journal, train.log -> blocks of whole lines -> whoever follows

A line without its end is still being written: it comes when it is whole. A file that was replaced,
cut or emptied is read again from its start. Memory is bounded whatever the file holds; a pipe or a
device of that name is not waited for. A scratch directory goes away even where its process is
killed: the next one beside it removes it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import io
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

MAX_REGULAR_FILE_BYTES = 256 * 2**20
LINE_BLOCK_BYTES = 2**20
MARK_BYTES = 64
LOCK_SUFFIX = ".lock"


def near_directory(path: Path) -> str:
    """Return ` Did you mean X?` where a directory of nearly that name is there, else nothing."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    near = difflib.get_close_matches(path.name, names, 1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def read_regular_file(path: str | Path, limit: int = MAX_REGULAR_FILE_BYTES) -> bytes:
    """Return a file's bytes; a pipe or a device of that name is not waited for.

    Raises:
        OSError: It cannot be read, is no regular file, or is too large.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if facts.st_size > limit:
            text = f"it has {facts.st_size} bytes, the limit is {limit}"
            raise OSError(errno.EFBIG, text, str(path))
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def pass_by_cache(file: io.FileIO, *, is_wanted: bool = True) -> bool:
    """Have an open file pass by the page cache (O_DIRECT), or not; tell whether it does.

    To fill fresh pages of the cache costs ten times the CPU time of the transfer. Memory, position
    and length of a transfer are then aligned; what is not fails with EINVAL.
    """
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # the file system refuses it
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT if is_wanted else 0)
            return is_wanted
    return False


def append_line(path: Path, line: bytes, *, sync: bool = False) -> int:
    """Append a line, given without its line break; return the size of the file.

    A torn last line, left by a crash, is closed first: it would swallow this one.

    Raises:
        OSError: The file cannot be written.
    """
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line + b"\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())
        return file.tell()


@contextlib.contextmanager
def scratch_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """Return an empty directory that is gone afterwards; what killed processes left goes first.

    Raises:
        OSError: It cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent, prefix)
    folder = parent / f"{prefix}{uuid.uuid4().hex}"
    with FileLock(folder.with_suffix(LOCK_SUFFIX)) as lock:
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


@contextlib.contextmanager
def removing_empty_folders(*folders: Path) -> Iterator[None]:
    """Remove afterwards what was not there before of folders and those above them, where empty."""
    made = [one for folder in folders for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove locks that no process holds, and the scratch directories that they belong to."""
    for path in parent.glob(f"{prefix}*{LOCK_SUFFIX}"):
        lock = FileLock(path)
        with contextlib.suppress(OSError):  # it is held, or somebody else's
            lock.acquire(timeout=0)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)
            lock.release()


def walk_folders(
    root: Path, on_error: Callable[[OSError], object] | None = None
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder from `root` down, with the sorted names of its folders and its files.

    Linked folders are followed, but not in circles. What the caller takes out of a list of folders
    is not entered.
    """
    for name, folders, files in os.walk(root, onerror=on_error, followlinks=True):
        folder = Path(name)
        folders[:] = sorted(one for one in folders if not _is_circle(root, folder / one))
        yield folder, folders, sorted(files)


def _is_circle(root: Path, path: Path) -> bool:
    """Tell whether a folder is a link to one that the walk from `root` is in already."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    above = [folder for folder in path.parents if folder.is_relative_to(root)]
    return any(folder.resolve().is_relative_to(target) for folder in above)


@dataclass(frozen=True)
class Block:
    """Some whole lines of a file, in order.

    Attributes:
        data: The lines, each with its line break.
        is_first: The file is another one than at the last call: forget what came from that.
        bytes_left: From the end of these lines to the end of the file.
        num_too_long: Lines, longer than a block, that were left out before these.
    """

    data: bytes
    is_first: bool = False
    bytes_left: int = 0
    num_too_long: int = 0


class FollowedFile:
    """Reads what is new in one file.

    It need not be there yet. Of a file that is there at the first call, only the last `tail_bytes`
    are read, from the next line on.
    """

    def __init__(self, path: Path, tail_bytes: int | None = None) -> None:
        self.path = path
        self._tail_bytes = tail_bytes
        self._file_number: tuple[int, int] | None = None
        self._offset = 0
        self._mark = b""  # what stood before the offset: a file that was cut may have grown again
        self._is_in_long_line = False

    def read_new(self) -> Iterator[Block]:
        """Yield what is new; a file that is another one yields at least one block.

        Raises:
            OSError: It is missing, cannot be read, or is no regular file.
        """
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            if stat.S_ISDIR(facts.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path))
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", str(self.path))
            if self._is_another(descriptor, facts):
                self._begin(facts)
                yield Block(b"", is_first=True, bytes_left=facts.st_size - self._offset)
            yield from self._read_blocks(descriptor, facts.st_size)
        finally:
            os.close(descriptor)

    def _is_another(self, descriptor: int, facts: os.stat_result) -> bool:
        if self._file_number != (facts.st_dev, facts.st_ino) or facts.st_size < self._offset:
            return True
        begin = self._offset - len(self._mark)
        return os.pread(descriptor, len(self._mark), begin) != self._mark

    def _begin(self, facts: os.stat_result) -> None:
        tail = self._tail_bytes if self._file_number is None else None
        self._file_number = (facts.st_dev, facts.st_ino)
        self._offset = 0 if tail is None else max(0, facts.st_size - tail)
        self._mark = b""
        self._is_in_long_line = self._offset > 0  # the rest of a line that began before

    def _read_blocks(self, descriptor: int, size: int) -> Iterator[Block]:
        num_too_long = 0
        while self._offset < size:
            data = os.pread(descriptor, LINE_BLOCK_BYTES, self._offset)
            if not data:
                return
            if self._is_in_long_line:
                self._skip_to_next_line(data)
                continue
            whole = data.rfind(b"\n") + 1
            if whole:
                self._advance(data[:whole])
                yield Block(data[:whole], False, max(0, size - self._offset), num_too_long)
                num_too_long = 0
            elif len(data) < LINE_BLOCK_BYTES:
                break
            else:
                num_too_long += 1
                self._is_in_long_line = True
        if num_too_long:
            yield Block(b"", False, max(0, size - self._offset), num_too_long)

    def _skip_to_next_line(self, data: bytes) -> None:
        end = data.find(b"\n") + 1
        self._is_in_long_line = not end
        self._advance(data[:end] if end else data)

    def _advance(self, data: bytes) -> None:
        self._offset += len(data)
        self._mark = (self._mark + data[-MARK_BYTES:])[-MARK_BYTES:]
