"""The largest micro-batch that fits, with the samples of a step kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from configs.model_config import build_model_config
from configs.training_config import TrainingConfig, get_training_config
from utils.base.errors import ConfigError, PreflightError
from utils.models.building import count_parameters
from utils.start import micro_batch
from utils.start.facts import RunFacts

CPU = torch.device("cpu")


def facts_of(
    device: torch.device = CPU, precision: str = "no", world_size: int = 1, **settings: Any
) -> RunFacts:
    config = get_training_config("test", {"per_device_train_batch_size": "auto", **settings})
    model_config = build_model_config(config.model)
    counts = count_parameters(model_config)
    return RunFacts(config, model_config, counts, precision, device, world_size)


def resolve(
    monkeypatch: pytest.MonkeyPatch, free: int, global_batch: int = 24, world_size: int = 1
) -> TrainingConfig:
    monkeypatch.setattr(micro_batch, "find_free_memory", lambda device: (free, "this machine"))
    facts = facts_of(world_size=world_size, global_batch_size=global_batch)
    return micro_batch.resolve_micro_batch(facts).config


def test_with_less_memory_the_step_keeps_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for free in (3 * 10**8, 5 * 10**8, 9 * 10**8, 2**40):
        config = resolve(monkeypatch, free)
        samples, accumulation = config.resolve_batch(1)
        assert samples == 24
        assert accumulation * config.per_device_train_batch_size == 24
        sizes.append(config.per_device_train_batch_size)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    assert sizes[-1] == 24  # with much memory a step is one micro-batch


def test_each_rank_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(monkeypatch, 2**40, world_size=4)
    assert config.per_device_train_batch_size == 6
    with pytest.raises(ConfigError, match="24 is no multiple of 5 ranks"):
        resolve(monkeypatch, 2**40, world_size=5)


def test_samples_without_number_are_divided_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert micro_batch.divisors(12) == [12, 6, 4, 3, 2, 1]
    assert micro_batch.divisors(10**18)[0] == 65536
    assert micro_batch.divisors(1000003) == [1]  # prime
    assert resolve(monkeypatch, 2**60, 10**18).per_device_train_batch_size == 65536


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_trial_on_a_gpu_leaves_room_for_the_buckets_of_ranks(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(micro_batch, "find_free_memory", lambda device: (2**40, "a GPU"))
    monkeypatch.setattr(micro_batch, "try_step", lambda *args: tried.append(args[-1]) or True)
    facts = facts_of(torch.device("cuda"), "bf16", world_size)
    micro_batch.resolve_micro_batch(facts)
    assert tried == [4 * facts.counts.total * (world_size > 1)]


def test_what_does_not_fit_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreflightError, match="Not even one sample of 512 tokens fits"):
        resolve(monkeypatch, 10**6)


def test_auto_is_a_word_for_one_key_and_needs_the_samples_of_a_step() -> None:
    config = get_training_config("test", {"per_device_train_batch_size": "auto"})
    assert (config.auto_find_batch_size, config.per_device_train_batch_size) == (True, 1)
    assert not get_training_config("test", {"per_device_train_batch_size": 2}).auto_find_batch_size
    with pytest.raises(ConfigError, match="needs global_batch_size"):
        get_training_config("production", {"per_device_train_batch_size": "auto"})
    with pytest.raises(ConfigError, match="must be a whole number"):
        get_training_config("test", {"per_device_train_batch_size": "most"})


@pytest.mark.gpu
def test_a_gpu_is_filled_and_not_overfilled() -> None:
    from utils.start.step_probe import try_step

    device = torch.device("cuda")
    settings = {"global_batch_size": 4096, "model": "pythia-160m", "sequence_length": 2048}
    found = micro_batch.resolve_micro_batch(facts_of(device, "bf16", **settings))
    assert try_step(found)
    free = torch.cuda.mem_get_info()[0]
    assert free > 0.9 * torch.cuda.get_device_properties(device).total_memory  # all given back
