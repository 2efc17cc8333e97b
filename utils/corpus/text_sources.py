"""Where text comes from: one class a kind of source, each a stream of documents.

    Python's own documentation --.
    text, JSONL, Parquet files --+--> documents() --> corpus
    Hugging Face dataset --------'          (flat token files: utils/corpus/token_files/)

A `Source` can be read any number of times and yields the same documents in the same order each
time. Its `fingerprint` changes when its content does, and is much cheaper than reading the
documents. Text is kept byte for byte: no newline translation, no stripping; a leading UTF-8 byte
order mark is dropped. A text file of more than 1 MiB comes in parts (`OpenText`), so that memory
does not grow with it. For text that is null or missing there is a `NullText`; what else cannot be
read is a `DataError` that names the file and the place.
"""

from __future__ import annotations

import ast
import codecs
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from utils.base.errors import DataError, first_line
from utils.base.files import walk_folders
from utils.base.text import parse_json
from utils.corpus.documents import Content, NullText, OpenText
from utils.corpus.file_kinds import (
    DEFAULT_COLUMN,
    JSONL_SUFFIXES,
    NAMED_KINDS,
    ONE_JSON_VALUE,
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    ByteSpan,
    FileWindow,
    content_kind,
    cut_files,
    file_sizes,
    find_after,
    kind_of,
    list_names,
    open_text,
    read_errors,
    split_lines,
)
from utils.corpus.token_files.tables import table_errors

LINE_ENDS = b"\r\n"
MAX_JSON_BYTES = 2**30
TEXT_PART_BYTES = 2**20
CUT_SEARCH_BYTES = 2**16
PARQUET_BATCH_ROWS = 256
_CHOOSE = "Choose one with --text-column, or for one input with PATH::COLUMN."
RECORD_SUFFIXES = (*JSONL_SUFFIXES, *PARQUET_SUFFIXES)
# What `save_to_disk` of a Dataset and of a DatasetDict writes.
SAVED_FILES = ("state.json", "dataset_dict.json")

log = logging.getLogger(__name__)

SAMPLE_SEED = 20240229
SAMPLE_MIN_CHARACTERS = 200
SAMPLE_MIN_DOCUMENTS = 500
SAMPLE_SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "turtledemo"]
    + ["ensurepip", "__pycache__"]
)


class Source(Protocol):
    """A repeatable stream of documents."""

    @property
    def holds_tokens(self) -> bool:
        """Whether the documents are token ids already."""

    def documents(self) -> Iterator[Content]:
        """Yield the documents, always in the same order."""

    def fingerprint(self) -> str:
        """Return a hash that changes when the documents do."""

    def uses(self, option: str) -> bool:
        """Tell whether an option of prepare_data.py changes how something here is read."""

    def part(self, number: int, count: int) -> Source:
        """Return one of `count` parts, from 0; each document is in exactly one of them."""

    def outline(self) -> list[Any]:
        """Return what decides how parts are cut, such as sizes; cheap, and fit for JSON."""


@dataclass(frozen=True)
class SampleSource:
    """Real English text that every Python carries: its help topics and long docstrings.

    About 2,300 documents and 1.7 MB, in an order shuffled with a fixed seed so that every shard
    gets a bit of everything. Modules are parsed, never imported.
    """

    stdlib: Path = Path(sysconfig.get_path("stdlib"))
    """Folder of the library's sources."""

    share: tuple[int, int] = (0, 1)
    """Which part it is, from 0, and of how many."""

    holds_tokens = False

    def documents(self) -> Iterator[str]:
        """Yield the sample documents.

        Raises:
            DataError: There are no library sources with docstrings.
        """
        number, count = self.share
        yield from _collect_sample(self.stdlib)[number::count]

    def part(self, number: int, count: int) -> SampleSource:
        """As `Source` says."""
        return dataclasses.replace(self, share=(number, count))

    def outline(self) -> list[Any]:
        """As `Source` says."""
        return [self.fingerprint()]

    def fingerprint(self) -> str:
        """Return a hash over the library's source files."""
        files = [*_modules(self.stdlib), self.stdlib / "pydoc_data" / "topics.py"]
        return _hash_files("sample", [path for path in files if path.is_file()])

    def uses(self, option: str) -> bool:
        """As `Source` says."""
        return option == "token_cache"


