"""How the state is to be divided over the ranks, and who asked for it.

    configuration, variables of `accelerate launch` -> Sharding -> build_division

FSDP2 is done in `utils/training/fsdp.py`, DeepSpeed's ZeRO in `utils/training/deepspeed.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from configs.training_config import TrainingConfig
from utils.base.errors import ConfigError

FSDP2_FILE = "configs/accelerate/fsdp2.yaml"
DEEPSPEED_FILE = "configs/accelerate/deepspeed.yaml"
_USES_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_ZERO_STAGES = {"zero1": 1, "zero2": 2}
# Optimizers that rows of a matrix are enough for: AdamW, and Muon, which gathers them.
_ROWS_ENOUGH = ("adamw_torch_fused", "muon")
_YES = ("true", "1", "yes")
# Accelerate's variables of strategies that would be ignored here -> what to do.
_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM is not supported: use {FSDP2_FILE}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config is not supported: leave it out",
}
_REFUSED_BY_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params is not supported: set it to false",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing is set to false here: use "
    "--set gradient_checkpointing=true",
}


@dataclass(frozen=True)
class Sharding:
    """How the state is divided over the ranks.

    `source` says who asked for it, for messages. `zero_stage` is that of DeepSpeed's ZeRO, 1 or 2;
    0 is FSDP2.
    """

    reshard_after_forward: bool
    source: str
    zero_stage: int = 0


def resolve_sharding(
    config: TrainingConfig, world_size: int, environment: Mapping[str, str] = os.environ
) -> Sharding | None:
    """Return how the state is sharded; None where each rank holds all of it.

    What `accelerate launch` put into the environment wins over the configuration.

    One rank alone has nothing to share.

    Raises:
        ConfigError: A strategy is asked for that would be ignored or go wrong.
    """
    sharding = _launched_sharding(environment)
    if sharding is None and config.sharding == "fsdp2":
        sharding = Sharding(config.reshard_after_forward, "sharding=fsdp2")
    elif sharding is None and config.sharding in _ZERO_STAGES:
        sharding = Sharding(
            False, f"sharding={config.sharding}", zero_stage=_ZERO_STAGES[config.sharding]
        )
    if sharding is None or world_size == 1:
        return None
    if config.save_format != "safetensors":
        raise ConfigError(
            "save_format must be safetensors where the state is sharded "
            f"({sharding.source}), got {config.save_format!r}."
        )
    if config.optim not in (("adamw_torch_fused",) if sharding.zero_stage else _ROWS_ENOUGH):
        other = " or fsdp2" if sharding.zero_stage and config.optim in _ROWS_ENOUGH else ""
        raise ConfigError(
            f"{sharding.source} does not go with optim={config.optim}, which needs whole tensors. "
            f"Use sharding=none{other}, or optim=adamw_torch_fused."
        )
    return sharding


def _launched_sharding(environment: Mapping[str, str]) -> Sharding | None:
    """Return what `accelerate launch` asks for."""
    chosen = {name for name, value in environment.items() if value.lower() in _YES}
    refused = [advice for name, advice in _REFUSED.items() if name in chosen]
    is_fsdp = "ACCELERATE_USE_FSDP" in chosen
    if is_fsdp and environment.get("FSDP_VERSION", "1") != "2":
        refused.append(f"FSDP of version 1 is not supported: use {FSDP2_FILE}")
    if is_fsdp:
        refused += [advice for name, advice in _REFUSED_BY_FSDP.items() if name in chosen]
    if refused:
        raise ConfigError(f"accelerate launch: {refused[0]}.")
    if _USES_DEEPSPEED in chosen:
        return _launched_deepspeed(environment)
    should_reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in _YES
    return Sharding(should_reshard, "accelerate launch") if is_fsdp else None


def _launched_deepspeed(environment: Mapping[str, str]) -> Sharding:
    """Return the stage of DeepSpeed that `accelerate launch` asks for; refuse what is ignored."""

    def asked(name: str, default: str = "none") -> str:
        return environment.get(f"ACCELERATE_DEEPSPEED_{name}", default).lower()

    stage = asked("ZERO_STAGE", "2")
    reason = ""
    if asked("CONFIG_FILE") != "none":
        reason = f"deepspeed_config_file is not read: set zero_stage as {DEEPSPEED_FILE} does"
    elif {asked("OFFLOAD_OPTIMIZER_DEVICE"), asked("OFFLOAD_PARAM_DEVICE")} != {"none"}:
        reason = "offloading with DeepSpeed is not supported: set both offload devices to none"
    elif stage == "3":
        reason = f"zero_stage 3 is not supported: {FSDP2_FILE} divides weights as it does"
    elif stage not in ("1", "2"):
        reason = f"zero_stage must be 1 or 2, got {stage}"
    if reason:
        raise ConfigError(f"accelerate launch: {reason}.")
    return Sharding(False, "accelerate launch", zero_stage=int(stage))


@contextlib.contextmanager
def deepspeed_hidden() -> Iterator[None]:
    """Keep a launch with DeepSpeed from an Accelerator: it would step within `backward`."""
    value = os.environ.pop(_USES_DEEPSPEED, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[_USES_DEEPSPEED] = value
