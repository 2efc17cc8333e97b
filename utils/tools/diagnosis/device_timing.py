"""How fast a device is: a product of two matrices, and a training step of a small model.

    Torch -> Matmul, TrainingStep, what the driver says under that load -> debug_gpu.py

A device that fails has the reason in `problem`, and the next one is timed. It takes some 3 s on a
CPU, and one or two on each GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.base.errors import first_line
from utils.models.mfu import find_peak_flops, flops_per_token
from utils.tools.diagnosis.diagnosis import ask
from utils.tools.diagnosis.driver_facts import read_moment
from utils.tools.diagnosis.torch_facts import Torch, TorchGpu

if TYPE_CHECKING:
    from utils.tools.diagnosis.sample_model import SampleShape

CPU_MATMUL_SIZE = 1024
GPU_MATMUL_SIZE = 4096
MATMUL_REPEATS = 5
WARM_UP_STEPS = 2
MAX_STEPS = 20
STEP_SECONDS = 1.5
LOAD_SECONDS = 0.5
MAX_LOAD_PRODUCTS = 2000

# Vocabulary, hidden size, layers, heads, sequence length, micro-batch. The first is the model of
# configs/test.json; the second takes some 5 GiB.
SMALL_SHAPE = (4096, 256, 4, 4, 512, 1)
GPU_SHAPE = (16384, 1024, 4, 16, 1024, 8)
GPU_SHAPE_BYTES = 6 * 2**30
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}


@dataclass(frozen=True)
class Matmul:
    """A timed product of two square matrices; the best of a few.

    Attributes:
        peak_share: Of the device's dense peak, None where that is not known.
        problem: Why there is no time.
    """

    device: str
    dtype: str
    size: int
    milliseconds: float | None = None
    tflops: float | None = None
    peak_share: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class TrainingStep:
    """Timed forward, backward and AdamW of a small GPT-NeoX-like model; the best of a few.

    Attributes:
        device: As torch names it.
        precision: Mixed precision: no, bf16 or fp16.
        parameters: Of the model.
        tokens: In a step.
        tflops: FLOPs of training (6N and attention) in a second, in 1e12.
        mfu: Share of the device's dense peak, None where that is not known.
        problem: Why there is no time.
    """

    device: str
    precision: str
    parameters: int = 0
    tokens: int = 0
    milliseconds: float | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Device:
    """What can be timed.

    Attributes:
        name: As torch names it: cpu, cuda:0, mps.
        precision: Mixed precision of training on it.
        gpu: Its facts, None for a CPU or an Apple GPU.
    """

    name: str
    precision: str = "no"
    gpu: TorchGpu | None = None


@dataclass(frozen=True)
class Timing:
    """All figures of one device; `moment` is what the driver said under load."""

    device: str
    matmuls: list[Matmul]
    step: TrainingStep
    moment: Mapping[str, Any]


def find_devices(facts: Torch) -> list[Device]:
    """Return the devices that training can use, the CPU first."""
    if facts.version is None:
        return []
    devices = [Device("cpu")]
    devices += [Device(f"cuda:{gpu.index}", gpu.precision, gpu) for gpu in facts.gpus]
    return [*devices, Device("mps")] if facts.is_mps_available else devices


def time_device(device: Device) -> Timing:
    """Return the figures of a device."""
    matmuls = [_time_matmul(device, "float32")]
    if device.precision != "no":
        matmuls.append(_time_matmul(device, DTYPES[device.precision]))
    step = time_training_step(device, pick_shape(device))
    return Timing(device.name, matmuls, step, ask(_look_under_load, device, matmuls[-1]) or {})


def _synchronizer(device: str) -> Callable[[], None]:
    import torch

    if device.startswith("cuda"):
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device == "mps" else lambda: None


def _time_matmul(device: Device, dtype: str) -> Matmul:
    import torch

    size = GPU_MATMUL_SIZE if device.gpu else CPU_MATMUL_SIZE
    try:
        synchronize = _synchronizer(device.name)
        left = torch.ones(size, size, device=device.name, dtype=getattr(torch, dtype))
        product = left @ left  # the first one loads kernels
        synchronize()
        best = float("inf")
        for _ in range(MATMUL_REPEATS):
            begin = time.perf_counter()
            product = left @ left
            synchronize()
            best = min(best, time.perf_counter() - begin)
        if product[0, 0].item() != size:
            raise RuntimeError(f"wrong result: {product[0, 0].item()} in place of {size}")
    except Exception as exc:  # noqa: BLE001 - no kernel for this GPU, no memory, a broken driver
        return Matmul(device.name, dtype, size, problem=first_line(exc))
    rate = 2 * size**3 / best
    peak = _peak(device) if dtype != "float32" else None
    share = rate / peak if peak else None
    return Matmul(device.name, dtype, size, best * 1000, rate / 1e12, share)


def _peak(device: Device) -> float | None:
    return find_peak_flops(device.gpu.name, device.precision) if device.gpu else None


def pick_shape(device: Device) -> SampleShape:
    """Return the sizes that suit a device: small without a GPU, or where it is nearly full."""
    from utils.tools.diagnosis.sample_model import SampleShape

    free = device.gpu.memory_free_bytes if device.gpu else 0
    return SampleShape(*(GPU_SHAPE if (free or 0) >= GPU_SHAPE_BYTES else SMALL_SHAPE))


def time_training_step(
    device: Device, shape: SampleShape, seconds: float = STEP_SECONDS
) -> TrainingStep:
    """Return the time of a training step.

    Args:
        device: Where.
        shape: Sizes of model and batch.
        seconds: No step begins after so long, but one is timed.
    """
    try:
        return _time_training_step(device, shape, seconds)
    except Exception as exc:  # noqa: BLE001 - as for the product
        return TrainingStep(device.name, device.precision, problem=first_line(exc))


def _time_training_step(device: Device, shape: SampleShape, seconds: float) -> TrainingStep:
    import torch

    from utils.tools.diagnosis.sample_model import build_sample

    synchronize = _synchronizer(device.name)
    model, optimizer = build_sample(shape, device.name)
    size = (shape.batch_size, shape.sequence_length)
    batch = torch.randint(shape.vocab_size, size).to(device.name)
    dtype = getattr(torch, DTYPES[device.precision])
    kind = device.name.partition(":")[0]

    def step() -> Any:
        mixed = torch.autocast(kind, dtype) if device.precision != "no" else nullcontext()
        with mixed:
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    end = time.perf_counter() + seconds
    for _ in range(WARM_UP_STEPS):
        loss = step()
        synchronize()
        if time.perf_counter() > end:
            break
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or (len(times) < MAX_STEPS and time.perf_counter() < end):
        begin = time.perf_counter()
        loss = step()
        synchronize()
        times.append(time.perf_counter() - begin)
    if not loss.isfinite():
        raise RuntimeError(f"the loss is {loss.item()}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    each = min(times)
    flops = flops_per_token(parameters, shape.num_layers, shape.hidden_size, shape.sequence_length)
    rate = shape.tokens / each * flops
    peak = _peak(device)
    return TrainingStep(
        device=device.name,
        precision=device.precision,
        parameters=parameters,
        tokens=shape.tokens,
        milliseconds=each * 1000,
        tokens_per_second=shape.tokens / each,
        tflops=rate / 1e12,
        mfu=rate / peak if peak else None,
    )


def _look_under_load(device: Device, matmul: Matmul) -> Mapping[str, Any]:
    """Return what the driver says of a GPU that computes: an idle one lowers clocks and link."""
    if device.gpu is None or device.gpu.uuid is None or not matmul.milliseconds:
        return {}
    import torch

    left = torch.ones(
        matmul.size, matmul.size, device=device.name, dtype=getattr(torch, matmul.dtype)
    )
    count = min(MAX_LOAD_PRODUCTS, int(LOAD_SECONDS * 1000 / matmul.milliseconds) + 1)
    product = torch.empty_like(left)
    is_half_done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device.name):
        for number in range(count):
            torch.mm(left, left, out=product)  # queued: the host goes on
            if number == count // 2:
                is_half_done.record()
    is_half_done.synchronize()
    moment = read_moment(device.gpu.uuid)  # while the other half runs
    torch.cuda.synchronize(device.name)
    return moment
