"""What is made of the facts: each cause by its words, and silence where nothing is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from utils.tools.diagnosis.facts import Driver, DriverGpu, Facts, Host, Timing, Torch, TorchGpu
from utils.tools.diagnosis.findings import Diagnosis, find_causes, is_served, sort_diagnoses

GIB = 2**30
BUS, ZERO, CTL, UVM = "0000:01:00.0", "/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"
FILES = {ZERO: True, CTL: True, UVM: True}
BARE = Host(pci_gpus={BUS: None})
HOST = Host(pci_gpus={BUS: "nvidia"}, device_files=FILES, cpu_threads=16)
GPU = DriverGpu(0, "NVIDIA H200", (9, 0), 140 * GIB, GIB // 2)
DRIVER = Driver("/usr/bin/nvidia-smi", "580.65.06", (13, 0), 1, [GPU])
SILENT = Driver(problem="NVML Shared Library Not Found")
H200 = TorchGpu(0, "NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0), "bf16")
T4 = TorchGpu(0, "Tesla T4", 15 * GIB, None, (7, 5), "fp16")
CPU = Torch(version="2.13.0+cpu")
CUDA = Torch(version="2.13.0", cuda_build="13.0")
WORKING = replace(CUDA, is_cuda_available=True, gpus=[H200], architectures=["sm_90"])
FAILED = Timing("cuda:0", "bf16", problem="the training step failed: CUDA out of memory")


def words(facts: Facts) -> str:
    found = sort_diagnoses(list(find_causes(facts)))
    return " ".join(f"{item.level}: {item.message} {item.advice}" for item in found)


def on_bus(driver: str | None, is_container: bool = False) -> Facts:
    return Facts(Host(pci_gpus={BUS: driver}, is_container=is_container), SILENT, CUDA)


def with_files(problem: str | None, **changes: object) -> Facts:
    host = replace(HOST, **changes)  # type: ignore[arg-type]
    return Facts(host, Driver(problem=problem) if problem else DRIVER, CUDA)


def with_variable(name: str, value: str, torch: Torch) -> Facts:
    return Facts(replace(HOST, environment={name: value}), DRIVER, torch)


def held(used: int, *holders: str) -> Facts:
    gpu = replace(GPU, memory_used_bytes=used, holders=list(holders))
    return Facts(HOST, replace(DRIVER, gpus=[gpu]), WORKING)


def with_driver(torch: Torch, **changes: object) -> Facts:
    return Facts(HOST, replace(DRIVER, **changes), torch)  # type: ignore[arg-type]


CASES: dict[str, tuple[Facts, list[str]]] = {
    # Why the driver serves no GPU
    "no driver": (on_bus(None), ["problem: ", "no NVIDIA driver is loaded", "Install the NVIDIA"]),
    "nouveau": (on_bus("nouveau"), ["nouveau holds it"]),
    "vfio": (on_bus("vfio-pci"), ["vfio-pci holds the GPU"]),
    "no files": (on_bus("nvidia"), ["no /dev/nvidia*", "nvidia-modprobe"]),
    "container": (on_bus(None, True), ["this container has no /dev/nvidia*", "--gpus all"]),
    "lost": (with_files("Unknown Error"), ["serves none: Unknown Error", "start it again"]),
    "no right": (with_files("No", device_files={CTL: False}), [f"may not use {CTL}", "usermod"]),
    "no uvm": (with_files(None, device_files={CTL: True}), [f"CUDA needs {UVM}", "modprobe"]),
    "mismatch": (
        with_files("Driver/library version mismatch", device_files={ZERO: True}),
        ["version mismatch", "differ in version", "reboot"],
    ),
    "library": (with_files("Not Found"), ["serves none: Not Found", "driver's libraries"]),
    "WSL": (with_files("x", device_files={"/dev/dxg": True}, is_wsl=True), ["wsl --update"]),
    "no GPU": (Facts(Host(), SILENT, CPU), ["note: No NVIDIA GPU was found", "virtual machine"]),
    # torch and its environment
    "CPU build": (with_driver(CPU), ["CPU-only build", "Install a build for CUDA 13"]),
    "old driver": (
        with_driver(CUDA, version="550.1", cuda_version=(12, 4)),
        ["550.1 serves CUDA up to 12.4", "built for 13.0", "580.65.06 or newer", "for CUDA 12"],
    ),
    "older minor": (
        with_driver(replace(WORKING, cuda_build="13.2"), cuda_version=(13, 0)),
        ["note: The driver serves CUDA up to 13.0", "13.2", "torch_compile"],
    ),
    "hidden": (
        with_variable("CUDA_VISIBLE_DEVICES", "", CPU),
        ["CUDA_VISIBLE_DEVICES is '': it hides every GPU", "CPU-only build"],
    ),
    "wrong index": (
        with_variable("CUDA_VISIBLE_DEVICES", "0,7", WORKING),
        ["problem: CUDA_VISIBLE_DEVICES is '0,7': there is no GPU 7, the last is 0"],
    ),
    "no libcuda": (
        with_variable("NVIDIA_DRIVER_CAPABILITIES", "utility", CUDA),
        ["this container has no libcuda", "compute,utility"],
    ),
    "fewer GPUs": (
        with_driver(WORKING, num_gpus=4),
        ["note: The driver knows 4 GPUs, torch sees 1", "CUDA_VISIBLE_DEVICES is not set"],
    ),
    "GPU lost": (
        with_driver(WORKING, problem="1 of 2 GPUs do not answer"),
        ["problem: 1 of 2 GPUs do not answer", "Xid"],
    ),
    "says why": (
        with_driver(replace(CUDA, problem="Error 803")),
        ["torch cannot use the GPU: Error 803", "reboot"],
    ),
    "T4": (
        with_driver(replace(WORKING, gpus=[T4])),
        ["no code for Tesla T4 (capability 7.5; it has sm_90)", "T4 has no bfloat16"],
    ),
    "broken torch": (with_driver(Torch(problem="libcudart")), ["imported: libcudart", "setup.sh"]),
    "MPS": (Facts(torch=replace(CPU, is_mps_available=True)), ["ok: torch can use this"]),
    # Memory, limits, timings
    "little held": (held(GIB // 4, "x 7"), ["note: GPU 0: 256.0 MiB of 140.0", "already by x 7."]),
    "much held": (held(99 * GIB), ["problem: GPU 0: 99.0 GiB of 140.0", "cannot be seen"]),
    "small shm": (
        Facts(Host(shm_bytes=2**26, is_container=True), torch=CPU),
        ["note: /dev/shm has 64.0 MiB", "--shm-size"],
    ),
    "small shm, two GPUs": (
        Facts(Host(shm_bytes=2**26), torch=replace(WORKING, gpus=[H200, H200])),
        ["problem: /dev/shm has 64.0 MiB: NCCL between several GPUs can fail", "remount"],
    ),
    "one thread": (
        with_variable("OMP_NUM_THREADS", "1", replace(CPU, num_threads=1)),
        ["problem: OMP_NUM_THREADS=1: torch uses 1 of 16 CPU threads"],
    ),
    "failed timing": (
        Facts(HOST, DRIVER, WORKING, [FAILED], "no answer within 240 s"),
        ["problem: cuda:0: the training step failed", "nvidia-smi names them", "cut short: no an"],
    ),
}


@pytest.mark.parametrize(("facts", "expected"), CASES.values(), ids=CASES.keys())
def test_what_is_wrong_is_said_with_what_to_do(facts: Facts, expected: list[str]) -> None:
    text = words(facts)
    for part in expected:
        assert part in text


def test_working_gpu_has_no_problem() -> None:
    host = replace(HOST, shm_bytes=8 * GIB, environment={"A": "1"})
    found = find_causes(Facts(host, DRIVER, replace(WORKING, num_threads=8)))
    assert found == [Diagnosis("ok", "torch can use 1 GPU(s) with CUDA 13.0.")]


def test_first_cause_is_said_alone() -> None:
    # No right, files that are missing and a library that does not answer: all one cause.
    facts = with_files("NVML: Insufficient Permissions", device_files={ZERO: False})
    (only,) = find_causes(facts)
    assert only.message == f"This user may not use {ZERO}."


@pytest.mark.parametrize(
    ("capability", "architecture", "expected"),
    [
        ((9, 0), "sm_90a", True),
        ((8, 6), "sm_80", True),
        ((8, 0), "sm_86", False),
        ((12, 0), "sm_90", False),
        ((12, 0), "compute_90", True),
        ((8, 0), "compute_90", False),
        ((9, 4), "gfx942", True),
    ],
)
def test_code_serves_its_major_version_upwards_and_ptx_everything_newer(
    capability: tuple[int, int], architecture: str, expected: bool
) -> None:
    assert is_served(capability, [architecture]) is expected
