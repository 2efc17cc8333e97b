"""The train state and the step that moves it: model, optimizer, schedule, counters.

    batches -> train step -> train state

A step is one optimizer update: `accumulation` forward and backward passes (micro-steps), one clip,
one update, one move of the schedule. With fused AdamW nothing here waits for the device but
`mean_loss`, which is asked for at logging steps; other optimizers wait for the step's verdict.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, get_scheduler

from configs.config_checks import LR_FLOORS
from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.errors import ConfigError, first_line
from utils.base.text import number
from utils.models.building import (
    LossModel,
    build_model,
    compile_model,
    find_layers,
    undo_compilation,
)
from utils.models.cpu_products import use_cpu_products
from utils.models.estimates import attention_widths
from utils.models.mfu import Utilization, find_peak_flops, flops_per_token
from utils.training.deepspeed import ZeroPartitioned, require_deepspeed
from utils.training.division import Division, Replicated
from utils.training.fsdp import FullySharded
from utils.training.muon import MuonWithAdamW
from utils.training.sharding import deepspeed_hidden, resolve_sharding
from utils.training.step_guard import GOOD, StepGuard

# Names that mean something else in transformers: its own constant has no warm-up, its own linear
# rounds in another way than runs that were begun here.
_SCHEDULERS: dict[str, tuple[str, dict[str, float]]] = {
    "constant": ("constant_with_warmup", {}),
    "linear": ("polynomial", {"lr_end": 0.0}),
    "polynomial": ("polynomial", {"lr_end": 0.0}),
}
_ABSOLUTE_FLOORS = {"min_lr": "min_lr_rate", "lr_end": "lr_end"}
_ENDLESS_SCHEDULERS = ("constant", "constant_with_warmup", "inverse_sqrt")

log = logging.getLogger(__name__)


def resolve_precision(config: TrainingConfig) -> str:
    """Return `no`, `bf16` or `fp16` for this machine.

    bfloat16 where a GPU has it, float16 with a loss scaler where it has not (T4), none on a CPU.

    Raises:
        ConfigError: The configuration asks for a precision that this device does not have.
    """
    gpu = torch.cuda.is_available() and not config.use_cpu
    mps = torch.backends.mps.is_available() and not config.use_cpu
    gpu_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.fp16 and not gpu:
        raise ConfigError("fp16 needs a CUDA GPU. Set fp16 to false or null.")
    if config.bf16 and gpu and not gpu_bf16:
        name = torch.cuda.get_device_name()
        raise ConfigError(f"{name} has no bfloat16. Set bf16 to null, and fp16 is used.")
    if config.bf16 and mps:
        raise ConfigError("bf16 is not supported on MPS here. Set bf16 to false or null.")
    if config.bf16 or (config.bf16 is None and gpu_bf16 and not config.fp16):
        return "bf16"
    if config.fp16 or (config.fp16 is None and gpu and config.bf16 is None):
        return "fp16"
    return "no"


def build_accelerator(
    config: TrainingConfig, precision: str, trackers: Sequence[Any], logs: Path
) -> Accelerator:
    """Return the Accelerator of this process; the number of ranks comes from the launcher.

    Raises:
        ConfigError: The batch or the state cannot be divided over the ranks as it is asked for.
    """
    world_size = ranks.launched_world_size()
    _, accumulation = config.resolve_batch(world_size)
    require_deepspeed(config, resolve_sharding(config, world_size), precision)
    if config.optim == "adamw_bnb_8bit":
        _import_bitsandbytes()
    cpu = config.use_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    with deepspeed_hidden():
        return Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=accumulation, adjust_scheduler=False, sync_with_dataloader=False
            ),
            project_config=ProjectConfiguration(logging_dir=str(logs)),
            log_with=list(trackers) or None,
        )


def set_determinism(config: TrainingConfig) -> None:
    """Seed Python, NumPy and torch; with `full_determinism` choose deterministic kernels too."""
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    if config.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
        torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():
        tf32 = not config.full_determinism if config.tf32 is None else config.tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32


def _import_bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as exc:
        raise ConfigError(
            "optim=adamw_bnb_8bit needs bitsandbytes, which cannot be imported "
            f"({first_line(exc)}): pip install bitsandbytes. Without it: optim=adamw_torch_fused."
        ) from exc


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer, with decay on matrices only; AdamW is fused where the device has it."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    matrices = [p for p in trainable if p.dim() >= 2]
    vectors = {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0}
    groups = [{"params": matrices, "weight_decay": decay}, vectors]
    adamw: dict[str, Any] = {
        "lr": rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    fused = trainable[0].device.type in ("cuda", "cpu")
    optimizer: torch.optim.Optimizer
    if config.optim == "adamw_torch_fused":
        optimizer = torch.optim.AdamW(groups, fused=fused, **adamw)
    elif config.optim == "adamw_bnb_8bit":
        optimizer = _import_bitsandbytes().optim.AdamW8bit(groups, **adamw)
    elif config.optim == "adafactor":
        optimizer = Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    else:
        in_layers = {id(p) for layer in find_layers(model) for p in layer.parameters()}
        hidden = [p for p in matrices if id(p) in in_layers and p.dim() == 2]
        groups[0]["params"] = [p for p in matrices if id(p) not in in_layers or p.dim() > 2]
        muon = {
            "lr": config.muon_learning_rate or rate,
            "momentum": config.muon_momentum,
            "weight_decay": decay,
        }
        optimizer = MuonWithAdamW(groups, [{"params": hidden}], {**adamw, "fused": fused}, muon)
    return optimizer


def learning_rate_share(config: TrainingConfig) -> Callable[[int], float]:
    """Return what tells the share of the peak learning rate that the step after N done steps uses.

    A schedule of transformers, read one step ahead: there the first step has a rate of 0. It rises
    linearly to 1 at step `warmup_steps`, and ends at `min_lr_rate` where transformers' ends at 0.
    """
    kind, warmup = config.lr_scheduler_type, config.warmup_steps
    name, settings = _SCHEDULERS.get(kind, (kind, {}))
    given = dict(config.lr_scheduler_kwargs)
    for key in _ABSOLUTE_FLOORS.keys() & given.keys():  # the peak is 1 here
        given[_ABSOLUTE_FLOORS[key]] = given.pop(key) / config.learning_rate
    floor = 0.0 if kind in _ENDLESS_SCHEDULERS else config.min_lr_rate
    if kind.endswith("_with_min_lr"):
        given.setdefault("min_lr_rate", floor)
    if given.keys() & LR_FLOORS:
        floor = 0.0  # the schedule's own is in its values
    last = max(config.max_steps, warmup + 1)  # some divide by the steps after the warm-up
    steps = None if "num_stable_steps" in given else last
    peak = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    found = get_scheduler(name, peak, warmup, steps, {**settings, **given})
    schedule = found.lr_lambdas[0]
    ahead = 0 if kind == "cosine_warmup_with_min_lr" else 1  # which begins above 0 itself

    def share(step: int) -> float:
        value = float(schedule(min(step + ahead, last)))
        return value if step < warmup else floor + (1.0 - floor) * value

    return share


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> LambdaLR:
    """Return the learning rate schedule of a run of `max_steps` steps."""
    # A plain function: LambdaLR would save an object's fields and bring back an old max_steps.
    return LambdaLR(optimizer, learning_rate_share(config))


@dataclass
class TrainingProgress:
    """Counters and histories of a run: what a checkpoint keeps besides tensors.

    `sample_index` (the position in the data), `tokens_seen` and `global_batch_size` (of the last
    step) count over all ranks. `best_loss` is the lowest logged training loss, `validation_loss`
    the newest, None where it is not finite. `bad_steps` are those whose update was left out, and
    why, oldest first. `spending` is what the run had taken at the save (`Spending.to_json`); no
    result depends on it. `base` is the trained model that the run began with, None where there was
    none (`utils/remote/base.py`). `history`, every logged metric, is `training_metrics.json`.
    """

    step: int = 0
    sample_index: int = 0
    tokens_seen: int = 0
    global_batch_size: int = 0
    best_loss: float | None = None
    best_loss_step: int = 0
    best_validation_loss: float | None = None
    validation_loss: float | None = None
    validation_step: int = 0
    bad_steps: list[dict[str, Any]] = field(default_factory=list)
    spending: dict[str, Any] | None = None
    base: Mapping[str, Any] | None = None
    history: dict[str, list[Any]] = field(
        default_factory=lambda: {
            "steps": [],
            "loss_history": [],
            "learning_rates": [],
            "grad_norms": [],
            "tokens_per_second": [],
            "validation": [],
        }
    )

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Take one training record into the histories; what is not finite is None there."""
        self.history["steps"].append(self.step)
        self.history["loss_history"].append(number(record["loss"]))
        self.history["learning_rates"].append(record["learning_rate"])
        self.history["grad_norms"].append(number(record["grad_norm"]))
        self.history["tokens_per_second"].append(record["tokens_per_second"])
        best = self.best_loss
        if math.isfinite(record["loss"]) and (best is None or record["loss"] < best):
            self.best_loss, self.best_loss_step = record["loss"], self.step

    def add_validation(self, loss: float) -> bool:
        """Take one evaluation into the histories; tell whether it is the best so far."""
        self.validation_loss, self.validation_step = number(loss), self.step
        self.history["validation"].append(
            {"step": self.step, "validation_loss": self.validation_loss}
        )
        best = self.best_validation_loss
        if not math.isfinite(loss) or (best is not None and loss >= best):
            return False
        self.best_validation_loss = loss
        return True


