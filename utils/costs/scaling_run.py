"""What a whole run needs besides its steps: tokens, batch, bucket, failures. Formulas only.

- Loss by parameters N and tokens D: Hoffmann et al. 2022 (Chinchilla), equation 10; its optimum is
  near 20 tokens a parameter.
- Critical batch size: McCandlish et al. 2018: a run at batch B takes (1 + B/B_crit) times the
  tokens and (1 + B_crit/B) times the steps of the extremes. B_crit by loss: Kaplan et al.
  2020, equation 5.3. Both were fitted to other data than yours: an order of magnitude, not a limit.
- Time between checkpoints: Young 1974, sqrt(2 x pause x time between failures); never below the
  time of an upload, because only what is in the bucket survives the machine.

Everything is an estimate; pure functions, no torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.models.estimates import estimate_checkpoint_bytes

TOKENS_PER_PARAMETER = 20
SHARD_TOKENS = 50_000_000  # what scripts/prepare_data.py writes
UPLOAD_BYTES_PER_SECOND = 500e6
"""One machine into the bucket, four streams with compression; `--dry-run` measures yours."""
DOWNLOAD_BYTES_PER_SECOND = 500e6
STAGING_BYTES_PER_SECOND = 20e9
"""From a GPU into host memory, over PCIe; the whole of it is a pause at the worst."""
SHORTEST_INTERVAL_SECONDS = 60.0
"""Between two saves, however cheap they are: commits, listings and retention take their time."""
RESTART_SECONDS = 300.0
"""A new machine, its environment, imports, the first step; the download comes on top."""
GPU_HOURS_PER_FAILURE = 50_000.0
"""Llama 3 (Dubey et al. 2024, section 3.3.4): 419 failures in 54 days of 16,384 GPUs."""
SPOT_HOURS_PER_MACHINE = 24.0
"""Assumed time between two preemptions of a spot machine; it differs by zone and by hour."""


@dataclass(frozen=True)
class Saving:
    """What failures cost, and how often to save.

    Attributes:
        failure_seconds: Mean time between failures of the whole job.
        young_seconds: Between two saves by Young's formula.
        upload_seconds: Time of one checkpoint's upload.
        interval_seconds: The longest of these two and `SHORTEST_INTERVAL_SECONDS`.
        lost_share: Share of the run's time: pauses, work done again, restarts.
    """

    failure_seconds: float
    young_seconds: float
    upload_seconds: float
    interval_seconds: float
    lost_share: float


def expected_loss(parameters: float, tokens: float) -> float:
    """Return the loss of a model of so many parameters after so many tokens, on MassiveText."""
    return float(1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28)


def critical_batch_tokens(loss: float) -> float:
    """Return the tokens of a step at which twice the tokens buy half the steps."""
    return float(2e8 / loss ** (1 / 0.21))


def batch_overhead(batch_tokens: float, critical_tokens: float) -> float:
    """Return the tokens that a run needs at this batch, over those at a very small one."""
    return 1 + batch_tokens / critical_tokens


def pause_seconds(parameters: int) -> float:
    """Return how long training waits for a save at the most: the copy into host memory."""
    return estimate_checkpoint_bytes(parameters) / STAGING_BYTES_PER_SECOND


def failure_seconds(gpus: int, machines: int, *, is_spot: bool) -> float:
    """Return the mean time between failures of a job that any of its parts ends."""
    rate = gpus / GPU_HOURS_PER_FAILURE
    if is_spot:
        rate += machines / SPOT_HOURS_PER_MACHINE
    return 3600.0 / rate


def plan_saving(parameters: int, pause: float, between_failures: float) -> Saving:
    """Return how often to save, and what is lost.

    Args:
        parameters: Weights of the model.
        pause: Seconds that training waits for a save.
        between_failures: Seconds, on average.
    """
    num_bytes = estimate_checkpoint_bytes(parameters)
    upload = num_bytes / UPLOAD_BYTES_PER_SECOND
    restart = RESTART_SECONDS + num_bytes / DOWNLOAD_BYTES_PER_SECOND
    young = math.sqrt(2 * pause * between_failures)
    interval = max(young, upload, SHORTEST_INTERVAL_SECONDS)
    # A checkpoint counts from the end of its upload on.
    again = interval / 2 + upload
    lost = pause / interval + (again + restart) / between_failures
    return Saving(between_failures, young, upload, interval, min(1.0, lost))
