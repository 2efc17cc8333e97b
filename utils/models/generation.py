"""Text from a model as it is: token ids in, the ids that follow out, by `model.generate`.

    prompt ids (padded on the left) -> model.generate -> new ids, each told as it comes

A look at a model changes nothing of it: weights, train or eval mode and every random state are
afterwards what they were, also when the caller stops in the middle. No collective of the ranks is
called: one rank may generate while the others do not.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from configs.model_config import known_vocab_size
from utils.base.errors import PretrainError, UsageError


class NotFiniteError(PretrainError):
    """The model's logits are not finite: its weights are broken."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: Tokens to generate at most.
        temperature: Logits are divided by it; 0 takes the likeliest token each time (greedy).
        top_k: Only so many of the likeliest tokens are left to choose from; 0: all.
        top_p: Only the likeliest tokens that together have this probability are left; 1: all.
        seed: Seed of the random choices of a batch of texts.
        repetition_penalty: Above 1, tokens that the text has already, the prompt's too, become less
            likely (Keskar et al. 2019).

    Raises:
        UsageError: A value is out of its range.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise UsageError(f"max_tokens must be at least 0, got {self.max_tokens}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature must be at least 0, got {self.temperature}.")
        if self.top_k < 0:
            raise UsageError(f"top_k must be at least 0, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if not -(2**63) <= self.seed < 2**64:
            raise UsageError(f"seed must be at least -2^63 and below 2^64, got {self.seed}.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(f"repetition_penalty must be above 0, got {self.repetition_penalty}.")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0


class _RequireFinite(LogitsProcessor):
    """Stops where weights are broken: transformers would choose some token of them."""

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax(dim=-1).isfinite().all():
            raise NotFiniteError("The model's logits are not finite: its weights are broken.")
        return scores


class StopWhen(StoppingCriteria):
    """Ends texts by a question that is asked after each token.

    Args:
        is_over: Is given the ids of all texts, prompts included: int64 [texts, tokens]; answers for
            each, or for all at once.
    """

    def __init__(self, is_over: Callable[[torch.Tensor], Sequence[bool] | bool]) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return whether each text is over: bool [texts]."""
        answers = torch.as_tensor(self._is_over(input_ids), device=input_ids.device)
        return answers.expand(len(input_ids))


def generate_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_ids: Collection[int] = (),
    stop_when: Sequence[StopWhen] = (),
    streamer: Any = None,
) -> list[list[int]]:
    """Return the tokens that follow prompts, each text up to one of `end_ids`, without it.

    Args:
        model: A causal language model of transformers, without wrappers of ranks. Ids that only pad
            its vocabulary are never chosen.
        prompts: Token ids of each prompt, at least one.
        sampling: How tokens are chosen. The texts share its random numbers: with other texts beside
            it, a sampled text is another one.
        end_ids: Tokens that end a text.
        stop_when: What ends texts besides. What follows that point in a text is filling.
        streamer: A streamer of transformers, for one text.

    Raises:
        UsageError: A prompt is empty, holds ids that the model does not have, or fills its context.
        NotFiniteError: The model's weights are broken.
    """
    longest = max(map(len, prompts))
    room = _room(model, longest)
    for prompt in prompts:
        require_known_ids(prompt, known_vocab_size(model.config))
    if sampling.max_tokens == 0:
        return [[] for _ in prompts]
    device = next(model.parameters()).device
    fill = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * n + list(p) for n, p in zip(fill, prompts, strict=True)])
    mask = (torch.arange(longest) >= torch.tensor(fill)[:, None]).long()
    with looking_at(model, sampling.seed), torch.inference_mode():
        found = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=_settings(model, sampling, end_ids, room),
            logits_processor=LogitsProcessorList([_RequireFinite()]),
            stopping_criteria=StoppingCriteriaList(stop_when),
            streamer=streamer,
        )
    texts: list[list[int]] = found[:, longest:].tolist()
    return [list(itertools.takewhile(lambda token: token not in end_ids, text)) for text in texts]


def _room(model: Any, longest: int) -> int:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest >= context:
        raise UsageError(
            f"A prompt of {longest} tokens leaves no room in the {context} tokens that the model "
            "sees at once. Give a shorter one."
        )
    return 2**31 if context is None else context - longest


def _settings(
    model: Any, sampling: Sampling, end_ids: Collection[int], room: int
) -> GenerationConfig:
    padding = list(range(known_vocab_size(model.config), model.config.vocab_size))
    choice: dict[str, Any] = {"do_sample": False}
    if not sampling.is_greedy:
        choice = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    ends = sorted(end_ids)
    return GenerationConfig(
        max_new_tokens=min(sampling.max_tokens, room),
        repetition_penalty=sampling.repetition_penalty,
        suppress_tokens=padding or None,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **choice,
    )


def require_known_ids(prompt: Sequence[int], vocab_size: int) -> None:
    """Check the token ids of a prompt.

    Raises:
        UsageError: There are none, or there is one that the model does not have.
    """
    if not prompt:
        raise UsageError("A prompt needs at least one token.")
    # On a GPU an unknown id would end the process's use of the device.
    if not all(0 <= token < vocab_size for token in prompt):
        raise UsageError(f"The prompt has tokens outside the model's vocabulary of {vocab_size}.")


@contextlib.contextmanager
def looking_at(model: Any, seed: int) -> Iterator[None]:
    """Put the model into eval mode, and every part of it back into its own mode afterwards.

    Random numbers come from `seed` meanwhile; every generator of torch is afterwards what it was.
    What is compiled runs as it is written: it would be compiled anew for each length. Defaults of
    the model's own `generation_config` would fill in what a caller leaves out: there are none.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training, module._compiled_call_impl) for module in model.modules()]
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    model.eval()
    for module, _, _ in modes:
        module._compiled_call_impl = None
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = defaults
        for module, training, compiled in modes:
            module.training, module._compiled_call_impl = training, compiled
