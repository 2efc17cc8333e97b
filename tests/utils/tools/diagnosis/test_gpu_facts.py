"""Facts from fake /proc, /sys and /dev trees, from a fake NVML, and from torch as it is."""

from __future__ import annotations

import ctypes
import os
import types
from pathlib import Path
from typing import Any

import pynvml
import pytest

from utils.tools.diagnosis import device_timing
from utils.tools.diagnosis.device_timing import (
    Device,
    find_devices,
    pick_shape,
    time_device,
    time_training_step,
)
from utils.tools.diagnosis.driver_facts import GpuProcess, Link, read_driver, read_moment
from utils.tools.diagnosis.host_facts import (
    PciGpu,
    find_cuda_libraries,
    find_device_files,
    find_pci_gpus,
    read_host,
    read_limits,
)
from utils.tools.diagnosis.sample_model import SampleShape
from utils.tools.diagnosis.torch_facts import (
    Torch,
    TorchGpu,
    find_attention_kernels,
    read_torch,
    read_torch_gpu,
)

GIB = 2**30
TINY_SHAPE = (64, 16, 1, 2, 8, 1)
MAPPED = "0x00000000fa000000 0x00000000faffffff 0x0000000000040200\n"
UNMAPPED = "0x0000000000000000 0x00000007ffffffff 0x000000002014220c\n"
PORTS = "0x0000000000000000 0x000000000000007f 0x0000000000040101\n"
NOTHING = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def add_pci_device(
    root: Path, address: str, vendor: str, kind: str, driver: str | None = None, resource: str = ""
) -> None:
    device = root / "sys/bus/pci/devices" / address
    write(device, {"vendor": f"{vendor}\n", "class": f"{kind}\n", "resource": resource})
    if driver:
        folder = root / "sys/bus/pci/drivers" / driver
        folder.mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(folder)


# The host


def test_gpus_on_the_bus_have_vendor_driver_and_address_space(tmp_path: Path) -> None:
    add_pci_device(
        tmp_path, "0000:01:00.0", "0x10de", "0x030200", "nvidia", MAPPED + PORTS + NOTHING
    )
    add_pci_device(tmp_path, "0000:02:00.0", "0x10de", "0x030000", "vfio-pci", MAPPED + UNMAPPED)
    add_pci_device(tmp_path, "0000:02:00.1", "0x10de", "0x040300")  # its sound
    add_pci_device(tmp_path, "0000:03:00.0", "0x1002", "0x120000")  # an accelerator of AMD
    add_pci_device(tmp_path, "0000:04:00.0", "0x8086", "0x030000")
    (tmp_path / "sys/bus/pci/devices/empty").mkdir()
    assert find_pci_gpus(tmp_path / "sys/bus/pci/devices") == [
        PciGpu("0000:01:00.0", "NVIDIA", "nvidia", True),
        PciGpu("0000:02:00.0", "NVIDIA", "vfio-pci", False),
        PciGpu("0000:03:00.0", "AMD", None, None),
    ]
    assert find_pci_gpus(tmp_path / "nowhere") is None


def test_device_files_are_those_of_gpus_each_with_the_right_to_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "dxg", "kfd", "null"):
        (tmp_path / name).touch()
    (tmp_path / "nvidia-caps").mkdir()
    (tmp_path / "dri").mkdir()
    (tmp_path / "dri/renderD128").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "nvidia1")
    found = {Path(path).name: may_use for path, may_use in find_device_files(tmp_path).items()}
    assert found == {
        "nvidia0": True,
        "nvidia1": False,
        "nvidiactl": True,
        "nvidia-uvm": True,
        "dxg": True,
        "kfd": True,
        "renderD128": True,
    }


