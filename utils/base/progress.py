"""How far a long command is: bars on a terminal, a line now and then in a pipe.

Both go to standard error, beside the log lines, so that standard output stays the result.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from utils.base.console import get_console
from utils.base.text import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_SECONDS = 5.0
RATE_SECONDS = 1.0  # a rate over less time says nothing

OnProgress = Callable[[str, int, int | None], None]
"""Called with the stage, how much of it is done, and how much it is in all; None where unknown."""

_logger = logging.getLogger(__name__)
_logger.setLevel(logging.INFO)  # also where a command leaves out other log lines


class ProgressDisplay:
    """Shows the bytes done in each stage, as they are told by `update`.

    `unit` is what is counted instead of bytes.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "",
    ) -> None:
        self._enabled, self._unit = enabled, unit
        self._clock = clock
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._last_line = clock()

    def __enter__(self) -> ProgressDisplay:
        """Open the bars, where there is a terminal."""
        if self._enabled and sys.stderr.isatty():
            from rich import progress

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                *(
                    (progress.MofNCompleteColumn(), progress.TextColumn(self._unit))
                    if self._unit
                    else (progress.DownloadColumn(), progress.TransferSpeedColumn())
                ),
                progress.TimeElapsedColumn(),
                console=get_console(stderr=True),
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bars as they are."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def update(self, stage: str, done_bytes: int, total_bytes: int | None) -> None:
        """Show how much of a stage is done; safe from any thread."""
        if not self._enabled:
            return
        with self._lock:
            self._started.setdefault(stage, (self._clock(), done_bytes))
            if self._bars is not None:
                if stage not in self._tasks:
                    self._tasks[stage] = self._bars.add_task(stage, total=total_bytes)
                self._bars.update(self._tasks[stage], completed=done_bytes, total=total_bytes)
            elif self._clock() - self._last_line >= LINE_SECONDS:
                self._last_line = self._clock()
                _logger.info("%s", self._line(stage, done_bytes, total_bytes))

    def _line(self, stage: str, done_bytes: int, total_bytes: int | None) -> str:
        started, done_before = self._started[stage]
        seconds, count = self._clock() - started, done_bytes - done_before
        is_known = seconds >= RATE_SECONDS and count > 0
        speed = f", {self._show(count / seconds)}/s" if is_known else ""
        if not total_bytes:
            return f"{stage}: {self._show(done_bytes)}{speed}"
        done = f"{done_bytes:,}" if self._unit else format_bytes(done_bytes)
        return (
            f"{stage}: {done} of {self._show(total_bytes)} ({done_bytes / total_bytes:.0%}){speed}"
        )

    def _show(self, count: float) -> str:
        digits = 1 if isinstance(count, float) and count < 10 else 0
        return f"{count:,.{digits}f} {self._unit}" if self._unit else format_bytes(count)
