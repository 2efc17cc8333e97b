"""Speed without what is not training, and the time to the end with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from configs.training_config import TrainingConfig
from tests.sample_clock import Clock
from utils.training import throughput
from utils.training.throughput import RemainingTime, Throughput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=clock))
    return clock


def run_steps(speed: Throughput, clock: Clock, *seconds: float) -> None:
    for second in seconds:
        clock.now += second
        speed.step()


def test_a_report_leaves_out_the_pauses_since_the_last_one_and_no_others(clock: Clock) -> None:
    speed = Throughput()
    for pause in (60.0, 0.0):
        clock.now += pause
        speed.pause(pause)
        run_steps(speed, clock, 50.0, 50.0)
        assert speed.report(1000, 25.0) == {
            "tokens_per_second": 20.0,
            "step_seconds": 50.0,
            "data_wait_share": 0.25,
        }


def test_the_first_steps_of_an_attempt_say_nothing_of_the_others(clock: Clock) -> None:
    speed = Throughput()
    assert speed.recent_step_seconds is None
    run_steps(speed, clock, 30.0, 20.0)
    assert speed.recent_step_seconds is None
    run_steps(speed, clock, 1.0, 2.0, 3.0)
    assert speed.recent_step_seconds == pytest.approx(2.0)


def test_pauses_are_no_part_of_a_step(clock: Clock) -> None:
    speed = Throughput()
    run_steps(speed, clock, 1.0, 1.0)
    clock.now += 50
    speed.pause(50)
    run_steps(speed, clock, 1.0, 1.0)
    speed.report(tokens_per_step=8, data_wait_seconds=1.0)
    assert speed.recent_step_seconds == pytest.approx(1.0)


def test_the_time_to_the_end_has_evaluations_and_saves() -> None:
    config = TrainingConfig(max_steps=100, save_steps=50, eval_steps=25)
    remaining = RemainingTime(config, samples_per_step=4, evaluation_samples=24)
    # Evaluations after steps 25, 50, 75 and 100, of 24 samples: 6 steps' forward passes each.
    assert remaining.seconds(20, 3.0) == pytest.approx(80 * 3.0 + 4 * 6.0)
    remaining.evaluation_seconds, remaining.save_seconds = 5.0, 0.5
    assert remaining.seconds(60, 3.0) == pytest.approx(40 * 3.0 + 2 * 5.0 + 1 * 0.5)
    assert remaining.seconds(100, 3.0) == 0.0
