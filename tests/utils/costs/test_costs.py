"""Costs as they are shown."""

from __future__ import annotations

import argparse

import pytest

from utils.costs.costs import (
    Costs,
    describe_costs,
    format_dollars,
    parse_hourly_price,
    summarize_costs,
)
from utils.costs.spending import Amount, Spending

HOUR = 3600.0


def summarize(spending: Spending, price: float | None = None) -> Costs:
    costs = summarize_costs(
        spending, tokens_seen=20e6, remaining_seconds=2 * HOUR, hourly_price=price
    )
    assert costs is not None
    return costs


SUMMARIES = {
    "with a price": (
        Spending(Amount(3.2 * HOUR, 35.4), Amount(730, 2.2), starts=2, hourly_price=11.0),
        "Spent 3h12m, $35.40 in 2 attempts "
        "($1.77 per million tokens; $22.00 to the end; 12m10s, $2.20 lost to restarts).",
    ),
    "without a price": (
        Spending(Amount(HOUR, 0, HOUR), Amount(60, 0, 60), starts=1),
        "Spent 1h00m in 1 attempt (1m00s lost to restarts).",
    ),
    "on one's own machine": (
        Spending(Amount(HOUR, 0.0), starts=1, hourly_price=0.0),
        "Spent 1h00m, $0.00 in 1 attempt ($0.00 per million tokens; $0.00 to the end).",
    ),
}


@pytest.mark.parametrize(("spending", "text"), SUMMARIES.values(), ids=SUMMARIES.keys())
def test_the_summary_of_a_run(spending: Spending, text: str) -> None:
    assert describe_costs(summarize(spending)) == text


def test_a_price_given_later_is_for_the_time_that_had_none() -> None:
    spending = Spending(Amount(2 * HOUR, 5.0, HOUR), Amount(), 2, hourly_price=5.0)
    assert summarize(spending).dollars == 5.0
    assert summarize(spending).dollars_per_million_tokens is None
    assert "1h00m without a price" in describe_costs(summarize(spending))
    priced = summarize(spending, price=3.0)
    assert (priced.dollars, priced.unpriced_seconds) == (8.0, 0.0)
    assert priced.dollars_per_million_tokens == pytest.approx(0.4)
    # What is still to come is at the run's own price.
    assert priced.remaining_dollars == 10.0


@pytest.mark.parametrize("tokens", [None, 0.0, 5e-324])
def test_what_cannot_be_divided_is_not_shown(tokens: float | None) -> None:
    costs = summarize_costs(
        Spending(Amount(HOUR, 5.0), starts=1), tokens_seen=tokens, remaining_seconds=None
    )
    assert costs is not None
    assert "$5.00" in describe_costs(costs)
    assert costs.remaining_dollars is None
    assert summarize_costs(None, tokens_seen=tokens, remaining_seconds=1.0) is None


@pytest.mark.parametrize(
    ("dollars", "text"),
    [
        (None, "-"),
        (0.0, "$0.00"),
        (12.344, "$12.34"),
        (1234567.891, "$1,234,567.89"),
        (0.0034, "$0.0034"),
        (0.00001234, "$0.000012"),
        (1e-30, "$0.00000000"),
        (-3.0, "-$3.00"),
        (1e300, "$1.00e+300"),
        (float("inf"), "-"),
        (float("nan"), "-"),
    ],
)
def test_dollars_are_short(dollars: float | None, text: str) -> None:
    assert format_dollars(dollars) == text


def test_a_price_of_the_command_line() -> None:
    assert parse_hourly_price("2.5") == 2.5
    for text in ("-1", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="0 or more"):
            parse_hourly_price(text)
