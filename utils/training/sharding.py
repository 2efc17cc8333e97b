"""Sharded state: what is asked for; each rank holds its rows of weights and moments (FSDP2).

    loss model on the CPU -> fully_shard, layer by layer -> train step

torch's own `fully_shard` (Zhao et al. 2023, PyTorch FSDP, in its per-parameter form) is applied
here and not through `Accelerator.prepare`: that refuses CPUs, and maps the optimizer's parameters
by the address of their memory, which weights without a row on a rank share. Launched by `torchrun`
or `accelerate launch`, on CPUs or GPUs, it is the same code. Weights are drawn on the CPU, whole,
by each rank, so that they are those of one process; a layer goes to the device when it is sharded.
DeepSpeed's ZeRO is asked for here too, and built in `utils/training/deepspeed.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.training_config import TrainingConfig
from utils.base.errors import ConfigError

FSDP2_FILE = "configs/accelerate/fsdp2.yaml"
DEEPSPEED_FILE = "configs/accelerate/deepspeed.yaml"
_USES_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_ZERO_STAGES = {"zero1": 1, "zero2": 2}
_SIXTEEN_BIT = {"bf16": torch.bfloat16, "fp16": torch.float16}
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

    Attributes:
        reshard_after_forward: Whether a layer's weights are let go between forward and backward.
        source: Who asked for it, to be told.
        zero_stage: Of DeepSpeed, 1 or 2; 0 is FSDP2.
    """

    reshard_after_forward: bool
    source: str
    zero_stage: int = 0


def resolve_sharding(
    config: TrainingConfig, world_size: int, environment: Mapping[str, str] = os.environ
) -> Sharding | None:
    """Return how the state is sharded; None where each rank holds all of it.

    What `accelerate launch` put into the environment wins over the configuration.

    Args:
        config: `sharding` and `reshard_after_forward`.
        world_size: Ranks; one alone has nothing to share.
        environment: Variables of this process.

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
    return sharding


def _launched_sharding(environment: Mapping[str, str]) -> Sharding | None:
    """Return what `accelerate launch` asks for."""
    chosen = {name for name, value in environment.items() if value.lower() in _YES}
    refused = [advice for name, advice in _REFUSED.items() if name in chosen]
    uses_fsdp = "ACCELERATE_USE_FSDP" in chosen
    if uses_fsdp and environment.get("FSDP_VERSION", "1") != "2":
        refused.append(f"FSDP of version 1 is not supported: use {FSDP2_FILE}")
    if uses_fsdp:
        refused += [advice for name, advice in _REFUSED_BY_FSDP.items() if name in chosen]
    if refused:
        raise ConfigError(f"accelerate launch: {refused[0]}.")
    if _USES_DEEPSPEED in chosen:
        return _launched_deepspeed(environment)
    reshards = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in _YES
    return Sharding(reshards, "accelerate launch") if uses_fsdp else None


def _launched_deepspeed(environment: Mapping[str, str]) -> Sharding:
    """Return the stage of DeepSpeed that `accelerate launch` asks for.

    Raises:
        ConfigError: Something would be ignored, or is not supported.
    """

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


def shard_model(
    model: nn.Module, layers: list[nn.Module], device: torch.device, precision: str, how: Sharding
) -> None:
    """Shard a model in place, over all ranks; its parameters become DTensors on the device.

    Args:
        model: On the CPU. What is in no layer (embedding, output layer, last norm) is gathered when
            the forward begins and kept to the end of the backward.
        layers: Its transformer layers, each gathered when it is needed.
        device: Where training takes place.
        precision: no, bf16 or fp16: of gathered weights and activations. Gradients are reduced in
            float32, and the shards are float32.
        how: Of `resolve_sharding`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision in _SIXTEEN_BIT:
        policy = MixedPrecisionPolicy(_SIXTEEN_BIT[precision], reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(
            layer, mesh=mesh, reshard_after_forward=how.reshard_after_forward, mp_policy=policy
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `shard_model` has sharded a model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def reduce_each_backward(model: nn.Module) -> None:
    """Have a sharded model's backward passes reduce gradients at once; others are left alone.

    Accelerate would keep them to the last micro-step, whole, on every rank: four bytes a weight,
    which is the memory that sharding is there to save.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)


def is_part(tensor: torch.Tensor) -> bool:
    """Tell whether ranks hold parts of a tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows of a sharded tensor; any other tensor as it is."""
    if not is_part(tensor):
        return tensor
    sharded: Any = tensor.detach()
    local: torch.Tensor = sharded.to_local()
    return local


def whole_scalar(tensor: torch.Tensor) -> torch.Tensor:
    """Return a scalar that may be spread over the ranks, such as a norm, as a plain tensor."""
    if not is_part(tensor):
        return tensor
    spread: Any = tensor
    whole: torch.Tensor = spread.full_tensor()
    return whole


def like_parameter(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows as a tensor that is sharded as a parameter is."""
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        local.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
