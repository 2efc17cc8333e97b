"""Memory and time of a training step on many GPUs, by formula and by strategy.

    model shape, GPU, number of GPUs, strategy -> what fits -> the fastest step

What is added up (P parameters, n GPUs, float32 weights, gradients and AdamW's moments, products in
16 bits; docs/SCALING.md has the derivations):

- Memory: weights, gradients and moments divided as Rajbhandari et al. 2020 (ZeRO, section 5) do,
  gathered 16-bit weights, and the activations of utils/models/estimates.py.
- Compute: FLOPs of utils/models/mfu.py at an assumed share of the peak; what checkpointing computes
  again is added (Korthikanti et al. 2022, section 5).
- Communication: rings send (n-1)/n of a message for a gather or a reduce-scatter and twice that for
  an all-reduce (Patarasuk and Yuan 2009); trees carry the latency of an all-reduce.
- Overlap: a layer's gather beside the layer before it, its reduction beside the layer after it:
  the longer of the two counts, layer by layer.

Everything is an estimate; pure functions, no torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

from configs.model_config import get_preset
from utils.costs.gpu_types import NETWORK_HOP_SECONDS, GpuType, gather_seconds, reduce_seconds
from utils.models.estimates import (
    FORWARD_SHARE,
    GRADIENT_BYTES,
    MOMENT_BYTES,
    RUNTIME_BYTES,
    WEIGHT_BYTES,
    ModelShape,
    StepSetup,
    activation_bytes,
    estimate_training_memory,
)
from utils.models.mfu import flops_per_token

STRATEGIES = {
    "ddp": "every GPU has everything; gradients are all-reduced",
    "zero1": "AdamW's moments are sharded, weights and gradients are not",
    "zero2": "FSDP2 without reshard: weights are gathered once for forward and backward",
    "fsdp": "FSDP2, full shard (ZeRO-3): each layer is gathered for forward and for backward",
    "hsdp": "FSDP2 within a machine, all-reduce between machines",
}
CHECKPOINTING = ("none", "selective", "full")
"""Activation checkpointing: none; selective keeps what products and attention give; full keeps the
input of each layer."""

SELECTIVE_SHARE = 0.15
"""Of a forward pass, computed again with selective checkpointing: little work, bound by memory."""
GATHERED_BYTES = 2  # 16-bit weights on their way
USABLE_MEMORY = 0.9  # the rest: CUDA context, NCCL's buffers, fragmentation
HALF_EFFICIENCY_WIDTH = 1024
"""Width of the model at which products reach half of the GPU's efficiency."""
BUCKET_BYTES = {"ddp": 25 * 2**20, "zero1": 200 * 2**20}
OPTIMIZER_BYTES = 32
"""Read and written by the gradient norm and AdamW, for each parameter that a GPU updates."""
MAX_MICRO_BATCH = 64
EQUALLY_FAST = 1.01


