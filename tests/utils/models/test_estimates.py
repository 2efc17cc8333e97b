"""Estimates are held against what autograd keeps, and against what real steps take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory import CPU_CASES, CPU_SEQUENCE_LENGTH, GPU_CASES, measure_peak
from utils.models.estimates import (
    LOGIT_BYTES,
    MemoryEstimate,
    ModelShape,
    StepSetup,
    count_pauses,
    estimate_evaluation_seconds,
    estimate_training_memory,
)

CPU_TOLERANCE, GPU_TOLERANCE = 0.15, 0.10
SHAPE = ModelShape(10**6, 2 * 10**5, 4, 128, 512, 1000)


def test_accumulation_ranks_and_logits_take_memory_of_their_own() -> None:
    def estimate(**options: Any) -> MemoryEstimate:
        setup = StepSetup(micro_batch=2, sequence_length=512, **options)
        return estimate_training_memory(SHAPE, setup)

    once = estimate()
    assert estimate(accumulation=2).total - once.total >= once.gradients
    assert estimate(world_size=2).total - once.total >= once.gradients  # buckets
    assert estimate(is_loss_chunked=False).logits == LOGIT_BYTES * 1024 * SHAPE.vocabulary
    assert once.state == 12 * SHAPE.parameters
    hidden = SHAPE.parameters - SHAPE.embedding
    assert once.state - estimate(optim="muon").state == 4 * hidden  # one moment in place of two
    assert 6 * SHAPE.parameters < estimate(optim="adamw_bnb_8bit").state < 6.1 * SHAPE.parameters
    assert 4 * SHAPE.parameters < estimate(optim="adafactor").state < 4.1 * SHAPE.parameters
    assert estimate_evaluation_seconds(8, 4, 3.0) == pytest.approx(2.0)  # forward passes only


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
