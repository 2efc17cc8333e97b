"""The writer process: writes checkpoints from shared host memory, out of the trainer's way.

    snapshot (host memory) -> writer process -> temporary sibling of the checkpoint directory

It is a process and not a thread because pickling, hashing and JSON hold the interpreter that the
training loop needs; it is niced because it should take only the cores that training leaves. It
cannot commit: the trainer renames what it has written (`saver.py`), so a trainer that dies takes a
save in progress with it and the next attempt finds leftovers, never a late checkpoint.

It needs torch, which takes a second to load. So a run starts it before it loads its own libraries,
which take one core alone, and hands it the memory later; nothing here loads torch until then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING

from configs.config_files import PROJECT_DIRECTORY
from utils.base.child_process import live_no_longer_than, start_child, step_back
from utils.base.startup import no_collections
from utils.checkpoints.layout import Manifest

if TYPE_CHECKING:
    from utils.checkpoints.files import CheckpointFiles
    from utils.checkpoints.snapshot import HostBlock


FILE_FOLLOWS = b"\0"  # an open file cannot be sent alone


class WriterGoneError(Exception):
    """The writer process has ended, or could not be started."""


def fill_slots(files: CheckpointFiles, block: HostBlock) -> CheckpointFiles:
    """Return the files with the tensors of `block` in place of their slots."""
    from utils.checkpoints.snapshot import TensorSlot, map_leaves

    return files.with_tensors(map_leaves(files.tensors, TensorSlot, block.tensor))


class WriterProcess:
    """The trainer's side: starts the process and talks to it.

    Raises:
        WriterGoneError: It cannot be started on this system.
    """

    def __init__(self) -> None:
        self._is_ready = False
        self._connection, theirs = Pipe()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        try:
            self._process = start_child(
                "utils.checkpoints.writer", theirs, PROJECT_DIRECTORY, environment
            )
        except (OSError, ValueError) as exc:
            self._connection.close()
            raise WriterGoneError(str(exc)) from exc
        finally:
            theirs.close()

    def attach(self, block: HostBlock) -> None:
        """Hand over the memory where the snapshots are; once, before anything else.

        Raises:
            WriterGoneError: The process has ended.
        """
        try:
            descriptor = self._connection.fileno()
            with socket.fromfd(descriptor, socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                socket.send_fds(channel, [FILE_FOLLOWS], [block.descriptor])
            self._connection.send(block.size)
        except OSError as exc:
            raise WriterGoneError(f"the writer process has ended: {exc}") from exc

    def is_ready(self) -> bool:
        """Tell whether it has loaded torch and has the memory: that can take seconds."""
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

        `files` have slots of the block in place of tensors; `directory` is a temporary one.

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


@contextlib.contextmanager
def starting_early(*, is_wanted: bool) -> Iterator[WriterProcess | None]:
    """Hold a writer process that has no memory yet; None where none is wanted or can be had."""
    writer = None
    if is_wanted:
        with contextlib.suppress(WriterGoneError):  # the saver tries again, and tells the user
            writer = WriterProcess()
    try:
        yield writer
    finally:
        if writer is not None:
            writer.close()


def receive_block(connection: Connection) -> HostBlock:
    """Wait for the memory that `attach` sends.

    Raises:
        EOFError: The trainer has hung up.
        OSError: It cannot be mapped.
    """
    from utils.checkpoints.snapshot import HostBlock

    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        _, descriptors, _, _ = socket.recv_fds(channel, len(FILE_FOLLOWS), 1)
    if not descriptors:
        raise EOFError
    return HostBlock(descriptors[0], connection.recv())


def serve(connection: Connection) -> None:
    """Write what is asked for until the trainer hangs up."""
    from utils.checkpoints.files import write_files

    try:
        block = receive_block(connection)
    except EOFError:
        return
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
    """Entry of the process: CONNECTION PARENT, numbers both of them."""
    connection, parent = map(int, argv)
    live_no_longer_than(parent)
    step_back()
    with no_collections():
        import torch
    torch.set_num_threads(1)
    with contextlib.suppress(BrokenPipeError):
        serve(Connection(connection))


if __name__ == "__main__":
    main(sys.argv[1:])
