"""What each shard holds, known before any of it is unpacked.

    bucket -> shard index -> sample order

Prepared data brings `index.json`; for shards from elsewhere the same facts are read from the zip
directory and the .npy headers, a few KB a shard. Shards named `val_*.npz` are for validation, the
rest for training, both in the order of their names. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from utils.base.errors import DataError, ObjectNotFoundError, ShardError
from utils.base.text import FOREIGN_ERRORS, parse_json_object
from utils.data.shard_arrays import (
    MASK_KEY,
    find_token_key,
    open_stored_shard,
    read_array_blocks,
    read_array_header,
)
from utils.storage.bucket import Bucket, ObjectInfo, crc32c_of_bytes

INDEX_OBJECT = "index.json"
PARTIAL_INDEX_FILE = "index.partial.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
INDEX_FORMAT = 1
SHARD_SUFFIX = ".npz"
VALIDATION_PREFIX = "val_"
HEADER_THREADS = 16


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardFacts:
    """One shard, known from the index or its headers.

    `tokens` are those that training sees, without those under a zero of the mask. `crc32c` is
    base64, None where neither index nor bucket has one.
    """

    name: str
    tokens: int
    size: int
    crc32c: str | None


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one data URI.

    Shards are sorted by name, those of training limited to `max_files`. `unigram_entropy` of the
    training tokens is in nats, `tokenizer_hash` is SHA-256, `tokenizer_checksums` are base64 crc32c
    as far as the index has them, and `eos_token_id` stands between documents. None: unknown.
    """

    training: tuple[ShardFacts, ...]
    validation: tuple[ShardFacts, ...]
    vocab_size: int | None = None
    unigram_entropy: float | None = None
    tokenizer_files: tuple[str, ...] = ()
    tokenizer_hash: str | None = None
    tokenizer_checksums: Mapping[str, str] = field(default_factory=dict)
    eos_token_id: int | None = None

    @property
    def training_tokens(self) -> int:
        """Tokens of all training shards."""
        return sum(shard.tokens for shard in self.training)


@dataclass(frozen=True)
class DataSource:
    """One source of a run's data.

    `weight` is its share of the samples, in any unit.
    """

    uri: str
    weight: float
    index: ShardIndex


def fingerprint_shards(shards: Sequence[ShardFacts]) -> str:
    """Return the SHA-256 of shards' names, tokens, sizes and checksums."""
    rows = [[s.name, s.tokens, s.size, s.crc32c] for s in shards]
    return hashlib.sha256(json.dumps(rows).encode("utf-8")).hexdigest()


def describe_shard_changes(old: Sequence[ShardFacts], new: Sequence[ShardFacts]) -> str:
    """Return one line that says how two shard lists differ."""
    before, after = {s.name: s for s in old}, {s.name: s for s in new}
    parts = [
        ("missing", sorted(before.keys() - after.keys())),
        ("new", sorted(after.keys() - before.keys())),
        ("changed", sorted(n for n in before.keys() & after.keys() if before[n] != after[n])),
    ]
    return "; ".join(
        f"{len(names)} {word} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for word, names in parts
        if names
    )


def build_shard_index(
    bucket: Bucket,
    max_files: int | None = None,
    *,
    skip_bad_shards: bool = False,
    is_trained: bool = True,
) -> ShardIndex:
    """Return what the shards of a bucket hold.

    Only the first `max_files` training shards by name are used. `skip_bad_shards` leaves out those
    whose headers cannot be read, with a warning. Without `is_trained` there may be no training
    shards.

    Raises:
        DataError: There are no training shards, `index.json` is not usable, or a preparation was
            interrupted before it wrote one.
        ShardError: A shard's headers cannot be read (only where there is no index).
    """
    value = get_json(bucket, INDEX_OBJECT)
    if value is None:
        index = _from_headers(bucket, max_files, skip_bad_shards=skip_bad_shards)
    else:
        index = parse_index(value, bucket)
    if not index.training and is_trained:
        raise DataError(
            f"{bucket.uri} holds no training shards (*.npz that do not begin with val_)."
        )
    return replace(index, training=index.training[:max_files])


def is_validation_shard(name: str) -> bool:
    """Tell whether a shard is held back for validation."""
    return PurePosixPath(name).name.startswith(VALIDATION_PREFIX)


def get_json(bucket: Bucket, name: str) -> dict[str, Any] | None:
    """Return a JSON object of the bucket; None where nothing of that name is there.

    Raises:
        DataError: It is there, and is no JSON object.
        StorageError: The bucket cannot be read.
    """
    try:
        data = bucket.read_bytes(name)
    except ObjectNotFoundError:
        return None
    try:
        return parse_json_object(data)
    except ValueError as exc:
        raise DataError(f"{bucket.uri}/{name} is not usable: {exc}.") from exc


