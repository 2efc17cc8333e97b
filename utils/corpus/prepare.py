"""The preparation of a corpus: sources -> tokenizer and NPZ shards in a bucket.

    sources --> documents (not empty, no repeats) --> train | val --> token ids --> shards
                     `--> tokenizer (unless one is given)      `-- token cache  `--> index.json

Guarantees: the same sources and options give a byte-identical output, also when interrupted and
started again; an output that already holds just that is recognized and left alone; one that holds
anything else is never touched unless `overwrite` says so. Documents are streamed: memory holds
one shard of each split and two batches, whatever the size of the corpus (with `deduplicate`
also the hashes of the documents, and a long one while it repeats an earlier one). The token cache
changes nothing but the time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from utils.base.errors import UsageError
from utils.base.progress import OnProgress
from utils.corpus import shard_writer, tokenization
from utils.corpus.documents import SPLITS, TRAINING, VALIDATION, Document, Source, TokenizedDocument
from utils.corpus.output import (
    Claim,
    ShardLog,
    claim_output,
    describe_tokenizer,
    find_finished_shards,
    is_intact,
    read_described_tokenizer,
)
from utils.corpus.reading import Reading
from utils.corpus.shard_writer import FinishedShards, ShardWriter
from utils.corpus.token_cache import TokenCache
from utils.corpus.token_files.source import TokenFileSource
from utils.corpus.tokenization import Tokenizer
from utils.data.shard_index import INDEX_FORMAT, INDEX_OBJECT, PARTIAL_INDEX_FILE
from utils.models.tokenizer import END_OF_TEXT
from utils.storage.bucket import Bucket

DEFAULT_SHARD_TOKENS = 50_000_000
DEFAULT_VALIDATION_FRACTION = 0.05
NUM_EVEN_SHARDS = 5
# Part of every fingerprint: raise it when a change of the code changes what comes out.
PREPARATION_FORMAT = 2

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorpusOptions:
    """What is made of the sources, checked when it is built."""

    vocab_size: int | None = None
    """Train a byte-level BPE with this many tokens; exclusive with `tokenizer`. Where the sources
    hold token ids only, nothing is trained and every id must be below."""

    tokenizer: str | Tokenizer | None = None
    """Existing tokenizer: directory, tokenizer.json, hub name, SentencePiece model, tiktoken; or
    one that was read already."""

    special_tokens: tuple[str, ...] = ()
    """Special tokens of a trained tokenizer besides `<|endoftext|>`."""

    eos_token_id: int | None = None
    """Id that ends the documents of token files, where no tokenizer says one."""

    validation_fraction: float = DEFAULT_VALIDATION_FRACTION
    """Share of the tokens that is held out, about, from 0 to below 1."""

    validation_tail: float = 0.0
    """Share of the text, at its end, that is held out instead, from 0 to below 1."""

    shard_tokens: int | None = DEFAULT_SHARD_TOKENS
    """Tokens after which a shard is full; None cuts a small corpus into 5 even shards."""

    compress: bool = False
    """Deflate the shards."""

    deduplicate: bool = False
    """Leave out documents that repeat an earlier one exactly."""

    skip_null: bool = False
    """Leave out documents whose text is null or missing; otherwise they are errors."""

    part_of: str | None = None
    """Fingerprint of the corpus of which this is one task's part."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise UsageError("Give one of --vocab-size N (trains one) and --tokenizer NAME.")
        for name in ("validation_fraction", "validation_tail"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} must be at least 0 and below 1, got {share}.")
        if self.validation_tail and self.validation_fraction:
            raise UsageError("Give one of --validation-fraction and --validation-tail.")
        if self.special_tokens and self.tokenizer is not None:
            raise UsageError(
                "--special-token goes with --vocab-size: a given tokenizer stays as is."
            )
        if self.shard_tokens is not None and self.shard_tokens < 1:
            raise UsageError(f"--shard-tokens must be at least 1, got {self.shard_tokens}.")

    def fingerprint(self) -> dict[str, Any]:
        """Return the options that change the output."""
        if isinstance(self.tokenizer, Tokenizer):
            given = self.tokenizer.sha256
        else:
            given = self.tokenizer and tokenization.fingerprint_tokenizer(self.tokenizer)
        return {
            "vocab_size": self.vocab_size,
            "tokenizer": given,
            "validation_fraction": self.validation_fraction,
            "shard_tokens": self.shard_tokens,
            "compress": self.compress,
            "deduplicate": self.deduplicate,
            # Only where they are used, so that what was prepared before they came is recognized.
            **({"special_tokens": self.special_tokens} if self.special_tokens else {}),
            **({"validation_tail": self.validation_tail} if self.validation_tail else {}),
            **({"skip_null": True} if self.skip_null else {}),
            **({} if self.eos_token_id is None else {"eos_token_id": self.eos_token_id}),
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
    *,
    validation_sources: Sequence[Source] = (),
    token_cache: TokenCache | None = None,
) -> Preparation:
    """Make sure that the bucket holds the corpus of these sources, and return its index.

    `sources` are read one after the other, up to three times; shards are put into the bucket as
    they are finished. `validation_sources` are held out, besides the share that the options say.

    Raises:
        DataError: A source cannot be read or has no text, a token id is outside the vocabulary, or
            an index is there and cannot be read.
        UsageError: The tokenizer cannot be used, or the bucket holds other data.
        StorageError: The bucket cannot be read or written.
    """
    is_tokenized = check_sources([*sources, *validation_sources], options)
    contents = [source.fingerprint() for source in sources]
    fingerprint = _fingerprint(contents, [one.fingerprint() for one in validation_sources], options)
    found = _look_at_output(bucket, fingerprint, overwrite)
    if isinstance(found, Preparation):
        return found
    partial, stale = found
    tokenizer, finished = _read_partial(bucket, partial, options)
    tokenizer = tokenizer or find_given_tokenizer(contents, options, is_tokenized, token_cache)
    if tokenizer is not None:
        sources = _with_vocabulary(sources, tokenizer)
        validation_sources = _with_vocabulary(validation_sources, tokenizer)
    reading = Reading(
        sources,
        validation_sources,
        validation_fraction=options.validation_fraction,
        validation_tail=options.validation_tail,
        deduplicate=options.deduplicate,
        skip_null=options.skip_null,
        is_part=options.part_of is not None,
        on_progress=on_progress,
    )
    if tokenizer is None:
        tokenizer = train_tokenizer(reading.documents("Training the tokenizer"), options)
        if token_cache is not None:
            token_cache.put(_training_key(contents, options), _pack(tokenizer))
        # Training takes minutes: another command may have come first with this output.
        found = _look_at_output(bucket, fingerprint, overwrite)
        if isinstance(found, Preparation):
            return found
        _, stale = found
    log = ShardLog(bucket, fingerprint, tokenizer)
    if finished is None:
        log.begin(stale)
    documents = _documents_to_encode(reading, finished)
    tokens = tokenization.encode_documents(tokenizer, documents, token_cache)
    shards = _write_shards(bucket, tokens, tokenizer.vocab_size, options, finished, log)
    index = _build_index(fingerprint, tokenizer, reading, shards)
    if options.part_of is not None:
        index["token_counts"] = shards.token_counts.tolist()
    shard_writer.put_json(bucket, INDEX_OBJECT, index)
    bucket.delete(PARTIAL_INDEX_FILE)
    return Preparation(index, is_new=True)


