"""What is to be trained, and where: built first, and looked at by every check before a run.

configuration -> precision, Accelerator -> model (of `init_from`), its size -> RunFacts
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from accelerate import Accelerator

from configs.config_changes import list_changes
from configs.model_config import (
    build_model_config,
    find_model_changes,
    is_model_file,
    known_vocab_size,
)
from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.errors import ConfigError
from utils.base.startup import keep_freed_memory
from utils.checkpoints.layout import RunPaths
from utils.data.shard_index import DataSource
from utils.data.token_stream import choose_samples
from utils.models.building import (
    ParameterCounts,
    count_parameters,
    find_shapes,
    require_kernels,
)
from utils.models.check import require_language_model
from utils.models.estimates import estimate_checkpoint_bytes
from utils.models.mfu import Utilization
from utils.remote.base import Base, find_base
from utils.start.checks import Check
from utils.start.resume import Plan, find_recorded_base, look_for_start
from utils.tracking import tracking
from utils.training_utils import build_accelerator, find_utilization, resolve_precision


@dataclass(frozen=True)
class RunFacts:
    """What is to be trained, and where.

    `precision` is no, bf16 or fp16, `device` where this rank trains, `step` the number of steps
    done. The first of `sources` has the validation data; they are empty before they have been read.
    `base` is the model of `init_from`; `look` what `look_for_start` said, if it was asked for that.
    """

    config: TrainingConfig
    model_config: Any
    counts: ParameterCounts
    precision: str
    device: torch.device
    world_size: int
    step: int = 0
    sources: Sequence[DataSource] = ()
    base: Base | None = None
    look: tuple[Plan, list[Check]] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows."""
        return known_vocab_size(self.model_config)

    def with_data(self, step: int, sources: Sequence[DataSource]) -> RunFacts:
        """Return the facts with what the data say: `num_train_epochs` becomes `max_steps`."""
        config = self.config
        if config.num_train_epochs is not None and sources:
            length = config.sequence_length
            samples = sum(source.index.training_tokens // length for source in sources)
            # As it is written: 0.07 is a little more than 7/100.
            wanted = Fraction(str(config.num_train_epochs)) * samples
            config = replace(config, max_steps=max(1, math.ceil(wanted / self.samples_per_step)))
        return replace(self, config=config, step=step, sources=sources)

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimizer update over all ranks."""
        return self.config.resolve_batch(self.world_size)[0]

    @property
    def accumulation(self) -> int:
        """Micro-steps of an optimizer update."""
        return self.config.resolve_batch(self.world_size)[1]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer update over all ranks."""
        return self.samples_per_step * self.config.sequence_length

    @property
    def utilization(self) -> Utilization:
        """What the run's MFU is computed with."""
        return find_utilization(
            self.model_config,
            self.counts.total,
            self.config.sequence_length,
            self.device,
            self.precision,
            self.world_size,
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint, about."""
        counts = self.counts
        return estimate_checkpoint_bytes(counts.total, counts.embedding, self.config.optim)

    @property
    def evaluation_samples(self) -> int:
        """Samples of one evaluation."""
        if not self.sources:
            return 0
        tokens = sum(shard.tokens for shard in self.sources[0].index.validation)
        length, limit = self.config.sequence_length, self.config.max_eval_samples
        return len(choose_samples(tokens, length, limit))


def build(config: TrainingConfig, resume: str | None = None) -> tuple[RunFacts, Accelerator]:
    """Return what is to be trained, and this process among the ranks; every rank calls this.

    `resume` is what to go on from, as the user says it.

    Raises:
        ConfigError: This machine or the launched ranks cannot train what is asked for, or it is
            no language model that can be trained here.
        PretrainError: The model of `init_from` cannot be had.
    """
    precision = resolve_precision(config)
    world_size = ranks.launched_world_size()
    config.resolve_batch(world_size)
    paths, accelerator, look, base = RunPaths.of(config), None, None, None
    if config.init_from:  # the main process alone looks for it: the ranks have to have met
        accelerator = _connect(config, precision, paths)
        look, base = ranks.compute_on_main(lambda: _find_base(config, resume))
    model_config = _build_model_config(config, base)
    counts = count_parameters(model_config)
    if base is not None or is_model_file(config.model):
        require_language_model(
            model_config,
            attention=config.attn_implementation,
            mask_documents=config.mask_documents,
        )
    accelerator = accelerator or _connect(config, precision, paths)
    device = accelerator.device
    require_kernels(config, model_config, precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    facts = RunFacts(config, model_config, counts, precision, device, world_size)
    return replace(facts, base=base, look=look), accelerator


def _connect(config: TrainingConfig, precision: str, paths: RunPaths) -> Accelerator:
    trackers = tracking.build_trackers(config, paths.metrics)
    accelerator = build_accelerator(config, precision, trackers, paths.logs)
    ranks.connect_host_group()
    return accelerator


def _find_base(
    config: TrainingConfig, resume: str | None
) -> tuple[tuple[Plan, list[Check]] | None, Base]:
    look = None if resume is None else look_for_start(config, resume, fresh=False)
    recorded = None if look is None else find_recorded_base(look[0])
    return look, find_base(config) if recorded is None else Base(recorded)


def _build_model_config(config: TrainingConfig, base: Base | None) -> Any:
    """Return the model config of a run; refuse one that has other weights than `base`."""
    values = config.model_overrides, config.sequence_length, config.pad_vocab_to_multiple_of
    if base is None:
        return build_model_config(config.model, *values)
    name, found = config.init_from, base.record["config"]
    model_config = build_model_config(name, *values, found=found)
    if config.model:
        named = build_model_config(config.model, *values)
        changes = find_model_changes(json.loads(named.to_json_string()), model_config)
        if changes != {}:
            told = "; ".join(list_changes(changes or {})[:3]) or "its values"
            raise ConfigError(
                f"model {config.model} is another one than that of init_from {name}: {told}. "
                "init_from says what the model is: leave model out, or --set model= where a file "
                "has one."
            )
    there, here = find_shapes(build_model_config(name, found=found)), find_shapes(model_config)
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            raise ConfigError(
                f"model_overrides or pad_vocab_to_multiple_of change the shape of {key}: "
                f"{there.get(key, 'none')} in init_from {name}, {here.get(key, 'none')} here. The "
                "weights would not fit: leave them out."
            )
    return model_config
