"""The model of a run: built from its config, made to return its loss, counted.

model config -> transformers model -> loss model -> train step
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from configs.model_config import is_loss_chunked
from configs.training_config import TrainingConfig
from utils.base.errors import ConfigError, first_line
from utils.models.cpu_products import product_operations
from utils.models.losses import (
    ChunkLoss,
    chunk_cross_entropy,
    linear_cross_entropy,
    next_token_targets,
)

GPU_ATTENTIONS = ("flash_attention_2", "flash_attention_3", "flex_attention")
FLOAT8_CAPABILITY = (8, 9)
FLOAT8_PACKAGE = "fp8 needs the package torchao: pip install torchao."


def build_model(model_config: Any, config: TrainingConfig) -> Any:
    """Return the model of transformers with fresh float32 weights, drawn from the seed on the CPU.

    Raises:
        ConfigError: The attention or fp8 that is asked for needs a package that is not installed.
    """
    model = build_core(model_config, config.attn_implementation)
    if config.fp8:
        use_float8(model)
    if config.checkpointing_policy:
        enable_checkpointing(model, config.checkpointing_policy)
    model.train()
    return model


def build_core(model_config: Any, attention: str) -> Any:
    """Return the model of transformers in float32, on the device of the context.

    Raises:
        ConfigError: The attention needs a package that is not installed.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(
            model_config, attn_implementation=attention, dtype=torch.float32
        )
    except (ImportError, ValueError) as exc:
        if attention == "sdpa":
            raise
        raise ConfigError(f"attn_implementation {attention}: {first_line(exc)}") from exc


def require_kernels(
    config: TrainingConfig, model_config: Any, precision: str, device: torch.device
) -> None:
    """Check, before anything is spent, that attention and products can be made here.

    Raises:
        ConfigError: They cannot.
    """
    attention = config.attn_implementation
    if attention in GPU_ATTENTIONS and device.type != "cuda":
        raise ConfigError(
            f"attn_implementation {attention} trains on a CUDA GPU only, this is {device.type}. "
            "Set it to sdpa."
        )
    if attention.startswith("flash") and precision == "no":
        raise ConfigError(f"attn_implementation {attention} needs bf16 or fp16. Or set it to sdpa.")
    if attention != "sdpa":
        with torch.device("meta"):
            build_core(model_config, attention)
    if config.fp8:
        _require_float8(precision, device)