def test_host_is_read_from_its_files_and_variables(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/cpuinfo": "model name\t: Sample CPU @ 3 GHz\nflags\t: fpu hypervisor\n",
            "proc/1/cgroup": "0::/kubepods/pod1\n",
            "proc/sys/kernel/osrelease": "6.1.0-microsoft-standard-WSL2\n",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for "
            "x86_64  580.65.06  Release Build\nGCC version: 12\n",
            "sys/class/dmi/id/sys_vendor": "Google\n",
            "sys/class/dmi/id/product_name": "Google Compute Engine\n",
            "sys/module/nouveau/refcnt": "0\n",
            "sys/kernel/iommu_groups/0/type": "DMA\n",
        },
    )
    variables = tmp_path / "sys/firmware/efi/efivars"
    variables.mkdir(parents=True)
    (variables / "SecureBoot-8be4df61").write_bytes(b"\6\0\0\0\1")
    host = read_host(tmp_path, {"CUDA_VISIBLE_DEVICES": "0", "AWS_SECRET_ACCESS_KEY": "x"})
    assert host.cpu_name == "Sample CPU @ 3 GHz"
    assert (host.is_virtual_machine, host.is_container, host.is_wsl) == (True, True, True)
    assert host.hypervisor == "Google, Google Compute Engine"
    assert host.kernel_driver == "580.65.06"
    assert host.kernel_modules == ["nouveau"]
    assert (host.has_iommu, host.has_secure_boot) == (True, True)
    assert host.pci_gpus is None
    assert host.environment == {"CUDA_VISIBLE_DEVICES": "0"}
    assert host.cpu_threads is not None
    assert host.memory_bytes is not None


def test_older_kernel_module_says_its_version_too(tmp_path: Path) -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 2021\n"
    write(tmp_path, {"proc/driver/nvidia/version": text})
    assert read_host(tmp_path, {}).kernel_driver == "470.82.01"


def test_nothing_at_all_is_no_error(tmp_path: Path) -> None:
    host = read_host(tmp_path / "nowhere", {})
    assert (host.pci_gpus, host.device_files, host.kernel_modules) == (None, {}, [])
    assert (host.cpu_limit, host.memory_limit_bytes) == (None, None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, None)),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            },
            (1.5, 4 * GIB),
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/memory.max": "max\n",
            },
            (2.0, None),
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            (0.5, GIB),
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            (None, None),
        ),
    ],
    ids=["none", "version 2", "of a group above", "version 1", "no limit"],
)
def test_limits_of_a_container_are_the_narrowest_of_its_groups(
    tmp_path: Path, files: dict[str, str], expected: tuple[float | None, int | None]
) -> None:
    write(tmp_path, files)
    assert read_limits(tmp_path) == expected


def test_libcuda_in_a_library_path_is_found_in_its_order(tmp_path: Path) -> None:
    write(tmp_path, {"stubs/libcuda.so": "", "lib/libcuda.so.1": "", "lib/libcuda.so": ""})
    path = f"{tmp_path}/none::{tmp_path}/stubs:{tmp_path}/lib"
    assert find_cuda_libraries(path) == [
        f"{tmp_path}/stubs/libcuda.so",
        f"{tmp_path}/lib/libcuda.so.1",
    ]
    assert find_cuda_libraries("") == []


# The driver


class FakeNvml:
    """NVML with the answers of one machine; what is not among them is "not supported"."""

    NVMLError = pynvml.NVMLError
    c_nvmlGpuFabricInfo_t = pynvml.c_nvmlGpuFabricInfo_t

    def __init__(self, count: int = 1, **answers: Any) -> None:
        self.count, self.answers, self.is_open = count, answers, False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetGpuFabricInfo(self, handle: object, reference: Any) -> int:
        reference._obj.state = self.answers["fabric"]
        return 0

    def __getattr__(self, name: str) -> Any:
        def answer(*args: object) -> Any:
            assert self.is_open
            value = self.answers.get(name)
            if value is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return value(*args) if callable(value) else value

        return answer


def sample_nvml(count: int = 1, **changes: Any) -> FakeNvml:
    process = types.SimpleNamespace(pid=2**30, usedGpuMemory=GIB)
    own = types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB)
    answers: dict[str, Any] = {
        "nvmlSystemGetDriverVersion": "580.65.06",
        "nvmlSystemGetCudaDriverVersion": 13000,
        "nvmlDeviceGetCount": count,
        "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
        "nvmlDeviceGetHandleByUUID": lambda uuid: f"handle {uuid}",
        "nvmlDeviceGetName": b"NVIDIA H200",
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=140 * GIB, used=GIB),
        "nvmlDeviceGetComputeRunningProcesses": [process, own],
        "nvmlDeviceGetComputeMode": 0,
        "nvmlDeviceGetMigMode": [0, 0],
        "nvmlDeviceGetEccMode": [1, 1],
        "nvmlDeviceGetTotalEccErrors": 2,
        "nvmlDeviceGetRemappedRows": (1, 0, 1, 0),
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x20,
        "nvmlDeviceGetPowerUsage": 80_000,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetNvLinkState": lambda handle, link: 1 if link < 4 else 0,
        "nvmlDeviceGetVirtualizationMode": 1,
        "nvmlDeviceGetP2PStatus": lambda first, second, what: 0 if what == 0 else 5,
        "nvmlDeviceGetTopologyCommonAncestor": 50,
        "fabric": 2,
        **changes,
    }
    return FakeNvml(count, **answers)


