"""A trainer without a model, for campaigns: saves checkpoints of known content, uploads them.

    plan -> checkpoint directory (committed) -> uploader -> bucket, verified
    plan -> ledger: what was saved and how large this process is

`python -m tests.campaigns.stand_in_trainer PLAN.json` is one start of a run. It does with
checkpoints what `utils/run/saving.py` does. Every byte that it saves follows from the plan's seed
and the step, so that whoever starts it can tell what must be there. No torch here.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from configs.training_config import get_training_config
from utils.base.console import configure_logging
from utils.base.errors import ExitCode
from utils.checkpoints.journal import Journal
from utils.checkpoints.layout import (
    MANIFEST_FILE,
    METADATA_FILE,
    SAVING_PREFIX,
    CheckpointName,
    FileEntry,
    Manifest,
    RunPaths,
    read_json,
    write_json,
)
from utils.checkpoints.store import apply_retention, hold_output_directory, remove_leftovers
from utils.storage.bucket import crc32c_of_bytes, fsync_directory
from utils.uploads import process as upload_process
from utils.uploads import uploader
from utils.uploads.transport_choice import configured_transport
from utils.uploads.uploader import Uploader, find_unfinished

GRACE_SECONDS = 2.0  # for uploads after SIGTERM
# Waits made for real buckets are longer: a campaign cannot wait for them.
RETRY_SECONDS, FIRST_BACKOFF_SECONDS, LATER_SECONDS, MARGIN_SECONDS = 3.0, 0.1, 5.0, 3.0

Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TrainerPlan:
    """One start; plain values, so that it can be written down.

    Attributes:
        settings: Keys of the training configuration: directories, bucket, transport, retention.
        run_id: The run.
        seed: Decides the content of checkpoints.
        sizes: Least and most bytes of the weights; one of the ranges is drawn for each checkpoint.
        first_step: Step of the first checkpoint; each step has one.
        saves: Checkpoints to save.
        ledger: File for what was done.
        pause_seconds: Between two saves.
        is_paced: Wait for each upload before the next save, and note this process's size.
        drain_seconds: How long to wait for uploads at the end.
    """

    settings: dict[str, Any]
    run_id: str
    seed: int
    sizes: Sizes
    first_step: int
    saves: int
    ledger: str
    pause_seconds: float
    is_paced: bool
    drain_seconds: float

    def write(self, path: Path) -> None:
        """Write the plan down."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> TrainerPlan:
        """Return a plan that was written down."""
        values = read_json(path)
        sizes = tuple((int(low), int(high)) for low, high in values.pop("sizes"))
        return cls(sizes=sizes, **values)


def loss_at(seed: int, step: int) -> float:
    """Return the validation loss of a step: any number, so that the best is not the newest."""
    return random.Random(f"loss/{seed}/{step}").uniform(1.0, 9.0)


