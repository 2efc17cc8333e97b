"""The preparation of a corpus: text sources -> tokenizer and NPZ shards in a bucket.

    sources --> documents (not empty, no repeats) --> train | val --> token ids --> shards
                     `--> tokenizer (unless one is given)                       `--> index.json

Guarantees: the same sources and options give a byte-identical output, also when interrupted and
started again; an output that already holds just that is recognized and left alone; one that holds
anything else is never touched unless `overwrite` says so. Documents are streamed: memory holds
one shard, whatever the size of the corpus (and the hashes of the documents with `deduplicate`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from utils import shard_writer, tokenization
from utils.corpus_output import (
    ShardLog,
    claim_output,
    describe_tokenizer,
    find_finished_shards,
    is_intact,
    read_tokenizer,
)
from utils.errors import DataError, UsageError
from utils.shard_writer import (
    INDEX_FILE,
    PARTIAL_INDEX_FILE,
    SPLITS,
    TRAINING,
    VALIDATION,
    Progress,
    ShardWriter,
)
from utils.storage import Bucket
from utils.text_sources import Source
from utils.tokenization import Document, TokenizedDocument, Tokenizer

DEFAULT_SHARD_TOKENS = 50_000_000
DEFAULT_VALIDATION_FRACTION = 0.05
NUM_EVEN_SHARDS = 5
# Part of every fingerprint: raise it when a change of the code changes what comes out.
PREPARATION_FORMAT = 1
REPORT_BYTES = 2**20

OnProgress = Callable[[str, int, int | None], None]
"""Called with the stage, the bytes of text done, and the bytes in all where they are known."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorpusOptions:
    """What is made of the sources, checked when it is built."""

    vocab_size: int | None = None
    """Train a byte-level BPE with this many tokens; exclusive with `tokenizer`."""

    tokenizer: str | None = None
    """Directory, tokenizer.json or hub name of an existing tokenizer."""

    validation_fraction: float = DEFAULT_VALIDATION_FRACTION
    """Share of the documents that is held out, from 0 to below 1."""

    shard_tokens: int | None = DEFAULT_SHARD_TOKENS
    """Tokens after which a shard is full; None cuts a small corpus into 5 even shards."""

    compress: bool = False
    """Deflate the shards."""

    deduplicate: bool = False
    """Leave out documents that repeat an earlier one exactly."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise UsageError("Give one of --vocab-size N (trains one) and --tokenizer NAME.")
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(
                "--validation-fraction must be at least 0 and below 1, "
                f"got {self.validation_fraction}."
            )
        if self.shard_tokens is not None and self.shard_tokens < 1:
            raise UsageError(f"--shard-tokens must be at least 1, got {self.shard_tokens}.")

    def fingerprint(self) -> dict[str, Any]:
        """Return the options that change the output."""
        name = self.tokenizer
        return {
            "vocab_size": self.vocab_size,
            "tokenizer": name and tokenization.fingerprint_tokenizer(name),
            "validation_fraction": self.validation_fraction,
            "shard_tokens": self.shard_tokens,
            "compress": self.compress,
            "deduplicate": self.deduplicate,
        }


@dataclass(frozen=True)
class Preparation:
    """A finished corpus."""

    index: dict[str, Any]
    """Content of `index.json`."""

    is_new: bool
    """False where the output already held this corpus."""


def prepare_corpus(
    sources: Sequence[Source],
    bucket: Bucket,
    options: CorpusOptions,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Preparation:
    """Make sure that the bucket holds the corpus of these sources, and return its index.

    Args:
        sources: Read one after the other, up to twice.
        bucket: Output; shards are put there as they are finished.
        options: How to tokenize, split and cut.
        overwrite: Replace another corpus in the bucket.
        on_progress: Told about every MiB of text.

    Raises:
        DataError: A source cannot be read or has no text.
        UsageError: The tokenizer cannot be used, or the bucket holds other data.
        StorageError: The bucket cannot be read or written.
    """
    fingerprint = _fingerprint(sources, options)
    index = shard_writer.read_json(bucket, INDEX_FILE)
    if index and index.get("source_fingerprint") == fingerprint and is_intact(bucket, index):
        if bucket.stat(PARTIAL_INDEX_FILE):
            bucket.delete(PARTIAL_INDEX_FILE)
        return Preparation(index, is_new=False)
    partial, stale = claim_output(bucket, index, fingerprint, overwrite)
    reading = _Reading(sources, options, on_progress)
    tokenizer = partial and read_tokenizer(bucket, partial)
    # Even shards are cut by the number of all tokens, so those begin again.
    finished = None
    if partial and tokenizer and options.shard_tokens is not None:
        finished = find_finished_shards(bucket, partial)
    tokenizer = tokenizer or _make_tokenizer(reading, options)
    log = ShardLog(bucket, fingerprint, tokenizer)
    if finished is None:
        log.begin(stale)
    tokens = _tokenize(reading, tokenizer, finished)
    shard_tokens = options.shard_tokens
    if shard_tokens is None:
        tokens = list(tokens)
        shard_tokens = _even_shard_tokens(tokens)
    writer = ShardWriter(
        bucket, tokenizer.vocab_size, shard_tokens, options.compress, finished, log.record
    )
    for document in tokens:
        writer.add(document.ids, document.split)
    index = _build_index(fingerprint, tokenizer, reading, writer.finish())
    shard_writer.put_json(bucket, INDEX_FILE, index)
    bucket.delete(PARTIAL_INDEX_FILE)
    return Preparation(index, is_new=True)


def assign_splits(texts: Iterable[str], validation_fraction: float) -> Iterator[Document]:
    """Yield the documents with their split: one in every 1/fraction is held out.

    Where there are fewer documents than that, the end of each is held out instead, cut where a
    line begins (else at any character), so that a single book has a validation set too.
    """
    if not validation_fraction:
        yield from (Document(text, TRAINING) for text in texts)
        return
    fraction = Fraction(validation_fraction).limit_denominator(10**6)
    texts = iter(texts)
    first = list(itertools.islice(texts, math.ceil(1 / fraction)))
    if len(first) < math.ceil(1 / fraction):
        for text in first:
            yield from _cut_validation(text, fraction)
        return
    for number, text in enumerate(itertools.chain(first, texts)):
        is_validation = math.floor((number + 1) * fraction) > math.floor(number * fraction)
        yield Document(text, VALIDATION if is_validation else TRAINING)


def _cut_validation(text: str, fraction: Fraction) -> Iterator[Document]:
    target = math.ceil(len(text) * (1 - fraction))
    cut = text.rfind("\n", target // 2, target) + 1 or target
    if text[:cut]:
        yield Document(text[:cut], TRAINING)
    if text[cut:]:
        yield Document(text[cut:], VALIDATION)


class _Reading:
    """The documents of all sources, counted as they go by."""

    def __init__(
        self, sources: Sequence[Source], options: CorpusOptions, on_progress: OnProgress | None
    ) -> None:
        self._sources = sources
        self._options = options
        self._on_progress = on_progress
        self._total_bytes: int | None = None
        self.num_documents = 0
        self.num_bytes = 0
        self.num_left_out = 0

    def documents(self, stage: str) -> Iterator[Document]:
        """Read everything once more, from the start; counts are whole when it has ended."""
        return assign_splits(self._texts(stage), self._options.validation_fraction)

    def _texts(self, stage: str) -> Iterator[str]:
        self.num_documents = self.num_bytes = self.num_left_out = reported = 0
        seen: set[bytes] = set()
        for text in itertools.chain.from_iterable(source.documents() for source in self._sources):
            content = text.encode("utf-8")
            if not text or (self._options.deduplicate and _is_repeat(content, seen)):
                self.num_left_out += 1
                continue
            self.num_documents += 1
            self.num_bytes += len(content)
            if self._on_progress and self.num_bytes - reported >= REPORT_BYTES:
                reported = self.num_bytes
                self._on_progress(stage, reported, self._total_bytes)
            yield text
        if not self.num_documents:
            raise DataError("The sources hold no text at all: every document is empty.")
        self._total_bytes = self.num_bytes
        if self._on_progress:
            self._on_progress(stage, self.num_bytes, self._total_bytes)


def _is_repeat(content: bytes, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if digest in seen:
        return True
    seen.add(digest)
    return False


def _make_tokenizer(reading: _Reading, options: CorpusOptions) -> Tokenizer:
    if options.tokenizer is not None:
        tokenizer = tokenization.load_tokenizer(options.tokenizer)
        _logger.info("Tokenizer %s: %d tokens.", options.tokenizer, tokenizer.vocab_size)
        return tokenizer
    assert options.vocab_size is not None  # noqa: S101 - checked by CorpusOptions
    documents = reading.documents("Training the tokenizer")
    # Held-out text stays unseen: not even the tokenizer learns from it.
    texts = (document.text for document in documents if document.split == TRAINING)
    tokenizer = tokenization.build_tokenizer(texts, options.vocab_size)
    _logger.info("Tokenizer trained: %d tokens.", tokenizer.vocab_size)
    if tokenizer.vocab_size < options.vocab_size:
        _logger.warning(
            "The text gives a vocabulary of %d tokens only, not %d: set vocab_size to that.",
            tokenizer.vocab_size,
            options.vocab_size,
        )
    return tokenizer


def _even_shard_tokens(tokens: Sequence[TokenizedDocument]) -> int:
    total = sum(len(document.ids) for document in tokens if document.split == TRAINING)
    return max(1, math.ceil(total / NUM_EVEN_SHARDS))


def _tokenize(
    reading: _Reading, tokenizer: Tokenizer, finished: Progress | None
) -> Iterable[TokenizedDocument]:
    left = {split: finished.num_documents(split) if finished else 0 for split in SPLITS}

    def unfinished() -> Iterator[Document]:
        for document in reading.documents("Tokenizing"):
            if left[document.split]:
                left[document.split] -= 1
            else:
                yield document

    return tokenization.encode_documents(tokenizer, unfinished())


def _build_index(
    fingerprint: str, tokenizer: Tokenizer, reading: _Reading, progress: Progress
) -> dict[str, Any]:
    by_split = {
        split: sum(s.tokens for s in progress.shards if shard_writer.split_of(s.name) == split)
        for split in SPLITS
    }
    return {
        "format": shard_writer.INDEX_FORMAT,
        "source_fingerprint": fingerprint,
        **describe_tokenizer(tokenizer),
        "shards": shard_writer.entries_to_json(progress.shards),
        "summary": {
            "documents": reading.num_documents,
            "documents_left_out": reading.num_left_out,
            "bytes": reading.num_bytes,
            "tokens": sum(by_split.values()),
            "training_tokens": by_split[TRAINING],
            "validation_tokens": by_split[VALIDATION],
            "unigram_entropy_nats": shard_writer.unigram_entropy(progress.token_counts),
        },
    }


def _fingerprint(sources: Sequence[Source], options: CorpusOptions) -> str:
    content = {
        "format": PREPARATION_FORMAT,
        "sources": [source.fingerprint() for source in sources],
        "options": options.fingerprint(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
