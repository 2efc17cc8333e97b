"""The loss of a large vocabulary: memory and time without the logits of all tokens, and with them.

    python -m benchmarks.loss KIND

Each kind runs in a process of its own, so that the peak is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import spread
from configs.training_config import PROJECT_DIRECTORY

VOCABULARY = 50257
# Tokens and width: on a CPU the 70M preset's, on a GPU those of eight samples of the 1.2B one.
CPU_SIZE, GPU_SIZE = (2048, 512), (8 * 2048, 2048)
REPEATS = 5
PEER = "all logits at once"
KINDS = ("chunked", "chunked, compiled", "torch", "liger", PEER)


def measure_loss(folder: Path, runs: int) -> dict[str, str]:
    """Return peak memory and time of loss and gradients, by kind; `folder` is not used."""
    import torch

    kinds = [kind for kind in KINDS if _is_possible(kind, on_gpu=torch.cuda.is_available())]
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind, known in results.items():
            known.append(_measure(kind))
    found = {}
    for kind, known in results.items():
        found[f"{kind}: peak memory"] = spread([r["bytes"] for r in known], " MiB", 2**20)
        found[f"{kind}: forward and backward"] = spread([r["seconds"] * 1e3 for r in known], " ms")
        if kind != PEER:
            pairs = list(zip(results[PEER], known, strict=True))
            less = [peer["bytes"] / own["bytes"] for peer, own in pairs]
            longer = [own["seconds"] / peer["seconds"] for peer, own in pairs]
            found[f"{kind}: times less memory"] = spread(less)
            found[f"{kind}: times the time"] = spread(longer)
    return found


def _is_possible(kind: str, *, on_gpu: bool) -> bool:
    import importlib.util

    from torch.nn import functional

    if kind == "torch":
        return hasattr(functional, "linear_cross_entropy")
    if kind == "liger":
        return on_gpu and importlib.util.find_spec("liger_kernel") is not None
    return on_gpu or kind != "chunked, compiled"


def _measure(kind: str) -> dict[str, float]:
    output = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "benchmarks.loss", kind],
        check=True,
        cwd=PROJECT_DIRECTORY,
        env={**os.environ, "GOMP_SPINCOUNT": "10000"},  # as train.py has it
        stdout=subprocess.PIPE,
    ).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def run(kind: str) -> dict[str, float]:
    """Return the peak bytes above the inputs and their gradients, and the best time."""
    import torch

    from utils.base.machine import PeakMemory

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    tokens, width = GPU_SIZE if on_gpu else CPU_SIZE
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return values.mul_(0.02).to(dtype).requires_grad_()

    hidden, weight = draw(tokens, width), draw(VOCABULARY, width)
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator, device=device)
    loss_of = _build(kind)
    seconds = []
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    peak = PeakMemory()
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(REPEATS):
        begin = _now(on_gpu)
        torch.autograd.backward(loss_of(hidden, weight, targets))
        seconds.append(_now(on_gpu) - begin)
    used = torch.cuda.max_memory_allocated() - before if on_gpu else peak.read()
    return {"bytes": float(used), "seconds": min(seconds)}


def _build(kind: str) -> Any:
    import torch
    from torch.nn import functional

    from utils.models.losses import chunk_cross_entropy, linear_cross_entropy

    if kind == "chunked":
        return linear_cross_entropy
    if kind == "chunked, compiled":
        compiled = torch.compile(chunk_cross_entropy)
        return lambda h, w, t: linear_cross_entropy(h, w, t, cross_entropy=compiled)
    if kind == "torch":
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda h, w, t: functional.linear_cross_entropy(h, w, t, options=options)
    if kind == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda h, w, t: liger_fused_linear_cross_entropy(h, w, t)
    # As transformers does it: ForCausalLMLoss.
    return lambda h, w, t: functional.cross_entropy(functional.linear(h, w).float(), t)


def _now(on_gpu: bool) -> float:
    import torch

    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