def _pack(tokenizer: Tokenizer) -> bytes:
    """Return what the token cache keeps of a tokenizer that was trained."""
    files = {name: data.decode() for name, data in tokenizer.files.items()}
    return json.dumps([files, tokenizer.vocab_size, tokenizer.eos_token_id]).encode()


def _look_at_output(bucket: Bucket, fingerprint: str, overwrite: bool) -> Preparation | Claim:
    """Return the corpus where the output holds it whole, else what writing there has to know.

    Raises:
        UsageError: It holds something else.
        DataError: What it says of itself cannot be read.
    """
    index = shard_writer.get_old_json(bucket, INDEX_OBJECT, overwrite)
    if index and index.get("source_fingerprint") == fingerprint and is_intact(bucket, index):
        if bucket.stat(PARTIAL_INDEX_FILE):
            bucket.delete(PARTIAL_INDEX_FILE)
        return Preparation(index, is_new=False)
    return claim_output(bucket, index, fingerprint, overwrite)


def _read_partial(
    bucket: Bucket, partial: dict[str, Any] | None, options: CorpusOptions
) -> tuple[Tokenizer | None, FinishedShards | None]:
    """Return the tokenizer and the shards of an interrupted preparation, None for what is not."""
    tokenizer = read_described_tokenizer(bucket, partial) if partial else None
    # Even shards are cut by the number of all tokens, so those begin again.
    if not partial or tokenizer is None or options.shard_tokens is None:
        return tokenizer, None
    return tokenizer, find_finished_shards(bucket, partial)


