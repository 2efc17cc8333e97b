"""How the configuration of a run differs from a checkpoint's, and which changes are guarded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.training_config import TrainingConfig

# What the learning rate of a step comes from, besides `max_steps`.
SCHEDULE_KEYS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "min_lr_rate",
    "warmup_steps",
)
# A change of these is another run in the making: other tokens, other updates, other weights.
GUARDED_KEYS = (
    "model",
    "model_overrides",
    "init_from",
    "sequence_length",
    *SCHEDULE_KEYS,
    "optim",
    "muon_learning_rate",
    "muon_momentum",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "shuffle_window_shards",
    "mask_documents",
    "max_files",
    "bf16",
    "fp16",
    "fp8",
    "pad_vocab_to_multiple_of",
)


@dataclass(frozen=True)
class ConfigChanges:
    """How a configuration differs from `before`, a checkpoint's: key -> `old -> new`.

    `free` ones leave what is trained as it was, `guarded` ones do not.
    """

    before: Mapping[str, Any]
    free: dict[str, str]
    guarded: dict[str, str]


def compare_configs(before: Mapping[str, Any], new: TrainingConfig) -> ConfigChanges:
    """Return the differences between a checkpoint's configuration and the current one.

    A longer run is a free change, a shorter one is not: its schedule would have ended before.
    Keys that only one version of this project knows are left out; but a guarded one that the
    checkpoint's version did not know had its default, which is to do without.
    """
    changes = ConfigChanges(before, {}, {})
    defaults = TrainingConfig()
    known = {**{key: getattr(defaults, key) for key in GUARDED_KEYS}, **before}
    for key, value in new.to_json().items():
        if key in known and known[key] != value:
            is_shorter = key == "max_steps" and value < known[key]
            kind = changes.guarded if key in GUARDED_KEYS or is_shorter else changes.free
            kind[key] = f"{json.dumps(known[key])} -> {json.dumps(value)}"
    return changes


def list_changes(changes: Mapping[str, str]) -> list[str]:
    """Return changes as `key: old -> new`."""
    return [f"{key}: {change}" for key, change in changes.items()]
