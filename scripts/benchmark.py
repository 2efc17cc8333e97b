"""Measure this project against named peers in the same run, interleaved.

    checkpoint  how long a save keeps training waiting (peers: Accelerator.save_state,
            torch.distributed.checkpoint.async_save), steps while it is written, a run with five
            saves against the same run with none, host memory
    data    reading a warm cache (peer: np.memmap), going on at sample 10^9 of 10,000 shards, the
            first batch of a cold bucket (peer: downloading the same shards), host memory

Each figure is a median of interleaved runs with its spread; ratios compare runs side by side, so
that a machine that slows down slows both. `--json` prints everything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.console import run_command
from utils.errors import UsageError

SEQUENCE_LENGTH = 2048
MICRO_BATCH = 8
RUNS = 7
VOCABULARY = 50257


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--runs", type=int, default=RUNS, help="interleaved runs (default: 7)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Measure the parts; print them."""
    results: dict[str, Any] = {"machine": describe_machine()}
    for part in args.parts:
        if part not in PARTS:
            raise UsageError(f"{part!r} is no part of the benchmark: {', '.join(PARTS)}.")
        with tempfile.TemporaryDirectory() as folder:
            results[part] = PARTS[part](Path(folder), args.runs)
    if args.json:
        print(json.dumps(results, indent=1))
        return 0
    print(f"machine: {results.pop('machine')}")
    for part, figures in results.items():
        print(f"\n{part}")
        for name, figure in figures.items():
            print(f"  {name:<44} {figure}")
    return 0


def describe_machine() -> str:
    """Return CPU, cores, Python and torch in one line."""
    import torch

    cpu = platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, " + (
        f"torch {torch.__version__}, {platform.system()} {platform.release()}"
    )


def compare(
    ours: Callable[[], float], peer: Callable[[], float], runs: int
) -> tuple[list[float], list[float], list[float]]:
    """Return the rates of interleaved runs of both, and their ratios pair by pair."""
    ours(), peer()  # warm both
    pairs = [(ours(), peer()) for _ in range(runs)]
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return left, right, [a / b for a, b in pairs]


def spread(values: Sequence[float], unit: str = "", scale: float = 1.0) -> str:
    """Return the median with minimum and maximum."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle / scale:.2f}{unit} ({low / scale:.2f} to {high / scale:.2f})"


def measure_data(folder: Path, runs: int) -> dict[str, str]:
    """Measure the reading side of the data."""
    return {
        **measure_warm_cache(folder / "warm", runs),
        **measure_far_start(folder / "far", runs),
        **measure_cold_bucket(folder / "cold", runs),
        **measure_memory(folder / "memory"),
    }


def write_shards(folder: Path, num_shards: int, tokens: int) -> None:
    """Write shards of random ids with an index, as prepare_data does."""
    import numpy as np

    from utils.storage import crc32c_of_file

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []
    for number in range(num_shards):
        path = folder / f"train_{number:05}.npz"
        np.savez(path, input_ids=random.integers(0, VOCABULARY, tokens, dtype=np.uint16))
        row = {"name": path.name, "tokens": tokens, "size": path.stat().st_size}
        rows.append({**row, "crc32c": crc32c_of_file(path)})
    index = {"format": 1, "vocab_size": VOCABULARY, "shards": rows, "tokenizer_files": []}
    (folder / "index.json").write_text(json.dumps(index))


def build_reader(uri: str, cache: Path) -> Any:
    """Return a SampleReader over a bucket, as a run builds it."""
    from utils.data_utils import SampleReader
    from utils.sample_order import SampleOrder
    from utils.shard_cache import ShardCache
    from utils.shard_index import build_shard_index
    from utils.storage import open_bucket

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

    left, right, ratios = compare(lambda: rate(ours), lambda: rate(peer), runs)
    reader.cache.close()
    return {
        "warm cache, tokens/s": spread(left, " M", 1e6),
        "np.memmap loader, tokens/s": spread(right, " M", 1e6),
        "ratio": spread(ratios, "x"),
    }


def measure_far_start(folder: Path, runs: int) -> dict[str, str]:
    """Time from an index of 10,000 shards to the place of sample 10^9."""
    from utils.sample_order import SampleOrder
    from utils.shard_index import build_shard_index
    from utils.storage import open_bucket

    folder.mkdir()
    rows = [
        {"name": f"train_{n:05}.npz", "tokens": 50_000_000, "size": 10**8, "crc32c": "AAAAAA=="}
        for n in range(10_000)
    ]
    index = {"format": 1, "vocab_size": VOCABULARY, "shards": rows, "tokenizer_files": []}
    (folder / "index.json").write_text(json.dumps(index))
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        shards = build_shard_index(open_bucket(str(folder))).training
        order = SampleOrder([shard.tokens for shard in shards], SEQUENCE_LENGTH, 42, 8)
        order.upcoming_shards(10**9)
        order.locate(10**9, 512)
        order.shards_consumed(10**9)
        seconds.append(time.perf_counter() - begin)
    return {"ready at sample 10^9 of 10,000 shards": spread(seconds, " s")}


@contextmanager
def serve_bucket(folder: Path) -> Iterator[Any]:
    """Serve a directory as gs://corpus from the tests' fake server on 127.0.0.1."""
    from tests.gcs_server import FakeGcsServer

    with FakeGcsServer(folder / "server") as server:
        server.create_bucket("corpus")
        for path in (folder / "data").iterdir():
            server.put_object("corpus", path.name, path.read_bytes())
        os.environ.update(server.client_environment())
        yield server


