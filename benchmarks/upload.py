"""Uploads of 1 GB of training state: each transport, the archive alone, training meanwhile.

The server is the tests' fake one, in a process of its own on this machine: it hashes what it takes
in, and shares the cores with whoever sends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.figures import interleave, ratios, spread, timed
from benchmarks.saving import SavingBench
from utils.base.archive_formats import BLOCK_BYTES, FAST_LEVEL
from utils.base.errors import UsageError
from utils.checkpoints.journal import Journal
from utils.checkpoints.layout import archive_object, read_manifest, sidecar_object
from utils.storage.open import open_bucket
from utils.uploads.archive import write_archive
from utils.uploads.command_transports import find_gsutil
from utils.uploads.job import UploadJob
from utils.uploads.process import run_in_process
from utils.uploads.transports import TransportOptions
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
        with serve(folder / "server") as environments:
            os.environ.update(environments["client"])
            return {
                "checkpoint": f"{read_manifest(checkpoint).total_bytes / 1e9:.2f} GB",
                **measure_archive(checkpoint, folder, runs),
                **measure_transports(checkpoint, folder, environments, runs),
                **measure_steps(bench, checkpoint, folder),
            }
    finally:
        bench.saver.close()


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


def measure_archive(checkpoint: Path, folder: Path, runs: int) -> dict[str, str]:
    """Compare the archive stream with `tar czf`, and with isal compressing from memory."""
    from isal import igzip_threaded

    manifest = read_manifest(checkpoint)
    data = memoryview(b"".join((checkpoint / name).read_bytes() for name in sorted(manifest.files)))

    def compress() -> None:
        with igzip_threaded.open(
            os.devnull, "wb", compresslevel=FAST_LEVEL, threads=1, block_size=BLOCK_BYTES
        ) as file:
            for start in range(0, len(data), BLOCK_BYTES):
                file.write(data[start : start + BLOCK_BYTES])

    def write() -> None:
        with Path(os.devnull).open("wb") as nowhere:
            write_archive(checkpoint, manifest, nowhere, threads=1)

    ways: dict[str, Callable[[], object]] = {
        "tar": partial(_tar, checkpoint, folder / "peer.tar.gz"),
        "ours": write,
        "isal": compress,
    }
    timers = {name: partial(timed, way) for name, way in ways.items()}
    seconds = interleave(timers, runs, warm_up=False)
    return {
        "tar czf": spread(seconds["tar"], " s"),
        "archive stream, 1 thread": spread(seconds["ours"], " s"),
        "archive stream against tar czf": spread(
            ratios(seconds["tar"], seconds["ours"]), "x faster"
        ),
        "archive stream over isal from memory": spread(
            ratios(seconds["ours"], seconds["isal"]), "x"
        ),
    }


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
    archive = folder / "peer.tar.gz"

    def send_by_gsutil() -> None:
        _tar(checkpoint, archive)
        target = f"gs://{BUCKET}/peer/{archive.name}"
        subprocess.run([gsutil, *GSUTIL_WORDS, str(archive), target], check=True)  # noqa: S603

    def send(options: TransportOptions) -> float:
        seconds = timed(partial(run_in_process, UploadJob(str(checkpoint), options, threads=2)))
        bucket = open_bucket(options.uri)
        for name in (archive_object(checkpoint.name), sidecar_object(checkpoint.name)):
            bucket.delete(name)
        bucket.close()
        return seconds

    ways = {
        "directory": TransportOptions(str(folder / "bucket"), "directory"),
        "python, 4 streams": TransportOptions(f"gs://{BUCKET}/run", "python"),
        "python, 1 stream": TransportOptions(f"gs://{BUCKET}/run", "python", streams=1),
        "gcloud": TransportOptions(f"gs://{BUCKET}/run", "gcloud"),
        "gsutil": TransportOptions(f"gs://{BUCKET}/run", "gsutil", scratch=str(folder)),
    }
    timers = {name: partial(send, options) for name, options in ways.items()}
    peer = "tar czf and gsutil cp"
    seconds = interleave({peer: partial(timed, send_by_gsutil), **timers}, runs, warm_up=False)
    return {
        peer: spread(seconds[peer], " s"),
        **{
            name: f"{spread(seconds[name], ' s')}, "
            f"{spread(ratios(seconds[peer], seconds[name]), 'x faster')}"
            for name in ways
        },
    }


def measure_steps(bench: SavingBench, checkpoint: Path, folder: Path) -> dict[str, str]:
    """Compare steps alone with steps while a checkpoint is archived and uploaded.

    Into a directory: in a real run the bucket's server does not share the cores with training.
    """
    uploaders: list[Uploader] = []
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            target = str(folder / f"beside-{len(uploaders)}")
            options = TransportOptions(target, "directory")
            uploader = Uploader(options, Journal(folder / "uploads.jsonl"))
            uploaders.append(stack.enter_context(uploader))
            uploader.submit(checkpoint)

        return bench.compare_steps(4, begin, lambda: bool(uploaders[-1].pending), "uploaded")
