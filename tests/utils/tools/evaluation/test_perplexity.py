"""Loss and perplexity: equal to a plain loop over the same tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sample_shards import save_shard
from tests.small_models import build_small_model
from utils.base.errors import ResourceShortageError
from utils.data.shard_cache import ShardCache
from utils.data.token_stream import TokenStream, covering_windows, training_windows
from utils.models.losses import IGNORED
from utils.storage.directory import DirectoryBucket
from utils.tools.evaluation import perplexity
from utils.tools.evaluation.perplexity import score_text, token_scores

LENGTHS = (29, 50, 3)
END = 0


class OneByte:
    """Counts a byte for each token that is even; none where a token is 511."""

    def count(self, before: int, tokens: Any) -> int | None:
        assert 0 <= before < 512
        return None if 511 in tokens else int((tokens % 2 == 0).sum())


@pytest.fixture(scope="module")
def model() -> Any:
    return build_small_model()


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    found = torch.randint(1, 511, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    found[[7, 30, 31, 60]] = END
    return list(found.tolist())


@pytest.fixture
def stream(tokens: list[int], tmp_path: Path) -> TokenStream:
    shards, first = [], 0
    for number, length in enumerate(LENGTHS):
        part = torch.tensor(tokens[first : first + length]).numpy()
        shards.append(save_shard(tmp_path / "data" / f"val_{number}.npz", input_ids=part))
        first += length
    bucket = DirectoryBucket(tmp_path / "data")
    return TokenStream(ShardCache([(bucket, shards)], tmp_path / "cache", 512), shards)


def measure(model: Any, stream: TokenStream, windows: Any, **options: Any) -> dict[str, Any]:
    score = score_text(model, stream, windows, **{"batch_size": 3, **options})
    assert score is not None
    return score


def test_a_stride_gives_context(model: Any, stream: TokenStream, tokens: list[int]) -> None:
    seen: list[int] = []
    score = measure(model, stream, covering_windows(82, 16, 1), on_progress=seen.append)
    assert score["tokens"] == 81 == seen[-1]
    total = 0.0
    with torch.no_grad():
        for place in range(1, 82):
            ids = torch.tensor([tokens[max(0, place - 16) : place]])
            logits = model(input_ids=ids).logits[0, -1].double()
            total += float(logits.logsumexp(0) - logits[tokens[place]])
    assert score["loss"] == pytest.approx(total / 81, rel=1e-6)
    assert score["perplexity"] == pytest.approx(math.exp(total / 81), rel=1e-5)


def test_documents_apart_see_nothing_of_each_other(
    model: Any, stream: TokenStream, tokens: list[int]
) -> None:
    masked = measure(model, stream, covering_windows(82, 41), document_end=END)
    total = 0.0
    with torch.no_grad():
        for begin in (0, 41):
            for place in range(begin, begin + 41):
                # A document begins after an end, and each window begins one.
                ends = [i for i in range(begin, place) if tokens[i] == END]
                first = ends[-1] + 1 if ends else begin
                seen = torch.tensor([tokens[first : place + 1]])
                if place + 1 < 82:
                    logits = model(input_ids=seen).logits[0, -1].double()
                    total += float(logits.logsumexp(0) - logits[tokens[place + 1]])
    assert masked["loss"] == pytest.approx(total / 81, rel=1e-6)
    assert masked["loss"] != pytest.approx(
        measure(model, stream, covering_windows(82, 41))["loss"], 1e-4
    )


def test_bytes_are_those_of_the_predicted_tokens(
    model: Any, stream: TokenStream, tokens: list[int]
) -> None:
    counter: Any = OneByte()
    even = sum(token % 2 == 0 for token in tokens[1:])
    for stride in (16, 5):
        score = measure(model, stream, covering_windows(82, 16, stride), counter=counter)
        assert score["bytes"] == even
        assert score["bits_per_byte"] == pytest.approx(score["loss"] * 81 / math.log(2) / even)
    score = measure(model, stream, training_windows(82, 10, 3), counter=counter)
    wanted = [tokens[10 * sample + place] for sample in (1, 4, 6) for place in range(1, 10)]
    assert (score["tokens"], score["bytes"]) == (27, sum(token % 2 == 0 for token in wanted))
    assert measure(model, stream, covering_windows(82, 16))["bits_per_byte"] is None


def test_what_is_not_known_is_none(model: Any, stream: TokenStream) -> None:
    class Never:
        def count(self, before: int, tokens: Any) -> None:
            return None

    never: Any = Never()
    score = measure(model, stream, covering_windows(82, 16), counter=never)
    assert (score["bytes"], score["bits_per_byte"]) == (None, None)
    sure = build_small_model()
    with torch.no_grad():
        sure.get_output_embeddings().weight.mul_(1e5)
    assert measure(sure, stream, covering_windows(82, 16))["perplexity"] is None
    assert score_text(model, stream, [], batch_size=2) is None


@pytest.mark.parametrize("is_known", [True, False])
def test_scores_do_not_depend_on_how_logits_are_made(
    model: Any, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    monkeypatch.setattr(perplexity, "is_loss_chunked", lambda *_: is_known)
    monkeypatch.setattr(perplexity, "chunk_tokens", lambda *_: 3)
    ids = torch.randint(0, 512, (4, 9), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, dims=1)
    targets[1, 3] = targets[3, 8] = IGNORED
    with torch.no_grad():
        logs = model(input_ids=ids).logits.double().log_softmax(-1)
    wanted = targets != IGNORED
    expected = logs.gather(2, targets.clamp(min=0)[..., None])[..., 0][wanted]
    found = token_scores(model, ids, targets)
    assert len(found) == 34
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_memory_that_does_not_suffice_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(perplexity, "_score_logits", fail)
    with pytest.raises(ResourceShortageError, match="2 samples of 4 tokens: lower --batch-size"):
        token_scores(model, torch.ones(2, 4).long(), torch.ones(2, 4).long())


@pytest.mark.gpu
@pytest.mark.parametrize("document_end", [None, END])
def test_a_gpu_finds_what_a_cpu_finds(stream: TokenStream, document_end: int | None) -> None:
    windows = list(covering_windows(82, 16))
    wanted = measure(build_small_model(), stream, windows, document_end=document_end)
    found = measure(build_small_model().to("cuda"), stream, windows, document_end=document_end)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
