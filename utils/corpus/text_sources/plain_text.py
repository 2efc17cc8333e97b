"""Documents of text files: the whole file, its lines, or what stands between separators.

Text is kept byte for byte: no newline translation, no stripping; a leading UTF-8 byte order mark is
dropped. A document of more than 1 MiB comes in parts (`OpenText`), so that memory does not grow
with it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from utils.base.errors import DataError
from utils.corpus.documents import OpenText
from utils.corpus.file_kinds import ByteSpan, open_text, split_lines

LINE_ENDS = b"\r\n"
TEXT_PART_BYTES = 2**20
CUT_SEARCH_BYTES = 2**16


def whole_document(path: Path) -> Iterator[str]:
    """Yield a file as one document, in parts where it is long."""
    with open_text(path) as file:
        data = file.read(TEXT_PART_BYTES + 1)
        start, encoding = 0, "utf-8-sig"
        while len(data) > TEXT_PART_BYTES:
            cut = _find_cut(data)
            yield OpenText(decode_text(data[:cut], path, start, encoding))
            start, encoding = start + cut, "utf-8"
            data = data[cut:] + file.read(TEXT_PART_BYTES + 1 - len(data) + cut)
        yield decode_text(data, path, start, encoding)


def holds_separator(path: Path, separator: bytes) -> bool:
    """Tell whether a separator is anywhere in a file."""
    with open_text(path, separator) as file:
        data = b""
        while block := file.read(TEXT_PART_BYTES):
            data = data[-len(separator) :] + block
            if separator in data:
                return True
    return False


def separated_documents(path: Path, separator: bytes, span: ByteSpan | None) -> Iterator[str]:
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
                yield OpenText(decode_text(text, path, start + cut - len(text)))
                data, start, is_open = data[cut:], start + cut, True
        yield from _piece(data, path, start, is_open=is_open)


def _piece(data: bytes, path: Path, start: int, *, is_open: bool) -> Iterator[str]:
    """Yield a document, or the end of one; `is_open`: it has begun."""
    text = data if is_open else data.lstrip(LINE_ENDS)
    start += len(data) - len(text)
    text = text.rstrip(LINE_ENDS)
    if text or is_open:
        yield decode_text(text, path, start)


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


def numbered_lines(path: Path, span: ByteSpan | None) -> Iterator[tuple[bytes, str]]:
    """Yield lines, each with its place; a byte order mark before the first is left out."""
    begin = span[0] if span else 0
    head = f"{path}, after byte {begin}, line " if begin else f"{path}:"
    with open_text(path, span=span) as file:
        for number, line in enumerate(file if begin else split_lines(file), start=1):
            is_first = number == 1 and not begin
            yield line.removeprefix(codecs.BOM_UTF8) if is_first else line, f"{head}{number}"


def decode_text(data: bytes, place: object, start: int = 0, encoding: str = "utf-8") -> str:
    """Return the text of bytes; `start` is where they begin at `place`, for an error.

    Raises:
        DataError: They are no text.
    """
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
