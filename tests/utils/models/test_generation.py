"""Texts of a model: the likeliest tokens where that is asked for, and no trace in the model."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from utils.base.errors import UsageError
from utils.models.generation import Sampling, StopWhen, generate_tokens

VOCAB, CONTEXT = 61, 24
PROMPT = [5, 17, 3, 44]
GREEDY = Sampling(max_tokens=12, temperature=0)


def build(kind: str = "neox", context: int = CONTEXT) -> Any:
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
    )

    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": context,
    }
    config: Any
    if kind == "neox":
        config = GPTNeoXConfig(**shape, intermediate_size=64, hidden_dropout=0.3)
    elif kind == "llama":
        config = LlamaConfig(**shape, intermediate_size=64, num_key_value_heads=1)
    else:
        config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=context)
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(config)
    return model.train()


@pytest.fixture(scope="module")
def neox() -> Any:
    return build()


def generate(model: Any, prompt: list[int], sampling: Sampling, **options: Any) -> list[int]:
    (tokens,) = generate_tokens(model, [prompt], sampling, **options)
    return tokens


@pytest.mark.parametrize("kind", ["neox", "llama", "gpt2"])
def test_greedy_texts_beside_each_other_are_the_likeliest_tokens_of_each(kind: str) -> None:
    model = build(kind).double()  # rounding chooses no token
    prompts = [PROMPT, [7], [9, 9, 9, 9, 9, 9]]
    found = generate_tokens(model, prompts, GREEDY)
    model.eval()
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
        assert len(tokens) == 12
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == tokens


def test_a_text_ends_where_the_context_is_full(neox: Any) -> None:
    assert len(generate(neox, PROMPT, Sampling(max_tokens=70))) == CONTEXT - len(PROMPT)
    with pytest.raises(UsageError, match="24 tokens leaves no room in the 24 tokens"):
        generate(neox, list(range(CONTEXT)), GREEDY)


def test_ids_that_pad_the_vocabulary_are_never_chosen() -> None:
    model = build()
    with torch.no_grad():  # the likeliest by far
        model.get_output_embeddings().weight[VOCAB - 1] = (
            100
            * model.get_output_embeddings().weight[
                generate(model, PROMPT, Sampling(1, temperature=0))[0]
            ]
        )
    assert VOCAB - 1 in generate(model, PROMPT, GREEDY)
    model.config.unpadded_vocab_size = VOCAB - 1
    assert VOCAB - 1 not in generate(model, PROMPT, GREEDY)
    assert VOCAB - 1 not in generate(model, PROMPT, Sampling(max_tokens=12))


def test_a_look_leaves_everything_as_it_was(neox: Any) -> None:
    neox.gpt_neox.layers[0].eval()  # a part in another mode than the rest
    modes = [module.training for module in neox.modules()]
    weights = {name: tensor.clone() for name, tensor in neox.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in neox.named_buffers()}
    defaults = neox.generation_config
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    generate(neox, PROMPT, Sampling(max_tokens=2 * CONTEXT, temperature=0.9, top_p=0.9))

    assert neox.generation_config is defaults
    assert [module.training for module in neox.modules()] == modes
    neox.train()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in neox.state_dict().items())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in neox.named_buffers())
    assert all(parameter.grad is None for parameter in neox.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_the_mode_comes_back_after_an_error(neox: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(neox, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(neox, PROMPT, GREEDY)
    assert neox.training


def test_a_compiled_model_is_not_compiled_for_a_text() -> None:
    model = build()

    def backend(*_: Any) -> Any:
        raise AssertionError("compiled")

    expected = generate(model, PROMPT, GREEDY)
    model.compile(backend=backend)
    assert generate(model, PROMPT, GREEDY) == expected


def test_a_text_ends_at_an_end_token_at_the_limit_and_when_asked(neox: Any) -> None:
    tokens = generate(neox, PROMPT, GREEDY)
    end = next(token for token in tokens if token != tokens[0])
    assert generate(neox, PROMPT, GREEDY, end_ids=(end,)) == tokens[: tokens.index(end)]
    assert generate(neox, PROMPT, Sampling(max_tokens=0)) == []
    asked: list[bool] = []

    def should_stop(ids: torch.Tensor) -> bool:
        assert ids.shape == (1, len(PROMPT) + len(asked) + 1)
        asked.append(len(asked) == 2)
        return asked[-1]

    assert generate(neox, PROMPT, GREEDY, stop_when=[StopWhen(should_stop)]) == tokens[:3]


@pytest.mark.parametrize("prompt", [[], [VOCAB], [-1]])
def test_a_prompt_that_the_model_cannot_read_is_an_error(neox: Any, prompt: list[int]) -> None:
    with pytest.raises(UsageError, match="prompt"):
        generate(neox, prompt, GREEDY)


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": 2**64},
        {"repetition_penalty": 0.0},
    ],
)
def test_a_value_out_of_range_is_an_error(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(values))} must be"):
        Sampling(**values)
