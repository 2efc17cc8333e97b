"""Tables with a column of lists of token ids: Parquet, Arrow, and what `save_to_disk` wrote.

A row is a document. Lists in lists are joined: a row of chunks is one document. The files are read
a batch of rows at a time; Arrow is memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from utils.base.errors import DataError, first_line
from utils.base.text import parse_json_object
from utils.corpus.file_kinds import DEFAULT_COLUMN
from utils.corpus.token_files.flat import Stretch, read_head

# Taken where no column is named and there is none of texts.
ID_COLUMNS = ("input_ids", "tokens", "token_ids", "ids")
BATCH_ROWS = 1024
PARQUET_BUFFER_BYTES = 2**20


def parquet_holds_ids(path: Path, column: str) -> bool:
    """Tell whether a Parquet file has lists of ids in the column.

    Raises:
        DataError: It cannot be read.
    """
    import pyarrow.parquet

    with table_errors(path, "Parquet file"):
        return _find_column(pyarrow.parquet.read_schema(path), column) is not None


def read_parquet(path: Path, column: str, token_dtype: str | None) -> Iterator[Stretch]:
    """Yield the rows of a Parquet file."""
    with open_parquet(path) as file:
        name = _require_ids(path, file.schema_arrow, column)
        yield from _rows(file.iter_batches(BATCH_ROWS, columns=[name]), name, path)


def read_arrow(path: Path, column: str, token_dtype: str | None) -> Iterator[Stretch]:
    """Yield the rows of an Arrow file, or of a stream as `datasets` writes it."""
    import pyarrow.ipc

    with table_errors(path, "Arrow file"), pyarrow.memory_map(str(path)) as file:
        if read_head(path, 6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = batches = pyarrow.ipc.open_stream(file)
        yield from _rows(batches, _require_ids(path, reader.schema, column), path)


def read_saved(folder: Path, column: str, token_dtype: str | None) -> Iterator[Stretch]:
    """Yield the rows of a dataset as `Dataset.save_to_disk` writes it."""
    import datasets

    with table_errors(folder, "dataset"):
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            raise DataError(f"{folder}: holds {', '.join(saved)}. Give one, as {folder}/NAME.")
        table = saved.data.table
        name = _require_ids(folder, table.schema, column)
        yield from _rows(table.select([name]).to_batches(BATCH_ROWS), name, folder)


def saved_files(folder: Path) -> list[Path]:
    """Return the files of a saved dataset, none where its state cannot be read."""
    try:
        state = parse_json_object((folder / "state.json").read_bytes())
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file, a `pyarrow.parquet.ParquetFile`, that is read a little at a time.

    By itself it would keep all row groups, as they lie on the disk, until it is closed.
    """
    import pyarrow.parquet

    how = {"pre_buffer": False, "buffer_size": PARQUET_BUFFER_BYTES}
    with table_errors(path, "Parquet file"), pyarrow.parquet.ParquetFile(path, **how) as file:
        yield file


@contextmanager
def table_errors(path: Path, what: str) -> Iterator[None]:
    """Raise errors of a table that is read as DataErrors; `what` it should be."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as exc:
        raise DataError(f"{path}: not a readable {what} ({first_line(exc)}).") from exc


def _find_column(schema: Any, column: str) -> str | None:
    """Return the name of the column of ids, None where there is none."""
    named = column in schema.names or column != DEFAULT_COLUMN
    names = [column] if named else ID_COLUMNS
    return next((n for n in names if n in schema.names and _holds_ids(schema.field(n).type)), None)


def _require_ids(path: Path, schema: Any, column: str) -> str:
    name = _find_column(schema, column)
    if name is None:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(
            f"{path}: no column of token ids, which are lists of integers. Columns: {columns}. "
            "Choose one with --text-column; text of a saved dataset is read by --hf FOLDER."
        )
    return name


def _holds_ids(type_: Any) -> bool:
    from pyarrow import types

    is_list = False
    while _is_list(type_):
        is_list, type_ = True, type_.value_type
    return is_list and bool(types.is_integer(type_))


def _is_list(type_: Any) -> bool:
    from pyarrow import types

    kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(is_kind(type_) for is_kind in kinds)


def _rows(batches: Iterable[Any], column: str, path: Path) -> Iterator[Stretch]:
    """Yield the lists of each batch, joined, and where each row ends."""
    import pyarrow.compute

    num_rows = 0
    for batch in batches:
        values = batch.column(column)
        ends = np.arange(1, len(values) + 1)
        while True:
            missing = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
            if len(missing):
                row = num_rows + int(np.searchsorted(ends, missing[0], "right")) + 1
                raise DataError(f"{path}, row {row}: column {column!r} is null or has a null.")
            if not _is_list(values.type):
                break
            lengths = pyarrow.compute.list_value_length(values).to_numpy(zero_copy_only=False)
            ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[ends]
            values = values.flatten()
        num_rows += len(ends)
        yield Stretch(values.to_numpy(), ends)
