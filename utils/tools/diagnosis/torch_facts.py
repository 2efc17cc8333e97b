"""What the installed torch can do: its build, the GPUs it sees, precisions, attention kernels.

    torch -> Torch, TorchGpu -> gpu_findings, device_timing

torch is imported when it is asked about; one that cannot be imported has a `problem`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from utils.base.errors import first_line
from utils.tools.diagnosis.diagnosis import ask

BF16_CAPABILITY = (8, 0)
FP16_CAPABILITY = (5, 3)
FP8_CAPABILITY = (8, 9)
TF32_CAPABILITY = (8, 0)
FP8_ROCM = ("gfx94", "gfx95")
# Kernels of scaled_dot_product_attention, by their names in SDPBackend, quickest first.
ATTENTION_KERNELS = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
PROBE_SHAPE = (1, 1, 64, 64)  # batch, heads, tokens, size of a head


@dataclass(frozen=True)
class TorchGpu:
    """One GPU as torch sees it.

    Attributes:
        index: torch's number; not the driver's where CUDA_VISIBLE_DEVICES is set.
        uuid: As the driver gives it, None where torch does not say.
        memory_free_bytes: Free for any process.
        attention: Kernels that ran, of `ATTENTION_KERNELS`.
        problem: Why the GPU could not be used.
    """

    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int]
    is_bf16_supported: bool
    is_fp16_supported: bool
    is_fp8_supported: bool = False
    is_tf32_supported: bool = False
    memory_free_bytes: int | None = None
    uuid: str | None = None
    num_processors: int | None = None
    attention: list[str] = field(default_factory=list)
    problem: str | None = None

    @property
    def precision(self) -> str:
        """The mixed precision that training takes on it."""
        return "bf16" if self.is_bf16_supported else "fp16"


@dataclass(frozen=True)
class Torch:
    """The installed torch.

    Attributes:
        version: Its version, None where it cannot be imported.
        cuda_build: CUDA version it was built for, None for a CPU-only build.
        hip_build: ROCm version it was built for.
        cudnn: Version of cuDNN.
        nccl: Version of NCCL.
        is_cuda_available: Whether it can use a GPU (of NVIDIA, or of AMD with ROCm).
        is_flash_built: Whether it was built with flash attention.
        is_tf32_on: Whether float32 products use TF32 by default; train.py turns it on.
        gpus: The GPUs it sees.
        peers: Pairs of GPUs that reach each other's memory.
        architectures: GPU architectures it has code for, as in sm_90.
        is_mps_available: Whether it can use an Apple GPU.
        is_mps_built: Whether it was built for Apple GPUs.
        num_threads: CPU threads it uses.
        cpu_capability: Widest instructions of the CPU that it has kernels for.
        attention: Attention kernels that ran on the CPU.
        problem: Why it cannot be imported, or what it says of the GPU.
    """

    version: str | None = None
    cuda_build: str | None = None
    hip_build: str | None = None
    cudnn: str | None = None
    nccl: str | None = None
    is_cuda_available: bool = False
    is_flash_built: bool | None = None
    is_tf32_on: bool | None = None
    gpus: list[TorchGpu] = field(default_factory=list)
    peers: list[tuple[int, int]] = field(default_factory=list)
    architectures: list[str] = field(default_factory=list)
    is_mps_available: bool = False
    is_mps_built: bool = False
    num_threads: int | None = None
    cpu_capability: str | None = None
    attention: list[str] = field(default_factory=list)
    problem: str | None = None


def read_torch() -> Torch:
    """Return what torch says; one that cannot be imported has a `problem`."""
    try:
        import torch
    except Exception as exc:  # noqa: BLE001 - a broken install fails in any way
        return Torch(problem=first_line(exc))
    # torch says in a warning why CUDA does not start.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = bool(ask(lambda: torch.cuda.is_available()))
        count = (ask(lambda: torch.cuda.device_count()) or 0) if is_available else 0
        gpus = [read_torch_gpu(torch, index) for index in range(count)]
    messages = [gpu.problem for gpu in gpus if gpu.problem]
    messages += [first_line(warning.message) for warning in caught]
    nccl = ask(_read_nccl, torch) if is_available else None
    return Torch(
        version=str(torch.__version__),
        cuda_build=torch.version.cuda,
        hip_build=torch.version.hip,
        cudnn=_dotted(ask(_read_cudnn, torch)) if is_available else None,
        nccl=".".join(map(str, nccl)) if isinstance(nccl, tuple) else None,
        is_cuda_available=is_available,
        is_flash_built=ask(lambda: torch.backends.cuda.is_flash_attention_available()),
        is_tf32_on=ask(lambda: torch.backends.cuda.matmul.fp32_precision == "tf32"),
        gpus=[gpu for gpu in gpus if gpu.memory_bytes],
        peers=_find_peers(torch, count),
        architectures=ask(lambda: torch.cuda.get_arch_list()) or [],
        is_mps_available=bool(ask(lambda: torch.backends.mps.is_available())),
        is_mps_built=bool(ask(lambda: torch.backends.mps.is_built())),
        num_threads=ask(lambda: torch.get_num_threads()),
        cpu_capability=ask(lambda: torch.backends.cpu.get_cpu_capability()),
        attention=find_attention_kernels("cpu", "float32"),
        problem=next(iter(messages), None),
    )


def read_torch_gpu(torch: Any, index: int) -> TorchGpu:
    """Return what torch says of one GPU; no memory where it says nothing."""
    try:
        properties = torch.cuda.get_device_properties(index)
        capability = (int(properties.major), int(properties.minor))
    except Exception as exc:  # noqa: BLE001 - CUDA fails in many ways
        return TorchGpu(index, "", 0, (0, 0), False, False, problem=first_line(exc))
    memory = ask(lambda: torch.cuda.mem_get_info(index))
    is_rocm = torch.version.hip is not None
    uuid = ask(lambda: str(properties.uuid))
    has_bf16 = is_rocm or capability >= BF16_CAPABILITY
    return TorchGpu(
        index=index,
        name=str(properties.name),
        memory_bytes=int(properties.total_memory),
        capability=capability,
        is_bf16_supported=has_bf16,
        is_fp16_supported=is_rocm or capability >= FP16_CAPABILITY,
        is_fp8_supported=_has_fp8(properties, capability, is_rocm),
        is_tf32_supported=not is_rocm and capability >= TF32_CAPABILITY,
        memory_free_bytes=memory and int(memory[0]),
        uuid=uuid and (uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"),
        num_processors=ask(lambda: int(properties.multi_processor_count)),
        attention=find_attention_kernels(f"cuda:{index}", "bfloat16" if has_bf16 else "float16"),
    )


def _has_fp8(properties: Any, capability: tuple[int, int], is_rocm: bool) -> bool:
    if is_rocm:
        return str(getattr(properties, "gcnArchName", "")).startswith(FP8_ROCM)
    return capability >= FP8_CAPABILITY


def _read_cudnn(torch: Any) -> int | None:
    version = torch.backends.cudnn.version()
    return None if version is None else int(version)


def _read_nccl(torch: Any) -> Any:
    return torch.cuda.nccl.version()


def _find_peers(torch: Any, count: int) -> list[tuple[int, int]]:
    pairs = [(a, b) for a in range(count) for b in range(count) if a < b]
    return [pair for pair in pairs if ask(lambda p: torch.cuda.can_device_access_peer(*p), pair)]


def find_attention_kernels(device: str, dtype: str) -> list[str]:
    """Return the kernels of scaled_dot_product_attention that run on a device, quickest first."""
    return [
        name
        for name, backend in ATTENTION_KERNELS.items()
        if ask(_run_attention, device, dtype, backend)
    ]


def _run_attention(device: str, dtype: str, backend: str) -> bool:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Of the tensors' type, on the device itself: what a table of capabilities says is not asked.
    states = torch.ones(PROBE_SHAPE, device=device, dtype=getattr(torch, dtype))
    with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, backend)):
        warnings.simplefilter("ignore")
        result = torch.nn.functional.scaled_dot_product_attention(
            states, states, states, is_causal=True
        )
        return bool(result.isfinite().all())


def _dotted(cudnn: int | None) -> str | None:
    """Return cuDNN's number as text: 91002 is 9.10.2, 8907 is 8.9.7."""
    if cudnn is None:
        return None
    major = 10000 if cudnn >= 90000 else 1000
    return f"{cudnn // major}.{cudnn % major // 100}.{cudnn % 100}"