@dataclass(frozen=True)
class TrainingJob:
    """What is to be planned.

    `strategy` is a key of `STRATEGIES`; on one GPU there is nothing to shard. `global_batch` counts
    the samples of a step over all GPUs, `reduce_bytes` the bytes of a gradient on its way (4 or 2).
    """

    shape: ModelShape
    gpu: GpuType
    gpus: int
    strategy: str
    global_batch: int = 1024
    sequence_length: int = 2048
    reduce_bytes: int = 4

    @property
    def machines(self) -> int:
        """Machines that hold so many GPUs."""
        return math.ceil(self.gpus / self.gpu.gpus_per_machine)

    @property
    def shards(self) -> int:
        """GPUs over which the training state is divided (ZeRO-1: its moments)."""
        if self.strategy == "ddp":
            return 1
        if self.strategy == "hsdp":
            return min(self.gpus, self.gpu.gpus_per_machine)
        return self.gpus

    @property
    def flops_per_token(self) -> float:
        """FLOPs of the model for a token, forward and backward."""
        shape = self.shape
        return flops_per_token(
            shape.parameters, shape.layers, shape.attention_width, self.sequence_length
        )


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one GPU.

    `state` is weights and moments, `gradients` have their buckets with them, `gathered` are 16-bit
    weights and gradients before they are reduced. `total` is at the peak, with the loss; gradients
    come as activations go.
    """

    state: int
    gradients: int
    gathered: int
    activations: int
    total: int


@dataclass(frozen=True)
class StepPlan:
    """One way to do a step, and what it costs.

    `communication_seconds` is the time of all collectives, overlapped or not, and `exposed_share`
    the share of the step in which GPUs wait for them. `optimizer_seconds` has the gradient norm
    too. The rate is that of all GPUs together.
    """

    micro_batch: int
    checkpointing: str
    accumulation: int
    memory: DeviceMemory
    compute_seconds: float
    optimizer_seconds: float
    communication_seconds: float
    step_seconds: float
    exposed_share: float
    tokens_per_second: float
    mfu: float


def shape_of_preset(name: str) -> ModelShape:
    """Return the shape of a preset, without building its model.

    Raises:
        ConfigError: There is no such preset.
    """
    preset = get_preset(name)
    values = SimpleNamespace(model_type=preset.model_type, **preset.values)
    tables = 1 if values.tie_word_embeddings else 2
    embedding = tables * values.vocab_size * values.hidden_size
    return ModelShape.of(values, preset.parameters, embedding)


def layer_parameters(shape: ModelShape) -> float:
    """Return the parameters of one layer; what is in no layer is counted with the embeddings."""
    return (shape.parameters - shape.embedding) / shape.layers


def device_memory(
    job: TrainingJob, micro_batch: int, checkpointing: str, accumulation: int
) -> DeviceMemory:
    """Return what one GPU holds; for `ddp` it is the estimate of utils/models/estimates.py.

    The peak is at one of two moments: with all activations and the loss, or at
    the end of the backward pass with all gradients.
    """
    shape, shards = job.shape, job.shards
    whole = estimate_training_memory(
        shape,
        StepSetup(
            micro_batch=micro_batch,
            sequence_length=job.sequence_length,
            precision="bf16",
            gradient_checkpointing="" if checkpointing == "none" else checkpointing,
            accumulation=accumulation,
            world_size=job.gpus,
            device="cuda",
        ),
    )
    parameters = shape.parameters
    tokens = micro_batch * job.sequence_length
    moments = parameters * MOMENT_BYTES // shards
    late = tokens * activation_bytes(shape, "bf16")[0]
    if job.strategy in ("ddp", "zero1") or job.gpus == 1:
        weights, gradients = parameters * WEIGHT_BYTES, parameters * GRADIENT_BYTES
        buckets, gathered = whole.gradients - gradients, whole.casts
    else:
        weights = parameters * WEIGHT_BYTES // shards
        gradients, buckets = parameters * GRADIENT_BYTES // shards, 0
        # A gradient is formed in 16 bits and copied into the buffer that is reduced.
        formed = GATHERED_BYTES + job.reduce_bytes
        layers = shape.layers if job.strategy == "zero2" else 2  # one in use, one on its way
        gathered = int(
            GATHERED_BYTES * (shape.embedding + layers * layer_parameters(shape))
            + formed * 2 * layer_parameters(shape)
        )
        late += formed * shape.embedding
    # Logits of a chunk, and the gradients of the output layer's weights and inputs.
    loss = whole.logits + shape.vocabulary * shape.hidden * GRADIENT_BYTES
    loss += GATHERED_BYTES * tokens * shape.hidden
    there = gradients if accumulation > 1 else 0
    peak = max(whole.activations + loss + there, gradients + late)
    state = weights + moments
    total = int(peak + state + buckets + gathered + RUNTIME_BYTES["cuda"])
    return DeviceMemory(state, gradients + buckets, gathered, whole.activations, total)


def fits(job: TrainingJob, memory: DeviceMemory) -> bool:
    """Tell whether a GPU has that much memory to give."""
    return memory.total <= USABLE_MEMORY * job.gpu.memory_bytes


def sent_bytes(job: TrainingJob, accumulation: int) -> float:
    """Return what one GPU sends in a step."""
    n, parameters, reduced = job.gpus, job.shape.parameters, job.reduce_bytes
    if n == 1:
        return 0.0
    share = (n - 1) / n
    if job.strategy == "ddp":
        return 2 * share * WEIGHT_BYTES * parameters
    if job.strategy == "zero1":
        return share * (WEIGHT_BYTES + WEIGHT_BYTES) * parameters
    share = (job.shards - 1) / job.shards
    sharded = share * (GATHERED_BYTES + reduced) * parameters
    if job.strategy != "zero2":  # what is in a layer is gathered for the backward pass again
        sharded += share * GATHERED_BYTES * (parameters - job.shape.embedding)
    machines = n / job.shards
    between = 2 * (machines - 1) / machines * reduced * parameters / job.shards
    return accumulation * (sharded + (between if job.strategy == "hsdp" else 0.0))


def plan_step(
    job: TrainingJob, micro_batch: int, checkpointing: str, efficiency: float | None = None
) -> StepPlan:
    """Return what a step costs.

    `efficiency` is the share of the peak that compute reaches; None assumes one: narrow models fill
    a GPU less.
    """
    accumulation = job.global_batch // (job.gpus * micro_batch)
    if efficiency is None:
        width = job.shape.hidden
        efficiency = job.gpu.efficiency * width / (width + HALF_EFFICIENCY_WIDTH)
    tokens = micro_batch * job.sequence_length
    both = tokens * job.flops_per_token / (job.gpu.peak_flops * efficiency)
    forward = FORWARD_SHARE * both
    again = {"none": 0.0, "selective": SELECTIVE_SHARE * forward, "full": forward}[checkpointing]
    backward = both - forward + again
    updated = job.shape.parameters / (1 if job.strategy == "ddp" else job.shards)
    optimizer = OPTIMIZER_BYTES * updated / job.gpu.memory_bytes_per_second
    times = _replicated if job.strategy in ("ddp", "zero1") or job.gpus == 1 else _sharded
    passes, communication = times(job, forward, backward, accumulation)
    step = passes + optimizer
    compute = accumulation * (forward + backward)
    speed = job.gpus * accumulation * tokens / step
    return StepPlan(
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        accumulation=accumulation,
        memory=device_memory(job, micro_batch, checkpointing, accumulation),
        compute_seconds=compute,
        optimizer_seconds=optimizer,
        communication_seconds=communication,
        step_seconds=step,
        exposed_share=max(0.0, (step - compute - optimizer) / step),
        tokens_per_second=speed,
        mfu=speed * job.flops_per_token / (job.gpus * job.gpu.peak_flops),
    )


def _replicated(
    job: TrainingJob, forward: float, backward: float, accumulation: int
) -> tuple[float, float]:
    """Return (seconds of all passes, of communication): gradients move beside the last backward.

    The last bucket has no pass to move beside; ZeRO-1 gathers the weights after the update.
    """
    num_bytes = WEIGHT_BYTES * job.shape.parameters
    buckets = max(1, math.ceil(num_bytes / BUCKET_BYTES.get(job.strategy, num_bytes)))
    move = reduce_seconds if job.strategy == "ddp" else gather_seconds
    bucket = move(num_bytes / buckets, job.gpus, job.gpu)
    gather = gather_seconds(num_bytes, job.gpus, job.gpu) if job.strategy == "zero1" else 0.0
    last = max(backward, (buckets - 1) * bucket) + bucket
    passes = (accumulation - 1) * (forward + backward) + forward + last + gather
    return passes, buckets * bucket + gather


def _sharded(
    job: TrainingJob, forward: float, backward: float, accumulation: int
) -> tuple[float, float]:
    """Return (seconds of all passes, of communication): per layer, the longer of work and traffic.

    Embeddings and output layer are gathered at the beginning of a pass, and their gradients reduced
    at its end, beside nothing.
    """
    shape, gpu, shards = job.shape, job.gpu, job.shards
    machines = max(1, job.gpus // shards)

    def traffic(parameters: float) -> tuple[float, float, float]:
        gather = gather_seconds(GATHERED_BYTES * parameters, shards, gpu)
        scatter = gather_seconds(job.reduce_bytes * parameters, shards, gpu)
        across = 0.0
        if machines > 1 and job.strategy == "hsdp":
            sent = 2 * (machines - 1) / machines * job.reduce_bytes * parameters
            hops = 2 * math.ceil(math.log2(machines)) * NETWORK_HOP_SECONDS
            across = sent / gpu.network_bytes_per_second + hops
        return gather, scatter, across

    gather, scatter, across = traffic(layer_parameters(shape))
    again = gather if job.strategy != "zero2" else 0.0
    ahead = max(forward / shape.layers, gather)
    # Links within a machine and cards between machines work at the same time.
    back = max(backward / shape.layers, again + scatter, across)
    root_gather, root_scatter, root_across = traffic(shape.embedding)
    one = root_gather + shape.layers * (ahead + back) + root_scatter + root_across
    sent = shape.layers * (gather + again + scatter + across)
    sent += root_gather + root_scatter + root_across
    return accumulation * one, accumulation * sent


def candidate_plans(job: TrainingJob, efficiency: float | None = None) -> list[StepPlan]:
    """Return a plan for every micro-batch that divides a GPU's samples, and every checkpointing."""
    samples, rest = divmod(job.global_batch, job.gpus)
    sizes = range(1, 0 if rest else min(samples, MAX_MICRO_BATCH) + 1)
    return [
        plan_step(job, micro_batch, checkpointing, efficiency)
        for micro_batch in sizes
        for checkpointing in CHECKPOINTING
        if samples % micro_batch == 0
    ]


def best_plan(job: TrainingJob, efficiency: float | None = None) -> StepPlan | None:
    """Return the fastest plan that fits; None where none does.

    Of those that are within `EQUALLY_FAST` of it, the one with the largest micro-batch, which a GPU
    likes, and then the one that computes the least again.
    """
    plans = [plan for plan in candidate_plans(job, efficiency) if fits(job, plan.memory)]
    fastest = min((plan.step_seconds for plan in plans), default=0.0)
    equal = [plan for plan in plans if plan.step_seconds <= EQUALLY_FAST * fastest]
    return max(
        equal,
        key=lambda plan: (plan.micro_batch, -CHECKPOINTING.index(plan.checkpointing)),
        default=None,
    )
