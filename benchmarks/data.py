"""The reading side of the data: a warm cache, a far start, a cold bucket, host memory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.figures import anonymous_bytes, interleave, ratios, spread, timed

SEQUENCE_LENGTH = 2048
MICRO_BATCH = 8
VOCABULARY = 50257


def measure_data(folder: Path, runs: int) -> dict[str, str]:
    """Measure the reading side of the data."""
    return {
        **measure_warm_cache(folder / "warm", runs),
        **measure_far_start(folder / "far", runs),
        **measure_cold_bucket(folder / "cold", runs, 1_000, 2**18),
        **measure_cold_bucket(folder / "many", runs, 10_000, 2**12),
        **measure_memory(folder / "memory"),
    }


def write_shards(folder: Path, num_shards: int, tokens: int) -> None:
    """Write shards of random ids with an index, as prepare_data does."""
    import numpy as np

    from tests.sample_shards import save_shard

    random = np.random.default_rng(0)
    shards = [
        save_shard(
            folder / f"train_{number:05}.npz",
            input_ids=random.integers(0, VOCABULARY, tokens, dtype=np.uint16),
        )
        for number in range(num_shards)
    ]
    write_index(folder, [asdict(shard) for shard in shards])


def write_index(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the index of shards, as prepare_data does."""
    index = {"format": 1, "vocab_size": VOCABULARY, "shards": rows, "tokenizer_files": []}
    (folder / "index.json").write_text(json.dumps(index))


def build_reader(uri: str, cache: Path) -> Any:
    """Return a SampleReader over a bucket, as a run builds it."""
    from utils.data.sample_order import SampleOrder
    from utils.data.shard_cache import ShardCache
    from utils.data.shard_index import build_shard_index
    from utils.data_utils import SampleReader
    from utils.storage.open import open_bucket

    bucket = open_bucket(uri)
    index = build_shard_index(bucket)
    order = SampleOrder([s.tokens for s in index.training], SEQUENCE_LENGTH, 42, 8)
    return SampleReader(order, ShardCache([(bucket, index.training)], cache, VOCABULARY))


def measure_warm_cache(folder: Path, runs: int) -> dict[str, str]:
    """Compare reading samples from a warm cache with a plain np.memmap loader.

    The peer has the epoch's stream in one file and the shuffled offsets ready in a list; both make
    int64 tensors [8, 2048] of the same tokens in the same order.
    """
    import numpy as np
    import torch

    write_shards(folder / "data", 16, 4 * 2**20)
    reader = build_reader(str(folder / "data"), folder / "cache")
    order = reader.order.epoch(0)
    stream = np.concatenate([reader.cache.tokens(int(shard)) for shard in order.shards])
    (folder / "stream.bin").write_bytes(stream.tobytes())
    memmap = np.memmap(folder / "stream.bin", dtype=np.uint16, mode="r")
    count = reader.order.samples_per_epoch // MICRO_BATCH * MICRO_BATCH
    starts = [order._stream_sample(sample) * SEQUENCE_LENGTH for sample in range(count)]

    def ours() -> Iterator[torch.Tensor]:
        for first in range(0, count, MICRO_BATCH):
            yield torch.from_numpy(reader.read(first, MICRO_BATCH))

    def peer() -> Iterator[torch.Tensor]:
        for first in range(0, count, MICRO_BATCH):
            rows = [
                memmap[start : start + SEQUENCE_LENGTH].astype(np.int64)
                for start in starts[first : first + MICRO_BATCH]
            ]
            yield torch.from_numpy(np.stack(rows))

    for batch, expected in zip(ours(), peer(), strict=True):
        assert torch.equal(batch, expected)  # the same tokens in the same order

    def rate(batches: Callable[[], Iterator[torch.Tensor]]) -> float:
        begin = time.perf_counter()
        tokens = sum(batch.numel() for batch in batches())
        return tokens / (time.perf_counter() - begin)

    rates = interleave({"ours": lambda: rate(ours), "peer": lambda: rate(peer)}, runs)
    reader.cache.close()
    return {
        "warm cache, tokens/s": spread(rates["ours"], " M", 1e6),
        "np.memmap loader, tokens/s": spread(rates["peer"], " M", 1e6),
        "ratio": spread(ratios(rates["ours"], rates["peer"]), "x"),
    }


