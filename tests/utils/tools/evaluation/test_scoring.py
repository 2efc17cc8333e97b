"""Log-probabilities: against a plain loop, whatever the chunks, the padding and the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_models import build_small_model, plain_score
from utils.base.errors import ResourceShortageError, UsageError
from utils.models.losses import IGNORED
from utils.tools.evaluation import scoring
from utils.tools.evaluation.scoring import Request, encode_request, score_requests, token_scores
from utils.tools.generation.loading import load_named_tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return build_small_model()


@pytest.fixture(scope="module")
def tokenizer(sample_data: Path) -> Any:
    return load_named_tokenizer(str(sample_data))


@pytest.mark.parametrize("is_known", [True, False])
def test_scores_do_not_depend_on_how_logits_are_made(
    model: Any, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    monkeypatch.setattr(scoring, "is_loss_chunked", lambda *_: is_known)
    monkeypatch.setattr(scoring, "chunk_tokens", lambda *_: 3)
    ids = torch.randint(0, 512, (4, 9), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, dims=1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    # Two that the model is sure of, and two that are not asked for.
    targets[0, :2] = logits[0, :2].argmax(-1)
    targets[1, 3] = targets[3, 8] = IGNORED
    logs, greedy = token_scores(model, ids, targets)
    wanted = targets != IGNORED
    expected = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0][wanted]
    assert len(logs) == 34
    assert torch.allclose(logs.double(), expected, atol=1e-5)
    assert torch.equal(greedy, logits.argmax(-1)[wanted] == targets[wanted])
    assert greedy[:2].all()
    assert not greedy.all()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_continuations_are_scored_as_one_by_one(model: Any, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = [(3, 2), (1, 1), (20, 7), (2, 9), (11, 1)]
    pairs = [
        tuple(torch.randint(0, 512, (n,), generator=generator).tolist() for n in pair)
        for pair in lengths
    ]
    with torch.no_grad():  # one that greedy decoding writes
        best = int(model(input_ids=torch.tensor([pairs[1][0]])).logits[0, -1].argmax())
    pairs[1] = (pairs[1][0], [best])
    done: list[int] = []
    scores = score_requests(
        model,
        [Request(tuple(context), tuple(continuation)) for context, continuation in pairs],
        batch_size=batch_size,
        on_progress=done.append,
    )
    expected = [plain_score(model, *pair) for pair in pairs]
    assert [score.is_greedy for score in scores] == [hit for _, hit in expected]
    assert scores[1].is_greedy
    for score, (total, _) in zip(scores, expected, strict=True):
        assert score.log_likelihood == pytest.approx(total, abs=1e-4)
    assert done[-1] == 5


def test_a_long_context_is_cut_at_its_left(model: Any) -> None:
    context, continuation = list(range(100, 160)), [7, 8, 9]
    (score,) = score_requests(
        model, [Request(tuple(context), tuple(continuation))], context_size=16
    )
    # 16 tokens are seen when the last one is predicted.
    expected, _ = plain_score(model, context[-14:], continuation)
    assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UsageError, match="17 tokens is longer than the 16 that the model sees"):
        score_requests(model, [Request((1,), tuple(range(17)))], context_size=16)


def test_memory_that_does_not_suffice_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scoring, "_score_logits", fail)
    with pytest.raises(ResourceShortageError, match="2 samples of 4 tokens: lower --batch-size"):
        token_scores(model, torch.ones(2, 4).long(), torch.ones(2, 4).long())


def test_spaces_of_the_context_go_to_the_continuation(tokenizer: Any) -> None:
    plain = encode_request(tokenizer, "The old house", " stood")
    assert encode_request(tokenizer, "The old house ", "stood") == plain
    assert [*plain.context, *plain.continuation] == tokenizer.encode("The old house stood")
    assert tokenizer.decode(plain.continuation) == " stood"
    assert list(plain.context) == tokenizer.encode("The old house")


def test_an_empty_context_is_the_end_of_the_text_before(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    for context in ("", "  "):
        request = encode_request(tokenizer, context, "Alone")
        assert request.context == (end,)
        assert tokenizer.decode(request.continuation) == f"{context}Alone"
    text = tokenizer.decode([end])
    assert encode_request(tokenizer, "", f"{text}a").context == (end,)
    assert encode_request(tokenizer, "", f"{text}a").continuation == tuple(tokenizer.encode("a"))


def test_a_continuation_without_a_token_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no token of ''"):
        encode_request(tokenizer, "The", "")