def check_sources(sources: Sequence[Source], options: CorpusOptions) -> bool:
    """Tell whether everything is tokenized already.

    Raises:
        UsageError: The options do not fit the kinds of sources.
    """
    kinds = {source.holds_tokens for source in sources}
    if kinds == {True}:
        if options.special_tokens:
            raise UsageError("--special-token needs text to train a tokenizer with.")
        if options.vocab_size is not None and options.vocab_size < 1:
            raise UsageError(f"--vocab-size must be at least 1, got {options.vocab_size}.")
        return True
    if kinds == {True, False} and options.tokenizer is None:
        raise UsageError(
            "Token files and text together need --tokenizer: the one that the ids were made with."
        )
    if options.vocab_size is not None:
        tokenization.check_special_tokens(options.special_tokens, options.vocab_size)
    return False


def _with_vocabulary(sources: Sequence[Source], tokenizer: Tokenizer) -> list[Source]:
    """Return the sources, token files checked against the vocabulary before anything changes."""
    ready: list[Source] = []
    for source in sources:
        if isinstance(source, TokenFileSource):
            if source.eos_token_id is not None and source.eos_token_id >= tokenizer.vocab_size:
                raise UsageError(
                    f"--eos-id {source.eos_token_id} is outside the vocabulary of "
                    f"{tokenizer.vocab_size}."
                )
            source = dataclasses.replace(source, vocab_size=tokenizer.vocab_size)
            source.check()
        ready.append(source)
    return ready


def find_given_tokenizer(
    contents: Sequence[str], options: CorpusOptions, is_tokenized: bool, cache: TokenCache | None
) -> Tokenizer | None:
    """Return the tokenizer, or None where one is to be trained."""
    if isinstance(options.tokenizer, Tokenizer):
        return options.tokenizer
    if options.tokenizer is not None:
        tokenizer = tokenization.resolve_tokenizer(options.tokenizer)
        _logger.info("Tokenizer %s: %d tokens.", options.tokenizer, tokenizer.vocab_size)
        return tokenizer
    assert options.vocab_size is not None
    if is_tokenized:
        return Tokenizer({}, options.vocab_size, options.eos_token_id)
    content = cache.get(_training_key(contents, options)) if cache is not None else None
    if content is None:
        return None
    _logger.info("The tokenizer was trained before on the same text.")
    files, vocab_size, eos_token_id = json.loads(content)
    return Tokenizer(
        {name: text.encode() for name, text in files.items()}, vocab_size, eos_token_id
    )


