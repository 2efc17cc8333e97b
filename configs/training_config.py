"""The run configuration: one validated dataclass.

Keys carry the names of `transformers.TrainingArguments` where it has one. `configs/NAME.json` hold
values only (`config_files.py` reads them); what they leave out has the default below. No torch and
no transformers here: `train.py --help` has to be quick.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from configs.config_checks import (
    LR_SCHEDULERS,
    above_zero,
    at_least,
    below_one,
    between,
    check_fields,
    check_values,
    checked,
    one_of,
)
from configs.config_files import COMMAND_LINE, ConfigValues, read_values
from utils.base.archive_formats import COMPRESSIONS
from utils.base.errors import ConfigError
from utils.base.uri import join_uri

ATTENTION_IMPLEMENTATIONS = (
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "eager",
)
BAD_STEP_SPAN = 1000  # `max_bad_steps` is counted over so many steps


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what a run does.

    Raises:
        ConfigError: A value is out of its range, or two values contradict each other.
    """

    model: str = "refocused-1.2b"
    """Name of a preset in `configs/model_presets.py`, or the path of a model's JSON file. With
    `init_from` it is left out: the model there says what it is."""

    model_overrides: dict[str, Any] = field(default_factory=dict)
    """Values that replace the preset's or the file's, by their name in the transformers config
    class."""

    init_from: str = ""
    """A trained model that a new run begins with: the directory of a checkpoint or of a Hugging
    Face model, `gs://` of one, or a name on the Hub. Optimizer, schedule and data begin anew."""

    data_uri: str | list[dict[str, Any]] = ""
    """Bucket of the NPZ shards: `gs://bucket/prefix` or a directory; or a mixture: a list of
    `{"uri": ..., "weight": ...}`, sampled by weight."""

    checkpoint_uri: str = ""
    """Bucket that archives go to, below `Checkpoints/`. Empty: nothing is uploaded."""

    output_dir: str = "checkpoints"
    """Directory of the checkpoints, relative to the current directory."""

    logging_dir: str = "logs"
    """Directory of metrics, log and TensorBoard events, relative to the current directory."""

    cache_dir: str = "cache"
    """Directory of downloaded shards, relative to the current directory."""

    run_name: str = ""
    """A folder added to each of the three directories and to the bucket prefix."""

    max_files: int | None = checked(
        "at least 1, or null or -1 for all; got {}",
        lambda count: count == -1 or count >= 1,
        default=None,
    )
    """How many training shards to use, in the order of their names. null or -1: all."""

    sequence_length: int = at_least(2, default=2048)
    """Tokens in a sample."""

    global_batch_size: int | None = at_least(1, default=None)
    """Samples in a step over all ranks. null: micro-batch x accumulation x ranks."""

    per_device_train_batch_size: int = at_least(1, default=1)
    """Samples in one forward and backward of one rank (the micro-batch). auto: the most that fit
    into the memory, with `global_batch_size` kept."""

    auto_find_batch_size: bool = False
    """What `per_device_train_batch_size: auto` stands for."""

    per_device_eval_batch_size: int | None = at_least(1, default=None)
    """Samples in one forward of an evaluation. null: as for training."""

    gradient_accumulation_steps: int | None = at_least(1, default=None)
    """Micro-steps in a step. null: what `global_batch_size` needs, or 1."""

    max_steps: int = at_least(1, default=10000)
    """Length of the run and of its learning rate schedule, in optimizer updates. -1, or left out
    beside `num_train_epochs`: what that comes to."""

    num_train_epochs: float | None = above_zero(default=None)
    """Length of the run in passes over the training shards, in place of `max_steps`."""

    learning_rate: float = above_zero(default=2e-4)
    """Peak learning rate."""

    lr_scheduler_type: str = one_of(LR_SCHEDULERS, default="cosine")
    """What follows the warm-up, a schedule of transformers: cosine, linear, polynomial,
    cosine_with_restarts, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay,
    inverse_sqrt, or constant (constant_with_warmup)."""

    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Settings of that schedule, as transformers names them (`LR_SCHEDULERS`)."""

    min_lr_rate: float = between(0.0, 1.0, default=0.1)
    """Learning rate at the last step, as a share of the peak, where the schedule would end at 0."""

    warmup_steps: int = at_least(0, default=100)
    """Steps over which the learning rate rises to its peak."""

    optim: str = one_of(
        ("adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "muon"), default="adamw_torch_fused"
    )
    """Optimizer: adamw_torch_fused; adamw_bnb_8bit (moments of 8 bits; package bitsandbytes);
    adafactor (transformers': keeps a row and a column of numbers for each matrix); muon
    (torch.optim.Muon for the matrices of the layers, AdamW for embeddings, output layer and
    vectors)."""

    muon_learning_rate: float | None = above_zero(default=None)
    """Peak learning rate of Muon's matrices; the schedule is the same. null: `learning_rate`."""

    muon_momentum: float = below_one(default=0.95)
    """Decay of Muon's momentum."""

    weight_decay: float = at_least(0, default=0.1)
    """Decoupled decay of matrices; biases and norms have none."""

    adam_beta1: float = below_one(default=0.9)
    """Decay of AdamW's first moment."""

    adam_beta2: float = below_one(default=0.95)
    """Decay of AdamW's second moment."""

    adam_epsilon: float = above_zero(default=1e-8)
    """Added to AdamW's denominator."""

    max_grad_norm: float = at_least(0, default=1.0)
    """Gradients are scaled down to this norm. 0: never."""

    save_steps: int = at_least(1, default=500)
    """A checkpoint every so many steps, and one at the end."""

    save_seconds: float | None = at_least(1, default=None)
    """A checkpoint also when so many seconds have passed since the last one. null: never."""

    save_on_best: bool = False
    """A checkpoint also at each new best validation loss."""

    background_save: bool = True
    """Training waits for a copy in host memory only, and another process writes it. false: it waits
    until the checkpoint is committed."""

    save_overlap: str = one_of(("wait", "skip"), default="wait")
    """When a save is due while the one before is still being written: wait, or skip it."""

    failed_save: str = one_of(("continue", "stop"), default="continue")
    """When a checkpoint cannot be written: continue and try again in a minute, or stop."""

    grace_seconds: float = at_least(0, default=30.0)
    """Time between a request to stop (SIGINT, SIGTERM, preemption) and the exit: for saving, then
    for uploads. What is not uploaded by then goes up at the next start."""

    logging_steps: int = at_least(1, default=100)
    """Metrics every so many steps; their loss is the mean since the ones before."""

    eval_steps: int | None = at_least(1, default=None)
    """An evaluation every so many steps, besides the one at each save. null: only there."""

    max_eval_samples: int | None = at_least(1, default=None)
    """Validation samples used, spread evenly over all of them, always the same. null: all."""

    sample_prompts: list[str] = field(default_factory=lambda: ["", "The", "In the year"])
    """Beginnings of texts that the model writes at each evaluation; an empty one begins a new text.
    []: none."""

    sample_tokens: int = at_least(0, default=64)
    """Tokens of each of these texts at most. 0: none are written."""

    seed: int = between(0, 2**63 - 1, default=42)
    """Seed of the weights, of dropout and of the sample order."""

    shuffle_window_shards: int = at_least(1, default=8)
    """Samples are shuffled within this many neighbouring shards of the epoch's shard order."""

    mask_documents: bool = False
    """Attention and position ids do not cross documents (needs the end-of-text id of the data)."""

    bad_step: str = one_of(("stop", "skip", "rollback"), default="stop")
    """When the loss or gradients of a step are not finite, or its loss is a spike: its update is
    left out, then stop (saved), skip (go on with the next samples), or rollback (to the newest
    checkpoint, then on after the step's samples)."""

    max_bad_steps: int = at_least(0, default=10)
    """With skip or rollback: more bad steps than this among the last 1000 stop the run."""

    spike_sigma: float | None = above_zero(default=None)
    """A loss so many standard deviations above the mean of the last steps is a spike. null: no
    loss is."""

    spike_window: int = at_least(2, default=100)
    """Good steps that this mean and deviation are taken from."""

    record_batches: bool = False
    """Write a checksum of each step's tokens to batches.jsonl in `logging_dir`, as proof."""

    bad_shard: str = one_of(("stop", "skip"), default="stop")
    """stop, or skip: leave unusable shards out and replace their samples."""

    cache_limit_bytes: int | None = at_least(1, default=100 * 2**30)
    """Size that `cache_dir` is kept under, in bytes. null: no limit."""

    bf16: bool | None = None
    """bfloat16 mixed precision. null: on a GPU that has it."""

    fp16: bool | None = None
    """float16 mixed precision with a loss scaler. null: on a GPU without bfloat16."""

    tf32: bool | None = None
    """TF32 for float32 products on GPUs that have it. null: as true, unless full_determinism."""

    fp8: bool = False
    """The layers' products in float8 with a scale for each row (torchao; Hopper, Ada or newer)."""

    attn_implementation: str = one_of(ATTENTION_IMPLEMENTATIONS, default="sdpa")
    """sdpa (torch's own, flash where it can), flash_attention_2, flash_attention_3 (packages of
    their own), flex_attention, or eager."""

    pad_vocab_to_multiple_of: int | None = at_least(1, default=None)
    """Round the vocabulary up: GPUs multiply multiples of 64 or 128 faster. The ids above it are
    never targets and never generated. null: as the model has it."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    gradient_checkpointing_policy: str = one_of(("full", "selective"), default="full")
    """full: keep the input of each layer alone (about a third more time); selective: keep the
    results of products and attention too, recompute the rest (a few percent more time)."""

    loss_implementation: str = one_of(("auto", "chunked", "model"), default="auto")
    """chunked: the logits of a chunk of tokens at a time, their gradients formed at once. model: as
    the model does it. auto: chunked where the model's output layer is a plain product."""

    torch_compile: bool = False
    """Compile with torch.compile; what is compiled is kept in `cache_dir`. Where that fails, a
    warning says why and the run goes on without. Left out on CPUs where it would be slower."""

    use_regional_compilation: bool = True
    """With torch_compile: compile one layer and use it for all (quick to start). false: the whole
    model."""

    sharding: str = one_of(("none", "fsdp2", "zero1", "zero2"), default="none")
    """How several ranks hold the state: none, each all of it (DDP), or fsdp2, each its part of
    weights, gradients and optimizer (torch's fully_shard), or zero1, zero2, whole weights and its
    part of the optimizer, with 2 of gradients too (DeepSpeed). `accelerate launch` may say so."""

    reshard_after_forward: bool = True
    """With fsdp2: gather a layer's weights again for its backward pass. false: keep them in
    between, for more memory and a third less traffic."""

    full_determinism: bool = False
    """Deterministic kernels on GPUs too, at some cost in speed."""

    use_cpu: bool = False
    """Train on the CPU even where there is a GPU."""

    keep_checkpoints: int = at_least(1, default=3)
    """Newest checkpoints kept on this machine; the best is kept besides."""

    keep_every_steps: int | None = at_least(1, default=None)
    """Checkpoints whose step is a multiple of this are kept for ever. null: none."""

    max_unverified: int = at_least(1, default=3)
    """Checkpoints kept while the bucket cannot be reached, before the oldest is given up."""

    save_format: str = one_of(("safetensors", "bin"), default="safetensors")
    """safetensors (model.safetensors) or bin (pytorch_model.bin)."""

    upload_transport: str = one_of(
        ("auto", "python", "gcloud", "gsutil", "directory"), default="auto"
    )
    """How archives travel: python (google-cloud-storage), gcloud, gsutil, or directory. auto takes
    the first of these that can write, read and delete in the bucket."""

    upload_compression: str = one_of(COMPRESSIONS, default="fast")
    """Compression of archives: fast, small or none (tar.gz), or zstd (tar.zst)."""

    upload_streams: int = at_least(1, default=4)
    """Connections of one upload by python, each of which sends parts of 32 MiB. 1: one resumable
    upload without parts, which needs no right to delete."""

    upload_max_mbps: float | None = above_zero(default=None)
    """Megabits per second that uploads may take. null: as fast as it goes."""

    upload_stall_seconds: float = above_zero(default=120.0)
    """An upload that makes no progress for so long is ended and tried again."""

    upload_deadline_seconds: float = at_least(0, default=600.0)
    """How long the end of an attempt waits for uploads."""

    gcs_user_project: str = ""
    """Project that pays for requests to requester-pays buckets."""

    hourly_price: float | None = between(0, 1e9, default=None)
    """Dollars an hour of all machines of the run together. null: machine time is counted, dollars
    are not."""

    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where curves go besides metrics.jsonl: tensorboard, wandb."""

    log_level: str = one_of(("debug", "info", "warning", "error"), default="info")
    """debug, info, warning or error."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_values(vars(self))

    @property
    def data_sources(self) -> list[tuple[str, float]]:
        """(URI, weight) of each source of training data."""
        if isinstance(self.data_uri, str):
            return [(self.data_uri, 1.0)]
        return [(source["uri"], float(source["weight"])) for source in self.data_uri]

    @property
    def bucket_uri(self) -> str:
        """Where the run uploads to, empty for nowhere."""
        return join_uri(self.checkpoint_uri, self.run_name) if self.checkpoint_uri else ""

    @property
    def file_limit(self) -> int | None:
        """Number of training shards to use, None for all."""
        return None if self.max_files in (None, -1) else self.max_files

    @property
    def checkpointing_policy(self) -> str:
        """How activations are recomputed: full, selective, or empty for not at all."""
        return self.gradient_checkpointing_policy if self.gradient_checkpointing else ""

    def resolve_batch(self, world_size: int) -> tuple[int, int]:
        """Return (samples in a step, micro-steps in a step) for a number of ranks.

        Raises:
            ConfigError: `global_batch_size` cannot be divided evenly.
        """
        micro = self.per_device_train_batch_size * world_size
        if self.global_batch_size is None:
            accumulation = self.gradient_accumulation_steps or 1
            return micro * accumulation, accumulation
        accumulation, rest = divmod(self.global_batch_size, micro)
        if rest or accumulation < 1:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is no multiple of "
                f"per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"{world_size} ranks. Change one of them."
            )
        if self.gradient_accumulation_steps not in (None, accumulation):
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} with {world_size} ranks needs "
                f"gradient_accumulation_steps {accumulation}, not "
                f"{self.gradient_accumulation_steps}. Leave it out to have it computed."
            )
        return self.global_batch_size, accumulation

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return asdict(self)


