"""Devices are timed in their own precision, and one that fails says why."""

from __future__ import annotations

import pytest

from utils.tools.diagnosis import timing
from utils.tools.diagnosis.facts import Torch, TorchGpu
from utils.tools.diagnosis.timing import time_device, time_devices


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SMALL_SIZES", (64, 16, 1, 2, 8, 1))
    monkeypatch.setattr(timing, "MAX_REPEATS", 2)


def test_cpu_is_timed() -> None:
    found = time_device("cpu")
    assert found.problem is None
    assert found.step_seconds
    assert found.tokens_per_second == pytest.approx(8 / found.step_seconds)


def test_device_that_fails_says_why_and_hides_no_other() -> None:
    gpu = TorchGpu(99, "NVIDIA H200", 1, None, (9, 0), "bf16")
    cpu, failed = time_devices(Torch(version="2.13.0", gpus=[gpu]))
    assert cpu.step_seconds
    assert (failed.device, failed.precision) == ("cuda:99", "bf16")
    assert (failed.problem or "").startswith("the training step failed: ")
