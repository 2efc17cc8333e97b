"""Where the time of a step goes: operators by their own time, and the share of matrix products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figures import GPU_SHAPE, build_setup

STEPS = 5
WARM_STEPS = 3
SHOWN = 12
PRODUCTS = (
    "mm",
    "linear_pointwise",
    "gemm",
    "matmul",
    "flash",
    "attention",
    "cutlass",
    "nvjet",
    "xmma",
    "wgmma",
)
"""Parts of the names of operators and kernels that multiply matrices, attention's included."""

CASES: dict[str, dict[str, Any]] = {
    "test preset": {"sequence_length": 512, "global_batch_size": 4},
    "70M": {"model": "pythia-70m", "sequence_length": 512, "global_batch_size": 1},
}
PADDED: dict[str, Any] = {**GPU_SHAPE, "pad_vocab_to_multiple_of": 64}
GPU_CASES = {"1.2B": PADDED, "1.2B compiled": {**PADDED, "torch_compile": True}}


def measure_profile(folder: Path, runs: int) -> dict[str, str]:
    """Profile a few steps of each case; `runs` is not used."""
    import torch

    found: dict[str, str] = {}
    for case, settings in (GPU_CASES if torch.cuda.is_available() else CASES).items():
        times = profile_steps(folder, settings)
        whole = sum(times.values())
        products = {
            name: t for name, t in times.items() if any(p in name.lower() for p in PRODUCTS)
        }
        found[f"{case}: a step, sum over operators"] = f"{whole / STEPS * 1e3:.1f} ms"
        found[f"{case}: matrix products and attention"] = f"{sum(products.values()) / whole:.1%}"
        for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:SHOWN]:
            found[f"{case}: {name[:60]}"] = f"{seconds / whole:.1%}"
    return found


def profile_steps(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Return seconds by operator (on a GPU: by kernel) over `STEPS` train steps of a run."""
    from torch.profiler import ProfilerActivity, profile

    from utils.training_utils import train_step

    setup = build_setup(folder, settings)
    on_gpu = setup.accelerator.device.type == "cuda"

    def steps(count: int) -> None:
        for _ in range(count):
            train_step(setup.state, setup.random_batches(), setup.config.max_grad_norm)
        setup.synchronize()

    steps(WARM_STEPS)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as watched:
        steps(STEPS)
    return {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        for event in watched.key_averages()
    }
