"""What a person sees of a run: lines that fit 100 columns, and signs of life."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from configs.training_config import TrainingConfig
from utils.base import console
from utils.models.mfu import Utilization
from utils.run import metrics
from utils.run.metrics import RunMetrics, shorten
from utils.training.throughput import Throughput
from utils.training_utils import TrainingProgress

PREFIXES = ("12:00:00 ", "2026-01-01 12:00:00 ")  # on a terminal, in a log


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def metrics_of(step: int, **progress: Any) -> RunMetrics:
    """Return the metrics of a run of 100,000 steps."""
    state = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, is_main_process=True, log=lambda *_, **__: 0),
        utilization=lambda length: Utilization(1.0, None),
        progress=SimpleNamespace(
            step=step,
            sample_index=0,
            tokens_seen=0,
            best_validation_loss=None,
            add_metrics=lambda record: None,
            **progress,
        ),
        interval=SimpleNamespace(zero_=lambda: None),
        last_learning_rate=2e-4,
        grad_norm=SimpleNamespace(item=lambda: 1234.5678),
    )
    data = SimpleNamespace(
        validation=SimpleNamespace(num_samples=51),
        take_wait_seconds=lambda: 0.0,
        order=SimpleNamespace(epoch_of=lambda index: (0, 0)),
    )
    config = TrainingConfig(max_steps=100_000, global_batch_size=1024)
    return RunMetrics(config, state, data)  # type: ignore[arg-type]


def test_the_log_line_of_a_step_fits_100_columns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the largest numbers of 1.2B parameters: 45 days on one GPU, 1.23M tokens/s on many."""
    speed = {"tokens_per_second": 1_234_567.0, "step_seconds": 1.0, "data_wait_share": 0.0}
    found = metrics_of(99_999)
    monkeypatch.setattr(metrics, "mean_loss", lambda state: 10.82497)
    monkeypatch.setattr(Throughput, "report", lambda self, *_: speed)
    monkeypatch.setattr(RunMetrics, "_eta_seconds", lambda self, _: 45.5 * 86400)
    with caplog.at_level(logging.INFO, logger="train"):
        found.log_step()
    (record,) = caplog.records
    assert max(len(prefix + record.getMessage()) for prefix in PREFIXES) <= 100
    for part in (
        "Step 99999/100000",
        "loss 10.8250",
        "lr 2.00e-4",
        "grad 1.23k",
        "1.23M tok/s",
        "ETA 45d12h",
    ):
        assert part in record.getMessage()


def test_a_best_loss_that_no_training_has_reached_is_called_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = metrics_of(0)
    progress = found._state.progress = TrainingProgress()
    with caplog.at_level(logging.INFO, logger="train"):
        for progress.step, loss in ((0, 4.0), (10, 5.0), (20, 3.0)):
            progress.add_validation(loss)
            found.log_validation(loss, 1.0)
    told = ["best 4.0000, took", "best 4.0000 (before training), took", "best 3.0000, took"]
    assert [part in message for part, message in zip(told, caplog.messages, strict=True)] == [
        True
    ] * 3


def test_a_count_is_short() -> None:
    counts = (0.5, 547, 999.4, 999.6, 12_345, 1_234_567, 2.5e9)
    assert [*map(shorten, counts)] == ["0.5", "547", "999", "1k", "12.3k", "1.23M", "2.5G"]


def test_without_a_terminal_a_long_evaluation_is_told_of_now_and_then(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    found = metrics_of(40)
    with caplog.at_level(logging.INFO):
        clock.now = 1000.0
        found.note_step()
        for seconds, done in ((10, 4), (29, 8), (31, 12), (50, 16), (62, 20)):
            clock.now = 1000.0 + seconds
            found.show_pause(f"evaluating, {done} of 51 samples")
    assert [record.getMessage() for record in caplog.records] == [
        "Step 40/100000  evaluating, 12 of 51 samples",
        "Step 40/100000  evaluating, 20 of 51 samples",
    ]
