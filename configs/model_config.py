"""Named model presets -> transformers config objects.

A preset is a model type of transformers and the values that make its shape; everything else keeps
that type's defaults. transformers is imported only when a config object is built.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelPreset:
    """A model type and its shape.

    Attributes:
        model_type: `model_type` of the transformers config class.
        values: Keyword arguments of that class.
        parameters: Number of parameters with embeddings, for its own vocabulary.
    """

    model_type: str
    values: Mapping[str, Any]
    parameters: int


def _pythia(
    hidden: int, layers: int, heads: int, parameters: int, vocab_size: int = 50304
) -> ModelPreset:
    """Return a shape of Pythia (Biderman et al. 2023, table 1, and the models' `config.json`)."""
    return ModelPreset(
        "gpt_neox",
        {
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        parameters,
    )


PRESETS: dict[str, ModelPreset] = {
    # Of the two layer counts that circulate for "1.2B" (24 and 16), 24 gives 1.21e9 parameters
    # without embeddings.
    "refocused-1.2b": ModelPreset(
        "gpt_neox",
        {
            "vocab_size": 50257,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 8192,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        parameters=1_414_455_296,
    ),
    "neox-tiny": ModelPreset(
        "gpt_neox",
        {
            "vocab_size": 4096,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "max_position_embeddings": 512,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        parameters=5_256_704,
    ),
    "pythia-14m": _pythia(128, 6, 4, 14_067_712),
    "pythia-31m": _pythia(256, 6, 8, 30_494_720),
    "pythia-70m": _pythia(512, 6, 8, 70_426_624),
    "pythia-160m": _pythia(768, 12, 12, 162_322_944),
    "pythia-410m": _pythia(1024, 24, 16, 405_334_016),
    "pythia-1b": _pythia(2048, 16, 8, 1_011_781_632),
    "pythia-1.4b": _pythia(2048, 24, 16, 1_414_647_808),
    "pythia-2.8b": _pythia(2560, 32, 32, 2_775_208_960),
    "pythia-6.9b": _pythia(4096, 32, 32, 6_857_302_016, 50432),
    "pythia-12b": _pythia(5120, 36, 40, 11_846_072_320, 50688),
    # Black et al. 2022, table 1: the same kind of layers.
    "gpt-neox-20b": _pythia(6144, 44, 64, 20_554_567_680, 50432),
}

UNPADDED_KEY = "unpadded_vocab_size"
"""In the config of a model whose vocabulary is padded: the number of ids that mean something."""

PLAIN_HEADS = ("gpt2", "gpt_neox", "llama", "mistral", "olmo2", "qwen2", "qwen3")
"""Model types whose logits are `last_hidden_state @ output weights`, and nothing more."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
"""Keys of a model config that are counts; transformers itself lets 0 and less pass."""


def get_preset(name: str) -> ModelPreset:
    """Return the preset of a name.

    Raises:
        ConfigError: There is none; the message lists the known ones.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"model {name!r} is no known preset ({', '.join(PRESETS)}).{hint}")


def is_loss_chunked(model_type: str, loss_implementation: str) -> bool:
    """Tell whether a run of `loss_implementation` has the logits of a chunk of tokens only."""
    if loss_implementation == "auto":
        return model_type in PLAIN_HEADS
    return loss_implementation == "chunked"


def known_vocab_size(model_config: Any) -> int:
    """Return how many token ids mean something; those above only pad the vocabulary."""
    size: int = getattr(model_config, UNPADDED_KEY, None) or model_config.vocab_size
    return size


def build_model_config(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    sequence_length: int | None = None,
    pad_vocab_to_multiple_of: int | None = None,
) -> PretrainedConfig:
    """Return the transformers config of a preset.

    Args:
        name: A key of `PRESETS`.
        overrides: Values that replace the preset's.
        sequence_length: Tokens in a sample; must fit the model's positions.
        pad_vocab_to_multiple_of: Round the size of the vocabulary up; the config then also has
            `unpadded_vocab_size`.

    Raises:
        ConfigError: An unknown preset or key, or values that do not fit each other.
    """
    preset = get_preset(name)
    from transformers import AutoConfig

    values = {**preset.values, **(overrides or {})}
    known = AutoConfig.for_model(preset.model_type).to_dict().keys() | preset.values.keys()
    for key in overrides or {}:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"model_overrides.{key} is no key of {preset.model_type}.{hint}")
    for key in SIZES:
        if isinstance(values.get(key), int) and values[key] < 1:
            raise ConfigError(f"model_overrides.{key} must be at least 1, got {values[key]}.")
    try:
        config: PretrainedConfig = AutoConfig.for_model(preset.model_type, **values)
        config.use_cache = True
    except Exception as exc:  # strict dataclasses of transformers raise their own family
        raise ConfigError(f"model_overrides do not fit {name}: {_first_line(exc)}") from exc
    positions = getattr(config, "max_position_embeddings", None)
    if sequence_length and positions and sequence_length > positions:
        raise ConfigError(
            f"sequence_length {sequence_length} is above the {positions} positions of {name}. "
            f"Lower it, or set model_overrides.max_position_embeddings={sequence_length}."
        )
    if pad_vocab_to_multiple_of:
        _pad_vocabulary(config, pad_vocab_to_multiple_of)
    return config


def _pad_vocabulary(config: PretrainedConfig, multiple: int) -> None:
    size = config.vocab_size
    padded = -(-size // multiple) * multiple
    if padded != size:
        config.vocab_size = padded
        setattr(config, UNPADDED_KEY, size)


def _first_line(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(exc).__name__
