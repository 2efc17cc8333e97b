"""Whether a model of any family can be pre-trained here: tried on a small one of its kind.

    transformers config -> two layers, a small vocabulary -> what depends on what

A type's name says little: BERT has a "language model" class that looks at the next token unless
told not to, and some models ignore position ids. So a small model is tried, which takes a moment.
No random state is touched.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from configs.model_config import DATA_KEYS
from utils.base.errors import ConfigError, first_line
from utils.models.building import build_core, find_layers, with_layers

TRIED_LAYERS = 2
TRIED_VOCABULARY = 64
TRIED_TOKENS = 16
HALF = TRIED_TOKENS // 2
TOLERANCE = 1e-4  # of the largest logit
WEIGHT_DEVIATION = 0.02

log = logging.getLogger(__name__)


def require_language_model(
    model_config: Any, *, attention: str = "sdpa", mask_documents: bool = False
) -> None:
    """Refuse a model that sees the token it is to predict, or that cannot be trained at all.

    Kernels that want a GPU are stood in for by sdpa. With `mask_documents`, its attention must not
    cross documents.

    Raises:
        ConfigError: It is such a model; or one that crosses documents.
    """
    name = model_config.model_type
    try:
        model = _small_model(model_config, "eager" if attention == "eager" else "sdpa")
        one, other = (_logits(model, _tokens(place)) for place in (None, HALF))
    except Exception as exc:  # whatever a family of models does with values it was not made for
        reason = first_line(exc)
        if "scaled_dot_product_attention" in reason:
            reason = "transformers has only attn_implementation=eager for it."
        raise ConfigError(f"A {name} of these values cannot be trained: {reason}") from exc
    if not find_layers(model):
        raise ConfigError(f"A {name} cannot be trained here: its layers cannot be told apart.")
    if not torch.isfinite(one).all():
        raise ConfigError(f"A {name} of these values gives no finite numbers.")
    if _differ(one[:HALF], other[:HALF]):
        raise ConfigError(
            f"This {name} is no causal language model: what it predicts depends on later tokens. "
            "For a decoder set model_overrides.is_decoder=true where it has that key."
        )
    if mask_documents:
        _require_separate_documents(model, name)


def _require_separate_documents(model: Any, name: str) -> None:
    """Refuse a model that does not begin a new document where position ids begin anew."""
    positions = torch.arange(TRIED_TOKENS).remainder(HALF).unsqueeze(0)
    try:
        one, other = (
            _logits(model, _tokens(place), position_ids=positions) for place in (None, HALF // 2)
        )
    except Exception as exc:  # a forward without position_ids
        raise ConfigError(f"mask_documents: a {name} takes no position ids.") from exc
    if _differ(one[HALF:], other[HALF:]):
        raise ConfigError(f"mask_documents: a {name} attends across documents all the same.")


def _small_model(model_config: Any, attention: str) -> Any:
    """Return a model of two layers; of all of them where a type's layers are not counted so."""
    with torch.random.fork_rng([]):
        try:
            small = with_layers(model_config, min(TRIED_LAYERS, model_config.num_hidden_layers))
            small.vocab_size = min(TRIED_VOCABULARY, model_config.vocab_size)
            for key in DATA_KEYS:
                setattr(small, key, None)
            model = build_core(small, attention)
        except Exception:  # any of its own kind
            log.debug("No small %s can be built.", model_config.model_type, exc_info=True)
            model = build_core(copy.deepcopy(model_config), attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and not parameter.any():  # it would hide what it multiplies
                    parameter.normal_(std=WEIGHT_DEVIATION)
    return model.eval()


def _tokens(changed: int | None = None) -> torch.Tensor:
    """Return a sample, int64 [1, TRIED_TOKENS], with another token at one place."""
    tokens = torch.arange(TRIED_TOKENS).remainder(2)
    if changed is not None:
        tokens[changed] = 1 - tokens[changed]
    return tokens.unsqueeze(0)


def _logits(model: Any, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Return what a model predicts, float32 [TRIED_TOKENS, vocabulary]."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False, **inputs).logits
    return logits[0].float()


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > TOLERANCE * one.abs().max())
