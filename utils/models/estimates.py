"""Memory, sizes and times by formula, before anything is spent.

Weights, gradients and AdamW's two moments are float32: 4 + 4 + 8 bytes a parameter (Rajbhandari et
al. 2020, ZeRO, section 3.1, with float32 weights in place of mixed-precision copies); other
optimizers keep less. Activations
are counted tensor by tensor, as autograd keeps them for the backward pass with fused attention; a
test compares the count with autograd's own. Memory peaks at one of two moments, and the larger one
is the estimate: when the gradient of the logits is formed, all activations being there; or when the
backward pass ends, all gradients being there. No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from configs.model_config import is_loss_chunked
from configs.training_config import TrainingConfig

WEIGHT_BYTES = 4
MOMENT_BYTES = 8
GRADIENT_BYTES = 4
_BLOCK = 256  # numbers of 8 bits that share a scale (bitsandbytes)
# Elements that DeepSpeed reduces or gathers at once; its own choice takes 1 to 2 GB.
ZERO_BUCKET_ELEMENTS = 50_000_000
CHECKPOINT_OVERHEAD_BYTES = 2**20
SIXTEEN_BIT = ("bf16", "fp16")

# log-softmax, its gradient, and the gradient that goes into it, all float32.
LOGIT_BYTES = 12
# Logits of a chunk, where they are not there for all tokens at once. On a CPU they should stay near
# its caches; a GPU wants large products. Logits and logarithms in float32, or 2 + 4 + 2 bytes.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
CHUNK_LOGIT_BYTES = 8
MIN_CHUNK_TOKENS = 64
# What libraries take with the first step (threads, kernels, workspaces), measured: BENCHMARKS.md.
RUNTIME_BYTES = {"cpu": 40 * 10**6, "cuda": 40 * 10**6}
# Resident over allocated memory, measured: glibc keeps what is freed between blocks in use, most
# among activations, which come and go. On a GPU it is the allocator that is asked.
FRAGMENTATION = {"cpu": 1.03, "cuda": 1.0}
ACTIVATION_FRAGMENTATION = {"cpu": 1.2, "cuda": 1.0}

FORWARD_SHARE = 1 / 3
"""Products of a forward and backward pass: the backward takes two for each one of the forward."""


PLAIN_MLPS = (
    "bloom",
    "codegen",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "mpt",
    "nemotron",
    "opt",
    "phi",
    "starcoder2",
    "xglm",
)
"""Model types whose MLP has two matrices; that of all others has a gate besides."""
STEPWISE_ACTIVATIONS = ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu")
"""Activation functions that transformers computes in several steps, each of which is kept."""


@dataclass(frozen=True)
class ModelShape:
    """What decides the memory of a model.

    `parameters` counts shared ones once, `embedding` those of the token embedding and the output
    layer. The `kind`, transformers' model type, decides what a layer keeps. `queries` and `keys`
    are the widths of all heads together (None: `hidden`), `mlp_tensors` the tensors of the MLP's
    inner width that are kept for the backward pass.
    """

    parameters: int
    embedding: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kind: str = "gpt_neox"
    queries: int | None = None
    keys: int | None = None
    mlp_tensors: int = 2

    @classmethod
    def of(cls, model_config: Any, parameters: int, embedding: int) -> ModelShape:
        """Return the shape of a transformers config."""
        hidden = model_config.hidden_size
        inner = (getattr(model_config, key, None) for key in ("intermediate_size", "n_inner"))
        return cls(
            parameters,
            embedding,
            model_config.num_hidden_layers,
            hidden,
            next((size for size in inner if isinstance(size, int)), 4 * hidden),
            model_config.vocab_size,
            model_config.model_type,
            *attention_widths(model_config),
            _mlp_tensors(model_config),
        )

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has three matrices: one of its inner results is a gate."""
        return self.kind not in PLAIN_MLPS

    @property
    def attention_width(self) -> int:
        """Width of queries, and of what attention gives."""
        return self.hidden if self.queries is None else self.queries

    @property
    def key_width(self) -> int:
        """Width of keys, and of values."""
        return self.hidden if self.keys is None else self.keys


