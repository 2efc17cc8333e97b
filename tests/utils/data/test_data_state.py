"""The position in the data as a checkpoint keeps it, and what it refuses to go on with."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from utils.base.errors import DataError
from utils.data.data_state import DataState
from utils.data.shard_index import ShardFacts

STATE = DataState(
    sample_index=400,
    epoch=1,
    files_consumed=2,
    sequence_length=512,
    seed=42,
    shuffle_window_shards=8,
    shards=(ShardFacts("a.npz", 1000, 2000, "AAAAAA=="), ShardFacts("b.npz", 5, 90, None)),
)


def test_a_data_state_survives_its_file() -> None:
    written = json.loads(json.dumps(STATE.to_json()))
    assert DataState.from_json(written) == STATE
    assert {"epoch", "sample_index", "fingerprint"} <= written.keys()


@pytest.mark.parametrize("value", [None, [], {}, {"format": 0}, {**STATE.to_json(), "format": 2}])
def test_a_data_state_of_another_format_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="format that this version does not know"):
        DataState.from_json(value)


def test_the_same_data_may_go_on_at_any_position() -> None:
    STATE.require_same_order(replace(STATE, sample_index=0, epoch=0, files_consumed=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 256}, "sequence_length 512 -> 256"),
        ({"seed": 1, "shards": ()}, "seed 42 -> 1; shards: 2 missing"),
        ({"shuffle_window_shards": 4}, "shuffle_window_shards 8 -> 4"),
        ({"weights": (1.0, 2.0)}, r"weights \(1.0,\) -> \(1.0, 2.0\)"),
        ({"source_sizes": (1, 1)}, r"source_sizes \(\) -> \(1, 1\)"),
        (
            {"shards": (replace(STATE.shards[0], crc32c="BBBBBB=="), STATE.shards[1])},
            r"shards: 1 changed \(a\.npz\)",
        ),
    ],
)
def test_changed_data_are_an_error_that_says_what_changed(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        STATE.require_same_order(replace(STATE, **change))
    assert "--set run_name=NAME" in str(caught.value)
    assert "--accept-data-change" in str(caught.value)
