"""Text from a model as it is: token ids in, one token id after the other out.

    prompt ids -> model (keys and values cached) -> logits -> choice -> token id

Texts grow alone or several at once: prompts of different lengths are filled up on the left, with
a mask over what fills them and positions that begin behind it. Each text has random numbers of its
own, so it does not depend on the others. (In a batch the products of the model are rounded
otherwise than alone: where two tokens are as good as equally likely, another one may be chosen.)

A look at a model changes nothing of it: weights, train or eval mode and every random state are
afterwards what they were, also when the caller stops in the middle. No collective of the ranks is
called: one rank may generate while the others do not.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from configs.model_config import known_vocab_size
from utils.base.errors import UsageError
from utils.models.token_choice import Sampling, choose_token, penalize

END_TOKEN = "end_token"  # noqa: S105
MAX_TOKENS = "max_tokens"
NOT_FINITE = "not_finite"


@dataclass(eq=False)
class GrowingText:
    """A text that grows.

    Attributes:
        prompt: Token ids, at least one. Of a prompt that is longer than the model's context the
            end is used.
        sampling: How its tokens are chosen.
        tokens: What follows the prompt so far, without the token that ends it.
        finish: Why it ended: `END_TOKEN`, `MAX_TOKENS`, `NOT_FINITE` (weights that are broken have
            no text), or what the caller writes here to end it; empty while it grows.
    """

    prompt: Sequence[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    finish: str = ""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)
        self.window = 0  # the first token that the model sees
        if self.sampling.max_tokens == 0:
            self.finish = MAX_TOKENS

    @property
    def seen(self) -> int:
        """Number of tokens that the model sees."""
        return len(self.prompt) + len(self.tokens) - self.window

    def visible(self) -> list[int]:
        """Return the tokens that the model sees."""
        begin = self.window - len(self.prompt)
        if begin >= 0:
            return self.tokens[begin:]
        return [*self.prompt[self.window :], *self.tokens]


class Batch:
    """Texts that grow together, by a token each at every step.

    Keep the model in eval mode meanwhile (`evaluating`). When a text has filled the model's
    context, the model reads the newer half of it again and goes on from there.

    Args:
        model: A causal language model of transformers, without wrappers of ranks. Ids that only pad
            its vocabulary are never chosen.
        rows: The texts. One that has a `finish` leaves at the next step.
        end_ids: Tokens that end a text.

    Raises:
        UsageError: A prompt is empty or holds ids that the model does not have.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[GrowingText], end_ids: Collection[int] = ()
    ) -> None:
        self._model, self._end_ids = model, frozenset(end_ids)
        self._config: Any = model.config
        self._vocab_size = known_vocab_size(self._config)
        self._context = getattr(self._config, "max_position_embeddings", None) or math.inf
        self._device = next(model.parameters()).device
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        for row in rows:
            require_known_ids(row.prompt, self._vocab_size)
        self._rows = list(rows)
        self._cache: Any = None
        self._mask: torch.Tensor | None = None  # int64 [rows, columns of the cache]; None: all 1

    @property
    def is_growing(self) -> bool:
        """Whether a text is left that can grow."""
        return any(not row.finish for row in self._rows)

    def step(self) -> list[GrowingText]:
        """Give every text its next token; return those that got one."""
        self._drop_finished()
        if not self._rows:
            return []
        grown = []
        for row, token in zip(self._rows, self._choose(self._next_logits()), strict=True):
            if token is None:
                row.finish = NOT_FINITE
            elif token in self._end_ids:
                row.finish = END_TOKEN
            else:
                row.tokens.append(token)
                grown.append(row)
                if len(row.tokens) == row.sampling.max_tokens:
                    row.finish = MAX_TOKENS
        return grown

    def _drop_finished(self) -> None:
        kept = [number for number, row in enumerate(self._rows) if not row.finish]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[number] for number in kept]
        if self._cache is not None and kept:
            indices = torch.tensor(kept, device=self._device)
            self._cache.batch_select_indices(indices)
            if self._mask is not None:
                self._mask = self._mask[indices]

    def _next_logits(self) -> torch.Tensor:
        """Return the logits of the next tokens: float32 [rows, vocabulary]."""
        full = [row for row in self._rows if row.seen > self._context]
        for row in full:  # goes on from its newer half
            row.window += row.seen - max(1, int(self._context) // 2)
        inputs = self._begin() if self._cache is None or full else self._go_on()
        # no_grad holds within this call alone: between two tokens the caller's mode is as it was.
        with torch.no_grad():
            output = self._model(
                **inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        logits: torch.Tensor = output.logits[:, -1, : self._vocab_size].float()
        return logits

    def _begin(self) -> dict[str, torch.Tensor]:
        """Return the whole texts as the model's input, with an empty cache."""
        from transformers import DynamicCache

        self._cache, self._mask = DynamicCache(config=self._config), None
        texts = [row.visible() for row in self._rows]
        longest = max(map(len, texts))
        fill = [longest - len(text) for text in texts]
        ids = torch.tensor([[0] * n + text for n, text in zip(fill, texts, strict=True)])
        inputs = {"input_ids": ids.to(self._device)}
        if any(fill):
            columns = torch.arange(longest) - torch.tensor(fill)[:, None]
            self._mask = (columns >= 0).long().to(self._device)
            inputs["attention_mask"] = self._mask
            if self._takes_positions:
                inputs["position_ids"] = columns.clamp(min=0).to(self._device)
        return inputs

    def _go_on(self) -> dict[str, torch.Tensor]:
        """Return the newest tokens as the model's input."""
        new = [[row.tokens[-1]] for row in self._rows]
        inputs = {"input_ids": torch.tensor(new, device=self._device)}
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(new), 1)], dim=1)
            inputs["attention_mask"] = self._mask
            if self._takes_positions:
                positions = [[row.seen - 1] for row in self._rows]
                inputs["position_ids"] = torch.tensor(positions, device=self._device)
        return inputs

    def _choose(self, logits: torch.Tensor) -> Sequence[int | None]:
        """Return the next token of each row; None where logits are not finite."""
        for row, own in zip(self._rows, logits, strict=True):
            if row.sampling.repetition_penalty != 1:
                penalize(own, [*row.prompt, *row.tokens], row.sampling.repetition_penalty)
        is_finite = logits.amax(dim=-1).isfinite()
        if all(row.sampling.is_greedy for row in self._rows):
            # One small copy from the device.
            chosen = torch.where(is_finite, logits.argmax(dim=-1), -1).tolist()
            return [None if token < 0 else token for token in chosen]
        on_host, usable = logits.cpu(), is_finite.tolist()

        def choose(number: int) -> int | None:
            row = self._rows[number]
            if not usable[number]:
                return None
            return choose_token(on_host[number], row.sampling, row.generator)

        numbers = range(len(self._rows))
        if len(numbers) == 1:
            return [choose(0)]
        # torch's operators let other threads run, and each row has its own generator.
        with ThreadPoolExecutor(min(len(numbers), os.cpu_count() or 1)) as pool:
            return list(pool.map(choose, numbers))


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
        model: See `Batch`. It is called beside torch.compile, which would compile it anew for each
            length.
        prompt: See `GrowingText`.
        sampling: How tokens are chosen.
        end_ids: Tokens that end the text; they are not yielded.
        should_stop: Asked before each token.

    Raises:
        UsageError: The prompt is empty or holds ids that the model does not have.
    """
    batch = Batch(model, [GrowingText(prompt, sampling)], end_ids)
    with evaluating(model):
        while batch.is_growing and not should_stop():
            for row in batch.step():
                yield row.tokens[-1]


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
def evaluating(model: nn.Module) -> Iterator[None]:
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
