"""Memory: the peak of real training steps against the estimate, by preset and micro-batch.

Each measurement is a process of its own. On a CPU it is resident memory above the state before the
model is built, on a GPU `max_memory_allocated`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.figures import run_module

STEPS = 3  # the optimizer's moments are there from the second on
CPU_CASES = {"neox-tiny": (1, 4, 8), "pythia-70m": (1, 2, 4), "pythia-160m": (1, 2, 4)}
GPU_CASES = {"pythia-160m": (4, 8, 16), "pythia-1b": (1, 4, 8), "refocused-1.2b": (1, 4, 8)}
CPU_SEQUENCE_LENGTH, GPU_SEQUENCE_LENGTH = 512, 2048


def measure_memory(folder: Path, runs: int) -> dict[str, str]:
    """Compare the estimate with what real steps take; memory does not vary, so each runs once."""
    import torch

    del runs
    on_gpu = torch.cuda.is_available()
    cases, length = (GPU_CASES, GPU_SEQUENCE_LENGTH) if on_gpu else (CPU_CASES, CPU_SEQUENCE_LENGTH)
    found = {}
    for preset, micro_batch in ((preset, one) for preset, each in cases.items() for one in each):
        result = measure_peak(folder, preset, micro_batch, length)
        measured, estimated = (result[key] / 1e6 for key in ("measured", "estimated"))
        found[f"{preset}, {micro_batch} x {length}"] = (
            f"measured {measured:,.0f} MB, estimated {estimated:,.0f} MB, "
            f"ratio {estimated / measured:.3f}"
        )
    return found


def measure_peak(
    folder: Path, preset: str, micro_batch: int, sequence_length: int, **settings: Any
) -> dict[str, Any]:
    """Return `measured` and `estimated` bytes of a run's steps, from a process of its own."""
    values = {
        "model": preset,
        "per_device_train_batch_size": micro_batch,
        "sequence_length": sequence_length,
        "report_to": [],
        **settings,
    }
    result: dict[str, Any] = run_module("memory", str(folder), json.dumps(values))
    return result


def _train(folder: Path, values: dict[str, Any]) -> dict[str, int]:
    """Return the peak of a few steps above what was there before the model, and the estimate."""
    import torch

    from configs.model_config import build_model_config
    from configs.training_config import TrainingConfig
    from utils.base.machine import PeakMemory
    from utils.models.building import count_parameters
    from utils.models.estimates import ModelShape, StepSetup, estimate_training_memory
    from utils.training_utils import (
        build_accelerator,
        build_train_state,
        resolve_precision,
        train_step,
    )

    config = TrainingConfig(**values)
    model_config = build_model_config(
        config.model,
        config.model_overrides,
        config.sequence_length,
        config.pad_vocab_to_multiple_of,
    )
    counts = count_parameters(model_config)
    precision = resolve_precision(config)
    accelerator = build_accelerator(config, precision, [], folder)
    device, (samples, accumulation) = accelerator.device, config.resolve_batch(1)
    model_shape = ModelShape.of(model_config, counts.total, counts.embedding)
    setup = StepSetup.of(config, model_shape.kind, precision, device.type, accumulation)
    estimate = estimate_training_memory(model_shape, setup)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (samples // accumulation, config.sequence_length)
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    state = build_train_state(accelerator, model_config, config)
    for _ in range(STEPS):
        batches = [
            torch.randint(0, model_config.vocab_size, shape, generator=generator)
            for _ in range(accumulation)
        ]
        train_step(state, batches, config.max_grad_norm)
    measured = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak.read()
    return {"measured": int(measured), "estimated": estimate.total}


if __name__ == "__main__":
    print(json.dumps(_train(Path(sys.argv[1]), json.loads(sys.argv[2]))))
