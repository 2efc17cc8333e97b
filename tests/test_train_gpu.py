"""What only a GPU shows: no waiting within a step, compiled kernels, float8, memory of the loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.model_config import build_model_config
from configs.training_config import get_training_config
from utils import training_utils

TINY = {
    "model_overrides.num_hidden_layers": 2,
    "model_overrides.hidden_size": 64,
    "model_overrides.intermediate_size": 256,
    "sequence_length": 64,
    "global_batch_size": 4,
}


@pytest.fixture
def _own_accelerator() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def build_state(folder: Path, **settings: Any) -> Any:
    config = get_training_config("test", {**TINY, "cache_dir": str(folder), **settings})
    model_config = build_model_config(
        config.model,
        config.model_overrides,
        config.sequence_length,
        config.pad_vocab_to_multiple_of,
    )
    training_utils.set_determinism(config)
    precision = training_utils.resolve_precision(config)
    accelerator = training_utils.build_accelerator(config, precision, [], folder)
    return training_utils.build_train_state(accelerator, model_config, config)


def train(state: Any, steps: int, accumulation: int = 4) -> list[float]:
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        batches = [
            torch.randint(0, 4096, (1, 64), generator=generator) for _ in range(accumulation)
        ]
        if state.accelerator.device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        training_utils.train_step(state, batches, 1.0)
        losses.append(state.interval)
    return [total.item() for total, _ in losses]


@pytest.mark.gpu
@pytest.mark.usefixtures("_own_accelerator")
@pytest.mark.parametrize("settings", [{}, {"torch_compile": True}])
def test_a_step_never_waits_for_the_device(tmp_path: Path, settings: dict[str, Any]) -> None:
    state = build_state(tmp_path, **settings)
    train(state, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            batches = [
                torch.randint(0, 4096, (1, 64), generator=generator).pin_memory() for _ in range(4)
            ]
            training_utils.train_step(state, batches, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("_own_accelerator")
def test_muon_goes_on_from_its_state_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what full_determinism sets
    states = [build_state(tmp_path, optim="muon", full_determinism=True) for _ in range(2)]
    try:
        train(states[0], 2)
        parts = [(one.core_model, one.optimizer, one.scheduler) for one in states]
        for before, after in zip(*parts, strict=True):
            after.load_state_dict(copy.deepcopy(before.state_dict()))
        for one in states:
            train(one, 2)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    for one, other in zip(*(state[0].parameters() for state in parts), strict=True):
        assert torch.equal(one, other)
    moments = [
        value["momentum_buffer"]
        for value in parts[1][1].state_dict()["state"].values()
        if "momentum_buffer" in value
    ]
    assert {moment.device for moment in moments} == {states[1].accelerator.device}


@pytest.mark.gpu
@pytest.mark.usefixtures("_own_accelerator")
@pytest.mark.parametrize(
    "settings",
    [
        {"torch_compile": True},
        {"torch_compile": True, "use_regional_compilation": False},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_policy": "selective",
            "torch_compile": True,
        },
        {"fp8": True, "torch_compile": True},
    ],
)
def test_every_kind_of_step_trains_as_the_plain_one(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    from accelerate.state import AcceleratorState, GradientState

    if settings.get("fp8"):
        pytest.importorskip("torchao", reason="fp8 needs torchao")
    plain = train(build_state(tmp_path), 4)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    state = build_state(tmp_path, **settings)
    if settings.get("fp8"):
        layers = state.core_model.gpt_neox.layers
        assert "Float8Linear" in {type(part).__name__ for part in layers.modules()}
        assert type(state.core_model.get_output_embeddings()).__name__ == "Linear"
    other = train(state, 4)
    assert other == pytest.approx(plain, rel=2e-2)
