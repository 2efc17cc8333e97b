"""The table of `benchmark.py recipe`, from curves made by hand."""

from __future__ import annotations

import pytest

from benchmarks.recipe import Curve, compare

PEERS = {
    "low": Curve({20: 7.0, 100: 6.0}, [2.0] * 95),
    "high": Curve({20: 6.5, 100: 6.2}, [2.0] * 95),
}


def test_the_target_is_the_peers_lowest_last_loss_and_counts_where_it_is_first_met() -> None:
    table = compare(PEERS, {"ours": Curve({20: 6.5, 30: 6.0, 40: 5.5}, [3.0] * 35)}, 2048)
    assert table == {
        "Trainer, low": "6.0000",
        "Trainer, high": "6.2000",
        "ours": "5.5000",
        "ours: a step / Trainer's": "1.50x",
        "ours: tokens until Trainer's best": "61,440: 0.30 of Trainer's",
        "ours: seconds until Trainer's best": "90: 0.45 of Trainer's 200",
        "after 40,960 tokens: Trainer; recipe": "7.0000; 6.5000",
        "after 204,800 tokens: Trainer; recipe": "6.0000; ended",
    }


@pytest.mark.parametrize("last", [6.01, 6.2])
def test_a_target_that_is_not_met_is_said(last: float) -> None:
    table = compare(PEERS, {"ours": Curve({50: last}, [2.0] * 45)}, 2048)
    assert table["ours: until Trainer's best"] == "never"