@dataclass
class TrainState:
    """Everything that a step changes.

    `scheduler` is the plain schedule over the plain optimizer, and `guard` judges each step before
    the optimizer may use it. `interval` has the sum of the losses of the good steps since the last
    logged metrics, over all ranks, and their number: on the device, float32, shape [2]. `grad_norm`
    is that of the last step before clipping, on the device. `tokens_per_second` is the speed at a
    save since the last logged metrics, None where there is no step after them.
    """

    accelerator: Accelerator
    division: Division
    scheduler: LambdaLR
    progress: TrainingProgress
    guard: StepGuard
    interval: torch.Tensor
    grad_norm: torch.Tensor
    last_learning_rate: float = 0.0
    tokens_per_second: float | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The plain optimizer."""
        return self.division.optimizer

    @property
    def learning_rate(self) -> float:
        """Learning rate of the coming step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def utilization(self, sequence_length: int) -> Utilization:
        """Return what the run's MFU is computed with."""
        model, accelerator = self.core_model, self.accelerator
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return find_utilization(
            model.config,
            parameters,
            sequence_length,
            accelerator.device,
            accelerator.mixed_precision,
            accelerator.num_processes,
        )

    @property
    def loss_model(self) -> LossModel:
        """The loss model without wrappers of ranks or compilation."""
        return self.division.loss_model

    @property
    def core_model(self) -> nn.Module:
        """The model of transformers."""
        core: nn.Module = self.loss_model.core
        return core


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def find_utilization(
    model_config: Any,
    num_parameters: int,
    sequence_length: int,
    device: torch.device,
    precision: str,
    world_size: int,
) -> Utilization:
    """Return the FLOPs of a token, and of all devices where their peak is known."""
    peak = find_peak_flops(device_name(device), precision)
    cost = flops_per_token(
        num_parameters,
        model_config.num_hidden_layers,
        attention_widths(model_config)[0],
        sequence_length,
    )
    return Utilization(cost, None if peak is None else peak * world_size)


