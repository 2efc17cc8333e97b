"""The arrays in a shard: found, checked and read, from a file or from where it lies in a bucket.

Of a shard in a bucket only the zip directory and the .npy headers are read, a few KB. What is
damaged, or is no tokens, is a `ShardError` that names the shard. No torch here.
"""

from __future__ import annotations

import io
import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from utils.base.errors import ShardError
from utils.storage.bucket import Bucket, ObjectInfo

TOKEN_KEYS = ("input_ids", "tokens", "arr_0")
MASK_KEY = "attention_mask"
MAX_SHARD_BYTES = 8 * 2**30
MAX_UNPACK_RATIO = 100
SMALL_ARRAY_BYTES = 64 * 2**20
HEADER_READ_BYTES = 16 * 2**10
# What zipfile and numpy raise for damaged bytes: a flipped bit may also ask for a password, for
# an unknown compression or for a later version of the format.
DAMAGE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
)
NPY_MAGIC = b"\x93NUMPY"
_HEADER_LIMIT_BYTES = 2**16
_DESCR = re.compile(r"'descr':\s*'([<>=|]?[A-Za-z]\d*)'")
_ORDER = re.compile(r"'fortran_order':\s*(True|False)")
_SHAPE = re.compile(r"'shape':\s*\(([\d\s,L-]*)\)")


@contextmanager
def open_stored_shard(bucket: Bucket, info: ObjectInfo) -> Iterator[zipfile.ZipFile]:
    """Open a shard where it lies; only what is looked at is read, 16 KiB at a time.

    Raises:
        ShardError: It is empty, truncated or no zip file at all.
    """
    source = io.BufferedReader(_RangeReader(bucket, info), HEADER_READ_BYTES)
    with source, open_shard(source, info.name) as archive:
        yield archive


def open_shard(source: Any, name: str) -> zipfile.ZipFile:
    """Open an NPZ as the zip file that it is.

    Raises:
        ShardError: It is empty, truncated or no zip file at all.
    """
    try:
        return zipfile.ZipFile(source)
    except DAMAGE_ERRORS as exc:
        raise ShardError(name, f"it is not a whole NPZ file ({exc}).") from exc


def find_token_key(archive: zipfile.ZipFile, name: str) -> str:
    """Return the key of the token ids in a shard.

    Raises:
        ShardError: It has none of the accepted keys.
    """
    members = archive.namelist()
    keys = [member.removesuffix(".npy") for member in members if member.endswith(".npy")]
    for key in TOKEN_KEYS:
        if key in keys:
            return key
    raise ShardError(name, f"its keys are {keys[:10]}; one of {', '.join(TOKEN_KEYS)} is needed.")


def read_array_header(
    archive: zipfile.ZipFile, key: str, name: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return (shape, dtype) of a shard's array, after checking that they are acceptable.

    Raises:
        ShardError: Not integers, not 1-D, 2-D or [.., .., 1], or of a size that cannot be true.
    """
    member = archive.getinfo(f"{key}.npy")
    try:
        with archive.open(member) as file:
            shape, _, dtype = _parse_npy_header(file)
    except DAMAGE_ERRORS as exc:
        raise ShardError(name, f"the header of {key} cannot be read ({exc}).") from exc
    if dtype.kind not in "iu" and not (key == MASK_KEY and dtype.kind == "b"):
        raise ShardError(name, f"{key} has dtype {dtype}; integers are needed.")
    if len(shape) not in (1, 2) and not (len(shape) == 3 and shape[2] == 1):
        raise ShardError(name, f"{key} has shape {shape}; 1-D, 2-D or [n, length, 1] is needed.")
    # Python's numbers: np.prod would wrap a shape that lies around to a small product.
    declared = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape):
        raise ShardError(name, f"{key} has shape {shape}, which is impossible.")
    if declared > MAX_SHARD_BYTES or member.file_size > MAX_SHARD_BYTES:
        raise ShardError(name, f"{key} unpacks to more than {MAX_SHARD_BYTES} bytes.")
    if member.file_size > max(SMALL_ARRAY_BYTES, MAX_UNPACK_RATIO * member.compress_size):
        raise ShardError(
            name,
            f"{key} unpacks to {member.file_size} bytes, more than {MAX_UNPACK_RATIO} times its "
            f"{member.compress_size}; no text does that.",
        )
    if not declared < member.file_size <= declared + 2**16:
        raise ShardError(
            name, f"{key} declares {declared} bytes, its zip entry {member.file_size}."
        )
    return shape, dtype


def read_array_blocks(
    archive: zipfile.ZipFile, key: str, name: str, block_elements: int = 2**20
) -> Generator[np.ndarray[Any, Any], None, None]:
    """Yield one array of a shard, flat, block by block, after checking its header.

    Raises:
        ShardError: The header is not acceptable or the bytes are damaged.
    """
    _, dtype = read_array_header(archive, key, name)
    try:
        with archive.open(f"{key}.npy") as file:
            shape, columns_first, _ = _parse_npy_header(file)
            if columns_first and sum(length > 1 for length in shape) > 1:
                # Only the whole array can be put in order.
                yield np.frombuffer(file.read(), dtype).reshape(shape, order="F").reshape(-1)
                return
            # Reaching the end makes zipfile compare the CRC.
            while data := file.read(block_elements * dtype.itemsize):
                yield np.frombuffer(data, dtype=dtype)
    except DAMAGE_ERRORS as exc:
        raise ShardError(name, f"{key} is damaged ({exc}).") from exc


def _parse_npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read a .npy header (NEP 1): return (shape, whether columns come first, dtype).

    numpy's own reader evaluates the header with `ast`, which several threads at once break in
    Python 3.11 ("AST constructor recursion depth mismatch").

    Raises:
        ValueError: It is no such header.
    """
    if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
        raise ValueError("no .npy array")
    major = file.read(2)[:1]
    length = int.from_bytes(file.read(2 if major == b"\x01" else 4), "little")
    if major not in (b"\x01", b"\x02", b"\x03") or length > _HEADER_LIMIT_BYTES:
        raise ValueError("a .npy header of an unknown version or an impossible length")
    text = file.read(length).decode("latin1")
    descr, order, shape = (pattern.search(text) for pattern in (_DESCR, _ORDER, _SHAPE))
    if len(text) != length or descr is None or order is None or shape is None:
        raise ValueError("not the header of a plain array; integers are needed")
    try:
        dtype = np.dtype(descr[1])
    except TypeError as exc:
        raise ValueError(f"dtype {descr[1]!r}") from exc
    sizes = tuple(int(size.strip(" L")) for size in shape[1].split(",") if size.strip())
    return sizes, order[1] == "True", dtype


class _RangeReader(io.RawIOBase):
    """A seekable view of one object through range reads."""

    def __init__(self, bucket: Bucket, info: ObjectInfo) -> None:
        super().__init__()
        self._bucket, self._info, self._position = bucket, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._info.size - self._position)
        if length <= 0:
            return 0
        data = self._bucket.read_bytes(self._info.name, self._position, length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
