"""The loss of a language model without its logits: projection and cross entropy in one.

    hidden states, output weights, targets -> loss (and both gradients)

Logits are [tokens, vocabulary]: for long samples and large vocabularies the largest tensor of a
step, several times over in float32. Here they exist for a chunk of tokens at a time. The gradients
are formed in the forward pass while a chunk's logits are there (Hsu et al. 2024, Liger Kernel,
section 3.2), so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - as everybody names it

from utils.models.cpu_products import linear
from utils.models.estimates import chunk_tokens

ChunkLoss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor | None]
]

IGNORED = -100
"""A target that no loss is taken of."""


def next_token_targets(input_ids: torch.Tensor) -> torch.Tensor:
    """Return each token's target, the token after it: int64 [samples * tokens].

    `input_ids` are int64 [samples, tokens]; the last token of a sample has no target.
    """
    return F.pad(input_ids[:, 1:], (0, 1), value=IGNORED).flatten()


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk: int | None = None,
    cross_entropy: ChunkLoss | None = None,
) -> torch.Tensor:
    """Return the mean cross entropy of `hidden @ weight.T`, a float32 scalar.

    Under autocast the products are made in its precision, as those of a linear layer would be.

    `hidden` is [tokens, width], `weight` [vocabulary, width], `targets` int64 [tokens] with
    `IGNORED` where there is none, not all of them. Logits are there for `chunk` tokens at a time;
    None chooses.
    """
    device = hidden.device.type
    is_cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_cast else hidden.dtype
    chunk = chunk or chunk_tokens(len(weight), device)
    with torch.autocast(device, enabled=False):
        loss: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, targets, chunk, cross_entropy or chunk_cross_entropy, dtype
        )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass; the one backward pass scales them.

    What is formed here no loss scaler has seen: in float16 a gradient divided by the number of
    tokens would be 0, so that division is left to the backward pass, which has float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        cross_entropy: ChunkLoss,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        is_trained = any(ctx.needs_input_grad[:2])
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        count = (targets != IGNORED).sum()
        is_small = dtype == torch.float16
        divisor = torch.ones_like(count) if is_small else count
        scale = _float16_scale(hidden, chunk) if is_small and is_trained else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if is_trained else None
        weight_grad: torch.Tensor | None = None
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            logits = linear(hidden[part], weight)
            losses, logits_grad = cross_entropy(logits, targets[part], divisor, is_trained)
            total += losses
            if logits_grad is not None and hidden_grad is not None:
                hidden_grad[part] = linear(logits_grad, weight.t())
                inputs = hidden[part] if scale is None else hidden[part] * scale.to(dtype)
                weight_grad = _add_product(weight_grad, logits_grad.t(), inputs)
        ctx.save_for_backward(hidden_grad, weight_grad, count, scale)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad, count, scale = ctx.saved_tensors
        (grad,) = grads
        # First to the inputs' float32: the factor may be one that 16 bits do not hold.
        hidden_grad = hidden_grad.to(ctx.dtypes[0])
        if scale is not None:
            hidden_grad = hidden_grad.mul_(grad / count)
            weight_grad = weight_grad.mul_(grad / (count * scale))
        elif grad.device.type == "cuda" or grad.item() != 1:  # a GPU would have to be waited for
            hidden_grad, weight_grad = hidden_grad.mul_(grad), weight_grad.mul_(grad)
        return hidden_grad, weight_grad.to(ctx.dtypes[1]), None, None, None, None


def _float16_scale(hidden: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return a power of two with which no sum over a chunk's tokens passes the largest float16.

    A logit's gradient is at most 1 before it is divided by the number of tokens.
    """
    largest = hidden.abs().amax().float() * min(chunk, len(hidden))
    room = torch.finfo(torch.float16).max / largest
    return torch.exp2(torch.log2(room).floor()).clamp(max=1.0)


def chunk_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor, is_trained: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a chunk's summed loss, and its gradient over the logits divided by `divisor`.

    `logits` are [tokens, vocabulary], `targets` int64 [tokens]; `divisor` is the number of targets
    of all chunks, or 1. Without `is_trained` there is no gradient.
    """
    known = targets != IGNORED
    places = targets.clamp(min=0).unsqueeze(1)
    grad = torch.softmax(logits, dim=1, dtype=torch.float32)
    # The likeliest word's probability is exp(its logit - log sum exp): no less than 1 / vocabulary.
    log_sum = logits.amax(dim=1).float() - grad.amax(dim=1).log()
    loss = torch.where(known, log_sum - logits.gather(1, places).squeeze(1), 0.0).sum()
    if not is_trained:
        return loss, None
    grad.scatter_add_(1, places, grad.new_full(places.shape, -1.0))
    grad.mul_((known / divisor).unsqueeze(1))
    return loss, grad.to(logits.dtype)


def _add_product(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Return a float32 total with `left @ right` added; 16-bit products are rounded before."""
    if total is None:
        return (left @ right).float()
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)
