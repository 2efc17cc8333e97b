"""The loss of a large vocabulary: memory and time without the logits of all tokens, and with them.

    python -m benchmarks.loss KIND

Each kind runs in a process of its own, so that the peak is its own.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures import ratios, run_module, spread, timed

VOCABULARY = 50257
# Tokens and width: on a CPU the 70M preset's, on a GPU those of eight samples of the 1.2B one.
CPU_SIZE, GPU_SIZE = (2048, 512), (8 * 2048, 2048)
REPEATS = 5
PEER = "all logits at once"


def measure_loss(folder: Path, runs: int) -> dict[str, str]:
    """Return peak memory and time of loss and gradients, by kind; `folder` is not used."""
    import torch

    is_in_torch = hasattr(torch.nn.functional, "linear_cross_entropy")
    optional = {"chunked, compiled": torch.cuda.is_available(), "torch": is_in_torch}
    kinds = ["chunked", *(kind for kind, is_there in optional.items() if is_there), PEER]
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind, known in results.items():
            # GOMP_SPINCOUNT as train.py has it.
            known.append(run_module("loss", kind, GOMP_SPINCOUNT="10000"))
    found = {}
    peak, seconds = (
        {kind: [one[key] for one in known] for kind, known in results.items()}
        for key in ("bytes", "seconds")
    )
    for kind in kinds:
        found[f"{kind}: peak memory"] = spread(peak[kind], " MiB", 2**20)
        found[f"{kind}: forward and backward"] = spread(seconds[kind], " ms", 1e-3)
        if kind != PEER:
            found[f"{kind}: times less memory"] = spread(ratios(peak[PEER], peak[kind]))
            found[f"{kind}: times the time"] = spread(ratios(seconds[kind], seconds[PEER]))
    return found


def run(kind: str) -> dict[str, float]:
    """Return the peak bytes above the inputs and their gradients, and the best time."""
    import torch

    from utils.base.machine import PeakMemory

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    tokens, width = GPU_SIZE if on_gpu else CPU_SIZE
    generator = torch.Generator(device).manual_seed(1)
    hidden, weight = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        .mul_(0.02)
        .to(dtype)
        .requires_grad_()
        for shape in ((tokens, width), (VOCABULARY, width))
    )
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator, device=device)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    loss_of = _build(kind)

    def step() -> None:
        torch.autograd.backward(loss_of(hidden, weight, targets))
        if on_gpu:
            torch.cuda.synchronize()

    peak, before = PeakMemory(), 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = min(timed(step) for _ in range(REPEATS))
    used = torch.cuda.max_memory_allocated() - before if on_gpu else peak.read()
    return {"bytes": float(used), "seconds": seconds}


def _build(kind: str) -> Any:
    """Return the loss of a kind: (hidden, weight, targets) -> scalar."""
    import torch
    from torch.nn import functional

    from utils.models.losses import chunk_cross_entropy, linear_cross_entropy

    if kind == "chunked":
        return linear_cross_entropy
    if kind == "chunked, compiled":
        return partial(linear_cross_entropy, cross_entropy=torch.compile(chunk_cross_entropy))
    if kind == "torch":
        options = torch.nn.LinearCrossEntropyOptions()
        return partial(functional.linear_cross_entropy, options=options)
    # As transformers does it: ForCausalLMLoss.
    return lambda h, w, t: functional.cross_entropy(functional.linear(h, w).float(), t)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
