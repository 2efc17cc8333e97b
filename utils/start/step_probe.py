"""A small step of the model that is to be trained, timed: what preflight expects of a run.

    model config -> the same model with one layer and with two -> seconds and bytes -> a whole step

Two small models tell what a layer costs and what the rest costs. They have the run's width,
vocabulary and precision. Samples grow until they are the run's own, or the time or the memory is
used up; what the last size takes counts in proportion to its tokens. Weights are a constant:
kernels take the same time for any numbers. No random state is touched.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from configs.training_config import TrainingConfig
from utils.base.machine import PeakMemory
from utils.models.building import (
    LossModel,
    build_core,
    count_parameters,
    enable_checkpointing,
    with_layers,
)
from utils.models.estimates import attention_widths
from utils.models.mfu import flops_per_token
from utils.start.facts import RunFacts
from utils.start.machine_checks import estimate_memory
from utils.training_utils import build_optimizer, forward_loss

PROBE_SECONDS = 8.0
GROWING_SHARE = 0.25  # of that, for finding the size
TIMED_PASSES = 3
SMALLEST_TOKENS = 64
MEMORY_SHARE = 0.7
JUDGED_BYTES = 256 * 2**20
CONSTANT_WEIGHT = 0.02
SPARE_SHARE = 0.05

Size = tuple[int, int]
"""Samples, and tokens in each."""


@dataclass(frozen=True)
class StepProbe:
    """What a small step says of a whole one.

    `step_seconds` is the time of one optimizer update. The largest small step had `samples` of
    `tokens` each. `memory_ratio` is measured over estimated memory, None where too little of it can
    be seen.
    """

    step_seconds: float
    samples: int
    tokens: int
    memory_ratio: float | None


def measure_step(facts: RunFacts, available_bytes: int) -> StepProbe | None:
    """Return what an optimizer update of the run takes; None where not even a small one fits."""
    config, device = facts.config, facts.device
    small = with_layers(facts.model_config, 2)
    counts = count_parameters(small)

    def estimate(size: Size) -> int:
        own = replace(
            config,
            per_device_train_batch_size=size[0],
            sequence_length=size[1],
            global_batch_size=None,
            gradient_accumulation_steps=None,
            auto_find_batch_size=False,
        )
        alone = replace(facts, config=own, model_config=small, counts=counts, world_size=1)
        return estimate_memory(alone).total

    fitting = [
        size
        for size in _growing_sizes(config.per_device_train_batch_size, config.sequence_length)
        if estimate(size) <= MEMORY_SHARE * available_bytes
    ]
    if not fitting:
        return None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        peak = _DevicePeak(device)
        two = _SmallModel(config, small, facts.precision, device)
        size = _find_size(two, fitting)
        two_layers, update = two.time_pass(size), two.time_update()
        measured = peak.read()
        two.free()
        one = _SmallModel(config, with_layers(facts.model_config, 1), facts.precision, device)
        one_layer = one.time_pass(size)
        one.free()
    passes = facts.accumulation * extrapolate_pass(facts, size, one_layer, two_layers)
    # Muon takes its time for the layers, AdamW for all weights alike.
    part = "without_embedding" if config.optim == "muon" else "total"
    seconds = passes + update / getattr(counts, part) * getattr(facts.counts, part)
    estimated = estimate(size)
    is_seen = measured > 0 and estimated >= JUDGED_BYTES
    return StepProbe(seconds, *size, measured / estimated if is_seen else None)


def extrapolate_pass(facts: RunFacts, size: Size, one_layer: float, two_layers: float) -> float:
    """Return the seconds of a micro-step of the whole model from those of the small ones."""
    layer = max(0.0, two_layers - one_layer)
    rest = max(0.0, one_layer - layer)
    config, model_config = facts.config, facts.model_config
    tokens = config.per_device_train_batch_size * config.sequence_length
    layers, (width, _) = model_config.num_hidden_layers, attention_widths(model_config)
    # Attention costs more in a longer sample; everything else is the same for each token.
    whole, timed = (
        flops_per_token(facts.counts.without_embedding, layers, width, length)
        for length in (config.sequence_length, size[1])
    )
    return tokens / (size[0] * size[1]) * float(rest + layers * layer * whole / timed)


def try_step(facts: RunFacts, other_bytes: int = 0) -> bool:
    """Tell whether two updates of the whole model fit into the memory of a GPU, with some to spare.

    `other_bytes` are what training takes besides, and the trial does not.
    """
    config, device = facts.config, facts.device
    size = (config.per_device_train_batch_size, config.sequence_length)
    model = ballast = None
    try:
        spare = int(SPARE_SHARE * torch.cuda.get_device_properties(device).total_memory)
        ballast = torch.empty(spare + other_bytes, dtype=torch.uint8, device=device)
        with torch.random.fork_rng([device]):
            model = _SmallModel(config, facts.model_config, facts.precision, device)
            for _ in range(2):  # the second one has the optimizer's moments there
                model.run_pass(size)
                model.run_pass(size)  # accumulated
                model.time_update()
    except torch.OutOfMemoryError:
        return False
    finally:
        del ballast
        if model is not None:
            model.free()
        torch.cuda.empty_cache()
    return True


def _growing_sizes(micro_batch: int, length: int) -> Iterator[Size]:
    """Yield sizes up to the run's own, each at most twice the one before."""
    tokens = min(SMALLEST_TOKENS, length)
    while tokens < length:
        yield 1, tokens
        tokens *= 2
    samples = 1
    while samples < micro_batch:
        yield samples, length
        samples *= 2
    yield micro_batch, length


def _find_size(model: _SmallModel, fitting: list[Size]) -> Size:
    """Return the run's own size, or the last one that the time was enough for."""
    begin = time.perf_counter()
    for size in fitting:
        model.run_pass(size)
        # The next one takes as much as all before it, and each is timed several times.
        if time.perf_counter() - begin > GROWING_SHARE * PROBE_SECONDS / 2:
            break
    return size


class _DevicePeak:
    """The highest memory of the device since it was made, above what it was."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = PeakMemory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def read(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return self._host.read() if self._device.type == "cpu" else 0


class _SmallModel:
    """A model with constant weights and its optimizer."""

    def __init__(
        self, config: TrainingConfig, small: Any, precision: str, device: torch.device
    ) -> None:
        # Random weights would take seconds.
        with torch.device("meta"):
            model = build_core(small, config.attn_implementation)
        model.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(CONSTANT_WEIGHT)
        if config.checkpointing_policy:
            enable_checkpointing(model, config.checkpointing_policy)
        self._model = LossModel(model.train(), config.loss_implementation)
        self._optimizer = build_optimizer(model, config)
        self._device, self._dtype = device, _dtype(precision)

    def run_pass(self, size: Size) -> float:
        """Do a forward and a backward; return their seconds."""
        batch = torch.zeros(size, dtype=torch.int64, device=self._device)
        begin = _now(self._device)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            loss = forward_loss(self._model, batch, None)
        torch.autograd.backward(loss)
        return _now(self._device) - begin

    def time_pass(self, size: Size) -> float:
        """Return the seconds of a forward and a backward, the best of a few."""
        seconds = []
        for _ in range(TIMED_PASSES):
            self._model.zero_grad()
            seconds.append(self.run_pass(size))
        return min(seconds)

    def time_update(self) -> float:
        """Return the seconds of the optimizer's update, with gradients that are there."""
        self._optimizer.step()  # makes the moments
        begin = _now(self._device)
        self._optimizer.step()
        return _now(self._device) - begin

    def free(self) -> None:
        """Give the memory back."""
        del self._model, self._optimizer
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _dtype(precision: str) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
