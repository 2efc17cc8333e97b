"""What is to be trained, and where: built first, and looked at by every check before a run.

configuration -> precision, model, its size -> Accelerator -> RunFacts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from configs.model_config import build_model_config, is_model_file, known_vocab_size
from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.startup import keep_freed_memory
from utils.checkpoints.layout import RunPaths
from utils.data.shard_index import DataSource
from utils.data.token_stream import choose_samples
from utils.models.building import ParameterCounts, count_parameters, require_kernels
from utils.models.check import require_language_model
from utils.models.mfu import Utilization
from utils.tracking import tracking
from utils.training_utils import build_accelerator, find_utilization, resolve_precision


@dataclass(frozen=True)
class RunFacts:
    """What is to be trained, and where.

    `precision` is no, bf16 or fp16, `device` where this rank trains, `step` the number of steps
    done. The first of `sources` has the validation data; they are empty before they have been read.
    """

    config: TrainingConfig
    model_config: Any
    counts: ParameterCounts
    precision: str
    device: torch.device
    world_size: int
    step: int = 0
    sources: Sequence[DataSource] = ()

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows."""
        return known_vocab_size(self.model_config)

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
    def evaluation_samples(self) -> int:
        """Samples of one evaluation."""
        if not self.sources:
            return 0
        tokens = sum(shard.tokens for shard in self.sources[0].index.validation)
        length, limit = self.config.sequence_length, self.config.max_eval_samples
        return len(choose_samples(tokens, length, limit))


def build(config: TrainingConfig) -> tuple[RunFacts, Accelerator]:
    """Return what is to be trained, and this process among the ranks; every rank calls this.

    Raises:
        ConfigError: This machine or the launched ranks cannot train what is asked for, or it is
            no language model that can be trained here.
    """
    precision = resolve_precision(config)
    world_size = ranks.launched_world_size()
    config.resolve_batch(world_size)
    model_config = build_model_config(
        config.model,
        config.model_overrides,
        config.sequence_length,
        config.pad_vocab_to_multiple_of,
    )
    counts = count_parameters(model_config)
    if is_model_file(config.model):
        require_language_model(
            model_config,
            attention=config.attn_implementation,
            mask_documents=config.mask_documents,
        )
    paths = RunPaths.of(config)
    trackers = tracking.build_trackers(config, paths.metrics)
    accelerator = build_accelerator(config, precision, trackers, paths.logs)
    device = accelerator.device
    require_kernels(config, model_config, precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    ranks.connect_host_group()
    return RunFacts(config, model_config, counts, precision, device, world_size), accelerator
