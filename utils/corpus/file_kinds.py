"""Which files are read, and what each of them is.

    paths, folders, globs --> find_files --> content_kind: text, JSON, Parquet
                                        '--> token files (which: token_files/kinds.py)

The name that the user sees says what a file is, not the one that a link points to; what the name
leaves open the first bytes tell. A file that is no text is refused with what it seems to be and
what to do. Nothing is left out silently.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import itertools
import logging
import mmap
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from utils.base.errors import DataError, UsageError
from utils.base.files import walk_folders
from utils.base.text import count_of, parse_json, printable
from utils.base.uri import require_path

DEFAULT_COLUMN = "text"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIX = ".json"
PARQUET_SUFFIXES = (".parquet",)
NAMED_KINDS = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, JSON_SUFFIX, *PARQUET_SUFFIXES)
TABLE_SUFFIXES = (".csv", ".tsv")
NPY_SUFFIX = ".npy"
BIN_SUFFIX = ".bin"
DATATROVE_SUFFIX = ".ds"
ARROW_SUFFIX = ".arrow"
TOKEN_SUFFIXES = (NPY_SUFFIX, BIN_SUFFIX, DATATROVE_SUFFIX, ARROW_SUFFIX)
# What stands beside token files and is read with them: of Megatron, of datatrove.
INDEX_SUFFIXES = (".idx", ".index", ".metadata")
COMPRESSION_SUFFIXES = (".gz", ".zst")
HEAD_BYTES = 2**20
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
SHOWN_NAMES = 5

# A file that is one JSON value: an array of objects, or an object on several lines.
ONE_JSON_VALUE = re.compile(rb"(?:\xef\xbb\xbf)?\s*(\[\s*\{|\{\s*[\r\n])")
# Magic bytes -> (where they stand, what the file is, what to do).
_SIGNATURES = {
    b"ustar\0": (257, "a tar archive", "Run: tar -xf {}"),
    b"ustar  \0": (257, "a tar archive", "Run: tar -xf {}"),
    b"PK\x03\x04": (0, "a zip archive (.npz, .docx and models are, too)", "Run: unzip {}"),
    b"7z\xbc\xaf\x27\x1c": (0, "a 7z archive", "Run: 7z x {}"),
    b"\xfd7zXZ\0": (0, "compressed by xz", "Run: xz -dk {}"),
    b"1AY&SY": (4, "compressed by bzip2", "Run: bzip2 -dk {}"),
    b"\x1f\x8b\x08": (0, "compressed by gzip", "Run: gzip -dc {} > NEW"),
    b"%PDF-": (0, "a PDF document", "Run: pdftotext {}"),
    b"PAR1": (0, "a Parquet file", "Let its name end in .parquet."),
    b"\x93NUMPY": (0, "a NumPy array", "Let its name end in .npy."),
    b"MMIDIDX\0": (0, "a Megatron index", "Give the .bin beside it."),
    b"LITPKDS": (
        0,
        "a packed file of LitGPT",
        "The ids follow its header of 24 bytes. Run: tail -c +25 {} > NEW.bin",
    ),
    (20240522).to_bytes(4, "little"): (0, "an evaluation file of llm.c", "Leave it out."),
    (20240326).to_bytes(4, "little"): (0, "a model of llm.c", "Leave it out."),
    (20240328).to_bytes(4, "little"): (0, "a tokenizer of llm.c", "Leave it out."),
}
_BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32"}
_BYTE_ORDER_MARKS |= {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

ByteSpan = tuple[int, int]
"""What is read of a file: its first byte, and the one after its last."""
FindNext = Callable[[Path, int], int | None]
"""Where the first document begins at or after a byte of a file; None: the file is never cut."""

log = logging.getLogger(__name__)


def find_files(
    patterns: Iterable[str],
    is_tokens: Callable[[Path, str], bool] = lambda path, column: False,
    option: str = "--input",
    column: str = DEFAULT_COLUMN,
) -> tuple[tuple[Path, str], ...]:
    """Return the files that paths, directories and globs name, and the column of each.

    They come in the order given, each once for a column: that of `PATH::COLUMN`, else `column`.

    Directories are searched below for text, JSON and Parquet files, in sorted order, linked ones
    too; hidden files are left out, all others that are not read are named. A file given by its own
    name or a glob may have any suffix.

    `is_tokens` tells for a path and a column whether token ids are there, which a directory may
    hold as a whole; `option` is what an error names.

    Raises:
        UsageError: A path does not exist, or nothing usable is there.
        DataError: A folder or a file that a link names cannot be read.
    """
    found: dict[tuple[Path, str], Path] = {}
    left_out: list[Path] = []
    for pattern, own in (split_column(pattern, column) for pattern in patterns):
        files: list[Path] = []
        others: list[Path] = []
        with read_errors(f"{option} {pattern}"):
            for path, is_named in _expand(pattern, option, own, is_tokens):
                is_read = is_named or is_tokens(path, own) or _is_usable(path, own)
                (files if is_read else others).append(path)
        if not files:
            but = f" but {list_names(others)}" if others else ""
            raise UsageError(
                f"{option} {pattern}: nothing to read there{but}. Expected files ending in "
                f"{' '.join(NAMED_KINDS)} (also with {' or '.join(COMPRESSION_SUFFIXES)}) or "
                f"{' '.join(TOKEN_SUFFIXES)}."
            )
        for path in files:
            found.setdefault((path.resolve(), own), path)
        left_out += others
    read = {file for file, _ in found}
    left_out = [path for path in left_out if path.resolve() not in read]
    if left_out := [path for path in left_out if not _is_index(path, read)]:
        log.warning(
            "%s: %s not read: %s.", option, count_of(len(left_out), "file"), list_names(left_out)
        )
    items = ((path.absolute(), own) for (_, own), path in found.items())
    return tuple((path, own) for path, own in items if not _is_index(path, read))


def cut_files(
    paths: Sequence[Path], number: int, count: int, find_next: FindNext
) -> tuple[tuple[Path, ...], tuple[ByteSpan, ...]]:
    """Return the files of one of `count` parts of about as many bytes, and what is read of each.

    A document belongs to the part in whose share of the bytes it begins, all of a file that is
    never cut to the one where the file begins.

    Raises:
        DataError: A file cannot be read.
    """
    sizes = file_sizes(paths)
    edges = [sum(sizes) * edge // count for edge in (number, number + 1)]
    found, begin = {}, 0

    def cut(path: Path, at: int, size: int) -> int:
        if 0 < at < size:
            following = find_next(path, at)
            return size if following is None else following
        return min(max(at, 0), size)

    for path, size in zip(paths, sizes, strict=True):
        start, stop = (cut(path, edge - begin, size) for edge in edges)
        begin += size
        if start < stop:
            found[path] = (start, stop)
    return tuple(found), tuple(found.values())


def file_sizes(paths: Iterable[Path]) -> list[int]:
    """Return the bytes of each file, or of all files in a folder.

    Raises:
        DataError: One cannot be read.
    """
    with read_errors("--input"):
        return [
            sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            if path.is_dir()
            else path.stat().st_size
            for path in paths
        ]


class FileWindow(io.RawIOBase):
    """A span of a file as if it were all of it."""

    def __init__(self, file: io.FileIO, span: ByteSpan) -> None:
        self._file, self._left = file, span[1] - file.seek(span[0])

    def readable(self) -> bool:
        """As every reader says."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what is left of the span, at most."""
        count = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        self._left -= count
        return count


