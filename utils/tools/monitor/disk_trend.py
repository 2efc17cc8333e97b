"""How long a disk lasts, from how fast its free space falls while the monitor watches.

    free bytes at each look -> lows of the first and the second half -> seconds until it is full

Free space falls with each save and rises when an old checkpoint is deleted, so a line through two
looks would take the last save for a trend. Instead the lowest free space in the first half of the
watch is compared with the lowest in the second half. Each half needs some saves; before that, and
while the lows do not fall, there is no answer.
"""

from __future__ import annotations

from collections import deque

SLOT_SECONDS = 60.0
NUM_SLOTS = 1440  # a day
MIN_WATCH_SECONDS = 600.0
SAVES_IN_WATCH = 4
NOISE_BYTES = 16 * 2**20
_MAX_SECONDS = 365 * 86400.0


class DiskTrend:
    """The lows of a disk's free space over the last day at most."""

    def __init__(self) -> None:
        self._lows: deque[tuple[float, int]] = deque(maxlen=NUM_SLOTS)  # (seconds, bytes) of each

    def add(self, seconds: float, free_bytes: int) -> None:
        """Note the free bytes at a time, in seconds of a clock that never goes back."""
        if self._lows and self._lows[-1][0] // SLOT_SECONDS == seconds // SLOT_SECONDS:
            if free_bytes < self._lows[-1][1]:
                self._lows[-1] = (seconds, free_bytes)
        else:
            self._lows.append((seconds, free_bytes))

    def seconds_left(self, save_interval_seconds: float | None = None) -> float | None:
        """Return the time until the disk is full at the pace so far.

        None while the watch is too short for some saves, the lows do not fall, or it lasts over a
        year.
        """
        if not self._lows:
            return None
        first, last = self._lows[0][0], self._lows[-1][0]
        needed = max(MIN_WATCH_SECONDS, SAVES_IN_WATCH * (save_interval_seconds or 0.0))
        if last - first < needed:
            return None
        middle = (first + last) / 2
        older = min((low for low in self._lows if low[0] <= middle), key=lambda low: low[1])
        newer = min((low for low in self._lows if low[0] > middle), key=lambda low: low[1])
        fall = older[1] - newer[1]
        if fall < NOISE_BYTES:
            return None
        seconds = newer[1] * (newer[0] - older[0]) / fall
        return seconds if seconds <= _MAX_SECONDS else None
