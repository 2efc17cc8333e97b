"""How likely a model finds tokens: the log-probabilities behind losses and task scores.

    token ids, targets -> hidden states -> logits of some tokens at a time -> log-probabilities

A continuation is scored as EleutherAI's lm-evaluation-harness does it (`_encode_pair` of
lm_eval/api/model.py, `_loglikelihood_tokens` of lm_eval/models/huggingface.py), so that a task has
the same score in both. Nothing of the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from configs.model_config import is_loss_chunked
from utils.base.errors import ResourceShortageError, UsageError
from utils.base.text import GREATEST_EXPONENT, perplexity_of
from utils.models.estimates import chunk_tokens
from utils.models.losses import IGNORED
from utils.models.tokenizer import encode_text


@dataclass(frozen=True)
class Request:
    """A continuation to be scored after its context; token ids, one at least of each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """What a model makes of a continuation.

    Attributes:
        log_likelihood: Sum of the log-probabilities of its tokens, in nats.
        is_greedy: Whether each of its tokens is the likeliest one at its place.
    """

    log_likelihood: float
    is_greedy: bool


def token_scores(
    model: Any,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probability, whether it is the likeliest token) of each target.

    Logits are there for a chunk of the targets at a time, where the model's output layer is known
    to be a plain one; other models make their own, for a few samples at a time.

    Args:
        model: A causal language model of transformers.
        input_ids: int64 [samples, tokens], on the model's device.
        targets: int64 [samples, tokens], what follows each token; `IGNORED` where nothing is asked.
        position_ids: int64 [samples, tokens]; None counts from 0.

    Returns:
        float32 and bool tensors [targets that are not `IGNORED`], sample by sample, on the device.

    Raises:
        ResourceShortageError: The device's memory does not suffice.
    """
    try:
        with torch.no_grad():
            parts = [
                _score_logits(logits, wanted)
                for logits, wanted in _logits(model, input_ids, targets, position_ids)
            ]
    except torch.OutOfMemoryError as exc:
        raise ResourceShortageError(
            f"The memory of {input_ids.device} does not suffice for {len(input_ids)} samples of "
            f"{input_ids.shape[1]} tokens: lower --batch-size, or take --dtype bfloat16."
        ) from exc
    return torch.cat([logs for logs, _ in parts]), torch.cat([greedy for _, greedy in parts])


def _logits(
    model: Any, input_ids: torch.Tensor, targets: torch.Tensor, position_ids: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (logits, targets) of the wanted tokens: [some, vocabulary] and [some]."""
    chunk = chunk_tokens(model.config.vocab_size, input_ids.device.type)
    known = targets != IGNORED
    if is_loss_chunked(model.config.model_type, "auto"):
        inputs = {} if position_ids is None else {"position_ids": position_ids}
        hidden = model.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        output = model.get_output_embeddings()
        hidden, wanted = hidden[known], targets[known]
        for first in range(0, len(wanted), chunk):
            part = slice(first, first + chunk)
            yield output(hidden[part]), wanted[part]
        return
    rows = max(1, chunk // input_ids.shape[1])
    for first in range(0, len(input_ids), rows):
        part = slice(first, first + rows)
        inputs = {} if position_ids is None else {"position_ids": position_ids[part]}
        logits = model(input_ids=input_ids[part], use_cache=False, **inputs).logits
        yield logits[known[part]], targets[part][known[part]]


def _score_logits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logs = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    return logs.gather(1, targets.unsqueeze(1)).squeeze(1), logits.argmax(dim=1) == targets


def encode_request(tokenizer: Any, context: str, continuation: str) -> Request:
    """Return a context and what is to follow it as token ids.

    Both are encoded together and cut where the context alone would end; spaces at the end of the
    context go to the continuation, where most tokenizers have them. An empty context is the token
    that stands before a text.

    Raises:
        UsageError: No token is left of the continuation, or nothing can stand before it.
    """
    if not context:
        return _encode_alone(tokenizer, continuation)
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    if not context:
        return _encode_alone(tokenizer, continuation)
    begin = encode_text(tokenizer, context)
    tokens = encode_text(tokenizer, context + continuation)
    return _require_tokens(Request(tuple(begin), tuple(tokens[len(begin) :])), continuation)


def _encode_alone(tokenizer: Any, text: str) -> Request:
    ids = tokenizer.encode(text, add_special_tokens=False)
    before = _token_before(tokenizer)
    if before is None:
        raise UsageError("A text without a context needs a tokenizer with an end-of-text token.")
    if ids[:1] == [before]:
        return _require_tokens(Request(tuple(ids[:1]), tuple(ids[1:])), text)
    return _require_tokens(Request((before,), tuple(ids)), text)


def _token_before(tokenizer: Any) -> int | None:
    """Return the token that stands before a text."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    found: int | None = begin if begin is not None else end
    return found


def _require_tokens(request: Request, text: str) -> Request:
    if not request.context or not request.continuation:
        raise UsageError(f"The tokenizer leaves no token of {text[:60]!r} to be scored.")
    return request


def known_perplexity(loss: float) -> float | None:
    """Return exp(loss); None where no number is so large."""
    return perplexity_of(loss) if loss < GREATEST_EXPONENT else None


def score_requests(
    model: Any,
    requests: Sequence[Request],
    *,
    context_size: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Return the scores of continuations, in the order of the requests.

    The longest come first, padded at the right, which a causal model does not see. What is longer
    than the model's context is cut at its left.

    Args:
        model: A causal language model of transformers, in eval mode.
        requests: What is to be scored.
        context_size: Tokens that the model sees at once; None for any number.
        batch_size: Continuations in one forward.
        on_progress: Told how many are done.

    Raises:
        UsageError: A continuation alone is longer than the model's context.
    """
    order = sorted(
        range(len(requests)),
        key=lambda index: -len(requests[index].context) - len(requests[index].continuation),
    )
    scores: dict[int, Score] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        found = _score_batch(model, [requests[index] for index in batch], context_size)
        scores.update(zip(batch, found, strict=True))
        on_progress(len(scores))
    return [scores[index] for index in range(len(requests))]


def _score_batch(model: Any, requests: Sequence[Request], context_size: int | None) -> list[Score]:
    rows = [_shift(request, context_size) for request in requests]
    device = next(model.parameters()).device
    longest = max(len(tokens) for tokens, _ in rows)
    inputs = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])
    targets = torch.tensor([found + [IGNORED] * (longest - len(found)) for _, found in rows])
    logs, greedy = token_scores(model, inputs.to(device), targets.to(device))
    sums, hits = logs.cpu().double(), greedy.cpu()
    scores, first = [], 0
    for request in requests:
        part = slice(first, first + len(request.continuation))
        scores.append(Score(float(sums[part].sum()), bool(hits[part].all())))
        first = part.stop
    return scores


def _shift(request: Request, context_size: int | None) -> tuple[list[int], list[int]]:
    """Return (what the model sees, what is to follow each of these tokens)."""
    count = len(request.continuation)
    if context_size is not None and count > context_size:
        raise UsageError(
            f"A continuation of {count} tokens is longer than the {context_size} that the model "
            "sees at once."
        )
    tokens = [*request.context, *request.continuation]
    tokens = tokens if context_size is None else tokens[-(context_size + 1) :]
    return tokens[:-1], [IGNORED] * (len(tokens) - 1 - count) + tokens[len(tokens) - count :]
