"""Shards on local disk: downloaded, checked, decoded, memory-mapped.

    bucket -> local cache -> batches

A shard's bytes are compared with the index's crc32c, its sizes and types checked before anything is
unpacked, its token ids checked against the vocabulary before any cast. What is in the cache is the
bare tokens as uint16 or uint32, so that reading a sample is a copy from a memory map. Decoding goes
block by block: host memory does not depend on the size of a shard.

The ranks of one machine share a cache: a lock makes one of them download a shard while the others
wait for it. Shards used longest ago leave when the limit is reached. A file appears under its name
when it is whole, and what a killed process left is removed at the next start. No torch here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import platform
import queue
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import psutil
from filelock import FileLock

from utils.base.console import DISK_ERRORS
from utils.base.errors import ConfigError, ShardError, StorageError
from utils.data.shard_arrays import MASK_KEY, find_token_key, open_shard, read_array_blocks
from utils.data.shard_index import ShardFacts
from utils.storage.bucket import Bucket, crc32c_of_file, encode_crc32c
from utils.storage.directory import TEMPORARY_PREFIX
from utils.storage.retrying import FIRST_RETRY_SECONDS, backoff, retry

DOWNLOAD_THREADS = 4
LOCK_STRIPES = 64
LOCK_FOLDER = "locks"
CHECKSUM_SUFFIX = ".crc32c"
TEMPORARY_NAME = re.compile(
    rf"{re.escape(TEMPORARY_PREFIX)}(?P<host>.+)-(?P<pid>\d+)-\d+\.(npz|tokens)"
)
_LONGEST_RETRY_SECONDS = 60.0
GIVE_UP_SECONDS = 1800.0
_CLOSE_SECONDS = 2.0

Tokens = np.ndarray[Any, Any]

log = logging.getLogger(__name__)


def token_dtype(vocab_size: int) -> type[np.uint16 | np.uint32]:
    """Return the smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def decode_shard(path: Path, name: str, vocab_size: int) -> Iterator[Tokens]:
    """Yield a shard's tokens, flat, block by block, as uint16 or uint32.

    Ids are compared with the vocabulary before any cast.

    Raises:
        ShardError: The file is damaged or its contents cannot be trained on.
    """
    dtype = token_dtype(vocab_size)
    found = False
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(open_shard(path, name))

        def read(key: str) -> Generator[Tokens, None, None]:
            return stack.enter_context(contextlib.closing(read_array_blocks(archive, key, name)))

        blocks: Iterator[Tokens] = read(find_token_key(archive, name))
        if f"{MASK_KEY}.npy" in archive.namelist():
            blocks = _unmasked(blocks, read(MASK_KEY), name)
        for block in blocks:
            if block.size:
                found = True
                require_in_vocabulary(block, name, vocab_size)
                yield block.astype(dtype)
    if not found:
        raise ShardError(name, "it holds no tokens.")


def _unmasked(tokens: Iterator[Tokens], masks: Iterator[Tokens], name: str) -> Iterator[Tokens]:
    """Yield the tokens that are not under a zero of the mask; blocks may differ in length."""
    block, mask = next(tokens, None), next(masks, None)
    while block is not None and mask is not None:
        length = min(len(block), len(mask))
        yield block[:length][mask[:length] != 0]
        block = block[length:] if len(block) > length else next(tokens, None)
        mask = mask[length:] if len(mask) > length else next(masks, None)
    if block is not None or mask is not None:
        raise ShardError(name, f"{MASK_KEY} has another shape than the tokens.")


def require_in_vocabulary(tokens: Tokens, name: str, vocab_size: int | None) -> None:
    """Check ids of a shard as they stand in its file.

    `vocab_size` is None where it is not known.

    Raises:
        ShardError: One is outside the vocabulary.
    """
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, -1)
    if low < 0:
        raise ShardError(name, f"token id {low} is negative.")
    if vocab_size is not None and high >= vocab_size:
        raise ShardError(
            name,
            f"token id {high} is outside the vocabulary of {vocab_size}. "
            "Tokenize it again, or set model_overrides.vocab_size.",
        )


