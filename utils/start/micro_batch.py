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

from utils.base import ranks
from utils.base.errors import ConfigError, PreflightError
from utils.base.text import format_bytes
from utils.models.estimates import GRADIENT_BYTES
from utils.start.facts import RunFacts
from utils.start.machine_checks import MEMORY_RESERVE, estimate_memory, find_free_memory
from utils.start.step_probe import try_step
from utils.training.sharding import resolve_sharding

log = logging.getLogger("train")

# A formula that is too high must not keep a larger micro-batch from being tried.
FORMULA_MARGIN = 1.3
LARGEST_MICRO_BATCH = 2**16


def resolve_micro_batch(facts: RunFacts) -> RunFacts:
    """Return the facts with the largest micro-batch that fits on every rank; all ranks call this.

    Facts without `auto_find_batch_size` come back as they are.

    Raises:
        ConfigError: The samples of a step cannot be divided over the ranks.
        PreflightError: Not even one sample fits.
    """
    config, world_size = facts.config, facts.world_size
    if not config.auto_find_batch_size or config.global_batch_size is None:
        return facts
    samples, rest = divmod(config.global_batch_size, world_size)
    if rest:
        raise ConfigError(
            f"global_batch_size {config.global_batch_size} is no multiple of {world_size} ranks. "
            "Change it."
        )
    free, where = find_free_memory(facts.device)
    fitting = (size for size in divisors(samples) if _fits(_with_size(facts, size), free))
    own = next(fitting, 0)
    size = min(ranks.broadcast_from_main(ranks.gather_to_main(own) or [own]))
    if size == 0:
        need = estimate_memory(_with_size(facts, 1)).total
        raise PreflightError(
            f"Not even one sample of {config.sequence_length} tokens fits into {where}: about "
            f"{format_bytes(need)} are needed, {format_bytes(free)} are free. Set "
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
    return _with_size(facts, size)


def _with_size(facts: RunFacts, size: int) -> RunFacts:
    config = dataclasses.replace(facts.config, per_device_train_batch_size=size)
    return dataclasses.replace(facts, config=config)


def _fits(facts: RunFacts, free: int) -> bool:
    """Tell whether a micro-batch fits into the free bytes of this rank's device."""
    need = estimate_memory(facts).total
    # A step of one rank alone says nothing of ranks that share the state.
    is_shared = resolve_sharding(facts.config, facts.world_size) is not None
    if facts.device.type != "cuda" or is_shared:
        return need <= MEMORY_RESERVE * free
    # Ranks exchange gradients in copies of them, which a trial on one rank does not have.
    buckets = GRADIENT_BYTES * facts.counts.total if facts.world_size > 1 else 0
    return need <= FORMULA_MARGIN * free and try_step(facts, buckets)


def divisors(number: int) -> list[int]:
    """Return what divides a number, largest first, up to `LARGEST_MICRO_BATCH`."""
    largest = min(number, LARGEST_MICRO_BATCH)
    return [divisor for divisor in range(largest, 0, -1) if number % divisor == 0]
