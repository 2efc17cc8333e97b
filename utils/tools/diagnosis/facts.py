"""What is known of this machine: operating system, NVIDIA driver, torch, speed.

    /sys, /dev, psutil, NVML, torch -> Facts -> findings, fit, text

A fact that cannot be found out is None, and hides no other. Driver and torch can hang, or take
their process with them: `run_apart` asks them in a process of their own. torch is imported when it
is asked.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import platform
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import psutil

from utils.base.child_process import live_no_longer_than
from utils.base.errors import first_line
from utils.base.machine import available_memory

EXIT_SECONDS = 5.0
NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"  # a graphics card has a sound device, too
DEVICE_PATTERNS = ("nvidia[0-9]*", "nvidiactl", "nvidia-uvm", "dxg")
SHM = Path("/dev/shm")  # noqa: S108 - its size is asked, nothing is written
BF16_CAPABILITY = (8, 0)
# Variables that change what a GPU or the CPU's threads do; none of them is a secret.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Host:
    """What the operating system says; None is "unknown".

    Attributes:
        system: Kernel, architecture and version of Python.
        cpu_threads: Logical cores that this process may run on.
        memory_available_bytes: What can still be used of it, also by a container's limit.
        shm_bytes: Size of /dev/shm.
        is_wsl: Whether this is Windows Subsystem for Linux.
        pci_gpus: NVIDIA GPUs on the PCI bus: address -> kernel driver that holds it.
        device_files: /dev/nvidia0, ... -> whether this user may use it.
        environment: Those of `VARIABLES` that are set.
    """

    system: str = ""
    cpu_threads: int | None = None
    memory_bytes: int | None = None
    memory_available_bytes: int | None = None
    shm_bytes: int | None = None
    is_container: bool = False
    is_wsl: bool = False
    pci_gpus: dict[str, str | None] = field(default_factory=dict)
    device_files: dict[str, bool] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DriverGpu:
    """One GPU as the driver sees it, before anything ran here; None where it does not answer.

    Attributes:
        index: The driver's number, that of nvidia-smi.
        holders: Processes that compute on it, by name and id.
    """

    index: int
    name: str = ""
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    holders: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        nvidia_smi: Path of nvidia-smi, None where it is not on PATH.
        cuda_version: Newest CUDA version that the driver serves.
        num_gpus: GPUs that the driver knows.
        gpus: Those that answer.
        problem: Why NVML, or a GPU, does not answer.
    """

    nvidia_smi: str | None = None
    version: str | None = None
    cuda_version: tuple[int, int] | None = None
    num_gpus: int = 0
    gpus: list[DriverGpu] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class TorchGpu:
    """One GPU as torch sees it.

    Attributes:
        index: torch's number; not the driver's where CUDA_VISIBLE_DEVICES is set.
        memory_free_bytes: Free for any process.
        precision: Mixed precision that training takes on it: bf16 or fp16.
    """

    index: int
    name: str
    memory_bytes: int
    memory_free_bytes: int | None
    capability: tuple[int, int]
    precision: str


@dataclass(frozen=True)
class Torch:
    """The installed torch.

    Attributes:
        version: Its version, None where it cannot be imported.
        cuda_build: CUDA version it was built for, None for a CPU-only build.
        hip_build: ROCm version it was built for.
        is_cuda_available: Whether it can use a GPU (of NVIDIA, or of AMD with ROCm).
        gpus: The GPUs it sees.
        architectures: GPU architectures it has code for, as in sm_90.
        is_mps_available: Whether it can use an Apple GPU.
        problem: Why it cannot be imported, or what it says of the GPU.
    """

    version: str | None = None
    cuda_build: str | None = None
    hip_build: str | None = None
    is_cuda_available: bool = False
    gpus: list[TorchGpu] = field(default_factory=list)
    architectures: list[str] = field(default_factory=list)
    is_mps_available: bool = False
    num_threads: int | None = None
    problem: str | None = None

    @property
    def device(self) -> str:
        """The device that train.py takes, as torch names it."""
        if self.gpus:
            return "cuda:0"
        return "mps" if self.is_mps_available else "cpu"


