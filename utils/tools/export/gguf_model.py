"""A model's config and tensors as GGUF has them: names, layouts and hyperparameters.

    model of transformers -> metadata fields, named tensors

Supported: gpt_neox, gpt2 and llama, where llama.cpp computes what transformers does. The names are
those of the `gguf` package's own table; the layouts follow llama.cpp's converter: query, key and
value of GPT-NeoX one after the other and not head by head, the matrices of GPT-2 transposed, the
rotated pairs of Llama's query and key side by side. GELU of GPT-NeoX is its tanh form there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.base.errors import UsageError

if TYPE_CHECKING:
    import torch

QKV = ".attention.query_key_value."
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class Architecture(NamedTuple):
    """A model type that GGUF has.

    Attributes:
        required: Config values that llama.cpp takes for granted.
        has_own_output: The output matrix is written where it is tied, too.
        rearrange: Gives a tensor the layout of llama.cpp.
    """

    name: str
    required: Mapping[str, Any]
    has_own_output: bool
    rearrange: Callable[[str, torch.Tensor, Any], torch.Tensor]


def _rearrange_gpt_neox(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """[heads, 3, head size, ...] -> [3, heads, head size, ...]."""
    if QKV not in name:
        return tensor
    heads = config.num_attention_heads
    parts = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
    return parts.transpose(0, 1).reshape(tensor.shape)


def _rearrange_gpt2(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """[in, out] of Conv1D -> [out, in]."""
    return tensor.t() if name.endswith(TRANSPOSED) else tensor


def _rearrange_llama(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """[heads, 2, half a head, ...] -> [heads, half a head, 2, ...]."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    is_query = name.endswith("q_proj.weight")
    heads = config.num_attention_heads if is_query else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


ARCHITECTURES = {
    "gpt_neox": Architecture(
        "gptneox", {"hidden_act": ("gelu",), "attention_bias": (True,)}, True, _rearrange_gpt_neox
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        False,
        _rearrange_gpt2,
    ),
    "llama": Architecture(
        "llama",
        {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
        False,
        _rearrange_llama,
    ),
}


def require_architecture(config: Any) -> Architecture:
    """Return how a model type is written.

    Raises:
        UsageError: GGUF, or llama.cpp, has no such model.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UsageError(
            f"--format gguf: model type {config.model_type} is not supported. Supported: "
            f"{', '.join(ARCHITECTURES)}. --format hf takes any."
        )
    for key, allowed in found.required.items():
        value = getattr(config, key, allowed[0])
        if value not in allowed:
            raise UsageError(
                f"--format gguf: {config.model_type} with {key}={value!r} is not supported: "
                f"llama.cpp has {allowed[0]!r} only. --format hf takes any."
            )
    rope_type = _rope(config).get("rope_type", "default")
    if rope_type != "default":
        raise UsageError(
            f"--format gguf: rotary embeddings of type {rope_type!r} are not supported, only the "
            "default ones. --format hf takes any."
        )
    return found


def write_fields(writer: Any, model: Any) -> None:
    """Write the hyperparameters of a model into a `gguf.GGUFWriter`."""
    config = model.config
    kind = config.model_type
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if kind == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))
    writer.add_rope_dimension_count(2 * model.base_model.rotary_emb.inv_freq.numel())
    if kind == "gpt_neox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def named_tensors(model: Any) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield each tensor's name in GGUF and what returns it in llama.cpp's layout.

    Raises:
        UsageError: The model has a tensor that GGUF has no name for.
    """
    import gguf

    config, architecture = model.config, require_architecture(model.config)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UsageError(f"--format gguf: {config.model_type} has no tensor {name} there.")
        if found == "output.weight" and is_tied and not architecture.has_own_output:
            continue

        def read(name: str = name, tensor: torch.Tensor = tensor) -> torch.Tensor:
            return architecture.rearrange(name, tensor, config).contiguous()

        yield found, read


def _rope(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}
