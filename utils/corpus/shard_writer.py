r"""Token ids -> NPZ shards in a bucket, and the index that names them.

    TokenizedDocument --> ShardWriter --> train_00000.npz ... val_00000.npz   (each verified)
                                      \-> index.partial.json, after every shard
    all shards done --> index.json (last), index.partial.json removed

An output is complete when `index.json` is in it. The same ids give the same bytes: archives carry
no times. A document is never cut: a shard ends with the document that fills it. The partial index
lists what an interrupted preparation has finished, so that the next one goes on after it.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from utils.base.errors import DataError, StorageError
from utils.corpus.documents import SPLITS, TRAINING, VALIDATION, TokenArray
from utils.data.shard_arrays import TOKEN_KEYS
from utils.data.shard_index import get_json, is_validation_shard
from utils.storage.bucket import Bucket, crc32c_of_file

ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
COUNT_BLOCK_TOKENS = 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardEntry:
    """What the index says about one shard."""

    name: str
    tokens: int
    documents: int
    dtype: str
    size: int
    """Bytes of the archive."""
    crc32c: str
    """Base64, as Google Cloud Storage writes it."""


@dataclass(frozen=True)
class FinishedShards:
    """Shards already finished, and how often each token occurs in the training shards."""

    shards: tuple[ShardEntry, ...]
    token_counts: npt.NDArray[np.int64]

    def num_documents(self, split: str) -> int:
        """Return how many documents of a split are in finished shards."""
        return sum(shard.documents for shard in self.shards if split_of(shard.name) == split)


@dataclass
class _OpenShard:
    """The documents collected for the next shard of one split."""

    number: int = 0
    num_tokens: int = 0
    documents: list[TokenArray] = field(default_factory=list)


def split_of(name: str) -> str:
    """Return the split that a shard's name tells: `val` or `train`."""
    return VALIDATION if is_validation_shard(name) else TRAINING


class ShardWriter:
    """Packs documents into shards and puts each into the bucket as soon as it is full.

    A shard is full when it has at least `shard_tokens` tokens. `finished` is what an earlier,
    interrupted preparation left. `on_shard` is called with each shard once it is verified in the
    bucket, and the state then.
    """

    def __init__(
        self,
        bucket: Bucket,
        vocab_size: int,
        shard_tokens: int,
        compress: bool = False,
        finished: FinishedShards | None = None,
        on_shard: Callable[[ShardEntry, FinishedShards], None] | None = None,
    ) -> None:
        self._bucket = bucket
        self._shard_tokens = shard_tokens
        self._compress = compress
        self._on_shard = on_shard
        self._shards = list(finished.shards) if finished else []
        self._counts = finished.token_counts if finished else np.zeros(vocab_size, np.int64)
        self._open = {split: _OpenShard() for split in SPLITS}
        for shard in self._shards:
            self._open[split_of(shard.name)].number += 1

    @property
    def progress(self) -> FinishedShards:
        """The shards in the bucket so far."""
        return FinishedShards(tuple(self._shards), self._counts)

    def add(self, ids: TokenArray, split: str) -> None:
        """Append one document to its split; puts the shard that it fills."""
        shard = self._open[split]
        # A copy: a slice would keep all that was tokenized with it until the shard is full.
        shard.documents.append(ids.copy())
        shard.num_tokens += len(ids)
        if shard.num_tokens >= self._shard_tokens:
            self._put(split)

    def finish(self) -> FinishedShards:
        """Put the shards that are not full."""
        for split, shard in self._open.items():
            if shard.documents:
                self._put(split)
        return self.progress

    def _put(self, split: str) -> None:
        shard = self._open[split]
        name = f"{split}_{shard.number:05d}.npz"
        ids = np.concatenate(shard.documents)
        entry = self._put_file(name, ids, len(shard.documents))
        if split == TRAINING:
            self._counts = self._counts + count_tokens(ids, len(self._counts))
        self._shards.append(entry)
        self._open[split] = _OpenShard(shard.number + 1)
        if self._on_shard:
            self._on_shard(entry, self.progress)

    def _put_file(self, name: str, ids: TokenArray, num_documents: int) -> ShardEntry:
        with tempfile.TemporaryDirectory(prefix="shard-") as folder:
            path = Path(folder, name)
            try:
                write_shard(path, ids, self._compress)
            except OSError as exc:
                raise StorageError(
                    f"{path}: {exc.strerror or exc}. Set TMPDIR to a folder with more room."
                ) from exc
            size, checksum = path.stat().st_size, crc32c_of_file(path)
            stored = self._bucket.put_file(name, path)
        if (stored.size, stored.crc32c) != (size, checksum):
            raise StorageError(
                f"{self._bucket.uri}/{name} is not what was written: {stored.size} bytes, crc32c "
                f"{stored.crc32c}; expected {size} bytes, {checksum}. Run the same command again."
            )
        return ShardEntry(name, len(ids), num_documents, ids.dtype.name, size, checksum)


