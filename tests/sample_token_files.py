"""Token files as other tools write them, byte by byte from their formats, for the tests.

Each writer takes a folder and documents, and returns the path that a user gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

Documents = Sequence[Sequence[int]]
Writer = Callable[[Path, Documents], Path]


def _join(documents: Documents, dtype: str) -> bytes:
    return np.concatenate([np.array(document, dtype) for document in documents]).tobytes()


def write_megatron(folder: Path, documents: Documents, dtype: str = "<u2", code: int = 8) -> Path:
    """Two sequences a document, the way that Megatron splits sentences."""
    halves = [part for one in documents for part in (one[: len(one) // 2], one[len(one) // 2 :])]
    lengths = np.array([len(part) for part in halves], "<i4")
    positions = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    firsts = np.arange(0, len(halves) + 1, 2, "<i8")
    head = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([code])
    head += np.array([len(lengths), len(firsts)], "<u8").tobytes()
    parts = (lengths.tobytes(), positions.astype("<i8").tobytes(), firsts.tobytes())
    (folder / "a.idx").write_bytes(head + b"".join(parts))
    (folder / "a.bin").write_bytes(_join(documents, dtype))
    return folder / "a.bin"


def write_llmc(folder: Path, documents: Documents, magic: int = 20240520) -> Path:
    """256 numbers of 32 bits, then the ids."""
    version, dtype = {20240520: (1, "<u2"), 20240801: (7, "<u4")}[magic]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, sum(map(len, documents))
    (folder / "a.bin").write_bytes(header.tobytes() + _join(documents, dtype))
    return folder / "a.bin"


def write_nanogpt(folder: Path, documents: Documents, dtype: str = "<u2") -> Path:
    """Nothing but ids."""
    (folder / "train.bin").write_bytes(_join(documents, dtype))
    return folder / "train.bin"


def write_datatrove(folder: Path, documents: Documents, dtype: str = "<u2") -> Path:
    """Ids, and where each document ends."""
    path = folder / "00000_unshuffled.ds"
    path.write_bytes(_join(documents, dtype))
    Path(f"{path}.index").write_bytes(np.cumsum(list(map(len, documents)), dtype="<u8").tobytes())
    size = np.dtype(dtype).itemsize
    Path(f"{path}.metadata").write_text(f"gpt2|{size}\n{sum(map(len, documents))}\n3 kT")
    return path


def write_mds(folder: Path, documents: Documents, encoding: str = "ndarray") -> Path:
    """Two shards, with columns before and after the ids."""
    folder = folder / "mds"
    folder.mkdir()
    half = len(documents) // 2
    dtype = np.dtype("<i8" if encoding == "bytes" else "<i4")
    shards = []
    for number, part in enumerate((documents[:half], documents[half:])):
        samples = []
        for document in part:
            shape = bytes([1 << 2 | 1]) + len(document).to_bytes(2, "little")
            head = {"ndarray": bytes([33]) + shape, "ndarray:int32": shape, "bytes": b""}[encoding]
            ids = head + np.array(document, dtype).tobytes()
            sizes = np.array([3, len(ids)], "<u4").tobytes()
            samples.append(sizes + b"web" + ids + (7).to_bytes(8, "little"))
        starts = 4 + 4 * (len(samples) + 1) + np.cumsum([0, *map(len, samples)])
        content = len(samples).to_bytes(4, "little") + starts.astype("<u4").tobytes()
        name = f"shard.{number:05d}.mds"
        size = (folder / name).write_bytes(content + b"".join(samples))
        shards.append(
            {"format": "mds", "version": 2, "samples": len(samples), "zip_data": None}
            | {"raw_data": {"basename": name, "bytes": size, "hashes": {}}}
            | {"column_names": ["source", "tokens", "weight"], "column_sizes": [None, None, 8]}
            | {"column_encodings": ["str", encoding, "int"]}
        )
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return folder


def _table(documents: Documents, type_: pyarrow.DataType | None = None) -> pyarrow.Table:
    ids = pyarrow.array(documents, type_ or pyarrow.list_(pyarrow.int32()))
    labels = pyarrow.array([0.5] * len(documents))
    return pyarrow.table({"score": labels, "input_ids": ids})


def write_parquet(folder: Path, documents: Documents) -> Path:
    """Three rows in a group."""
    pyarrow.parquet.write_table(_table(documents), folder / "a.parquet", row_group_size=3)
    return folder / "a.parquet"


def write_nested_parquet(folder: Path, documents: Documents) -> Path:
    """A row is a list of chunks of at most 5 ids."""
    rows = [[row[start : start + 5] for start in range(0, len(row), 5)] for row in documents]
    type_ = pyarrow.large_list(pyarrow.list_(pyarrow.uint16()))
    pyarrow.parquet.write_table(_table(rows, type_), folder / "a.parquet")
    return folder / "a.parquet"


def write_arrow(folder: Path, documents: Documents) -> Path:
    """The file format of Arrow, in several batches."""
    table = _table(documents)
    with pyarrow.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return folder / "a.arrow"


def write_arrow_stream(folder: Path, documents: Documents) -> Path:
    """The stream that `datasets` writes."""
    table = _table(documents, pyarrow.large_list(pyarrow.int64()))
    with pyarrow.ipc.new_stream(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return folder / "a.arrow"


def write_saved(folder: Path, documents: Documents) -> Path:
    """A dataset of two files."""
    rows = datasets.Dataset.from_dict({"input_ids": [list(one) for one in documents]})
    rows.save_to_disk(str(folder / "saved"), num_shards=2)
    return folder / "saved"
