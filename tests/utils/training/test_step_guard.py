"""A bad step is seen before the optimizer uses it, with the same verdict on the device and here."""

from __future__ import annotations

import math

import pytest
import torch

from utils.training.step_guard import GOOD, NON_FINITE, SPIKE, StepGuard

CPU = torch.device("cpu")


def judge(guard: StepGuard, step: int, loss: float, grad_norm: float = 1.0) -> int:
    return int(guard.judge(step, torch.tensor(loss), torch.tensor(grad_norm)).item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad(bad: float) -> None:
    guard = StepGuard(CPU, sigma=None, window=10)
    assert judge(guard, 1, 2.0) == GOOD
    assert judge(guard, 2, bad) == NON_FINITE
    assert judge(guard, 3, 2.0, grad_norm=bad) == NON_FINITE
    verdicts = guard.take(newest=True)
    assert [(verdict.step, verdict.code) for verdict in verdicts] == [(1, 0), (2, 1), (3, 1)]
    assert verdicts[1].kind == "non-finite"
    assert guard.take(newest=True) == []


def test_overflow_is_the_loss_scalers_business() -> None:
    guard = StepGuard(CPU, sigma=None, window=10, should_check_gradients=False)
    assert judge(guard, 1, 2.0, grad_norm=math.inf) == GOOD
    assert judge(guard, 2, math.inf) == NON_FINITE


def test_a_spike_is_beyond_sigma_deviations_of_a_full_window() -> None:
    guard = StepGuard(CPU, sigma=3.0, window=4)
    losses = [2.0, 2.2, 1.8, 2.0]
    assert judge(guard, 0, 5000.0) == GOOD  # the window is not full: nothing is a spike
    for step, loss in enumerate(losses, start=1):
        assert judge(guard, step, loss) == GOOD
    window = torch.tensor(losses)
    limit = float(window.mean() + 3 * window.std())
    assert judge(guard, 5, limit * 1.001) == SPIKE
    assert guard.losses.tolist() == pytest.approx(losses)  # a spike does not raise the limit
    assert judge(guard, 6, limit * 0.999) == GOOD
    assert judge(guard, 7, 0.1) == GOOD  # a fall is no spike


def test_a_window_is_brought_back() -> None:
    guard = StepGuard(CPU, sigma=3.0, window=4)
    for step, loss in enumerate([2.0, 2.2, 1.8]):
        judge(guard, step, loss)
    saved = [None if math.isnan(loss) else loss for loss in guard.losses.tolist()]
    other = StepGuard(CPU, sigma=3.0, window=4)
    other.restore(saved)
    torch.testing.assert_close(other.losses, guard.losses, rtol=0, atol=0, equal_nan=True)
    shorter = StepGuard(CPU, sigma=3.0, window=2)
    shorter.restore(saved)
    assert shorter.losses.tolist() == pytest.approx([2.2, 1.8])
    StepGuard(CPU, sigma=None, window=4).restore(saved)


def test_on_the_device_the_host_reads_one_step_later() -> None:
    guard = StepGuard(CPU, sigma=None, window=4, is_on_device=True)
    judge(guard, 1, math.nan)
    assert guard.take(newest=False) == []
    judge(guard, 2, 1.0)
    assert [verdict.step for verdict in guard.take(newest=False)] == [1]
    assert [verdict.step for verdict in guard.take(newest=True)] == [2]
    judge(guard, 3, math.nan)
    guard.forget()
    assert guard.take(newest=True) == []
