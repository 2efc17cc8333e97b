"""Texts that grow together: what transformers itself makes, and each as it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.utils.models.test_generation import CONTEXT, VOCAB, build
from utils.base.errors import UsageError
from utils.models.generation import Batch, GrowingText, evaluating, generate
from utils.models.token_choice import Sampling, choose_token, penalize

PROMPTS = [[5, 17, 3, 44], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [33, 21]]
KINDS = ["neox", "llama", "gpt2"]
GREEDY = Sampling(max_tokens=10, temperature=0)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: build(kind) for kind in KINDS}


def grow(model: Any, rows: list[GrowingText], end_ids: tuple[int, ...] = ()) -> list[list[int]]:
    batch = Batch(model, rows, end_ids)
    with evaluating(model):
        while batch.is_growing:
            assert batch.step() or not batch.is_growing
    return [row.tokens for row in rows]


def by_transformers(
    model: Any, prompts: list[list[int]], number: int, end: int | None = None, **options: Any
) -> list[list[int]]:
    """Return what `generate` of transformers makes greedily of prompts, filled up on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with evaluating(model):
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=number,
            eos_token_id=end,
            pad_token_id=0,
            bos_token_id=None,
            **options,
        )
    texts = [row[longest:] for row in output.tolist()]
    return [t[: t.index(end)] if end in t else t for t in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_what_transformers_makes(kind: str, models: dict[str, Any]) -> None:
    model = models[kind]
    together = by_transformers(model, PROMPTS, 10)
    assert grow(model, [GrowingText(prompt, GREEDY) for prompt in PROMPTS]) == together
    end = together[0][3]
    for prompts in (PROMPTS, *([prompt] for prompt in PROMPTS)):
        expected = by_transformers(model, prompts, 10, end)
        rows = [GrowingText(prompt, GREEDY) for prompt in prompts]
        assert grow(model, rows, (end,)) == expected
        finishes = ["max_tokens" if len(tokens) == 10 else "end_token" for tokens in expected]
        assert [row.finish for row in rows] == finishes
    assert generate(model, PROMPTS[0], GREEDY) == together[0]


def test_repetition_is_penalized_as_transformers_does(models: dict[str, Any]) -> None:
    rows = [GrowingText(p, Sampling(10, temperature=0, repetition_penalty=1.7)) for p in PROMPTS]
    plain = by_transformers(models["neox"], PROMPTS, 10)
    expected = by_transformers(models["neox"], PROMPTS, 10, repetition_penalty=1.7)
    assert grow(models["neox"], rows) == expected != plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_a_text_whoever_is_beside_it(kind: str, models: dict[str, Any]) -> None:
    samplings = [Sampling(n, 0.9, top_p=0.95, seed=n) for n in (12, 3, 20, 70)]
    rows = [GrowingText(p, sampling) for p, sampling in zip(PROMPTS, samplings, strict=True)]
    alone = [generate(models[kind], row.prompt, row.sampling) for row in rows]
    # The last one is left alone when the others have ended, and its context is full twice.
    assert [len(tokens) for tokens in alone] == [12, 3, 20, 70]
    assert CONTEXT < 70
    assert grow(models[kind], rows) == alone


def test_texts_whose_context_is_full_go_on_beside_others(models: dict[str, Any]) -> None:
    long = [number % VOCAB for number in range(3 * CONTEXT)]
    prompts = [*PROMPTS, long, long[:CONTEXT]]
    sampling = Sampling(2 * CONTEXT, temperature=0)
    alone = [generate(models["neox"], prompt, sampling) for prompt in prompts]
    assert grow(models["neox"], [GrowingText(prompt, sampling) for prompt in prompts]) == alone


def test_a_row_leaves_when_its_caller_says_so(models: dict[str, Any]) -> None:
    model = models["neox"]
    rows = [GrowingText(prompt, GREEDY) for prompt in PROMPTS]
    batch = Batch(model, rows)
    with evaluating(model):
        batch.step()
        rows[2].finish = "enough"
        while batch.is_growing:
            assert rows[2] not in batch.step()
    expected = by_transformers(model, PROMPTS, 10)
    expected[2] = expected[2][:1]
    assert [row.tokens for row in rows] == expected
    assert batch.step() == []


def test_ids_that_pad_the_vocabulary_are_never_chosen() -> None:
    model = build()
    model.config.unpadded_vocab_size = VOCAB - 21
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB - 21 :] = 0
        model.get_output_embeddings().weight[: VOCAB - 21] *= 0.001
    samplings = [Sampling(30, temperature=t, seed=4) for t in (0, 1, 5)]
    prompts = [[1, 2], [3], [4, 5, 6]]
    rows = [GrowingText(p, s) for p, s in zip(prompts, samplings, strict=True)]
    texts = grow(model, rows)
    assert all(token < VOCAB - 21 for text in texts for token in text)
    with pytest.raises(UsageError, match=f"vocabulary of {VOCAB - 21}"):
        Batch(model, [GrowingText([1], GREEDY), GrowingText([VOCAB - 21], GREEDY)])


def test_a_row_without_finite_logits_ends_and_the_others_go_on() -> None:
    model = build()
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[7] = float("nan")
    rows = [
        GrowingText(p, s) for p in ([1, 2], [7], [3, 4, 5]) for s in (GREEDY, Sampling(4, seed=1))
    ]
    texts = grow(model, rows)
    assert [row.finish for row in rows[2:4]] == ["not_finite"] * 2
    assert texts[2:4] == [[], []]
    assert texts[0] == generate(model, [1, 2], GREEDY)


def test_equal_logits_keep_their_order() -> None:
    generator = torch.Generator()
    logits = torch.zeros(4096)
    logits[100:] = -1
    logits[7], logits[9] = 3.0, -float("inf")
    for seed in range(200):
        sampling = Sampling(top_k=seed % 50 + 1, temperature=1.3)
        shifted = (logits - logits.max()).double()
        ordered, tokens = torch.sort(shifted, descending=True, stable=True)
        weights = torch.softmax(ordered / 1.3, dim=0)
        weights[seed % 50 + 1 :] = 0
        expected = tokens[torch.multinomial(weights, 1, generator=generator.manual_seed(seed))]
        assert choose_token(logits, sampling, generator.manual_seed(seed)) == int(expected)


def test_a_penalty_makes_known_tokens_less_likely() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.0])
    penalize(logits, [1, 0, 1], 2.0)
    assert logits.tolist() == [1.0, -4.0, 1.0, 0.0]


@pytest.mark.parametrize("values", [{"seed": 2**64}, {"repetition_penalty": 0.0}])
def test_a_value_out_of_range_is_an_error(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(values))} must be"):
        Sampling(**values)
