"""Models that look ahead, or across documents, are found out; those that do not are let pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.model_config import build_model_config
from tests.sample_models import FAMILIES, write_model
from utils.base.errors import ConfigError
from utils.models.check import require_language_model

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 128}


def built(tmp_path: Path, model_type: str, **values: Any) -> Any:
    sizes = {**SHAPE, "num_hidden_layers": 2, "max_position_embeddings": 64}
    FAMILIES[model_type] = FAMILIES.get(model_type, {"model_type": model_type, **sizes})
    return build_model_config(write_model(tmp_path, model_type, **values))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_decoders_that_keep_documents_apart_pass(tmp_path: Path, model_type: str) -> None:
    before = torch.get_rng_state()
    config = built(tmp_path, model_type)
    values = config.to_dict()
    require_language_model(config, mask_documents=True)
    require_language_model(config, attention="eager")
    assert torch.equal(torch.get_rng_state(), before)
    assert config.to_dict() == values


def test_a_model_that_sees_the_next_token_is_refused_and_its_decoder_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"This bert is no causal .*is_decoder=true"):
        require_language_model(built(tmp_path, "bert"))
    require_language_model(built(tmp_path, "bert", is_decoder=True))


def test_a_model_without_notice_of_position_ids_cannot_mask_documents(tmp_path: Path) -> None:
    config = built(tmp_path, "opt", ffn_dim=64, word_embed_proj_dim=32)
    require_language_model(config)
    with pytest.raises(ConfigError, match="mask_documents: a opt attends across documents"):
        require_language_model(config, mask_documents=True)


def test_what_cannot_run_is_one_clear_line(tmp_path: Path) -> None:
    gpt_oss = built(tmp_path, "gpt_oss", num_key_value_heads=2, head_dim=8, num_local_experts=4)
    with pytest.raises(
        ConfigError, match=r"gpt_oss .* has only attn_implementation=eager for it\."
    ):
        require_language_model(gpt_oss)
    require_language_model(gpt_oss, attention="eager")
    config = built(tmp_path, "llama")
    config.rms_norm_eps = float("nan")
    with pytest.raises(ConfigError, match="no finite numbers"):
        require_language_model(config)
    config.hidden_act = "nonsense"
    with pytest.raises(ConfigError, match=r"A llama of these values cannot be trained: .*nonsense"):
        require_language_model(config)


def test_an_output_projection_of_zeros_hides_no_look_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertLMHeadModel

    draw = BertLMHeadModel.init_weights

    def with_zeros(self: Any) -> None:
        draw(self)
        for name, parameter in self.named_parameters():
            if name.endswith("attention.output.dense.weight"):
                torch.nn.init.zeros_(parameter)

    monkeypatch.setattr(BertLMHeadModel, "init_weights", with_zeros)
    with pytest.raises(ConfigError, match="no causal language model"):
        require_language_model(built(tmp_path, "bert"))
