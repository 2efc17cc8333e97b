r"""What is in shards from anywhere: an index made from their headers, and a close look.

    *.npz in a bucket --> build_index_file --> index.json
                      \-> inspect_shards   --> keys, shapes, dtypes, tokens, text, what is bad

Headers are read in parallel by range reads of the zip directory and the .npy headers: some 20 KB
a shard, whatever its size (an `attention_mask` is read whole, because its zeros do not count).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.base.errors import DataError, ShardError, UsageError
from utils.base.text import count_of, parse_json_object
from utils.corpus.output import describe_tokenizer
from utils.corpus.shard_writer import get_old_json, put_json
from utils.corpus.tokenization import Tokenizer
from utils.data.shard_arrays import (
    MASK_KEY,
    find_token_key,
    open_shard,
    open_stored_shard,
    read_array_blocks,
    read_array_header,
)
from utils.data.shard_cache import require_in_vocabulary
from utils.data.shard_index import (
    HEADER_THREADS,
    INDEX_FORMAT,
    INDEX_OBJECT,
    PARTIAL_INDEX_FILE,
    SHARD_SUFFIX,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    find_tokenizer_files,
    get_json,
    is_validation_shard,
    parse_index,
    read_recorded_files,
    read_shard_facts,
    read_tokenizer_files,
    recorded_checksums,
)
from utils.storage.bucket import Bucket, ObjectInfo, crc32c_of_file

SHOWN_SHARDS = 3
SAMPLE_TOKENS = 64
MAX_NAMED = 20


@dataclass(frozen=True)
class ArrayLook:
    """One array of a shard, from its header."""

    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ShardLook:
    """What was seen of one shard."""

    name: str
    size: int
    crc32c: str | None
    tokens: int = 0
    arrays: tuple[ArrayLook, ...] = ()
    problem: str | None = None
    """Why it cannot be used, or None."""


@dataclass(frozen=True)
class Inspection:
    """What was seen of all shards of a URI."""

    uri: str
    has_index: bool
    vocab_size: int | None
    shards: tuple[ShardLook, ...]
    samples: dict[str, str] = field(default_factory=dict)
    """Shard name -> its first tokens as text; empty where there is no tokenizer."""
    tokenizer_problem: str | None = None
    """Why the tokenizer cannot be used, or None."""

    @property
    def bad(self) -> list[ShardLook]:
        """The shards that cannot be used."""
        return [shard for shard in self.shards if shard.problem]


def build_index_file(
    bucket: Bucket, vocab_size: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write `index.json` for shards that came from elsewhere; return its content.

    The checksums are those that the bucket keeps; a directory keeps none. `vocab_size` is for where
    no tokenizer.json says it. `overwrite` replaces an index that `prepare` wrote, which says more.

    Raises:
        DataError: There are no shards, or some are bad; the index that is there cannot be read, or
            says something else of the tokenizer. Nothing is written then.
        UsageError: A prepared corpus is there.
    """
    objects = list(bucket.list())
    names = {info.name for info in objects}
    old = get_old_json(bucket, INDEX_OBJECT, overwrite)
    if not overwrite and (PARTIAL_INDEX_FILE in names or (old and "source_fingerprint" in old)):
        raise UsageError(
            f"{bucket.uri} was made by this program, whose own index says more. Nothing was "
            "changed. --overwrite replaces it."
        )
    infos = [info for info in objects if info.name.endswith(SHARD_SUFFIX)]
    if not infos:
        raise DataError(f"{bucket.uri} holds no shards (*{SHARD_SUFFIX}).")
    looks = _look_at_all(bucket, infos)
    _refuse_bad(bucket, looks)
    index = {
        "format": INDEX_FORMAT,
        **_describe_stored_tokenizer(bucket, names, vocab_size, {} if overwrite else old),
        "shards": [
            {
                "name": look.name,
                "tokens": look.tokens,
                "dtype": look.arrays[0].dtype,
                "size": look.size,
                "crc32c": look.crc32c,
            }
            for look in looks
        ],
        "summary": {
            "tokens": sum(look.tokens for look in looks),
            "training_tokens": sum(n.tokens for n in looks if not is_validation_shard(n.name)),
            "validation_tokens": sum(n.tokens for n in looks if is_validation_shard(n.name)),
        },
    }
    put_json(bucket, INDEX_OBJECT, index)
    return index


