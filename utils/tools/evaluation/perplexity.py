"""Loss, perplexity and bits per byte of a model on tokens; changes nothing of it.

token stream, windows -> hidden states -> log-probabilities -> sums in float64 -> loss
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from configs.model_config import is_loss_chunked
from utils.base.errors import ResourceShortageError
from utils.base.text import GREATEST_EXPONENT, perplexity_of
from utils.data.token_stream import TokenStream, Window
from utils.models.estimates import chunk_tokens
from utils.models.losses import IGNORED
from utils.tools.evaluation.token_bytes import ByteCounter
from utils.training_utils import document_positions

BITS_PER_NAT = 1 / math.log(2)


def score_text(
    model: Any,
    stream: TokenStream,
    windows: Iterable[Window],
    *,
    batch_size: int,
    document_end: int | None = None,
    counter: ByteCounter | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float | None] | None:
    """Return how well a model predicts the targets of windows; None where there are none.

    Args:
        model: A causal language model of transformers, in eval mode.
        stream: The tokens.
        windows: Which tokens are predicted, and what the model sees of those before them.
        batch_size: Windows in one forward.
        document_end: End-of-text id where attention must not cross documents.
        counter: Counts the bytes of the targets' text.
        on_progress: Told how many tokens are predicted.

    Returns:
        `loss` (mean, in nats), `perplexity` (None where no number is so large), `bits_per_byte` and
        `bytes` (None where the bytes are not known), `tokens` (predicted), `tokens_per_second`.

    Raises:
        ShardError: A shard cannot be used; it is named.
        ResourceShortageError: The device's memory does not suffice.
    """
    started = time.perf_counter()
    total, tokens, size = 0.0, 0, 0 if counter is not None else None
    for batch in _batches(windows, batch_size):
        rows = [stream.read(window.start, window.length + 1) for window in batch]
        total += _sum_losses(model, rows, batch, document_end)
        tokens += sum(window.targets for window in batch)
        if size is not None and counter is not None:
            counts = []
            for row, window in zip(rows, batch, strict=True):
                first = len(row) - window.targets
                counts.append(counter.count(int(row[first - 1]), row[first:]))
            size = None if None in counts else size + sum(count or 0 for count in counts)
        on_progress(tokens)
    if not tokens:
        return None
    seconds, loss = time.perf_counter() - started, total / tokens
    return {
        "loss": loss,
        "perplexity": perplexity_of(loss) if loss < GREATEST_EXPONENT else None,
        "bits_per_byte": total * BITS_PER_NAT / size if size else None,
        "tokens": tokens,
        "bytes": size,
        "tokens_per_second": tokens / seconds if seconds > 0 else None,
    }


def _batches(windows: Iterable[Window], batch_size: int) -> Iterator[list[Window]]:
    """Yield neighbours of the same length together."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == batch_size or window.length != batch[0].length):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _sum_losses(
    model: Any,
    rows: Sequence[np.ndarray[Any, Any]],
    windows: Sequence[Window],
    document_end: int | None,
) -> float:
    device = next(model.parameters()).device
    tokens = torch.from_numpy(np.stack(rows))
    targets = tokens[:, 1:].clone()
    for row, window in zip(targets, windows, strict=True):
        row[: window.length - window.targets] = IGNORED
    input_ids = tokens[:, :-1].to(device)
    positions = None if document_end is None else document_positions(input_ids, document_end)
    logs = token_scores(model, input_ids, targets.to(device), positions)
    return -float(logs.cpu().double().sum())  # MPS has no float64


def token_scores(
    model: Any,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the log-probability of each target.

    Logits are computed for a chunk of the targets at a time where the model's output layer is known
    to be a plain one; other models compute their own, for a few samples at a time.

    Args:
        model: A causal language model of transformers.
        input_ids: int64 [samples, tokens], on the model's device.
        targets: int64 [samples, tokens], what follows each token; `IGNORED` where nothing is asked.
        position_ids: int64 [samples, tokens]; None counts from 0.

    Returns:
        float32 [targets that are not `IGNORED`], sample by sample, on the device.

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
    return torch.cat(parts)


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


def _score_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logs = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    return logs.gather(1, targets.unsqueeze(1)).squeeze(1)