@dataclass(frozen=True)
class Timing:
    """Speed of a device in a training step of a small model.

    Attributes:
        device: As torch names it.
        precision: Mixed precision: no, bf16 or fp16.
        step_seconds: Forward, backward and AdamW.
        tokens_per_second: In training.
        step_tflops: FLOPs of training (6N and attention) in a second, in 1e12.
        problem: What failed, and why.
    """

    device: str
    precision: str
    parameters: int = 0
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    step_tflops: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that was found out; `interrupted` is why the timings are not complete."""

    host: Host = field(default_factory=Host)
    driver: Driver = field(default_factory=Driver)
    torch: Torch = field(default_factory=Torch)
    timings: list[Timing] = field(default_factory=list)
    interrupted: str | None = None


# How facts are asked for, so that one that fails hides no other


@dataclass(frozen=True)
class Broken:
    """Why a part could not tell everything, as in "it ended by SIGILL"."""

    reason: str


def ask(question: Callable[[], Answer]) -> Answer | None:
    """Return the answer to a question, None where there is none."""
    try:
        return question()
    except Exception:  # noqa: BLE001 - any error: the next question is asked all the same
        return None


def run_apart(
    part: Callable[..., Iterator[Any]], *args: object, limit_seconds: float
) -> Iterator[Any]:
    """Yield what a generator yields in a process of its own; at most one `Broken` ends it.

    `part` is a function of a module; its arguments and what it yields are pickled. Each next value
    may take `limit_seconds`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_tell, args=(theirs, os.getpid(), part, args), daemon=True)
    child.start()
    theirs.close()
    try:
        while ours.poll(limit_seconds):
            value = ours.recv()
            if value is None:  # its last word; that it may fail to exit does not matter
                return
            yield value
        yield Broken(f"no answer within {limit_seconds:.0f} s")
    except (EOFError, OSError):
        child.join(EXIT_SECONDS)
        yield Broken(_describe_exit(child.exitcode or 0))
    finally:
        ours.close()
        child.kill()
        # One that hangs in the kernel does not end; it is a daemon and nobody waits for it.
        child.join(EXIT_SECONDS)


