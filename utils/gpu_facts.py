"""What this machine can compute on: operating system, NVIDIA driver, torch, a timed matmul.

    /proc, /sys, /dev, environment, NVML, torch -> facts -> gpu_findings -> debug_gpu.py

Each group is gathered on its own, so that one that fails hides no other: it has a `problem` then.
torch is imported when it is asked about.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASSES = ("0x0300", "0x0302")
BF16_CAPABILITY = (8, 0)
FP16_CAPABILITY = (5, 3)
CPU_MATMUL_SIZE = 1024
GPU_MATMUL_SIZE = 4096
MATMUL_REPEATS = 5


@dataclass(frozen=True)
class Host:
    """The machine below CUDA.

    Attributes:
        system: Operating system and architecture.
        python: Version of Python.
        cpu_cores: Physical cores, None where unknown.
        cpu_threads: Logical cores.
        memory_bytes: Main memory.
        is_virtual_machine: Whether the CPU reports a hypervisor.
        is_container: Whether this is a container.
        pci_gpus: NVIDIA display devices on the PCI bus; None where the bus cannot be read.
        device_files: /dev/nvidia0, ...; /dev/dxg in WSL.
        has_nouveau: Whether the nouveau kernel module is loaded.
        cuda_visible_devices: The environment variable, None where it is not set.
    """

    system: str = ""
    python: str = ""
    cpu_cores: int | None = None
    cpu_threads: int | None = None
    memory_bytes: int | None = None
    is_virtual_machine: bool = False
    is_container: bool = False
    pci_gpus: int | None = None
    device_files: list[str] = field(default_factory=list)
    has_nouveau: bool = False
    cuda_visible_devices: str | None = None


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver as NVML tells it.

    Attributes:
        nvidia_smi: Path of nvidia-smi, None where it is not on PATH.
        version: Version of the driver.
        cuda_version: Newest CUDA version that the driver serves.
        num_gpus: GPUs that the driver knows.
        problem: Why NVML cannot be used.
    """

    nvidia_smi: str | None = None
    version: str | None = None
    cuda_version: tuple[int, int] | None = None
    num_gpus: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class GpuFacts:
    """One GPU as torch sees it."""

    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int]
    is_bf16_supported: bool
    is_fp16_supported: bool


@dataclass(frozen=True)
class Torch:
    """The installed torch.

    Attributes:
        version: Its version, None where it cannot be imported.
        cuda_build: CUDA version it was built for, None for a CPU-only build.
        hip_build: ROCm version it was built for.
        is_cuda_available: Whether it can use a GPU.
        gpus: The GPUs it sees.
        architectures: GPU architectures it has code for, as in sm_90.
        is_mps_available: Whether it can use an Apple GPU.
        is_mps_built: Whether it was built for Apple GPUs.
        num_threads: CPU threads it uses.
        problem: Why it cannot be imported, or what it says of the GPU.
    """

    version: str | None = None
    cuda_build: str | None = None
    hip_build: str | None = None
    is_cuda_available: bool = False
    gpus: list[GpuFacts] = field(default_factory=list)
    architectures: list[str] = field(default_factory=list)
    is_mps_available: bool = False
    is_mps_built: bool = False
    num_threads: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Matmul:
    """A timed product of two square matrices; the best of a few."""

    device: str
    dtype: str
    size: int
    milliseconds: float | None
    tflops: float | None
    problem: str | None = None


def read_host() -> Host:
    """Return what the operating system says."""
    return Host(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu_cores=psutil.cpu_count(logical=False),
        cpu_threads=psutil.cpu_count(),
        memory_bytes=psutil.virtual_memory().total,
        is_virtual_machine=" hypervisor" in _read_text(Path("/proc/cpuinfo")),
        is_container=Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
        pci_gpus=_count_pci_gpus(Path("/sys/bus/pci/devices")),
        device_files=_find_device_files(Path("/dev")),
        has_nouveau=Path("/sys/module/nouveau").exists(),
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _count_pci_gpus(bus: Path) -> int | None:
    if not bus.is_dir():
        return None
    devices = ((_read_text(d / "vendor"), _read_text(d / "class")) for d in bus.iterdir())
    return sum(
        vendor.strip() == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASSES)
        for vendor, kind in devices
    )


