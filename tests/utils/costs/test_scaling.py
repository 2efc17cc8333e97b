"""Plans on paper: cases computed by hand, and one GPU's estimates."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.model_config import build_model_config
from utils.costs.gpu_types import GPU_TYPES
from utils.costs.scaling import (
    CHECKPOINTING,
    STRATEGIES,
    USABLE_MEMORY,
    TrainingJob,
    best_plan,
    candidate_plans,
    device_memory,
    fits,
    plan_step,
    sent_bytes,
    shape_of_preset,
)
from utils.models.building import count_parameters
from utils.models.estimates import ModelShape, StepSetup, estimate_training_memory

H100 = GPU_TYPES["H100"]
MODELS = ("pythia-160m", "refocused-1.2b", "pythia-6.9b", "gpt-neox-20b")
# 4 layers of 10^6 parameters, embeddings of 2 x 10^5.
SMALL = ModelShape(4_200_000, 200_000, 4, 100, 400, 1000)


def job(strategy: str, gpus: int, shape: ModelShape = SMALL, batch: int = 1024) -> TrainingJob:
    return TrainingJob(shape, H100, gpus, strategy, batch)


@pytest.mark.parametrize("model", MODELS)
def test_the_shape_of_a_preset_is_that_of_its_model(model: str) -> None:
    config = build_model_config(model)
    counts = count_parameters(config)
    assert shape_of_preset(model) == ModelShape.of(config, counts.total, counts.embedding)


@pytest.mark.parametrize("model", ["pythia-160m", "refocused-1.2b", "pythia-6.9b"])
@pytest.mark.parametrize("gpus", [1, 64])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_ddp_and_one_gpu_take_the_memory_of_the_estimates(
    model: str, gpus: int, accumulation: int, checkpointing: str
) -> None:
    shape = shape_of_preset(model)
    expected = estimate_training_memory(
        shape,
        StepSetup(
            micro_batch=2,
            sequence_length=2048,
            precision="bf16",
            gradient_checkpointing="" if checkpointing == "none" else checkpointing,
            accumulation=accumulation,
            world_size=gpus,
            device="cuda",
        ),
    )
    memory = device_memory(job("ddp", gpus, shape), 2, checkpointing, accumulation)
    assert memory.total == expected.total
    assert (memory.state, memory.gradients) == (expected.state, expected.gradients)
    if gpus == 1:  # there is nothing to shard, whatever the strategy is called
        others = {
            device_memory(job(strategy, 1, shape), 2, checkpointing, accumulation)
            for strategy in STRATEGIES
        }
        assert others == {memory}


def test_weights_gradients_and_moments_are_divided_as_the_paper_divides_them() -> None:
    # Of 4,200,000 parameters on 16 GPUs in machines of 8.
    found = {strategy: device_memory(job(strategy, 16), 1, "full", 1) for strategy in STRATEGIES}
    states = {strategy: (memory.state, memory.gradients) for strategy, memory in found.items()}
    assert states == {
        "ddp": (50_400_000, 33_600_000),  # 12 P; 4 P, and as much in buckets
        "zero1": (16_800_000 + 2_100_000, 33_600_000),  # 4 P + 8 P / 16
        "zero2": (3_150_000, 1_050_000),  # 12 P / 16; 4 P / 16
        "fsdp": (3_150_000, 1_050_000),
        "hsdp": (6_300_000, 2_100_000),  # 12 P / 8: shards of one machine
    }
    # 2 bytes of embeddings and of two layers (zero2: all four), and 6 of two layers' gradients.
    assert found["fsdp"].gathered == 2 * (200_000 + 2_000_000) + 6 * 2_000_000
    assert found["zero2"].gathered == 2 * 4_200_000 + 6 * 2_000_000


def test_checkpointing_keeps_less_and_computes_more() -> None:
    # A token of a layer: 4 x 100 and 2 x (9 x 100 + 2 x 400) = 3800 bytes; its input 400.
    ten = dataclasses.replace(job("ddp", 1), sequence_length=10)
    assert [device_memory(ten, 1, kind, 1).activations for kind in CHECKPOINTING] == [
        4 * 38_000,
        4 * (4_000 + 20 * (6 * 100 + 400)) + 38_000,
        4 * 4_000 + 38_000,
    ]
    plans = [plan_step(job("ddp", 1), 1, kind) for kind in CHECKPOINTING]
    forward = plans[0].compute_seconds / 3
    again = [plan.compute_seconds - plans[0].compute_seconds for plan in plans]
    assert again == pytest.approx([0, 0.15 * forward, forward])


def test_traffic_is_that_of_the_papers() -> None:
    parameters, share = SMALL.parameters, 15 / 16
    sent = {strategy: sent_bytes(job(strategy, 16), 1) / parameters for strategy in STRATEGIES}
    assert sent["ddp"] == sent["zero1"] == pytest.approx(2 * share * 4)
    assert sent["zero2"] == pytest.approx(share * (2 + 4))
    again = 2 * (1 - 200_000 / 4_200_000)  # the embeddings are gathered once
    assert sent["fsdp"] == pytest.approx(share * (2 + again + 4))
    assert sent["hsdp"] == pytest.approx(7 / 8 * (6 + again) + 2 * (1 / 2) * 4 / 8)
    # Rajbhandari et al. 2020, section 7: with 16-bit gradients, 3 P against 2 P elements.
    layers = dataclasses.replace(SMALL, embedding=0)
    half = dataclasses.replace(job("fsdp", 16, layers), reduce_bytes=2)
    assert sent_bytes(half, 1) / (sent["ddp"] / 2 * parameters) == pytest.approx(1.5)
    # Every micro-step for what is sharded, once for what is not.
    assert sent_bytes(job("fsdp", 16), 4) == 4 * sent_bytes(job("fsdp", 16), 1)
    assert sent_bytes(job("ddp", 16), 4) == sent_bytes(job("ddp", 16), 1)
    assert sent_bytes(job("hsdp", 1), 4) == 0


@given(
    model=st.sampled_from(MODELS),
    strategy=st.sampled_from(list(STRATEGIES)),
    gpu=st.sampled_from(list(GPU_TYPES.values())),
    gpus=st.sampled_from([1, 2, 8, 16, 64, 512]),
)
def test_no_plan_is_better_than_it_can_be(
    model: str, strategy: str, gpu: object, gpus: int
) -> None:
    here = TrainingJob(shape_of_preset(model), gpu, gpus, strategy)  # type: ignore[arg-type]
    plans = candidate_plans(here)
    assert {plan.micro_batch * plan.accumulation * gpus for plan in plans} == {1024}
    for plan in plans:
        least = plan.compute_seconds + plan.optimizer_seconds
        assert least * (1 - 1e-9) <= plan.step_seconds
        assert plan.step_seconds <= (least + plan.communication_seconds) * (1 + 1e-9)
        assert plan.mfu < here.gpu.efficiency
    best = best_plan(here)
    usable = [plan for plan in plans if fits(here, plan.memory)]
    assert (best is None) == (not usable)
    if best is not None:
        assert best.memory.total <= USABLE_MEMORY * here.gpu.memory_bytes
        assert best.step_seconds <= 1.01 * min(plan.step_seconds for plan in usable)


def test_a_batch_that_cannot_be_shared_or_a_model_that_does_not_fit_has_no_plan() -> None:
    assert candidate_plans(job("ddp", 16, batch=24)) == []
    assert best_plan(job("ddp", 2048)) is None
    assert best_plan(job("ddp", 512, shape_of_preset("gpt-neox-20b"))) is None  # does not fit
