"""Saves in the background: snapshot at the step, written by another process, committed here.

    train state -> snapshot (host memory) -> writer process -> commit -> `on_commit`

Training waits for the snapshot alone. One snapshot is written at a time; the caller asks `is_busy`
before it takes the next. A save that fails leaves what was there intact and is kept in `failure`.

Where ranks hold parts of the state, each has a saver, and their writers write into one directory.
The savers meet when all have written, or failed to: the main one then seals and commits, or not.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from utils.base.errors import SaveError
from utils.base.text import format_bytes, format_duration
from utils.checkpoints.files import CheckpointFiles, seal, write_files
from utils.checkpoints.layout import SAVING_PREFIX, CheckpointName, Manifest
from utils.checkpoints.snapshot import HostBlock, Snapshot
from utils.checkpoints.writer import WriterGoneError, WriterProcess, fill_slots
from utils.storage.bucket import fsync_directory

VISIBLE_SECONDS = 30.0
LOOK_SECONDS = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rendezvous:
    """Where the savers of all ranks meet, once a save, each in its saver's thread.

    Attributes:
        token: The same for all savers of an attempt, and of no other one: part of the name of the
            directory that they write into, so that a writer of an attempt that has ended on another
            machine, and does not know it yet, never writes into a checkpoint of this one.
        gather: Returns what all ranks brought, on the main one; None on the others. It fails where
            a rank has gone.
    """

    token: str
    gather: Callable[[Manifest | str], list[Manifest | str] | None]


class CheckpointSaver:
    """Writes checkpoints of one run, one after the other.

    `on_commit` is called in the saver's thread with each committed checkpoint. Without
    `background`, `save` writes within the call and takes no snapshot. `rendezvous` is where the
    savers of all ranks meet, if each saves a part. `writer` is a process that has been started
    already, for the first snapshot; whoever made it closes it too.
    """

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        on_commit: Callable[[Path], None],
        *,
        background: bool = True,
        rendezvous: Rendezvous | None = None,
        writer: WriterProcess | None = None,
    ) -> None:
        self.failure: SaveError | None = None
        """Why the last save failed, None when it did not."""
        self.last_committed: CheckpointName | None = None
        """The newest checkpoint that this saver has committed."""
        self.last_seconds: float | None = None
        """From the beginning of the last committed save to its commit."""
        self._directory, self._device, self._on_commit = directory, device, on_commit
        self._background, self._rendezvous = background, rendezvous
        self._snapshot: Snapshot | None = None
        self._early_writer = writer
        self._writer: WriterProcess | None = None
        self._can_start_writer = True
        self._warming: threading.Thread | None = None
        self._thread: threading.Thread | None = None

    def prepare(self, size: int, free_memory: int) -> None:
        """Make room for snapshots and have a writer process; call it in the main thread.

        With less `free_memory` than `size`, in bytes, the snapshot goes into a file of the
        checkpoint directory.
        """
        if not self._background:
            return
        self._release()
        in_memory = size <= free_memory
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            block = HostBlock.allocate(size, None if in_memory else self._directory)
        except OSError as exc:
            log.warning(
                "No room for a snapshot of %s (%s): training waits while a checkpoint is written.",
                format_bytes(size),
                exc.strerror or exc,
            )
            self._background = False
            return
        if block.kind == "file":
            log.warning(
                "Snapshots go through a file in %s: %s of memory are not free. Saving is slower.",
                self._directory,
                format_bytes(size),
            )
        if self._device.type == "cuda" and block.kind == "memory":
            block.pin()
        elif block.kind == "memory":
            self._warming = threading.Thread(target=block.warm, name="warm", daemon=True)
            self._warming.start()
        self._snapshot = Snapshot(block, self._device)
        self._start_writer()

    def _start_writer(self) -> None:
        if self._snapshot is None or self._writer is not None or not self._can_start_writer:
            return
        early, self._early_writer = self._early_writer, None
        writer = None
        try:
            writer = early or WriterProcess()
            writer.attach(self._snapshot.block)
        except WriterGoneError as exc:
            if writer is not None:
                writer.close()
            if early is not None:
                self._start_writer()
                return
            self._can_start_writer = False
            log.warning("No process for writing checkpoints (%s): a thread does it.", exc)
        else:
            self._writer = writer

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, files: CheckpointFiles, free_memory: int) -> None:
        """Take a snapshot and have it written; returns when training may go on to `fence`.

        `files` has the live tensors; `free_memory` is for a snapshot that needs a larger block.
        """
        self.wait()
        self.failure = None
        started = time.monotonic()
        if self._background:
            staged = self._stage(files, free_memory)
            if staged is not None:
                self._thread = threading.Thread(
                    target=self._write, args=(staged, started), name="saver", daemon=True
                )
                self._thread.start()
                return
        self._commit(files.name, lambda folder: write_files(files, folder), started)

    def _stage(self, files: CheckpointFiles, free_memory: int) -> CheckpointFiles | None:
        for attempt in range(2):
            self._finish_warming()  # of the block that this attempt writes to
            if self._snapshot is not None:
                try:
                    staged = self._snapshot.stage(files.tensors)
                except ValueError as exc:
                    log.debug("%s", exc)
                else:
                    self._start_writer()
                    return files.with_tensors(staged)
            if attempt == 0 and self._background:
                self.prepare(Snapshot.size_of(files.tensors), free_memory)
        return None

    def fence(self) -> None:
        """Call before the optimizer changes the state."""
        if self._snapshot is not None:
            self._snapshot.fence()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the snapshot is written or the time is over; tell whether it is written."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.is_busy

    def close(self) -> None:
        """Let a save in progress finish, then release the memory and the process."""
        self.wait()
        self._release()

    def _finish_warming(self) -> None:
        """Wait until nothing writes zeros into the block any more."""
        if self._warming is not None:
            self._warming.join()
            self._warming = None

    def _release(self) -> None:
        self._finish_warming()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._snapshot is not None:
            self._snapshot.block.close()
            self._snapshot = None

    def _write(self, files: CheckpointFiles, started: float) -> None:
        assert self._snapshot is not None
        snapshot, writer = self._snapshot, self._writer

        def write(folder: Path) -> Manifest:
            snapshot.wait()
            if writer is not None and writer.is_ready():
                try:
                    return writer.write(files, folder)
                except WriterGoneError as exc:
                    log.warning("%s: a thread writes %s instead.", exc, files.name)
                    writer.close()
                    self._writer = None
            return write_files(fill_slots(files, snapshot.block), folder)

        self._commit(files.name, write, started)

    def _commit(
        self, name: CheckpointName, write: Callable[[Path], Manifest], started: float
    ) -> None:
        target = self._directory / str(name)
        temporary = self._directory / f"{SAVING_PREFIX}{name}"
        try:
            if self._rendezvous is None:
                write(temporary)
            else:
                temporary = temporary.with_name(f"{temporary.name}.{self._rendezvous.token}")
                if not _write_together(write, temporary, self._rendezvous):
                    return  # the main rank commits
            temporary.rename(target)
            fsync_directory(self._directory)
        except Exception as exc:  # noqa: BLE001 - torch and safetensors have errors of their own
            log.debug("Saving %s failed.", name, exc_info=True)
            shutil.rmtree(temporary, ignore_errors=True)
            self.failure = self._explain(name, exc)
            log.error("%s", self.failure)
            return
        self.last_committed, self.last_seconds = name, time.monotonic() - started
        log.info("Saved %s in %s.", name, format_duration(self.last_seconds))
        try:
            self._on_commit(target)
        except Exception as exc:  # noqa: BLE001 - the checkpoint is safe; training must go on
            log.debug("After the commit of %s:", name, exc_info=True)
            log.error("%s is saved, but what follows failed: %s", name, exc)

    def _explain(self, name: CheckpointName, exc: Exception) -> SaveError:
        reason = getattr(exc, "strerror", None) or str(exc).strip() or type(exc).__name__
        free = "unknown"
        if self._directory.is_dir():
            free = format_bytes(shutil.disk_usage(self._directory).free)
        return SaveError(
            f"{name} could not be saved: {reason} ({free} free in {self._directory}). Older "
            "checkpoints are intact."
        )


def _write_together(
    write: Callable[[Path], Manifest], directory: Path, rendezvous: Rendezvous
) -> bool:
    """Write this rank's part and meet the others; on the main rank seal the whole, return True.

    No rank goes on before all have ended their writing: whoever removes the directory after a
    failure has it alone.

    Raises:
        OSError: A rank could not write its part, or its files are not seen here.
    """
    answer: Manifest | str
    try:
        answer = write(directory)
    except Exception as exc:  # noqa: BLE001 - told to the main rank, which tells the user
        log.debug("Writing a part failed.", exc_info=True)
        answer = getattr(exc, "strerror", None) or str(exc).strip() or type(exc).__name__
    answers = rendezvous.gather(answer)
    if answers is None:
        return False
    failures = [
        f"rank {rank}: {a}" for rank, a in enumerate(answers) if not isinstance(a, Manifest)
    ]
    if failures:
        raise OSError("; ".join(failures))
    parts = [answer for answer in answers if isinstance(answer, Manifest)]
    manifest = replace(
        parts[0], files={name: entry for part in parts for name, entry in part.files.items()}
    )
    _require_visible(directory, manifest)
    seal(directory, manifest)
    return True


def _require_visible(directory: Path, manifest: Manifest) -> None:
    """Wait a little until every file is seen here: other machines have written some of them.

    Raises:
        OSError: One is not, or has another size.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    for name, entry in manifest.files.items():
        while True:
            path = directory / name
            if path.is_file() and path.stat().st_size == entry.size:
                break
            if time.monotonic() > deadline:
                raise OSError(
                    f"{name}, which another rank has written, is not seen by the main one: all "
                    "ranks need the same output_dir"
                )
            time.sleep(LOOK_SECONDS)
