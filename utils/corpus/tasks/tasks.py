"""A corpus prepared in tasks, on as many machines as there are.

    sources, N --> begin: the tokenizer, index.partial.json (what this output is, and N)
               --> task I: part I of the sources --> task-0000I/, a corpus of its own
               --> merge: are all there? --> index.json

Guarantees: the result follows from N and the sources alone. Each document is in exactly one part,
and its split follows from its text, whatever N. A task that is killed goes on where it stopped,
one that is done changes nothing, and the same one twice at once writes the same bytes. There is no
index before all parts are there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from utils.base.errors import DataError, UsageError
from utils.base.progress import OnProgress
from utils.corpus import shard_writer
from utils.corpus.documents import TRAINING, Document, Source
from utils.corpus.output import (
    ShardLog,
    claim_output,
    describe_tokenizer,
    open_output,
    read_described_tokenizer,
    task_folder,
)
from utils.corpus.prepare import (
    PREPARATION_FORMAT,
    CorpusOptions,
    Preparation,
    check_sources,
    find_given_tokenizer,
    prepare_corpus,
    train_tokenizer,
)
from utils.corpus.reading import Reading
from utils.corpus.token_cache import TokenCache
from utils.corpus.tokenization import Tokenizer
from utils.data.shard_index import (
    HEADER_THREADS,
    INDEX_FORMAT,
    INDEX_OBJECT,
    PARTIAL_INDEX_FILE,
    get_json,
)
from utils.storage.bucket import Bucket, ObjectInfo

MOST_TASKS = 100_000
SAMPLE_PLACES = 16
DEFAULT_SAMPLE_BYTES = 10**9
SHOWN_TASKS = 20

TokenCounts = npt.NDArray[np.int64]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskedCorpus:
    """A corpus that `num_tasks` tasks prepare, each from its part of the sources."""

    sources: Sequence[Source]
    validation_sources: Sequence[Source]
    options: CorpusOptions
    num_tasks: int
    sample_bytes: int = DEFAULT_SAMPLE_BYTES
    """Text that a tokenizer is trained on: documents from 16 places of the sources in turn."""

    def __post_init__(self) -> None:
        """Refuse what a task cannot know."""
        if not 1 <= self.num_tasks <= MOST_TASKS:
            raise UsageError(f"--tasks must be from 1 to {MOST_TASKS:,}, got {self.num_tasks}.")
        if self.sample_bytes < 1:
            raise UsageError(f"--tokenizer-sample must be at least 1, got {self.sample_bytes}.")
        for name in ("deduplicate", "validation_tail"):
            if getattr(self.options, name):
                option = "--dedup" if name == "deduplicate" else "--validation-tail"
                raise UsageError(
                    f"{option} needs all documents, and a task sees its own. Leave it out with "
                    "--tasks; docs/DATA.md shows how repeats are found on many machines."
                )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what all tasks must agree on: number, options, and the sizes of the sources."""
        both = (self.sources, self.validation_sources)
        outlines = [[source.outline() for source in sources] for sources in both]
        options = self.options.fingerprint()
        content = [PREPARATION_FORMAT, self.num_tasks, self.sample_bytes, outlines, options]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def begin(self, bucket: Bucket, may_train: bool, overwrite: bool = False) -> Tokenizer:
        """Mark the output as this corpus, and return its tokenizer; again, it changes nothing.

        Raises:
            DataError: A source cannot be read, or has no text to train a tokenizer with.
            UsageError: The output holds other data, the tokenizer cannot be used, or it is to be
                trained first.
        """
        is_tokenized = check_sources([*self.sources, *self.validation_sources], self.options)
        for name in (INDEX_OBJECT, PARTIAL_INDEX_FILE):
            found = shard_writer.get_old_json(bucket, name, overwrite)
            if found and found.get("source_fingerprint") == self.fingerprint:
                tokenizer = read_described_tokenizer(bucket, found)
                if tokenizer is not None:
                    return tokenizer
        index = shard_writer.get_old_json(bucket, INDEX_OBJECT, overwrite)
        how = "--overwrite" if may_train else "--task tokenizer --overwrite, once,"
        _, stale = claim_output(bucket, index, self.fingerprint, overwrite, how)
        tokenizer = find_given_tokenizer((), self.options, is_tokenized, None)
        if tokenizer is None and not may_train:
            raise UsageError(
                f"{bucket.uri} has no tokenizer yet. Make it first, once: the same command with "
                "--task tokenizer."
            )
        if tokenizer is None:
            tokenizer = train_tokenizer(self._sample(), self.options)
            # Training takes minutes: look again at what is replaced.
            _, stale = claim_output(bucket, index, self.fingerprint, overwrite)
        ShardLog(bucket, self.fingerprint, tokenizer, self.num_tasks).begin(stale)
        return tokenizer

    def prepare(
        self,
        bucket: Bucket,
        number: int,
        on_progress: OnProgress | None = None,
        *,
        overwrite: bool = False,
        token_cache: TokenCache | None = None,
    ) -> Preparation:
        """Make sure that the part of one task is there; `overwrite` replaces that part alone.

        Raises:
            DataError: A source cannot be read.
            UsageError: There is no such task, or as `begin`.
        """
        if not 0 <= number < self.num_tasks:
            raise UsageError(f"--task must be from 0 to {self.num_tasks - 1}, got {number}.")
        options = dataclasses.replace(
            self.options,
            tokenizer=self.begin(bucket, may_train=False),
            vocab_size=None,
            special_tokens=(),
            part_of=self.fingerprint,
        )
        with closing(open_output(f"{bucket.uri}/{task_folder(number)}")) as folder:
            return prepare_corpus(
                self._parts(self.sources, number, self.num_tasks),
                folder,
                options,
                overwrite,
                on_progress,
                validation_sources=self._parts(self.validation_sources, number, self.num_tasks),
                token_cache=token_cache,
            )

    @staticmethod
    def _parts(sources: Sequence[Source], number: int, count: int) -> list[Source]:
        return [source.part(number, count) for source in sources]

    def _sample(self) -> Iterator[Document]:
        """Yield documents from even places of the sources in turn, up to the sample's size."""
        streams = [
            Reading(
                self._parts(self.sources, place, SAMPLE_PLACES),
                validation_fraction=self.options.validation_fraction,
                skip_null=self.options.skip_null,
                is_part=True,
            ).documents("")
            for place in range(SAMPLE_PLACES)
        ]
        num_bytes = 0
        while streams:
            for stream in list(streams):
                document = next(stream, None)
                if document is None:
                    streams.remove(stream)
                elif document.split == TRAINING:
                    yield document
                    num_bytes += len(str(document.content).encode())
                    if num_bytes >= self.sample_bytes:
                        return
        if not num_bytes:
            raise DataError("The sources hold no text at all to train a tokenizer with.")


