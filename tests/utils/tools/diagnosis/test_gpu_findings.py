"""What is made of the facts: each cause by its words, and silence where nothing is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from configs.training_config import TrainingConfig, get_training_config
from utils.tools.diagnosis.configuration_fit import (
    describe_forecast,
    find_forecast_findings,
    forecast_run,
    format_long,
)
from utils.tools.diagnosis.diagnosis import Finding
from utils.tools.diagnosis.driver_facts import Driver, DriverGpu, GpuProcess, Link
from utils.tools.diagnosis.gpu_findings import _is_served, find_gpu_findings
from utils.tools.diagnosis.gpu_health import find_health_findings
from utils.tools.diagnosis.host_facts import Host, PciGpu
from utils.tools.diagnosis.host_findings import find_host_findings
from utils.tools.diagnosis.torch_facts import Torch, TorchGpu

GIB = 2**30
FILES = {"/dev/nvidia0": True, "/dev/nvidiactl": True, "/dev/nvidia-uvm": True}
NVIDIA = PciGpu("0000:01:00.0", "NVIDIA", "nvidia", True)
AMD = PciGpu("0000:03:00.0", "AMD", "amdgpu", True)
BARE = Host(system="Linux", pci_gpus=[replace(NVIDIA, driver=None)])
HOST = Host(system="Linux", pci_gpus=[NVIDIA], device_files=FILES, cpu_threads=16)
GPU = DriverGpu(0, "NVIDIA H200", "GPU-1", memory_bytes=140 * GIB, memory_used_bytes=0)
DRIVER = Driver("/usr/bin/nvidia-smi", "580.65.06", (13, 0), 1, [GPU])
SILENT = Driver(problem="NVML Shared Library Not Found")
H200 = TorchGpu(0, "NVIDIA H200", 140 * GIB, (9, 0), True, True, True, True, attention=["flash"])
T4 = TorchGpu(0, "Tesla T4", 15 * GIB, (7, 5), False, True, attention=["efficient", "math"])
CPU_TORCH = Torch(version="2.13.0+cpu")
CUDA_TORCH = Torch(version="2.13.0", cuda_build="13.0")
ROCM_TORCH = Torch(version="2.13.0", hip_build="6.4")
WORKING = replace(
    CUDA_TORCH,
    is_cuda_available=True,
    gpus=[H200],
    architectures=["sm_80", "sm_90", "compute_120"],
)


def words(findings: list[Finding]) -> str:
    return " ".join(f"{item.level}: {item.message} {item.advice}" for item in findings)


def with_variables(host: Host = HOST, **variables: str) -> Host:
    return replace(host, environment=variables)


# Between torch and the GPU


def test_working_gpu_has_no_problem() -> None:
    (only,) = find_gpu_findings(HOST, DRIVER, WORKING)
    assert only == Finding("ok", "torch can use 1 GPU(s) with CUDA 13.0.")
    assert find_health_findings(HOST, DRIVER) == []
    assert find_host_findings(HOST, WORKING) == []


DRIVER_CASES: list[tuple[str, Host, Driver, Torch, list[str]]] = [
    ("no driver", BARE, SILENT, CUDA_TORCH, ["no NVIDIA driver is loaded", "Install the NVIDIA"]),
    ("secure boot", replace(BARE, has_secure_boot=True), SILENT, CUDA_TORCH, ["Secure Boot is on"]),
    (
        "nouveau",
        replace(BARE, kernel_modules=["nouveau"]),
        SILENT,
        CUDA_TORCH,
        ["nouveau holds it"],
    ),
    (
        "held by nouveau",
        replace(BARE, pci_gpus=[replace(NVIDIA, driver="nouveau")]),
        SILENT,
        CUDA_TORCH,
        ["nouveau holds it"],
    ),
    (
        "vfio",
        replace(BARE, pci_gpus=[replace(NVIDIA, driver="vfio-pci")]),
        SILENT,
        CUDA_TORCH,
        ["vfio-pci holds the GPU at 0000:01:00.0", "Train in that virtual machine"],
    ),
    (
        "no address space",
        replace(BARE, pci_gpus=[replace(NVIDIA, has_memory_windows=False)]),
        SILENT,
        CUDA_TORCH,
        ["no address space", "64-bit MMIO"],
    ),
    (
        "module without files",
        replace(BARE, kernel_modules=["nvidia"]),
        SILENT,
        CUDA_TORCH,
        ["no /dev/nvidia*", "nvidia-modprobe"],
    ),
    (
        "container",
        replace(BARE, is_container=True),
        SILENT,
        CUDA_TORCH,
        ["this container has no /dev/nvidia*", "--gpus all"],
    ),
    (
        "container lost it",
        replace(HOST, is_container=True),
        Driver(problem="Unknown Error"),
        CUDA_TORCH,
        ["has lost its GPU", "cgroupdriver"],
    ),
    (
        "no right",
        replace(HOST, device_files={**FILES, "/dev/nvidiactl": False}),
        Driver(problem="Insufficient Permissions"),
        CUDA_TORCH,
        ["may not use /dev/nvidiactl", "usermod"],
    ),
    (
        "no uvm",
        replace(HOST, device_files={"/dev/nvidia0": True, "/dev/nvidiactl": True}),
        DRIVER,
        CUDA_TORCH,
        ["/dev/nvidia-uvm is missing", "nvidia-modprobe"],
    ),
    (
        "no uvm in a container",
        replace(HOST, device_files={"/dev/nvidia0": True}, is_container=True),
        DRIVER,
        CUDA_TORCH,
        ["/dev/nvidiactl and /dev/nvidia-uvm is missing", "--gpus all"],
    ),
    (
        "mismatch",
        replace(HOST, kernel_driver="570.1"),
        Driver(problem="Driver/library version mismatch"),
        CUDA_TORCH,
        ["kernel module (570.1)", "differ in version", "Reboot"],
    ),
    ("no library", HOST, SILENT, CUDA_TORCH, ["There is /dev/nvidia0", "does not answer"]),
    (
        "WSL",
        Host(system="Linux", is_wsl=True, device_files={"/dev/dxg": True}),
        SILENT,
        CUDA_TORCH,
        ["There is /dev/dxg", "wsl --update"],
    ),
]


@pytest.mark.parametrize(
    ("host", "driver", "torch", "expected"),
    [case[1:] for case in DRIVER_CASES],
    ids=[case[0] for case in DRIVER_CASES],
)
def test_cause_below_torch_is_the_only_problem_and_says_what_to_do(
    host: Host, driver: Driver, torch: Torch, expected: list[str]
) -> None:
    findings = find_gpu_findings(host, driver, torch)
    text = words(findings[:1])
    assert text.startswith("problem: ")
    for part in expected:
        assert part in text


TORCH_CASES: list[tuple[str, Host, Driver, Torch, list[str]]] = [
    ("CPU build", HOST, DRIVER, CPU_TORCH, ["CPU-only build", "Install a build for CUDA 13"]),
    (
        "old driver",
        HOST,
        replace(DRIVER, version="550.1", cuda_version=(12, 4)),
        CUDA_TORCH,
        ["serves CUDA up to 12.4", "built for 13.0", "580.65.06 or newer", "for CUDA 12"],
    ),
    (
        "hidden",
        with_variables(CUDA_VISIBLE_DEVICES=""),
        DRIVER,
        CUDA_TORCH,
        ["CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES"],
    ),
    ("-1", with_variables(CUDA_VISIBLE_DEVICES="-1"), DRIVER, CUDA_TORCH, ["hides every GPU"]),
    (
        "hidden from a CPU build",
        with_variables(CUDA_VISIBLE_DEVICES=""),
        DRIVER,
        CPU_TORCH,
        ["hides every GPU", "CPU-only build"],
    ),
    (
        "wrong index",
        with_variables(CUDA_VISIBLE_DEVICES="1,0"),
        DRIVER,
        CUDA_TORCH,
        ["problem: CUDA_VISIBLE_DEVICES is '1,0': there is no GPU 1, the last is 0"],
    ),
    (
        "wrong index, one works",
        with_variables(CUDA_VISIBLE_DEVICES="0,7"),
        DRIVER,
        WORKING,
        ["there is no GPU 7", "nvidia-smi -L"],
    ),
    (
        "capabilities",
        with_variables(NVIDIA_DRIVER_CAPABILITIES="utility"),
        DRIVER,
        CUDA_TORCH,
        ["this container has no libcuda", "compute,utility"],
    ),
    (
        "says why",
        HOST,
        DRIVER,
        replace(CUDA_TORCH, problem="CUDA initialization: Error 802"),
        ["torch cannot use the GPU: CUDA initialization: Error 802", "nvidia-fabricmanager"],
    ),
    (
        "says what nobody knows",
        HOST,
        DRIVER,
        replace(CUDA_TORCH, problem="weather"),
        ["torch cannot use the GPU: weather", "dmesg"],
    ),
    (
        "fewer GPUs",
        HOST,
        replace(DRIVER, num_gpus=4),
        WORKING,
        ["note: The driver knows 4 GPUs, torch sees 1", "CUDA_VISIBLE_DEVICES is not set"],
    ),
    (
        "a GPU is lost",
        HOST,
        replace(DRIVER, problem="1 of 2 GPUs do not answer"),
        WORKING,
        ["problem: 1 of 2 GPUs do not answer", "Xid"],
    ),
    (
        "one for a virtual machine",
        replace(HOST, pci_gpus=[NVIDIA, PciGpu("0000:02:00.0", "NVIDIA", "vfio-pci")]),
        DRIVER,
        WORKING,
        ["note: Held by other kernel drivers", "0000:02:00.0 by vfio-pci"],
    ),
    (
        "T4",
        HOST,
        DRIVER,
        replace(WORKING, gpus=[T4]),
        ["no code for Tesla T4 (capability 7.5", "T4 has no bfloat16", "no flash attention"],
    ),
    (
        "unequal",
        HOST,
        replace(DRIVER, num_gpus=2),
        replace(WORKING, gpus=[H200, T4]),
        ["The GPUs differ: NVIDIA H200, Tesla T4", "PCI_BUS_ID"],
    ),
    (
        "behind by a minor version",
        HOST,
        replace(DRIVER, cuda_version=(12, 2)),
        replace(WORKING, cuda_build="12.8"),
        ["note: The driver serves CUDA up to 12.2", "12.8"],
    ),
    (
        "broken torch",
        HOST,
        DRIVER,
        Torch(problem="libcudart"),
        ["cannot be imported: libcudart", "setup.sh"],
    ),
    (
        "virtual machine",
        Host(system="Linux", is_virtual_machine=True, hypervisor="QEMU"),
        SILENT,
        CPU_TORCH,
        ["note: No NVIDIA GPU in this virtual machine (QEMU)", "pass it through"],
    ),
    ("nothing", Host(system="Linux", pci_gpus=[]), SILENT, CPU_TORCH, ["note: No GPU was found"]),
    (
        "MPS",
        Host(system="Darwin 25 arm64"),
        SILENT,
        replace(CPU_TORCH, is_mps_available=True, is_mps_built=True),
        ["ok: torch can use this machine's Apple GPU"],
    ),
    (
        "no MPS",
        Host(system="Darwin 25 arm64"),
        SILENT,
        CPU_TORCH,
        ["problem: torch cannot use this machine's Apple GPU"],
    ),
    (
        "AMD, other build",
        Host(system="Linux", pci_gpus=[AMD]),
        SILENT,
        CPU_TORCH,
        ["note: There is an AMD GPU", "not built for ROCm"],
    ),
    (
        "AMD, container",
        Host(system="Linux", pci_gpus=[AMD], is_container=True),
        SILENT,
        ROCM_TORCH,
        ["no /dev/kfd", "--device=/dev/kfd"],
    ),
    (
        "AMD, no right",
        Host(system="Linux", pci_gpus=[AMD], device_files={"/dev/kfd": False}),
        SILENT,
        ROCM_TORCH,
        ["may not use /dev/kfd", "usermod -aG render,video"],
    ),
    (
        "AMD works",
        Host(system="Linux", pci_gpus=[AMD]),
        SILENT,
        replace(ROCM_TORCH, is_cuda_available=True, gpus=[H200], architectures=["gfx942"]),
        ["ok: torch can use 1 GPU(s) with ROCm 6.4"],
    ),
]


@pytest.mark.parametrize(
    ("host", "driver", "torch", "expected"),
    [case[1:] for case in TORCH_CASES],
    ids=[case[0] for case in TORCH_CASES],
)
def test_torch_and_environment_are_judged_with_what_to_do(
    host: Host, driver: Driver, torch: Torch, expected: list[str]
) -> None:
    text = words(find_gpu_findings(host, driver, torch))
    for part in expected:
        assert part in text


def test_missing_uvm_is_no_matter_for_a_cpu_build() -> None:
    host = replace(HOST, device_files={"/dev/nvidia0": True, "/dev/nvidiactl": True})
    assert "uvm" not in words(find_gpu_findings(host, DRIVER, CPU_TORCH))


@pytest.mark.parametrize(
    ("capability", "architectures", "is_served"),
    [
        ((9, 0), ["sm_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 1), ["sm_120"], True),
        ((12, 0), ["compute_90"], True),
        ((8, 0), ["compute_90"], False),
        ((9, 4), ["gfx942"], True),
    ],
)
def test_code_serves_its_major_version_upwards_and_ptx_everything_newer(
    capability: tuple[int, int], architectures: list[str], is_served: bool
) -> None:
    assert _is_served(capability, architectures) is is_served


# GPUs that work

HEALTH_CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "little memory held",
        {"memory_used_bytes": 10 * GIB, "processes": [GpuProcess(7, "x", GIB)]},
        ["note: GPU 0: 10.0 GiB are in use already: x 7 1.0 GiB."],
    ),
    (
        "much memory held",
        {"memory_used_bytes": 100 * GIB},
        ["problem: GPU 0: 100.0 GiB are in use", "cannot be seen", "take another GPU"],
    ),
    ("ECC errors", {"ecc_errors": 3}, ["problem: GPU 0: 3 uncorrected memory errors", "-r"]),
    ("ECC off", {"is_ecc_enabled": False}, ["note: GPU 0: ECC is off"]),
    ("repair pending", {"has_pending_repair": True}, ["note: GPU 0", "replaced at the next reset"]),
    ("repair failed", {"has_failed_repair": True}, ["problem: GPU 0", "cannot be trusted"]),
    ("MIG", {"is_mig_enabled": True, "mig_slices": 2}, ["note: GPU 0: MIG is on (2 slices)"]),
    ("empty MIG", {"is_mig_enabled": True, "mig_slices": 0}, ["problem: GPU 0: MIG is on and has"]),
    ("prohibited", {"compute_mode": "prohibited"}, ["problem: GPU 0", "nvidia-smi -c 0"]),
    ("fabric", {"fabric_state": "not started"}, ["problem: GPU 0", "nvidia-fabricmanager"]),
    ("no persistence", {"has_persistence": False}, ["note: GPU 0", "nvidia-smi -pm 1"]),
    (
        "power limit",
        {"power_limit_watts": 400.0, "default_power_limit_watts": 700.0},
        ["note: GPU 0: its power limit is 400 W, 700 W by default", "-pl 700"],
    ),
    ("narrow link", {"pcie_width": 4, "max_pcie_width": 16}, ["note: GPU 0: PCIe x4 where x16"]),
    (
        "hot",
        {"throttle_reasons": ["too hot"], "temperature_celsius": 91},
        ["problem: GPU 0: it is slowed at 91 C: too hot."],
    ),
]


@pytest.mark.parametrize(
    ("values", "expected"),
    [case[1:] for case in HEALTH_CASES],
    ids=[case[0] for case in HEALTH_CASES],
)
def test_unhealthy_gpu_is_the_only_finding(values: dict[str, Any], expected: list[str]) -> None:
    findings = find_health_findings(HOST, replace(DRIVER, gpus=[replace(GPU, **values)]))
    assert len(findings) == 1
    for part in expected:
        assert part in words(findings)


def test_what_is_usual_is_no_finding() -> None:
    usual = replace(
        GPU,
        memory_used_bytes=GIB // 2,
        is_ecc_enabled=True,
        ecc_errors=0,
        is_mig_enabled=False,
        compute_mode="default",
        fabric_state="completed",
        power_limit_watts=700.0,
        default_power_limit_watts=700.0,
        pcie_width=16,
        max_pcie_width=16,
        pcie_generation=1,  # idle: the link saves power
        max_pcie_generation=5,
        throttle_reasons=["power limit"],
    )
    assert find_health_findings(HOST, replace(DRIVER, gpus=[usual])) == []


def test_load_shows_what_an_idle_gpu_does_not() -> None:
    driver = replace(DRIVER, gpus=[replace(GPU, max_clock_mhz=1980)])
    moment = {
        "throttle_reasons": ["too hot (hardware)", "clocks set by hand"],
        "temperature_celsius": 95,
        "clock_mhz": 1200,
        "pcie_generation": 3,
        "max_pcie_generation": 5,
    }
    text = words(find_health_findings(HOST, driver, {"GPU-1": moment}))
    for part in ("slowed at 95 C", "by hand to 1200 MHz", "1980 MHz", "generation 3 under load"):
        assert part in text
    assert find_health_findings(HOST, driver, {"GPU-2": moment}) == []


def test_gpus_that_do_not_reach_each_other_are_named() -> None:
    links = [Link(0, 1, "NVLink", True), Link(0, 2, None, None), Link(1, 2, "host", False)]
    driver = replace(DRIVER, num_gpus=3, links=links)
    host = replace(with_variables(NCCL_P2P_DISABLE="1"), has_iommu=True)
    text = words(find_health_findings(host, driver))
    assert "GPUs 1-2 cannot reach each other's memory" in text
    assert "IOMMU" in text
    assert "NCCL_P2P_DISABLE=1" in text


# Environment and limits

ENVIRONMENT_CASES: list[tuple[str, Host, Torch, list[str]]] = [
    (
        "stubs",
        replace(HOST, cuda_libraries=["/usr/local/cuda/lib64/stubs/libcuda.so"]),
        CUDA_TORCH,
        ["problem: LD_LIBRARY_PATH puts /usr/local/cuda/lib64/stubs/libcuda.so first"],
    ),
    (
        "compat",
        replace(HOST, cuda_libraries=["/usr/local/cuda/compat/libcuda.so.1"]),
        WORKING,
        ["note: LD_LIBRARY_PATH puts /usr/local/cuda/compat"],
    ),
    (
        "small shm",
        replace(HOST, shm_bytes=64 * 2**20, is_container=True),
        WORKING,
        ["note: /dev/shm has 64.0 MiB", "--shm-size"],
    ),
    (
        "small shm, two GPUs",
        replace(HOST, shm_bytes=64 * 2**20),
        replace(WORKING, gpus=[H200, H200]),
        ["problem: /dev/shm has 64.0 MiB", "remount"],
    ),
    (
        "one thread",
        with_variables(OMP_NUM_THREADS="1"),
        replace(CPU_TORCH, num_threads=1),
        ["problem: OMP_NUM_THREADS=1: torch uses 1 of 16 CPU threads", "unset OMP_NUM_THREADS"],
    ),
    (
        "one thread beside a GPU",
        with_variables(OMP_NUM_THREADS="1"),
        replace(WORKING, num_threads=1),
        ["note: OMP_NUM_THREADS=1"],
    ),
    (
        "CPU limit",
        replace(HOST, cpu_limit=2.0),
        replace(CPU_TORCH, num_threads=16),
        ["limited to 2.0 cores of 16", "torch uses 16 threads where 2 can", "OMP_NUM_THREADS=2"],
    ),
    ("affinity", replace(HOST, usable_threads=4), CPU_TORCH, ["limited to 4 threads of 16"]),
    (
        "memory limit",
        replace(HOST, memory_bytes=64 * GIB, memory_limit_bytes=8 * GIB),
        CPU_TORCH,
        ["Memory is limited to 8.0 GiB of 64.0 GiB"],
    ),
    ("busy", replace(HOST, load=20.0), CPU_TORCH, ["The CPU is busy: load 20.0 on 16 threads"]),
    (
        "blocking",
        with_variables(CUDA_LAUNCH_BLOCKING="1"),
        WORKING,
        ["note: CUDA_LAUNCH_BLOCKING=1", "unset CUDA_LAUNCH_BLOCKING"],
    ),
    ("TF32", with_variables(NVIDIA_TF32_OVERRIDE="0"), WORKING, ["may not use TF32"]),
    (
        "two allocators",
        with_variables(PYTORCH_ALLOC_CONF="a:1", PYTORCH_CUDA_ALLOC_CONF="b:1"),
        WORKING,
        ["PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF differ"],
    ),
]


@pytest.mark.parametrize(
    ("host", "torch", "expected"),
    [case[1:] for case in ENVIRONMENT_CASES],
    ids=[case[0] for case in ENVIRONMENT_CASES],
)
def test_environment_is_judged_with_what_to_do(
    host: Host, torch: Torch, expected: list[str]
) -> None:
    text = words(find_host_findings(host, torch))
    for part in expected:
        assert part in text


@pytest.mark.parametrize(
    "host",
    [
        with_variables(CUDA_LAUNCH_BLOCKING="0", NVIDIA_TF32_OVERRIDE="1"),
        with_variables(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"),
        replace(HOST, cuda_libraries=["/usr/lib/x86_64-linux-gnu/libcuda.so.1"]),
        replace(HOST, memory_bytes=8 * GIB, memory_limit_bytes=8 * GIB),
        replace(HOST, shm_bytes=8 * GIB, load=1.0, usable_threads=16, cpu_limit=16.0),
        Host(),
    ],
)
def test_harmless_environment_is_no_finding(host: Host) -> None:
    assert find_host_findings(host, replace(WORKING, num_threads=8)) == []


# Which configuration fits


def forecast(config: TrainingConfig, gib: float, flops: float | None = None) -> Any:
    return forecast_run(
        "mine",
        config,
        available_bytes=int(gib * GIB),
        precision="bf16",
        device="cuda",
        flops_per_second=flops,
    )


def test_production_fits_as_it_is_or_with_settings_or_not() -> None:
    config = get_training_config("production")
    assert (forecast(config, 140).fits, forecast(config, 140).settings) == (True, ())
    assert forecast(config, 30).settings == ("gradient_checkpointing=true",)
    large = replace(config, per_device_train_batch_size=64)
    two = ("gradient_checkpointing=true", "per_device_train_batch_size=1")
    assert forecast(large, 40).settings == two
    assert not forecast(config, 16).fits
    assert forecast(config, 16).needed_bytes == forecast(config, 140).needed_bytes


def test_gradient_checkpointing_that_is_on_is_not_proposed() -> None:
    config = replace(
        get_training_config("production"),
        gradient_checkpointing=True,
        per_device_train_batch_size=64,
    )
    assert forecast(config, 40).settings == ("per_device_train_batch_size=1",)


def test_overrides_change_what_is_needed() -> None:
    config = get_training_config("production")
    half = replace(config, model_overrides={"num_hidden_layers": 12})
    assert forecast(half, 140).needed_bytes < 0.7 * forecast(config, 140).needed_bytes


def test_time_is_all_flops_over_the_measured_speed() -> None:
    result = forecast(get_training_config("test"), 8, flops=1e12)
    tokens = 100 * 4 * 512
    each = 6 * 5_256_704 + 12 * 4 * 256 * 512
    assert result.seconds == pytest.approx(tokens * each / 1e12)
    assert describe_forecast(result).endswith("fits; 100 steps take about 8 seconds")
    assert describe_forecast(forecast(get_training_config("test"), 8)).endswith("free: fits")


def test_forecast_becomes_a_finding_where_something_is_to_be_done() -> None:
    config = get_training_config("production")
    assert find_forecast_findings([forecast(config, 140)], on_gpu=True) == []
    text = words(find_forecast_findings([forecast(config, 30)], on_gpu=True))
    assert "--set gradient_checkpointing=true" in text
    assert "does not fit" in words(find_forecast_findings([forecast(config, 8)], on_gpu=True))
    tight = forecast(config, 45)
    assert (tight.fits, tight.settings) == (True, ())
    assert "expandable_segments" in words(find_forecast_findings([tight], on_gpu=True))
    assert find_forecast_findings([tight], on_gpu=False) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.1, "a second"),
        (90, "90 seconds"),
        (600, "10 minutes"),
        (86400 * 3, "3 days"),
        (86400 * 365.25 * 20, "20 years"),
    ],
)
def test_long_time_is_in_its_greatest_unit(seconds: float, text: str) -> None:
    assert format_long(seconds) == text
