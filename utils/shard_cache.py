"""Shards on local disk: downloaded, checked, decoded, memory-mapped.

    bucket -> local cache -> batches

A shard's bytes are compared with the index's crc32c, its sizes and types checked before anything is
unpacked, its token ids checked against the vocabulary before any cast. What is in the cache is
plain .npy of uint16 or uint32, so that reading a sample is a copy from a memory map. No torch here.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import ShardError
from utils.shard_index import MASK_KEY, ShardFacts, find_token_key, open_shard, read_array
from utils.storage import Bucket


def decode_shard(path: Path, name: str, vocab_size: int) -> np.ndarray[Any, Any]:
    """Return a shard's tokens, flat, as uint16 or uint32.

    Args:
        path: The NPZ file.
        name: Its name for messages.
        vocab_size: Ids must be below it; checked before any cast.

    Raises:
        ShardError: The file is damaged or its contents cannot be trained on.
    """
    with open_shard(path, name) as archive:
        tokens = read_array(archive, find_token_key(archive, name), name)
        if f"{MASK_KEY}.npy" in archive.namelist():
            mask = read_array(archive, MASK_KEY, name)
            if mask.shape != tokens.shape:
                raise ShardError(name, f"{MASK_KEY} has another shape than the tokens.")
            tokens = tokens[mask != 0]
    if tokens.size == 0:
        raise ShardError(name, "it holds no tokens.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0:
        raise ShardError(name, f"token id {low} is negative.")
    if high >= vocab_size:
        raise ShardError(
            name,
            f"token id {high} is outside the vocabulary of {vocab_size}. "
            "Tokenize it again, or set model_overrides.vocab_size.",
        )
    return tokens.astype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class ShardCache:
    """Decoded shards on local disk, memory-mapped; shared by the ranks of one machine."""

    def __init__(
        self, bucket: Bucket, shards: Sequence[ShardFacts], directory: Path, vocab_size: int
    ) -> None:
        self._bucket, self._shards, self._vocab_size = bucket, tuple(shards), vocab_size
        self._directory = directory / hashlib.sha256(bucket.uri.encode()).hexdigest()[:12]
        self._open: dict[int, np.ndarray[Any, Any]] = {}
        self._loading: dict[int, Future[np.ndarray[Any, Any]]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="shard-cache")

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to download and decode shards in the background."""
        for shard in shards:
            self._request(shard)

    def tokens(self, shard: int) -> np.ndarray[Any, Any]:
        """Return a shard's tokens, waiting for it where it is not here yet."""
        opened = self._open.get(shard)
        return opened if opened is not None else self._request(shard).result()

    def release(self, keep: Sequence[int]) -> None:
        """Unmap every shard that is not in `keep`; its file stays."""
        with self._lock:
            for shard in set(self._open) - set(keep):
                del self._open[shard]
                self._loading.pop(shard, None)

    def close(self) -> None:
        """Stop background work."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._open.clear()

    def _request(self, shard: int) -> Future[np.ndarray[Any, Any]]:
        with self._lock:
            if shard not in self._loading:
                self._loading[shard] = self._pool.submit(self._load, shard)
            return self._loading[shard]

    def _load(self, shard: int) -> np.ndarray[Any, Any]:
        facts = self._shards[shard]
        key = hashlib.sha256(
            repr((facts.name, facts.size, facts.crc32c, self._vocab_size)).encode()
        ).hexdigest()[:16]
        path = self._directory / f"{Path(facts.name).stem}-{key}.npy"
        if not path.is_file():
            self._fill(facts, path)
        try:
            tokens: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError):  # the machine went down while it was written
            self._fill(facts, path)
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(tokens) != facts.tokens:
            raise ShardError(
                facts.name, f"it holds {len(tokens)} tokens, the index says {facts.tokens}."
            )
        self._open[shard] = tokens
        return tokens

    def _fill(self, facts: ShardFacts, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        stem = f".{path.name}.{os.getpid()}.{threading.get_ident()}"
        download, decoded = path.with_name(f"{stem}.npz"), path.with_name(f"{stem}.npy")
        try:
            crc32c = self._bucket.get_file(facts.name, download)
            if facts.crc32c is not None and crc32c != facts.crc32c:
                raise ShardError(
                    facts.name, f"its crc32c is {crc32c}, the index says {facts.crc32c}."
                )
            np.save(decoded, decode_shard(download, facts.name, self._vocab_size))
            decoded.replace(path)
        finally:
            download.unlink(missing_ok=True)
            decoded.unlink(missing_ok=True)