def write_shard(path: Path, ids: TokenArray, compress: bool = False) -> None:
    """Write a NPZ archive with the 1-D array `input_ids`; the same ids give the same bytes."""
    info = zipfile.ZipInfo(f"{TOKEN_KEYS[0]}.npy", ZIP_EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    info.create_system = 3
    info.external_attr = 0o600 << 16
    with zipfile.ZipFile(path, "w") as archive, archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array(member, ids, version=(1, 0), allow_pickle=False)


def count_tokens(ids: TokenArray, vocab_size: int) -> npt.NDArray[np.int64]:
    """Return how often each token occurs; block by block, because bincount copies to int64."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(ids), COUNT_BLOCK_TOKENS):
        counts += np.bincount(ids[start : start + COUNT_BLOCK_TOKENS], minlength=vocab_size)
    return counts


def unigram_entropy(token_counts: npt.NDArray[np.int64]) -> float:
    """Return the entropy in nats of the distribution of single tokens.

    It is the loss of the best model that ignores context: -sum(p * ln p).
    """
    total = int(token_counts.sum())
    seen = token_counts[token_counts > 0]
    # fsum and 9 digits: the same on every machine, whatever the order of its vector sums.
    return round(math.fsum(-(n / total) * math.log(n / total) for n in seen.tolist()), 9)


def find_bad_shards(bucket: Bucket, shards: Sequence[ShardEntry]) -> list[str]:
    """Return the names of those shards that are missing or differ from their entry."""
    stored = {info.name: info for split in SPLITS for info in bucket.list(f"{split}_")}
    return [
        shard.name
        for shard in shards
        if shard.name not in stored
        or stored[shard.name].size != shard.size
        or (stored[shard.name].crc32c or bucket.crc32c(shard.name)) != shard.crc32c
    ]


def put_json(bucket: Bucket, name: str, content: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write a JSON object with sorted keys."""
    text = json.dumps(content, sort_keys=True, indent=indent)
    bucket.put_bytes(name, (text + "\n").encode("utf-8"))


def get_old_json(bucket: Bucket, name: str, overwrite: bool) -> dict[str, Any] | None:
    """Return what an output says of itself before it is written to; None where it says nothing.

    With `overwrite`, what cannot be read is to be replaced and counts as nothing.

    Raises:
        DataError: It is there and cannot be read.
    """
    try:
        return get_json(bucket, name)
    except DataError as exc:
        if overwrite:
            log.warning("%s It is replaced.", exc)
            return None
        raise DataError(
            f"{exc} Nothing was changed. Put the right one back, or give --overwrite to replace it."
        ) from exc


def entries_to_json(shards: Sequence[ShardEntry]) -> list[dict[str, Any]]:
    """Return the shards as the index lists them, sorted by name."""
    return [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.name)]


def entries_from_json(content: Mapping[str, Any]) -> tuple[ShardEntry, ...]:
    """Return the shards that an index of ours lists."""
    return tuple(ShardEntry(**entry) for entry in content["shards"])
