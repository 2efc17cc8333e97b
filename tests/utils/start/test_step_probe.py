"""A small step of a model: extrapolated as it should be, and harmless."""

from __future__ import annotations

import pytest
import torch

from configs.model_config import build_model_config
from configs.training_config import TrainingConfig
from utils.models.building import count_parameters
from utils.start import step_probe
from utils.start.facts import RunFacts
from utils.start.step_probe import StepProbe, _growing_sizes, measure_step

CPU = torch.device("cpu")
OVERRIDES = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
}


def probe(available: int = 2**40, **values: object) -> StepProbe | None:
    settings = {"sequence_length": 128, "per_device_train_batch_size": 3, **values}
    config = TrainingConfig(model="neox-tiny", **settings)  # type: ignore[arg-type]
    model_config = build_model_config(config.model, OVERRIDES)
    counts = count_parameters(model_config)
    return measure_step(RunFacts(config, model_config, counts, "no", CPU, 1), available)


class FakeModel:
    """Costs 1 ms a token and, for each layer, 10 ms a token; updates 1 us a weight."""

    def __init__(self, config: TrainingConfig, small: object, *args: object) -> None:
        self.layers = small.num_hidden_layers  # type: ignore[attr-defined]
        self.parameters = count_parameters(small).total

    def run_pass(self, size: tuple[int, int]) -> float:
        tokens = size[0] * size[1]
        return tokens * (1e-3 + 10e-3 * self.layers)

    time_pass = run_pass

    def time_update(self) -> float:
        return self.parameters * 1e-6

    def free(self) -> None:
        pass


def expected_seconds(tokens: int, accumulation: int) -> float:
    update = count_parameters(build_model_config("neox-tiny", OVERRIDES)).total * 1e-6
    return accumulation * tokens * (1e-3 + 60e-3) + update


def test_layers_tokens_and_updates_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_probe, "_SmallModel", FakeModel)
    found = probe(global_batch_size=6)
    assert found is not None
    assert (found.samples, found.tokens) == (3, 128)
    assert found.step_seconds == pytest.approx(expected_seconds(384, 2), rel=1e-6)


def test_what_the_time_is_not_enough_for_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_probe, "_SmallModel", FakeModel)
    monkeypatch.setattr(step_probe, "_find_size", lambda model, fitting: fitting[2])
    found = probe()
    assert found is not None
    assert (found.samples, found.tokens) == (2, 128)
    assert found.step_seconds == pytest.approx(expected_seconds(384, 1), rel=1e-6)


def test_the_size_stops_growing_when_the_time_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowModel:
        def run_pass(self, size: tuple[int, int]) -> float:
            clock[0] += size[0] * size[1] / 1000
            return 0.0

    clock = [0.0]
    monkeypatch.setattr(step_probe.time, "perf_counter", lambda: clock[0])
    sizes = list(_growing_sizes(64, 1024))
    assert step_probe._find_size(SlowModel(), sizes) == (1, 1024)  # type: ignore[arg-type]
    clock[0] = 0.0
    assert step_probe._find_size(SlowModel(), sizes[:3]) == (1, 256)  # type: ignore[arg-type]


def test_a_step_too_large_for_the_memory_is_not_tried() -> None:
    assert probe(available=1000) is None


def test_the_probe_leaves_random_states_alone() -> None:
    before = torch.get_rng_state()
    found = probe()
    assert found is not None
    assert found.step_seconds > 0
    assert torch.equal(torch.get_rng_state(), before)
