"""Uploads of 1 GB of training state: each transport, the archive alone, training meanwhile.

The server is the tests' fake one, in a process of its own on this machine: it hashes what it takes
in, and shares the cores with whoever sends. Its own intake rate is reported too, measured with
bytes from memory.
"""

from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.figures import spread
from benchmarks.saving import SavingBench
from utils.base.archive_formats import BLOCK_BYTES, FAST_LEVEL
from utils.base.errors import UsageError
from utils.checkpoints.journal import Journal
from utils.checkpoints.layout import archive_object, read_manifest, sidecar_object
from utils.storage.bucket import Nowhere
from utils.storage.open import open_bucket
from utils.uploads.archive import write_archive
from utils.uploads.job import UploadJob
from utils.uploads.process import run_in_process
from utils.uploads.transports import TransportOptions, find_gsutil
from utils.uploads.uploader import Uploader

MAX_RUNS = 3
WARM_STEPS = 8
BUCKET = "runs"
# About 91M parameters, whose every embedding is trained: state that compresses as a run's does.
SHAPE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 4096,
}
GSUTIL_WORDS = ["-q", "-o", "GSUtil:parallel_composite_upload_threshold=0", "cp"]


def measure_upload(folder: Path, runs: int) -> dict[str, str]:
    """Measure archives and uploads; at most three runs, because the peer takes most of a minute."""
    runs = min(runs, MAX_RUNS)
    bench = SavingBench(folder, SHAPE)
    try:
        for _ in range(WARM_STEPS):
            bench.step()
        bench.save()
        bench.saver.wait()
        checkpoint = next((folder / "ours").glob("checkpoint-*"))
        with _environment(), serve(folder / "server") as environments:
            os.environ.update(environments["client"])
            return {
                "checkpoint": f"{read_manifest(checkpoint).total_bytes / 1e9:.2f} GB",
                **measure_archive(checkpoint, folder, runs),
                **measure_transports(checkpoint, folder, environments, runs),
                **measure_steps(bench, checkpoint, folder),
            }
    finally:
        bench.close()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[dict[str, dict[str, str]]]:
    """Run the fake server in another process; yield the variables for each client."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(str(folder), theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join()


def _serve(folder: str, connection: Connection) -> None:
    from tests.gcs_server import FakeGcsServer

    root = Path(folder)
    with FakeGcsServer(root / "objects", tls=True) as server:
        server.create_bucket(BUCKET)
        connection.send(
            {
                "client": server.client_environment(),
                "gcloud": server.gcloud_environment(root),
                "gsutil": server.gsutil_environment(root),
            }
        )
        with contextlib.suppress(EOFError):
            connection.recv()


def timed(action: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure_archive(checkpoint: Path, folder: Path, runs: int) -> dict[str, str]:
    """Compare the archive stream with `tar czf`, and with isal compressing from memory."""
    from isal import igzip_threaded

    manifest = read_manifest(checkpoint)
    data = b"".join((checkpoint / name).read_bytes() for name in sorted(manifest.files))
    peer = folder / "peer.tar.gz"
    nowhere: Any = Nowhere()
    results = {}
    sizes = {}

    def compress(threads: int) -> None:
        view = memoryview(data)
        with igzip_threaded.open(
            nowhere, "wb", compresslevel=FAST_LEVEL, threads=threads, block_size=BLOCK_BYTES
        ) as file:
            for start in range(0, len(view), BLOCK_BYTES):
                file.write(view[start : start + BLOCK_BYTES])

    tars, alone, ratios = [], [], []
    for _ in range(runs):
        tars.append(timed(lambda: _tar(checkpoint, peer)))
        for threads in (1, 2):
            seconds = timed(partial(write_archive, checkpoint, manifest, nowhere, threads=threads))
            if threads == 1:
                alone.append(seconds)
            ratios.append(seconds / timed(partial(compress, threads)))
    results["tar czf"] = spread(tars, " s")
    results["archive stream, 1 thread"] = spread(alone, " s")
    pairs = [tar / ours for tar, ours in zip(tars, alone, strict=True)]
    results["archive stream against tar czf"] = spread(pairs, "x faster")
    results["archive stream over isal from memory"] = spread(ratios, "x")
    for name in ("fast", "small", "none"):
        sizes[name] = write_archive(checkpoint, manifest, nowhere, compression=name).size
        share = sizes[name] / peer.stat().st_size
        results[f"size, {name}, over that of tar czf"] = f"{share:.4f}x"
    peer.unlink()
    return results


def _tar(checkpoint: Path, target: Path) -> None:
    words = ["tar", "czf", str(target), "-C", str(checkpoint.parent), checkpoint.name]
    subprocess.run(words, check=True)  # noqa: S603


def measure_transports(
    checkpoint: Path, folder: Path, environments: dict[str, dict[str, str]], runs: int
) -> dict[str, str]:
    """Compare each transport, end to end, with `tar czf` and `gsutil cp`, interleaved."""
    gsutil = find_gsutil()
    if gsutil is None:
        raise UsageError("gsutil is not installed. Run: bash setup.sh")
    os.environ.update(environments["gcloud"])
    os.environ.update(environments["gsutil"])
    size = archive_size(checkpoint)
    peer_archive = folder / "peer.tar.gz"

    def peer() -> None:
        _tar(checkpoint, peer_archive)
        target = f"gs://{BUCKET}/peer/{peer_archive.name}"
        subprocess.run([gsutil, *GSUTIL_WORDS, str(peer_archive), target], check=True)  # noqa: S603
        peer_archive.unlink()

    ways = {
        "directory": TransportOptions(str(folder / "bucket"), "directory"),
        "python, 4 streams": TransportOptions(f"gs://{BUCKET}/run", "python"),
        "python, 1 stream": TransportOptions(f"gs://{BUCKET}/run", "python", streams=1),
        "gcloud": TransportOptions(f"gs://{BUCKET}/run", "gcloud"),
        "gsutil": TransportOptions(f"gs://{BUCKET}/run", "gsutil", scratch=str(folder)),
    }
    peers: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    intake = []
    for _ in range(runs):
        peers.append(timed(peer))
        for name, options in ways.items():
            job = UploadJob(str(checkpoint), options, threads=2)
            seconds[name].append(timed(partial(run_in_process, job)))
            _remove(options.uri, checkpoint.name)
        intake.append(size / timed(lambda: _send(size)))
    results = {
        "server's intake from memory": spread(intake, " MB/s", 1e6),
        "tar czf and gsutil cp": spread(peers, " s"),
    }
    for name, own in seconds.items():
        ratios = [peer_seconds / mine for peer_seconds, mine in zip(peers, own, strict=True)]
        results[name] = f"{spread(own, ' s')}, {spread(ratios, 'x faster')}"
    return results


def archive_size(checkpoint: Path) -> int:
    """Return the bytes of a checkpoint's archive."""
    nowhere: Any = Nowhere()
    return write_archive(checkpoint, read_manifest(checkpoint), nowhere, threads=2).size


