"""What each choice is worth: train.py with one setting after the other, tokens a second and MFU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.contestants import OURS
from benchmarks.figures import GPU_SHAPE, prepare_sample, spread
from benchmarks.training import CASES, EVERYTHING_ON, RUN_STEPS
from benchmarks.turns import Contestant
from utils.costs.scaling import shape_of_preset
from utils.models.mfu import find_peak_flops, flops_per_token

PADDED = {"pad_vocab_to_multiple_of": 64}
COMPILED = {**PADDED, "torch_compile": True}
OPTIMIZERS = ("adafactor", "adamw_bnb_8bit", "muon")  # against AdamW, which the others have

CPU_VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "loss with all logits": {"loss_implementation": "model"},
    "compiled by layer": {"torch_compile": True},
    "compiled as a whole": {"torch_compile": True, "use_regional_compilation": False},
    "selective recomputing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_policy": "selective",
    },
    "full recomputing": {"gradient_checkpointing": True},
    **{optim: {"optim": optim} for optim in OPTIMIZERS},
}
GPU_VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "vocabulary padded": PADDED,
    "padded, loss with all logits": {**PADDED, "loss_implementation": "model"},
    "padded, compiled by layer": COMPILED,
    "padded, compiled as a whole": {**COMPILED, "use_regional_compilation": False},
    "the same, micro-batch 16": {**COMPILED, "per_device_train_batch_size": 16},
    "the same, micro-batch 32": {
        **COMPILED,
        "per_device_train_batch_size": 32,
        "global_batch_size": 32,
    },
    "the same, the largest micro-batch": {
        **COMPILED,
        "per_device_train_batch_size": "auto",
        "global_batch_size": 96,
    },
    "compiled, selective recomputing": {
        **COMPILED,
        "gradient_checkpointing": True,
        "gradient_checkpointing_policy": "selective",
        "per_device_train_batch_size": 32,
        "global_batch_size": 32,
    },
    "compiled, fp8": {**COMPILED, "fp8": True},
    **{f"compiled, {optim}": {**COMPILED, "optim": optim} for optim in OPTIMIZERS},
}


def measure_variants(folder: Path, runs: int) -> dict[str, str]:
    """Measure every variant, interleaved; one that fails is named and left out."""
    import torch

    data = str(prepare_sample(folder))
    on_gpu = torch.cuda.is_available()
    shape = GPU_SHAPE if on_gpu else CASES["test preset"]
    variants = GPU_VARIANTS if on_gpu else CPU_VARIANTS
    found: dict[str, str] = {}
    rates: dict[str, list[float]] = {name: [] for name in variants}
    peaks = dict.fromkeys(variants, 0)
    for _ in range(runs):
        for name in list(rates):
            settings = {**EVERYTHING_ON, **shape, **variants[name], "data_uri": data}
            try:
                with Contestant(OURS, settings, folder, turns=1, turn_steps=RUN_STEPS) as one:
                    rates[name].append(one.take_turn())
                    peaks[name] = max(peaks[name], one.peak_bytes)
            except RuntimeError as exc:
                found[name] = f"failed: {exc}"
                del rates[name]
    for name, known in rates.items():
        found[name] = spread(known, " tokens/s")
        if on_gpu:
            # The dense 16-bit peak; float8 is held against the same.
            peak = find_peak_flops(torch.cuda.get_device_name(), "bf16") or float("nan")
            share = max(known) * _flops_per_token() / peak
            found[name] += f", MFU {share:.1%} at best, {peaks[name] / 2**30:.1f} GiB"
    return found


def _flops_per_token() -> float:
    shape, length = shape_of_preset(GPU_SHAPE["model"]), GPU_SHAPE["sequence_length"]
    return flops_per_token(shape.parameters, shape.layers, shape.attention_width, length)
