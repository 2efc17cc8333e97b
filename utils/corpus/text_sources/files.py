"""Text, JSONL and Parquet files: which reader yields their documents, and how they are divided."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.corpus.file_kinds import (
    DEFAULT_COLUMN,
    JSONL_SUFFIXES,
    NAMED_KINDS,
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    ByteSpan,
    content_kind,
    cut_files,
    file_sizes,
    find_after,
    hash_files,
    kind_of,
    list_names,
)
from utils.corpus.text_sources.plain_text import (
    LINE_ENDS,
    decode_text,
    holds_separator,
    numbered_lines,
    separated_documents,
    whole_document,
)
from utils.corpus.text_sources.records import (
    json_records,
    parquet_documents,
    row_groups,
    texts_of_records,
)

RECORD_SUFFIXES = (*JSONL_SUFFIXES, *PARQUET_SUFFIXES)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileSource:
    """Text, JSONL and Parquet files, also compressed with gzip or zstd."""

    paths: tuple[Path, ...]
    """Files, read in this order."""

    document_per: str | None = None
    """What a document is in a text file: the whole `file`, or each `line`; None: `file`, but
    records where the content has them."""

    text_column: str = DEFAULT_COLUMN
    """Key of the text in JSONL records and Parquet rows."""

    document_separator: str = ""
    """What stands between the documents of a text file, in place of `document_per`."""

    spans: tuple[ByteSpan, ...] = ()
    """What is read of each file where this is a part of a source; else all."""

    holds_tokens = False

    def __post_init__(self) -> None:
        """Refuse what is no text before any work; tell what only the content of a file says."""
        if self.spans:  # said of the whole source
            return
        guesses: dict[str, list[Path]] = {}
        for path in self.paths:
            name, kind = kind_of(path), self._kind(path)
            if name not in NAMED_KINDS or (name in TEXT_SUFFIXES and kind != name):
                what = "JSON lines" if kind in JSONL_SUFFIXES else "text"
                guesses.setdefault(what, []).append(path)
        for what, paths in guesses.items():
            log.info("Taken for %s by content: %s.", what, list_names(paths))

    def documents(self) -> Iterator[str]:
        """Yield the documents of all files.

        Raises:
            DataError: A file cannot be read, or a record has no such text.
        """
        for path, span in itertools.zip_longest(self.paths, self.spans):
            kind, column = self._kind(path), self.text_column
            if kind in PARQUET_SUFFIXES:
                yield from parquet_documents(path, column, span)
            elif kind in JSONL_SUFFIXES:
                whole = json_records(path, None) if span else ()
                yield from texts_of_records(json_records(path, span), column, path, whole)
            elif self.document_separator:
                yield from separated_documents(path, self.document_separator.encode(), span)
            elif self.document_per == "line":
                for line, place in numbered_lines(path, span):
                    yield decode_text(line.rstrip(LINE_ENDS), place)
            else:
                yield from whole_document(path)

    def part(self, number: int, count: int) -> FileSource:
        """As `Source` says: by bytes, at a line, a separator or a Parquet row group.

        Raises:
            DataError: A file cannot be read.
        """
        paths, spans = cut_files(self.paths, number, count, self._find_next)
        return dataclasses.replace(self, paths=paths, spans=spans)

    def outline(self) -> list[Any]:
        """As `Source` says."""
        how = [self.document_per, self.text_column, self.document_separator]
        return [*how, *file_sizes(self.paths)]

    def _find_next(self, path: Path, at: int) -> int | None:
        kind = self._kind(path)
        if kind in PARQUET_SUFFIXES:
            ends = path.stat().st_size
            return next((start for start in row_groups(path) if start >= at), ends)
        if kind in JSONL_SUFFIXES or (self.document_per == "line" and not self.document_separator):
            return find_after(path, at, b"\n")
        separator = self.document_separator.encode()
        return find_after(path, at, separator) if separator else None

    def fingerprint(self) -> str:
        """Return a hash over the bytes of the files and how they are read."""
        options = [self.document_per or "file", self.text_column, *map(self._kind, self.paths)]
        if self.document_separator:
            options.append(self.document_separator)
        return hash_files(json.dumps(options), self.paths, self.spans)

    def uses(self, option: str) -> bool:
        """As `Source` says; a separator is looked for.

        Raises:
            DataError: A file cannot be read.
        """
        is_record = {path: self._kind(path) in RECORD_SUFFIXES for path in self.paths}
        texts = [path for path in self.paths if not is_record[path]]
        if option == "document_separator":
            return any(holds_separator(path, self.document_separator.encode()) for path in texts)
        found = {
            "document_per": bool(texts),
            "text_column": any(is_record.values()),
            "skip_null": any(is_record.values()),
            "token_cache": True,
        }
        return found.get(option, False)

    def _kind(self, path: Path) -> str:
        kind = kind_of(path)
        is_cut = self.document_separator or self.document_per
        return kind if is_cut and kind in TEXT_SUFFIXES else content_kind(path, self.text_column)
