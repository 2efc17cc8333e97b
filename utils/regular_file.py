"""Files whose names anybody may have given to something else: a pipe, a device, a directory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MAX_BYTES = 256 * 2**20


def read_regular_file(path: str | Path, limit: int = MAX_BYTES) -> bytes:
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