def measure_cold_bucket(folder: Path, runs: int) -> dict[str, str]:
    """Time to the first batch of a cold gs:// bucket, and to download the shards it touches."""
    from utils.data_utils import BatchLoader
    from utils.storage import open_bucket

    write_shards(folder / "data", 1000, 2**18)
    extra = []
    firsts = []
    with serve_bucket(folder):
        for number in range(runs + 1):
            begin = time.perf_counter()
            reader = build_reader("gs://corpus", folder / f"cache-{number}")
            loader = BatchLoader(reader, position=0, micro_batch=MICRO_BATCH, accumulation=1)
            next(iter(loader))
            first = time.perf_counter() - begin
            loader.close()
            touched = {s.shard for n in range(MICRO_BATCH) for s in reader.order.spans(n)}
            bucket = open_bucket("gs://corpus")
            begin = time.perf_counter()
            for shard in touched:
                bucket.get_file(f"train_{shard:05}.npz", folder / "download")
            plain = time.perf_counter() - begin
            bucket.close()
            if number:  # the first is a warm-up
                firsts.append(first)
                extra.append(first - plain)
    return {
        "first batch, cold gs:// of 1,000 shards": spread(firsts, " s"),
        "of that beyond downloading what it touches": spread(extra, " s"),
    }


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def measure_memory(folder: Path) -> dict[str, str]:
    """Read 1,000 shards for two epochs through the loader; return the growth of host memory."""
    from utils.data_utils import BatchLoader

    write_shards(folder / "data", 1000, 2**18)
    reader = build_reader(str(folder / "data"), folder / "cache")
    per_epoch = reader.order.samples_per_epoch // 64
    before = anonymous_bytes()
    loader = BatchLoader(reader, position=0, micro_batch=8, accumulation=8)
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


def measure_checkpoint(folder: Path, runs: int) -> dict[str, str]:
    """Measure saving: a GPT-NeoX of 70M parameters on a CPU, the 1.2B one on a GPU."""
    bench = SavingBench(folder)
    try:
        return {**bench.measure_blocking(runs), **bench.measure_steps(runs), **bench.measure_run(3)}
    finally:
        bench.close()


