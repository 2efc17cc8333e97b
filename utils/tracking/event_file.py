"""A TensorBoard event file: each record is with the operating system before `write` returns.

    scalars, texts, hyperparameters -> Event -> events.out.tfevents.* -> TensorBoard

torch's SummaryWriter hands records to a thread, whose death (a full disk) costs a traceback in the
terminal and every later record. Here a record is one `write`: a killed process tears at most the
last one, and a record that does not fit on the disk is cut away again, so that later ones can be
read. Files sort in the order of the attempts, whatever the clocks of their machines say:
TensorBoard reads them by name, and a later file takes back what earlier ones have from its first
step on.

TensorBoard and its parts of torch are imported when something is written and not before.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_VERSION = "brain.Event:2"  # from this one on TensorBoard obeys `purge_from`
_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class EventFile:
    """A new event file in a directory, which is made; safe from several threads.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        seconds = max(int(time.time()), _newest(directory) + 1)
        self.path = directory / (
            f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}"
        )
        self._file = self.path.open("xb", buffering=0)
        self._lock = threading.Lock()
        try:
            self._add(file_version=FILE_VERSION)
        except BaseException:
            self.discard()
            raise

    def purge_from(self, step: int) -> None:
        """Take back what earlier attempts have at `step` and after it."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._add(step=step, session_log=SessionLog(status=SessionLog.START))

    def add(self, summary: Any, step: int = 0) -> None:
        """Write a Summary, with any number of values."""
        self._add(step=step, summary=summary)

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars by tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        pairs = values.items()
        self.add(Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in pairs]), step)

    def add_text(self, tag: str, markdown: str, step: int) -> None:
        """Write a text."""
        summary: Any = importlib.import_module("torch.utils.tensorboard.summary")
        self.add(summary.text(tag, markdown), step)

    def close(self) -> None:
        """Close the file; whatever comes later is an error."""
        self._file.close()

    def discard(self) -> None:
        """Close the file and remove it."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, record: bytes) -> None:
        """Write the bytes of a record, as `RecordWriter` frames it: all of them or none."""
        end = os.fstat(self._file.fileno()).st_size
        view = memoryview(record)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
                self._file.seek(end)
            raise

    def _add(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        event = Event(wall_time=time.time(), **content)
        with self._lock:
            RecordWriter(self).write(event.SerializeToString())


def _newest(directory: Path) -> int:
    """Return the time in the name of the newest event file, 0 where there is none."""
    names = (_NAME.match(path.name) for path in directory.iterdir())
    return max((int(match.group(1)) for match in names if match), default=0)
