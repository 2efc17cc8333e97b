"""A shard reaches the cache once, checked, and nothing unchecked is ever read from it."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs.config_files import PROJECT_DIRECTORY
from tests.gcs_server import FakeGcsServer, Fault
from tests.processes import run_python
from tests.sample_shards import (
    BAD_HEADERS,
    BAD_TOKENS,
    INTEGER_DTYPES,
    CountingBucket,
    save_shard,
    saved,
)
from utils.base.errors import (
    ConfigError,
    ObjectNotFoundError,
    ShardError,
    StorageError,
    TransientStorageError,
)
from utils.data.shard_cache import ShardCache, decode_shard
from utils.data.shard_index import ShardFacts, read_shard_facts
from utils.storage.bucket import Bucket, ObjectInfo
from utils.storage.directory import DirectoryBucket
from utils.storage.open import open_bucket

NAME = "train_00000.npz"
IDS = np.arange(100, dtype=np.uint16)


def facts_of(directory: Path, data: bytes) -> ShardFacts:
    """Return what the headers of a shard say."""
    (directory / NAME).write_bytes(data)
    return read_shard_facts(DirectoryBucket(directory), ObjectInfo(NAME, len(data)))


def decode(directory: Path, data: bytes, vocab_size: int = 100) -> np.ndarray:
    """Return the tokens of a shard, of which the headers say as many."""
    path = directory / NAME
    path.write_bytes(data)
    tokens = np.concatenate(list(decode_shard(path, NAME, vocab_size)))
    assert facts_of(directory, data) == ShardFacts(NAME, len(tokens), len(data), None)
    return tokens


@pytest.mark.parametrize("shape", [(12,), (3, 4), (3, 4, 1)])
def test_every_documented_shape_and_integer_type_is_read_in_order(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    for dtype in INTEGER_DTYPES:
        ids = np.arange(12, dtype=dtype).reshape(shape)
        for array in (ids, np.asfortranarray(ids)):
            tokens = decode(tmp_path, saved(input_ids=array))
            assert (tokens.dtype, tokens.tolist()) == (np.uint16, list(range(12)))


def test_input_ids_are_preferred_to_other_keys(tmp_path: Path) -> None:
    arrays = {"arr_0": np.ones(5, "i4"), "tokens": np.ones(6, "i4"), "input_ids": np.ones(7, "i4")}
    for length in (7, 6, 5):
        assert len(decode(tmp_path, saved(**arrays))) == length
        arrays.popitem()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(50257, "u2"), (65536, "u2"), (65537, "u4"), (128256, "u4")]
)
def test_the_highest_id_of_a_vocabulary_survives(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    ids = np.array([vocab_size - 1, 0], "i8")
    tokens = decode(tmp_path, saved(input_ids=ids), vocab_size)
    assert (tokens.dtype, tokens.tolist()) == (np.dtype(dtype), ids.tolist())


@pytest.mark.parametrize("dtype", ["u1", "i8", "?"])
def test_masked_tokens_are_dropped(tmp_path: Path, dtype: str) -> None:
    mask = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    data = saved(input_ids=np.array([[1, 2, 3], [4, 5, 6]]), attention_mask=mask)
    assert decode(tmp_path, data).tolist() == [2, 3, 4, 6]


@pytest.mark.parametrize("case", [*BAD_HEADERS, *BAD_TOKENS])
def test_a_bad_shard_is_named_with_its_reason(tmp_path: Path, case: str) -> None:
    data, reason = {**BAD_HEADERS, **BAD_TOKENS}[case]
    for read in [decode, *([facts_of] if case in BAD_HEADERS else [])]:
        with pytest.raises(ShardError) as caught:
            read(tmp_path, data)
        assert caught.value.name == NAME
        assert reason in caught.value.reason


def test_a_bit_flipped_anywhere_changes_no_token_silently(tmp_path: Path) -> None:
    data = saved(input_ids=np.arange(9, dtype=np.uint16))
    for length in range(len(data)):  # cut anywhere
        with pytest.raises(ShardError):
            facts_of(tmp_path, data[:length])
    refused = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            tokens = decode(tmp_path, bytes(damaged))
        except ShardError:
            refused += 1
        else:
            assert tokens.tolist() == list(range(9)), f"bit {bit}"
    assert refused > len(data)


@pytest.fixture
def bucket(tmp_path: Path) -> CountingBucket:
    return CountingBucket(tmp_path / "data")


@pytest.fixture
def open_cache(tmp_path: Path, bucket: CountingBucket) -> Iterator[Callable[..., ShardCache]]:
    opened = []

    def build(
        *shards: ShardFacts,
        using: Bucket = bucket,
        vocab_size: int = 100,
        limit_bytes: int | None = None,
    ) -> ShardCache:
        sources = [(using, shards)]
        opened.append(ShardCache(sources, tmp_path / "cache", vocab_size, limit_bytes))
        return opened[-1]

    yield build
    for cache in opened:
        cache.close()


def cached_files(tmp_path: Path) -> list[Path]:
    files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return sorted(p for p in files if p.parent.name != "locks" and p.suffix != ".crc32c")


def test_many_readers_wait_for_one_download(
    bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    cache = open_cache(save_shard(bucket.root / NAME, input_ids=IDS))
    found: list[list[int]] = []
    readers = [
        threading.Thread(target=lambda: found.append(cache.tokens(0).tolist())) for _ in range(8)
    ]
    cache.prefetch([0])
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [IDS.tolist()] * 8
    assert bucket.downloads == [NAME]


def test_a_shard_is_downloaded_once_for_every_attempt_and_after_its_release(
    bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    shards = [save_shard(bucket.root / f"{n}.npz", input_ids=IDS[n:]) for n in range(3)]
    cache = open_cache(*shards)
    cache.prefetch(range(3))
    for _ in range(2):
        assert [cache.tokens(n).tolist() for n in range(3)] == [IDS[n:].tolist() for n in range(3)]
        cache.prefetch([1])
    assert open_cache(*shards).tokens(2).tolist() == IDS[2:].tolist()
    assert sorted(bucket.downloads) == ["0.npz", "1.npz", "2.npz"]


def test_bytes_that_are_not_the_indexs_are_refused_and_not_kept(
    tmp_path: Path, bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    facts = save_shard(bucket.root / NAME, input_ids=IDS)
    save_shard(bucket.root / NAME, input_ids=IDS[::-1])
    with pytest.raises(ShardError, match=f"{NAME}: its crc32c is .*, the index says"):
        open_cache(facts).tokens(0)
    assert cached_files(tmp_path) == []


def test_more_or_fewer_tokens_than_the_index_says_are_refused(
    bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    facts = save_shard(bucket.root / NAME, input_ids=IDS)
    with pytest.raises(ShardError, match="it holds 100 tokens, the index says 101"):
        open_cache(replace(facts, tokens=101)).tokens(0)


@pytest.mark.parametrize("length", [0, 60, 200])
def test_a_file_in_the_cache_that_is_cut_or_damaged_is_made_again(
    tmp_path: Path, bucket: CountingBucket, open_cache: Callable[..., ShardCache], length: int
) -> None:
    facts = save_shard(bucket.root / NAME, input_ids=IDS)
    open_cache(facts).tokens(0)
    (whole,) = cached_files(tmp_path)
    assert whole.stat().st_size == 200
    whole.write_bytes(bytes(length))
    assert open_cache(facts).tokens(0).tolist() == IDS.tolist()
    assert bucket.downloads == [NAME, NAME]


def test_the_cache_tells_shards_vocabularies_and_buckets_apart(
    tmp_path: Path, bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    facts = save_shard(bucket.root / NAME, input_ids=IDS)
    open_cache(facts).tokens(0)
    with pytest.raises(ShardError, match="token id 99 is outside the vocabulary of 99"):
        open_cache(facts, vocab_size=99).tokens(0)
    changed = save_shard(bucket.root / NAME, input_ids=IDS[::-1])
    assert open_cache(changed).tokens(0).tolist() == IDS[::-1].tolist()
    other = CountingBucket(tmp_path / "other")
    save_shard(other.root / NAME, input_ids=IDS[10:])
    same = replace(changed, tokens=90, crc32c=None)
    assert open_cache(same, using=other).tokens(0).tolist() == IDS[10:].tolist()
    with pytest.raises(ShardError, match="it holds 100 tokens, the index says 90"):
        open_cache(same).tokens(0)


def test_a_bad_shard_leaves_nothing_behind_and_the_others_can_be_read(
    tmp_path: Path, bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    good = save_shard(bucket.root / "good.npz", input_ids=IDS)
    (bucket.root / "bad.npz").write_bytes(b"<html>")
    cache = open_cache(ShardFacts("bad.npz", 100, 6, None), good)
    cache.prefetch([0, 1])
    for _ in range(2):
        with pytest.raises(ShardError, match="bad.npz"):
            cache.tokens(0)
    assert cache.tokens(1).tolist() == IDS.tolist()
    assert len(cached_files(tmp_path)) == 1
    with pytest.raises(ObjectNotFoundError, match="gone.npz"):
        open_cache(ShardFacts("gone.npz", 1, 1, None)).tokens(0)


# The limit, and several processes.


def test_a_limit_below_what_is_needed_at_once_is_refused_with_numbers(
    bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    shards = [save_shard(bucket.root / f"{n}.npz", input_ids=IDS) for n in range(3)]
    cache = open_cache(*shards, limit_bytes=500)
    cache.prefetch([0], [1, 2])  # what comes later is begun as far as the limit allows
    cache.tokens(0)
    cache.tokens(1)
    cache.close()
    assert sorted(bucket.downloads) == ["0.npz", "1.npz"]
    with pytest.raises(ConfigError, match="cache_limit_bytes 500 is below the 600 bytes of it all"):
        cache.require_room_for([0, 1, 2], "it all")
    cache.require_room_for([0, 1], "two of them")


def test_the_shards_used_longest_ago_leave_and_those_wanted_now_stay(
    tmp_path: Path, bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    shards = [save_shard(bucket.root / f"{n}.npz", input_ids=IDS) for n in range(6)]
    limit = 3 * 200 + shards[0].size  # three decoded shards and one download

    def use(cache: ShardCache, *wanted: int) -> list[str]:
        """Read shards; return those that are in the cache then, by the time of their last use."""
        cache.prefetch(wanted)
        for shard in wanted:
            assert cache.tokens(shard).tolist() == IDS.tolist()
        files = sorted(cached_files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        assert sum(path.stat().st_size for path in files) <= limit
        for time, path in enumerate(files):  # uses within one tick of the clock have one time
            os.utime(path, (time, time))
        return [path.name[0] for path in files]

    cache = open_cache(*shards, limit_bytes=limit)
    assert [use(cache, shard) for shard in (0, 1, 2)] == [["0"], ["0", "1"], ["0", "1", "2"]]
    assert use(cache, 0) == ["1", "2", "0"]
    assert use(cache, 3) == ["2", "0", "3"]
    first, *wanted = use(cache, 2, 4)  # 4 may be there before 2 is read
    assert (first, set(wanted)) == ("3", {"2", "4"})
    cache.prefetch([3])  # opened before and in use, though its last use is the longest ago
    cache.tokens(3)
    oldest = next(path for path in cached_files(tmp_path) if path.name[0] == "3")
    os.utime(oldest, (0, 0))
    assert {"3", "5"} < set(use(cache, 3, 5))


READER = """
import sys
from pathlib import Path
from tests.sample_shards import CountingBucket
from utils.data.shard_cache import ShardCache
from utils.data.shard_index import (ShardFacts)
root, cache, name, tokens, size = sys.argv[1:]
bucket = CountingBucket(Path(root))
shards = [ShardFacts(f"{n}.npz", int(tokens), int(size), None) for n in range(8)]
opened = ShardCache([(bucket, shards)], Path(cache), 100)
opened.prefetch(range(8))
total = sum(int(opened.tokens(n).sum()) for n in range(8))
opened.close()
print(len(bucket.downloads), total)
"""


def test_the_ranks_of_a_machine_download_each_shard_once(
    tmp_path: Path, bucket: CountingBucket
) -> None:
    facts = [save_shard(bucket.root / f"{n}.npz", input_ids=IDS) for n in range(8)]
    words = [bucket.root, tmp_path / "cache", "-", facts[0].tokens, facts[0].size]
    command = [sys.executable, "-c", READER, *map(str, words)]
    ranks = [
        subprocess.Popen(command, cwd=PROJECT_DIRECTORY, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [rank.communicate(timeout=60)[0].split() for rank in ranks]
    assert sum(int(downloads) for downloads, _ in outputs) == 8
    assert {total for _, total in outputs} == {str(8 * int(IDS.sum()))}


def test_what_a_killed_process_left_is_removed_at_the_next_start(
    tmp_path: Path, bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    facts = save_shard(bucket.root / NAME, input_ids=IDS)
    open_cache(facts).tokens(0)
    (whole,) = cached_files(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = platform.node()
    left = whole.with_name(f".tmp-{host}-{gone.pid}-1.npz")
    alive = whole.with_name(f".tmp-{host}-{os.getpid()}-1.tokens")
    elsewhere = whole.with_name(f".tmp-another-host-{gone.pid}-1.npz")
    for path in (left, alive, elsewhere):
        path.write_bytes(b"half")
    open_cache(facts)
    assert cached_files(tmp_path) == sorted([alive, elsewhere, whole])


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.sample_shards import CountingBucket
from utils.data.shard_cache import ShardCache
from utils.data.shard_index import (ShardFacts)

class Killer(CountingBucket):
    def fetch(self, name, scratch):
        scratch.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

root, cache, name, tokens, size = sys.argv[1:]
shards = [ShardFacts(name, int(tokens), int(size), None)]
ShardCache([(Killer(Path(root)), shards)], Path(cache), 100).tokens(0)
"""