def build_division(accelerator: Accelerator, config: TrainingConfig) -> Division:
    """Return how the state is to lie over the ranks."""
    how = resolve_sharding(config, accelerator.num_processes)
    if how is None:
        return Replicated(accelerator)
    if how.zero_stage:
        return ZeroPartitioned(accelerator, how.zero_stage, config.per_device_train_batch_size)
    return FullySharded(accelerator, should_reshard=how.reshard_after_forward)


def build_train_state(
    accelerator: Accelerator,
    model_config: Any,
    config: TrainingConfig,
    load_into: Callable[[Any], None] | None = None,
) -> TrainState:
    """Return a train state at step 0.

    `load_into` replaces the weights of the model of transformers, while it is on the CPU.
    """
    model = LossModel(build_model(model_config, config), config.loss_implementation)
    if load_into is not None:
        load_into(model.core)
    has_cpu_products = (
        accelerator.device.type == "cpu"
        and accelerator.mixed_precision == "no"
        and use_cpu_products(model)
    )
    division = build_division(accelerator, config)
    division.place(model)
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config)
    division.prepare(model, optimizer)
    device = accelerator.device
    guard = StepGuard(
        device,
        sigma=config.spike_sigma,
        window=config.spike_window,
        should_check_gradients=accelerator.scaler is None,
        # Fused AdamW leaves everything as it is where `found_inf` is 1; others do not know it.
        is_on_device=device.type == "cuda"
        and accelerator.scaler is None
        and config.optim == "adamw_torch_fused",
    )
    state = TrainState(
        accelerator,
        division,
        scheduler,
        TrainingProgress(),
        guard,
        interval=torch.zeros(2, device=device),
        grad_norm=torch.zeros((), device=device),
    )
    if has_cpu_products and config.torch_compile:
        log.info("Not compiled: oneDNN's matrix products make a step shorter on this processor.")
    elif config.torch_compile:
        _compile(state, config)
    return state