def inspect_shards(bucket: Bucket, verify: bool = False, only: str | None = None) -> Inspection:
    """Look at every shard, and at the text of some.

    The first good ones are decoded, where there is a tokenizer. `verify` reads everything:
    checksums, and every token id. `only` is the name of a shard; None for all.

    Raises:
        DataError: There are no shards.
    """
    objects = list(bucket.list())
    names = {info.name for info in objects}
    index = get_json(bucket, INDEX_OBJECT)
    infos = [info for info in objects if info.name.endswith(SHARD_SUFFIX)]
    expected = _expected_entries(index)
    if only is not None:
        infos = [info for info in infos if info.name == only]
        expected = {name: entry for name, entry in expected.items() if name == only}
    if not infos and not expected:
        raise DataError(f"{bucket.uri} holds no shards ({only or f'*{SHARD_SUFFIX}'}).")
    tokenizer, tokenizer_problem = _read_tokenizer(bucket, index, names)
    vocab_size = _vocab_size_of(index, tokenizer)
    looks = _look_at_all(bucket, infos)
    if verify:
        with ThreadPoolExecutor(2) as pool:
            looks = list(pool.map(lambda look: _verify(bucket, look, vocab_size, expected), looks))
    looks = [_compare(look, expected) for look in looks]
    missing = sorted(expected.keys() - names)
    looks += [
        ShardLook(name, 0, None, problem="index.json lists it, but it is gone.") for name in missing
    ]
    good = [look for look in looks if not look.problem][:SHOWN_SHARDS]
    samples = _decode_samples(bucket, infos, good, tokenizer) if tokenizer else {}
    return Inspection(
        bucket.uri, index is not None, vocab_size, tuple(looks), samples, tokenizer_problem
    )


def _read_tokenizer(
    bucket: Bucket, index: dict[str, Any] | None, names: set[str]
) -> tuple[bytes | None, str | None]:
    """Return (tokenizer.json, what is wrong with the tokenizer); None where there is none."""
    files: dict[str, bytes] = {}
    try:
        if index is not None:
            files = read_tokenizer_files(bucket, parse_index(index, bucket))
    except DataError as exc:
        return None, str(exc)
    if TOKENIZER_FILE in names and TOKENIZER_FILE not in files:
        files[TOKENIZER_FILE] = bucket.read_bytes(TOKENIZER_FILE)
    return files.get(TOKENIZER_FILE), None


def _look_at_all(bucket: Bucket, infos: Sequence[ObjectInfo]) -> list[ShardLook]:
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return list(pool.map(lambda info: _look_at(bucket, info), infos))


def _look_at(bucket: Bucket, info: ObjectInfo) -> ShardLook:
    try:
        tokens = read_shard_facts(bucket, info).tokens
        with open_stored_shard(bucket, info) as archive:
            key = find_token_key(archive, info.name)
            keys = [key, *([MASK_KEY] if f"{MASK_KEY}.npy" in archive.namelist() else [])]
            arrays = []
            for name in keys:
                shape, dtype = read_array_header(archive, name, info.name)
                arrays.append(ArrayLook(name, shape, dtype.name))
    except ShardError as exc:
        return ShardLook(info.name, info.size, info.crc32c, problem=exc.reason)
    return ShardLook(info.name, info.size, info.crc32c, tokens, tuple(arrays))


def _refuse_bad(bucket: Bucket, looks: Iterable[ShardLook]) -> None:
    bad = [look for look in looks if look.problem]
    if bad:
        lines = [f"  {look.name}: {look.problem}" for look in bad[:MAX_NAMED]]
        more = [f"  ... and {len(bad) - MAX_NAMED} more"] if len(bad) > MAX_NAMED else []
        title = f"{bucket.uri}: {count_of(len(bad), 'bad shard')}; no index was written."
        raise DataError("\n".join([title, *lines, *more]))


