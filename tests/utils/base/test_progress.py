"""Progress: lines in a pipe, now and then; nothing when nothing is wanted."""

from __future__ import annotations

import logging

import pytest

from tests.sample_clock import Clock
from utils.base.progress import ProgressDisplay


def test_a_pipe_gets_a_line_every_five_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with ProgressDisplay(clock=clock) as progress:
        for second in range(11):
            progress.update("Tokenizing", (second + 9) * 2**20, 29 * 2**20)
            clock.now += 1
    assert caplog.messages == [
        "Tokenizing: 14.0 MiB of 29.0 MiB (48%), 1.0 MiB/s",  # 9 were there before
        "Tokenizing: 19.0 MiB of 29.0 MiB (66%), 1.0 MiB/s",
    ]


def test_a_stage_that_has_just_begun_has_no_speed(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with ProgressDisplay(clock=clock, unit="tokens") as progress:
        clock.now += 4.9999  # loading
        progress.update("mine", 0, 23_435)
        clock.now += 0.0002
        progress.update("mine", 8192, 23_435)
    assert caplog.messages == ["mine: 8,192 of 23,435 tokens (35%)"]


def test_other_things_than_bytes_are_counted_also_without_a_total(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with ProgressDisplay(clock=clock, unit="tokens") as progress:
        progress.update("step 4", 0, 20_000)
        clock.now += 8
        progress.update("step 4", 16_000, 20_000)
        clock.now += 8
        progress.update("step 4", 16_000, None)
    assert caplog.messages == [
        "step 4: 16,000 of 20,000 tokens (80%), 2,000 tokens/s",
        "step 4: 16,000 tokens, 1,000 tokens/s",
    ]


def test_a_slow_speed_has_a_digit_and_an_unknown_one_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()  # the level of the other log lines is warning
    with ProgressDisplay(clock=clock, unit="steps") as progress:
        for step in (0, 0, 12):
            progress.update("attempt 1", step, 24)
            clock.now += 8
    assert caplog.messages == [
        "attempt 1: 0 of 24 steps (0%)",
        "attempt 1: 12 of 24 steps (50%), 0.8 steps/s",
    ]
