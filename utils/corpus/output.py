"""What a corpus output already holds: this corpus, an interrupted part of it, or something else.

    is_intact              index.json and every file that it lists are there and right
    claim_output           nothing in the way, or an interrupted preparation to go on from
    ShardLog               index.partial.json: ours, and finished so far
    read_described_tokenizer, find_finished_shards       what is left of an interrupted preparation

Guarantees: an output that belongs to other sources or options is changed only when asked to, and
shards that this program did not write are never touched.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from utils.base.errors import UsageError
from utils.base.text import count_of
from utils.base.uri import local_path
from utils.corpus import shard_writer
from utils.corpus.documents import SPLITS
from utils.corpus.shard_writer import FinishedShards, ShardEntry
from utils.corpus.tokenization import Tokenizer
from utils.data.shard_index import (
    INDEX_OBJECT,
    PARTIAL_INDEX_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from utils.storage.bucket import Bucket, crc32c_of_bytes
from utils.storage.open import open_bucket

_TASK_FOLDER = r"task-\d{5}/"
_OWN_SHARD_NAME = re.compile(rf"({_TASK_FOLDER})?({'|'.join(SPLITS)})_\d{{5,}}\.npz")
_TASK_FILE = re.compile(rf"{_TASK_FOLDER}.+")
_logger = logging.getLogger(__name__)


def task_folder(number: int) -> str:
    """Return the folder of an output in which one task writes its part."""
    return f"task-{number:05d}"


def open_output(uri: str, option: str = "--output") -> Bucket:
    """Return the bucket of a URI that is to be written.

    Raises:
        UsageError: It is no bucket, or a file is where a directory is needed.
    """
    bucket = open_bucket(uri)
    directory = local_path(bucket.uri)
    if directory is not None:
        for path in (directory, *directory.parents):
            if path.exists() and not path.is_dir():
                raise UsageError(f"{option} {uri}: {path} is a file; a directory is needed.")
    return bucket


class ShardLog:
    """Keeps the partial index, from which an interrupted preparation goes on."""

    def __init__(
        self, bucket: Bucket, fingerprint: str, tokenizer: Tokenizer, num_tasks: int | None = None
    ) -> None:
        self._bucket = bucket
        self._head = {"source_fingerprint": fingerprint, **describe_tokenizer(tokenizer)}
        if num_tasks is not None:
            self._head["tasks"] = num_tasks
        self._files = tokenizer.files

    def begin(self, stale: Iterable[str]) -> None:
        """Remove what is replaced, mark the output as ours, then put the tokenizer there."""
        # The index goes first: without it nobody takes what is left for a corpus.
        for name in sorted(stale, key=lambda name: name != INDEX_OBJECT):
            self._bucket.delete(name)
        shard_writer.put_json(self._bucket, PARTIAL_INDEX_FILE, {**self._head, "shards": []})
        for name, content in sorted(self._files.items()):
            self._bucket.put_bytes(name, content)

    def record(self, entry: ShardEntry, progress: FinishedShards) -> None:
        """Note a shard that is in the bucket and verified."""
        partial = {
            **self._head,
            "shards": shard_writer.entries_to_json(progress.shards),
            "token_counts": progress.token_counts.tolist(),
        }
        shard_writer.put_json(self._bucket, PARTIAL_INDEX_FILE, partial, indent=None)
        _logger.info(
            "%s: %s of %s, %d bytes, verified.",
            *(entry.name, count_of(entry.tokens, "token")),
            *(count_of(entry.documents, "document"), entry.size),
        )


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what an index says about the tokenizer; `read_described_tokenizer` reads it back."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer_sha256": tokenizer.sha256,
        "tokenizer_files": sorted(tokenizer.files),
        "tokenizer_crc32c": {
            name: crc32c_of_bytes(content) for name, content in tokenizer.files.items()
        },
    }


def is_intact(bucket: Bucket, index: dict[str, Any]) -> bool:
    """Tell whether all files of an index are in the bucket, by size and crc32c."""
    bad = shard_writer.find_bad_shards(bucket, shard_writer.entries_from_json(index))
    if read_described_tokenizer(bucket, index) is None:
        bad.append("the tokenizer")
    if bad:
        _logger.warning(
            "%s holds this corpus, but %s: missing or damaged. Preparing it again.",
            *(bucket.uri, ", ".join(bad)),
        )
    return not bad


def read_described_tokenizer(bucket: Bucket, description: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer that an index describes, or None where it is not whole."""
    files = {}
    for name, checksum in description["tokenizer_crc32c"].items():
        content = bucket.read_bytes(name) if bucket.stat(name) else b""
        if crc32c_of_bytes(content) != checksum:
            return None
        files[name] = content
    return Tokenizer(files, description["vocab_size"], description["eos_token_id"])


Claim = tuple[dict[str, Any] | None, list[str]]
"""Index of an interrupted preparation to go on from; objects to remove before writing."""


def claim_output(
    bucket: Bucket,
    index: dict[str, Any] | None,
    fingerprint: str,
    overwrite: bool,
    how: str = "--overwrite",
) -> Claim:
    """Make sure that writing to the bucket harms nobody; nothing is changed here.

    `how` is what an error says to replace other data with.

    Raises:
        DataError: The partial index is there and cannot be read, and `overwrite` is not set.
        UsageError: The bucket holds other data and `overwrite` is not set, or shards that this
            program did not write.
    """
    if index and index.get("source_fingerprint") == fingerprint:
        return None, [INDEX_OBJECT]
    partial = shard_writer.get_old_json(bucket, PARTIAL_INDEX_FILE, overwrite)
    if partial is None and any(_is_corpus_file(info.name) for info in bucket.list()):
        # Written first, so it is there now if another task has begun with this meanwhile.
        partial = shard_writer.get_old_json(bucket, PARTIAL_INDEX_FILE, overwrite)
    if partial and partial.get("source_fingerprint") == fingerprint:
        return partial, []
    listed = {
        name for content in (index, partial) for name in (content or {}).get("tokenizer_files", ())
    }
    present = [
        info.name for info in bucket.list() if info.name in listed or _is_corpus_file(info.name)
    ]
    shards = [name for name in present if name.endswith(".npz")]
    foreign = [name for name in shards if not _OWN_SHARD_NAME.fullmatch(name)]
    if foreign:
        raise UsageError(
            f"--output {bucket.uri} holds shards that this program did not write "
            f"({foreign[0]}{', ...' if len(foreign) > 1 else ''}). Give another --output."
        )
    if present and not overwrite:
        raise UsageError(
            f"--output {bucket.uri} holds other data ({len(present)} files, {present[0]} ...), "
            "made from other sources or with other options. Nothing was changed. Give another "
            f"--output, or {how} to replace it."
        )
    return None, present


def _is_corpus_file(name: str) -> bool:
    known = (INDEX_OBJECT, PARTIAL_INDEX_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
    is_ours = "/" not in name and (name.endswith(".npz") or name in known)
    return is_ours or _TASK_FILE.fullmatch(name) is not None


def find_finished_shards(bucket: Bucket, partial: dict[str, Any]) -> FinishedShards | None:
    """Return what an interrupted preparation has finished, or None where it is not whole."""
    shards = shard_writer.entries_from_json(partial)
    if not shards or shard_writer.find_bad_shards(bucket, shards):
        return None
    _logger.info("Going on after %s already in %s.", count_of(len(shards), "shard"), bucket.uri)
    return FinishedShards(shards, np.array(partial["token_counts"], np.int64))