def build_files(seed: int, step: int, sizes: Sizes) -> dict[str, bytes]:
    """Return the files of the checkpoint of a step; what there is of weights hardly compresses."""
    source = random.Random(f"files/{seed}/{step}")
    low, high = source.choice(sizes)
    size = int(low * (high / low) ** source.random())
    loss = loss_at(seed, step)
    metadata = {"step": step, "current_loss": loss, "validation_metrics": {"validation_loss": loss}}
    return {
        "model.safetensors": source.randbytes(size),
        "optimizer.bin": bytes(size // 8) + source.randbytes(64),
        METADATA_FILE: json.dumps(metadata).encode(),
    }


def build_entries(files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Return size and checksum of each file, as its manifest has them."""
    return {name: FileEntry(len(data), crc32c_of_bytes(data)) for name, data in files.items()}


def save_checkpoint(directory: Path, run_id: str, step: int, files: Mapping[str, bytes]) -> Path:
    """Write and commit a checkpoint; return its directory."""
    name = str(CheckpointName(step, 0, 0))
    temporary = directory / f"{SAVING_PREFIX}{name}"
    temporary.mkdir()
    for file, data in files.items():
        (temporary / file).write_bytes(data)
    manifest = Manifest(run_id, step, 0, 1, build_entries(files))
    write_json(temporary / MANIFEST_FILE, manifest.to_json())
    fsync_directory(temporary)
    target = temporary.rename(directory / name)
    fsync_directory(directory)
    return target


def note(ledger: Path, event: str, **facts: object) -> None:
    """Append a line to what a start has done; a kill takes none that was written."""
    with ledger.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, **facts}) + "\n")


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a ledger."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


class StandIn:
    """One start."""

    def __init__(self, plan: TrainerPlan) -> None:
        self._plan = plan
        self._config = get_training_config("test", plan.settings)
        self._paths = RunPaths.of(self._config)
        self._journal = Journal(self._paths.journal)
        self._ledger = Path(plan.ledger)
        self._stopped = threading.Event()

    def stop(self, *_: object) -> None:
        """Ask for the end: SIGTERM."""
        self._stopped.set()

    def run(self) -> ExitCode:
        """Save, upload, keep by rule; return as a run does."""
        with hold_output_directory(self._paths):
            directory = self._paths.checkpoints
            remove_leftovers(directory)
            self._journal.compact()
            options = configured_transport(self._config, directory)
            options = replace(options, retry_seconds=RETRY_SECONDS)
            with Uploader(
                options,
                self._journal,
                should_sweep=True,
                first_backoff_seconds=FIRST_BACKOFF_SECONDS,
            ) as uploading:
                for checkpoint in find_unfinished(directory, self._journal, options.uri):
                    uploading.submit(checkpoint)
                self._train(uploading)
                missing = self._finish(uploading)
        if missing:
            return ExitCode.NOT_VERIFIED
        return ExitCode.STOPPED if self._stopped.is_set() else ExitCode.DONE

    def _train(self, uploading: Uploader) -> None:
        first = self._plan.first_step
        for step in range(first, first + self._plan.saves):
            if self._stopped.is_set():
                return
            files = build_files(self._plan.seed, step, self._plan.sizes)
            checkpoint = save_checkpoint(self._paths.checkpoints, self._plan.run_id, step, files)
            note(self._ledger, "saved", step=step)
            uploading.submit(checkpoint)
            self._apply_retention(uploading)
            if self._plan.is_paced:
                self._wait(uploading, self._plan.drain_seconds)
                note(self._ledger, "size", uploads=len(uploading.verified), **measure_process())
            self._stopped.wait(self._plan.pause_seconds)

    def _finish(self, uploading: Uploader) -> list[str]:
        left = self._wait(uploading, self._plan.drain_seconds)
        if self._stopped.is_set():
            left = uploading.drain(GRACE_SECONDS, lambda text: None)
        self._apply_retention(uploading)
        return [*left, *uploading.failures]

    def _wait(self, uploading: Uploader, seconds: float) -> list[str]:
        return uploading.drain(seconds, lambda text: None, self._stopped.is_set)

    def _apply_retention(self, uploading: Uploader) -> None:
        given_up = apply_retention(
            self._paths.checkpoints,
            self._journal,
            self._config,
            run_id=self._plan.run_id,
            is_uploading_on=True,
        )
        uploading.forget(given_up)


def measure_process() -> dict[str, int]:
    """Return what of this process must not grow: bytes in memory, threads, files, children."""
    process = psutil.Process()
    return {
        "rss": process.memory_info().rss,
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "children": len(process.children(recursive=True)),
    }


def main(argv: Sequence[str]) -> int:
    """Entry of the process: the file of its plan."""
    plan = TrainerPlan.read(Path(argv[0]))
    configure_logging("info")
    upload_process.STALL_MARGIN_SECONDS = MARGIN_SECONDS
    uploader.LATER_SECONDS = LATER_SECONDS
    trainer = StandIn(plan)
    signal.signal(signal.SIGTERM, trainer.stop)
    return int(trainer.run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
