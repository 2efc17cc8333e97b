"""Documents of records: JSON lines, JSON arrays and Parquet rows, each with its place.

For text that is null or missing there is a `NullText`, which says where.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.base.errors import DataError
from utils.base.text import parse_json
from utils.corpus.documents import NullText
from utils.corpus.file_kinds import ONE_JSON_VALUE, ByteSpan, open_text
from utils.corpus.text_sources.plain_text import numbered_lines
from utils.corpus.token_files.tables import open_parquet, table_errors

MAX_JSON_BYTES = 2**30
PARQUET_BATCH_ROWS = 256
_CHOOSE = "Choose one with --text-column, or for one input with PATH::COLUMN."


def json_records(path: Path, span: ByteSpan | None) -> Iterator[tuple[Any, str]]:
    """Yield JSON lines, or the one array or object that the file is, each with its place."""
    with open_text(path, span=span) as file:
        if not (span and span[0]) and ONE_JSON_VALUE.match(file.peek()):
            data = file.read(MAX_JSON_BYTES + 1)
            if len(data) > MAX_JSON_BYTES:
                raise DataError(
                    f"{path}: one JSON value of more than {MAX_JSON_BYTES:,} bytes. Make JSON "
                    "lines of it: jq -c '.[]'."
                )
            value = _parse(data, path)
            for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
                yield record, f"{path}, record {number}"
            return
    for line, place in numbered_lines(path, span):
        if line.strip():
            yield _parse(line, place), place


def _parse(data: bytes, place: object) -> Any:
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError as exc:
        raise DataError(
            f"{place}: not JSON ({exc}). One JSON object a line is needed, or one array of them."
        ) from exc


def texts_of_records(
    records: Iterable[tuple[Any, str]],
    column: str,
    source: object,
    whole: Iterable[tuple[Any, str]] = (),
) -> Iterator[str]:
    """Yield the texts of records with their places; that none has the column, is an error.

    `whole` is read where none has it and the records are a part of it.
    """
    first, is_found = None, False
    for record, place in records:
        yield _text_of_record(record, column, place)
        first = first or record
        is_found = is_found or column in record
    is_in = (isinstance(record, dict) and column in record for record, _ in whole)
    if first and not is_found and not any(is_in):
        raise DataError(f"{source}: {_no_column(column, first)}")


def _text_of_record(record: Any, column: str, place: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{place}: a JSON object is needed, got {type(record).__name__}.")
    text = record.get(column)
    if column not in record:
        return NullText(f"{place}: {_no_column(column, record)}")
    if text is None:
        return NullText(f"{place}: column {column!r} is null, text is needed.")
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(f"{place}: column {column!r} is {kind}, text is needed. {_CHOOSE}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise DataError(f"{place}: the text has half of a surrogate pair: {exc.reason}.") from exc
    return text


def row_groups(path: Path) -> list[int]:
    """Return the byte at which each row group of a Parquet file begins."""
    import pyarrow.parquet

    with table_errors(path, "Parquet file"):
        metadata = pyarrow.parquet.read_metadata(path)
        firsts = [metadata.row_group(n).column(0) for n in range(metadata.num_row_groups)]
    return [one.dictionary_page_offset or one.data_page_offset for one in firsts]


def parquet_documents(path: Path, column: str, span: ByteSpan | None) -> Iterator[str]:
    """Yield a column of the rows of a Parquet file, or of the row groups that begin in a span."""
    groups, skipped = None, 0
    if span is not None:
        starts = row_groups(path)
        groups = [number for number, start in enumerate(starts) if span[0] <= start < span[1]]
    with open_parquet(path) as file:
        require_column(column, file.schema_arrow.names, path)
        for number in range(groups[0] if groups else 0):
            skipped += file.metadata.row_group(number).num_rows
        batches = file.iter_batches(PARQUET_BATCH_ROWS, groups, columns=[column])
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from texts_of_records(numbered_rows(rows, path, skipped), column, path)


def numbered_rows(
    rows: Iterable[Any], source: object, skipped: int = 0
) -> Iterator[tuple[Any, str]]:
    """Yield rows, each with its place in the source."""
    return ((row, f"{source}, row {number}") for number, row in enumerate(rows, start=skipped + 1))


def require_column(column: str, columns: Iterable[str], place: object) -> None:
    """Refuse a source that has no such column."""
    if column not in columns:
        raise DataError(f"{place}: {_no_column(column, columns)}")


def _no_column(column: str, columns: Iterable[str]) -> str:
    return f"no column {column!r}. Columns: {', '.join(columns) or 'none'}. {_CHOOSE}"
