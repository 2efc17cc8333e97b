"""A model of a JSON file: what it says is taken, what it may not say is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from configs.model_config import (
    build_model_config,
    find_dropouts,
    find_model_changes,
    known_vocab_size,
    with_older_keys,
)
from tests.sample_models import FAMILIES
from utils.base.errors import ConfigError
from utils.models.building import build_core, count_parameters

LLAMA = {**FAMILIES["mistral"], "model_type": "llama"}
GPT2 = {key: value for key, value in FAMILIES["gpt2"].items() if not key.endswith("pdrop")}
ROTARY = ("rotary_pct", "rotary_emb_base", "rope_theta", "partial_rotary_factor", "rope_scaling")


def write(folder: Path, values: Any, name: str = "config.json") -> str:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values), "utf-8")
    return str(path)


@pytest.mark.parametrize("values", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_saved_config_comes_back_as_it_was(tmp_path: Path, values: dict[str, Any]) -> None:
    config = build_model_config(write(tmp_path, values))
    config.save_pretrained(tmp_path)
    again = build_model_config(str(tmp_path / "config.json"))
    assert again.to_dict() == config.to_dict()
    assert (again.hidden_size, again.num_hidden_layers, again.vocab_size) == (32, 2, 512)
    assert find_model_changes(json.loads((tmp_path / "config.json").read_text()), again) == {}


def test_a_padded_vocabulary_comes_back_with_what_it_pads(tmp_path: Path) -> None:
    build_model_config(write(tmp_path, LLAMA), {}, None, 100).save_pretrained(tmp_path)
    for multiple, padded in ((None, 600), (100, 600), (1000, 1000)):
        again = build_model_config(str(tmp_path / "config.json"), {}, None, multiple)
        assert (again.vocab_size, known_vocab_size(again)) == (padded, 512)


SCALING = {"rope_type": "linear", "factor": 4.0}
NEOX = {**FAMILIES["mistral"], "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 5e4}
del NEOX["num_key_value_heads"]


@pytest.mark.parametrize(
    ("values", "older"),
    [
        (NEOX, {"rotary_pct": 0.5, "rotary_emb_base": 5e4}),
        ({**LLAMA, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            {**LLAMA, "rope_theta": 5e5, "rope_scaling": SCALING},
            {"rope_theta": 5e5, "rope_scaling": SCALING},
        ),
        (GPT2, {}),
    ],
    ids=["gpt_neox", "llama", "scaled", "gpt2"],
)
def test_a_written_config_says_rotary_embeddings_in_the_words_of_both_generations(
    tmp_path: Path, values: dict[str, Any], older: dict[str, Any]
) -> None:
    config = build_model_config(write(tmp_path, values))
    written = with_older_keys(json.loads(config.to_json_string()))
    assert {key: value for key, value in written.items() if key in ROTARY} == older
    again = build_model_config(write(tmp_path, written))
    assert again.to_dict() == config.to_dict()
    assert find_model_changes(written, again) == {}
    if older:  # an override wins over both
        other = build_model_config(str(tmp_path / "config.json"), {"rope_theta": 123.0})
        assert other.rope_parameters["rope_theta"] == 123.0


def test_what_a_file_says_of_a_saved_model_leaves_a_float32_training_alone(tmp_path: Path) -> None:
    import torch

    plain = build_model_config(write(tmp_path, LLAMA))
    saved = {
        "torch_dtype": "bfloat16",
        "dtype": "float16",
        "_name_or_path": "/etc/x",
        "architectures": ["Nonsense"],
        "transformers_version": "99.0",
        "use_cache": False,
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "pad_token_id": 7,
        "_attn_implementation": "eager",
        "id2label": {"0": "a"},
    }
    config = build_model_config(write(tmp_path, {**LLAMA, **saved}))
    assert config.to_dict() == plain.to_dict()
    model = build_core(config, "sdpa")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # The row of a padding id would have no gradient.
    assert model.get_input_embeddings().padding_idx is None


def test_overrides_win_whatever_name_a_size_has(tmp_path: Path) -> None:
    path = write(tmp_path, GPT2)
    common = build_model_config(path, {"hidden_size": 64, "num_hidden_layers": 1})
    own = build_model_config(path, {"n_embd": 64, "n_layer": 1})
    assert common.to_dict() == own.to_dict()
    assert (common.n_embd, common.n_layer, common.n_inner) == (64, 1, 64)
    assert build_model_config(path, {"intermediate_size": 96}).n_inner == 96
    assert build_model_config(path, sequence_length=64).n_positions == 64
    with pytest.raises(ConfigError, match="sequence_length 65 is above the 64 positions"):
        build_model_config(path, sequence_length=65)
    rope = write(
        tmp_path, {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    )
    assert build_model_config(rope, {"rope_theta": 5e5}).rope_parameters["rope_theta"] == 5e5
    older = write(tmp_path, {**LLAMA, "rope_theta": 1e6, "rope_scaling": None})
    assert build_model_config(older).rope_parameters["rope_theta"] == 1e6


def test_ids_that_a_smaller_vocabulary_does_not_have_are_none(tmp_path: Path) -> None:
    config = build_model_config(write(tmp_path, GPT2))
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    assert build_model_config("gpt2").eos_token_id == 50256


def test_keys_that_nothing_knows_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {**LLAMA, "hiden_size": 8, "to_dict": "x", "\x1b[31mred": 1}
    with caplog.at_level(logging.WARNING):
        config = build_model_config(write(tmp_path, values))
    assert "?[31mred, hiden_size, to_dict are not keys of llama and left out" in caplog.text
    assert config.to_dict()["hidden_size"] == 32
    assert not hasattr(config, "hiden_size")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("", "not valid JSON"),
        ("[1, 2]", "it holds no JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "NaN is no finite number"),
        ('{"model_type": "llama", "rms_norm_eps": 1e999}', "1e999 is no finite number"),
        ('{"hidden_size": 8}', "has no model_type"),
        ('{"model_type": "lama"}', r"lama is no causal .* Did you mean llama\?"),
        ('{"model_type": "\\u001b[2Jx"}', r"model_type \?\[2Jx is no causal language model"),
        ('{"model_type": "t5"}', "t5 is no causal language model"),
        ({**LLAMA, "auto_map": {"AutoConfig": "evil.Config"}}, "auto_map.*never run"),
        ({**LLAMA, "model_type": "gemma3"}, "Only models of text alone"),
        ({**LLAMA, "hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000"),
        ({**LLAMA, "vocab_size": 10**30}, "vocab_size must be at most"),
        ({**LLAMA, "num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
        ({**LLAMA, "hidden_size": "32"}, "do not fit each other .*hidden_size"),
        ({**GPT2, "n_embd": -1}, "n_embd must be at least 1, got -1"),
        ({**GPT2, "hidden_size": 64}, "hidden_size and n_embd mean the same and have two values"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, values: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        build_model_config(write(tmp_path, values))
    assert "config.json" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    import os

    with pytest.raises(
        ConfigError, match=r"cannot be read: No such file.*config\.json of its newest"
    ):
        build_model_config(str(tmp_path / "none.json"))
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match="no regular file"):
        build_model_config(str(tmp_path / "pipe.json"))
    (tmp_path / "large.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ConfigError, match="the limit is"):
        build_model_config(str(tmp_path / "large.json"))
    (tmp_path / "bytes.json").write_bytes(b'{"model_type": "\xff\xfe"}')
    with pytest.raises(ConfigError, match="not valid JSON"):
        build_model_config(str(tmp_path / "bytes.json"))


def test_changes_of_a_model_are_named_and_versions_are_none(tmp_path: Path) -> None:
    config = build_model_config(write(tmp_path, GPT2), pad_vocab_to_multiple_of=100)
    saved = json.loads(config.to_json_string(use_diff=False))
    older = {k: v for k, v in saved.items() if k not in ("reorder_and_upcast_attn", "n_inner")}
    assert find_model_changes({**older, "n_inner": 64, "transformers_version": "4"}, config) == {}
    for found, changes in (
        ({**saved, "n_layer": 3, "eos_token_id": 5}, {"n_layer": "3 -> 2"}),
        ({**saved, "unpadded_vocab_size": None}, {"unpadded_vocab_size": "null -> 512"}),
        (LLAMA, {"model_type": "llama -> gpt2"}),
        ({"model_type": "\x1b[2J"}, {"model_type": "?[2J -> gpt2"}),
    ):
        assert find_model_changes(found, config) == changes
    for damaged in ({**saved, "n_layer": "x"}, {**saved, "n_layer": 10**9}, [], None):
        assert find_model_changes(damaged, config) is None


def test_dropout_is_found_by_any_name_and_no_preset_has_it(tmp_path: Path) -> None:
    from configs.model_presets import PRESETS

    found = find_dropouts(build_model_config(write(tmp_path, GPT2)))
    assert found == {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    overrides = {"attention_dropout": 0.2}
    assert find_dropouts(build_model_config("neox-tiny", overrides)) == overrides
    assert [name for name in PRESETS if find_dropouts(build_model_config(name))] == []


def test_parameters_are_counted_of_any_family(tmp_path: Path) -> None:
    counts = count_parameters(build_model_config(write(tmp_path, LLAMA)))
    layer = 32 * (2 * 32 + 2 * 16 + 3 * 64) + 2 * 32
    assert (counts.total, counts.embedding) == (2 * layer + 32 + 2 * 512 * 32, 2 * 512 * 32)
