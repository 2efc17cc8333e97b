"""Waiting for what another thread or process does; the deadline only ends a test that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_SECONDS = 20.0


def wait_until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
