"""Which configurations fit a device, and how long they take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.training_config import TrainingConfig, get_training_config
from utils.tools.diagnosis.facts import Facts, Host, Timing, Torch, TorchGpu
from utils.tools.diagnosis.fit import (
    Forecast,
    describe_forecast,
    find_forecasts,
    find_misfits,
    forecast_run,
)

GIB = 2**30


def facts_of_gpu(gib: float, tflops: float | None = None) -> Facts:
    gpu = TorchGpu(0, "NVIDIA H200", 141 * GIB, int(gib * GIB), (9, 0), "bf16")
    timing = Timing("cuda:0", "bf16", step_tflops=tflops)
    return Facts(torch=Torch(version="2.13.0", gpus=[gpu]), timings=[timing])


def forecast(config: TrainingConfig, gib: float, tflops: float | None = None) -> Forecast:
    return forecast_run("mine", facts_of_gpu(gib, tflops), config)


def test_production_fits_or_not() -> None:
    config = get_training_config("production")
    assert forecast(config, 140).fits
    assert not forecast(config, 30).fits
    assert forecast(replace(config, gradient_checkpointing=True), 30).fits
    half = replace(config, model_overrides={"num_hidden_layers": 12})
    assert forecast(half, 140).needed_bytes < 0.7 * forecast(config, 140).needed_bytes


def test_time_is_all_flops_over_the_measured_speed() -> None:
    result = forecast(get_training_config("test"), 8, tflops=1.0)
    flops_of_a_token = 6 * 5_256_704 + 12 * 4 * 256 * 512
    assert result.seconds == pytest.approx(100 * 4 * 512 * flops_of_a_token / 1e12)
    assert describe_forecast(result) == "fits; 100 steps take about 7.7s"
    assert describe_forecast(forecast(get_training_config("test"), 8)) == "fits"


def test_configurations_are_held_against_the_device_that_is_used() -> None:
    test, production = find_forecasts(facts_of_gpu(139))
    assert (test.configuration, production.available_bytes) == ("test", 139 * GIB)
    on_cpu = Facts(Host(memory_available_bytes=64 * GIB), torch=Torch(version="2.13.0"))
    assert [item.available_bytes for item in find_forecasts(on_cpu)] == [64 * GIB, 64 * GIB]
    assert find_forecasts(Facts(torch=Torch(problem="broken"))) == []


def test_misfit_says_what_to_set_or_that_it_cannot_run() -> None:
    config = get_training_config("production")
    assert list(find_misfits([forecast(config, 140)])) == []
    (misfit,) = find_misfits([forecast(config, 30)])
    assert "does not fit" in misfit.message
    assert misfit.advice.startswith("--set gradient_checkpointing=true")
