"""DeepSpeed ZeRO, stages 1 and 2: whole weights on each rank, everything else in parts.

    loss model, AdamW -> DeepSpeed's engine -> train step; rows of this rank -> checkpoint

The engine reduces gradients, updates the rank's partition of the float32 weights, and gathers the
whole ones (Rajbhandari et al. 2020, ZeRO). What the project promises is kept around it: gradients
are clipped and judged here before it may step, nothing in a step waits for the device, and
checkpoints are rows of named tensors, as of any other strategy. Its own checkpoints, loss scaler,
schedules and clipping are not used. It is applied here and not through `Accelerator.prepare`, which
steps within the last backward pass, before a step can be judged.

Stage 1: weights in float32, products in 16 bits by autocast, as with DDP; gradients are reduced
once a step. Stage 2: weights in 16 bits, their float32 originals in parts; gradients are reduced in
each micro-step, in float32, and only the rank's part of them is kept.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from packaging.version import Version
from torch import nn

from configs.training_config import TrainingConfig
from utils.base.errors import ConfigError
from utils.models.building import LossModel
from utils.models.estimates import ZERO_BUCKET_ELEMENTS
from utils.models.parts import RowRanges
from utils.training.division import (
    SNAPSHOT_MARGIN_BYTES,
    Division,
    HeldState,
    require_same_names,
)
from utils.training.flat_partition import FlatGroup, Fragment
from utils.training.sharding import FSDP2_FILE, Sharding

OLDEST_VERSION = "0.19.8"
"""The oldest that this was tried with; it has `compute_grad_norm`."""
MASTER = "master"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def require_deepspeed(config: TrainingConfig, how: Sharding | None, precision: str) -> None:
    """Where DeepSpeed is asked for, refuse what it cannot do here.

    Raises:
        ConfigError: The package is missing, or a setting does not go with it.
    """
    if how is None or not how.zero_stage:
        return
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or Version(version) < Version(OLDEST_VERSION):
        found = f"{version} is installed" if version else "which is not installed"
        raise ConfigError(
            f"{how.source} needs DeepSpeed, {found}: pip install 'deepspeed>={OLDEST_VERSION}'. "
            f"Without it: {FSDP2_FILE}, or --set sharding=fsdp2."
        )
    if precision == "fp16":
        raise ConfigError(
            f"{how.source} does not go with fp16: its loss scaler waits for the device in each "
            "step. Use bf16, or sharding=fsdp2."
        )
    if config.fp8:
        raise ConfigError(f"{how.source} does not go with fp8. Use sharding=fsdp2, or fp8=false.")


class ZeroPartitioned(Division):
    """Each rank holds whole weights, and DeepSpeed's flat partitions of all the rest."""

    def __init__(self, accelerator: Accelerator, stage: int, micro_batch: int) -> None:
        super().__init__(accelerator)
        self._stage, self._micro_batch = stage, micro_batch
        self._rank = accelerator.process_index

    def prepare(self, model: LossModel, optimizer: torch.optim.Optimizer) -> None:
        """Take over the placed model, float32, and AdamW over its weights.

        The weights become 16-bit ones where the stage wants them, and AdamW comes to hold this
        rank's partition of each group.
        """
        accelerator = self._accelerator
        self.loss_model, self.optimizer = model, optimizer
        named = {id(p): name for name, p in model.core.named_parameters()}
        self._parameters = [list(group["params"]) for group in optimizer.param_groups]
        self._names = [[named[id(p)] for p in group] for group in self._parameters]
        originals = [[p.data for p in group] for group in self._parameters]
        wrapped: nn.Module = model
        if self._stage == 1:
            # Only wraps the forward in autocast; DistributedDataParallel would be next.
            wrapped = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        half = accelerator.mixed_precision == "bf16" and self._stage == 2
        config = _engine_config(self._stage, self._micro_batch, half=half)
        self.model = _initialize(wrapped, optimizer, config, accelerator.device)
        self._zero: Any = self.model.optimizer
        self._groups = [
            FlatGroup(
                tuple(tuple(p.shape) for p in group),
                int(self._zero.partition_size[index]),
                accelerator.num_processes,
            )
            for index, group in enumerate(self._parameters)
        ]
        self._require_known_layout()
        if half:
            self._fill_masters(
                lambda group, fragment: originals[group][fragment.index].flatten()[
                    fragment.begin : fragment.end
                ]
            )

    def _require_known_layout(self) -> None:
        """Refuse a DeepSpeed that lays the weights out in another way than is known here."""
        for group, layout in zip(self._parameters, self._groups, strict=True):
            known = {f.index: (f.begin, f.end) for f in layout.fragments(self._rank)}
            found = {}
            for index, parameter in enumerate(group):
                mapping = parameter._hp_mapping
                if mapping is not None:
                    address = mapping.lp_fragment_address
                    found[index] = (address.start, address.start + address.numel)
            if known != found:
                raise ConfigError(
                    "This version of DeepSpeed divides weights in a way that is not known here. "
                    f"Install {OLDEST_VERSION}, or use sharding=fsdp2."
                )

    @contextlib.contextmanager
    def micro_step(self) -> Iterator[None]:
        """Tell the engine which backward pass is the step's last."""
        with self._accelerator.accumulate():
            self.model.set_gradient_accumulation_boundary(self._accelerator.sync_gradients)
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Do the backward pass of a micro-step; it counts for its share of the step."""
        share = loss / self._accelerator.gradient_accumulation_steps
        self.model.backward(share, scale_wrt_gas=False)

    def try_backward(self, loss: torch.Tensor) -> None:
        """Do a backward pass without the engine's hooks, which would reduce gradients."""
        torch.autograd.grad(loss, list(self.loss_model.parameters()), allow_unused=True)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the reduced gradients down to a norm; return what it was, on every rank."""
        groups = self._zero.averaged_gradients  # this rank's parts, reduced, padded with zeros
        gradients = [gradient for index in sorted(groups) for gradient in groups[index]]
        squares = torch.nn.utils.get_total_norm(gradients).float().square()
        torch.distributed.all_reduce(squares)
        norm = squares.sqrt()
        if math.isfinite(max_norm):
            torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def step(self) -> None:
        """Update this rank's partition and gather the whole weights."""
        self.model.step()

    def zero_grad(self) -> None:
        """Drop gradients that no update has used; the engine drops the others itself."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        for index in zero.averaged_gradients:
            zero.averaged_gradients[index] = None
        for index in zero.all_grad_tensors:
            zero.all_grad_tensors[index] = None

    def snapshot_bytes(self) -> int:
        """Return the bytes of a snapshot: this rank's partitions, and a margin."""
        elements = sum(g.partition_size + g.longest_head for g in self._groups)
        return elements * 4 * (1 + len(_MOMENTS)) + SNAPSHOT_MARGIN_BYTES

    @property
    def rows(self) -> RowRanges:
        """The rows of weights and moments that cover this rank's partitions."""
        ranges, first = {}, 0
        for names, layout in zip(self._names, self._groups, strict=True):
            covering = layout.covering_rows(self._rank)
            for index, (name, shape) in enumerate(zip(names, layout.shapes, strict=True)):
                rows = covering.get(index, (0, 0))
                for key in (name, *(f"{first + index}.{moment}" for moment in _MOMENTS)):
                    if shape:
                        ranges[key] = rows
            first += len(names)
        return RowRanges(ranges)

    def held_state(self) -> HeldState:
        """Return this rank's rows; every rank calls this at the same point.

        Tensors are the live ones, but for those whose last row the next rank has the end of.
        """
        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, torch.Tensor] = {}
        shapes, ranges, first = {}, {}, 0
        for index, (names, layout) in enumerate(zip(self._names, self._groups, strict=True)):
            flats = self._flat_state(index)
            heads = _gather_heads(list(flats.values()), layout)
            for place, rows in layout.own_rows(self._rank).items():
                for number, (key, flat) in enumerate(flats.items()):
                    is_weight = key == MASTER
                    name = names[place] if is_weight else f"{first + place}.{key}"
                    held = weights if is_weight else moments
                    held[name] = _cut_rows(flat, heads[number], layout, self._rank, place)
                    shapes[name], ranges[name] = layout.shapes[place], rows
            first += len(names)
        return HeldState(weights, self._optimizer_rest(), moments, shapes, RowRanges(ranges))

    def _flat_state(self, index: int) -> dict[str, torch.Tensor]:
        """Return a group's partitions: weights, and moments where there are any yet."""
        master = self._zero.single_partition_of_fp32_groups[index]
        state = self.optimizer.state.get(master, {})
        moments = {key: state[key] for key in _MOMENTS if key in state}
        return {MASTER: master.detach(), **moments}

    def _optimizer_rest(self) -> dict[str, Any]:
        """Return the state dict of AdamW over named weights, without its moments."""
        groups, state, first = [], {}, 0
        for index, group in enumerate(self.optimizer.state_dict()["param_groups"]):
            numbers = list(range(first, first + len(self._names[index])))
            groups.append({**group, "params": numbers})
            master = self._zero.single_partition_of_fp32_groups[index]
            counter = self.optimizer.state.get(master, {}).get("step")
            if counter is not None:
                # Each its own: fused AdamW of whole weights counts in every one of them.
                state.update({number: {"step": counter.clone()} for number in numbers})
            first += len(numbers)
        return {"state": state, "param_groups": groups}

    def restore(self, weights: Mapping[str, torch.Tensor], optimizer: dict[str, Any]) -> None:
        """Bring back the rows of `rows`; every rank calls this at the same point.

        Raises:
            ValueError: They are not those of this model.
        """
        self._restore_buffers(weights)
        layouts = self._groups
        self._fill_masters(
            lambda group, fragment: _elements(
                weights[self._names[group][fragment.index]], layouts[group], fragment
            )
        )
        state: dict[int, dict[str, Any]] = {}
        groups, first = [], 0
        for index, (group, layout) in enumerate(
            zip(optimizer["param_groups"], layouts, strict=True)
        ):
            if optimizer["state"]:
                values = [optimizer["state"][first + place] for place in range(len(layout.shapes))]
                state[index] = self._flat_moments(index, values)
            groups.append({**group, "params": [index]})
            first += len(layout.shapes)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _restore_buffers(self, weights: Mapping[str, torch.Tensor]) -> None:
        names = {name for group in self._names for name in group}
        buffers = {
            key: t
            for key, t in self.loss_model.core.state_dict(keep_vars=True).items()
            if not isinstance(t, nn.Parameter)
        }
        require_same_names(names | buffers.keys(), set(weights))
        for name, buffer in buffers.items():
            buffer.copy_(weights[name])

    def _flat_moments(self, index: int, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the optimizer's state of a group's partition."""
        layout = self._groups[index]
        state: dict[str, Any] = {"step": values[0]["step"]}
        for key in _MOMENTS:
            state[key] = torch.zeros(layout.partition_size)
            for fragment in layout.fragments(self._rank):
                _place(
                    state[key], fragment, _elements(values[fragment.index][key], layout, fragment)
                )
        return state

    @torch.no_grad()
    def _fill_masters(self, elements: Callable[[int, Fragment], torch.Tensor]) -> None:
        """Set the float32 weights of this rank's partitions, and gather the whole ones."""
        for index, layout in enumerate(self._groups):
            master = self._zero.single_partition_of_fp32_groups[index]
            for fragment in layout.fragments(self._rank):
                _place(master, fragment, elements(index, fragment))
        self._zero.update_lp_params()


def _place(flat: torch.Tensor, fragment: Fragment, elements: torch.Tensor) -> None:
    flat.narrow(0, fragment.offset, fragment.end - fragment.begin).copy_(elements)


def _elements(rows: torch.Tensor, layout: FlatGroup, fragment: Fragment) -> torch.Tensor:
    """Return a fragment of a tensor of which the rows that cover it are there.

    Raises:
        ValueError: The tensor has another shape.
    """
    shape, length = layout.shapes[fragment.index], layout.row_length(fragment.index)
    first = fragment.begin // length
    count = -(-fragment.end // length) - first
    if tuple(rows.shape) != ((count, *shape[1:]) if shape else ()):
        raise ValueError(f"rows of shape {list(rows.shape)} for {count} of {list(shape)}")
    begin = fragment.begin - first * length
    return rows.flatten()[begin : begin + fragment.end - fragment.begin]


def _gather_heads(flats: list[torch.Tensor], layout: FlatGroup) -> list[list[torch.Tensor]]:
    """Return, by tensor, the heads of all ranks' partitions; empty where no row is divided."""
    longest = layout.longest_head
    if not longest:
        return [[] for _ in flats]
    own = torch.stack([flat[:longest] for flat in flats])
    gathered = [torch.empty_like(own) for _ in range(layout.count)]
    torch.distributed.all_gather(gathered, own)
    return [[heads[number] for heads in gathered] for number in range(len(flats))]


def _cut_rows(
    flat: torch.Tensor, heads: list[torch.Tensor], layout: FlatGroup, rank: int, index: int
) -> torch.Tensor:
    """Return the rows of a tensor that are this rank's, completed by the next ranks."""
    begin, end = layout.own_rows(rank)[index]
    length, shape = layout.row_length(index), layout.shapes[index]
    fragment = next(f for f in layout.fragments(rank) if f.index == index)
    first = fragment.offset + begin * length - fragment.begin
    held = flat[first : fragment.offset + min(end * length, fragment.end) - fragment.begin]
    rest = layout.following_heads(rank, max(0, end * length - fragment.end))
    if rest:
        held = torch.cat([held, *(heads[following][:count] for following, count in rest)])
    return held.view(end - begin, *shape[1:]) if shape else held.view(())


def _engine_config(stage: int, micro_batch: int, *, half: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration: what is not needed for the partitions is off."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # the train step divides the loss and tells the last
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": ZERO_BUCKET_ELEMENTS,
            "allgather_bucket_size": ZERO_BUCKET_ELEMENTS,
            # It waits for the device in each backward pass.
            "overlap_comm": False,
            "compute_grad_norm": False,
        },
        "bf16": {"enabled": half, "check_grad_overflow": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: torch.device
) -> Any:
    """Return DeepSpeed's engine; what it tells of itself is left out."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    # Of torch, for calls that DeepSpeed makes in each step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.disable(logging.WARNING)
    try:
        import deepspeed

        # It would be compiled at the start, for inference on CPUs.
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
