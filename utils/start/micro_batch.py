"""The largest micro-batch that fits, for `per_device_train_batch_size: auto`.

    samples of a rank in a step, memory of the device -> micro-batch, accumulation

The samples of a step stay what `global_batch_size` says: a candidate divides them. The formula
says where to begin; on a GPU a step of the real model is then tried, with memory for gradients and
moments taken, and the next smaller one until it fits. A CPU gives no such error: there the formula
decides.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.errors import ConfigError, PreflightError
from utils.base.text import format_bytes
from utils.models.building import ParameterCounts
from utils.models.estimates import GRADIENT_BYTES
from utils.start.machine_checks import MEMORY_RESERVE, estimate_memory, find_free_memory
from utils.start.step_probe import try_step
from utils.training.sharding import resolve_sharding

log = logging.getLogger("train")

# A formula that is too high must not keep a larger micro-batch from being tried.
FORMULA_MARGIN = 1.3
LARGEST_MICRO_BATCH = 2**16


def resolve_micro_batch(
    config: TrainingConfig,
    model_config: Any,
    counts: ParameterCounts,
    precision: str,
    device: torch.device,
    world_size: int,
) -> TrainingConfig:
    """Return the configuration with the largest micro-batch that fits on every rank.

    Args:
        config: With `auto_find_batch_size`; another one comes back as it is.
        model_config: transformers config of the model.
        counts: Its parameters.
        precision: no, bf16 or fp16.
        device: Of this rank.
        world_size: All ranks; all of them call this.

    Raises:
        ConfigError: The samples of a step cannot be divided over the ranks.
        PreflightError: Not even one sample fits.
    """
    if not config.auto_find_batch_size or config.global_batch_size is None:
        return config
    samples, rest = divmod(config.global_batch_size, world_size)
    if rest:
        raise ConfigError(
            f"global_batch_size {config.global_batch_size} is no multiple of {world_size} ranks. "
            "Change it."
        )
    free, where = find_free_memory(device)
    # Ranks exchange gradients in copies of them, which a trial on one rank does not have.
    buckets = GRADIENT_BYTES * counts.total if world_size > 1 else 0

    def with_size(size: int) -> TrainingConfig:
        return dataclasses.replace(config, per_device_train_batch_size=size)

    def estimate(size: int) -> int:
        need = estimate_memory(with_size(size), model_config, counts, precision, device, world_size)
        return need.total

    def fits(size: int) -> bool:
        need = estimate(size)
        # A step of one rank alone says nothing of ranks that share the state.
        if device.type != "cuda" or resolve_sharding(config, world_size) is not None:
            return need <= MEMORY_RESERVE * free
        return need <= FORMULA_MARGIN * free and try_step(
            with_size(size), model_config, precision, device, buckets
        )

    own = next((size for size in divisors(samples) if fits(size)), 0)
    size = min(ranks.broadcast_from_main(ranks.gather_to_main(own) or [own]))
    if size == 0:
        raise PreflightError(
            f"Not even one sample of {config.sequence_length} tokens fits into {where}: about "
            f"{format_bytes(estimate(1))} are needed, {format_bytes(free)} are free. Set "
            "gradient_checkpointing=true, lower sequence_length, or choose a smaller model."
        )
    if ranks.is_main_rank():
        log.info(
            "Micro-batch: %d samples, the most that fit into %s; %d of them in a step on each "
            "rank.",
            size,
            where,
            samples // size,
        )
    return with_size(size)


def divisors(number: int) -> list[int]:
    """Return what divides a number, largest first, up to `LARGEST_MICRO_BATCH`."""
    largest = min(number, LARGEST_MICRO_BATCH)
    return [divisor for divisor in range(largest, 0, -1) if number % divisor == 0]
