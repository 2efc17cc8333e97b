"""How the configuration of a run differs from a checkpoint's, and which changes are guarded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.training_config import TrainingConfig

# A change of these is another run in the making: other tokens, other updates, other weights.
GUARDED_KEYS = (
    "model",
    "model_overrides",
    "init_from",
    "sequence_length",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "min_lr_rate",
    "warmup_steps",
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
# What the learning rate of a step comes from.
SCHEDULE_KEYS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "min_lr_rate",
    "warmup_steps",
    "max_steps",
)


@dataclass(frozen=True)
class ConfigChanges:
    """How a configuration differs from the one of a checkpoint, as `key: old -> new`.

    `free` ones leave what is trained as it was, `guarded` ones do not.
    """

    free: tuple[str, ...]
    guarded: tuple[str, ...]


def compare_configs(old: Mapping[str, Any], new: TrainingConfig) -> ConfigChanges:
    """Return the differences between a checkpoint's configuration and the current one.

    A longer run is a free change, a shorter one is not: its schedule would have ended before.
    Keys that only one version of this project knows are left out; but a guarded one that the
    checkpoint's version did not know had its default, which is to do without.
    """
    free: list[str] = []
    guarded: list[str] = []
    defaults = TrainingConfig()
    known = {**{key: getattr(defaults, key) for key in GUARDED_KEYS}, **old}
    for key, value in new.to_json().items():
        if key not in known or known[key] == value:
            continue
        change = f"{key}: {json.dumps(known[key])} -> {json.dumps(value)}"
        shorter = key == "max_steps" and value < known[key]
        (guarded if key in GUARDED_KEYS or shorter else free).append(change)
    return ConfigChanges(tuple(free), tuple(guarded))
