"""The load of this machine: CPU, memory, disk, and GPUs through NVML.

    psutil, NVML -> MachineLoad -> monitor

A machine without a GPU or its driver is no error: `gpu_note` says why there is nothing to show.
No torch here.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

FIRST_CPU_SECONDS = 0.2
# Limit and use of a container, by version of cgroups.
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


@dataclass(frozen=True)
class Gpu:
    """What NVML says of one GPU; None where it says nothing."""

    index: int
    name: str
    utilization_percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    temperature_celsius: float | None
    power_watts: float | None


@dataclass(frozen=True)
class MachineLoad:
    """Load of this machine; the disk is the one that holds the checkpoints, None if unreadable."""

    cpu_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    disk_free_bytes: int | None
    disk_total_bytes: int | None
    gpus: list[Gpu]
    gpu_note: str | None


class MachineProbe:
    """Reads the load of this machine; NVML is opened once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        psutil.cpu_percent()  # what follows is measured from here
        self._cpu_wait_until: float | None = time.monotonic() + FIRST_CPU_SECONDS
        self._gpu_note: str | None = None
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
        except ImportError:
            self._gpu_note = "unknown: nvidia-ml-py is not installed"
        except pynvml.NVMLError as exc:
            is_usual = isinstance(exc, pynvml.NVMLError_LibraryNotFound)  # a machine without a GPU
            self._gpu_note = "none" if is_usual else f"none ({exc})"

    def look(self) -> MachineLoad:
        """Return the load now; the first look may wait a moment to measure the CPU."""
        if self._cpu_wait_until is not None:
            time.sleep(max(0.0, self._cpu_wait_until - time.monotonic()))
            self._cpu_wait_until = None
        memory = psutil.virtual_memory()
        disk = None
        with contextlib.suppress(OSError):  # no right to look, or a share that is gone
            disk = psutil.disk_usage(str(existing_parent(self._directory)))
        return MachineLoad(
            cpu_percent=psutil.cpu_percent(),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            disk_free_bytes=disk and disk.free,
            disk_total_bytes=disk and disk.total,
            gpus=self._read_gpus(),
            gpu_note=self._gpu_note,
        )

    def _read_gpus(self) -> list[Gpu]:
        if self._nvml is None:
            return []
        try:
            count = self._nvml.nvmlDeviceGetCount()
            return [self._read_gpu(index) for index in range(count)]
        except self._nvml.NVMLError as exc:
            self._gpu_note = f"cannot be read ({exc})"
            return []

    def _read_gpu(self, index: int) -> Gpu:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        utilization = memory = temperature = power = None
        # Not every GPU (MIG slices, older ones) answers every question.
        with contextlib.suppress(nvml.NVMLError):
            utilization = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        with contextlib.suppress(nvml.NVMLError):
            temperature = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        with contextlib.suppress(nvml.NVMLError):
            power = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        return Gpu(
            index=index,
            name=str(nvml.nvmlDeviceGetName(handle)),
            utilization_percent=utilization,
            memory_used_bytes=memory and int(memory.used),
            memory_total_bytes=memory and int(memory.total),
            temperature_celsius=temperature,
            power_watts=power,
        )


def available_memory() -> int:
    """Return the bytes of host memory that can still be used, also by a container's limit."""
    available = int(psutil.virtual_memory().available)
    for limit, used in CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # no limit: "max", or no such file
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
            available = min(available, max(0, left + _reclaimable(Path(limit).parent)))
    return available


def _reclaimable(group: Path) -> int:
    """Return the file cache that a container's use counts and gives back when it is needed."""
    for line in (group / "memory.stat").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def existing_parent(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists; absolute."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


class PeakMemory:
    """The highest resident memory of this process above what it was, on Linux; 0 elsewhere."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self._before = _own_memory("VmRSS")

    def read(self) -> int:
        """Return the bytes of the peak since the beginning, above the memory at the beginning."""
        return max(0, _own_memory("VmHWM") - self._before)


def _own_memory(key: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0
