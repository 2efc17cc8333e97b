"""train.py counts what it spends, over restarts, and changes nothing by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_train_recovery import BadLosses
from utils.checkpoints.layout import read_json
from utils.costs.spending import Spending
from utils.storage.bucket import crc32c_of_file
from utils.tracking.metrics_log import MetricsLog, read_metrics

Train = Callable[..., int]
SETTINGS = ("logging_steps=1", "save_steps=2", "checkpoint_uri=")
A_DOLLAR_A_SECOND = ("--hourly-price", "3600")
TWO_DOLLARS_A_SECOND = ("--hourly-price", "7200")


def read_log(tmp_path: Path) -> MetricsLog:
    return read_metrics(tmp_path / "run/logs/metrics.jsonl")


def spending_of(value: dict[str, Any]) -> Spending:
    spending = Spending.from_json(value["spending"])
    assert spending is not None
    return spending


def checkpoint(tmp_path: Path, step: int) -> Path:
    return tmp_path / "run/checkpoints" / f"checkpoint-epoch0-step{step}-files0"


def test_spending_goes_on_over_starts_and_prices(run_train: Train, tmp_path: Path) -> None:
    words = ("--max-steps", "4")
    assert run_train(*words, "--stop-after", "2", *A_DOLLAR_A_SECOND, settings=SETTINGS) == 0
    assert run_train(*words, "--resume", "latest", *TWO_DOLLARS_A_SECOND, settings=SETTINGS) == 0
    events = read_log(tmp_path).events
    start, stopped, resumed, done = (
        event for event in events if event["event"] in ("start", "resume", "end")
    )
    assert (start["hourly_price"], resumed["hourly_price"]) == (3600, 7200)
    assert spending_of(start) == Spending()
    first, before, last = spending_of(stopped), spending_of(resumed), spending_of(done)
    assert (first.starts, last.starts) == (1, 2)
    assert first.total.dollars == pytest.approx(first.total.seconds)
    assert first.lost.seconds == 0
    # All of the first start is known, and from its save on it is lost.
    assert before.total == first.total
    saved = spending_of(read_json(checkpoint(tmp_path, 2) / "metadata.json"))
    assert before.lost.seconds == pytest.approx(first.total.seconds - saved.total.seconds)
    more = last.total.seconds - first.total.seconds
    assert last.total.dollars == pytest.approx(first.total.dollars + 2 * more)
    assert before.lost.seconds < last.lost.seconds < last.total.seconds
    metadata = read_json(checkpoint(tmp_path, 4) / "metadata.json")
    assert before.total.seconds < spending_of(metadata).total.seconds < last.total.seconds
    text = (tmp_path / "run/logs/train.log").read_text()
    assert " in 2 attempts (" in text
    assert " per million tokens; " in text
    assert text.splitlines()[-3].endswith("Done: step 4 of 4.")  # then the command that goes on


def test_a_rollback_loses_what_its_checkpoint_has_not(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BadLosses(monkeypatch, {4: float("nan")})
    settings = (*SETTINGS, "bad_step=rollback")
    assert run_train("--max-steps", "4", settings=settings) == 0
    last = spending_of(read_log(tmp_path).events[-1])
    assert last.starts == 1
    assert 0 < last.lost.seconds < last.total.seconds


def forget_spending(path: Path) -> None:
    """Make a checkpoint what a version that did not count would have written."""
    metrics = read_json(path / "training_metrics.json")
    del metrics["progress"]["spending"]
    (path / "training_metrics.json").write_text(json.dumps(metrics))
    manifest = read_json(path / "manifest.json")
    file = path / "training_metrics.json"
    manifest["files"][file.name] = {"size": file.stat().st_size, "crc32c": crc32c_of_file(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_an_old_checkpoint_is_resumed(run_train: Train, tmp_path: Path) -> None:
    words = ("--max-steps", "4")
    assert run_train(*words, "--stop-after", "2", settings=SETTINGS) == 0
    forget_spending(checkpoint(tmp_path, 2))
    (tmp_path / "run/logs/metrics.jsonl").unlink()
    # What an earlier version took as a setting breaks no resume.
    settings = (*SETTINGS, "machine_type=gcp/a2-highgpu-8g")
    assert run_train(*words, "--resume", "latest", *A_DOLLAR_A_SECOND, settings=settings) == 0
    last = spending_of(read_log(tmp_path).events[-1])
    assert (last.starts, last.lost.seconds) == (1, 0)
    assert last.total.dollars > 0