def _require_float8(precision: str, device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ConfigError(f"fp8 needs a GPU with float8 (Ada, Hopper or newer), this is {name}.")
    if precision != "bf16":
        raise ConfigError("fp8 needs bf16: its products give bfloat16.")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(FLOAT8_PACKAGE)


def with_layers(model_config: Any, count: int) -> Any:
    """Return a model config of so many layers that is like another one, which stays as it is."""
    small = copy.deepcopy(model_config)
    small.num_hidden_layers = count
    for name in ("layer_types", "attention_layers"):  # lists with an entry for each layer
        if isinstance(getattr(small, name, None), list):
            setattr(small, name, getattr(small, name)[:count])
    return small


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Return the transformer layers of a model of transformers, first to last."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


def enable_checkpointing(model: nn.Module, policy: str = "full") -> None:
    """Have the layers recompute activations in the backward pass.

    The checkpoint lies within the layer's call, so that a compiled layer is compiled with it.

    The policy `full` keeps the layers' inputs alone, `selective` also what products and attention
    give: most of the work and, with fused attention, half of the memory.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, _keep_products
        )
    for layer in find_layers(model):
        layer.forward = _recomputed(layer.forward, options)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # A function of its own and not a partial one, which torch.compile would not look into.
    @functools.wraps(forward)
    def recomputed(*args: Any, **inputs: Any) -> Any:
        return checkpoint(forward, *args, **options, **inputs)

    return recomputed


KEPT_OPERATIONS = product_operations() | frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "addmm",
        "bmm",
        "mm",
        "_scaled_mm",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)


def _keep_products(_context: Any, operation: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    if operation in KEPT_OPERATIONS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def use_float8(model: nn.Module) -> None:
    """Have the layers' products made in float8, scaled by row; weights stay float32.

    Raises:
        ConfigError: torchao is not installed, or there is no such product.
    """
    layers = {id(part) for layer in find_layers(model) for part in layer.modules()}
    if not any(id(part) in layers and _fits_float8(part) for part in model.modules()):
        raise ConfigError(
            "fp8: the layers have no linear part whose sides are multiples of 16; those of GPT-2 "
            "are of another kind. Set it to false."
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as exc:
        raise ConfigError(FLOAT8_PACKAGE) from exc
    convert_to_float8_training(
        model,
        config=Float8LinearConfig.from_recipe_name("rowwise"),
        module_filter_fn=lambda part, _name: id(part) in layers and _fits_float8(part),
    )


def _fits_float8(part: nn.Module) -> bool:
    """Tell whether a linear layer's shape is one that float8 products take."""
    return isinstance(part, nn.Linear) and not (part.in_features % 16 or part.out_features % 16)


def compile_model(model: LossModel, *, by_layer: bool) -> None:
    """Have a model compiled at its next call.

    Names of weights stay as they are. `by_layer` compiles one layer and uses it for all, which is
    quicker to start.
    """
    for part in find_layers(model) if by_layer else [model.core.base_model]:
        part.compile()
    if next(model.parameters()).device.type == "cuda":
        # Its steps over a chunk become one; a CPU's own softmax is as good.
        model.cross_entropy = torch.compile(chunk_cross_entropy)


def undo_compilation(model: LossModel) -> None:
    """Take back what `compile_model` did."""
    for part in model.modules():
        part._compiled_call_impl = None
    model.cross_entropy = chunk_cross_entropy


class LossModel(nn.Module):
    """A causal language model that returns its loss; what ranks, precision and compilation wrap.

    The implementation `chunked` never has the logits of all tokens at once, `model` is the model's
    own, and `auto` is chunked where the model's output layer is known to be a plain product.
    """

    def __init__(self, core: Any, implementation: str = "auto") -> None:
        super().__init__()
        self.core = core
        self.cross_entropy: ChunkLoss = chunk_cross_entropy
        self._is_chunked = is_loss_chunked(core.config.model_type, implementation)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean loss over all tokens that have a next one: float32, a scalar.

        Both are int64 [samples, tokens]; without `position_ids` positions count from 0.
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
        targets = next_token_targets(input_ids)
        return linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets, cross_entropy=self.cross_entropy
        )


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    `total` counts shared ones once; `embedding` are those of the token embedding and the output
    layer.
    """

    total: int
    embedding: int

    @property
    def without_embedding(self) -> int:
        """Parameters apart from the embedding and the output layer."""
        return self.total - self.embedding


def find_shapes(model_config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of a model config; shared ones have one name.

    Raises:
        ConfigError: No model can be built from it.
    """
    model = _build_without_memory(model_config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _build_without_memory(model_config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config)
    except Exception as exc:  # whatever a wrong value meets first
        reason = f"{type(exc).__name__}: {exc}"
        if isinstance(exc, KeyError):  # a word that it looks up, such as `hidden_act`
            wrong = [k for k, value in model_config.to_dict().items() if [value] == [*exc.args]]
            reason = f"transformers knows no {' or '.join(wrong) or 'value'} {exc}."
        raise ConfigError(f"No model can be built of these values: {reason}") from exc


def count_parameters(model_config: Any) -> ParameterCounts:
    """Return the parameter counts of a model config, from a model without memory.

    Raises:
        ConfigError: No model can be built from it.
    """
    model = _build_without_memory(model_config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {
        id(module.weight): module.weight.numel()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    return ParameterCounts(total, sum(embeddings.values()))
