"""What a run will take: its steps, its end, its uploads; measured on a small step beforehand.

small step, short upload -> expected step, run and upload time -> preflight
"""

from __future__ import annotations

import os

from utils.base.text import count_of, format_bytes, format_duration
from utils.checkpoints.layout import REMOTE_FOLDER
from utils.costs.costs import TOKENS_PER_UNIT, format_dollars
from utils.costs.spending import Amount
from utils.models.estimates import count_pauses
from utils.start.checks import Check
from utils.start.facts import RunFacts
from utils.start.step_probe import StepProbe
from utils.training.throughput import RemainingTime
from utils.uploads.rate import measure_upload_rate
from utils.uploads.transports import TransportOptions

LONG_RUN_SECONDS = 900.0
# FLOPs a second of a core and of a GPU whose peak is not known, and the share that a step reaches.
CPU_FLOPS, GPU_FLOPS = 5e10, 2e13
STEP_EFFICIENCY = 0.4
# Compressing and checking an archive, bytes a second of one core: BENCHMARKS.md.
ARCHIVE_BYTES_PER_SECOND = 250e6
LATE_SHARE = 1.0
BUSY_SHARE = 0.5


def is_long_run(facts: RunFacts) -> bool:
    """Tell whether the rest of a run is long enough to measure a small step first."""
    steps = facts.config.max_steps - facts.step
    flops = steps * facts.tokens_per_step * facts.utilization.flops_per_token
    rate = facts.utilization.peak_flops
    if rate is None:
        each = CPU_FLOPS * (os.cpu_count() or 1) if facts.device.type == "cpu" else GPU_FLOPS
        rate = facts.world_size * each
    return flops / rate / STEP_EFFICIENCY > LONG_RUN_SECONDS


def check_times(
    facts: RunFacts, probe: StepProbe, transport: TransportOptions | None
) -> list[Check]:
    """Return what is expected of steps, run and uploads.

    Without a transport nothing is uploaded.
    """
    config, seconds = facts.config, probe.step_seconds
    rate = facts.tokens_per_step / seconds
    utilization = facts.utilization.at(rate)
    share = "" if utilization is None else f", MFU {utilization:.1%}"
    text = (
        f"about {_format_seconds(seconds)}, {rate:,.0f} tokens/s{share} (from {probe.samples} x "
        f"{probe.tokens} tokens through one layer and through two)"
    )
    evaluations = count_pauses(facts.step, config.max_steps, config.save_steps, config.eval_steps)
    remaining = RemainingTime(config, facts.samples_per_step, facts.evaluation_samples)
    run_seconds = remaining.seconds(facts.step, seconds)
    ending = f"about {format_duration(run_seconds)} for steps {facts.step} to {config.max_steps}"
    return [
        Check("step", "ok", text),
        Check("run", "ok", f"{ending} and {count_of(evaluations, 'evaluation')}"),
        *([] if transport is None else [_check_uploads(facts, seconds, transport)]),
        _describe_cost(facts, run_seconds),
    ]


def _describe_cost(facts: RunFacts, run_seconds: float) -> Check:
    price = facts.config.hourly_price
    if price is None:
        return Check("cost", "ok", "unknown: set hourly_price")
    dollars = Amount.of(run_seconds, price).dollars
    tokens = (facts.config.max_steps - facts.step) * facts.tokens_per_step
    cells = [f"about {format_dollars(dollars)} to the end"]
    if tokens > 0:
        each = format_dollars(dollars / tokens * TOKENS_PER_UNIT)
        cells.append(f"{each} per million tokens")
    cells.append(f"at {format_dollars(price)} an hour")
    return Check("cost", "ok", ", ".join(cells))


def _check_uploads(facts: RunFacts, step_seconds: float, transport: TransportOptions) -> Check:
    config = facts.config
    size = facts.checkpoint_bytes
    interval = config.save_steps * step_seconds
    if config.save_seconds is not None:
        interval = min(interval, config.save_seconds)
    rate = measure_upload_rate(transport, REMOTE_FOLDER)
    every = f"{format_bytes(size)} every {format_duration(interval)}"
    if rate is None:
        return Check("uploading", "warn", f"{every}; the rate could not be measured")
    rate = min(rate, transport.max_bytes_per_second or rate, ARCHIVE_BYTES_PER_SECOND)
    seconds = size / rate
    text = f"{every}, each about {format_duration(seconds)} at {format_bytes(rate)}/s"
    share = seconds / interval
    if share <= BUSY_SHARE:
        return Check("uploading", "ok", f"{text}: {share:.0%} of the time between two")
    what = "they pile up" if share > LATE_SHARE else "there is little room for a slower hour"
    return Check(
        "uploading",
        "warn",
        f"{text}: {share:.0%} of the time between two, so {what}. Raise save_steps, or "
        "upload_max_mbps where it is set.",
    )


def _format_seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 1 else format_duration(seconds)
