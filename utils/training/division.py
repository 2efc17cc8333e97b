"""How the train state lies over the ranks: one interface, so that no step or save asks which it is.

    loss model, optimizer -> division -> backward, clip, step; what this rank saves -> checkpoint

Here are the interface and the plain case: every rank holds everything, in one process or under
DistributedDataParallel. Rows of each tensor are in `utils/training/fsdp.py`, flat partitions in
`utils/training/deepspeed.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from utils.models.building import LossModel
from utils.models.parts import RowChoice

SNAPSHOT_MARGIN_BYTES = 2**20
# Beside a weight and its moments: their alignment in a snapshot, and a step counter.
_SMALL_BYTES = 256
# Of bitsandbytes: elements from which on moments have 8 bits; two maps to 32 bits, and paddings.
_SMALLEST_8BIT, _QUANTIZATION_BYTES = 4096, 2560


@dataclass(frozen=True)
class HeldState:
    """What one rank saves of weights and optimizer. Tensors are the live ones.

    Attributes:
        weights: By name: whole, or this rank's rows.
        optimizer: State dict of the optimizer; without its moments where they are in `moments`.
        moments: This rank's rows, as INDEX.NAME.
        shapes: Shapes of the whole tensors that `weights` and `moments` have rows of.
        rows: Where the rows belong; None: everything is whole.
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rows: RowChoice | None = None


class Division(ABC):
    """How weights, gradients and moments lie over the ranks, and what is done with them.

    Call `place` once, then `prepare` once. What is not abstract goes through Accelerate.

    Attributes:
        loss_model: The loss model without wrappers of ranks.
        model: What to call in training.
        optimizer: The plain optimizer.
        has_whole_weights: Whether a rank can do a forward pass alone; else all ranks call each one.
    """

    loss_model: LossModel
    model: Any
    optimizer: torch.optim.Optimizer
    has_whole_weights = True

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._prepared_optimizer: Any = None

    def place(self, model: LossModel) -> None:
        """Bring a model from the CPU to where it is trained, before its optimizer is built."""
        if self._accelerator.device.type != "cpu":
            model.to(self._accelerator.device)

    @abstractmethod
    def prepare(self, model: LossModel, optimizer: torch.optim.Optimizer) -> None:
        """Take over the placed model and its optimizer."""

    @abstractmethod
    def micro_step(self) -> AbstractContextManager[None]:
        """Return what a forward and a backward pass of the step stand in."""

    def backward(self, loss: torch.Tensor) -> None:
        """Do the backward pass of a micro-step; it counts for its share of the step."""
        self._accelerator.backward(loss)

    def try_backward(self, loss: torch.Tensor) -> None:
        """Do a backward pass whose gradients are dropped, as for compilation."""
        torch.autograd.backward(loss)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the step's gradients down to a norm; return what it was, on every rank.

        An infinite `max_norm` leaves them.
        """
        norm: torch.Tensor = self._accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        return norm

    def step(self) -> None:
        """Update the weights."""
        self._prepared_optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._prepared_optimizer.zero_grad()

    @property
    @abstractmethod
    def rows(self) -> RowChoice | None:
        """The rows of weights and moments that this rank saves and restores; None: whole tensors.

        Whole ones are saved by the main process alone.
        """

    @abstractmethod
    def held_state(self) -> HeldState | None:
        """Return what this rank saves; None where another one saves all of it.

        Every rank calls this at the same point.
        """

    @abstractmethod
    def restore(self, weights: Mapping[str, torch.Tensor], optimizer: dict[str, Any]) -> None:
        """Bring back weights and optimizer; every rank calls this at the same point.

        Tensors are the rows of `rows`, those of the optimizer's moments too.

        Raises:
            ValueError: They are not those of this model.
        """

    def snapshot_bytes(self) -> int:
        """Return the bytes of a snapshot: weights and moments of this rank, and a margin."""
        weights = weights_by_first_name(self.loss_model.core).values()
        held = sum(self._held_bytes(weight) + _SMALL_BYTES for weight in weights)
        for group in self.optimizer.param_groups:
            held += sum(_moment_bytes(group, w, self._held_bytes(w)) for w in group["params"])
        return held + SNAPSHOT_MARGIN_BYTES

    def _held_bytes(self, weight: torch.Tensor) -> int:
        """Return the bytes of a weight that this rank holds."""
        return weight.nbytes


def _moment_bytes(group: Mapping[str, Any], weight: torch.Tensor, held: int) -> int:
    """Return the bytes that an optimizer keeps for `held` bytes of a weight of a group."""
    if "momentum" in group:  # Muon
        return held
    if "clip_threshold" in group:  # Adafactor: a row and a column
        return held // weight.shape[-1] + held // weight.shape[-2] if weight.dim() > 1 else held
    if "t_alpha" in group and weight.numel() >= _SMALLEST_8BIT:  # bitsandbytes
        return held // 2 + held // 128 + _QUANTIZATION_BYTES
    return 2 * held


class Replicated(Division):
    """Every rank holds everything; gradients are averaged by DistributedDataParallel."""

    def prepare(self, model: LossModel, optimizer: torch.optim.Optimizer) -> None:
        """Take over the placed model and its optimizer."""
        self.loss_model, self.optimizer = model, optimizer
        self.model, self._prepared_optimizer = self._accelerator.prepare(model, optimizer)

    def micro_step(self) -> AbstractContextManager[None]:
        """Return what leaves the averaging to the last backward pass of a step."""
        context: AbstractContextManager[None] = self._accelerator.accumulate(self.model)
        return context

    @property
    def rows(self) -> None:
        """None: whole tensors."""
        return

    def held_state(self) -> HeldState | None:
        """Return everything on the main process, None on others."""
        if not self._accelerator.is_main_process:
            return None
        return HeldState(self.loss_model.core.state_dict(), self.optimizer.state_dict())

    def restore(self, weights: Mapping[str, torch.Tensor], optimizer: dict[str, Any]) -> None:
        """Bring back whole weights and the whole optimizer.

        Raises:
            ValueError: They are not those of this model.
        """
        model = self.loss_model.core
        found = model.load_state_dict(weights, strict=False)
        # A second name for the same memory (tied weights) is not in the file.
        memory = model.state_dict()
        given = {memory[name].data_ptr() for name in weights if name in memory}
        missing = [name for name in found.missing_keys if memory[name].data_ptr() not in given]
        if missing or found.unexpected_keys:
            raise ValueError(f"missing weights {missing}, unexpected {found.unexpected_keys}")
        self.optimizer.load_state_dict(optimizer)


def weights_by_first_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's weights and buffers by their first names: tied ones have several."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def require_same_names(known: set[str], given: set[str]) -> None:
    """Refuse weights of another model.

    Raises:
        ValueError: Some are missing, or not known.
    """
    missing, unexpected = sorted(known - given), sorted(given - known)
    if missing or unexpected:
        raise ValueError(f"missing weights {missing}, unexpected {unexpected}")
