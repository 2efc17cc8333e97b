"""Learning rates of whole runs, those of earlier versions too; an optimizer that is not there."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.training_config import TrainingConfig
from utils.base.errors import ConfigError
from utils.training_utils import build_accelerator, build_scheduler


def learning_rates(**values: Any) -> list[float]:
    """Return the learning rate of each step of a run."""
    config = TrainingConfig(**values)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler, rates = build_scheduler(optimizer, config), []
    for _ in range(config.max_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert scheduler.state_dict()["lr_lambdas"] == [None]  # nothing of it outlives a change of keys
    return rates


def formula(kind: str, step: int, warmup: int, last: int, floor: float) -> float:
    """Return the share of the peak, as checkpoints of earlier versions have it."""
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step + 1 - warmup) / max(1, last - warmup))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0 - progress
    return floor + (1.0 - floor) * shape


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("warmup", "last"), [(0, 1), (0, 97), (10, 300), (7, 7), (9, 5), (99, 100)]
)
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.37, 1.0])
def test_every_step_of_a_run_has_the_learning_rate_that_it_always_had(
    kind: str, warmup: int, last: int, floor: float
) -> None:
    expected = [2e-4 * formula(kind, step, warmup, last, floor) for step in range(last)]
    found = learning_rates(
        lr_scheduler_type=kind, warmup_steps=warmup, max_steps=last, min_lr_rate=floor
    )
    assert found == expected  # to the bit


COSINE = [1, 0.969552, 0.882843, 0.753073, 0.6, 0.446927, 0.317157, 0.230448, 0.2]
COSINE_WAVE = [0.6 + 0.4 * math.cos(math.pi * n / 4) for n in range(1, 9)]


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (
            "cosine",
            {},
            [0.5, *COSINE],
        ),
        ("linear", {}, [0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
        ("constant", {}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", {}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (
            "polynomial",
            {"power": 2},
            [0.5, 1, *(0.2 + 0.8 * (n / 8) ** 2 for n in range(7, -1, -1))],
        ),
        ("warmup_stable_decay", {"num_decay_steps": 2}, [0.5, 1, 1, 1, 1, 1, 1, 1, 0.6, 0.2]),
        (
            "cosine_with_restarts",
            {"num_cycles": 2},
            [0.5, 1, *(0.6 + 0.4 * math.cos(math.pi * n / 4) for n in (1, 2, 3, 0, 1, 2, 3, 4))],
        ),
        ("cosine", {"num_cycles": 1}, [0.5, 1, *COSINE_WAVE]),
        ("polynomial", {"lr_end": 0.2}, [0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
        ("cosine_with_min_lr", {}, [0.5, *COSINE]),
        ("cosine_with_min_lr", {"min_lr": 0.2}, [0.5, *COSINE]),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.2}, [0.5, *COSINE]),
        (
            "cosine_warmup_with_min_lr",
            {"min_lr_rate": 0.2, "warmup_lr_rate": 0.3},
            [0.3, *COSINE],
        ),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 4, "decay_type": "1-sqrt"},
            [0.5, 1, 1, 1, 1, 1, *(1 - 0.8 * math.sqrt(n / 4) for n in (1, 2, 3, 4))],
        ),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 2, "num_stable_steps": 3, "min_lr_ratio": 0},
            [0.5, 1, 1, 1, 1, 0.5, 0, 0, 0, 0],
        ),
        ("inverse_sqrt", {}, [0.5, *(math.sqrt(2 / n) for n in range(2, 11))]),
    ],
)
def test_a_schedule_has_the_rates_that_a_table_says(
    kind: str, settings: dict[str, float], expected: list[float]
) -> None:
    found = learning_rates(
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=settings,
        warmup_steps=2,
        max_steps=10,
        min_lr_rate=0.2,
        learning_rate=1.0,
    )
    assert found == pytest.approx(expected)


def test_an_optimizer_whose_package_is_missing_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes, .* pip install bitsandbytes"):
        build_accelerator(TrainingConfig(optim="adamw_bnb_8bit"), "no", [], Path())
