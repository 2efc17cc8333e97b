"""Token ids end to end: `.npy`, `.bin` of llm.c with its header, and `.bin` with nothing else.

Nothing in these files says where a document ends. The files are memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from utils.base.errors import DataError
from utils.corpus.file_kinds import HEAD_BYTES, require_no_signature
from utils.data.shard_arrays import NPY_MAGIC

RawArray = npt.NDArray[np.integer[Any]]

# Magic number -> version and type: 256 numbers of 32 bits (both of these, and the number of
# tokens), then the ids. From `dev/data/data_common.py` of llm.c.
LLMC_HEADERS = {
    (20240520).to_bytes(4, "little"): (1, "uint16"),
    (20240801).to_bytes(4, "little"): (7, "uint32"),
}
LLMC_HEADER_BYTES = 1024


class Stretch(NamedTuple):
    """Ids that follow one another, as they stand in the file."""

    ids: RawArray

    ends: npt.NDArray[np.integer[Any]] | None = None
    """Where each document ends, the last at the end of the ids; None where the file does not
    say."""


def read_npy(path: Path, column: str, token_dtype: str | None) -> Iterator[Stretch]:
    """Yield the ids of a 1-D array."""
    if read_head(path, len(NPY_MAGIC)) != NPY_MAGIC:
        raise ValueError("no .npy header; bare ids are named .bin, see --token-dtype")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        what = f"{array.dtype}, shape {array.shape}"
        raise DataError(f"{path}: holds {what}; a 1-D array of integers is needed.")
    if not len(array):
        raise DataError(f"{path}: holds no tokens.")
    yield Stretch(array)


def read_flat(path: Path, column: str, token_dtype: str | None) -> Iterator[Stretch]:
    """Yield the ids of a file that holds nothing else."""
    require_no_signature(path, read_head(path, HEAD_BYTES))
    yield Stretch(map_ids(path, str(token_dtype)))


def read_llmc(path: Path, column: str, token_dtype: str | None) -> Iterator[Stretch]:
    """Yield the ids of a token file of llm.c."""
    head = read_head(path, LLMC_HEADER_BYTES)
    if len(head) < LLMC_HEADER_BYTES:
        raise ValueError(f"its header of llm.c ends after {len(head)} of {LLMC_HEADER_BYTES} bytes")
    version, dtype = LLMC_HEADERS[head[:4]]
    found, num_tokens = np.frombuffer(head, "<i4")[1:3].tolist()
    if found != version:
        raise ValueError(f"its header of llm.c has version {found}; {version} goes with {dtype}")
    ids = map_ids(path, dtype, LLMC_HEADER_BYTES)
    if len(ids) != num_tokens:
        raise ValueError(f"its header says {num_tokens:,} tokens, it holds {len(ids):,}")
    yield Stretch(ids)


def read_head(path: Path, count: int) -> bytes:
    """Return the first bytes of a file."""
    with path.open("rb") as file:
        return file.read(count)


def map_ids(path: Path, dtype: str, offset: int = 0) -> RawArray:
    """Return the little-endian ids of a file from an offset on, memory-mapped.

    Raises:
        DataError: There are none, or no whole number of them.
    """
    size, type_ = path.stat().st_size - offset, np.dtype(dtype).newbyteorder("<")
    if size % type_.itemsize:
        raise DataError(
            f"{path}: {size} bytes are no whole number of {dtype} ids. Is the type right "
            "(--token-dtype), and the file whole?"
        )
    if size <= 0:
        raise DataError(f"{path}: holds no tokens.")
    return np.memmap(path, type_, mode="r", offset=offset)
