"""What is expected of a run before it begins: its steps, its end, its uploads."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.model_config import build_model_config
from configs.training_config import TrainingConfig
from utils.base.text import format_duration
from utils.data.shard_index import DataSource, ShardFacts, ShardIndex
from utils.models.building import ParameterCounts
from utils.start import forecast
from utils.start.facts import RunFacts
from utils.start.forecast import check_times, is_long_run
from utils.start.step_probe import StepProbe
from utils.uploads import rate as upload_rate
from utils.uploads.rate import measure_upload_rate
from utils.uploads.transports import Transport, TransportOptions

PROBE = StepProbe(step_seconds=0.5, samples=1, tokens=64, memory_ratio=None)
OPTIONS = TransportOptions("gs://bucket", "python")
PARAMETERS = 10**9  # checkpoints of 12 GB


def facts_of(**values: object) -> RunFacts:
    settings = {
        "model": "neox-tiny",
        "sequence_length": 512,
        "global_batch_size": 4,
        "max_steps": 1000,
        "save_steps": 100,
        **values,
    }
    validation = ShardFacts("val_0.npz", 512 * 40 + 17, 1, None)
    index = ShardIndex(training=(), validation=(validation,))
    return RunFacts(
        TrainingConfig(**settings),  # type: ignore[arg-type]
        build_model_config("neox-tiny"),
        ParameterCounts(PARAMETERS, 0),
        "no",
        torch.device("cpu"),
        1,
        0,
        [DataSource("data", 1.0, index)],
    )


def find(checks: list[forecast.Check], name: str) -> forecast.Check:
    return next(check for check in checks if check.name == name)


def test_a_run_takes_its_steps_and_its_evaluations() -> None:
    # An evaluation: 40 samples, as the forward passes of 10 steps.
    facts = facts_of(eval_steps=50)
    assert facts.evaluation_samples == 40
    run = find(check_times(facts, replace(PROBE, step_seconds=0.6), None), "run")
    seconds = 1000 * 0.6 + 20 * 10 * 0.2
    assert run.message == f"about {format_duration(seconds)} for steps 0 to 1000 and 20 evaluations"
    assert facts_of(max_eval_samples=7).evaluation_samples == 7


@pytest.mark.parametrize(
    ("rate", "save_steps", "status", "text"),
    [
        (200e6, 1000, "ok", "12% of the time between two"),
        (200e6, 200, "warn", "60% of the time between two, so there is little room"),
        (10e6, 1000, "warn", "so they pile up"),
        (None, 1000, "warn", "could not be measured"),
    ],
)
def test_uploads_that_take_longer_than_the_time_between_saves_are_told(
    rate: float | None, save_steps: int, status: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "measure_upload_rate", lambda options, folder: rate)
    check = find(check_times(facts_of(save_steps=save_steps), PROBE, OPTIONS), "uploading")
    assert (check.status, text in check.message) == (status, True), check.message


def test_a_rate_limit_is_the_rate_and_save_seconds_are_an_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forecast, "measure_upload_rate", lambda options, folder: 1e9)
    limited = TransportOptions("gs://bucket", "python", max_bytes_per_second=1e6)
    check = find(check_times(facts_of(save_seconds=3600.0), PROBE, limited), "uploading")
    assert "each about 3h20m" in check.message
    assert check.status == "warn"
    assert "every 50.0s" in check.message  # 100 steps come before 3,600 s


def test_a_price_gives_the_cost_of_the_run() -> None:
    # 500 s of steps, a cent for ten of them; 2,048,000 tokens.
    facts = facts_of(hourly_price=3.6, max_eval_samples=1)
    assert find(check_times(facts, PROBE, None), "cost").message == (
        "about $0.50 to the end, $0.24 per million tokens, at $3.60 an hour"
    )
    assert find(check_times(facts_of(), PROBE, None), "cost").message.startswith("unknown")


def test_only_a_long_run_is_worth_a_small_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "CPU_FLOPS", 1e12 / (os.cpu_count() or 1))
    # 2,048 tokens a step of 6e9 FLOPs each, and attention: some 31 s a step.
    assert is_long_run(facts_of(max_steps=40))
    assert not is_long_run(facts_of(max_steps=20))


def test_the_rate_of_a_directory_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    rate = measure_upload_rate(TransportOptions(str(tmp_path / "bucket"), "directory"), "folder")
    assert rate is not None
    assert rate > 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_time_of_a_request_is_no_part_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowTransport:
        """2 s a request and 1 MiB/s."""

        def stat(self, name: str) -> None:
            return None

    def put(transport: Transport, name: str, data: bytes, expected: object) -> None:
        sizes.append(len(data))
        clock[0] += 2 + len(data) / 2**20

    sizes: list[int] = []
    clock = [0.0]
    monkeypatch.setattr(upload_rate, "put_bytes", put)
    monkeypatch.setattr(upload_rate.time, "perf_counter", lambda: clock[0])
    rate = upload_rate._measure(SlowTransport(), "name")  # type: ignore[arg-type]
    assert rate == pytest.approx(2**20, rel=1e-3)
    assert sizes == [1, 2**20, 12 * 2**20]