def hash_files(label: str, paths: Iterable[Path], spans: Iterable[ByteSpan] = ()) -> str:
    """Return a hash over the content of files, or of one span of each."""
    digest = hashlib.sha256(label.encode())
    for path, span in itertools.zip_longest(paths, spans):
        with read_errors(path), path.open("rb", buffering=0) as file:
            content = FileWindow(file, span) if span else file
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def split_column(name: str, column: str) -> tuple[str, str]:
    """Return the path and the column of `PATH::COLUMN`; `column` is that of a path alone."""
    path, _, own = name.rpartition("::")
    is_whole = not (path and own) or Path(name).expanduser().exists()
    return (name, column) if is_whole else (path, own)


def list_names(paths: Sequence[Path]) -> str:
    """Return the names of files on one line, the first few of many."""
    more = f" and {len(paths) - SHOWN_NAMES} more" if len(paths) > SHOWN_NAMES else ""
    return ", ".join(printable(path) for path in paths[:SHOWN_NAMES]) + more


def _is_index(path: Path, read: set[Path]) -> bool:
    """Tell whether a file is the index of one that is read: `a.idx` of `a.bin`, `b.ds.index`."""
    owner = path.with_suffix(BIN_SUFFIX if path.suffix == ".idx" else "")
    is_beside = path.suffix in INDEX_SUFFIXES and owner.suffix in (BIN_SUFFIX, DATATROVE_SUFFIX)
    return is_beside and owner.resolve() in read