KEY_TYPES = {item.name: str(item.type) for item in fields(TrainingConfig)}
"""Each key, and the type that its value must have."""
_LENGTH_KEYS = ("max_steps", "num_train_epochs")


def get_training_config(
    name: str = "test",
    overrides: Mapping[str, Any] | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> TrainingConfig:
    """Return the configuration of a name or a JSON file.

    `name` is `test`, `production`, any NAME of `configs/NAME.json`, a path to a .json file, or a
    checkpoint's directory. `overrides` come after the file; `model_overrides.KEY` sets one of its
    keys. `recorded` is what the file `name` says of a run, where it has been read already.

    Raises:
        ConfigError: A file, key or value is wrong; the message says where.
    """
    values = read_values(name, overrides or {}, KEY_TYPES, recorded)
    if values.by_key.get("init_from"):
        values.by_key.setdefault("model", "")
    try:
        if values.by_key.get("num_train_epochs") is not None:
            _choose_length(values)
        return TrainingConfig(**values.by_key)
    except ConfigError as exc:
        key = re.split(r"[: ]", str(exc), maxsplit=1)[0]
        known = (values.sources.get(word) for word in (key, key.partition(".")[0]))
        raise ConfigError(f"{next(filter(None, known), values.file)}: {exc}") from exc


def _choose_length(values: ConfigValues) -> None:
    """Leave one of `max_steps` and `num_train_epochs`; a run that has both knows both.

    Raises:
        ConfigError: Somebody has set both.
    """
    typed = [key for key in _LENGTH_KEYS if values.sources.get(key) == COMMAND_LINE]
    if values.is_record and len(typed) < 2:
        for key in _LENGTH_KEYS if typed else ():
            if key not in typed:
                values.by_key.pop(key, None)
    elif values.by_key.pop("max_steps", -1) != -1:
        raise ConfigError(
            "num_train_epochs and max_steps are both set: leave one out. --set max_steps=-1 or "
            "--set num_train_epochs=null takes back what a file says."
        )