def _describe_exit(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f"it ended by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}"


def _tell(pipe: Connection, parent: int, part: Callable[..., Iterator[Any]], args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process
    if os.name == "posix":
        live_no_longer_than(parent)
    try:
        for value in part(*args):
            pipe.send(value)
    except Exception as exc:  # noqa: BLE001 - the reason goes to the parent
        pipe.send(Broken(f"{type(exc).__name__}: {first_line(exc)}"))
    pipe.send(None)


# The operating system


def read_host(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Host:
    """Return what the operating system says; /sys and /dev are below `root`."""
    return Host(
        system=f"{platform.platform()}, Python {platform.python_version()}",
        cpu_threads=ask(lambda: len(psutil.Process().cpu_affinity())) or os.cpu_count(),
        memory_bytes=ask(lambda: int(psutil.virtual_memory().total)),
        memory_available_bytes=ask(available_memory),
        shm_bytes=ask(lambda: int(psutil.disk_usage(str(SHM)).total)),
        is_container=any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv"))
        or not {"KUBERNETES_SERVICE_HOST", "container"}.isdisjoint(environment),
        is_wsl="microsoft" in platform.release().lower(),
        pci_gpus=ask(lambda: find_pci_gpus(root / "sys/bus/pci/devices")) or {},
        device_files=ask(lambda: find_device_files(root / "dev")) or {},
        environment={name: environment[name] for name in VARIABLES if name in environment},
    )


def find_pci_gpus(bus: Path) -> dict[str, str | None]:
    """Return the NVIDIA GPUs of /sys/bus/pci/devices: address -> kernel driver that holds it."""
    return {
        device.name: (device / "driver").resolve().name if (device / "driver").exists() else None
        for device in sorted(bus.iterdir())
        if (device / "vendor").read_text().strip() == NVIDIA_VENDOR
        and (device / "class").read_text().startswith(DISPLAY_CLASS)
    }


def find_device_files(folder: Path) -> dict[str, bool]:
    """Return the device files of NVIDIA GPUs, each with whether this user may use it."""
    paths = [path for pattern in DEVICE_PATTERNS for path in sorted(folder.glob(pattern))]
    return {f"/dev/{path.name}": os.access(path, os.R_OK | os.W_OK) for path in paths}


# The driver


def read_driver(nvml: Any = None) -> Driver:
    """Return what NVML (the module pynvml) says; a machine without a driver has a `problem`."""
    nvidia_smi = shutil.which("nvidia-smi")
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        return Driver(nvidia_smi, problem="nvidia-ml-py is not installed (bash setup.sh)")
    except Exception as exc:  # noqa: BLE001 - NVMLError, or a library that cannot be loaded
        return Driver(nvidia_smi, problem=first_line(exc))
    cuda = ask(lambda: int(nvml.nvmlSystemGetCudaDriverVersion()))
    count = ask(lambda: int(nvml.nvmlDeviceGetCount())) or 0
    found = (ask(partial(read_driver_gpu, nvml, index)) for index in range(count))
    gpus = [gpu for gpu in found if gpu is not None]
    lost = count - len(gpus)
    return Driver(
        nvidia_smi,
        version=ask(lambda: str(nvml.nvmlSystemGetDriverVersion())),
        cuda_version=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
        num_gpus=count,
        gpus=gpus,
        problem=f"{lost} of {count} GPUs do not answer" if lost else None,
    )


def read_driver_gpu(nvml: Any, index: int) -> DriverGpu:
    """Return what NVML says of one GPU; one that is lost raises NVML's error."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    running = ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    return DriverGpu(
        index=index,
        name=ask(lambda: str(nvml.nvmlDeviceGetName(handle))) or "",
        capability=ask(lambda: tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))),
        memory_bytes=memory and int(memory.total),
        memory_used_bytes=memory and int(memory.used),
        holders=[f"{_name_process(process.pid)} {process.pid}" for process in running],
    )


def _name_process(pid: int) -> str:
    return ask(lambda: str(psutil.Process(pid).name())) or "process"  # not seen in a container


# torch


def read_torch() -> Torch:
    """Return what torch says; one that cannot be imported has a `problem`."""
    try:
        import torch
    except Exception as exc:  # noqa: BLE001 - a broken installation fails in any way
        return Torch(problem=first_line(exc))
    gpus: list[TorchGpu] = []
    problem = None
    # torch says in a warning why CUDA does not start.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = bool(ask(torch.cuda.is_available))
        try:
            count = torch.cuda.device_count() if is_available else 0
            for index in range(count):
                gpus.append(read_torch_gpu(torch, index))
        except Exception as exc:  # noqa: BLE001 - CUDA fails in many ways
            problem = first_line(exc)
    return Torch(
        version=str(torch.__version__),
        cuda_build=torch.version.cuda,
        hip_build=torch.version.hip,
        is_cuda_available=is_available,
        gpus=gpus,
        architectures=ask(torch.cuda.get_arch_list) or [],
        is_mps_available=bool(ask(torch.backends.mps.is_available)),
        num_threads=torch.get_num_threads(),
        problem=problem or next((first_line(warning.message) for warning in caught), None),
    )


def read_torch_gpu(torch: Any, index: int) -> TorchGpu:
    """Return what torch says of one GPU; one that cannot be used raises CUDA's error."""
    properties = torch.cuda.get_device_properties(index)
    capability = (int(properties.major), int(properties.minor))
    has_bf16 = torch.version.hip is not None or capability >= BF16_CAPABILITY
    return TorchGpu(
        index=index,
        name=str(properties.name),
        memory_bytes=int(properties.total_memory),
        memory_free_bytes=ask(lambda: int(torch.cuda.mem_get_info(index)[0])),
        capability=capability,
        precision="bf16" if has_bf16 else "fp16",
    )