def test_driver_answers_what_it_can_and_the_rest_is_none() -> None:
    nvml = sample_nvml()
    driver = read_driver(nvml)
    assert not nvml.is_open
    assert (driver.version, driver.cuda_version, driver.num_gpus) == ("580.65.06", (13, 0), 1)
    (gpu,) = driver.gpus
    assert (gpu.name, gpu.uuid, gpu.capability) == ("NVIDIA H200", "GPU-handle 0", (9, 0))
    assert gpu.processes == [GpuProcess(2**30, None, GIB)]  # not this process
    assert (gpu.memory_used_bytes, gpu.is_ecc_enabled, gpu.ecc_errors) == (GIB, True, 2)
    assert (gpu.has_pending_repair, gpu.has_failed_repair) == (True, False)
    assert gpu.throttle_reasons == ["too hot"]
    assert (gpu.power_watts, gpu.power_limit_watts) == (80.0, 700.0)
    assert gpu.default_power_limit_watts is None
    assert (gpu.nvlinks, gpu.virtualization, gpu.compute_mode) == (4, "passthrough", "default")
    assert gpu.fabric_state == "in progress"
    assert (gpu.is_mig_enabled, gpu.mig_slices) == (False, None)
    assert (gpu.has_persistence, gpu.pcie_width) == (None, None)


def test_driver_that_answers_nothing_of_a_gpu_hides_nothing_else() -> None:
    nvml = FakeNvml(1, nvmlDeviceGetCount=2, nvmlDeviceGetHandleByIndex=lambda i: i or None)
    driver = read_driver(nvml)
    assert [gpu.index for gpu in driver.gpus] == [1]
    assert driver.problem == "1 of 2 GPUs do not answer"
    assert driver.gpus[0].nvlinks is None


def test_mig_slices_are_counted() -> None:
    nvml = sample_nvml(
        nvmlDeviceGetMigMode=[1, 1],
        nvmlDeviceGetMaxMigDeviceCount=7,
        nvmlDeviceGetMigDeviceHandleByIndex=lambda handle, index: "slice" if index < 3 else None,
    )
    nvml.answers["nvmlDeviceGetMigDeviceHandleByIndex"] = _slices
    (gpu,) = read_driver(nvml).gpus
    assert (gpu.is_mig_enabled, gpu.mig_slices) == (True, 3)


def _slices(handle: object, index: int) -> str:
    if index >= 3:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    return "slice"


def test_way_between_gpus_is_nvlink_or_by_topology() -> None:
    assert read_driver(sample_nvml(2)).links == [Link(0, 1, "between NUMA nodes", True)]
    linked = sample_nvml(2, nvmlDeviceGetP2PStatus=lambda first, second, what: 0)
    assert read_driver(linked).links == [Link(0, 1, "NVLink", True)]
    cut = sample_nvml(2, nvmlDeviceGetP2PStatus=lambda first, second, what: 3)
    assert read_driver(cut).links == [Link(0, 1, "between NUMA nodes", False)]


@pytest.mark.parametrize(
    "error",
    [pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN), OSError("no file"), ctypes.ArgumentError()],
)
def test_driver_that_cannot_be_opened_has_a_problem(error: Exception) -> None:
    def refuse() -> None:
        raise error

    nvml = types.SimpleNamespace(nvmlInit=refuse)
    assert read_driver(nvml).problem


def test_moment_of_a_gpu_is_read_by_its_uuid() -> None:
    moment = read_moment("GPU-1", sample_nvml(nvmlDeviceGetCurrPcieLinkGeneration=4))
    assert moment["pcie_generation"] == 4
    assert moment["throttle_reasons"] == ["too hot"]
    assert read_moment("GPU-1", FakeNvml()) == {}


