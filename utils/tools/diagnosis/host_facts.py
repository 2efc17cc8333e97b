"""The machine below CUDA: CPU, memory and their limits, PCI bus, device files, kernel, environment.

    /proc, /sys, /dev, environment -> Host -> gpu_findings, host_findings

Every question is asked on its own: one that fails leaves its fact at "unknown". No torch here.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from utils.tools.diagnosis.diagnosis import ask

VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
# Display controllers, and the processing accelerators that some GPUs call themselves.
GPU_CLASSES = ("0x03", "0x1200")
MEMORY_RESOURCE = 0x200  # IORESOURCE_MEM
NUM_WINDOWS = 6  # base address registers of a PCI device
MODULES = ("nvidia", "nvidia_uvm", "nouveau", "vfio_pci", "amdgpu")
DEVICE_PATTERNS = ("nvidia[0-9]*", "nvidiactl", "nvidia-uvm", "dxg", "kfd")
NO_LIMIT = 2**60
SHM = Path("/dev/shm")  # noqa: S108 - its size is asked, nothing is written

# Variables that change what a GPU or the CPU's threads do; none of them is a secret.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_TF32_OVERRIDE",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "NCCL_P2P_DISABLE",
    "NCCL_SHM_DISABLE",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
    "PYTORCH_ENABLE_MPS_FALLBACK",
)


@dataclass(frozen=True)
class PciGpu:
    """A GPU on the PCI bus.

    Attributes:
        address: As in 0000:01:00.0.
        vendor: NVIDIA or AMD.
        driver: Kernel driver that holds it, None where none does.
        has_memory_windows: False where the firmware gave it no address space; None: unknown.
    """

    address: str
    vendor: str
    driver: str | None = None
    has_memory_windows: bool | None = None


@dataclass(frozen=True)
class Host:
    """What the operating system says; None is "unknown".

    Attributes:
        system: Kernel and architecture.
        distribution: Name of the Linux distribution.
        python: Version of Python.
        cpu_name: Model of the CPU.
        cpu_cores: Physical cores.
        cpu_threads: Logical cores of the machine.
        usable_threads: Logical cores that this process may run on.
        cpu_limit: Cores' worth of time that a container may take.
        memory_bytes: Main memory.
        memory_available_bytes: What is free of it, or can be freed.
        memory_limit_bytes: What a container may take of it.
        shm_bytes: Size of /dev/shm.
        load: Processes that ran or wanted to, on average over the last minute.
        is_virtual_machine: Whether the CPU reports a hypervisor.
        hypervisor: Its name, as the firmware gives it.
        is_container: Whether this is a container.
        is_wsl: Whether this is Windows Subsystem for Linux.
        has_iommu: Whether an IOMMU is in use.
        has_secure_boot: Whether the kernel takes signed modules only.
        pci_gpus: GPUs on the PCI bus; None where the bus cannot be read.
        device_files: /dev/nvidia0, ... -> whether this user may use it.
        kernel_modules: Those of `MODULES` that are loaded.
        kernel_driver: Version of the loaded NVIDIA kernel module.
        cuda_libraries: libcuda.so in folders of LD_LIBRARY_PATH, in its order.
        environment: Those of `VARIABLES` that are set.
        problem: Why nothing is known.
    """

    system: str = ""
    distribution: str | None = None
    python: str = ""
    cpu_name: str | None = None
    cpu_cores: int | None = None
    cpu_threads: int | None = None
    usable_threads: int | None = None
    cpu_limit: float | None = None
    memory_bytes: int | None = None
    memory_available_bytes: int | None = None
    memory_limit_bytes: int | None = None
    shm_bytes: int | None = None
    load: float | None = None
    is_virtual_machine: bool = False
    hypervisor: str | None = None
    is_container: bool = False
    is_wsl: bool = False
    has_iommu: bool | None = None
    has_secure_boot: bool | None = None
    pci_gpus: list[PciGpu] | None = None
    device_files: dict[str, bool] = field(default_factory=dict)
    kernel_modules: list[str] = field(default_factory=list)
    kernel_driver: str | None = None
    cuda_libraries: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def nvidia_gpus(self) -> list[PciGpu]:
        """NVIDIA GPUs on the PCI bus."""
        return [gpu for gpu in self.pci_gpus or [] if gpu.vendor == "NVIDIA"]

    @property
    def threads(self) -> int | None:
        """Threads that can run at the same time, by affinity and by a container's limit."""
        known = [self.usable_threads or self.cpu_threads, self.cpu_limit]
        counts = [max(1, int(count)) for count in known if count is not None]
        return min(counts, default=None)


