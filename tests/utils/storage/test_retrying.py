"""Trying again: the waits grow, the attempts end, and other errors pass at once."""

from __future__ import annotations

import itertools

import pytest

from utils.base.errors import ConflictError, TransientStorageError
from utils.storage.retrying import backoff, retry


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 2.0, 4.0, 8.0]),
        ({"factor": 4.0}, [1.0, 4.0, 16.0, 64.0]),
        ({"first_seconds": 0.5, "longest_seconds": 1.5}, [0.5, 1.0, 1.5, 1.5]),
    ],
)
def test_waits_grow_up_to_the_longest(options: dict[str, float], expected: list[float]) -> None:
    assert list(itertools.islice(backoff(**options), 4)) == expected


class Flaky:
    """Fails so many times, then returns how often it was called."""

    def __init__(self, failures: int, kind: type[Exception] = TransientStorageError) -> None:
        self.calls, self._failures, self._kind = 0, failures, kind

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._kind(f"failure {self.calls}")
        return self.calls


def test_what_succeeds_later_is_returned_and_each_wait_is_told() -> None:
    told: list[str] = []
    waits: list[float] = []
    result = retry(
        Flaky(2), backoff(), lambda delay, exc: told.append(f"{delay}: {exc}"), waits.append
    )
    assert result == 3
    assert waits == [1.0, 2.0]
    assert told == ["1.0: failure 1", "2.0: failure 2"]


def test_attempts_end_with_the_waits() -> None:
    flaky, waits = Flaky(9), list[float]()
    with pytest.raises(TransientStorageError, match="failure 3"):
        retry(flaky, [0.1, 0.2], lambda delay, exc: None, waits.append)
    assert (flaky.calls, waits) == (3, [0.1, 0.2])


def test_other_errors_are_not_tried_again() -> None:
    flaky = Flaky(1, ConflictError)
    with pytest.raises(ConflictError):
        retry(flaky, backoff(), lambda delay, exc: None)
    assert flaky.calls == 1
