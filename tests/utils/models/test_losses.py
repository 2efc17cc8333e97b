"""The loss without logits: equal to the one with them, in value, gradients and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from configs.model_config import PLAIN_HEADS, is_loss_chunked
from utils.models.building import LossModel
from utils.models.losses import IGNORED, linear_cross_entropy, next_token_targets

TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def random_inputs(tokens: int, width: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[tokens // 2] = IGNORED
    return hidden, weight, targets


@pytest.mark.parametrize(("chunk", "scale"), [(1, 1.0), (7, 0.25), (100, 1.0), (None, 0.25)])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    chunk: int | None, scale: float
) -> None:
    hidden, weight, targets = random_inputs(100, 16, 211)
    wanted_inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    wanted = F.cross_entropy(wanted_inputs[0] @ wanted_inputs[1].t(), targets)
    torch.autograd.backward(wanted * scale)
    inputs = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
    loss = linear_cross_entropy(inputs[0], inputs[1], targets, chunk)
    torch.autograd.backward(loss * scale)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    with torch.no_grad():
        alone = linear_cross_entropy(inputs[0], inputs[1], targets, chunk)
    torch.testing.assert_close(alone, loss.detach(), rtol=1e-6, atol=0)
    assert not alone.requires_grad
    for ours, exact in zip(inputs, wanted_inputs, strict=True):
        assert ours.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_under_autocast_the_products_are_16_bit_and_the_gradients_float32() -> None:
    hidden, weight, targets = random_inputs(64, 16, 211)
    inputs = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(inputs[0], inputs[1], targets)
    torch.autograd.backward(loss)
    exact = F.cross_entropy(hidden @ weight.t(), targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert loss.item() != pytest.approx(exact.item(), rel=1e-6)
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("scale", "inputs_scale"), [(1.0, 1.0), (2.0**16, 1.0), (2.0**24, 1.0), (2.0**16, 100.0)]
)
def test_in_float16_no_gradient_is_too_small_or_too_large(
    scale: float, inputs_scale: float
) -> None:
    # 16,384 tokens: divided by their number, most gradients of logits are no float16. And all have
    # the same target: a sum over the tokens is none either.
    tokens, vocabulary = 16384, 128
    hidden, weight, targets = random_inputs(tokens, 8, vocabulary)
    hidden, targets = (hidden + 1) * inputs_scale, torch.where(targets == IGNORED, IGNORED, 7)
    weight *= 0.02 / inputs_scale
    exact = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    torch.autograd.backward(F.cross_entropy(exact[0] @ exact[1].t(), targets))
    inputs = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(inputs[0], inputs[1], targets, 8192)
    torch.autograd.backward(loss * scale)
    for ours, wanted in zip(inputs, exact, strict=True):
        assert ours.grad is not None
        assert wanted.grad is not None
        error = (ours.grad.double() / scale - wanted.grad).norm() / wanted.grad.norm()
        assert error < 2e-3


def test_a_factor_that_bfloat16_does_not_hold_is_applied_in_float32() -> None:
    hidden, weight, targets = random_inputs(64, 16, 211)
    gradients = []
    for factor in (1.0, 1 / 3):
        inputs = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(inputs[0], inputs[1], targets)
        torch.autograd.backward(loss * factor)
        gradients.append([tensor.grad for tensor in inputs])
    for whole, third in zip(*gradients, strict=True):
        assert whole is not None
        assert third is not None
        torch.testing.assert_close(third * 3, whole, rtol=1e-6, atol=1e-9)


def test_the_last_token_of_each_sample_has_no_target() -> None:
    targets = next_token_targets(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    assert targets.tolist() == [6, 7, IGNORED, 9, 10, IGNORED]


def test_the_largest_tensor_is_a_chunk_of_logits() -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight, targets = random_inputs(512, 4, 1000)
    inputs = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
    with Watch():
        torch.autograd.backward(linear_cross_entropy(inputs[0], inputs[1], targets, 32))
    assert largest == 32 * 1000


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", PLAIN_HEADS)
def test_every_plain_head_has_the_models_own_loss(model_type: str, *, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**TINY, "tie_word_embeddings": tied})
    config.pad_token_id = None
    torch.manual_seed(1)
    core = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokens = torch.randint(101, (2, 24))
    gradients = []
    for implementation in ("chunked", "model"):
        core.zero_grad()
        loss = LossModel(core, implementation)(tokens)
        torch.autograd.backward(loss)
        gradients.append([loss.detach(), *(p.grad.clone() for p in core.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_model_with_an_unknown_head_forms_its_own_loss() -> None:
    assert is_loss_chunked("gpt_neox", "auto")
    assert not is_loss_chunked("gemma2", "auto")  # caps its logits
    assert not is_loss_chunked("gpt_neox", "model")
