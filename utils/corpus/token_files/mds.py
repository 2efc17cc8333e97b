"""MosaicML MDS: a folder with `index.json` and shards of samples, one of whose columns has ids.

    shard: number of samples, where each begins and the last one ends, settings, samples
    sample: size of each column that has no fixed one, then the values of the columns

All numbers are little-endian, of 32 bits. A sample is a document. Read without the package
`mosaicml-streaming`, whose last version (0.13) needs an older transformers than this project. Other
columns are not decoded, so that no pickle in them is ever loaded.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from utils.base.errors import DataError
from utils.base.text import parse_json_object
from utils.corpus.file_kinds import DEFAULT_COLUMN
from utils.corpus.token_files.flat import RawArray, Stretch
from utils.corpus.token_files.tables import ID_COLUMNS

MDS_INDEX = "index.json"
MDS_VERSION = 2
BATCH_SAMPLES = 256
_BYTES = "bytes"
# The number that stands before an array whose type is not the same in all samples.
_TYPE_NUMBERS = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32"}
_TYPE_NUMBERS |= {64: "uint64", 65: "int64"}


class _Column(NamedTuple):
    number: int
    encoding: str
    sizes: tuple[int | None, ...]
    """Bytes of each column of a sample, None where they differ."""
    token_dtype: str | None


def mds_files(folder: Path) -> list[Path]:
    """Return the index and the shards that it names, all in the folder or below it."""
    try:
        index = parse_json_object((folder / MDS_INDEX).read_bytes())
        names = [shard["raw_data"]["basename"] for shard in index["shards"]]
        return [folder / MDS_INDEX, *(folder / os.path.normpath(f"/{name}")[1:] for name in names)]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DataError(f"{folder / MDS_INDEX}: not a readable index of MDS ({exc!r}).") from exc


def read_mds(folder: Path, column: str, token_dtype: str | None) -> Iterator[Stretch]:
    """Yield the samples of all shards."""
    index, *paths = mds_files(folder)
    for path, shard in zip(paths, json.loads(index.read_bytes())["shards"], strict=True):
        found = _find_column(index, shard, column, token_dtype)
        if not path.is_file():
            raise DataError(
                f"{path}: it is not there; {index.name} names it. Where it is there as "
                f"{path.name}.zstd: zstd -d --rm {path}.zstd"
            )
        samples = _samples(path, shard, found)
        while batch := list(itertools.islice(samples, BATCH_SAMPLES)):
            yield Stretch(np.concatenate(batch), np.cumsum([len(ids) for ids in batch]))


def _find_column(
    index: Path, shard: dict[str, Any], column: str, token_dtype: str | None
) -> _Column:
    """Return which column has the ids."""
    if (shard.get("format"), shard.get("version")) != ("mds", MDS_VERSION):
        raise DataError(
            f"{index}: a shard has format {shard.get('format')!r}, version "
            f"{shard.get('version')!r}; 'mds', {MDS_VERSION} is needed."
        )
    encodings = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    names = ID_COLUMNS if column == DEFAULT_COLUMN else (column,)
    name = next((name for name in names if name in encodings), None)
    dtype = encodings.get(name, "").split(":")[1:2]
    is_ids = encodings.get(name, "").partition(":")[0] in ("ndarray", _BYTES)
    if name is None or not is_ids or not set(dtype) <= set(_TYPE_NUMBERS.values()):
        columns = ", ".join(f"{name} ({encoding})" for name, encoding in encodings.items())
        raise DataError(
            f"{index}: no column of token ids, which are arrays of integers or bytes. Columns: "
            f"{columns}. Choose one with --text-column."
        )
    if encodings[name] == _BYTES and token_dtype is None:
        raise DataError(
            f"{index}: the bytes of column {name!r} do not say the type of the ids. Give "
            "--token-dtype, for example int64."
        )
    sizes = tuple(size or None for size in shard["column_sizes"])
    return _Column(shard["column_names"].index(name), encodings[name], sizes, token_dtype)


def _samples(path: Path, shard: dict[str, Any], column: _Column) -> Iterator[RawArray]:
    """Yield the ids of each sample of a shard."""
    num_samples, size = shard["samples"], path.stat().st_size
    data = np.memmap(path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    count = int.from_bytes(data[:4].tobytes(), "little")
    if count != num_samples or size != shard["raw_data"]["bytes"] or size < 8 + 4 * num_samples:
        raise DataError(
            f"{path}: {size:,} bytes and {count} samples; its {MDS_INDEX} says "
            f"{shard['raw_data']['bytes']:,} bytes and {num_samples:,}. Is it whole?"
        )
    starts = data[4 : 8 + 4 * num_samples].view("<u4").tolist()
    for number, (start, stop) in enumerate(zip(starts, starts[1:], strict=False), start=1):
        if not start <= stop <= size:
            raise DataError(
                f"{path}, sample {number}: stands from byte {start:,} to {stop:,} of {size:,}."
            )
        try:
            yield _ids_of(data[start:stop], column)
        except (ValueError, KeyError, IndexError) as exc:
            raise DataError(f"{path}, sample {number}: not readable ({exc!r}).") from exc


def _ids_of(sample: npt.NDArray[np.uint8], column: _Column) -> RawArray:
    sizes = list(column.sizes)
    head = 4 * sizes.count(None)
    given = iter(sample[:head].copy().view("<u4").tolist())
    known = [next(given) if size is None else size for size in sizes]
    start = head + sum(known[: column.number])
    value = sample[start : start + known[column.number]]
    if len(value) != known[column.number]:
        raise ValueError(f"a column takes {known[column.number]} bytes, {len(value)} are left")
    if column.encoding == _BYTES:
        return value.copy().view(np.dtype(str(column.token_dtype)).newbyteorder("<"))
    dtype, shape = [*column.encoding.split(":")[1:], None, None][:2]
    if dtype is None:
        dtype, value = _TYPE_NUMBERS[int(value[0])], value[1:]
    if shape is None:  # number of axes * 4 + log2 of the bytes of each length, lengths
        num_axes, log_bytes = divmod(int(value[0]), 4)
        value = value[1 + (num_axes << log_bytes) :]
    return value.copy().view(np.dtype(dtype).newbyteorder("<"))