def measure_far_start(folder: Path, runs: int) -> dict[str, str]:
    """Time from an index of 10,000 shards to the place of sample 10^9."""
    from utils.data.sample_order import SampleOrder
    from utils.data.shard_index import build_shard_index
    from utils.storage.open import open_bucket

    folder.mkdir()
    rows = [
        {"name": f"train_{n:05}.npz", "tokens": 50_000_000, "size": 10**8, "crc32c": "AAAAAA=="}
        for n in range(10_000)
    ]
    write_index(folder, rows)

    def find_place() -> None:
        shards = build_shard_index(open_bucket(str(folder))).training
        order = SampleOrder([shard.tokens for shard in shards], SEQUENCE_LENGTH, 42, 8)
        order.upcoming_shards(10**9)
        order.locate(10**9, 512)
        order.shards_consumed(10**9)

    seconds = [timed(find_place) for _ in range(runs)]
    return {"ready at sample 10^9 of 10,000 shards": spread(seconds, " s")}


def measure_cold_bucket(folder: Path, runs: int, num_shards: int, tokens: int) -> dict[str, str]:
    """Time to list a cold gs:// bucket, to its first batch, and to download what that touches."""
    from tests.gcs_server import FakeGcsServer
    from utils.data_utils import BatchLoader, StepShape
    from utils.storage.open import open_bucket

    write_shards(folder / "data", num_shards, tokens)
    lists, firsts, extra = [], [], []
    with FakeGcsServer(folder / "server") as server:
        server.create_bucket("corpus")
        for path in (folder / "data").iterdir():
            server.put_object("corpus", path.name, path.read_bytes())
        os.environ.update(server.client_environment())
        for number in range(runs + 1):
            begin = time.perf_counter()
            reader = build_reader("gs://corpus", folder / f"cache-{number}")
            loader = BatchLoader(reader, StepShape(MICRO_BATCH, 1), position=0)
            next(iter(loader))
            first = time.perf_counter() - begin
            loader.close()
            touched = {s.shard for n in range(MICRO_BATCH) for s in reader.order.spans(n)}
            bucket = open_bucket("gs://corpus")
            begin = time.perf_counter()
            for shard in touched:
                bucket.get_file(f"train_{shard:05}.npz", folder / "download")
            plain = time.perf_counter() - begin
            begin = time.perf_counter()
            assert len(list(bucket.list())) == num_shards + 1
            listed = time.perf_counter() - begin
            bucket.close()
            if number:  # the first is a warm-up
                lists.append(listed)
                firsts.append(first)
                extra.append(first - plain)
    what = f"cold gs:// of {num_shards:,} shards"
    return {
        f"listing, {what}": spread(lists, " s"),
        f"first batch, {what}": spread(firsts, " s"),
        f"of that beyond downloading what it touches, {num_shards:,}": spread(extra, " s"),
    }


def measure_memory(folder: Path) -> dict[str, str]:
    """Read 1,000 shards for two epochs through the loader; return the growth of host memory."""
    from utils.data_utils import BatchLoader, StepShape

    write_shards(folder / "data", 1000, 2**18)
    reader = build_reader(str(folder / "data"), folder / "cache")
    per_epoch = reader.order.samples_per_epoch // 64
    before = anonymous_bytes()
    loader = BatchLoader(reader, StepShape(8, 8), position=0)
    peaks = [0, 0]
    for step, _ in enumerate(loader):
        if step % 16 == 0:
            epoch = min(step // per_epoch, 1)
            peaks[epoch] = max(peaks[epoch], anonymous_bytes() - before)
        if step >= 2 * per_epoch:
            break
    loader.close()
    return {
        f"host memory, epoch {number + 1} of 1,000 shards": f"{peak / 2**20:.1f} MiB more"
        for number, peak in enumerate(peaks)
    }