def read_host(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Host:
    """Return what the operating system says.

    Args:
        root: Folder of /proc, /sys and /dev.
        environment: The environment variables.
    """
    cpu_info = _read(root / "proc/cpuinfo")
    cpu_limit, memory_limit = ask(read_limits, root) or (None, None)
    memory = ask(psutil.virtual_memory)
    return Host(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        distribution=ask(lambda: platform.freedesktop_os_release()["PRETTY_NAME"]),
        python=platform.python_version(),
        cpu_name=_find_cpu_name(cpu_info),
        cpu_cores=ask(lambda: psutil.cpu_count(logical=False)),
        cpu_threads=ask(psutil.cpu_count),
        usable_threads=ask(lambda: len(os.sched_getaffinity(0))),
        cpu_limit=cpu_limit,
        memory_bytes=memory and int(memory.total),
        memory_available_bytes=memory and int(memory.available),
        memory_limit_bytes=memory_limit,
        shm_bytes=ask(lambda: shutil.disk_usage(SHM).total),
        load=ask(lambda: os.getloadavg()[0]),
        is_virtual_machine=" hypervisor" in cpu_info,
        hypervisor=_find_hypervisor(root),
        is_container=_is_container(root, environment),
        is_wsl="microsoft" in _read(root / "proc/sys/kernel/osrelease").lower(),
        has_iommu=ask(lambda: any((root / "sys/kernel/iommu_groups").iterdir())),
        has_secure_boot=ask(_read_secure_boot, root),
        pci_gpus=ask(find_pci_gpus, root / "sys/bus/pci/devices"),
        device_files=ask(find_device_files, root / "dev") or {},
        kernel_modules=[name for name in MODULES if (root / "sys/module" / name).exists()],
        kernel_driver=_find_kernel_driver(_read(root / "proc/driver/nvidia/version")),
        cuda_libraries=find_cuda_libraries(environment.get("LD_LIBRARY_PATH", "")),
        environment={name: environment[name] for name in VARIABLES if name in environment},
    )


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _find_cpu_name(cpu_info: str) -> str | None:
    match = re.search(r"^model name\s*:\s*(.+)$", cpu_info, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or None


def _find_hypervisor(root: Path) -> str | None:
    names = [
        _read(root / "sys/class/dmi/id" / file).strip() for file in ("sys_vendor", "product_name")
    ]
    names = [*names, _read(root / "sys/hypervisor/type").strip()]
    return ", ".join(dict.fromkeys(name for name in names if name)) or None


def _is_container(root: Path, environment: Mapping[str, str]) -> bool:
    marks = (root / ".dockerenv", root / "run/.containerenv")
    if any(mark.exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in environment:
        return True
    groups = _read(root / "proc/1/cgroup")
    return bool(environment.get("container")) or bool(
        re.search(r"docker|kubepods|containerd|libpod|/lxc", groups)
    )


def _read_secure_boot(root: Path) -> bool | None:
    for file in (root / "sys/firmware/efi/efivars").glob("SecureBoot-*"):
        return file.read_bytes()[-1] == 1
    return None


def find_pci_gpus(bus: Path) -> list[PciGpu] | None:
    """Return the GPUs of a bus in the form of /sys/bus/pci/devices, None where there is none."""
    if not bus.is_dir():
        return None
    found = []
    for device in sorted(bus.iterdir()):
        vendor = VENDORS.get(_read(device / "vendor").strip())
        if vendor and _read(device / "class").startswith(GPU_CLASSES):
            driver = device / "driver"
            name = driver.resolve().name if driver.exists() else None
            windows = _has_memory_windows(_read(device / "resource"))
            found.append(PciGpu(device.name, vendor, name, windows))
    return found


def _has_memory_windows(resource: str) -> bool | None:
    """Tell whether each memory window has an address; lines are start, end and flags in hex."""
    windows = [
        [int(word, 16) for word in words]
        for words in map(str.split, resource.splitlines()[:NUM_WINDOWS])
        if len(words) == 3 and all(re.fullmatch(r"0x[0-9a-fA-F]{1,16}", word) for word in words)
    ]
    starts = [start for start, end, flags in windows if flags & MEMORY_RESOURCE and end]
    return all(starts) if starts else None


def find_device_files(folder: Path) -> dict[str, bool]:
    """Return the device files of GPUs, each with whether this user may read and write it."""
    paths = [path for pattern in DEVICE_PATTERNS for path in sorted(folder.glob(pattern))]
    paths += sorted(folder.glob("dri/renderD*"))
    return {str(path): os.access(path, os.R_OK | os.W_OK) for path in paths if not path.is_dir()}


def _find_kernel_driver(version: str) -> str | None:
    match = re.search(r"Kernel Module(?:\s+for\s+\S+)?\s+([0-9.]+)", version)
    return match.group(1) if match else None


def find_cuda_libraries(library_path: str) -> list[str]:
    """Return each libcuda.so in the folders of a library path, the one that is taken first."""
    found = []
    for folder in filter(None, library_path.split(os.pathsep)):
        for name in ("libcuda.so.1", "libcuda.so"):
            path = Path(folder) / name
            if ask(path.exists):
                found.append(str(path))
                break
    return found


def read_limits(root: Path) -> tuple[float | None, int | None]:
    """Return the limits of a container: cores and bytes of memory, None for no limit.

    Of all groups that this process is in, the narrowest counts.
    """
    groups = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))
    mount = root / "sys/fs/cgroup"
    cores, memories = [], []
    for folder in _with_parents(mount, groups.get("", "/")):
        cores.append(_divide(_read(folder / "cpu.max").split()))
        memories.append(_count(_read(folder / "memory.max")))
    for folder in _with_parents(mount / "cpu", groups.get("cpu", "/")):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        cores.append(_divide([_read(folder / name) for name in names]))
    for folder in _with_parents(mount / "memory", groups.get("memory", "/")):
        memories.append(_count(_read(folder / "memory.limit_in_bytes")))
    return (
        min((core for core in cores if core is not None), default=None),
        min((size for size in memories if size is not None), default=None),
    )


def _with_parents(mount: Path, group: str) -> list[Path]:
    """Return the folders of a group up to the mount; in a container only the last may be there."""
    folder = mount / group.strip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]


def _divide(words: list[str]) -> float | None:
    """Return quota / period; no limit is `max` or a negative quota."""
    counts = [_count(word) for word in words[:2]]
    if len(counts) != 2 or not counts[0] or not counts[1]:
        return None
    return counts[0] / counts[1]


def _count(word: str) -> int | None:
    word = word.strip()
    if not re.fullmatch(r"[0-9]{1,20}", word) or int(word) >= NO_LIMIT:
        return None
    return int(word)