def _describe_stored_tokenizer(
    bucket: Bucket, names: set[str], vocab_size: int | None, old: dict[str, Any] | None
) -> dict[str, Any]:
    if TOKENIZER_FILE not in names:
        return {"vocab_size": vocab_size, "tokenizer_files": []}
    try:
        known = recorded_checksums(old or {})
        files = read_recorded_files(bucket, find_tokenizer_files(names), known)
    except DataError as exc:
        raise DataError(f"{exc} To record what is there now: --overwrite.") from exc
    vocabulary = _vocabulary_of(files[TOKENIZER_FILE])
    try:
        config = parse_json_object(files.get(TOKENIZER_CONFIG_FILE, b"{}"))
    except ValueError as exc:
        raise DataError(
            f"{bucket.uri}/{TOKENIZER_CONFIG_FILE} cannot be read: {exc}. No index was written. "
            "Put the right one back, or remove it."
        ) from exc
    eos_token = config.get("eos_token")
    if isinstance(eos_token, dict):
        eos_token = eos_token.get("content")
    eos_token_id = vocabulary.get(eos_token) if isinstance(eos_token, str) else None
    size = vocab_size or max(vocabulary.values(), default=-1) + 1
    return describe_tokenizer(Tokenizer(files, size, eos_token_id))


def _vocabulary_of(content: bytes) -> dict[str, int]:
    return dict(_build_backend(content).get_vocab(with_added_tokens=True))


def _build_backend(content: bytes) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as exc:  # tokenizers raises bare Exception
        raise DataError(f"{TOKENIZER_FILE} is not a tokenizer ({exc}).") from exc


def _vocab_size_of(index: dict[str, Any] | None, tokenizer: bytes | None) -> int | None:
    size = index.get("vocab_size") if index else None
    if isinstance(size, int):
        return size
    return max(_vocabulary_of(tokenizer).values(), default=-1) + 1 if tokenizer else None


def _expected_entries(index: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    shards = index.get("shards") if index else None
    entries = shards if isinstance(shards, list) else []
    return {
        str(entry["name"]): entry
        for entry in entries
        if isinstance(entry, dict) and "name" in entry
    }


def _compare(look: ShardLook, expected: dict[str, dict[str, Any]]) -> ShardLook:
    """Return the look with a problem where the index says something else."""
    entry = expected.get(look.name)
    if look.problem or entry is None:
        return look
    for key, value in (("size", look.size), ("tokens", look.tokens), ("crc32c", look.crc32c)):
        said = entry.get(key)
        if said is not None and value is not None and said != value:
            return replace(look, problem=f"its {key} is {value}, index.json says {said}.")
    return look


def _verify(
    bucket: Bucket, look: ShardLook, vocab_size: int | None, expected: dict[str, dict[str, Any]]
) -> ShardLook:
    if look.problem:
        return look
    try:
        with tempfile.TemporaryDirectory(prefix="inspect-") as folder:
            path = bucket.fetch(look.name, Path(folder, "shard.npz"))
            checksum = crc32c_of_file(path)
            said = look.crc32c or expected.get(look.name, {}).get("crc32c") or checksum
            if checksum != said:
                raise ShardError(look.name, f"its crc32c is {checksum}, {said} was expected.")
            with path.open("rb") as file, open_shard(file, look.name) as archive:
                for block in read_array_blocks(archive, look.arrays[0].key, look.name):
                    require_in_vocabulary(block, look.name, vocab_size)
    except ShardError as exc:
        return replace(look, crc32c=checksum, problem=exc.reason)
    return replace(look, crc32c=checksum)


def _decode_samples(
    bucket: Bucket, infos: Sequence[ObjectInfo], looks: Sequence[ShardLook], tokenizer: bytes
) -> dict[str, str]:
    backend = _build_backend(tokenizer)
    by_name = {info.name: info for info in infos}
    samples = {}
    for look in looks:
        with open_stored_shard(bucket, by_name[look.name]) as archive:
            key = look.arrays[0].key
            blocks = read_array_blocks(archive, key, look.name, SAMPLE_TOKENS)
            ids = next(blocks)[:SAMPLE_TOKENS].tolist()
        try:
            samples[look.name] = backend.decode(ids, skip_special_tokens=False)
        except (OverflowError, TypeError):  # ids that no tokenizer has
            samples[look.name] = ""
    return samples
