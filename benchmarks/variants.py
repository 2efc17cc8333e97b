"""What each choice is worth: train.py with one setting after the other, tokens a second and MFU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.contestants import OURS
from benchmarks.figures import spread
from benchmarks.training import CASES, EVERYTHING_ON, GPU_SHAPE, PREPARE, run_contestant

PADDED = {"pad_vocab_to_multiple_of": 64}
COMPILED = {**PADDED, "torch_compile": True}

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
}


def measure_variants(folder: Path, runs: int) -> dict[str, str]:
    """Measure every variant, interleaved; one that fails is told of and left out."""
    import torch

    data = folder / "data"
    words = [*PREPARE, "--sample", "--output", str(data), "--quiet"]
    subprocess.run(words, check=True, cwd=folder)  # noqa: S603
    on_gpu = torch.cuda.is_available()
    shape = GPU_SHAPE if on_gpu else CASES["test preset"]["settings"]
    variants = GPU_VARIANTS if on_gpu else CPU_VARIANTS
    found: dict[str, str] = {}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for number in range(runs):
        for name, known in list(results.items()):
            settings = {**EVERYTHING_ON, **shape, **variants[name], "data_uri": str(data)}
            work = folder / f"{number}-{name}".replace(" ", "-").replace(",", "")
            work.mkdir()
            task = {"first_step": 5, "last_step": 25, "folder": str(work), "settings": settings}
            try:
                result = run_contestant(OURS, task)
            except subprocess.CalledProcessError as exc:
                found[name] = f"failed with exit code {exc.returncode}"
                del results[name]
                continue
            finally:
                shutil.rmtree(work, ignore_errors=True)
            tokens = 20 * settings["global_batch_size"] * settings["sequence_length"]
            known.append({**result, "rate": tokens / result["seconds"]})
    for name, known in results.items():
        found[name] = _describe(known, on_gpu=on_gpu)
    return found


def _describe(known: list[dict[str, float]], *, on_gpu: bool) -> str:
    text = spread([result["rate"] for result in known], " tokens/s")
    if on_gpu:
        share = max(result["rate"] for result in known) * _flops_per_token() / _peak_flops()
        peak = max(result["peak_bytes"] for result in known)
        text += f", MFU {share:.1%} at best, {peak / 2**30:.1f} GiB"
    return text


def _flops_per_token() -> float:
    from configs.model_presets import PRESETS
    from utils.models.mfu import flops_per_token

    preset = PRESETS[GPU_SHAPE["model"]]
    layers, hidden = (preset.values[key] for key in ("num_hidden_layers", "hidden_size"))
    return flops_per_token(preset.parameters, layers, hidden, GPU_SHAPE["sequence_length"])


def _peak_flops() -> float:
    """Return the dense 16-bit peak; float8 is held against the same."""
    import torch

    from utils.models.mfu import find_peak_flops

    return find_peak_flops(torch.cuda.get_device_name(), "bf16") or float("nan")