def parse_index(value: Mapping[str, Any], bucket: Bucket) -> ShardIndex:
    """Return what the content of `index.json` says.

    Raises:
        DataError: It is not usable.
    """
    try:
        if value["format"] != INDEX_FORMAT:
            raise ValueError(f"format {value['format']!r}, this version reads {INDEX_FORMAT}")
        shards = sorted(
            (
                ShardFacts(str(s["name"]), int(s["tokens"]), int(s["size"]), s["crc32c"])
                for s in value["shards"]
            ),
            key=lambda shard: shard.name,
        )
        named = value.get("tokenizer_files")
        if named is None:
            named = [info.name for info in bucket.list("") if "/" not in info.name]
        return ShardIndex(
            tuple(s for s in shards if not is_validation_shard(s.name)),
            tuple(s for s in shards if is_validation_shard(s.name)),
            value.get("vocab_size"),
            value.get("summary", {}).get("unigram_entropy_nats"),
            find_tokenizer_files(named),
            value.get("tokenizer_sha256"),
            dict(value.get("tokenizer_crc32c") or {}),
            value.get("eos_token_id"),
        )
    except FOREIGN_ERRORS as exc:
        reason = str(exc) if isinstance(exc, ValueError) else f"{type(exc).__name__} {exc}"
        raise DataError(f"{bucket.uri}/{INDEX_OBJECT} is not usable: {reason}.") from exc


TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    TOKENIZER_FILE,
    "tokenizer.model",
    TOKENIZER_CONFIG_FILE,
    "vocab.json",
)


def find_tokenizer_files(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of some file names that are a tokenizer's, sorted."""
    return tuple(sorted(name for name in names if name in TOKENIZER_FILES))


def recorded_checksums(index: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> base64 crc32c of the files of data, as far as `index.json` has them.

    What another program has written says nothing.
    """
    shards, tokenizer = index.get("shards"), index.get("tokenizer_crc32c")
    found = dict(tokenizer) if isinstance(tokenizer, dict) else {}
    for shard in shards if isinstance(shards, list) else ():
        if isinstance(shard, dict) and isinstance(shard.get("crc32c"), str):
            found[str(shard.get("name"))] = shard["crc32c"]
    return found


def read_tokenizer_files(bucket: Bucket, index: ShardIndex) -> dict[str, bytes]:
    """Return the tokenizer's files that come with data: name -> bytes, as the index recorded them.

    Raises:
        DataError: One is missing, or is not what the index recorded.
    """
    files = read_recorded_files(bucket, index.tokenizer_files, index.tokenizer_checksums)
    if TOKENIZER_FILE in files and index.tokenizer_hash is not None:
        found = hashlib.sha256(files[TOKENIZER_FILE]).hexdigest()
        if found != index.tokenizer_hash:
            raise _damaged(bucket, TOKENIZER_FILE, f"sha256 {found}", index.tokenizer_hash)
    return files


def read_recorded_files(
    bucket: Bucket, names: Iterable[str], checksums: Mapping[str, str]
) -> dict[str, bytes]:
    """Return small files that come with data, as far as `checksums` has them as recorded there.

    Raises:
        DataError: One is missing, or is not what was recorded.
    """
    files = {}
    for name in names:
        try:
            files[name] = bucket.read_bytes(name)
        except ObjectNotFoundError as exc:
            raise DataError(
                f"{bucket.uri}/{name} is missing, although it is recorded there. {_REMEDY}"
            ) from exc
        found = crc32c_of_bytes(files[name])
        if checksums.get(name, found) != found:
            raise _damaged(bucket, name, f"crc32c {found}", checksums[name])
    return files


_REMEDY = "Put back the file that the data were made with, or prepare the data again."


def _damaged(bucket: Bucket, name: str, found: str, said: str) -> DataError:
    return DataError(
        f"{bucket.uri}/{name} is damaged or was replaced: it has {found}, recorded beside it is "
        f"{said}. {_REMEDY}"
    )


def _from_headers(bucket: Bucket, max_files: int | None, *, skip_bad_shards: bool) -> ShardIndex:
    objects = sorted(bucket.list(""), key=lambda info: info.name)
    if any(info.name.endswith(PARTIAL_INDEX_FILE) for info in objects):
        raise DataError(
            f"{bucket.uri} holds a preparation that is not finished. Run the same command again "
            "(after all of --tasks: prepare_data.py merge). To use what is there as it is: "
            f"prepare_data.py index {bucket.uri} --overwrite."
        )
    shards = [info for info in objects if info.name.endswith(SHARD_SUFFIX)]
    training = [info for info in shards if not is_validation_shard(info.name)][:max_files]
    validation = [info for info in shards if is_validation_shard(info.name)]
    log.info("No %s in %s: reading %d headers.", INDEX_OBJECT, bucket.uri, len(shards))

    def read(info: ObjectInfo) -> ShardFacts | None:
        try:
            return read_shard_facts(bucket, info)
        except ShardError as exc:
            if not skip_bad_shards:
                raise
            log.warning("Leaving out a bad shard: %s", exc)
            return None

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        facts = [found for found in pool.map(read, training + validation) if found is not None]
    return ShardIndex(
        tuple(f for f in facts if not is_validation_shard(f.name)),
        tuple(f for f in facts if is_validation_shard(f.name)),
        tokenizer_files=find_tokenizer_files(info.name for info in objects),
    )


def read_shard_facts(bucket: Bucket, info: ObjectInfo) -> ShardFacts:
    """Return a shard's facts from its zip directory and .npy headers.

    Raises:
        ShardError: It is not an NPZ with usable tokens.
    """
    with open_stored_shard(bucket, info) as archive:
        key = find_token_key(archive, info.name)
        shape, _ = read_array_header(archive, key, info.name)
        tokens = math.prod(shape)
        if f"{MASK_KEY}.npy" in archive.namelist():
            blocks = read_array_blocks(archive, MASK_KEY, info.name)
            tokens = sum(int(np.count_nonzero(block)) for block in blocks)
    if tokens == 0:
        raise ShardError(info.name, "it holds no tokens.")
    return ShardFacts(info.name, tokens, info.size, info.crc32c)
