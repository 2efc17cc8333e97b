"""Stopping on request: the first SIGINT or SIGTERM asks, the second leaves at once.

The training loop asks `StopRequest` at each safe point; ranks agree first, so that none waits for
another that has left.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

import torch

from utils.errors import ExitCode

SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger(__name__)


class StopRequest:
    """Catches SIGINT and SIGTERM while it is entered."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """What asked for the stop, None while nothing has."""
        self._previous: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def __enter__(self) -> StopRequest:
        """Install the handlers; every rank enters at the same place."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Host memory only: asking costs no wait for the device.
            self._group = torch.distributed.new_group(backend="gloo")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_agreed(self) -> bool:
        """Tell whether any rank was asked to stop; all ranks call this at the same step."""
        stopping = self.any_rank(self.reason is not None)
        if stopping and self.reason is None:
            self.reason = "another rank was asked to stop"
        return stopping

    def any_rank(self, wish: bool) -> bool:
        """Tell whether any rank wishes so; all ranks call this at the same step."""
        if self._group is None:
            return wish
        flag = torch.tensor([int(wish)])
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason is not None:
            # Not through logging: its lock may be held by the code that this interrupts.
            os.write(sys.stderr.fileno(), f"\nSecond {name}: leaving at once.\n".encode())
            os._exit(ExitCode.SIGNAL_BASE + number)
        self.reason = name
        os.write(
            sys.stderr.fileno(),
            f"\n{name}: finishing this step, then saving. Once more leaves at once.\n".encode(),
        )
