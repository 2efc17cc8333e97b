"""FSDP2: each rank holds its rows of weights, gradients and moments.

    loss model on the CPU -> fully_shard, layer by layer -> train step; rows of this rank

torch's own `fully_shard` (Zhao et al. 2023, PyTorch FSDP, in its per-parameter form) is applied
here and not through `Accelerator.prepare`: that refuses CPUs, and maps the optimizer's parameters
by the address of their memory, which weights without a row on a rank share. Launched by `torchrun`
or `accelerate launch`, on CPUs or GPUs, it is the same code. Each rank initializes whole weights on
the CPU, so that they are those of one process; a layer goes to the device when it is sharded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from utils.models.building import LossModel, find_layers
from utils.models.parts import Part
from utils.training.division import (
    Division,
    HeldState,
    require_same_names,
    weights_by_first_name,
)

_SHORT_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FullySharded(Division):
    """Each rank holds its rows of every tensor; a layer's weights are gathered when it is needed.

    What is in no layer (embedding, output layer, last norm) is gathered when the forward begins and
    kept to the end of the backward. Gathered weights and activations have the accelerator's
    precision; gradients are reduced in float32, and the shards are float32. With `should_reshard` a
    layer's weights are let go between forward and backward.
    """

    has_whole_weights = False

    def __init__(self, accelerator: Accelerator, *, should_reshard: bool) -> None:
        super().__init__(accelerator)
        self._should_reshard = should_reshard

    def place(self, model: LossModel) -> None:
        """Shard a model in place; its parameters become DTensors on the device."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        accelerator = self._accelerator
        mesh = init_device_mesh(accelerator.device.type, (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if accelerator.mixed_precision in _SHORT_TYPES:
            short = _SHORT_TYPES[accelerator.mixed_precision]
            policy = MixedPrecisionPolicy(short, reduce_dtype=torch.float32)
        for layer in find_layers(model.core):
            fully_shard(
                layer, mesh=mesh, reshard_after_forward=self._should_reshard, mp_policy=policy
            )
        fully_shard(model, mesh=mesh, mp_policy=policy)

    def prepare(self, model: LossModel, optimizer: torch.optim.Optimizer) -> None:
        """Take over the sharded model and its optimizer."""
        self.loss_model, self.model, self.optimizer = model, model, optimizer
        self._prepared_optimizer = self._accelerator.prepare_optimizer(optimizer)

    @contextlib.contextmanager
    def micro_step(self) -> Iterator[None]:
        """Have each backward pass reduce gradients at once.

        Accelerate would keep them to the last micro-step, whole, on every rank: four bytes a
        weight, which is the memory that sharding is there to save.
        """
        with self._accelerator.accumulate(self.model):
            self.model.set_requires_gradient_sync(True)
            yield

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the step's gradients down to a norm; return what it was, on every rank."""
        norm: Any = super().clip(max_norm)
        whole: torch.Tensor = norm.full_tensor() if is_part(norm) else norm
        return whole

    @property
    def rows(self) -> Part:
        """The rows of this rank."""
        return Part(self._accelerator.process_index, self._accelerator.num_processes)

    def held_state(self) -> HeldState:
        """Return this rank's rows."""
        moments, rest = _split_optimizer(self.optimizer.state_dict())
        weights = self._held_rows(weights_by_first_name(self.loss_model.core))
        moments = self._held_rows(moments)
        shapes = {key: tuple(tensor.shape) for key, tensor in {**weights, **moments}.items()}
        local, local_moments = (
            {key: local_tensor(tensor).contiguous() for key, tensor in tensors.items()}
            for tensors in (weights, moments)
        )
        return HeldState(local, rest, local_moments, shapes, self.rows)

    def _held_rows(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors that this rank has any rows of; on rank 0 whole tensors too."""
        return {
            name: tensor
            for name, tensor in tensors.items()
            if (local_tensor(tensor).numel() if is_part(tensor) else self.rows.rank == 0)
        }

    def restore(self, weights: Mapping[str, torch.Tensor], optimizer: dict[str, Any]) -> None:
        """Bring back this rank's rows.

        Raises:
            ValueError: They are not those of this model.
        """
        own = weights_by_first_name(self.loss_model.core)
        require_same_names(set(own), set(weights))
        for name, tensor in own.items():
            local, rows = local_tensor(tensor.detach()), weights[name]
            if local.shape != rows.shape:
                raise ValueError(
                    f"{name}: rows of shape {list(rows.shape)}, this rank has "
                    f"{list(local.shape)} of {list(tensor.shape)}"
                )
            local.copy_(rows)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(_as_sharded(optimizer, parameters))

    def _held_bytes(self, weight: torch.Tensor) -> int:
        return local_tensor(weight).nbytes


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


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the sharded tensors of an optimizer's state, as INDEX.NAME, and all the rest."""
    moments, rest = {}, {}
    for index, values in state["state"].items():
        moments.update({f"{index}.{key}": v for key, v in values.items() if is_part(v)})
        rest[index] = {key: value for key, value in values.items() if not is_part(value)}
    return moments, {**state, "state": rest}


def _as_sharded(optimizer: dict[str, Any], parameters: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return an optimizer's state of rows as one of tensors that are sharded as the weights are."""
    from torch.distributed.tensor import DTensor

    def convert(value: Any, parameter: torch.Tensor) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        if value.shape != local_tensor(parameter).shape:
            raise ValueError(f"moments of shape {list(value.shape)} for {list(parameter.shape)}")
        assert isinstance(parameter, DTensor)
        return DTensor.from_local(
            value.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    state = {
        index: {key: convert(value, parameters[index]) for key, value in values.items()}
        for index, values in optimizer["state"].items()
    }
    return {**optimizer, "state": state}
