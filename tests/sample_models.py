"""Very small models of several families, as a `config.json` would describe them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 512,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 64,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {"model_type": "llama", **_SIZES, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_SIZES},
    "olmo2": {"model_type": "olmo2", **_SIZES, "pad_token_id": 1},
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 16},
}


def write_model(folder: Path, family: str, **values: Any) -> str:
    """Write the file of a family, with other values; return its path."""
    path = folder / f"{family}.json"
    path.write_text(json.dumps({**FAMILIES[family], **values}), "utf-8")
    return str(path)