def _compile(state: TrainState, config: TrainingConfig) -> None:
    """Compile the model on a micro-batch of its own; where that fails, go on without."""
    division, model, device = state.division, state.loss_model, state.accelerator.device
    shape = (config.per_device_train_batch_size, config.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    document_end = 0 if config.mask_documents else None
    # The hooks that gather a sharded layer's weights stand between the layers.
    by_layer = config.use_regional_compilation or not division.has_whole_weights
    compile_model(model, by_layer=by_layer)
    started = time.perf_counter()
    reason = ""
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            division.try_backward(forward_loss(model, tokens, document_end))
    except Exception as exc:
        if isinstance(exc, torch.OutOfMemoryError):
            raise
        log.debug("torch.compile failed.", exc_info=True)
        reason = first_line(exc)
        log.warning("torch.compile does not work here, training goes on without: %s", reason)
    if ranks.any_rank(bool(reason)):  # all ranks compute alike
        undo_compilation(model)
    else:
        log.info("Compiled in %.1f s.", time.perf_counter() - started)
    model.zero_grad(set_to_none=True)


def document_positions(input_ids: torch.Tensor, document_end: int) -> torch.Tensor:
    """Return position ids that begin anew after each end-of-text id: int64, shape of `input_ids`.

    transformers takes such position ids without a mask for several documents in one sample, and
    builds an attention that does not cross them.
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = torch.zeros_like(input_ids)
    begins[:, 1:] = torch.where(input_ids[:, :-1] == document_end, places[:, 1:], 0)
    return places - begins.cummax(dim=1).values


def forward_loss(
    model: nn.Module, input_ids: torch.Tensor, document_end: int | None
) -> torch.Tensor:
    """Return the mean loss of a micro-batch, a scalar.

    `input_ids` are int64 [micro-batch, sequence_length] on the device of the model, a `LossModel`,
    wrapped or not. `document_end` is the end-of-text id where attention must not cross documents.
    """
    positions = None if document_end is None else document_positions(input_ids, document_end)
    loss: torch.Tensor = model(input_ids, positions)
    return loss


def train_step(
    state: TrainState,
    batches: Sequence[torch.Tensor],
    max_grad_norm: float,
    document_end: int | None = None,
    before_update: Callable[[], None] = lambda: None,
) -> None:
    """Do one optimizer update, unless the guard finds the step bad.

    `batches` are this rank's micro-batches: int64 [micro-batch, sequence_length] each. Gradients
    are scaled down to `max_grad_norm`; 0 leaves them. `before_update` is called when all gradients
    are there and nothing is changed yet.
    """
    accelerator, division, progress = state.accelerator, state.division, state.progress
    step_loss = torch.zeros((), device=accelerator.device)
    for input_ids in batches:
        input_ids = input_ids.to(accelerator.device, non_blocking=True)
        with division.micro_step():
            loss = forward_loss(division.model, input_ids, document_end)
            division.backward(loss)
            step_loss += loss.detach().float() / len(batches)
    step_loss = accelerator.reduce(step_loss, "mean")
    state.grad_norm = division.clip(max_grad_norm if max_grad_norm > 0 else math.inf)
    code = state.guard.judge(progress.step + 1, step_loss, state.grad_norm)
    good = code == GOOD
    state.interval += torch.stack([torch.where(good, step_loss, 0.0), good.float()])
    state.last_learning_rate = state.learning_rate
    before_update()
    _update(state, code)
    division.zero_grad()
    samples = sum(len(batch) for batch in batches) * accelerator.num_processes
    progress.step += 1
    progress.global_batch_size = samples
    progress.sample_index += samples
    progress.tokens_seen += samples * batches[0].shape[1]


def _update(state: TrainState, code: torch.Tensor) -> None:
    """Move weights and schedule; a step that the guard found bad moves the schedule alone."""
    optimizer: Any = state.optimizer
    if state.guard.is_on_device:
        # What a loss scaler does: the fused kernel leaves everything as it is where this is 1.
        optimizer.grad_scale, optimizer.found_inf = None, (code != GOOD).float()
        state.division.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif int(code.item()) == GOOD:
        state.division.step()
        if state.accelerator.optimizer_step_was_skipped:  # float16 overflow: the scale is adapted
            return
    elif state.accelerator.scaler is not None:
        state.accelerator.scaler.update()
    with warnings.catch_warnings():
        # torch warns when the very first update is left out.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        state.scheduler.step()


def mean_loss(state: TrainState) -> float:
    """Return the mean loss of the good steps since the last logged metrics, over all ranks."""
    total, count = state.interval.tolist()
    return float(total / count) if count else math.nan
