"""Token ids with an index of the documents beside them: Megatron and datatrove.

    a.bin + a.idx         Megatron, GPT-NeoX: type of the ids, sequences, documents
    a.ds + a.ds.index     datatrove: where each document ends; the type is that of the sizes

Both files are memory-mapped. An index that does not cover its data exactly is refused: it is one
of another file, or one of them was cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.base.errors import DataError
from utils.corpus.token_files.flat import RawArray, Stretch, map_ids, read_head

# magic (9 bytes), version (8), type (1), number of sequences (8), entries of documents (8), then
# lengths (4 each), positions in bytes (8 each), first sequence of each document and their number
# (8 each). From `megatron/core/datasets/indexed_dataset.py` of Megatron-LM.
MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_VERSION = 1
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
MEGATRON_HEAD_BYTES = 34
DATATROVE_DTYPES = {2: "uint16", 4: "uint32"}


def read_megatron(path: Path, column: str, token_dtype: str | None) -> Iterator[Stretch]:
    """Yield the ids of a `.bin` with the documents of the `.idx` beside it."""
    index = path.with_suffix(".idx")
    dtype, lengths, positions, first_sequences = _read_megatron_index(index)
    ids = map_ids(path, dtype)
    stops = np.cumsum(lengths, dtype=np.int64)
    wrong = np.flatnonzero((positions != (stops - lengths) * ids.itemsize) | (lengths < 0))
    if len(wrong):
        number = int(wrong[0])
        raise DataError(
            f"{index}: sequence {number + 1} has {lengths[number]} ids from byte "
            f"{positions[number]} on and does not follow the one before it. Make the index again."
        )
    num_indexed = int(stops[-1]) if len(stops) else 0
    if num_indexed != len(ids):
        where = "points past the end of" if num_indexed > len(ids) else "ends before"
        raise DataError(
            f"{index}: {where} {path.name}: {num_indexed:,} ids against {len(ids):,}. One of them "
            "is cut, or of another file."
        )
    first, last = int(first_sequences[0]), int(first_sequences[-1])
    if first != 0 or last != len(stops):
        raise DataError(
            f"{index}: its documents are sequences {first:,} to {last:,}, not 0 to {len(stops):,}."
        )
    _require_ascending(index, first_sequences[1:])
    yield Stretch(ids, np.concatenate([[0], stops])[first_sequences[1:]])


def _read_megatron_index(index: Path) -> tuple[str, RawArray, RawArray, RawArray]:
    """Return type of the ids, lengths and positions of sequences, first sequences of documents."""
    head = read_head(index, MEGATRON_HEAD_BYTES)
    if not head.startswith(MEGATRON_MAGIC):
        raise DataError(
            f"{index}: begins with {head[:9]!r}, a Megatron index with {MEGATRON_MAGIC!r}. To read "
            "the ids without their documents, move it away and give --token-dtype."
        )
    if len(head) < MEGATRON_HEAD_BYTES:
        raise DataError(f"{index}: ends after {len(head)} bytes, inside its head.")
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    if version != MEGATRON_VERSION:
        raise DataError(f"{index}: has version {version}, only {MEGATRON_VERSION} is known.")
    if code not in MEGATRON_DTYPES:
        raise DataError(
            f"{index}: says type {code}, which is none of token ids. Known: "
            f"{', '.join(f'{number} ({name})' for number, name in MEGATRON_DTYPES.items())}."
        )
    num_sequences, num_entries = np.frombuffer(head, "<u8", 2, 18).tolist()
    wanted = MEGATRON_HEAD_BYTES + 12 * num_sequences + 8 * num_entries
    size = index.stat().st_size
    # A byte more for each sequence where it has modes.
    if size not in (wanted, wanted + num_sequences) or not num_entries:
        raise DataError(
            f"{index}: {num_sequences:,} sequences and {num_entries:,} entries of documents take "
            f"{wanted:,} bytes, it has {size:,}. Is it whole?"
        )
    data = np.memmap(index, np.uint8, mode="r")
    parts = np.split(data[34:wanted], [4 * num_sequences, 12 * num_sequences])
    lengths, positions, documents = map(np.ndarray.view, parts, ("<i4", "<i8", "<i8"))
    return MEGATRON_DTYPES[code], lengths, positions, documents


def read_datatrove(path: Path, column: str, token_dtype: str | None) -> Iterator[Stretch]:
    """Yield the ids of a `.ds` with the documents of the `.ds.index` beside it."""
    index, metadata = Path(f"{path}.index"), Path(f"{path}.metadata")
    if not index.is_file():
        raise DataError(
            f"{path}: {index.name} is not beside it, which says where its documents end. To read "
            "the ids without, name it .bin and give --token-dtype."
        )
    index_size = index.stat().st_size
    if not index_size and not path.stat().st_size:  # a task of datatrove that had no documents
        return
    if not index_size or index_size % 8:
        raise DataError(f"{index}: {index_size:,} bytes, 8 for each document are needed.")
    ends = np.memmap(index, "<i8", mode="r")
    _require_ascending(index, ends)
    num_tokens, size = int(ends[-1]), path.stat().st_size
    item_size = size // max(num_tokens, 1)
    if metadata.is_file():  # TOKENIZER|BYTES
        said = metadata.read_text("utf-8", "replace").partition("\n")[0].rpartition("|")[2]
        item_size = int(said) if said.isdigit() else item_size
    if item_size not in DATATROVE_DTYPES or size != item_size * num_tokens:
        raise DataError(
            f"{path}: has {size:,} bytes, and {index.name} says {num_tokens:,} ids: with 2 or 4 "
            f"bytes each{' as its metadata say' * metadata.is_file()}, one of the files is cut or "
            "of another one."
        )
    yield Stretch(map_ids(path, DATATROVE_DTYPES[item_size]), ends)


def _require_ascending(index: Path, ends: RawArray) -> None:
    wrong = np.flatnonzero(np.concatenate([ends[:1] < 0, ends[1:] < ends[:-1]]))
    if len(wrong):
        raise DataError(
            f"{index}: document {wrong[0] + 1} ends before it begins. Make the index again."
        )