def attention_widths(model_config: Any) -> tuple[int, int]:
    """Return (width of the queries, width of the keys) of all heads of a layer together."""
    hidden, heads = model_config.hidden_size, getattr(model_config, "num_attention_heads", None)
    if not isinstance(heads, int):  # a model without attention
        return hidden, hidden
    head = getattr(model_config, "head_dim", None) or hidden // heads
    pairs = getattr(model_config, "num_key_value_heads", None) or heads
    return head * heads, head * pairs


def _mlp_tensors(model_config: Any) -> int:
    """Return how many tensors of its inner width an MLP keeps.

    Both sides of the activation function; with a gate also the other factor and the product; and
    five where the function is computed step by step.
    """
    named = (getattr(model_config, key, None) for key in ("hidden_act", "activation_function"))
    steps = 3 if next((name for name in named if name), "") in STEPWISE_ACTIVATIONS else 0
    return (2 if model_config.model_type in PLAIN_MLPS else 4) + steps


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training needs on one device.

    `gradients` have their buckets with them where ranks exchange them. `casts` are the 16-bit
    copies of weights that autocast keeps during a step, `logits` are those of the loss with its
    gradient. `total` is at the peak: less than the sum, because gradients come as activations go.
    """

    state: int
    gradients: int
    casts: int
    activations: int
    logits: int
    total: int


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Return how many tokens' logits are there at a time in a loss that is formed in chunks.

    Devices other than cpu are taken for cuda.
    """
    elements = CHUNK_ELEMENTS["cpu" if device == "cpu" else "cuda"]
    return max(MIN_CHUNK_TOKENS, elements // vocabulary)


def activation_bytes(shape: ModelShape, precision: str) -> tuple[int, int]:
    """Return (bytes kept of one layer, bytes of its input) for each token.

    In units of the width, and but for float32 in the precision of the products, a layer keeps
    besides its MLP's inner tensors:

    - GPT-NeoX: its input (float32), two normalized inputs 2, queries, keys and values 3, rotated
      queries and keys 2, the attention's output 1 and its contiguous copy 1.
    - GPT-2: its input and that of the MLP (float32), normalized inputs 2, queries, keys and values
      3, the attention's output 1.
    - Llama and most others: these two inputs and both of them normalized (float32), both times
      their weight 2 (5 in 16 bits: each product casts its own), rotated queries and keys, values,
      the attention's output. OLMo 2 normalizes results instead; Qwen 3 queries and keys besides.
    """
    is_short = precision in SIXTEEN_BIT
    width = 2 if is_short else 4
    hidden, heads = shape.hidden, shape.attention_width + shape.key_width
    layer_input = 4 * hidden
    products = (5 * width if is_short else 2 * width) * hidden
    if shape.kind == "gpt_neox":
        kept = layer_input + width * 9 * hidden
    elif shape.kind == "gpt2":
        kept = 2 * layer_input + width * 6 * hidden
    elif shape.kind in ("olmo2", "olmo3"):
        kept = 4 * layer_input + products + (8 + 2 * width) * heads
    else:
        kept = 4 * layer_input + products + 2 * width * heads
        kept += (4 + width) * heads if shape.kind.startswith("qwen3") else 0
    return kept + width * shape.mlp_tensors * shape.intermediate, layer_input


def selective_bytes(shape: ModelShape, precision: str) -> int:
    """Return the bytes kept of one layer for each token where only products and attention are kept.

    Queries, keys, values, the attention's output and its projection, and the results of the MLP's
    two or three products, besides the layer's input (float32).
    """
    width = 2 if precision in SIXTEEN_BIT else 4
    attention = 2 * (shape.attention_width + shape.key_width) + shape.hidden
    inner = (1 + shape.is_gated) * shape.intermediate
    return 4 * shape.hidden + width * (attention + inner + shape.hidden)


@dataclass(frozen=True)
class StepSetup:
    """What decides the memory of a rank besides its model.

    `precision` is no, bf16 or fp16; device types other than cpu are taken for cuda.
    `gradient_checkpointing` is full (only the input of each layer is kept), selective (also what
    products and attention give) or empty. After the first of several micro-steps, gradients are
    there all the time; with several ranks they also lie in the buckets of DDP. `is_loss_chunked`:
    the logits of all tokens are never there at once. `is_sharded`: each rank holds only a part of
    weights, gradients and moments, and with `is_resharded` a layer's gathered weights are let go
    after its forward. `zero_stage` is that of DeepSpeed's ZeRO, with whole weights and parts of the
    rest; 0 without it.
    """

    micro_batch: int
    sequence_length: int
    precision: str = "no"
    gradient_checkpointing: str = ""
    accumulation: int = 1
    world_size: int = 1
    device: str = "cpu"
    is_loss_chunked: bool = True
    is_sharded: bool = False
    is_resharded: bool = True
    zero_stage: int = 0
    optim: str = "adamw_torch_fused"

    @classmethod
    def of(
        cls, config: TrainingConfig, kind: str, precision: str, device: str, accumulation: int
    ) -> StepSetup:
        """Return that of one process that holds the whole state; `kind` is a `ModelShape`'s."""
        return cls(
            micro_batch=config.per_device_train_batch_size,
            sequence_length=config.sequence_length,
            precision=precision,
            gradient_checkpointing=config.checkpointing_policy,
            accumulation=accumulation,
            device=device,
            is_loss_chunked=is_loss_chunked(kind, config.loss_implementation),
            optim=config.optim,
        )

    @property
    def tokens(self) -> int:
        """Tokens in one forward and backward."""
        return self.micro_batch * self.sequence_length

    @property
    def width(self) -> int:
        """Bytes of a number in products."""
        return 2 if self.precision in SIXTEEN_BIT else WEIGHT_BYTES


def estimate_training_memory(shape: ModelShape, setup: StepSetup) -> MemoryEstimate:
    """Return the memory of one rank."""
    layer, activations = _activations(shape, setup)
    state, gradients, buckets, casts = _state(shape, setup)
    logits, head = _logits(shape, setup)
    there = gradients if setup.accumulation > 1 else 0
    kind = "cpu" if setup.device == "cpu" else "cuda"
    rest, loose = FRAGMENTATION[kind], ACTIVATION_FRAGMENTATION[kind]
    peak = max(activations * loose + (head + there) * rest, gradients * rest + layer * loose)
    total = int(peak + (state + buckets + casts + RUNTIME_BYTES[kind]) * rest)
    return MemoryEstimate(state, gradients + buckets, casts, activations, logits, total)


def _activations(shape: ModelShape, setup: StepSetup) -> tuple[int, int]:
    """Return (bytes of one layer in use, bytes kept for the backward pass)."""
    per_token, layer_input = activation_bytes(shape, setup.precision)
    layer = setup.tokens * per_token
    if not setup.gradient_checkpointing:
        return layer, shape.layers * layer
    is_full = setup.gradient_checkpointing == "full"
    kept = layer_input if is_full else selective_bytes(shape, setup.precision)
    return layer, shape.layers * setup.tokens * kept + layer


def _state(shape: ModelShape, setup: StepSetup) -> tuple[int, int, int, int]:
    """Return the bytes of (weights and moments, gradients, their buckets, copies of weights)."""
    state = shape.parameters * WEIGHT_BYTES
    state += moment_bytes(shape.parameters, shape.embedding, setup.optim)
    gradients = shape.parameters * GRADIENT_BYTES
    # An embedding is looked up, not multiplied: it has no copy, unless it is the output layer too.
    multiplied = shape.parameters - max(0, shape.embedding - shape.vocabulary * shape.hidden)
    casts = 2 * multiplied if setup.precision in SIXTEEN_BIT else 0
    ranks = setup.world_size
    if ranks == 1:
        return state, gradients, 0, casts
    if setup.zero_stage:
        state, gradients, buckets = _zero_bytes(shape, setup)
        return state, gradients, buckets, casts if setup.zero_stage == 1 else 0
    if setup.is_sharded:
        casts, buckets = _gathered_bytes(shape, setup)
        return state // ranks, gradients // ranks, buckets, casts
    return state, gradients, gradients, casts


def _logits(shape: ModelShape, setup: StepSetup) -> tuple[int, int]:
    """Return (bytes of logits, bytes at the peak of the loss)."""
    output_gradients = shape.vocabulary * shape.hidden * GRADIENT_BYTES
    if not setup.is_loss_chunked:
        logits = LOGIT_BYTES * setup.tokens * shape.vocabulary
        # The gradient of the output layer's weights follows when two of the three are gone.
        return logits, max(logits, logits // 3 + output_gradients)
    chunk = min(setup.tokens, chunk_tokens(shape.vocabulary, setup.device))
    logits = CHUNK_LOGIT_BYTES * chunk * shape.vocabulary
    # The gradients of the output layer's weights and inputs are formed at the same time.
    return logits, logits + output_gradients + setup.width * setup.tokens * shape.hidden


def _gathered_bytes(shape: ModelShape, setup: StepSetup) -> tuple[int, int]:
    """Return (gathered weights, gradients on their way) of a rank that holds a part.

    What is in no layer is gathered all the time; of the layers two at a time, the next one being
    fetched, or all of them. Gradients of a layer, or of the rest, are there in the precision of the
    products and once more in float32, to be reduced.
    """
    layer = (shape.parameters - shape.embedding) // max(1, shape.layers)
    layers = min(2, shape.layers) if setup.is_resharded else shape.layers
    gathered = shape.embedding + layer * layers
    largest = max(layer, shape.embedding)
    return setup.width * gathered, (setup.width + GRADIENT_BYTES) * largest


def _zero_bytes(shape: ModelShape, setup: StepSetup) -> tuple[int, int, int]:
    """Return (state, gradients, gradients on their way) of a rank under DeepSpeed's ZeRO.

    Whole weights, in 16 bits with stage 2; in float32 a part of the weights and of both moments. Of
    gradients all with stage 1, a part with stage 2; a bucket of them is being reduced, in float32
    too, and before it the largest tensor's has been formed.
    """
    has_gradient_parts = setup.zero_stage == 2
    width = setup.width if has_gradient_parts else WEIGHT_BYTES
    parts = shape.parameters * (WEIGHT_BYTES + MOMENT_BYTES) // setup.world_size
    gradients = shape.parameters * GRADIENT_BYTES // (setup.world_size if has_gradient_parts else 1)
    largest = shape.vocabulary * shape.hidden
    bucket = max(min(ZERO_BUCKET_ELEMENTS, shape.parameters), largest)
    state = width * shape.parameters + parts
    return state, gradients, (width + GRADIENT_BYTES) * bucket + width * largest


def moment_bytes(parameters: int, embedding: int, optim: str) -> int:
    """Return the bytes of what an optimizer keeps of each weight's past.

    AdamW two numbers, of 32 bits, or of 8 with a scale for each block; Muon one, and AdamW's two
    for the `embedding` parameters that it leaves out; Adafactor one for each row and column, 1% of
    the weights or less.
    """
    if optim == "adamw_bnb_8bit":
        return 2 * parameters + MOMENT_BYTES * parameters // _BLOCK
    if optim == "adafactor":
        return parameters * WEIGHT_BYTES // 100
    if optim == "muon":
        return MOMENT_BYTES // 2 * (parameters + embedding)
    return MOMENT_BYTES * parameters


def estimate_checkpoint_bytes(
    parameters: int, embedding: int = 0, optim: str = "adamw_torch_fused"
) -> int:
    """Return the size of a checkpoint: weights and what the optimizer keeps, in float32."""
    moments = moment_bytes(parameters, embedding, optim)
    return parameters * WEIGHT_BYTES + moments + CHECKPOINT_OVERHEAD_BYTES


def count_pauses(begin: int, end: int, *intervals: int | None) -> int:
    """Return how many of the steps after `begin` up to `end` are the last, or due by an interval.

    `intervals` are at most two, None for none.
    """
    if begin >= end:
        return 0
    first, second = (*(interval for interval in intervals if interval), 0, 0)[:2]
    both = math.lcm(first, second)
    due = _multiples(begin, end, first) + _multiples(begin, end, second)
    due -= _multiples(begin, end, both)
    is_last_due = any(interval and end % interval == 0 for interval in (first, second))
    return due + (not is_last_due)


def _multiples(begin: int, end: int, interval: int) -> int:
    return end // interval - begin // interval if interval else 0


def estimate_evaluation_seconds(samples: int, samples_per_step: int, step_seconds: float) -> float:
    """Return the time of an evaluation that has not been measured: forward passes only."""
    return FORWARD_SHARE * step_seconds * samples / max(1, samples_per_step)
