"""The writer process: writes checkpoints from shared host memory, out of the trainer's way.

    snapshot (host memory) -> writer process -> temporary sibling of the checkpoint directory

It is a process and not a thread because pickling, hashing and JSON hold the interpreter that the
training loop needs; it is niced because it should take only the cores that training leaves. It
cannot commit: the trainer renames what it has written, so a trainer that dies takes a save in
progress with it and the next start finds leftovers, never a late checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import torch

from configs.training_config import PROJECT_DIRECTORY
from utils.checkpoint_files import CheckpointFiles, write_files
from utils.child_process import live_no_longer_than, step_back
from utils.layout import Manifest
from utils.snapshot import HostBlock, TensorSlot, map_leaves


class WriterGoneError(Exception):
    """The writer process has ended, or could not be started."""


def fill_slots(files: CheckpointFiles, block: HostBlock) -> CheckpointFiles:
    """Return the files with the tensors of `block` in place of their slots."""
    return files.with_tensors(map_leaves(files.tensors, TensorSlot, block.tensor))


class WriterProcess:
    """The trainer's side: starts the process and talks to it.

    Args:
        block: Where the snapshots are.

    Raises:
        WriterGoneError: It cannot be started on this system.
    """

    def __init__(self, block: HostBlock) -> None:
        self._is_ready = False
        self._connection, theirs = Pipe()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        arguments = [theirs.fileno(), block.descriptor, block.size, os.getpid()]
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "utils.checkpoint_writer", *map(str, arguments)],
                cwd=PROJECT_DIRECTORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), block.descriptor),
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer alone
            )
        except (OSError, ValueError, AttributeError) as exc:
            self._connection.close()
            raise WriterGoneError(str(exc)) from exc
        finally:
            theirs.close()

    def is_ready(self) -> bool:
        """Tell whether it has started: it takes seconds to load torch."""
        try:
            if not self._is_ready and self._connection.poll():
                self._connection.recv()
                self._is_ready = True
        except (EOFError, OSError):
            return False
        return self._is_ready

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def write(self, files: CheckpointFiles, directory: Path) -> Manifest:
        """Have a checkpoint written into `directory`; return its manifest.

        Args:
            files: With slots of the block in place of tensors.
            directory: A temporary directory, not yet the checkpoint's.

        Raises:
            WriterGoneError: The process has ended.
            OSError: What went wrong there; the message tells.
        """
        try:
            self._connection.send((files, str(directory.absolute())))
            answer = self._connection.recv()
        except (EOFError, OSError) as exc:
            code = self._process.poll()
            raise WriterGoneError(f"the writer process has ended (code {code})") from exc
        if isinstance(answer, Manifest):
            return answer
        number, message = answer
        raise OSError(number, message) if number else OSError(message)

    def close(self) -> None:
        """End the process; what it was writing is a leftover."""
        self._connection.close()
        self._process.kill()  # it holds nothing that would have to be put in order
        self._process.wait()


def serve(connection: Connection, block: HostBlock) -> None:
    """Write what is asked for until the trainer hangs up."""
    connection.send(None)  # ready
    while True:
        try:
            files, directory = connection.recv()
        except EOFError:
            return
        answer: object
        try:
            answer = write_files(fill_slots(files, block), Path(directory))
        except Exception as exc:  # noqa: BLE001 - told to the trainer, which tells the user
            answer = (getattr(exc, "errno", None), getattr(exc, "strerror", None) or str(exc))
        connection.send(answer)


def main(argv: list[str]) -> None:
    """Entry of the process: CONNECTION BLOCK SIZE PARENT, numbers all of them."""
    connection, block, size, parent = map(int, argv)
    live_no_longer_than(parent)
    step_back()
    torch.set_num_threads(1)
    with contextlib.suppress(BrokenPipeError):
        serve(Connection(connection), HostBlock(block, size))


if __name__ == "__main__":
    main(sys.argv[1:])