# torch


def test_torch_of_this_machine_tells_of_itself() -> None:
    facts = read_torch()
    assert facts.version
    assert facts.problem is None
    assert facts.num_threads
    assert "math" in facts.attention


def test_attention_kernel_that_a_device_lacks_is_not_named() -> None:
    assert "cudnn" not in find_attention_kernels("cpu", "float32")
    assert find_attention_kernels("no such device", "float32") == []


def fake_torch(major: int, minor: int, hip: str | None = None, arch: str = "") -> Any:
    properties = types.SimpleNamespace(
        name="Sample", major=major, minor=minor, total_memory=GIB, uuid="1-2", gcnArchName=arch
    )
    cuda = types.SimpleNamespace(get_device_properties=lambda index: properties)
    return types.SimpleNamespace(cuda=cuda, version=types.SimpleNamespace(hip=hip))


@pytest.mark.parametrize(
    ("torch", "bf16", "fp8", "tf32"),
    [
        (fake_torch(7, 5), False, False, False),
        (fake_torch(8, 0), True, False, True),
        (fake_torch(8, 9), True, True, True),
        (fake_torch(9, 0), True, True, True),
        (fake_torch(9, 0, "6.4", "gfx90a:sramecc+"), True, False, False),
        (fake_torch(9, 4, "6.4", "gfx942:sramecc+"), True, True, False),
    ],
    ids=["T4", "A100", "L4", "H100", "MI250", "MI300"],
)
def test_precisions_follow_from_the_capability(
    torch: Any, bf16: bool, fp8: bool, tf32: bool
) -> None:
    gpu = read_torch_gpu(torch, 0)
    found = (gpu.is_bf16_supported, gpu.is_fp8_supported, gpu.is_tf32_supported)
    assert found == (bf16, fp8, tf32)
    assert gpu.precision == ("bf16" if bf16 else "fp16")
    assert (gpu.uuid, gpu.memory_free_bytes, gpu.attention) == ("GPU-1-2", None, [])


def test_gpu_that_cannot_be_asked_has_a_problem() -> None:
    assert "get_device_properties" in str(
        read_torch_gpu(types.SimpleNamespace(cuda=None), 0).problem
    )


# Timings


def test_cpu_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_timing, "CPU_MATMUL_SIZE", 64)
    monkeypatch.setattr(device_timing, "SMALL_SHAPE", TINY_SHAPE)
    monkeypatch.setattr(device_timing, "MAX_STEPS", 2)
    timing = time_device(Device("cpu"))
    (matmul,) = timing.matmuls
    assert matmul.problem is None
    assert matmul.tflops == pytest.approx(2 * 64**3 / matmul.milliseconds * 1000 / 1e12)
    step = timing.step
    assert step.problem is None
    assert step.tokens == 8
    assert step.tokens_per_second == pytest.approx(8 / step.milliseconds * 1000)
    assert step.mfu is None  # no peak of a CPU is known
    assert timing.moment == {}


def test_device_that_fails_says_why() -> None:
    step = time_training_step(Device("meta"), SampleShape(*TINY_SHAPE))
    assert step.tokens_per_second is None
    assert step.problem
    timing = time_device(Device("cuda:99", "bf16", TorchGpu(99, "H200", 1, (9, 0), True, True)))
    assert all(matmul.problem for matmul in timing.matmuls)
    assert timing.step.problem


def test_devices_are_timed_in_their_own_precision_and_size() -> None:
    def make(index: int, has_bf16: bool, free: int) -> TorchGpu:
        return TorchGpu(index, "x", 80 * GIB, (8, 0), has_bf16, True, memory_free_bytes=free)

    gpus = [make(0, True, 70 * GIB), make(1, False, GIB)]
    devices = find_devices(Torch(version="2.13.0", gpus=gpus, is_mps_available=True))
    assert [(d.name, d.precision) for d in devices] == [
        ("cpu", "no"),
        ("cuda:0", "bf16"),
        ("cuda:1", "fp16"),
        ("mps", "no"),
    ]
    hidden = [pick_shape(device).hidden_size for device in devices]
    assert hidden == [256, 1024, 256, 256]
    assert find_devices(Torch(problem="broken")) == []