def _remove(uri: str, name: str) -> None:
    bucket = open_bucket(uri)
    for object_name in (archive_object(name), sidecar_object(name)):
        bucket.delete(object_name)
    bucket.close()


def _send(size: int) -> None:
    """Send bytes that are in memory to the server, over one plain connection."""
    address = os.environ["STORAGE_EMULATOR_HOST"].removeprefix("http://")
    connection = http.client.HTTPConnection(address)
    block = os.urandom(BLOCK_BYTES)
    path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name=intake"
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(size))
    connection.endheaders()
    for start in range(0, size, BLOCK_BYTES):
        connection.send(block[: min(BLOCK_BYTES, size - start)])
    if connection.getresponse().status != http.client.OK:
        raise UsageError("the server did not take the bytes")
    connection.close()


def measure_steps(bench: SavingBench, checkpoint: Path, folder: Path) -> dict[str, str]:
    """Compare steps alone with steps while a checkpoint is archived and uploaded.

    Into a directory: the fake server would take cores that are another machine's in life.
    """
    alone: list[float] = []
    beside: list[float] = []
    target = folder / "beside"
    for number in range(4):
        alone += [bench.step() for _ in range(4)]
        options = TransportOptions(str(target / str(number)), "directory")
        with Uploader(options, Journal(folder / "uploads.jsonl")) as uploader:
            uploader.submit(checkpoint)
            while uploader.pending:
                seconds = bench.step()
                if uploader.pending:
                    beside.append(seconds)
        shutil.rmtree(target)
    ratio = statistics.median(beside) / statistics.median(alone)
    return {
        "a step alone": spread(alone, " ms", 1e-3),
        "a step while a checkpoint is uploaded": spread(beside, " ms", 1e-3),
        "ratio of the medians": f"{ratio:.3f}x",
    }
