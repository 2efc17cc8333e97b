"""Where the time of a step goes: operators by their own time, and the share of matrix products."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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

CASES: dict[str, dict[str, Any]] = {
    "test preset": {"sequence_length": 512, "global_batch_size": 4},
    "70M": {"model": "pythia-70m", "sequence_length": 512, "global_batch_size": 1},
}
GPU_CASES: dict[str, dict[str, Any]] = {
    name: {
        "model": "refocused-1.2b",
        "sequence_length": 2048,
        "per_device_train_batch_size": 8,
        "global_batch_size": 16,
        "pad_vocab_to_multiple_of": 64,
        **extra,
    }
    for name, extra in (("1.2B", {}), ("1.2B compiled", {"torch_compile": True}))
}


def measure_profile(folder: Path, runs: int) -> dict[str, str]:
    """Profile a few steps of each case; `runs` is not used."""
    import torch

    found: dict[str, str] = {}
    for case, settings in (GPU_CASES if torch.cuda.is_available() else CASES).items():
        times = profile_steps(folder, settings)
        whole = sum(times.values())
        share = sum(t for name, t in times.items() if is_product(name)) / whole
        found[f"{case}: a step, sum over operators"] = f"{whole / STEPS * 1e3:.1f} ms"
        found[f"{case}: matrix products and attention"] = f"{share:.1%}"
        top = sorted(times.items(), key=lambda item: -item[1])[:SHOWN]
        for name, seconds in top:
            found[f"{case}: {name[:60]}"] = f"{seconds / whole:.1%}"
    return found


def is_product(name: str) -> bool:
    """Tell whether an operator or kernel multiplies matrices, attention's included."""
    return any(word in name.lower() for word in PRODUCTS)


def profile_steps(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Return seconds by operator (on a GPU: by kernel) over `STEPS` train steps of a run."""
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from torch.profiler import ProfilerActivity, profile

    from configs.model_config import build_model_config
    from configs.training_config import get_training_config
    from utils import training_utils

    config = get_training_config("test", {**settings, "cache_dir": str(folder)})
    model_config = build_model_config(
        config.model,
        config.model_overrides,
        config.sequence_length,
        config.pad_vocab_to_multiple_of,
    )
    precision = training_utils.resolve_precision(config)
    training_utils.set_determinism(config)
    try:
        accelerator = training_utils.build_accelerator(config, precision, [], folder)
        state = training_utils.build_train_state(accelerator, model_config, config)
        on_gpu = accelerator.device.type == "cuda"
        shape = (config.per_device_train_batch_size, config.sequence_length)
        _, accumulation = config.resolve_batch(1)

        def steps(count: int) -> None:
            for _ in range(count):
                batches = [torch.randint(4096, shape) for _ in range(accumulation)]
                training_utils.train_step(state, batches, config.max_grad_norm)
            if on_gpu:
                torch.cuda.synchronize()

        steps(WARM_STEPS)
        activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
        with profile(activities=activities) as watched:
            steps(STEPS)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return _own_times(watched.key_averages(), on_gpu=on_gpu)


def _own_times(events: Iterable[Any], *, on_gpu: bool) -> dict[str, float]:
    return {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        for event in events
    }