class SavingBench:
    """A train state with its saver, as a run builds them."""

    def __init__(self, folder: Path) -> None:
        import torch
        from accelerate.state import AcceleratorState

        from configs.model_config import build_model_config
        from configs.training_config import get_training_config
        from utils.checkpoint_saver import CheckpointSaver
        from utils.machine import available_memory
        from utils.snapshot import Snapshot
        from utils.training_utils import (
            build_accelerator,
            build_train_state,
            resolve_precision,
            set_determinism,
        )

        AcceleratorState._reset_state(reset_partial_state=True)
        self.folder = folder
        on_gpu = torch.cuda.is_available()
        shape = {
            "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
            "intermediate_size": 2048, "vocab_size": VOCABULARY,
        }  # fmt: skip
        overrides: dict[str, Any] = {f"model_overrides.{k}": v for k, v in shape.items()}
        overrides["global_batch_size"] = 1
        if on_gpu:
            overrides = {"model": "refocused-1.2b", "sequence_length": 2048,
                         "per_device_train_batch_size": 8, "global_batch_size": 16}  # fmt: skip
        self.config = get_training_config("test", {**overrides, "max_steps": 10**6})
        model_config = build_model_config(
            self.config.model, self.config.model_overrides, self.config.sequence_length
        )
        precision = resolve_precision(self.config)
        self.accelerator = build_accelerator(self.config, precision, [], folder)
        set_determinism(self.config)
        self.state = build_train_state(self.accelerator, model_config, self.config)
        tokens = (self.config.per_device_train_batch_size, 2048 if on_gpu else 128)
        self.batches = [torch.randint(0, VOCABULARY, tokens) for _ in range(2 if on_gpu else 1)]
        self.number = 0
        self.saver = CheckpointSaver(
            folder / "ours", self.accelerator.device, lambda checkpoint: None
        )
        self.step()
        size = 3 * Snapshot.size_of(list(self.state.core_model.state_dict().values())) + 2**20
        self.saver.prepare(size, available_memory())
        while self.saver._writer is not None and not self.saver._writer.is_ready():
            time.sleep(0.1)
        self.parameters = sum(p.numel() for p in self.state.core_model.parameters())

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self) -> float:
        """Do one step; return its seconds."""
        from utils.training_utils import train_step

        begin = time.perf_counter()
        train_step(self.state, self.batches, 1.0, None, self.saver.fence)
        self.synchronize()
        return time.perf_counter() - begin

    def save(self) -> float:
        """Begin to save as a run does; return the seconds that training waits."""
        from utils.checkpoint_utils import capture_random_state, collect_files
        from utils.data_state import DataState
        from utils.layout import RunIdentity
        from utils.machine import available_memory

        self.number += 1
        self.state.progress.step = self.number
        begin = time.perf_counter()
        files = collect_files(
            self.state,
            DataState(0, 0, 0, 128, 0, 1, ()),
            self.config,
            RunIdentity("20260101-0a1b2c3d"),
            [capture_random_state(self.state)],
            {},
        )
        self.saver.save(files, available_memory())
        return time.perf_counter() - begin

    def finish_save(self) -> None:
        """Wait for the commit; remove what was written."""
        import shutil

        self.saver.wait()
        if self.saver.failure is not None:
            raise self.saver.failure
        shutil.rmtree(self.folder / "ours")
        (self.folder / "ours").mkdir()

    def save_by_accelerate(self) -> float:
        """Return the seconds of Accelerator.save_state of the same state."""
        import shutil

        begin = time.perf_counter()
        self.accelerator.save_state(str(self.folder / "accelerate"))
        seconds = time.perf_counter() - begin
        shutil.rmtree(self.folder / "accelerate")
        return seconds

    def save_by_dcp(self) -> float:
        """Return the seconds until torch's async_save of the same state returns."""
        import shutil

        from torch.distributed.checkpoint.state_dict_saver import async_save

        state = {
            "model": self.state.core_model.state_dict(),
            "optimizer": self.state.optimizer.state_dict()["state"],
        }
        begin = time.perf_counter()
        saving: Any = async_save(state, checkpoint_id=str(self.folder / "dcp"))
        seconds = time.perf_counter() - begin
        saving.result()
        shutil.rmtree(self.folder / "dcp")
        return seconds

    def measure_blocking(self, runs: int) -> dict[str, str]:
        """Compare how long training waits for a save; ours and the peers take turns."""
        import torch.distributed

        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{self.folder / 'meeting-point'}",
            rank=0,
            world_size=1,
        )
        ways = {"ours": self.save, "accelerate": self.save_by_accelerate, "dcp": self.save_by_dcp}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        commits = []
        try:
            for number in range(runs + 1):
                for way, measure in ways.items():
                    os.sync()  # what the one before wrote is no burden to this one
                    self.step()
                    taken = measure()
                    if way == "ours":
                        self.finish_save()
                        commits.append(self.saver.last_seconds or 0.0)
                    if number:  # the first is a warm-up
                        seconds[way].append(taken)
        finally:
            torch.distributed.destroy_process_group()
        shares = {
            way: [100 * a / b for a, b in zip(seconds["ours"], seconds[way], strict=True)]
            for way in ("accelerate", "dcp")
        }
        return {
            "parameters": f"{self.parameters / 1e6:.0f} M",
            "training waits for a save": spread(seconds["ours"], " ms", 1e-3),
            "Accelerator.save_state of the same state": spread(seconds["accelerate"], " ms", 1e-3),
            "share of it": spread(shares["accelerate"], "%"),
            "torch async_save until it returns": spread(seconds["dcp"], " ms", 1e-3),
            "share of that": spread(shares["dcp"], "%"),
            "from the beginning of a save to its commit": spread(commits[1:], " s"),
        }

    def measure_steps(self, runs: int) -> dict[str, str]:
        """Compare steps beside a save in progress with steps alone."""
        alone, beside = [], []
        for _ in range(runs):
            alone += [self.step() for _ in range(4)]
            self.save()
            while self.saver.is_busy:
                seconds = self.step()
                if self.saver.is_busy:
                    beside.append(seconds)
            self.finish_save()
        ratio = statistics.median(beside) / statistics.median(alone)
        return {
            "a step alone": spread(alone, " ms", 1e-3),
            "a step while a checkpoint is written": spread(beside, " ms", 1e-3),
            "ratio of the medians": f"{ratio:.3f}x",
        }

    def measure_run(self, runs: int, steps: int = 50) -> dict[str, str]:
        """Compare a run of 50 steps with five saves with the same run without."""

        def train(saves: int) -> float:
            begin = time.perf_counter()
            for number in range(1, steps + 1):
                self.step()
                if saves and number % (steps // saves) == 0:
                    self.saver.wait()
                    self.save()
            self.saver.wait()
            seconds = time.perf_counter() - begin
            if saves:
                self.finish_save()
            return seconds

        ratios, before = [], anonymous_bytes()
        for _ in range(runs):
            plain = train(0)
            ratios.append(train(5) / plain)
        return {
            f"{steps} steps with 5 saves against none": spread(ratios, "x"),
            "growth of host memory over these runs": (
                f"{(anonymous_bytes() - before) / 2**20:.1f} MiB"
            ),
        }

    def close(self) -> None:
        """End the saver."""
        self.saver.close()


PARTS: dict[str, Callable[[Path, int], dict[str, str]]] = {
    "checkpoint": measure_checkpoint,
    "data": measure_data,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
