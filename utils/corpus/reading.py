"""The documents of all sources, counted, without repeats, each with its split.

    sources --> not empty, no repeats --> train | val (a share, the tail, or a source) --> corpus

The same sources and options give the same documents in the same splits each time they are read.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction

from utils.base.errors import DataError
from utils.base.progress import OnProgress
from utils.corpus.documents import (
    TRAINING,
    VALIDATION,
    Content,
    Document,
    NullText,
    OpenText,
    Source,
)

REPORT_BYTES = 2**20
BYTES_PER_TOKEN = 4
"""What token ids count for beside text, about."""
HASHED_LENGTH = 2**16
"""Characters or ids: the first part of a long document has so many at least."""
MOST_HELD_OUT = 1.05
LEAST_HELD_OUT = 0.5
"""Of the share that is wanted."""


@dataclass
class Reading:
    """Reads the sources any number of times; the counts are those of the last time.

    All of `validation_sources` is held out, and of `sources` a share of the bytes: all over them,
    or as `validation_tail` at their end. With `is_part` the sources are one part of several: the
    share is held out by a hash of each document, and there may be no documents.
    """

    sources: Sequence[Source]
    validation_sources: Sequence[Source] = ()
    _: KW_ONLY
    validation_fraction: float = 0.0
    validation_tail: float = 0.0
    deduplicate: bool = False
    skip_null: bool = False
    is_part: bool = False
    on_progress: OnProgress | None = None

    def __post_init__(self) -> None:
        """Begin with nothing read."""
        self._size: tuple[int, int] | None = None  # documents and bytes of the sources
        self._total_bytes: int | None = None
        self._restart()

    def documents(self, stage: str) -> Iterator[Document]:
        """Read everything once more, from the start.

        Raises:
            DataError: A source cannot be read, there is nothing in them, or a text is null and
                `skip_null` is not set.
        """
        if self.validation_tail and self._size is None:
            self._size = self._measure()
        self._restart()
        contents = self._contents(self.sources, stage)
        if self._size is not None:
            yield from assign_tail(contents, self.validation_tail, *self._size)
        elif self.is_part:
            yield from assign_by_hash(contents, self.validation_fraction)
        else:
            yield from assign_splits(contents, self.validation_fraction)
        self._require_documents(0, "The sources hold")
        so_far = self.num_documents
        for content in self._contents(self.validation_sources, stage):
            yield Document(content, VALIDATION)
        if self.validation_sources:
            self._require_documents(so_far, "--validation-input holds")
        self._total_bytes = self._done_bytes
        self._report(stage)

    def _measure(self) -> tuple[int, int]:
        self._restart()
        count = total = 0
        for content in self._contents(self.sources, "Measuring"):
            count += 1
            total += _size_of(content)
        return count, total

    def _restart(self) -> None:
        self.num_documents = self.num_bytes = self.num_left_out = self.num_null = 0
        self._done_bytes = self._reported_bytes = 0
        self._seen: set[bytes] = set()

    def _contents(self, sources: Sequence[Source], stage: str) -> Iterator[Content]:
        contents = self._present(sources)
        for content in self._distinct(contents) if self.deduplicate else contents:
            size = _size_of(content)
            self.num_documents += not isinstance(content, OpenText)
            self.num_bytes += size if isinstance(content, str) else 0
            self._done_bytes += size
            if self._done_bytes - self._reported_bytes >= REPORT_BYTES:
                self._report(stage)
            yield content

    def _present(self, sources: Sequence[Source]) -> Iterator[Content]:
        """Leave out what is empty or null; a document in parts is one that ends all the same."""
        begun: OpenText | None = None
        for content in itertools.chain.from_iterable(source.documents() for source in sources):
            if isinstance(content, NullText):
                if not self.skip_null:
                    raise DataError(f"{content} To leave such documents out: --skip-null.")
                self.num_null += 1
                continue
            if not len(content):
                if isinstance(content, OpenText):
                    continue
                if begun is None:
                    self.num_left_out += 1
                    continue
                content = str(begun)
            elif begun is not None:
                yield begun
            begun = content if isinstance(content, OpenText) else None
            if begun is None:
                yield content

    def _distinct(self, contents: Iterable[Content]) -> Iterator[Content]:
        """Leave out documents that repeat an earlier one; their parts wait while they may do so."""
        waiting: list[Content] = []
        digest, is_new = hashlib.blake2b(digest_size=16), False
        for content in contents:
            digest.update(content.encode() if isinstance(content, str) else content.tobytes())
            is_open = isinstance(content, OpenText)
            key = digest.digest() + b"..." * is_open
            is_new = is_new or key not in self._seen
            self._seen.add(key)
            waiting.append(content)
            if is_new:
                yield from waiting
                waiting = []
            if not is_open:
                self.num_left_out += not is_new
                waiting, digest, is_new = [], hashlib.blake2b(digest_size=16), False

    def _report(self, stage: str) -> None:
        self._reported_bytes = self._done_bytes
        if self.on_progress:
            self.on_progress(stage, self._done_bytes, self._total_bytes)

    def _require_documents(self, so_far: int, what: str) -> None:
        if self.num_documents == so_far and not self.is_part:
            why = "every document is empty" + " or null" * self.skip_null
            why += " or a repeat" * self.deduplicate
            raise DataError(f"{what} no text at all: {why}.")


def _size_of(content: Content) -> int:
    return len(content.encode()) if isinstance(content, str) else len(content) * BYTES_PER_TOKEN


def assign_splits(contents: Iterable[Content], validation_fraction: float) -> Iterator[Document]:
    """Yield the documents with their split: held out is what keeps the share of the bytes right.

    Documents wait as long as far too little is held out. Where that is so at the end, the end of
    each that waits is held out instead, cut where a line begins (else at any character), so that a
    single book has a validation set too. The parts of a very long document count one by one.
    """
    waiting: list[Document] = []
    total = held = settled = settled_held = 0
    wanted = 0.0
    for content in contents:
        size = _size_of(content)
        is_due = held < wanted  # without its own size, which would favor long documents
        total += size
        wanted = validation_fraction * total
        is_held = is_due and held + size <= MOST_HELD_OUT * wanted
        held += size * is_held
        waiting.append(Document(content, VALIDATION if is_held else TRAINING))
        if held >= LEAST_HELD_OUT * wanted:
            yield from waiting
            waiting, settled, settled_held = [], total, held
    if waiting:
        share = min(1.0, (wanted - settled_held) / (total - settled))
        fraction = Fraction(share).limit_denominator(10**6)
        for content in _join_parts(document.content for document in waiting):
            yield from _cut_validation(content, fraction)


def assign_by_hash(contents: Iterable[Content], validation_fraction: float) -> Iterator[Document]:
    """Yield the documents with their split, which follows from how each begins alone."""
    limit, split = int(validation_fraction * 2**64), None
    for content in contents:
        if split is None:
            head = content[:HASHED_LENGTH]
            data = head.encode() if isinstance(head, str) else head.tobytes()
            number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
            split = VALIDATION if number < limit else TRAINING
        yield Document(content, split)
        if not isinstance(content, OpenText):
            split = None


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
    contents: Iterable[Content], validation_tail: float, num_documents: int, num_bytes: int
) -> Iterator[Document]:
    """Yield the documents with their split: those that begin in the last share are held out.

    Where no document begins there, the end of the last one is held out, cut where a line begins.

    `validation_tail` is a share of `num_bytes`, those of all `num_documents`.
    """
    fraction = Fraction(validation_tail).limit_denominator(10**6)
    limit = (1 - fraction) * num_bytes
    start, has_validation = 0, False
    for number, content in enumerate(contents, start=1):
        if start >= limit:
            has_validation = True
            yield Document(content, VALIDATION)
        elif number == num_documents and not has_validation:
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
