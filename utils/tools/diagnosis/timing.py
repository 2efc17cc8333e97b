"""How fast a device is: a training step of a small model.

    Torch -> devices -> Timing

It imports torch, so only the process that is asked about torch imports it. A device that fails has
the reason in `problem`, and the next one is timed. It takes some 2 s on a CPU, less on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from utils.base.errors import first_line
from utils.models.mfu import flops_per_token
from utils.tools.diagnosis.facts import Timing, Torch, TorchGpu

MAX_REPEATS = 20
REPEAT_SECONDS = 1.5
# Vocabulary, width, layers, heads, sequence length, micro-batch. The first has the sizes of
# configs/test.json; the second takes some 5 GiB.
SMALL_SIZES = (4096, 256, 4, 4, 512, 1)
LARGE_SIZES = (16384, 1024, 4, 16, 1024, 8)
LARGE_BYTES = 6 * 2**30
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def time_devices(facts: Torch) -> Iterator[Timing]:
    """Yield the speed of each device that training can use, the CPU first."""
    yield time_device("cpu")
    for gpu in facts.gpus:
        yield time_device(f"cuda:{gpu.index}", gpu)
    if facts.is_mps_available:
        yield time_device("mps")


def time_device(device: str, gpu: TorchGpu | None = None) -> Timing:
    """Return the speed of a device, or why it has none; `gpu` is what torch says of a GPU."""
    precision = gpu.precision if gpu else "no"
    timing = Timing(device, precision)
    try:
        has_room = gpu is not None and (gpu.memory_free_bytes or 0) >= LARGE_BYTES
        return _time_step(timing, LARGE_SIZES if has_room else SMALL_SIZES)
    except Exception as exc:  # noqa: BLE001 - no code for this GPU, no memory, a broken driver
        return replace(timing, problem=f"the training step failed: {first_line(exc)}")


def _time_step(timing: Timing, sizes: tuple[int, int, int, int, int, int]) -> Timing:
    """Add the time of forward, backward and AdamW of a small model."""
    vocabulary, width, layers, heads, length, samples = sizes
    device, precision = timing.device, timing.precision
    # Four matrices a layer, LayerNorm before each half, as in GPT-NeoX.
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    embedding, head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
    model = nn.ModuleList([embedding, encoder, head]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    mask = nn.Transformer.generate_square_subsequent_mask(length, device=torch.device(device))
    batch = torch.randint(vocabulary, (samples, length)).to(device)

    def step() -> torch.Tensor:
        kind = device.partition(":")[0]
        with torch.autocast(kind, TYPES[precision]) if precision != "no" else nullcontext():
            logits = head(encoder(embedding(batch), mask=mask, is_causal=True))
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss

    seconds, loss = _time_best(device, step)
    if not loss.isfinite():
        raise RuntimeError(f"the loss is {loss.item()}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rate = samples * length / seconds
    return replace(
        timing,
        parameters=parameters,
        step_seconds=seconds,
        tokens_per_second=rate,
        step_tflops=rate * flops_per_token(parameters, layers, width, length) / 1e12,
    )


def _time_best(device: str, compute: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Return (seconds of the quickest of several times, result); the first one loads kernels."""
    times: list[float] = []
    end = time.perf_counter() + REPEAT_SECONDS
    while len(times) < 2 or (len(times) < MAX_REPEATS and time.perf_counter() < end):
        begin = time.perf_counter()
        result = compute()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        elif device == "mps":
            torch.mps.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times), result
