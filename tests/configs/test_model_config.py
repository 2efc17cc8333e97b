"""The presets are the models that their names promise, to the parameter."""

from __future__ import annotations

from typing import Any

import pytest

from configs.model_config import build_model_config, get_preset
from configs.model_presets import PRESETS
from utils.base.errors import ConfigError
from utils.models.building import count_parameters


@pytest.mark.parametrize(
    ("name", "model_type", "shape", "total"),
    [  # layers, width, heads, inner width, ids, positions
        ("refocused-1.2b", "gpt_neox", (24, 2048, 16, 8192, 50257, 2048), 1_414_455_296),
        ("neox-tiny", "gpt_neox", (4, 256, 4, 1024, 4096, 512), 5_256_704),
        ("pythia-160m", "gpt_neox", (12, 768, 12, 3072, 50304, 2048), 162_322_944),
        ("gpt2", "gpt2", (12, 768, 12, 3072, 50257, 1024), 124_439_808),
        ("llama-138m", "llama", (12, 768, 12, 3072, 32000, 1024), 137_841_408),
        ("llama-350m", "llama", (24, 1024, 16, 4096, 32000, 1024), 435_471_360),
        ("llama-700m", "llama", (32, 1280, 20, 5120, 32000, 1024), 879_904_000),
        ("tinystories", "llama", (6, 512, 8, 1344, 10000, 1024), 28_924_416),
        ("nano-xs", "gpt_neox", (4, 96, 4, 384, 1500, 256), 735_552),
        ("nano-s", "gpt_neox", (6, 128, 4, 512, 1500, 256), 1_573_888),
        ("nano-ds", "gpt_neox", (12, 128, 4, 512, 1500, 256), 2_763_520),
        ("nano-m", "gpt_neox", (6, 192, 6, 768, 1500, 256), 3_245_568),
        ("nano-l", "gpt_neox", (6, 240, 6, 960, 1500, 256), 4_886_400),
    ],
)
def test_a_preset_has_its_shape_and_exactly_its_parameters(
    name: str, model_type: str, shape: tuple[int, ...], total: int
) -> None:
    config = build_model_config(name)
    inner = config.n_inner if model_type == "gpt2" else config.intermediate_size
    assert config.model_type == model_type
    assert shape == (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        inner,
        config.vocab_size,
        config.max_position_embeddings,
    )
    assert count_parameters(config).total == PRESETS[name].parameters == total


def test_every_preset_has_as_many_parameters_as_it_says() -> None:
    for name, preset in PRESETS.items():
        assert count_parameters(build_model_config(name)).total == preset.parameters, name


def test_refocused_is_the_1_2_billion_of_its_name_without_embeddings() -> None:
    config = build_model_config("refocused-1.2b")
    assert count_parameters(config).without_embedding == 1_208_602_624
    assert config.use_parallel_residual is True
    assert config.tie_word_embeddings is False
    assert config.rope_parameters["partial_rotary_factor"] == 0.25


def test_an_override_replaces_one_value_and_leaves_the_preset_alone() -> None:
    config = build_model_config("neox-tiny", {"num_hidden_layers": 2})
    assert (config.num_hidden_layers, config.hidden_size) == (2, 256)
    assert build_model_config("neox-tiny").num_hidden_layers == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"hidden_sizes": 8},
            "model_overrides.hidden_sizes is not a key of gpt_neox. Did you mean",
        ),
        ({"qqq": 8}, "model_overrides.qqq is not a key of gpt_neox."),
        (
            {"hidden_size": "256"},
            '^model_overrides do not fit neox-tiny: hidden_size must be a whole number, got "256".',
        ),
        (
            {"rope_parameters": 5},
            "do not fit neox-tiny: rope_parameters must be an object or null, got 5.$",
        ),
        ({"hidden_size": 250}, "^model_overrides do not fit neox-tiny: The hidden size is not div"),
        (
            {"max_position_embeddings": None},
            "max_position_embeddings must be a whole number, got n",
        ),
        ({"vocab_size": 0}, r"model_overrides\.vocab_size must be at least 1, got 0\."),
        ({"hidden_size": 0}, r"model_overrides\.hidden_size must be at least 1, got 0\."),
        ({"num_attention_heads": 0}, r"num_attention_heads must be at least 1, got 0\."),
        ({"model_type": "llama"}, "model_overrides.model_type is not a key of gpt_neox"),
    ],
)
def test_an_override_that_cannot_be_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model_config("neox-tiny", overrides)


def test_a_word_that_transformers_does_not_know_is_named_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r": transformers knows no hidden_act 'reluu'\.$"):
        count_parameters(build_model_config("neox-tiny", {"hidden_act": "reluu"}))


def test_an_unknown_preset_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"'neox-tinny'.*Did you mean neox-tiny\?"):
        get_preset("neox-tinny")
    with pytest.raises(ConfigError, match=r"refocused-1\.2b, neox-tiny"):
        build_model_config("zzz")


def test_a_sequence_must_fit_the_positions_of_the_model() -> None:
    assert build_model_config("neox-tiny", sequence_length=512).max_position_embeddings == 512
    with pytest.raises(ConfigError, match=r"513 is above the 512 .*max_position_embeddings=513"):
        build_model_config("neox-tiny", sequence_length=513)
    longer = build_model_config("neox-tiny", {"max_position_embeddings": 1024}, 513)
    assert longer.max_position_embeddings == 1024
