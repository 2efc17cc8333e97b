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
import hashlib
import itertools
import json
import logging
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
    JSONL_SUFFIXES,
    NAMED_KINDS,
    ONE_JSON_VALUE,
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    content_kind,
    kind_of,
    list_names,
    open_text,
    read_errors,
    split_lines,
)

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


class SampleSource:
    """Real English text that every Python carries: its help topics and long docstrings.

    About 2,300 documents and 1.7 MB, in an order shuffled with a fixed seed so that every shard
    gets a bit of everything. Modules are parsed, never imported.
    """

    holds_tokens = False

    def __init__(self, stdlib: Path | None = None) -> None:
        self._stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
        self._documents: list[str] = []

    def documents(self) -> Iterator[str]:
        """Yield the sample documents.

        Raises:
            DataError: This Python has no help topics, or no library sources with docstrings.
        """
        if not self._documents:
            self._documents = self._collect()
        yield from self._documents

    def _collect(self) -> list[str]:
        topics = _python_topics()
        docstrings = [text for path in self._modules() for text in _long_docstrings(path)]
        documents = topics + docstrings
        if len(documents) < SAMPLE_MIN_DOCUMENTS:
            raise DataError(
                f"{self._stdlib} has only {len(documents)} sample documents, at least "
                f"{SAMPLE_MIN_DOCUMENTS} are needed: this Python was installed without its library "
                "sources. Use another Python, or your own text with --input."
            )
        random.Random(SAMPLE_SEED).shuffle(documents)  # noqa: S311 - not a secret
        return documents

    def fingerprint(self) -> str:
        """Return a hash over the library's source files."""
        files = [*self._modules(), self._stdlib / "pydoc_data" / "topics.py"]
        return _hash_files("sample", [path for path in files if path.is_file()])

    def uses(self, option: str) -> bool:
        """As `Source` says."""
        return option == "token_cache"

    def _modules(self) -> list[Path]:
        found = []
        for folder, folders, files in os.walk(self._stdlib):
            folders[:] = [
                name
                for name in folders
                if name not in SAMPLE_SKIPPED_FOLDERS and not name.startswith("config-")
            ]
            found += [Path(folder, name) for name in files if name.endswith(".py")]
        return sorted(found, key=lambda path: path.relative_to(self._stdlib).parts)


def _python_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as exc:
        raise DataError(
            f"{sys.executable} has no pydoc_data.topics, which the sample text is made of. "
            "Use another Python, or your own text with --input."
        ) from exc
    return [topics[name] for name in sorted(topics)]


def _long_docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
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

    text_column: str = "text"
    """Key of the text in JSONL records and Parquet rows."""

    document_separator: str = ""
    """What stands between the documents of a text file, in place of `document_per`."""

    holds_tokens = False

    def __post_init__(self) -> None:
        """Refuse what is no text before any work; tell what only the content of a file says."""
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
        for path in self.paths:
            kind = self._kind(path)
            if kind in PARQUET_SUFFIXES:
                yield from _parquet_documents(path, self.text_column)
            elif kind in JSONL_SUFFIXES:
                yield from _texts_of_records(_json_records(path), self.text_column, path)
            elif self.document_separator:
                yield from _separated_documents(path, self.document_separator.encode())
            elif self.document_per == "line":
                yield from _line_documents(path)
            else:
                yield from _whole_document(path)

    def fingerprint(self) -> str:
        """Return a hash over the bytes of the files and how they are read."""
        options = [self.document_per or "file", self.text_column, *map(self._kind, self.paths)]
        if self.document_separator:
            options.append(self.document_separator)
        return _hash_files(json.dumps(options), self.paths)

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
            yield OpenText(_decode(data[:cut], encoding, path, start))
            start, encoding = start + cut, "utf-8"
            data = data[cut:] + file.read(TEXT_PART_BYTES + 1 - len(data) + cut)
        yield _decode(data, encoding, path, start)


def _holds(path: Path, separator: bytes) -> bool:
    with open_text(path, separator) as file:
        data = b""
        while block := file.read(TEXT_PART_BYTES):
            data = data[-len(separator) :] + block
            if separator in data:
                return True
    return False


