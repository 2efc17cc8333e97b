"""Say what this machine can train on, and what stands in the way of its GPU.

    driver, device files, environment, torch -> facts -> findings, each with what to do

It works without a GPU, a driver or torch, and exits 0 there: then that is the diagnosis. Each fact
is gathered on its own, so that one that fails hides no other. The findings are a pure function of
the facts.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.console import format_bytes, run_command
from utils.metadata import printable, to_json_text

NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASSES = ("0x0300", "0x0302")
# Oldest driver of each CUDA major version on Linux:
# https://docs.nvidia.com/deploy/cuda-compatibility/
MIN_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
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


@dataclass(frozen=True)
class Finding:
    """Something worth saying.

    Attributes:
        level: ok, note, or problem.
        message: What is the case.
        advice: What to do about it, empty where there is nothing to do.
    """

    level: str
    message: str
    advice: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis and return the exit code."""
    parser = argparse.ArgumentParser(description="Diagnose GPU, driver and torch.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_command(run_diagnosis, parser.parse_args(argv))


def run_diagnosis(args: argparse.Namespace) -> None:
    """Gather the facts, judge them, print them."""
    host, driver = read_host(), read_driver()
    torch_facts = read_torch()
    matmuls = time_matmuls(torch_facts)
    findings = find_misconfigurations(host, driver, torch_facts)
    findings += [
        Finding("problem", f"matmul on {m.device} in {m.dtype} failed: {m.problem}")
        for m in matmuls
        if m.problem
    ]
    if args.json:
        values = {
            "host": asdict(host),
            "driver": asdict(driver),
            "torch": asdict(torch_facts),
            "matmul": [asdict(matmul) for matmul in matmuls],
            "findings": [asdict(finding) for finding in findings],
        }
        print(to_json_text(values))
        return
    print_section("System", host_lines(host, torch_facts))
    print_section("NVIDIA Driver", driver_lines(host, driver))
    print_section("PyTorch", torch_lines(torch_facts))
    print_section("Matmul", [matmul_line(matmul) for matmul in matmuls] or ["not run: no torch"])
    print_section("Diagnosis", finding_lines(findings))


def read_host() -> Host:
    """Return what the operating system says."""
    import psutil

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
    except Exception as exc:  # noqa: BLE001 - a broken install fails in many ways
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


def find_misconfigurations(host: Host, driver: Driver, torch: Torch) -> list[Finding]:
    """Return what is wrong or worth knowing, the cause before what follows from it."""
    has_gpu = bool(host.pci_gpus or host.device_files or driver.num_gpus)
    findings = []
    if torch.version is None:
        message = f"torch cannot be imported: {torch.problem}."
        findings.append(Finding("problem", message, "Run: bash setup.sh"))
    if torch.is_cuda_available:
        findings += _judge_working_cuda(driver, torch)
    elif torch.is_mps_available:
        findings.append(Finding("ok", "An Apple GPU can be used (MPS), in float32."))
    elif has_gpu:
        findings += _judge_driver(host, driver) + _judge_torch(host, driver, torch)
    else:
        findings.append(_judge_missing_gpu(host))
    if torch.version is not None and not torch.is_cuda_available and not torch.is_mps_available:
        findings.append(
            Finding(
                "note",
                "Training runs on the CPU: enough for --config test, far too slow for production.",
            )
        )
    return findings


def _judge_working_cuda(driver: Driver, torch: Torch) -> list[Finding]:
    findings = [Finding("ok", f"torch can use {len(torch.gpus)} GPU(s).")]
    if driver.num_gpus > len(torch.gpus):
        findings.append(
            Finding(
                "note",
                f"The driver knows {driver.num_gpus} GPUs, torch sees {len(torch.gpus)}.",
                "Check CUDA_VISIBLE_DEVICES.",
            )
        )
    for gpu in torch.gpus:
        if torch.architectures and not _is_served(gpu.capability, torch.architectures):
            findings.append(
                Finding(
                    "problem",
                    f"This torch has no code for {gpu.name} (capability "
                    f"{gpu.capability[0]}.{gpu.capability[1]}; it has "
                    f"{' '.join(torch.architectures)}).",
                    "Install a torch build for it: https://pytorch.org/get-started/locally/",
                )
            )
        if not gpu.is_bf16_supported:
            message = f"{gpu.name} has no bfloat16: fp16 with a loss scaler is used instead."
            findings.append(Finding("note", message))
    if torch.problem:
        findings.append(Finding("note", f"torch says: {torch.problem}"))
    return findings


def _is_served(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Tell whether code runs: same major and no newer minor (sm_), or anything older (compute_)."""
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            return True  # ROCm names; not ours to judge
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and built <= capability:
            return True
        if built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def _judge_driver(host: Host, driver: Driver) -> list[Finding]:
    """Return what is wrong below torch on a machine that has a GPU."""
    if "version mismatch" in (driver.problem or "").lower():
        return [
            Finding(
                "problem",
                "The loaded kernel module and the installed driver differ in version.",
                "Reboot (or reload the nvidia kernel modules) after a driver update.",
            )
        ]
    if host.device_files and driver.version is None:
        return [
            Finding(
                "problem",
                f"There is {host.device_files[0]}, but the driver library does not answer: "
                f"{driver.problem}.",
                "Install the driver's libraries; in a container, start it with --gpus all.",
            )
        ]
    if host.device_files or driver.num_gpus:
        return []
    if host.is_container:
        return [
            Finding(
                "problem",
                "The host has an NVIDIA GPU, but this container has no /dev/nvidia*.",
                "Install the NVIDIA Container Toolkit on the host and start with --gpus all.",
            )
        ]
    cause = "the nouveau module holds it" if host.has_nouveau else "no NVIDIA driver is loaded"
    return [
        Finding(
            "problem",
            f"There is an NVIDIA GPU on the PCI bus and no /dev/nvidia*: {cause}.",
            "Install the NVIDIA driver (Ubuntu: sudo ubuntu-drivers install) and reboot.",
        )
    ]


def _judge_torch(host: Host, driver: Driver, torch: Torch) -> list[Finding]:
    """Return what is wrong in torch or the environment on a machine that has a GPU."""
    if torch.version is None:
        return []
    if host.cuda_visible_devices is not None and host.cuda_visible_devices.strip() in ("", "-1"):
        return [
            Finding(
                "problem",
                f"CUDA_VISIBLE_DEVICES is {host.cuda_visible_devices!r}: it hides every GPU.",
                "Run: unset CUDA_VISIBLE_DEVICES",
            )
        ]
    if torch.cuda_build is None and torch.hip_build is None:
        return [_cpu_only_build(driver, torch)]
    if torch.cuda_build and driver.cuda_version:
        major = int(torch.cuda_build.split(".")[0])
        if driver.cuda_version[0] < major:
            oldest = f" ({MIN_DRIVERS[major]} or newer)" if major in MIN_DRIVERS else ""
            return [
                Finding(
                    "problem",
                    f"Driver {driver.version} serves CUDA up to {driver.cuda_version[0]}."
                    f"{driver.cuda_version[1]}, torch was built for CUDA {torch.cuda_build}.",
                    f"Update the driver{oldest}, or install a torch built for CUDA "
                    f"{driver.cuda_version[0]}.",
                )
            ]
    if torch.problem or driver.version:
        reason = torch.problem or "torch gives no reason"
        advice = f"Look at nvidia-smi; check CUDA_VISIBLE_DEVICES={host.cuda_visible_devices}."
        return [Finding("problem", f"torch cannot use the GPU: {reason}", advice)]
    return []


def _cpu_only_build(driver: Driver, torch: Torch) -> Finding:
    major = driver.cuda_version[0] if driver.cuda_version else 12
    return Finding(
        "problem",
        f"torch {torch.version} is a CPU-only build on a machine with an NVIDIA GPU.",
        f"Install a build for CUDA {major}: https://pytorch.org/get-started/locally/",
    )


def _judge_missing_gpu(host: Host) -> Finding:
    if host.is_virtual_machine and host.system.startswith("Linux"):
        return Finding(
            "note",
            "No NVIDIA GPU in this virtual machine: nothing on the PCI bus, no /dev/nvidia*.",
            "If the host has one, pass it through (PCI passthrough or vGPU), or choose a machine "
            "type with a GPU.",
        )
    return Finding("note", "No NVIDIA GPU was found in this machine.")


def print_section(title: str, lines: Sequence[str]) -> None:
    """Print lines below a heading."""
    print(f"{title}:")
    print("-" * 30)
    for line in lines:
        print(printable(line, limit=500))
    print()


def host_lines(host: Host, torch: Torch) -> list[str]:
    """Return the machine."""
    kinds = [("virtual machine", host.is_virtual_machine), ("container", host.is_container)]
    kind = ", ".join(name for name, holds in kinds if holds) or "no virtual machine, no container"
    return [
        f"System: {host.system} ({kind})",
        f"Python: {host.python}",
        f"CPU: {host.cpu_cores or '?'} cores, {host.cpu_threads or '?'} threads"
        + (f", torch uses {torch.num_threads}" if torch.num_threads else ""),
        f"Memory: {format_bytes(host.memory_bytes)}",
    ]


def driver_lines(host: Host, driver: Driver) -> list[str]:
    """Return the driver and how the GPU can be reached."""
    cuda = ".".join(str(part) for part in driver.cuda_version or ()) or "-"
    visible = host.cuda_visible_devices
    return [
        f"Driver: {driver.version or 'none'}" + (f" ({driver.problem})" if driver.problem else ""),
        f"Driver's CUDA: {cuda}",
        f"GPUs Known To Driver: {driver.num_gpus}",
        f"nvidia-smi: {driver.nvidia_smi or 'not on PATH'}",
        f"NVIDIA GPUs On PCI Bus: {'unknown' if host.pci_gpus is None else host.pci_gpus}",
        f"Device Files: {', '.join(host.device_files) or 'no /dev/nvidia*'}",
        f"CUDA_VISIBLE_DEVICES: {'not set' if visible is None else repr(visible)}",
    ]


def torch_lines(torch: Torch) -> list[str]:
    """Return torch's build and the GPUs it sees."""
    if torch.version is None:
        return [f"Version: none ({torch.problem})"]
    build = f"CUDA {torch.cuda_build}" if torch.cuda_build else "CPU only"
    if torch.hip_build:
        build = f"ROCm {torch.hip_build}"
    mps = "available" if torch.is_mps_available else "not available"
    return [
        f"Version: {torch.version}",
        f"Build: {build}",
        f"CUDA Available: {torch.is_cuda_available}",
        f"GPU Count: {len(torch.gpus)}",
        *(gpu_line(gpu) for gpu in torch.gpus),
        f"MPS: {mps}" + ("" if torch.is_mps_built else " (not in this build)"),
    ]


def gpu_line(gpu: GpuFacts) -> str:
    """Return one GPU."""
    return (
        f"  {gpu.index}: {gpu.name}, {format_bytes(gpu.memory_bytes)}, "
        f"capability {gpu.capability[0]}.{gpu.capability[1]}, "
        f"bf16 {'yes' if gpu.is_bf16_supported else 'no'}, "
        f"fp16 {'yes' if gpu.is_fp16_supported else 'no'}"
    )


def matmul_line(matmul: Matmul) -> str:
    """Return one timed product."""
    head = f"{matmul.device} {matmul.dtype} {matmul.size} x {matmul.size}"
    if matmul.milliseconds is None:
        return f"{head}: failed ({matmul.problem})"
    return f"{head}: {matmul.milliseconds:.2f} ms, {matmul.tflops:.3f} TFLOP/s"


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Return the findings, each with what to do below it."""
    lines = []
    for finding in findings:
        lines.append(f"[{finding.level}] {finding.message}")
        if finding.advice:
            lines.append(f"    {finding.advice}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