def merge_tasks(bucket: Bucket) -> Preparation:
    """Write the index of all parts; nothing is moved.

    Raises:
        DataError: A part or the tokenizer is missing or not whole.
        UsageError: The output was not prepared in tasks.
    """
    old = get_json(bucket, INDEX_OBJECT)
    whole = get_json(bucket, PARTIAL_INDEX_FILE) or old
    if not whole or "tasks" not in whole:
        raise UsageError(f"{bucket.uri} holds no data that was prepared with --tasks.")
    tokenizer = read_described_tokenizer(bucket, whole)
    if tokenizer is None:
        raise DataError(
            f"{bucket.uri}: the tokenizer is missing or damaged. Run the command again with "
            "--task tokenizer."
        )
    shards, counts, summary = _add_parts(bucket, whole, tokenizer.vocab_size)
    if not summary["tokens"]:
        raise DataError(f"{bucket.uri}: the sources of all tasks hold no text at all.")
    index = {
        "format": INDEX_FORMAT,
        "source_fingerprint": whole["source_fingerprint"],
        "tasks": whole["tasks"],
        **describe_tokenizer(tokenizer),
        "shards": shards,
        "summary": {**summary, "unigram_entropy_nats": shard_writer.unigram_entropy(counts)},
    }
    if index != old:
        shard_writer.put_json(bucket, INDEX_OBJECT, index)
    bucket.delete(PARTIAL_INDEX_FILE)
    return Preparation(index, is_new=index != old)


def _add_parts(
    bucket: Bucket, whole: dict[str, Any], vocab_size: int
) -> tuple[list[dict[str, Any]], TokenCounts, Counter[str]]:
    """Return the shards of all parts in their order, how often each token is there, and the sums.

    Parts are added up as they come: their counts of tokens together would be gigabytes.
    """
    stored = {info.name: info for info in bucket.list("task-")}
    fingerprint, count = whole["source_fingerprint"], whole["tasks"]

    def read(number: int) -> dict[str, Any] | None:
        return _read_part(bucket, task_folder(number), fingerprint, stored)

    shards: list[dict[str, Any]] = []
    counts, summary, missing = np.zeros(vocab_size, np.int64), Counter[str](), []
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        for number, part in enumerate(pool.map(read, range(count))):
            if part is None:
                missing.append(str(number))
            else:
                shards += part["shards"]
                counts += part["token_counts"]
                summary.update(part["summary"])
    del summary["unigram_entropy_nats"]
    if missing:
        names = ", ".join(missing[:SHOWN_TASKS]) + ", ..." * (len(missing) > SHOWN_TASKS)
        raise DataError(
            f"{bucket.uri}: {len(missing)} of {count} tasks are not done: {names}. index.json was "
            "not written. Run those again (--task I), then merge."
        )
    return shards, counts, summary


def _read_part(
    bucket: Bucket, folder: str, fingerprint: str, stored: dict[str, ObjectInfo]
) -> dict[str, Any] | None:
    """Return the index of a finished part, its shards named as seen from here; None without one.

    Sizes are compared, and checksums as far as the bucket knows them: each shard was verified when
    it was written.
    """
    name = f"{folder}/{INDEX_OBJECT}"
    index = get_json(bucket, name) if name in stored else None
    if not index or not str(index.get("source_fingerprint")).startswith(f"{fingerprint} "):
        return None
    shards = [{**shard, "name": f"{folder}/{shard['name']}"} for shard in index["shards"]]
    for shard in shards:
        found = stored.get(shard["name"])
        if (
            found is None
            or found.size != shard["size"]
            or found.crc32c not in (None, shard["crc32c"])
        ):
            _logger.warning("%s/%s is missing or damaged.", bucket.uri, shard["name"])
            return None
    # As an array: the lists of all parts together would be gigabytes.
    return {**index, "shards": shards, "token_counts": np.array(index["token_counts"], np.int64)}