@functools.cache
def _collect_sample(stdlib: Path) -> list[str]:
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    documents += [text for path in _modules(stdlib) for text in _long_docstrings(path)]
    if len(documents) < SAMPLE_MIN_DOCUMENTS:
        raise DataError(
            f"{stdlib} has only {len(documents)} sample documents, at least "
            f"{SAMPLE_MIN_DOCUMENTS} are needed: this Python was installed without its library "
            "sources. Use another Python, or your own text with --input."
        )
    random.Random(SAMPLE_SEED).shuffle(documents)  # noqa: S311 - not a secret
    return documents


def _modules(stdlib: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(stdlib):
        folders[:] = [
            name
            for name in folders
            if name not in SAMPLE_SKIPPED_FOLDERS and not name.startswith("config-")
        ]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(stdlib).parts)


def _long_docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings(action="ignore"):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            # A module for another Python, or a template: the sample does without it.
            return
    for node in _definitions(tree):
        text = ast.get_docstring(node) or ""
        if len(text) >= SAMPLE_MIN_CHARACTERS:
            yield text


def _definitions(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    # Statements only: ast.walk would visit every expression too, for twice the time.
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            nodes += getattr(node, block, ())


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
                yield from _parquet_documents(path, column, span)
            elif kind in JSONL_SUFFIXES:
                whole = _json_records(path, None) if span else ()
                yield from _texts_of_records(_json_records(path, span), column, path, whole)
            elif self.document_separator:
                yield from _separated_documents(path, self.document_separator.encode(), span)
            elif self.document_per == "line":
                for line, place in _lines(path, span):
                    yield _decode(line.rstrip(LINE_ENDS), place)
            else:
                yield from _whole_document(path)

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
            return next((start for start in _row_groups(path) if start >= at), ends)
        if kind in JSONL_SUFFIXES or (self.document_per == "line" and not self.document_separator):
            return find_after(path, at, b"\n")
        separator = self.document_separator.encode()
        return find_after(path, at, separator) if separator else None

    def fingerprint(self) -> str:
        """Return a hash over the bytes of the files and how they are read."""
        options = [self.document_per or "file", self.text_column, *map(self._kind, self.paths)]
        if self.document_separator:
            options.append(self.document_separator)
        return _hash_files(json.dumps(options), self.paths, self.spans)

    def uses(self, option: str) -> bool:
        """As `Source` says; a separator is looked for.

        Raises:
            DataError: A file cannot be read.
        """
        is_record = {path: self._kind(path) in RECORD_SUFFIXES for path in self.paths}
        texts = [path for path in self.paths if not is_record[path]]
        if option == "document_separator":
            return any(_holds(path, self.document_separator.encode()) for path in texts)
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


def _whole_document(path: Path) -> Iterator[str]:
    with open_text(path) as file:
        data = file.read(TEXT_PART_BYTES + 1)
        start, encoding = 0, "utf-8-sig"
        while len(data) > TEXT_PART_BYTES:
            cut = _find_cut(data)
            yield OpenText(_decode(data[:cut], path, start, encoding))
            start, encoding = start + cut, "utf-8"
            data = data[cut:] + file.read(TEXT_PART_BYTES + 1 - len(data) + cut)
        yield _decode(data, path, start, encoding)


def _holds(path: Path, separator: bytes) -> bool:
    with open_text(path, separator) as file:
        data = b""
        while block := file.read(TEXT_PART_BYTES):
            data = data[-len(separator) :] + block
            if separator in data:
                return True
    return False


def _separated_documents(path: Path, separator: bytes, span: ByteSpan | None) -> Iterator[str]:
    """Yield what stands between separators, without the line ends around it; nothing is empty."""
    start, data, is_open = span[0] if span else 0, b"", False
    with open_text(path, separator, span) as file:
        if not start and file.peek().startswith(codecs.BOM_UTF8):
            start = len(file.read(len(codecs.BOM_UTF8)))
        while block := file.read(TEXT_PART_BYTES):
            *whole, data = (data + block).split(separator)
            for document in whole:
                yield from _piece(document, path, start, is_open=is_open)
                start, is_open = start + len(document) + len(separator), False
            while len(data) > TEXT_PART_BYTES + len(separator):
                cut = _find_cut(data[:TEXT_PART_BYTES])
                text = data[:cut] if is_open else data[:cut].lstrip(LINE_ENDS)
                yield OpenText(_decode(text, path, start + cut - len(text)))
                data, start, is_open = data[cut:], start + cut, True
        yield from _piece(data, path, start, is_open=is_open)


def _piece(data: bytes, path: Path, start: int, *, is_open: bool) -> Iterator[str]:
    """Yield a document, or the end of one; `is_open`: it has begun."""
    text = data if is_open else data.lstrip(LINE_ENDS)
    start += len(data) - len(text)
    text = text.rstrip(LINE_ENDS)
    if text or is_open:
        yield _decode(text, path, start)


def _find_cut(data: bytes) -> int:
    """Return where a long text is best cut: where a line begins, else between two characters."""
    first = max(1, len(data) - CUT_SEARCH_BYTES)
    lines = [match.end() for match in re.finditer(rb"(?<=\S)(?:\r?\n|\r)(?=\S)", data[first:])]
    if lines:
        return first + lines[-1]
    cut = len(data) - 1
    while cut > first and data[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    return cut


def _decode(data: bytes, place: object, start: int = 0, encoding: str = "utf-8") -> str:
    if b"\0" in data:
        raise DataError(
            f"{place}: byte {start + data.index(0)} is NUL, which no text has. Where the rest is "
            "right, take it out with tr -d '\\000'."
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as exc:
        raise DataError(
            f"{place}: byte {start + exc.start} is not UTF-8 ({exc.reason}). Convert text of "
            "another encoding, for example with iconv -f WINDOWS-1252 -t UTF-8."
        ) from exc


def _lines(path: Path, span: ByteSpan | None) -> Iterator[tuple[bytes, str]]:
    """Yield lines, each with its place; a byte order mark before the first is left out."""
    begin = span[0] if span else 0
    head = f"{path}, after byte {begin}, line " if begin else f"{path}:"
    with open_text(path, span=span) as file:
        for number, line in enumerate(file if begin else split_lines(file), start=1):
            is_first = number == 1 and not begin
            yield line.removeprefix(codecs.BOM_UTF8) if is_first else line, f"{head}{number}"


def _json_records(path: Path, span: ByteSpan | None) -> Iterator[tuple[Any, str]]:
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
    for line, place in _lines(path, span):
        if line.strip():
            yield _parse(line, place), place


def _parse(data: bytes, place: object) -> Any:
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError as exc:
        raise DataError(
            f"{place}: not JSON ({exc}). One JSON object a line is needed, or one array of them."
        ) from exc


def _texts_of_records(
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


def _row_groups(path: Path) -> list[int]:
    """Return the byte at which each row group of a Parquet file begins."""
    import pyarrow.parquet

    with table_errors(path, "Parquet file"):
        metadata = pyarrow.parquet.read_metadata(path)
        firsts = [metadata.row_group(n).column(0) for n in range(metadata.num_row_groups)]
    return [one.dictionary_page_offset or one.data_page_offset for one in firsts]


def _parquet_documents(path: Path, column: str, span: ByteSpan | None) -> Iterator[str]:
    import pyarrow.parquet

    groups, skipped = None, 0
    if span is not None:
        starts = _row_groups(path)
        groups = [number for number, start in enumerate(starts) if span[0] <= start < span[1]]
    with table_errors(path, "Parquet file"), pyarrow.parquet.ParquetFile(path) as file:
        _require_column(column, file.schema_arrow.names, path)
        for number in range(groups[0] if groups else 0):
            skipped += file.metadata.row_group(number).num_rows
        batches = file.iter_batches(PARQUET_BATCH_ROWS, groups, columns=[column])
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from _texts_of_records(_numbered(rows, path, skipped), column, path)


def _numbered(rows: Iterable[Any], source: object, skipped: int = 0) -> Iterator[tuple[Any, str]]:
    return ((row, f"{source}, row {number}") for number, row in enumerate(rows, start=skipped + 1))


def _require_column(column: str, columns: Iterable[str], place: object) -> None:
    if column not in columns:
        raise DataError(f"{place}: {_no_column(column, columns)}")


def _no_column(column: str, columns: Iterable[str]) -> str:
    return f"no column {column!r}. Columns: {', '.join(columns) or 'none'}. {_CHOOSE}"


def _hash_files(label: str, paths: Iterable[Path], spans: Iterable[ByteSpan] = ()) -> str:
    digest = hashlib.sha256(label.encode())
    for path, span in itertools.zip_longest(paths, spans):
        with read_errors(path), path.open("rb", buffering=0) as file:
            content = FileWindow(file, span) if span else file
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class HubSource:
    """A text column of a Hugging Face dataset, by name or local directory."""

    name: str
    """Name on the hub (`HuggingFaceFW/fineweb-edu`) or a local directory."""

    split: str = "train"
    """Split or slice of it, as `datasets` writes them (`train[:1%]`)."""

    configuration: str | None = None
    """Named subset of the dataset."""

    text_column: str = DEFAULT_COLUMN
    """Column of the text."""

    streaming: bool = False
    """Read over the network as needed; for what does not fit the disk."""

    share: tuple[int, int] = (0, 1)
    """Which part it is, from 0, and of how many."""

    holds_tokens = False

    def documents(self) -> Iterator[str]:
        """Yield the documents of the split.

        Raises:
            DataError: The dataset, split or column cannot be read.
        """
        from datasets.distributed import split_dataset_by_node

        rows = self._open()
        if self.share[0] >= getattr(rows, "num_rows", math.inf):  # `datasets` makes no empty part
            return
        rows = split_dataset_by_node(rows, *self.share)
        if rows.column_names is not None:  # a stream may not know them
            _require_column(self.text_column, rows.column_names, self._place)
            rows = rows.select_columns([self.text_column])
        place = self._place
        yield from _texts_of_records(_numbered(rows, place), self.text_column, place)

    def fingerprint(self) -> str:
        """Return a hash of the names, and of a local directory's files.

        A dataset that changes on the hub under its name is not noticed.
        """
        names = [self.name, self.configuration, self.split, self.text_column]
        directory = Path(self.name).expanduser()
        if directory.is_dir():
            names[0] = "directory"
            files = (path / name for path, _, found in walk_folders(directory) for name in found)
            return _hash_files(json.dumps(names), sorted(file for file in files if file.is_file()))
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def uses(self, option: str) -> bool:
        """As `Source` says.

        Raises:
            DataError: The dataset cannot be read.
        """
        if option == "split" and self._is_saved("state.json"):
            return str(self._open().split) == self.split
        if option == "hf_config" and self._is_saved(*SAVED_FILES):
            return False
        return option not in ("document_per", "document_separator", "eos_id", "token_dtype")

    def part(self, number: int, count: int) -> HubSource:
        """As `Source` says: as `datasets` divides them among nodes."""
        return dataclasses.replace(self, share=(number, count))

    def outline(self) -> list[Any]:
        """As `Source` says."""
        directory = Path(self.name).expanduser()
        name = file_sizes([directory]) if directory.is_dir() else self.name
        return [name, self.configuration, self.split, self.text_column]

    def _is_saved(self, *names: str) -> bool:
        directory = Path(self.name).expanduser()
        return any((directory / name).is_file() for name in names)

    @property
    def _place(self) -> str:
        return f"--hf {self.name} --split {self.split}"

    def _open(self) -> Any:
        import datasets

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        try:
            if self._is_saved(*SAVED_FILES):  # memory-mapped, so streaming changes nothing
                saved = datasets.load_from_disk(str(Path(self.name).expanduser()))
                return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
            return datasets.load_dataset(
                self.name, self.configuration, split=self.split, streaming=self.streaming
            )
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as exc:
            raise DataError(f"{self._place}: cannot be loaded ({first_line(exc)}).") from exc