def _training_key(contents: Sequence[str], options: CorpusOptions) -> str:
    """Return the token cache's key of the tokenizer that is trained on these sources."""
    import tokenizers

    own = options.fingerprint() | {"shard_tokens": None, "compress": None}
    text = json.dumps(
        ["trained tokenizer 2", PREPARATION_FORMAT, tokenizers.__version__, contents, own],
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def train_tokenizer(documents: Iterable[Document], options: CorpusOptions) -> Tokenizer:
    """Return a tokenizer of `vocab_size` tokens, trained on what is not held out.

    Raises:
        DataError: A source cannot be read.
    """
    assert options.vocab_size is not None
    # Held-out text stays unseen: not even the tokenizer learns from it.
    texts = (str(item.content) for item in documents if item.split == TRAINING)
    tokenizer = tokenization.build_tokenizer(texts, options.vocab_size, options.special_tokens)
    _logger.info("Tokenizer trained: %d tokens.", tokenizer.vocab_size)
    if tokenizer.vocab_size < options.vocab_size:
        _logger.warning(
            "The text gives a vocabulary of %d tokens only, not %d. A model for it: "
            "--set model_overrides.vocab_size=%d.",
            *(tokenizer.vocab_size, options.vocab_size, tokenizer.vocab_size),
        )
    return tokenizer


def _write_shards(
    bucket: Bucket,
    tokens: Iterable[TokenizedDocument],
    vocab_size: int,
    options: CorpusOptions,
    finished: FinishedShards | None,
    log: ShardLog,
) -> FinishedShards:
    shard_tokens = options.shard_tokens
    if shard_tokens is None:
        tokens = list(tokens)
        total = sum(len(document.ids) for document in tokens if document.split == TRAINING)
        shard_tokens = max(1, math.ceil(total / NUM_EVEN_SHARDS))
    writer = ShardWriter(bucket, vocab_size, shard_tokens, options.compress, finished, log.record)
    for document in tokens:
        writer.add(document.ids, document.split)
    return writer.finish()


def _documents_to_encode(reading: Reading, finished: FinishedShards | None) -> Iterator[Document]:
    """Yield all documents, those in finished shards as not wanted.

    At the end, warn where they spell the end-of-text token out.
    """
    left = {split: finished.num_documents(split) if finished else 0 for split in SPLITS}
    num_markers = 0
    for document in reading.documents("Tokenizing"):
        if isinstance(document.content, str):
            num_markers += document.content.count(END_OF_TEXT)
        if left[document.split]:
            left[document.split] -= 1
            document = document._replace(is_wanted=False)
        yield document
    if num_markers:
        _logger.warning(
            "The text has %s in it, %d times, as characters like any other. Where it separates the "
            "documents of a text file: --document-separator '%s'.",
            *(END_OF_TEXT, num_markers, END_OF_TEXT),
        )


def _build_index(
    fingerprint: str, tokenizer: Tokenizer, reading: Reading, progress: FinishedShards
) -> dict[str, Any]:
    by_split = {
        split: sum(s.tokens for s in progress.shards if shard_writer.split_of(s.name) == split)
        for split in SPLITS
    }
    return {
        "format": INDEX_FORMAT,
        "source_fingerprint": fingerprint,
        **describe_tokenizer(tokenizer),
        "shards": shard_writer.entries_to_json(progress.shards),
        "summary": {
            "documents": reading.num_documents,
            "documents_left_out": reading.num_left_out,
            "documents_null": reading.num_null,
            "bytes": reading.num_bytes,
            "tokens": sum(by_split.values()),
            "training_tokens": by_split[TRAINING],
            "validation_tokens": by_split[VALIDATION],
            "unigram_entropy_nats": shard_writer.unigram_entropy(progress.token_counts),
        },
    }


def _fingerprint(
    contents: Sequence[str], validation_contents: Sequence[str], options: CorpusOptions
) -> str:
    content: dict[str, Any] = {
        "format": PREPARATION_FORMAT,
        "sources": contents,
        "options": options.fingerprint(),
    }
    if validation_contents:
        content["validation_sources"] = validation_contents
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return own if options.part_of is None else f"{options.part_of} {own}"