def _is_usable(path: Path, column: str) -> bool:
    kind = kind_of(path)
    return kind in NAMED_KINDS and (kind != JSON_SUFFIX or _holds_records(path, column))


def _expand(
    pattern: str, option: str, column: str, is_tokens: Callable[[Path, str], bool]
) -> Iterator[tuple[Path, bool]]:
    """Yield the files that a pattern names, each with whether it is named itself."""
    path = Path(pattern).expanduser()
    if not pattern or not path.exists():
        require_path(pattern, option)
        if not any(character in pattern for character in "*?["):
            raise UsageError(f"{option} {pattern}: no such file or directory.")
    for match in _matches(Path(path.anchor), path.relative_to(path.anchor).parts):
        if match.is_dir() and not is_tokens(match, column):
            yield from ((file, False) for file in _files_below(match))
        else:
            yield match, True


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield what a glob names below a folder; a name that exists as it is written is no pattern."""
    if not parts:
        yield folder
        return
    part, *rest = parts
    found: Iterable[Path] = ()
    if os.path.lexists(folder / part):
        found = [folder / part]
    elif part == "**" and folder.is_dir():
        found = [below for below, _ in _visible(folder)]
    elif folder.is_dir():
        names = [one.name for one in folder.iterdir() if part[0] == "." or one.name[0] != "."]
        found = [folder / name for name in sorted(names) if fnmatch.fnmatchcase(name, part)]
    for one in found:
        yield from _matches(one, rest)


def _visible(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    def fail(error: OSError) -> None:
        raise error

    for below, folders, files in walk_folders(folder, fail):
        folders[:] = [name for name in folders if name[0] != "."]
        yield below, [name for name in files if name[0] != "."]


def _files_below(folder: Path) -> list[Path]:
    paths = sorted(below / name for below, names in _visible(folder) for name in names)
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path}: it is a link to {path.readlink()}, which is not there.")
    return [path for path in paths if path.is_file()]


def kind_of(path: Path) -> str:
    """Return the suffix that tells the format, in lower case, compression left out."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSION_SUFFIXES else suffix


def content_kind(path: Path, column: str) -> str:
    """Return the suffix that says how a file is read, its own unless it holds JSON records.

    Raises:
        DataError: It cannot be read, or is neither text, JSON nor Parquet.
    """
    kind = kind_of(path)
    if kind in PARQUET_SUFFIXES:
        return kind
    if kind in TABLE_SUFFIXES:
        raise DataError(
            f"{path}: a table is not read as text. Put it into a folder of its own, and give "
            "--hf FOLDER --text-column NAME."
        )
    holds_records = _holds_records(path, column)
    is_json = kind not in JSONL_SUFFIXES and (kind == JSON_SUFFIX or holds_records)
    return JSONL_SUFFIXES[0] if is_json else kind


def _holds_records(path: Path, column: str) -> bool:
    """Tell whether a file begins as JSON lines or an array; one line alone needs the column."""
    with open_text(path) as file:
        if re.match(rb"(\xef\xbb\xbf)?\s*[\[{]", file.peek()) is None:
            return False
        if match := ONE_JSON_VALUE.match(file.peek()):
            return match[1].startswith(b"[")
        lines = (line for line in split_lines(file) if line.strip())
        try:
            records = [parse_json(line) for line in itertools.islice(lines, 2)]
        except ValueError:
            return False
    if not records or not all(isinstance(record, dict) for record in records):
        return False
    return len(records) > 1 or column in records[0]


