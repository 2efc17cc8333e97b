"""Estimates are held against what autograd keeps, and against what real steps take."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import CPU_CASES, CPU_SEQUENCE_LENGTH, GPU_CASES, measure_peak
from configs.model_config import build_model_config
from configs.training_config import TrainingConfig
from utils.models.building import LossModel, build_model
from utils.models.estimates import (
    LOGIT_BYTES,
    MemoryEstimate,
    ModelShape,
    StepSetup,
    activation_bytes,
    count_pauses,
    estimate_evaluation_seconds,
    estimate_training_memory,
    selective_bytes,
)
from utils.training_utils import forward_loss

CPU_TOLERANCE, GPU_TOLERANCE = 0.15, 0.10
SHAPE = ModelShape(10**6, 2 * 10**5, 4, 128, 512, 1000)


def kept_bytes(layers: int, tokens: int, *, bf16: bool, policy: str) -> int:
    """Return the bytes that are allocated in a forward pass and still there behind it."""
    config = build_model_config("neox-tiny", {"num_hidden_layers": layers})
    training = TrainingConfig(
        model="neox-tiny",
        gradient_checkpointing=bool(policy),
        gradient_checkpointing_policy=policy or "full",
    )
    model = LossModel(build_model(config, training))
    gc.collect()  # what goes meanwhile would count as if it had been there
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched,
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss = forward_loss(model, torch.zeros((1, tokens), dtype=torch.int64), None)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in watched.key_averages())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("policy", ["", "full", "selective"])
def test_a_layer_keeps_what_autograd_keeps(policy: str, *, bf16: bool) -> None:
    # What is kept of the weights (autocast's copies) does not grow with the tokens.
    few, many = (
        [kept_bytes(layers, tokens, bf16=bf16, policy=policy) for layers in (1, 3)]
        for tokens in (64, 128)
    )
    of_a_token = ((many[1] - many[0]) - (few[1] - few[0])) / 2 / 64
    config = build_model_config("neox-tiny")
    shape = ModelShape.of(config, 0, 0)
    precision = "bf16" if bf16 else "no"
    layer, layer_input = activation_bytes(shape, precision)
    wanted = {"": layer, "full": layer_input, "selective": selective_bytes(shape, precision)}
    assert of_a_token == pytest.approx(wanted[policy], rel=0.01)


def test_gradients_count_all_the_time_where_they_are_accumulated() -> None:
    once = estimate_training_memory(SHAPE, StepSetup(micro_batch=4, sequence_length=512))
    often = estimate_training_memory(
        SHAPE, StepSetup(micro_batch=4, sequence_length=512, accumulation=2)
    )
    assert often.total - once.total >= once.gradients


def test_several_ranks_have_buckets_besides_gradients() -> None:
    one = estimate_training_memory(SHAPE, StepSetup(micro_batch=1, sequence_length=8))
    two = estimate_training_memory(SHAPE, StepSetup(micro_batch=1, sequence_length=8, world_size=2))
    assert two.total - one.total >= one.gradients


def test_sharded_ranks_hold_a_part_of_the_state_and_gather_two_layers() -> None:
    def estimate(**options: Any) -> MemoryEstimate:
        return estimate_training_memory(
            SHAPE, StepSetup(micro_batch=1, sequence_length=8, **options)
        )

    whole, eight = estimate(world_size=8), estimate(world_size=8, is_sharded=True)
    assert eight.state == whole.state // 8
    layer = (SHAPE.parameters - SHAPE.embedding) // SHAPE.layers
    assert eight.casts == 4 * (SHAPE.embedding + 2 * layer)  # float32: gathered as they are
    half = estimate(world_size=8, is_sharded=True, precision="bf16")
    assert half.casts == eight.casts // 2
    kept = estimate(world_size=8, is_sharded=True, is_resharded=False)
    assert kept.casts - eight.casts == 4 * layer * (SHAPE.layers - 2)
    assert eight.total < whole.total
    assert estimate(is_sharded=True) == estimate()  # one rank has nothing to share


def test_zero_keeps_whole_weights_and_divides_the_rest() -> None:
    def estimate(stage: int, **options: Any) -> MemoryEstimate:
        return estimate_training_memory(
            SHAPE,
            StepSetup(micro_batch=1, sequence_length=8, world_size=8, zero_stage=stage, **options),
        )

    ddp, one, two = estimate(0), estimate(1), estimate(2)
    parameters = SHAPE.parameters
    assert ddp.state == 12 * parameters
    assert one.state == two.state == 4 * parameters + 12 * parameters // 8
    assert one.gradients - two.gradients == 4 * parameters - 4 * parameters // 8
    half = estimate(2, precision="bf16")
    assert half.state == two.state - 2 * parameters  # weights in 16 bits
    assert half.casts == 0
    assert estimate(1, precision="bf16").casts == estimate(0, precision="bf16").casts
    assert half.total < two.total < one.total < ddp.total


def test_memory_of_the_logits_grows_with_tokens_and_vocabulary() -> None:
    one = estimate_training_memory(
        SHAPE, StepSetup(micro_batch=2, sequence_length=512, is_loss_chunked=False)
    )
    assert one.logits == LOGIT_BYTES * 1024 * SHAPE.vocabulary
    assert one.state == 12 * SHAPE.parameters


@given(
    begin=st.integers(0, 60),
    length=st.integers(0, 60),
    first=st.integers(1, 12),
    second=st.none() | st.integers(1, 12),
)
def test_pauses_are_counted_as_the_loop_makes_them(
    begin: int, length: int, first: int, second: int | None
) -> None:
    end = begin + length
    due = sum(
        step % first == 0 or (second is not None and step % second == 0) or step == end
        for step in range(begin + 1, end + 1)
    )
    assert count_pauses(begin, end, first, second) == due


def test_an_evaluation_is_forward_passes_only() -> None:
    assert estimate_evaluation_seconds(8, 4, 3.0) == pytest.approx(2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "micro_batch"),
    [(preset, batch) for preset, batches in CPU_CASES.items() for batch in batches],
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
@pytest.mark.skipif(torch.cuda.is_available(), reason="trains on the GPU of this machine")
def test_the_estimate_is_within_15_percent_of_resident_memory(
    preset: str, micro_batch: int, tmp_path: Path
) -> None:
    result = measure_peak(tmp_path, preset, micro_batch, CPU_SEQUENCE_LENGTH)
    assert result["estimated"] == pytest.approx(result["measured"], rel=CPU_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("preset", "micro_batch"),
    [(preset, batch) for preset, batches in GPU_CASES.items() for batch in batches],
)
def test_the_estimate_is_within_10_percent_of_allocated_memory(
    preset: str, micro_batch: int, tmp_path: Path
) -> None:
    result = measure_peak(tmp_path, preset, micro_batch, 2048)
    assert result["estimated"] == pytest.approx(result["measured"], rel=GPU_TOLERANCE)
