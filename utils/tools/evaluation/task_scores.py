"""HellaSwag and last-word accuracy of a model.

questions -> requests -> scores (scoring.py) -> figures
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from utils.tools.evaluation.scoring import (
    Request,
    Score,
    encode_request,
    known_perplexity,
    score_requests,
)
from utils.tools.evaluation.task_data import DELIMITER, Choice, LastWord, Questions


def score_questions(
    model: Any,
    tokenizer: Any,
    questions: Questions,
    *,
    context_size: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float | None]:
    """Return the figures of a task.

    Args:
        model: A causal language model of transformers, in eval mode.
        tokenizer: Its tokenizer.
        questions: All of one kind.
        context_size: Tokens that the model sees at once; None for any number.
        batch_size: Continuations in one forward.
        on_progress: Told how many continuations are scored, and of how many.

    Raises:
        UsageError: A text cannot be scored with this tokenizer or context.
    """
    requests = [request for item in questions.items for request in build_requests(tokenizer, item)]
    scores = score_requests(
        model,
        requests,
        context_size=context_size,
        batch_size=batch_size,
        on_progress=lambda done: on_progress(done, len(requests)),
    )
    choices = [item for item in questions.items if isinstance(item, Choice)]
    return judge_choices(choices, scores) if choices else judge_last_words(scores)


def build_requests(tokenizer: Any, item: Choice | LastWord) -> list[Request]:
    """Return what has to be scored for a question."""
    if isinstance(item, LastWord):
        return [encode_request(tokenizer, item.context, item.word)]
    return [
        encode_request(tokenizer, item.context, f"{DELIMITER}{answer}") for answer in item.answers
    ]


def judge_choices(items: Sequence[Choice], scores: Sequence[Score]) -> dict[str, float | None]:
    """Return how often the likeliest answer is the right one.

    Args:
        items: The questions.
        scores: Scores of all answers of the first one, then of the second, and so on.

    Returns:
        `acc`: by log-likelihood. `acc_norm`: by log-likelihood for each character of the answer
        (the space before it is not counted), the figure that is quoted for HellaSwag. Of equals the
        first one is taken.
    """
    plain, normalized, first = [], [], 0
    for item in items:
        found = scores[first : first + len(item.answers)]
        first += len(item.answers)
        likelihoods = np.array([score.log_likelihood for score in found])
        lengths = np.array([float(len(answer)) for answer in item.answers])
        plain.append(int(likelihoods.argmax()) == item.right)
        normalized.append(int((likelihoods / lengths).argmax()) == item.right)
    return {
        "acc": _mean(plain),
        "acc_stderr": standard_error(plain),
        "acc_norm": _mean(normalized),
        "acc_norm_stderr": standard_error(normalized),
        "items": len(items),
    }


def judge_last_words(scores: Sequence[Score]) -> dict[str, float | None]:
    """Return how often greedy decoding would write the last word, and its perplexity."""
    hits = [score.is_greedy for score in scores]
    mean = math.fsum(score.log_likelihood for score in scores) / len(scores)
    return {
        "acc": _mean(hits),
        "acc_stderr": standard_error(hits),
        "perplexity": known_perplexity(-mean),
        "items": len(scores),
    }


def _mean(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def standard_error(hits: Sequence[bool]) -> float | None:
    """Return the standard error of the mean (sample deviation over the root of the number)."""
    count = len(hits)
    if count < 2:
        return None
    mean = _mean(hits)
    return math.sqrt(math.fsum((hit - mean) ** 2 for hit in hits) / (count - 1) / count)