def _find_device_files(folder: Path) -> list[str]:
    numbered = [str(path) for path in folder.glob("nvidia[0-9]*")]
    return sorted(numbered) + [str(path) for path in [folder / "dxg"] if path.exists()]


def read_driver() -> Driver:
    """Return what NVML says; a machine without a driver has a `problem`."""
    nvidia_smi = shutil.which("nvidia-smi")
    try:
        import pynvml
    except ImportError:
        return Driver(nvidia_smi, problem="nvidia-ml-py is not installed (bash setup.sh)")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        return Driver(nvidia_smi, problem=str(exc))
    try:
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        return Driver(
            nvidia_smi,
            version=str(pynvml.nvmlSystemGetDriverVersion()),
            cuda_version=(cuda // 1000, cuda % 1000 // 10),
            num_gpus=int(pynvml.nvmlDeviceGetCount()),
        )
    except pynvml.NVMLError as exc:
        return Driver(nvidia_smi, problem=str(exc))
    finally:
        pynvml.nvmlShutdown()


def read_torch() -> Torch:
    """Return what torch says; one that cannot be imported has a `problem`."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError, AttributeError) as exc:  # a broken install
        return Torch(problem=_first_line(exc))
    # torch says in a warning why CUDA does not start.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
        gpus, problem = _read_gpus() if is_available else ([], None)
    messages = [_first_line(warning.message) for warning in caught]
    return Torch(
        version=torch.__version__,
        cuda_build=torch.version.cuda,
        hip_build=torch.version.hip,
        is_cuda_available=is_available,
        gpus=gpus,
        architectures=torch.cuda.get_arch_list() if is_available else [],
        is_mps_available=torch.backends.mps.is_available(),
        is_mps_built=torch.backends.mps.is_built(),
        num_threads=torch.get_num_threads(),
        problem=problem or next(iter(messages), None),
    )


def _read_gpus() -> tuple[list[GpuFacts], str | None]:
    import torch

    gpus = []
    try:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = (properties.major, properties.minor)
            gpus.append(
                GpuFacts(
                    index=index,
                    name=properties.name,
                    memory_bytes=properties.total_memory,
                    capability=capability,
                    is_bf16_supported=torch.version.hip is not None
                    or capability >= BF16_CAPABILITY,
                    is_fp16_supported=torch.version.hip is not None
                    or capability >= FP16_CAPABILITY,
                )
            )
    except (RuntimeError, AssertionError) as exc:
        return gpus, _first_line(exc)
    return gpus, None


def _first_line(value: object) -> str:
    lines = [line.strip() for line in str(value).splitlines() if line.strip()]
    return lines[0] if lines else type(value).__name__


def time_matmuls(facts: Torch) -> list[Matmul]:
    """Return a timed product on the CPU and on each GPU, in its mixed precision too."""
    if facts.version is None:
        return []
    wanted = [("cpu", "float32", CPU_MATMUL_SIZE)]
    for gpu in facts.gpus:
        device = f"cuda:{gpu.index}"
        wanted.append((device, "float32", GPU_MATMUL_SIZE))
        half = "bfloat16" if gpu.is_bf16_supported else "float16"
        wanted.append((device, half, GPU_MATMUL_SIZE))
    if facts.is_mps_available:
        wanted.append(("mps", "float32", CPU_MATMUL_SIZE))
    return [_time_matmul(*item) for item in wanted]


def _time_matmul(device: str, dtype: str, size: int) -> Matmul:
    import torch

    def synchronize() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        elif device == "mps":
            torch.mps.synchronize()

    try:
        left = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
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
    except RuntimeError as exc:  # no kernel for this GPU, no memory, a broken driver
        return Matmul(device, dtype, size, None, None, _first_line(exc))
    return Matmul(device, dtype, size, best * 1000, 2 * size**3 / best / 1e12)
