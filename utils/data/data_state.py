"""The position in the data, as a checkpoint keeps it (`data_state.json`).

    train state -> data_state.json -> restore

One number, the global sample index, and what it is an index of: the shards with their fingerprint,
and the settings that decide their order. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from utils.base.errors import DataError
from utils.data.shard_index import ShardFacts, describe_shard_changes, fingerprint_shards

DATA_STATE_FORMAT = 1


@dataclass(frozen=True)
class DataState:
    """The position in the data, as a checkpoint keeps it.

    `sample_index` counts samples over all ranks since the start of the run; `epoch` is that of the
    next one, `files_consumed` the shards wholly used in it. `shards` are those of training, source
    after source; `bad_shards` were found unusable, and their samples replaced.
    """

    sample_index: int
    epoch: int
    files_consumed: int
    sequence_length: int
    seed: int
    shuffle_window_shards: int
    shards: tuple[ShardFacts, ...]
    source_sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = (1.0,)
    bad_shards: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the state as it is written."""
        return {
            "format": DATA_STATE_FORMAT,
            **vars(self),
            "fingerprint": fingerprint_shards(self.shards),
            "shards": [[s.name, s.tokens, s.size, s.crc32c] for s in self.shards],
        }

    @classmethod
    def from_json(cls, value: Any) -> DataState:
        """Return the state that `to_json` wrote.

        Raises:
            DataError: It is of another format.
        """
        if not isinstance(value, dict) or value.get("format") != DATA_STATE_FORMAT:
            raise DataError("data_state.json is of a format that this version does not know.")
        values = {key.name: value[key.name] for key in fields(cls)}
        lists = {key: tuple(found) for key, found in values.items() if isinstance(found, list)}
        shards = tuple(ShardFacts(*row) for row in values["shards"])
        return cls(**{**values, **lists, "shards": shards})

    def describe_changes(self, current: DataState) -> str:
        """Say how the current data give other samples or another order; empty where they do not."""
        changes = []
        for key in ("sequence_length", "seed", "shuffle_window_shards", "weights", "source_sizes"):
            if getattr(self, key) != getattr(current, key):
                changes.append(f"{key} {getattr(self, key)} -> {getattr(current, key)}")
        if fingerprint_shards(self.shards) != fingerprint_shards(current.shards):
            changes.append("shards: " + describe_shard_changes(self.shards, current.shards))
        return "; ".join(changes)

    def require_same_order(self, current: DataState) -> None:
        """Raise unless the current data give the same samples in the same order.

        Raises:
            DataError: They do not; the message lists what differs.
        """
        changes = self.describe_changes(current)
        if changes:
            raise DataError(
                "The data differ from the checkpoint's, so the same tokens would not follow: "
                f"{changes}. Restore them, go on at the next epoch of the new data "
                "(--accept-data-change), or begin anew (--set run_name=NAME)."
            )
