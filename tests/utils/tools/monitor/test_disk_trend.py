"""What comes back is no trend; what does not is, at its pace."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from utils.tools.monitor.disk_trend import DiskTrend

GIB = 2**30
HOUR = 3600.0


def watch(free: Callable[[float], float], seconds: float, every: float = 10.0) -> DiskTrend:
    trend = DiskTrend()
    for look in range(int(seconds / every) + 1):
        trend.add(look * every, int(free(look * every)))
    return trend


def saw(seconds: float) -> float:
    """Free space of a run that saves every ten minutes and then lets the oldest go."""
    return (500 - (17 if seconds % 600 < 60 else 0)) * GIB


def test_a_steady_fall_lasts_as_long_as_it_takes() -> None:
    trend = watch(lambda seconds: (100 - 10 * seconds / HOUR) * GIB, HOUR)
    assert trend.seconds_left() == pytest.approx(9 * HOUR, rel=0.05)


def test_checkpoints_that_come_and_go_are_no_fall() -> None:
    assert watch(saw, 2 * HOUR).seconds_left(600.0) is None


def test_checkpoints_that_stay_are() -> None:
    trend = watch(lambda seconds: saw(seconds) - 17 * GIB * (seconds // 600), 4 * HOUR)
    # 17 GiB in ten minutes, of 483 GiB less what has gone.
    left = 483 - 17 * 24
    assert trend.seconds_left(600.0) == pytest.approx(left / 17 * 600, rel=0.25)


def test_nothing_is_said_before_the_watch_holds_some_saves() -> None:
    def fall(seconds: float) -> float:
        return (100 - 10 * seconds / HOUR) * GIB

    assert DiskTrend().seconds_left() is None
    assert watch(fall, 300).seconds_left() is None
    assert watch(fall, HOUR).seconds_left(HOUR) is None
    assert watch(fall, 5 * HOUR).seconds_left(HOUR) is not None


@pytest.mark.parametrize("per_hour", [-5.0, 0.0, 0.001])
def test_free_space_that_does_not_fall_is_no_worry(per_hour: float) -> None:
    assert watch(lambda s: (1000 - per_hour * s / HOUR) * GIB, HOUR).seconds_left() is None


def test_a_watch_of_days_keeps_the_last_day_only() -> None:
    trend = watch(lambda seconds: (200 - 2 * seconds / HOUR) * GIB, 72 * HOUR, every=120.0)
    assert len(trend._lows) <= 1440
    assert trend.seconds_left() == pytest.approx(28 * HOUR, rel=0.05)
