"""Muon for the matrices of a model's layers, AdamW for all else: one optimizer of torch's kind.

    gradients -> AdamW's groups by torch.optim.AdamW, Muon's by torch.optim.Muon -> weights

Muon replaces the momentum of a matrix by the nearest matrix with orthogonal rows or columns, nearly
(Jordan et al. 2024), scaled to the size of AdamW's updates (Liu et al. 2025, Muon is Scalable for
LLM Training). torch makes these products in bfloat16; on a CPU (Intel, AVX-512) that took three
times as long as the ones made here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from utils.models.cpu_products import linear


def orthogonalize(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Return the result of torch.optim.Muon's Newton-Schulz iteration, in the input's precision.

    `matrix` is [rows, columns]. Each iteration multiplies it from the left by a polynomial of its
    Gram matrix; these are gathered in one small square, and the matrix is multiplied once. Rounding
    in float32 comes to 1e-3 at most, a quarter of what bfloat16 does to a number.
    """
    wide = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    gram = linear(wide, wide)
    norm = gram.trace().sqrt().clamp(min=eps)
    gram /= norm.square()
    first, third, fifth = coefficients
    polynomial = torch.empty(0)
    for step in range(steps):
        factor = linear(gram, gram).mul_(fifth).add_(gram, alpha=third)
        factor.diagonal().add_(first)
        polynomial = linear(factor, polynomial) if step else factor
        if step + 1 < steps:
            gram = linear(factor, linear(factor, gram))
    polynomial /= norm
    # It is symmetric. Either way the result lies in memory as the matrix does.
    return linear(polynomial, matrix.T) if wide is matrix else linear(matrix, polynomial)


class _Muon(torch.optim.Muon):
    """torch's, with products that a CPU makes quickly; groups and states are the same."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the matrices; there is no closure."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        if any(weight.device.type != "cpu" for weight in weights):
            super().step()  # type: ignore[no-untyped-call]
            return None
        with torch.no_grad():
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._update(weight, group)
        return None

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[weight], weight.grad
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum: torch.Tensor = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"])
        settings = (group["ns_coefficients"], group["ns_steps"], group["eps"])
        update = _on_whole(update, lambda whole: orthogonalize(whole, *settings))
        rate = group["lr"] * 0.2 * math.sqrt(max(weight.shape))  # match_rms_adamw
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def _on_whole(
    tensor: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return a function of a tensor; of one whose rows ranks share, this rank's rows of it."""
    sharded: Any = tensor
    if not hasattr(sharded, "full_tensor"):
        return function(tensor)
    from torch.distributed.tensor import distribute_tensor

    whole = function(sharded.full_tensor())
    return distribute_tensor(  # every rank has all of it: nothing is sent
        whole, sharded.device_mesh, sharded.placements, src_data_rank=None
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """AdamW's groups and then Muon's, in one state dict, under one schedule.

    Arguments are those of the two, without their parameters.
    """

    def __init__(
        self,
        adamw_groups: list[dict[str, Any]],
        muon_groups: list[dict[str, Any]],
        adamw: dict[str, Any],
        muon: dict[str, Any],
    ) -> None:
        self._adamw = torch.optim.AdamW(adamw_groups, **adamw)
        self._muon = _Muon(muon_groups, adjust_lr_fn="match_rms_adamw", **muon)
        super().__init__([*self._adamw.param_groups, *self._muon.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Have both parts work on this optimizer's groups and states."""
        count = len(self._adamw.param_groups)
        self._adamw.param_groups = self.param_groups[:count]
        self._muon.param_groups = self.param_groups[count:]
        self._adamw.state = self._muon.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `load_state_dict` gives."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all weights; there is no closure."""
        self._adamw.step()
        self._muon.step()
        return None
