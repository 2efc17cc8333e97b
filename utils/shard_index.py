"""What each shard holds, known before any of it is unpacked.

    bucket -> shard index -> sample order

Prepared data brings `index.json`; for shards from elsewhere the same facts are read from the zip
directory and the .npy headers, a few KB a shard. Shards named `val_*.npz` are for validation, the
rest for training, both in the order of their names. No torch here.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import lzma
import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from utils.errors import DataError, ObjectNotFoundError, ShardError
from utils.storage import Bucket, ObjectInfo

INDEX_OBJECT = "index.json"
INDEX_FORMAT = 1
TOKEN_KEYS = ("input_ids", "tokens", "arr_0")
MASK_KEY = "attention_mask"
SHARD_SUFFIX = ".npz"
VALIDATION_PREFIX = "val_"
MAX_SHARD_BYTES = 8 * 2**30
HEADER_READ_BYTES = 16 * 2**10
HEADER_THREADS = 16

# What zipfile and numpy raise for damaged bytes: a flipped bit may also ask for a password, for
# an unknown compression or for a later version of the format.
DAMAGE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    ValueError,
    struct.error,
    tokenize.TokenError,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardFacts:
    """One shard, known from the index or its headers.

    Attributes:
        name: Object name.
        tokens: Tokens that training sees (those under a zero of the mask are not counted).
        size: Bytes of the object.
        crc32c: Base64 checksum of the object, None where neither index nor bucket has one.
    """

    name: str
    tokens: int
    size: int
    crc32c: str | None


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one data URI.

    Attributes:
        training: Training shards by name, limited to `max_files`.
        validation: Validation shards by name.
        vocab_size: Vocabulary of the tokenizer that made them, None where unknown.
        unigram_entropy: Entropy of the training tokens in nats, None where unknown.
        tokenizer_files: Object names of the tokenizer's own files.
    """

    training: tuple[ShardFacts, ...]
    validation: tuple[ShardFacts, ...]
    vocab_size: int | None = None
    unigram_entropy: float | None = None
    tokenizer_files: tuple[str, ...] = ()

    @property
    def training_tokens(self) -> int:
        """Tokens of all training shards."""
        return sum(shard.tokens for shard in self.training)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training shards' names, tokens, sizes and checksums."""
        return fingerprint_shards(self.training)


def fingerprint_shards(shards: Sequence[ShardFacts]) -> str:
    """Return the SHA-256 that tells one shard list from another."""
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


def build_shard_index(bucket: Bucket, max_files: int | None = None) -> ShardIndex:
    """Return what the shards of a bucket hold.

    Args:
        bucket: Where the shards are.
        max_files: Use only so many training shards, the first by name.

    Raises:
        DataError: There are no training shards, or `index.json` is not usable.
        ShardError: A shard's headers cannot be read (only where there is no index).
    """
    try:
        index = _from_index(json.loads(bucket.read_bytes(INDEX_OBJECT)), bucket)
    except ObjectNotFoundError:
        index = _from_headers(bucket, max_files)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{bucket.uri}/{INDEX_OBJECT} is not usable: {exc}.") from exc
    if not index.training:
        raise DataError(
            f"{bucket.uri} holds no training shards (*.npz that do not begin with val_)."
        )
    return ShardIndex(
        index.training[:max_files],
        index.validation,
        index.vocab_size,
        index.unigram_entropy,
        index.tokenizer_files,
    )


def is_validation_shard(name: str) -> bool:
    """Tell whether a shard is held back for validation."""
    return PurePosixPath(name).name.startswith(VALIDATION_PREFIX)


def _from_index(value: Any, bucket: Bucket) -> ShardIndex:
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
        vocab_size = value.get("vocab_size")
        entropy = value.get("summary", {}).get("unigram_entropy_nats")
    except (KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise ValueError(f"{type(exc).__name__} {exc}") from exc
    return ShardIndex(
        tuple(s for s in shards if not is_validation_shard(s.name)),
        tuple(s for s in shards if is_validation_shard(s.name)),
        vocab_size,
        entropy,
        _find_tokenizer_files(info.name for info in bucket.list("") if "/" not in info.name),
    )


_TOKENIZER_FILE = re.compile(
    r"(tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|tokenizer\.model|chat_template\.jinja)"
)


def _find_tokenizer_files(names: Any) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if _TOKENIZER_FILE.fullmatch(name)))


