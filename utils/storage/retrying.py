"""Trying again what may succeed then: how long to wait in between, and the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from utils.base.errors import TransientStorageError

FIRST_RETRY_SECONDS = 1.0
ARCHIVE_FACTOR = 4.0  # each attempt sends a whole archive: fewer attempts, further apart

T = TypeVar("T")


def backoff(
    first_seconds: float = FIRST_RETRY_SECONDS,
    factor: float = 2.0,
    longest_seconds: float = math.inf,
) -> Iterator[float]:
    """Yield seconds to wait without end, each `factor` times the last up to the longest."""
    delay = first_seconds
    while True:
        yield delay
        delay = min(factor * delay, longest_seconds)


def retry(
    operation: Callable[[], T],
    delays: Iterable[float],
    tell: Callable[[float, TransientStorageError], object],
    wait: Callable[[float], object] = time.sleep,
) -> T:
    """Return what `operation` returns; after a transient error it is tried again.

    `delays` are the seconds before each next attempt; where they end, so do the attempts. `tell` is
    called before each wait.

    Raises:
        TransientStorageError: The last attempt's.
    """
    left = iter(delays)
    while True:
        try:
            return operation()
        except TransientStorageError as exc:
            delay = next(left, None)
            if delay is None:
                raise
            tell(delay, exc)
            wait(delay)
