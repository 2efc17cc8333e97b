"""The costs of a run as they are shown: dollars so far, per million tokens, to the end, lost.

    spending (spending.py) -> figures -> monitor, viewer, the summary at the end of an attempt

No torch here.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from utils.base.text import ABSENT, count_of, format_duration
from utils.costs.spending import MAX_DOLLARS, Amount, Spending, read_price

TOKENS_PER_UNIT = 1e6
MAX_DIGITS = 8


@dataclass(frozen=True)
class Costs:
    """The figures that are shown; None where one is not known.

    `dollars` is the cost of the seconds whose price is known, `unpriced_seconds` are the others.
    `lost_*` was lost to restarts; `remaining_*` reaches to the end of the run, at the newest price.
    """

    starts: int
    seconds: float
    dollars: float | None
    unpriced_seconds: float
    lost_seconds: float
    lost_dollars: float | None
    hourly_price: float | None
    dollars_per_million_tokens: float | None
    remaining_seconds: float | None
    remaining_dollars: float | None


def summarize_costs(
    spending: Spending | None,
    *,
    tokens_seen: float | None,
    remaining_seconds: float | None,
    hourly_price: float | None = None,
) -> Costs | None:
    """Return the figures of a spending; None for none.

    `hourly_price` is for the seconds whose price the run did not know.
    """
    if spending is None:
        return None
    total, lost = spending.total.priced_at(hourly_price), spending.lost.priced_at(hourly_price)
    price = hourly_price if spending.hourly_price is None else spending.hourly_price
    dollars = total.known_dollars
    per_million = None
    if dollars is not None and total.unpriced_seconds <= 0 and tokens_seen and tokens_seen > 0:
        per_million = dollars / tokens_seen * TOKENS_PER_UNIT
    remaining = None
    if price is not None and remaining_seconds is not None:
        remaining = Amount.of(remaining_seconds, price).dollars
    return Costs(
        starts=spending.starts,
        seconds=total.seconds,
        dollars=dollars,
        unpriced_seconds=total.unpriced_seconds,
        lost_seconds=lost.seconds,
        lost_dollars=None if dollars is None else lost.known_dollars,
        hourly_price=price,
        dollars_per_million_tokens=per_million,
        remaining_seconds=remaining_seconds,
        remaining_dollars=remaining,
    )


def describe_costs(costs: Costs) -> str:
    """Return the costs of a run so far: `Spent 3h12m, $35.40 in 2 attempts (...)`."""
    what = format_duration(costs.seconds)
    if costs.dollars is not None:
        what += f", {format_dollars(costs.dollars)}"
    details = []
    if costs.dollars_per_million_tokens is not None:
        details.append(f"{format_dollars(costs.dollars_per_million_tokens)} per million tokens")
    if costs.remaining_dollars is not None:
        details.append(f"{format_dollars(costs.remaining_dollars)} to the end")
    if costs.dollars is not None and costs.unpriced_seconds > 0:
        details.append(f"{format_duration(costs.unpriced_seconds)} without a price")
    if costs.lost_seconds > 0:
        dollars = "" if costs.lost_dollars is None else f", {format_dollars(costs.lost_dollars)}"
        details.append(f"{format_duration(costs.lost_seconds)}{dollars} lost to restarts")
    attempts = count_of(costs.starts, "attempt")
    return f"Spent {what} in {attempts}" + (f" ({'; '.join(details)})" if details else "") + "."


def format_dollars(dollars: float | None) -> str:
    """Return an amount as `$12.34`, with two digits that count below a cent, `-` for None."""
    if dollars is None or not math.isfinite(dollars):
        return ABSENT
    if dollars < 0:
        return f"-{format_dollars(-dollars)}"
    if dollars >= MAX_DOLLARS:
        return f"${dollars:.2e}"
    if 0 < dollars < 0.01:
        digits = min(MAX_DIGITS, 1 - math.floor(math.log10(dollars)))
        return f"${dollars:.{digits}f}"
    return f"${dollars:,.2f}"


def parse_hourly_price(text: str) -> float:
    """Return the value of `--hourly-price`, for argparse."""
    try:
        price = read_price(float(text))
    except ValueError:
        price = None
    if price is None:
        raise argparse.ArgumentTypeError(f"must be dollars an hour, 0 or more, got {text}")
    return price
