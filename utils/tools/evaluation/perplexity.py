"""Loss, perplexity and bits per byte of a model on tokens; changes nothing of it.

token stream, windows -> log-probabilities -> sums in float64 -> loss
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from utils.data.token_stream import TokenStream, Window
from utils.models.losses import IGNORED
from utils.tools.evaluation.scoring import known_perplexity, token_scores
from utils.tools.evaluation.token_bytes import ByteCounter
from utils.training_utils import document_positions

BITS_PER_NAT = 1 / math.log(2)


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts tokens.

    Attributes:
        total_nats: Sum of the losses of all predicted tokens.
        tokens: Predicted tokens.
        bytes: Bytes of text that these stand for; None where that is not known.
        seconds: Time it took.
    """

    total_nats: float
    tokens: int
    bytes: int | None
    seconds: float

    @property
    def loss(self) -> float:
        """Mean loss of a token, in nats."""
        return self.total_nats / self.tokens

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None where no number is so large."""
        return known_perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for each byte of text, which models of different tokenizers can be compared by."""
        return self.total_nats * BITS_PER_NAT / self.bytes if self.bytes else None

    def to_values(self) -> dict[str, float | None]:
        """Return the figures by name."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "tokens_per_second": self.tokens / self.seconds if self.seconds > 0 else None,
        }


def score_text(
    model: Any,
    stream: TokenStream,
    windows: Iterable[Window],
    *,
    batch_size: int,
    document_end: int | None = None,
    counter: ByteCounter | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> TextScore | None:
    """Return how well a model predicts the targets of windows; None where there are none.

    Args:
        model: A causal language model of transformers, in eval mode.
        stream: The tokens.
        windows: What of them, and through which windows.
        batch_size: Windows in one forward.
        document_end: End-of-text id where attention must not cross documents.
        counter: Counts the bytes of the targets' text.
        on_progress: Told how many tokens are predicted.

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
            counts = [_count_bytes(counter, *pair) for pair in zip(rows, batch, strict=True)]
            size = None if None in counts else size + sum(count or 0 for count in counts)
        on_progress(tokens)
    if not tokens:
        return None
    return TextScore(total, tokens, size, time.perf_counter() - started)


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
    logs, _ = token_scores(model, input_ids, targets.to(device), positions)
    return -float(logs.cpu().double().sum())  # MPS has no float64


def _count_bytes(counter: ByteCounter, row: np.ndarray[Any, Any], window: Window) -> int | None:
    first = len(row) - window.targets
    return counter.count(int(row[first - 1]), row[first:])
