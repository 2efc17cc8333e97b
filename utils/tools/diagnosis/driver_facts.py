"""What the NVIDIA driver says through NVML: its version, each GPU's health, memory and links.

    NVML -> Driver, DriverGpu, Load -> gpu_findings, gpu_health

"Not supported" is an answer that GPUs, slices and versions give to different questions: what is not
answered is None and left out. No torch here.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from utils.base.errors import first_line
from utils.tools.diagnosis.diagnosis import ask

# Bits of NVML's clock event reasons that say more than "idle".
THROTTLE_REASONS = {
    0x0002: "clocks set by hand",
    0x0004: "power limit",
    0x0008: "hardware slowdown",
    0x0020: "too hot",
    0x0040: "too hot (hardware)",
    0x0080: "power brake (hardware)",
}
COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
VIRTUALIZATION_MODES = {0: "none", 1: "passthrough", 2: "vGPU", 3: "vGPU host", 4: "vSGA host"}
FABRIC_STATES = {1: "not started", 2: "in progress", 3: "completed"}
TOPOLOGIES = {
    0: "same board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "PCIe host bridge",
    40: "same NUMA node",
    50: "between NUMA nodes",
}
# Of nvml.h: sensor, clocks and counters.
TEMPERATURE_GPU, CLOCK_SM, ECC_UNCORRECTED, ECC_SINCE_BOOT = 0, 1, 1, 0
P2P_READ, P2P_NVLINK, P2P_OK = 0, 2, 0
MAX_NVLINKS = 18


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU; inside a container its name is often not known."""

    pid: int
    name: str | None
    memory_bytes: int | None


@dataclass(frozen=True)
class DriverGpu:
    """One GPU as the driver sees it; None where it does not answer.

    Attributes:
        index: The driver's number, that of nvidia-smi.
        uuid: As in GPU-....
        throttle_reasons: What holds the clocks down at this moment.
        has_pending_repair: Memory rows or pages are replaced at the next reset.
        has_failed_repair: Memory rows could not be replaced.
        ecc_errors: Uncorrected errors since the driver was loaded.
        mig_slices: MIG devices on it; None where MIG is off or not known.
        nvlinks: Links that are up.
    """

    index: int
    name: str = ""
    uuid: str | None = None
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    processes: list[GpuProcess] = field(default_factory=list)
    compute_mode: str | None = None
    virtualization: str | None = None
    fabric_state: str | None = None
    is_mig_enabled: bool | None = None
    mig_slices: int | None = None
    is_ecc_enabled: bool | None = None
    ecc_errors: int | None = None
    has_pending_repair: bool | None = None
    has_failed_repair: bool | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    default_power_limit_watts: float | None = None
    clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    throttle_reasons: list[str] = field(default_factory=list)
    pcie_generation: int | None = None
    max_pcie_generation: int | None = None
    pcie_width: int | None = None
    max_pcie_width: int | None = None
    has_persistence: bool | None = None
    nvlinks: int | None = None


@dataclass(frozen=True)
class Link:
    """The way between two GPUs, by the driver's numbers; `has_p2p` None: not known."""

    first: int
    second: int
    way: str | None
    has_p2p: bool | None


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        nvidia_smi: Path of nvidia-smi, None where it is not on PATH.
        version: Version of the driver.
        cuda_version: Newest CUDA version that the driver serves.
        num_gpus: GPUs that the driver knows.
        gpus: What it says of each.
        links: The way between each two of them.
        problem: Why NVML cannot be used.
    """

    nvidia_smi: str | None = None
    version: str | None = None
    cuda_version: tuple[int, int] | None = None
    num_gpus: int = 0
    gpus: list[DriverGpu] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    problem: str | None = None


class _Nvml:
    """NVML with None for what it does not answer, or does not know the name of."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, name: str, *args: object) -> Any:
        return ask(lambda: getattr(self._module, name)(*args))

    def number(self, name: str, *args: object) -> int | None:
        return as_int(self(name, *args))


