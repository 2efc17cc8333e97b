"""Text from a model as it is: token ids in, one token id after the other out.

    prompt ids -> model (keys and values cached) -> logits -> choice -> token id

A look at a model changes nothing of it: weights, train or eval mode and every random state are
afterwards what they were, also when the caller stops in the middle. Choices come from a generator
of their own, on the CPU, so that a seed gives the same text on every device that gives the same
logits. No collective of the ranks is called: one rank may generate while the others do not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.model_config import known_vocab_size
from utils.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: Tokens to generate at most.
        temperature: Logits are divided by it; 0 takes the likeliest token each time (greedy).
        top_k: Only so many of the likeliest tokens are left to choose from; 0: all.
        top_p: Only the likeliest tokens that together have this probability are left; 1: all.
        seed: Of the choices; the same seed and logits give the same tokens.

    Raises:
        UsageError: A value is out of its range.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise UsageError(f"max_tokens must be at least 0, got {self.max_tokens}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature must be at least 0, got {self.temperature}.")
        if self.top_k < 0:
            raise UsageError(f"top_k must be at least 0, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}.")


def generate(
    model: nn.Module,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    end_ids: Collection[int] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> list[int]:
    """Return the tokens that follow a prompt; see `stream_tokens`."""
    with contextlib.closing(
        stream_tokens(model, prompt, sampling, end_ids=end_ids, should_stop=should_stop)
    ) as tokens:
        return list(tokens)


def stream_tokens(
    model: nn.Module,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    end_ids: Collection[int] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[int, None, None]:
    """Yield the tokens that follow a prompt, each as soon as it is chosen.

    The model is in eval mode from the first token to the last: close the iterator (or exhaust it)
    before the model is used for something else.

    Args:
        model: A causal language model of transformers, without wrappers of ranks. It is called
            beside torch.compile, which would compile it anew for each length. Ids that only pad
            its vocabulary are never chosen.
        prompt: Token ids, at least one. Of a prompt that is longer than the model's context the
            end is used.
        sampling: How tokens are chosen.
        end_ids: Tokens that end the text; they are not yielded.
        should_stop: Asked before each token.

    Raises:
        UsageError: The prompt is empty or holds ids that the model does not have.
    """
    config: Any = model.config
    vocab_size = known_vocab_size(config)
    _require_known_ids(prompt, vocab_size)
    context = getattr(config, "max_position_embeddings", None) or math.inf
    generator = torch.Generator().manual_seed(sampling.seed)
    device = next(model.parameters()).device
    seen, cache = list(prompt), None
    with _evaluating(model):
        for _ in range(sampling.max_tokens):
            if should_stop():
                return
            if cache is None or len(seen) > context:
                # A full context goes on from its newer half.
                seen, cache = seen[-_kept(len(seen), context) :], _new_cache(config)
                new = seen
            else:
                new = seen[-1:]
            logits = _next_logits(model, torch.tensor([new], device=device), cache)[:vocab_size]
            if not math.isfinite(float(logits.max())):
                return  # weights that are broken have no text
            token = choose_token(logits, sampling, generator)
            if token in end_ids:
                return
            seen.append(token)
            yield token


def choose_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token.

    Args:
        logits: float32 [vocabulary] on the CPU.
        sampling: How to choose.
        generator: Where random numbers come from, on the CPU.
    """
    if sampling.temperature == 0:
        return int(logits.argmax().item())
    # In float64, with 0 as the highest: no temperature is too near 0 for the division.
    shifted = (logits - logits.max()).double()
    ordered, tokens = torch.sort(shifted, descending=True, stable=True)
    probabilities = torch.softmax(ordered / sampling.temperature, dim=0)
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    if sampling.top_p < 1:
        # A token goes where those before it have enough already; the likeliest always stays.
        probabilities /= probabilities.sum()
        probabilities[probabilities.cumsum(dim=0) - probabilities >= sampling.top_p] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)].item())


def _require_known_ids(prompt: Sequence[int], vocab_size: int) -> None:
    if not prompt:
        raise UsageError("A prompt needs at least one token.")
    # On a GPU an unknown id would end the process's use of the device.
    if not all(0 <= token < vocab_size for token in prompt):
        raise UsageError(f"The prompt has tokens outside the model's vocabulary of {vocab_size}.")


def _kept(length: int, context: float) -> int:
    """Return how many of `length` tokens are read again where the cache begins anew."""
    return length if length <= context else max(1, int(context) // 2)


def _new_cache(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _next_logits(model: nn.Module, input_ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Return the logits of the token behind `input_ids`: float32 [vocabulary] on the CPU."""
    # no_grad holds within this call alone: between two tokens the caller's own mode is as it was.
    with torch.no_grad():
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: torch.Tensor = output.logits[0, -1].float().cpu()
    return logits


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and every part of it back into its own mode afterwards.

    What is compiled runs as it is written meanwhile.
    """
    modes = [(module, module.training, module._compiled_call_impl) for module in model.modules()]
    model.eval()
    for module, _, _ in modes:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, training, compiled in modes:
            module.training, module._compiled_call_impl = training, compiled
