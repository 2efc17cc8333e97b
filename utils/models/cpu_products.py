"""Matrix products of a model in float32 on a CPU: by oneDNN where it beats the default library.

    inputs, weights -> inputs @ weights.T; gradient of the inputs the same way

torch has oneDNN and MKL built in, and makes float32 products with MKL alone. On AMD's processors
with AVX-512, MKL is slower: oneDNN takes 0.55 to 0.95 of its time for outputs and gradients of
inputs (BENCHMARKS.md, "Matrix products"). For gradients of weights it does not. Which one is
taken depends on the processor alone, so that a run that goes on has the same results.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - as everybody names it

CPU_INFO = Path("/proc/cpuinfo")
AMD = "AuthenticAMD"


@functools.cache
def is_onednn_faster() -> bool:
    """Tell whether this processor is one where oneDNN was measured to be faster."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not product_operations():
        return False
    try:
        return AMD in CPU_INFO.read_text()
    except OSError:
        return False


def product_operations() -> frozenset[Any]:
    """Return the operator that oneDNN's products are; none where torch was built without it."""
    # What torch.compile calls for linear layers; no function with a documented name does it.
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return frozenset() if operator is None else frozenset({operator.default})


def linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `inputs @ weight.T + bias` without a gradient of its own.

    `inputs` are [..., width], `weight` is [outputs, width] of any strides, `bias` [outputs].
    """
    if is_onednn_faster() and _can_onednn(inputs, weight):
        return _by_onednn(inputs, weight, bias)
    return F.linear(inputs, weight, bias)


def _can_onednn(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    return inputs.device.type == "cpu" and inputs.dtype == weight.dtype == torch.float32


def _by_onednn(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        return _by_onednn(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        (grad,) = grads
        wants_inputs, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _by_onednn(grad, weight.t()) if wants_inputs else None,
            rows.t() @ inputs.flatten(0, -2) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


class CpuLinear(nn.Linear):
    """A linear layer whose float32 products oneDNN makes; other precisions stay with torch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as torch names it
        """Return `input @ weight.T + bias`, [..., outputs]."""
        if torch.is_autocast_enabled("cpu") or not _can_onednn(input, self.weight):
            return super().forward(input)
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias
        )
        return product


def use_cpu_products(model: nn.Module) -> bool:
    """Have oneDNN make the products of a model's linear layers, and tell whether that is worth it.

    Names and weights stay as they are.
    """
    if is_onednn_faster():
        for part in model.modules():
            if type(part) is nn.Linear:
                part.__class__ = CpuLinear
    return is_onednn_faster()