class _LoaderThreads:
    """Threads for downloads.

    They are daemons: neither closing nor the end of the process waits for a bucket that does not
    answer, as they would with a ThreadPoolExecutor.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Tokens], Callable[[], Tokens]] | None] = (
            queue.SimpleQueue()
        )
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, load: Callable[[int], Tokens], shard: int) -> Future[Tokens]:
        """Have a shard loaded."""
        future: Future[Tokens] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the shard cache is closed")
            if len(self._threads) < DOWNLOAD_THREADS:
                thread = threading.Thread(target=self._work, name="shard-cache", daemon=True)
                thread.start()
                self._threads.append(thread)
            self._queue.put((future, functools.partial(load, shard)))
        return future

    def close(self) -> None:
        """Cancel what has not begun; wait a little for what has."""
        with self._lock:
            self._is_closed = True
            with contextlib.suppress(queue.Empty):
                while (item := self._queue.get_nowait()) is not None:
                    item[0].cancel()
            for _ in self._threads:
                self._queue.put(None)
        end = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, load = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(load())
            except BaseException as exc:  # noqa: BLE001 - raised where the tokens are asked for
                future.set_exception(exc)


class ShardCache:
    """Decoded shards of one or several buckets.

    Shards are numbered through all sources. Processes and runs may share the directory, which is
    kept under `limit_bytes`.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Bucket, Sequence[ShardFacts]]],
        directory: Path,
        vocab_size: int,
        limit_bytes: int | None = None,
    ) -> None:
        self._shards = [(bucket, facts) for bucket, shards in sources for facts in shards]
        self._directory, self._limit = directory, limit_bytes
        self._vocab_size, self._dtype = vocab_size, np.dtype(token_dtype(vocab_size))
        self._open: dict[int, Tokens] = {}
        self._loading: dict[int, Future[Tokens]] = {}
        self._wanted: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._pool = _LoaderThreads()
        self._remove_leftovers()

    def require_room_for(self, shards: Sequence[int], what: str) -> None:
        """Refuse a limit that these shards do not fit into together.

        Raises:
            ConfigError: With the numbers.
        """
        need = self.bytes_of(shards)
        if self._limit is not None and need > self._limit:
            raise ConfigError(
                f"cache_limit_bytes {self._limit} is below the {need} bytes of {what}. Raise it, "
                "or lower shuffle_window_shards."
            )

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Return the bytes that some shards take in the cache."""
        return sum(self._shards[shard][1].tokens for shard in shards) * self._dtype.itemsize

    def prefetch(self, now: Sequence[int], later: Sequence[int] = ()) -> None:
        """Begin to download and decode shards in the background, in this order.

        Shards in neither list are let go; those of `later` are begun as far as the limit allows.
        """
        wanted, room = list(now), self._limit
        for shard in later:
            if room is None or self.bytes_of([*wanted, shard]) <= room:
                wanted.append(shard)
        self._wanted = frozenset(wanted)
        self._release()
        for shard in wanted:
            self._request(shard)

    def tokens(self, shard: int) -> Tokens:
        """Return a shard's tokens, waiting for it where it is not here yet.

        Raises:
            ShardError: It cannot be used.
            StorageError: It cannot be downloaded.
        """
        opened = self._open.get(shard)
        return opened if opened is not None else self._request(shard).result()

    def close(self) -> None:
        """Stop background work and unmap everything."""
        self._closing.set()
        self._pool.close()
        self._open.clear()

    def _release(self) -> None:
        with self._lock:
            for shard in set(self._loading) - self._wanted:
                if self._loading[shard].done() or self._loading[shard].cancel():
                    self._loading.pop(shard)
                    self._open.pop(shard, None)

    def _request(self, shard: int) -> Future[Tokens]:
        with self._lock:
            if shard not in self._loading:
                self._loading[shard] = self._pool.submit(self._load, shard)
            return self._loading[shard]

    def _load(self, shard: int) -> Tokens:
        path = self._path(shard)
        tokens = self._map(shard, path)
        if tokens is None:
            stripe = int(path.stem[-4:], 16) % LOCK_STRIPES
            locks = self._directory / LOCK_FOLDER
            with _told_disk_errors(self._directory):
                locks.mkdir(parents=True, exist_ok=True)
            with FileLock(locks / f"{stripe}.lock"):
                tokens = self._map(shard, path)  # another rank may have brought it
                if tokens is None:
                    self._fill_with_retries(shard, path)
                    tokens = self._map(shard, path)
        facts = self._shards[shard][1]
        if tokens is None or len(tokens) != facts.tokens:
            raise ShardError(facts.name, "its file in the cache is not what was written.")
        self._open[shard] = tokens
        return tokens

    def _path(self, shard: int) -> Path:
        bucket, facts = self._shards[shard]
        folder = hashlib.sha256(bucket.uri.encode()).hexdigest()[:12]
        key = repr((facts.name, facts.size, facts.crc32c, self._vocab_size))
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return self._directory / folder / f"{Path(facts.name).stem[:80]}-{digest}.tokens"

    def _map(self, shard: int, path: Path) -> Tokens | None:
        """Return the mapped file, or None where it is missing or cut short by a power loss."""
        expected = self._shards[shard][1].tokens * self._dtype.itemsize
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if path.stat().st_size == expected:
                checksum = path.with_suffix(CHECKSUM_SUFFIX)
                if checksum.read_text("ascii") != crc32c_of_file(path):
                    log.warning("%s in the cache is damaged, making it again.", path.name)
                    return None
                os.utime(path)  # the time of its last use
                return np.asarray(np.memmap(path, dtype=self._dtype, mode="r"))
        return None

    def _fill_with_retries(self, shard: int, path: Path) -> None:
        end = time.monotonic() + GIVE_UP_SECONDS
        delays = itertools.takewhile(
            lambda delay: not self._closing.is_set() and time.monotonic() + delay <= end,
            backoff(FIRST_RETRY_SECONDS, longest_seconds=_LONGEST_RETRY_SECONDS),
        )
        message = "A shard could not be read, trying again in %.0f s: %s"
        retry(
            lambda: self._fill(shard, path),
            delays,
            lambda delay, exc: log.warning(message, delay, exc),
            self._closing.wait,
        )

    def _fill(self, shard: int, path: Path) -> None:
        bucket, facts = self._shards[shard]
        self._make_room(facts.tokens * self._dtype.itemsize + facts.size)
        with _told_disk_errors(self._directory):
            self._decode(bucket, facts, path)

    def _decode(self, bucket: Bucket, facts: ShardFacts, path: Path) -> None:
        stem = f"{TEMPORARY_PREFIX}{platform.node()}-{os.getpid()}-{threading.get_ident()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        download, decoded = path.with_name(f"{stem}.npz"), path.with_name(f"{stem}.tokens")
        try:
            source = bucket.fetch(facts.name, download)
            _require_checksum(source, facts)
            count = checksum = 0
            with decoded.open("wb") as file:
                for block in decode_shard(source, facts.name, self._vocab_size):
                    count += len(block)
                    checksum = google_crc32c.extend(checksum, block.tobytes())
                    file.write(block.data)
            if count != facts.tokens:
                raise ShardError(
                    facts.name, f"it holds {count} tokens, the index says {facts.tokens}."
                )
            path.with_suffix(CHECKSUM_SUFFIX).write_text(encode_crc32c(checksum), "ascii")
            decoded.replace(path)
        finally:
            download.unlink(missing_ok=True)
            decoded.unlink(missing_ok=True)

    def _make_room(self, need: int) -> None:
        """Remove the shards used longest ago until `need` bytes fit under the limit."""
        if self._limit is None:
            return
        kept = {self._path(shard) for shard in self._wanted}
        files, total = [], need
        for path in self._directory.glob("*/*.tokens"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                total += status.st_size
                if path not in kept and not path.name.startswith("."):
                    files.append((status.st_mtime_ns, status.st_size, path))
        for _, size, path in sorted(files):
            if total <= self._limit:
                return
            log.debug("Removing %s from the cache.", path.name)
            # Another rank that still has it mapped keeps its pages.
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size
                path.with_suffix(CHECKSUM_SUFFIX).unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        for path in self._directory.glob(f"*/{TEMPORARY_PREFIX}*"):
            match = TEMPORARY_NAME.fullmatch(path.name)
            here = match is not None and match["host"] == platform.node()
            if match is not None and here and not psutil.pid_exists(int(match["pid"])):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _told_disk_errors(directory: Path) -> Iterator[None]:
    """Raise what this disk cannot do as an error of its own; what a bucket cannot passes by.

    Raises:
        StorageError: It names the directory. Trying again would not help.
    """
    try:
        yield
    except (OSError, StorageError) as exc:
        cause = exc if isinstance(exc, OSError) else exc.__cause__
        is_ours = cause is exc or getattr(cause, "errno", None) in DISK_ERRORS
        if not isinstance(cause, OSError) or not is_ours:
            raise
        raise StorageError(
            f"{directory} cannot be written: {cause.strerror or cause}. Free some space, or set "
            "cache_dir elsewhere."
        ) from exc


def _require_checksum(path: Path, facts: ShardFacts) -> None:
    if facts.crc32c is None:
        return
    crc32c = crc32c_of_file(path)
    if crc32c != facts.crc32c:
        raise ShardError(facts.name, f"its crc32c is {crc32c}, the index says {facts.crc32c}.")
