"""The model of a run: built from its config, made to return its loss, counted.

model config -> transformers model -> loss model -> train step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.model_config import is_loss_chunked
from configs.training_config import TrainingConfig
from utils.errors import ConfigError
from utils.losses import linear_cross_entropy, next_token_targets


def build_model(model_config: Any, config: TrainingConfig) -> nn.Module:
    """Return the model with fresh float32 weights, drawn from the seed on the CPU."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(
        model_config, attn_implementation="sdpa", dtype=torch.float32
    )
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    model.train()
    built: nn.Module = model
    return built


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Return the transformer layers of a model of transformers, first to last."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


def enable_checkpointing(model: Any) -> None:
    """Keep only the input of each layer for the backward pass."""
    # The newer name is in transformers from 5.2x on, where the older one warns.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


class LossModel(nn.Module):
    """A causal language model that returns its loss; what ranks, precision and compilation wrap.

    Args:
        core: A causal language model of transformers.
        implementation: chunked: without the logits of all tokens at once. model: as the model does
            it. auto: chunked where the model's output layer is known to be a plain product.
    """

    def __init__(self, core: Any, implementation: str = "auto") -> None:
        super().__init__()
        self.core = core
        self._is_chunked = is_loss_chunked(core.config.model_type, implementation)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean loss over all tokens that have a next one: float32, a scalar.

        Args:
            input_ids: int64 [samples, tokens].
            position_ids: int64 of the same shape; None counts from 0.
        """
        core: Any = self.core
        inputs = {"input_ids": input_ids, "use_cache": False}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if not self._is_chunked:
            loss: torch.Tensor = core(labels=input_ids, **inputs).loss
            return loss
        hidden = core.base_model(**inputs).last_hidden_state
        weight = core.get_output_embeddings().weight
        return linear_cross_entropy(hidden.flatten(0, 1), weight, next_token_targets(input_ids))


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
        total: All of them, shared ones once.
        embedding: Those of the token embedding and the output layer.
    """

    total: int
    embedding: int

    @property
    def without_embedding(self) -> int:
        """Parameters apart from the embedding and the output layer."""
        return self.total - self.embedding


def count_parameters(model_config: Any) -> ParameterCounts:
    """Return the parameter counts of a model config, from a model without memory.

    Raises:
        ConfigError: No model can be built from it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except Exception as exc:  # whatever a wrong value meets first
        raise ConfigError(
            f"No model can be built with these model_overrides: {type(exc).__name__}: {exc}"
        ) from exc
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {
        id(module.weight): module.weight.numel()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    return ParameterCounts(total, sum(embeddings.values()))
