"""Named model shapes: values only.

A preset is a model type of transformers and the values that make its shape; everything else keeps
that type's defaults. Sizes have the names that most types use (`hidden_size`, ...), also for types
with names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelPreset:
    """A model type and its shape.

    `values` are keyword arguments of the transformers config class. `parameters` counts embeddings
    too, for its own vocabulary.
    """

    model_type: str
    values: Mapping[str, Any]
    parameters: int


def _neox(
    hidden: int,
    layers: int,
    heads: int,
    parameters: int,
    vocab_size: int = 50304,
    positions: int = 2048,
) -> ModelPreset:
    """Return a GPT-NeoX as Pythia has it (Biderman et al. 2023, table 1, and `config.json`)."""
    return ModelPreset(
        "gpt_neox",
        {
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
            "max_position_embeddings": positions,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        parameters,
    )


def _llama(
    hidden: int, layers: int, heads: int, intermediate: int, parameters: int, **values: Any
) -> ModelPreset:
    """Return a shape with RoPE, RMSNorm and SwiGLU, 32000 ids and 1024 positions."""
    return ModelPreset(
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            **values,
        },
        parameters,
    )


PRESETS: dict[str, ModelPreset] = {
    # Of the two layer counts that circulate for "1.2B" (24 and 16), 24 gives 1.21e9 parameters
    # without embeddings.
    "refocused-1.2b": _neox(2048, 24, 16, 1_414_455_296, 50257),
    "neox-tiny": _neox(256, 4, 4, 5_256_704, 4096, 512),
    "pythia-14m": _neox(128, 6, 4, 14_067_712),
    "pythia-31m": _neox(256, 6, 8, 30_494_720),
    "pythia-70m": _neox(512, 6, 8, 70_426_624),
    "pythia-160m": _neox(768, 12, 12, 162_322_944),
    "pythia-410m": _neox(1024, 24, 16, 405_334_016),
    "pythia-1b": _neox(2048, 16, 8, 1_011_781_632),
    "pythia-1.4b": _neox(2048, 24, 16, 1_414_647_808),
    "pythia-2.8b": _neox(2560, 32, 32, 2_775_208_960),
    "pythia-6.9b": _neox(4096, 32, 32, 6_857_302_016, 50432),
    "pythia-12b": _neox(5120, 36, 40, 11_846_072_320, 50688),
    # Black et al. 2022, table 1: the same kind of layers.
    "gpt-neox-20b": _neox(6144, 44, 64, 20_554_567_680, 50432),
    # Radford et al. 2019. Dropout is 0 where the model type has 0.1: a pre-training sees a token a
    # few times at most. gelu_pytorch_tanh is the same function as its gelu_new, as one kernel that
    # keeps one tensor for the backward pass and not five.
    "gpt2": ModelPreset(
        "gpt2",
        {
            "vocab_size": 50257,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 1024,
            "activation_function": "gelu_pytorch_tanh",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": True,
        },
        parameters=124_439_808,
    ),
    # Widths, layers and a feed-forward layer of 4 times the width, as they go with these names.
    # Tied embeddings, because they come nearest: 138M is met; with three matrices of that width the
    # two others have 435M and 880M parameters. 20 and 24 heads would not divide 1024 and 1280.
    "llama-138m": _llama(768, 12, 12, 3072, 137_841_408),
    "llama-350m": _llama(1024, 24, 16, 4096, 435_471_360),
    "llama-700m": _llama(1280, 32, 20, 5120, 879_904_000),
    # For TinyStories (Eldan and Li 2023) with 10000 ids. 1344 is 8/3 of the width, rounded down to
    # a multiple of 64; the output layer has weights of its own.
    "tinystories": _llama(512, 6, 8, 1344, 28_924_416, vocab_size=10000, tie_word_embeddings=False),
    # Near 746K, 1.6M, 2.8M and 4.8M parameters ("m" lies between its neighbours), for a laptop
    # and a BPE vocabulary of 1500 ids.
    "nano-xs": _neox(96, 4, 4, 735_552, 1500, 256),
    "nano-s": _neox(128, 6, 4, 1_573_888, 1500, 256),
    "nano-ds": _neox(128, 12, 4, 2_763_520, 1500, 256),
    "nano-m": _neox(192, 6, 6, 3_245_568, 1500, 256),
    "nano-l": _neox(240, 6, 6, 4_886_400, 1500, 256),
}