@contextmanager
def open_text(
    path: Path, separator: bytes = b"", span: ByteSpan | None = None
) -> Iterator[io.BufferedReader]:
    """Open a file of text at its beginning, unpacked; a `separator` may be NUL.

    With a `span` that begins later, that part of a file that is not packed.

    Raises:
        DataError: It cannot be read, then or later, or is no text.
    """
    with read_errors(path), ExitStack() as stack:
        raw: Any = stack.enter_context(path.open("rb", buffering=0))
        packing = packing_of(path, raw.read(4))
        raw.seek(0)
        if packing == ".gz":
            raw = stack.enter_context(gzip.open(raw))
        elif packing == ".zst":
            import pyarrow

            stream = pyarrow.input_stream(str(path), compression="zstd")
            raw = stack.enter_context(closing(stream))
        elif span is not None:
            raw = FileWindow(raw, span)
        file = stack.enter_context(io.BufferedReader(raw, HEAD_BYTES))
        if span is None or not span[0]:
            head = file.peek()
            _require_text(path, head.replace(separator, b"\n") if separator else head)
        yield file


def packing_of(path: Path, head: bytes) -> str | None:
    """Return `.gz` or `.zst` where a file is compressed, told by its name or how it begins."""
    suffix = path.suffix.lower()
    if suffix == ".gz" or head.startswith(GZIP_MAGIC):
        return ".gz"
    return ".zst" if suffix == ".zst" or head.startswith(ZSTD_MAGIC) else None


def find_after(path: Path, at: int, separator: bytes) -> int | None:
    """Return where the first document after a separator begins at or after a byte of a text file.

    None where it is read from its beginning only: compressed, one JSON value, lines that end with
    CR alone, or a separator that can overlap itself.
    """
    with read_errors(path), path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        # Line ends around a document are left out, so that it does not matter which of them cut.
        is_overlapping = separator.strip(b"\r\n") and any(
            separator.startswith(separator[start:]) for start in range(1, len(separator))
        )
        has_lines = separator != b"\n" or b"\n" in head or b"\r" not in head
        is_one = separator == b"\n" and ONE_JSON_VALUE.match(head)
        if packing_of(path, head) or is_one or is_overlapping or not has_lines:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = data.find(separator, max(0, at - len(separator)))
            return len(data) if found < 0 else found + len(separator)


def split_lines(file: io.BufferedReader) -> Iterator[bytes]:
    """Yield the lines, each with its end; where a file has CR and no LF, a CR ends them."""
    head = file.peek()
    if b"\n" in head or b"\r" not in head[:-1]:
        yield from file
        return
    with io.TextIOWrapper(file, "latin-1", newline="\r") as lines:
        for line in lines:
            yield line.encode("latin-1")


@contextmanager
def read_errors(what: object) -> Iterator[None]:
    """Raise errors of a file that is read, or unpacked, as DataErrors; `what` begins them."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(f"{what}: cannot be read ({exc}).") from exc


def require_no_signature(path: Path, head: bytes) -> None:
    """Refuse what begins as a file of a known kind that is neither text nor bare token ids.

    Raises:
        DataError: It says what the file is and what can be done.
    """
    for magic, (start, what, advice) in _SIGNATURES.items():
        if head.startswith(magic, start):
            advice = advice.format(shlex.quote(str(path)))
            raise DataError(f"{path}: this is {what}, and is not read as it is. {advice}")


def _require_text(path: Path, head: bytes) -> None:
    require_no_signature(path, head)
    encoding = _find_encoding(head)
    if encoding is not None:
        unpack = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(path.suffix.lower(), "cat")
        command = f"{unpack} {shlex.quote(str(path))} | iconv -f {encoding} -t UTF-8 > NEW"
        raise DataError(f"{path}: this is {encoding}, UTF-8 is needed. Run: {command}")
    if b"\0" in head:
        raise DataError(
            f"{path}: byte {head.index(0)} is NUL: this is binary data or damaged. Leave it out."
        )


def _find_encoding(head: bytes) -> str | None:
    """Return the name of a Unicode encoding other than UTF-8, None where it is none."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    # In text of Latin letters every other byte is NUL, and no other one.
    nuls = [head[start : start + 2000 : 2].count(0) for start in (0, 1)]
    if min(nuls) or max(nuls) < min(1000, len(head) // 2) / 2 or not max(nuls):
        return None
    return "UTF-16LE" if nuls[1] else "UTF-16BE"