def _separated_documents(path: Path, separator: bytes) -> Iterator[str]:
    """Yield what stands between separators, without the line ends around it; nothing is empty."""
    with open_text(path, separator) as file:
        head = file.read(len(codecs.BOM_UTF8))
        data = head.removeprefix(codecs.BOM_UTF8)
        start, is_open = len(head) - len(data), False
        while block := file.read(TEXT_PART_BYTES):
            *whole, data = (data + block).split(separator)
            for document in whole:
                yield from _piece(document, path, start, is_open=is_open)
                start, is_open = start + len(document) + len(separator), False
            while len(data) > TEXT_PART_BYTES + len(separator):
                cut = _find_cut(data[:TEXT_PART_BYTES])
                text = data[:cut] if is_open else data[:cut].lstrip(LINE_ENDS)
                yield OpenText(_decode(text, "utf-8", path, start + cut - len(text)))
                data, start, is_open = data[cut:], start + cut, True
        yield from _piece(data, path, start, is_open=is_open)


def _piece(data: bytes, path: Path, start: int, *, is_open: bool) -> Iterator[str]:
    """Yield a document, or the end of one; `is_open`: it has begun."""
    text = data if is_open else data.lstrip(LINE_ENDS)
    start += len(data) - len(text)
    text = text.rstrip(LINE_ENDS)
    if text or is_open:
        yield _decode(text, "utf-8", path, start)


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


def _decode(data: bytes, encoding: str, place: object, start: int = 0) -> str:
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


def _line_documents(path: Path) -> Iterator[str]:
    with open_text(path) as file:
        for number, line in enumerate(split_lines(file), start=1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            yield _decode(line.rstrip(LINE_ENDS), encoding, f"{path}:{number}")


def _json_records(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield JSON lines, or the one array or object that the file is, each with its place."""
    with open_text(path) as file:
        if ONE_JSON_VALUE.match(file.peek()):
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
        for number, line in enumerate(split_lines(file), start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield _parse(line, place), place


def _parse(data: bytes, place: object) -> Any:
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError as exc:
        raise DataError(
            f"{place}: not JSON ({exc}). One JSON object a line is needed, or one array of them."
        ) from exc


def _texts_of_records(
    records: Iterable[tuple[Any, str]], column: str, source: object
) -> Iterator[str]:
    """Yield the texts of records with their places; that none has the column, is an error."""
    first, is_found = None, False
    for record, place in records:
        yield _text_of_record(record, column, place)
        first, is_found = first or record, is_found or column in record
    if first and not is_found:
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


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    with read_errors(path):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                _require_column(column, file.schema_arrow.names, path)
                batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=[column])
                rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
                yield from _texts_of_records(_numbered(rows, path), column, path)
        except pyarrow.ArrowException as exc:
            raise DataError(f"{path}: not a readable Parquet file ({exc}).") from exc


def _numbered(rows: Iterable[Any], source: object) -> Iterator[tuple[Any, str]]:
    return ((row, f"{source}, row {number}") for number, row in enumerate(rows, start=1))


def _require_column(column: str, columns: Iterable[str], place: object) -> None:
    if column not in columns:
        raise DataError(f"{place}: {_no_column(column, columns)}")


def _no_column(column: str, columns: Iterable[str]) -> str:
    return f"no column {column!r}. Columns: {', '.join(columns) or 'none'}. {_CHOOSE}"


def _hash_files(label: str, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256(label.encode())
    for path in paths:
        with read_errors(path), path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
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

    text_column: str = "text"
    """Column of the text."""

    streaming: bool = False
    """Read over the network as needed; for what does not fit the disk."""

    holds_tokens = False

    def documents(self) -> Iterator[str]:
        """Yield the documents of the split.

        Raises:
            DataError: The dataset, split or column cannot be read.
        """
        rows = self._open()
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
            if self._is_saved(*SAVED_FILES):
                return self._open_saved(datasets)
            return datasets.load_dataset(
                self.name, self.configuration, split=self.split, streaming=self.streaming
            )
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as exc:
            raise DataError(f"{self._place}: cannot be loaded ({first_line(exc)}).") from exc

    def _open_saved(self, datasets: Any) -> Any:
        """Return what `save_to_disk` wrote; it is memory-mapped, so streaming changes nothing."""
        saved = datasets.load_from_disk(str(Path(self.name).expanduser()))
        return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