def _from_headers(bucket: Bucket, max_files: int | None) -> ShardIndex:
    objects = sorted(bucket.list(""), key=lambda info: info.name)
    shards = [info for info in objects if info.name.endswith(SHARD_SUFFIX)]
    training = [info for info in shards if not is_validation_shard(info.name)][:max_files]
    validation = [info for info in shards if is_validation_shard(info.name)]
    log.info("No %s in %s: reading %d headers.", INDEX_OBJECT, bucket.uri, len(shards))
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        facts = list(pool.map(lambda info: read_shard_facts(bucket, info), training + validation))
    return ShardIndex(
        tuple(facts[: len(training)]),
        tuple(facts[len(training) :]),
        tokenizer_files=_find_tokenizer_files(info.name for info in objects),
    )


def read_shard_facts(bucket: Bucket, info: ObjectInfo) -> ShardFacts:
    """Return a shard's facts from its zip directory and .npy headers.

    Raises:
        ShardError: It is not an NPZ with usable tokens.
    """
    source = io.BufferedReader(_RangeReader(bucket, info), HEADER_READ_BYTES)
    with source, open_shard(source, info.name) as archive:
        key = find_token_key(archive, info.name)
        shape, _ = read_array_header(archive, key, info.name)
        tokens = math.prod(shape)
        if f"{MASK_KEY}.npy" in archive.namelist():
            tokens = int(np.count_nonzero(read_array(archive, MASK_KEY, info.name)))
    if tokens == 0:
        raise ShardError(info.name, "it holds no tokens.")
    return ShardFacts(info.name, tokens, info.size, info.crc32c)


def open_shard(source: Any, name: str) -> zipfile.ZipFile:
    """Open an NPZ as the zip file that it is.

    Raises:
        ShardError: It is empty, truncated or no zip file at all.
    """
    try:
        return zipfile.ZipFile(source)
    except DAMAGE_ERRORS as exc:
        raise ShardError(name, f"it is not a whole NPZ file ({exc}).") from exc


def find_token_key(archive: zipfile.ZipFile, name: str) -> str:
    """Return the key of the token ids in a shard.

    Raises:
        ShardError: It has none of the accepted keys.
    """
    members = archive.namelist()
    keys = [member.removesuffix(".npy") for member in members if member.endswith(".npy")]
    for key in TOKEN_KEYS:
        if key in keys:
            return key
    raise ShardError(name, f"its keys are {keys[:10]}; one of {', '.join(TOKEN_KEYS)} is needed.")


def read_array_header(
    archive: zipfile.ZipFile, key: str, name: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return (shape, dtype) of a shard's array, after checking that they are acceptable.

    Raises:
        ShardError: Not integers, not 1-D, 2-D or [.., .., 1], or of a size that cannot be true.
    """
    member = archive.getinfo(f"{key}.npy")
    try:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            reader = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = reader(file)
    except DAMAGE_ERRORS as exc:
        raise ShardError(name, f"the header of {key} cannot be read ({exc}).") from exc
    if dtype.kind not in "iu" and not (key == MASK_KEY and dtype.kind == "b"):
        raise ShardError(name, f"{key} has dtype {dtype}; integers are needed.")
    if len(shape) not in (1, 2) and not (len(shape) == 3 and shape[2] == 1):
        raise ShardError(name, f"{key} has shape {shape}; 1-D, 2-D or [n, length, 1] is needed.")
    # Python's numbers: np.prod would wrap a shape that lies around to a small product.
    declared = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape):
        raise ShardError(name, f"{key} has shape {shape}, which is impossible.")
    if declared > MAX_SHARD_BYTES or member.file_size > MAX_SHARD_BYTES:
        raise ShardError(name, f"{key} unpacks to more than {MAX_SHARD_BYTES} bytes.")
    if not declared < member.file_size <= declared + 2**16:
        raise ShardError(
            name, f"{key} declares {declared} bytes, its zip entry {member.file_size}."
        )
    return shape, dtype


def read_array(archive: zipfile.ZipFile, key: str, name: str) -> np.ndarray[Any, Any]:
    """Return one array of a shard, flat, after checking its header.

    Raises:
        ShardError: The header is not acceptable or the bytes are damaged.
    """
    read_array_header(archive, key, name)
    try:
        with archive.open(f"{key}.npy") as file:
            array: np.ndarray[Any, Any] = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # reaching the end makes zipfile compare the CRC
    except DAMAGE_ERRORS as exc:
        raise ShardError(name, f"{key} is damaged ({exc}).") from exc
    return array.reshape(-1)


class _RangeReader(io.RawIOBase):
    """A seekable view of one object through range reads."""

    def __init__(self, bucket: Bucket, info: ObjectInfo) -> None:
        super().__init__()
        self._bucket, self._info, self._position = bucket, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._info.size - self._position)
        if length <= 0:
            return 0
        data = self._bucket.read_bytes(self._info.name, self._position, length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
