"""What the values of a configuration may be, each by itself and together.

    a field of TrainingConfig with its limit, all values -> ConfigError, or nothing

None, where a key's type allows it, passes every limit of one value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import field, fields
from typing import Any

from utils.base.errors import ConfigError
from utils.base.uri import LOCAL_PLACES, PLACES, find_mistake

LR_SCHEDULERS: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "linear": (),
    "constant": (),
    "constant_with_warmup": (),
    "polynomial": ("power", "lr_end"),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
"""Each learning rate schedule, and the `lr_scheduler_kwargs` that it knows."""
LR_FLOORS = ("min_lr", "min_lr_rate", "min_lr_ratio", "lr_end")
"""Those that say where a schedule ends, in place of the key `min_lr_rate`; they may be 0."""
LR_SHARES = ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate")
"""Those that are shares of the peak; other rates are absolute."""
LR_SHAPES = ("linear", "cosine", "1-sqrt")
"""What `warmup_type` and `decay_type` may be."""
REPORT_TARGETS = ("tensorboard", "wandb")


def checked(limit: str, is_met: Callable[[Any], bool], *, default: Any) -> Any:
    """Return a field of a dataclass with a limit; `limit` has {} where the value is told."""
    return field(default=default, metadata={"limit": limit, "is_met": is_met})


def at_least(least: float, *, default: Any) -> Any:
    """Return a field whose values are finite and at least `least`."""
    limit = f"at least {least}, got {{}}"
    return checked(limit, lambda value: least <= value < math.inf, default=default)


def between(low: float, high: float, *, default: Any) -> Any:
    """Return a field whose values are from `low` to `high`."""
    limit = f"between {low} and {high}, got {{}}"
    return checked(limit, lambda value: low <= value <= high, default=default)


def below_one(*, default: Any) -> Any:
    """Return a field whose values are from 0 to below 1."""
    limit = "at least 0.0 and below 1.0, got {}"
    return checked(limit, lambda value: 0 <= value < 1, default=default)


def above_zero(*, default: Any) -> Any:
    """Return a field whose values are finite and above 0."""
    return checked("above 0, got {}", lambda value: 0 < value < math.inf, default=default)


def one_of(choices: Collection[str], *, default: str) -> Any:
    """Return a field whose values are one of these."""
    limit = f"one of {', '.join(choices)}; got {{!r}}"
    return checked(limit, tuple(choices).__contains__, default=default)


def check_fields(config: Any) -> None:
    """Refuse a value of a dataclass that is beyond the limit of its field.

    Raises:
        ConfigError: The message names key, limit and value.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        if item.metadata and value is not None and not item.metadata["is_met"](value):
            raise ConfigError(f"{item.name} must be {item.metadata['limit'].format(value)}.")


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse a configuration whose values contradict each other, or hold what they may not.

    Raises:
        ConfigError: The message names the key.
    """
    for target in values["report_to"]:
        if target not in REPORT_TARGETS:
            raise ConfigError(
                f"report_to must hold only {', '.join(REPORT_TARGETS)}; got {target!r}."
            )
    if values["bf16"] and values["fp16"]:
        raise ConfigError("bf16 and fp16 are both true: choose one.")
    _check_schedule(
        values["lr_scheduler_type"], values["lr_scheduler_kwargs"], values["learning_rate"]
    )
    _check_places(values)
    for key, value in values["model_overrides"].items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"model_overrides.{key} must be a finite number, got {value}.")
    for prompt in values["sample_prompts"]:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError(f"sample_prompts: {prompt!a} is no text that can be encoded.")
    _check_batch(values)


def _check_schedule(kind: str, values: Mapping[str, Any], peak: float) -> None:
    for key, value in values.items():
        if key not in LR_SCHEDULERS[kind]:
            known = ", ".join(LR_SCHEDULERS[kind]) or "none"
            raise ConfigError(
                f"lr_scheduler_kwargs of {kind} are {known}; got {key!r}. "
                "--set lr_scheduler_kwargs={} takes back what a file says."
            )
        if key.endswith("_type"):
            limit, is_met = f"one of {', '.join(LR_SHAPES)};", value in LR_SHAPES
        elif key in LR_SHARES:
            limit, is_met = "between 0 and 1,", _is_number(value) and 0 <= value <= 1
        elif key in LR_FLOORS:
            limit = f"at least 0 and below learning_rate {peak},"
            is_met = _is_number(value) and 0 <= value < peak
        elif key.endswith("_steps"):
            limit, is_met = "a whole number above 0,", type(value) is int and value > 0
        else:
            limit, is_met = "above 0,", _is_number(value) and 0 < value < math.inf
        if not is_met:
            raise ConfigError(f"lr_scheduler_kwargs.{key} must be {limit} got {value!r}.")
    if "min_lr" in values and "min_lr_rate" in values:
        raise ConfigError("lr_scheduler_kwargs: min_lr and min_lr_rate are both set: choose one.")
    if kind == "warmup_stable_decay" and "num_decay_steps" not in values:
        raise ConfigError(
            "lr_scheduler_type warmup_stable_decay needs lr_scheduler_kwargs.num_decay_steps: over "
            "how many steps the learning rate falls at the end."
        )


def _check_places(values: Mapping[str, Any]) -> None:
    data = values["data_uri"]
    uris = [data] if isinstance(data, str) else _mixture_uris(data)
    places = [("data_uri", uri, PLACES) for uri in uris]
    places += [(key, values[key], PLACES) for key in ("checkpoint_uri", "init_from")]
    for key in ("output_dir", "logging_dir", "cache_dir"):
        if not values[key]:
            raise ConfigError(f"{key} is empty: give {LOCAL_PLACES}.")
        places += [(key, values[key], LOCAL_PLACES)]
    for key, text, kinds in places:
        if text.endswith("://"):  # joined with run_name, that would be taken for the bucket
            raise ConfigError(f"{key} {text}: give {kinds}.")
        if mistake := find_mistake(text, kinds):
            raise ConfigError(f"{key} {mistake}")


def _mixture_uris(sources: list[dict[str, Any]]) -> list[str]:
    """Return the URI of each source; refuse what is no mixture."""
    if not sources:
        raise ConfigError("data_uri is an empty list.")
    for source in sources:
        uri, weight = source.get("uri"), source.get("weight")
        if set(source) != {"uri", "weight"} or not isinstance(uri, str) or not _is_number(weight):
            raise ConfigError(
                'data_uri must hold {"uri": "...", "weight": number} for each source, got '
                f"{json.dumps(source, default=str)}."
            )
        if not 0 < source["weight"] < math.inf:
            raise ConfigError(f"data_uri: the weight of {uri} must be above 0, got {weight}.")
    return [source["uri"] for source in sources]


def _check_batch(values: Mapping[str, Any]) -> None:
    samples, accumulation = values["global_batch_size"], values["gradient_accumulation_steps"]
    if values["auto_find_batch_size"] and not samples:
        raise ConfigError(
            "per_device_train_batch_size auto needs global_batch_size, the samples of a step."
        )
    if values["auto_find_batch_size"] and accumulation:
        raise ConfigError(
            "per_device_train_batch_size auto finds gradient_accumulation_steps too: leave it out."
        )
    if samples and accumulation:
        micro = values["per_device_train_batch_size"] * accumulation
        if samples % micro:
            raise ConfigError(
                f"global_batch_size {samples} is no multiple of "
                f"per_device_train_batch_size x gradient_accumulation_steps = {micro}. "
                "Leave gradient_accumulation_steps out to have it computed."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
