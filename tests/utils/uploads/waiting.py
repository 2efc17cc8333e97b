"""Waiting for what another thread or process does; the deadline only ends a test that hangs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from configs.config_files import PROJECT_DIRECTORY

WAIT_SECONDS = 20.0


class Clock:
    """Time that passes only while somebody sleeps, and then at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[], object] = lambda: None
        """Done while somebody sleeps."""

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


def wait_until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def end_in_time(work: Callable[[], object]) -> BaseException | None:
    """Return what the work raises; one that never ends fails the test and not the test run."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except Exception as exc:  # noqa: BLE001
            raised.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive(), "a deadlock"
    return raised[0] if raised else None


@contextlib.contextmanager
def started(code: str, *words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python program in a session of its own, and its first line; it is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=PROJECT_DIRECTORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()