def as_int(value: object) -> int | None:
    """Return a whole number, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_driver(module: Any = None) -> Driver:
    """Return what NVML says; a machine without a driver has a `problem`.

    Args:
        module: pynvml, or what stands in for it.
    """
    nvidia_smi = shutil.which("nvidia-smi")
    try:
        module = module or importlib.import_module("pynvml")
    except Exception:  # noqa: BLE001 - a broken package is as good as none
        return Driver(nvidia_smi, problem="nvidia-ml-py is not installed (bash setup.sh)")
    try:
        module.nvmlInit()
    except Exception as exc:  # noqa: BLE001 - NVMLError, or a library that cannot be loaded
        return Driver(nvidia_smi, problem=first_line(exc))
    try:
        return _read_driver(_Nvml(module), nvidia_smi)
    finally:
        ask(module.nvmlShutdown)


def _read_driver(nvml: _Nvml, nvidia_smi: str | None) -> Driver:
    cuda = nvml.number("nvmlSystemGetCudaDriverVersion")
    version = _as_text(nvml("nvmlSystemGetDriverVersion"))
    count = nvml.number("nvmlDeviceGetCount") or 0
    handles = {index: nvml("nvmlDeviceGetHandleByIndex", index) for index in range(count)}
    lost = sum(handle is None for handle in handles.values())
    known = {index: handle for index, handle in handles.items() if handle is not None}
    return Driver(
        nvidia_smi,
        version=version,
        cuda_version=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
        num_gpus=count,
        gpus=[_read_gpu(nvml, index, handle) for index, handle in known.items()],
        links=[
            _read_link(nvml, (a, known[a]), (b, known[b])) for a in known for b in known if a < b
        ],
        problem=f"{lost} of {count} GPUs do not answer" if lost else None,
    )


def _read_gpu(nvml: _Nvml, index: int, handle: Any) -> DriverGpu:
    memory = nvml("nvmlDeviceGetMemoryInfo", handle)
    mig = nvml("nvmlDeviceGetMigMode", handle)
    ecc = nvml("nvmlDeviceGetEccMode", handle)
    is_mig_enabled = None if mig is None else bool(mig[0])
    rows = nvml("nvmlDeviceGetRemappedRows", handle)
    pages = nvml("nvmlDeviceGetRetiredPagesPendingStatus", handle)
    persistence = nvml.number("nvmlDeviceGetPersistenceMode", handle)
    capability = nvml("nvmlDeviceGetCudaComputeCapability", handle)
    return DriverGpu(
        index=index,
        name=_as_text(nvml("nvmlDeviceGetName", handle)) or "",
        uuid=_as_text(nvml("nvmlDeviceGetUUID", handle)),
        capability=None if capability is None else (int(capability[0]), int(capability[1])),
        memory_bytes=as_int(getattr(memory, "total", None)),
        memory_used_bytes=as_int(getattr(memory, "used", None)),
        processes=_read_processes(nvml, handle),
        compute_mode=_name(COMPUTE_MODES, nvml.number("nvmlDeviceGetComputeMode", handle)),
        virtualization=_name(
            VIRTUALIZATION_MODES, nvml.number("nvmlDeviceGetVirtualizationMode", handle)
        ),
        fabric_state=ask(_read_fabric_state, nvml, handle),
        is_mig_enabled=is_mig_enabled,
        mig_slices=_count_slices(nvml, handle) if is_mig_enabled else None,
        is_ecc_enabled=None if ecc is None else bool(ecc[0]),
        ecc_errors=nvml.number(
            "nvmlDeviceGetTotalEccErrors", handle, ECC_UNCORRECTED, ECC_SINCE_BOOT
        ),
        has_pending_repair=None
        if rows is None and pages is None
        else bool(rows and rows[2]) or bool(pages),
        has_failed_repair=None if rows is None else bool(rows[3]),
        has_persistence=None if persistence is None else bool(persistence),
        nvlinks=_count_nvlinks(nvml, handle),
        **_read_moment(nvml, handle),
    )


def _read_moment(nvml: _Nvml, handle: Any) -> dict[str, Any]:
    """Return what changes from moment to moment, by the names of `DriverGpu`."""
    milliwatts = {
        key: nvml.number(f"nvmlDeviceGet{question}", handle)
        for key, question in (
            ("power_watts", "PowerUsage"),
            ("power_limit_watts", "EnforcedPowerLimit"),
            ("default_power_limit_watts", "PowerManagementDefaultLimit"),
        )
    }
    reasons = nvml.number("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # drivers before 535 know the older name only
        reasons = nvml.number("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    return {
        **{key: None if value is None else value / 1000 for key, value in milliwatts.items()},
        "throttle_reasons": [
            name for bit, name in THROTTLE_REASONS.items() if (reasons or 0) & bit
        ],
        "temperature_celsius": nvml.number("nvmlDeviceGetTemperature", handle, TEMPERATURE_GPU),
        "clock_mhz": nvml.number("nvmlDeviceGetClockInfo", handle, CLOCK_SM),
        "max_clock_mhz": nvml.number("nvmlDeviceGetMaxClockInfo", handle, CLOCK_SM),
        "pcie_generation": nvml.number("nvmlDeviceGetCurrPcieLinkGeneration", handle),
        "max_pcie_generation": nvml.number("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        "pcie_width": nvml.number("nvmlDeviceGetCurrPcieLinkWidth", handle),
        "max_pcie_width": nvml.number("nvmlDeviceGetMaxPcieLinkWidth", handle),
    }


def read_moment(uuid: str, module: Any = None) -> Mapping[str, Any]:
    """Return clocks, power, heat and PCIe link of a GPU at this moment; empty without an answer.

    Args:
        uuid: Of the GPU, as the driver gives it.
        module: pynvml, or what stands in for it.
    """
    module = module or ask(importlib.import_module, "pynvml")
    nvml = _Nvml(module)
    nvml("nvmlInit")
    handle = nvml("nvmlDeviceGetHandleByUUID", uuid)
    moment = {} if handle is None else _read_moment(nvml, handle)
    nvml("nvmlShutdown")
    return moment


def _read_processes(nvml: _Nvml, handle: Any) -> list[GpuProcess]:
    processes = nvml("nvmlDeviceGetComputeRunningProcesses", handle) or []
    return [
        GpuProcess(
            pid=int(process.pid),
            name=ask(lambda pid: str(psutil.Process(pid).name()), process.pid),
            memory_bytes=as_int(process.usedGpuMemory),
        )
        for process in processes
        if process.pid not in (os.getpid(), os.getppid())
    ]


def _read_fabric_state(nvml: _Nvml, handle: Any) -> str | None:
    """Return the state of the NVSwitch fabric; GPUs without one do not answer."""
    info = nvml("c_nvmlGpuFabricInfo_t")
    if nvml("nvmlDeviceGetGpuFabricInfo", handle, ctypes.byref(info)) is None:
        return None
    return FABRIC_STATES.get(int(info.state))


def _count_slices(nvml: _Nvml, handle: Any) -> int:
    most = nvml.number("nvmlDeviceGetMaxMigDeviceCount", handle) or 0
    slices = (nvml("nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in range(most))
    return sum(found is not None for found in slices)


def _count_nvlinks(nvml: _Nvml, handle: Any) -> int | None:
    states = [nvml.number("nvmlDeviceGetNvLinkState", handle, link) for link in range(MAX_NVLINKS)]
    known = [state for state in states if state is not None]
    return sum(state == 1 for state in known) if known else None


def _read_link(nvml: _Nvml, first: tuple[int, Any], second: tuple[int, Any]) -> Link:
    pair = (first[1], second[1])
    read = nvml.number("nvmlDeviceGetP2PStatus", *pair, P2P_READ)
    way = _name(TOPOLOGIES, nvml.number("nvmlDeviceGetTopologyCommonAncestor", *pair))
    if nvml.number("nvmlDeviceGetP2PStatus", *pair, P2P_NVLINK) == P2P_OK:
        way = "NVLink"
    return Link(first[0], second[0], way, None if read is None else read == P2P_OK)


def _name(names: Mapping[int, str], value: int | None) -> str | None:
    return None if value is None else names.get(value)


def _as_text(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None
