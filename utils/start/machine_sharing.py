"""A checkpoint on every machine of a run, also where they share no disk.

    rank 0's verified directory -> files over the network -> a directory of each other machine

An attempt reads its checkpoint on every rank. Where the machines see one output_dir there is
nothing to do; where they do not, rank 0 sends the files to one rank of each machine that lacks
them. What has arrived is verified like everything that is loaded, and goes again when it has been
read: a run's checkpoints are kept on the first machine and in the bucket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from utils.base import ranks
from utils.base.errors import CheckpointError
from utils.base.text import format_bytes
from utils.checkpoints.layout import MANIFEST_FILE, SAVING_PREFIX, Manifest
from utils.checkpoints.store import verify_checkpoint

CHUNK_BYTES = 64 * 2**20

log = logging.getLogger("train")

_groups: dict[tuple[Any, ...], Any] = {}  # all ranks, the members -> their group


@contextlib.contextmanager
def on_every_machine(
    checkpoint: Path, manifest: Manifest, directory: Path, *, forgive_random_states: bool = False
) -> Iterator[Path]:
    """Have a directory with the checkpoint for each rank to read.

    All ranks enter it, and leave it when all have read. `checkpoint` is verified on the main
    process's machine; `directory` is for what a machine receives, until it has been read. With
    `forgive_random_states`, damaged ones are no error.

    Raises:
        CheckpointError: It could not be brought to a machine.
    """
    if ranks.ranks_on_this_machine() >= ranks.launched_world_size():
        yield checkpoint
        return
    rank = int(os.environ.get("RANK", "0"))
    leader = rank - int(os.environ.get("LOCAL_RANK", "0"))  # this machine's first
    has_it = rank != leader or ranks.is_main_rank() or _has(checkpoint, manifest)
    answers = ranks.gather_to_main(None if has_it else rank)
    lacking = ranks.broadcast_from_main([one for one in answers or () if one is not None])
    received = directory / f"{SAVING_PREFIX}from-main-{leader}" / checkpoint.name
    try:
        if lacking:
            log.info(
                "Sending %s (%s) to %d machines that do not see it.",
                checkpoint.name,
                format_bytes(manifest.total_bytes),
                len(lacking),
            )
            folder = checkpoint if ranks.is_main_rank() else received
            failure = _send(folder, manifest, rank, lacking, forgive_random_states)
            _require_none(checkpoint.name, failure and f"rank {rank}: {failure}")
        yield received if leader in lacking else checkpoint
        if lacking:
            ranks.any_rank(False)  # all have read
    finally:
        if rank in lacking:
            shutil.rmtree(received.parent, ignore_errors=True)


def _has(checkpoint: Path, manifest: Manifest) -> bool:
    """Tell whether this machine sees the whole checkpoint."""
    try:
        return verify_checkpoint(checkpoint) == manifest
    except (CheckpointError, OSError) as exc:
        log.debug("%s", exc)
        return False


def _send(
    folder: Path, manifest: Manifest, rank: int, lacking: Sequence[int], forgive_random_states: bool
) -> str | None:
    """Send the files from rank 0 to `lacking`, all ranks taking part; return why it failed here."""
    members = [0, *lacking]
    group = _group_of(members)
    if rank not in members:
        return None
    end = _End(folder, is_sender=rank == 0, group=group)
    try:
        if rank:
            end.attempt("the directory", lambda: _make_anew(folder))
        sizes = [[(folder / MANIFEST_FILE).stat().st_size] if rank == 0 else None]
        torch.distributed.broadcast_object_list(sizes, src=0, group=group)
        assert sizes[0] is not None
        end.send_file(MANIFEST_FILE, sizes[0][0])
        for name, entry in manifest.files.items():
            end.send_file(name, entry.size)
        if rank and end.failure is None:
            verify_checkpoint(folder, forgive_random_states=forgive_random_states)
    except CheckpointError as exc:
        end.failure = str(exc)
    return end.failure


def _group_of(members: list[int]) -> Any:
    """Return a group over gloo; all ranks call this, in the same order."""
    # Kept: gloo ends the process when a group is destroyed that a peer has not done with.
    key = (torch.distributed.group.WORLD, *members)
    if key not in _groups:
        _groups[key] = torch.distributed.new_group(
            members, backend="gloo", timeout=ranks.HOST_TIMEOUT
        )
    return _groups[key]


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)


class _End:
    """One end of the transfer.

    All members know the sizes and take part in every chunk, also after a failure at one end, so
    that none waits for another.
    """

    def __init__(self, folder: Path, *, is_sender: bool, group: Any) -> None:
        self.failure: str | None = None
        self._folder, self._is_sender, self._group = folder, is_sender, group

    def attempt(self, what: str, act: Callable[[], object]) -> None:
        """Do something with files unless something has failed before."""
        if self.failure is None:
            try:
                act()
            except OSError as exc:
                self.failure = f"{what}: {exc.strerror or exc}"

    def send_file(self, name: str, size: int) -> None:
        """Send or receive one file."""
        opened: list[IO[bytes]] = []
        mode = "rb" if self._is_sender else "xb"
        self.attempt(name, lambda: opened.append((self._folder / name).open(mode)))
        with contextlib.ExitStack() as stack:
            for file in opened:
                stack.callback(self.attempt, name, file.close)
            for begin in range(0, size, CHUNK_BYTES):
                chunk = np.zeros(min(CHUNK_BYTES, size - begin), np.uint8)
                if self._is_sender:
                    self.attempt(name, lambda c=chunk: _read_into(opened[0], c))  # type: ignore[misc]
                torch.distributed.broadcast(torch.from_numpy(chunk), src=0, group=self._group)
                if not self._is_sender:
                    self.attempt(name, lambda c=chunk: opened[0].write(c))  # type: ignore[misc]


def _read_into(file: IO[bytes], chunk: np.ndarray[Any, Any]) -> None:
    if file.readinto(chunk) != chunk.size:  # type: ignore[attr-defined]
        raise OSError("it has become shorter")


def _require_none(name: str, failure: str | None) -> None:
    answers = ranks.gather_to_main(failure)
    told = ranks.broadcast_from_main([answer for answer in answers or () if answer])
    if told:
        raise CheckpointError(
            f"{name} could not be brought to every machine: {'; '.join(told)}. It is whole on the "
            "first one."
        )