def test_a_kill_in_the_middle_of_a_download_costs_that_download_only(
    tmp_path: Path, bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    facts = replace(save_shard(bucket.root / NAME, input_ids=IDS), crc32c=None)
    words = [bucket.root, tmp_path / "cache", NAME, facts.tokens, facts.size]
    process = run_python("-c", KILLED, *words)
    assert process.returncode == -signal.SIGKILL
    (left,) = cached_files(tmp_path)
    assert left.name.startswith(".tmp-")
    assert open_cache(facts).tokens(0).tolist() == IDS.tolist()  # the dead process' lock is free
    (whole,) = cached_files(tmp_path)
    assert whole.suffix == ".tokens"
    assert not whole.name.startswith(".")


class FailingBucket(CountingBucket):
    """Fails `failures` times for a while before it answers."""

    failures = 2

    def fetch(self, name: str, scratch: Path) -> Path:
        if self.failures:
            self.failures -= 1
            raise TransientStorageError("503")
        return super().fetch(name, scratch)


def test_a_bucket_that_fails_for_a_while_is_asked_again(
    tmp_path: Path, open_cache: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.data.shard_cache.FIRST_RETRY_SECONDS", 0.01)
    bucket = FailingBucket(tmp_path / "data")
    facts = save_shard(bucket.root / NAME, input_ids=IDS)
    assert open_cache(facts, using=bucket).tokens(0).tolist() == IDS.tolist()
    assert (bucket.failures, bucket.downloads) == (0, [NAME])


def test_a_bucket_that_stays_busy_is_given_up_with_its_own_words(
    open_cache: Callable[..., ShardCache], gcs: FakeGcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("GIVE_UP_SECONDS", 10.0), ("FIRST_RETRY_SECONDS", 4.0)):
        monkeypatch.setattr(f"utils.data.shard_cache.{name}", seconds)
    waited: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(waited))
    data = saved(input_ids=IDS)
    gcs.put_object("runs", NAME, data)
    gcs.add_fault(Fault("status", times=None, status=429))
    bucket = open_bucket("gs://runs", retry_seconds=0.1)
    cache = open_cache(ShardFacts(NAME, 100, len(data), None), using=bucket)

    def wait(seconds: float) -> None:
        waited.append(seconds)
        assert len(waited) < 5, "it is tried for ever"

    monkeypatch.setattr(cache._closing, "wait", wait)
    with monkeypatch.context() as patch:
        patch.setattr("utils.data.shard_cache.time", clock)
        with pytest.raises(TransientStorageError, match=f"gs://runs/{NAME}: .*429"):
            cache.tokens(0)
    assert waited == [4.0]  # the next wait would be over after the limit
    bucket.close()


def test_a_shard_of_many_blocks_is_decoded_in_little_memory(
    tmp_path: Path, bucket: CountingBucket, open_cache: Callable[..., ShardCache]
) -> None:
    rows = 3 * 2**20 // 8
    ids = (np.arange(rows * 8, dtype=np.int64) % 100).reshape(rows, 8)
    mask = np.ones_like(ids, dtype=np.uint8)
    mask[::3] = 0
    path = bucket.root / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, input_ids=ids, attention_mask=mask)
    facts = ShardFacts(NAME, int(mask.sum()), path.stat().st_size, None)
    tracemalloc.start()
    found = open_cache(facts).tokens(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(found, ids[mask != 0])
    assert peak < 40 * 2**20 < ids.nbytes + mask.nbytes + 20 * 2**20


def test_a_small_file_that_unpacks_to_much_is_refused_before_it_is_unpacked(
    tmp_path: Path,
) -> None:
    path = tmp_path / NAME
    np.savez_compressed(path, input_ids=np.zeros(110 * 2**20, np.uint16))
    assert path.stat().st_size < 300_000
    with pytest.raises(ShardError, match="unpacks to .* more than 100 times its"):
        next(decode_shard(path, NAME, 100))


class FullDisk(CountingBucket):
    """Says of a download what Google's does where the disk of this machine is full."""

    def fetch(self, name: str, scratch: Path) -> Path:
        raise TransientStorageError(name) from OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_at_once_and_named(
    tmp_path: Path, open_cache: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.data.shard_cache.GIVE_UP_SECONDS", 0)
    bucket = FullDisk(tmp_path / "data")
    facts = save_shard(bucket.root / NAME, input_ids=IDS)
    with pytest.raises(StorageError, match="cache cannot be written: No space left") as caught:
        open_cache(facts, using=bucket).tokens(0)
    assert not isinstance(caught.value, TransientStorageError)


LIMITED = """
import resource, sys
from pathlib import Path
from utils.base.errors import StorageError
from utils.data.shard_cache import ShardCache
from utils.data.shard_index import (ShardFacts)
from utils.storage.directory import DirectoryBucket

resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
cache = ShardCache(
    [(DirectoryBucket(Path("data")), [ShardFacts(sys.argv[1], 100, int(sys.argv[2]), None)])],
    Path(sys.argv[3]),
    100,
)
try:
    cache.tokens(0)
except StorageError as exc:
    print(exc)
"""


@pytest.mark.parametrize(("folder", "reason"), [("cache", "File too large"), ("data/" + NAME, "")])
def test_a_cache_that_cannot_be_written_is_told_by_its_folder(
    tmp_path: Path, folder: str, reason: str
) -> None:
    (tmp_path / "data").mkdir()
    facts = save_shard(tmp_path / "data" / NAME, input_ids=IDS)
    result = run_python("-c", LIMITED, NAME, facts.size, folder, cwd=tmp_path)
    assert result.stdout.startswith(f"{folder} cannot be written: {reason}"), result.stderr
    assert not list((tmp_path / "cache").rglob(".tmp-*"))
