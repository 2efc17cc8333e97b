"""The documents of all sources, counted, without repeats, each with its split.

    sources --> not empty, no repeats --> train | val (by number, the tail, or a source) --> corpus

The same sources and options give the same documents in the same splits each time they are read.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from utils.base.errors import DataError
from utils.base.progress import OnProgress
from utils.corpus.documents import TRAINING, VALIDATION, Content, Document, OpenText
from utils.corpus.text_sources import Source

REPORT_BYTES = 2**20


class Reading:
    """Reads the sources any number of times; the counts are those of the last time.

    All of `validation_sources` is held out, and of `sources` a share: of the documents, or as
    `validation_tail` of the bytes at their end.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        validation_sources: Sequence[Source] = (),
        *,
        validation_fraction: float = 0.0,
        validation_tail: float = 0.0,
        deduplicate: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._sources = sources
        self._validation_sources = validation_sources
        self._fraction = validation_fraction
        self._tail = validation_tail
        self._deduplicate = deduplicate
        self._on_progress = on_progress
        self._seen: set[bytes] = set()
        self._size: _Size | None = None
        self._done_bytes = self._reported_bytes = 0
        self._total_bytes: int | None = None
        self.num_documents = 0
        self.num_bytes = 0
        self.num_left_out = 0

    def documents(self, stage: str) -> Iterator[Document]:
        """Read everything once more, from the start.

        Raises:
            DataError: A source cannot be read, or there is nothing in them.
        """
        if self._tail and self._size is None:
            self._size = self._measure()
        self._restart()
        contents = self._contents(self._sources, stage)
        if self._size is not None:
            yield from assign_tail(contents, self._tail, self._size)
        else:
            yield from assign_splits(contents, self._fraction)
        self._require_documents(0, "The sources hold")
        so_far = self.num_documents
        for content in self._contents(self._validation_sources, stage):
            yield Document(content, VALIDATION)
        if self._validation_sources:
            self._require_documents(so_far, "--validation-input holds")
        self._total_bytes = self._done_bytes
        self._report(stage)

    def _measure(self) -> _Size:
        self._restart()
        count = total = 0
        for content in self._contents(self._sources, "Measuring"):
            count += 1
            total += _size_of(content)
        return _Size(count, total)

    def _restart(self) -> None:
        self.num_documents = self.num_bytes = self.num_left_out = 0
        self._done_bytes = self._reported_bytes = 0
        self._seen = set()

    def _contents(self, sources: Sequence[Source], stage: str) -> Iterator[Content]:
        for content in itertools.chain.from_iterable(source.documents() for source in sources):
            data = content.encode("utf-8") if isinstance(content, str) else content.tobytes()
            if not data or (self._deduplicate and self._is_repeat(data)):
                self.num_left_out += 1
                continue
            self.num_documents += not isinstance(content, OpenText)
            self.num_bytes += len(data) if isinstance(content, str) else 0
            self._done_bytes += len(data)
            if self._done_bytes - self._reported_bytes >= REPORT_BYTES:
                self._report(stage)
            yield content

    def _report(self, stage: str) -> None:
        self._reported_bytes = self._done_bytes
        if self._on_progress:
            self._on_progress(stage, self._done_bytes, self._total_bytes)

    def _is_repeat(self, data: bytes) -> bool:
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in self._seen:
            return True
        self._seen.add(digest)
        return False

    def _require_documents(self, so_far: int, what: str) -> None:
        if self.num_documents == so_far:
            why = "every document is empty" + (" or a repeat" if self._deduplicate else "")
            raise DataError(f"{what} no text at all: {why}.")


class _Size(NamedTuple):
    num_documents: int
    num_bytes: int


def _size_of(content: Content) -> int:
    return len(content.encode("utf-8")) if isinstance(content, str) else content.nbytes


def assign_splits(contents: Iterable[Content], validation_fraction: float) -> Iterator[Document]:
    """Yield the documents with their split: one in every 1/fraction is held out.

    Where there are fewer documents than that, the end of each is held out instead, cut where a
    line begins (else at any character), so that a single book has a validation set too. The
    parts of a very long document count one by one.
    """
    if not validation_fraction:
        yield from (Document(content, TRAINING) for content in contents)
        return
    fraction = Fraction(validation_fraction).limit_denominator(10**6)
    contents = iter(contents)
    first = list(itertools.islice(contents, math.ceil(1 / fraction)))
    if len(first) < math.ceil(1 / fraction):
        for content in _join_parts(first):
            yield from _cut_validation(content, fraction)
        return
    share, whole = fraction.numerator, fraction.denominator
    for number, content in enumerate(itertools.chain(first, contents)):
        is_validation = (number + 1) * share // whole > number * share // whole
        yield Document(content, VALIDATION if is_validation else TRAINING)


def _join_parts(contents: Iterable[Content]) -> Iterator[Content]:
    parts: list[str] = []
    for content in contents:
        if isinstance(content, OpenText):
            parts.append(content)
        elif parts and isinstance(content, str):
            yield "".join([*parts, content])
            parts = []
        else:
            yield content


def assign_tail(
    contents: Iterable[Content], validation_tail: float, size: _Size
) -> Iterator[Document]:
    """Yield the documents with their split: those that begin in the last share are held out.

    Where no document begins there, the end of the last one is held out, cut where a line begins.

    `validation_tail` is a share of the bytes; `size` is that of all documents.
    """
    fraction = Fraction(validation_tail).limit_denominator(10**6)
    limit = (1 - fraction) * size.num_bytes
    start, has_validation = 0, False
    for number, content in enumerate(contents, start=1):
        if start >= limit:
            has_validation = True
            yield Document(content, VALIDATION)
        elif number == size.num_documents and not has_validation:
            own = _size_of(content)
            yield from _cut_validation(content, Fraction(start + own - limit) / own)
        else:
            yield Document(content, TRAINING)
        start += _size_of(content)


def _cut_validation(content: Content, fraction: Fraction) -> Iterator[Document]:
    cut = math.ceil(len(content) * (1 - fraction))
    if isinstance(content, str):
        lines = (content.rfind(end, cut // 2, cut) + 1 for end in "\n\r")
        cut = next(filter(None, lines), cut)
    head, tail = content[:cut], content[cut:]
    if isinstance(content, OpenText):
        tail = OpenText(tail)
    if len(head):
        yield Document(head, TRAINING)
    if len(tail):
        yield Document(tail, VALIDATION)
