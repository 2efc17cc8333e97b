"""Which files and folders hold token ids, and in which format: their content says so.

    path --> token_kind --> a reader of this folder, or None: text

A .bin of llm.c has a header, one of Megatron an index beside it, one of nanoGPT neither. Tables
(Parquet, Arrow, saved `datasets`) hold token ids where the column is one of lists of integers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.base.text import parse_json_object
from utils.corpus.file_kinds import (
    ARROW_SUFFIX,
    BIN_SUFFIX,
    COMPRESSION_SUFFIXES,
    DATATROVE_SUFFIX,
    NPY_SUFFIX,
    PARQUET_SUFFIXES,
    TOKEN_SUFFIXES,
    kind_of,
    read_errors,
)
from utils.corpus.token_files.flat import LLMC_HEADERS
from utils.corpus.token_files.tables import parquet_holds_ids

NPY, FLAT, LLMC, MEGATRON, DATATROVE = "npy", "flat", "llm.c", "Megatron", "datatrove"
PARQUET, ARROW, SAVED, MDS = "Parquet", "Arrow", "saved dataset", "MDS"


def token_kind(path: Path, column: str) -> str | None:
    """Return the format of a file or folder of token ids, None where it is none.

    `column` is that of the ids in tables.

    Raises:
        DataError: It cannot be read.
    """
    if path.is_dir():
        return _folder_kind(path)
    suffix, kind = path.suffix.lower(), kind_of(path)
    if suffix in COMPRESSION_SUFFIXES:
        return FLAT if kind in TOKEN_SUFFIXES else None
    with read_errors(path), path.open("rb") as file:
        magic = file.read(6)
    if magic[:4] in LLMC_HEADERS:
        return LLMC
    if suffix == BIN_SUFFIX:
        return MEGATRON if path.with_suffix(".idx").is_file() else FLAT
    if suffix in PARQUET_SUFFIXES or magic.startswith(b"PAR1"):
        return PARQUET if parquet_holds_ids(path, column) else None
    if magic == b"ARROW1":
        return ARROW
    return {NPY_SUFFIX: NPY, DATATROVE_SUFFIX: DATATROVE, ARROW_SUFFIX: ARROW}.get(suffix)


def _folder_kind(folder: Path) -> str | None:
    if "_data_files" in _read(folder / "state.json") or _read(folder / "dataset_dict.json"):
        return SAVED
    shards = _read(folder / "index.json").get("shards")
    first = shards[0] if isinstance(shards, list) and shards else None
    return MDS if isinstance(first, dict) and first.get("format") == "mds" else None


def _read(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where it is none."""
    try:
        return parse_json_object(path.read_bytes())
    except (OSError, ValueError):
        return {}
