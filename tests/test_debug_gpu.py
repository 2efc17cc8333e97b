import json
import os
import subprocess
import sys

import pytest

from configs.training_config import PROJECT_DIRECTORY
from debug_gpu import finding_lines, gpu_line, torch_lines
from utils.gpu_facts import Driver, GpuFacts, Host, Torch, _count_pci_gpus, _find_device_files
from utils.gpu_findings import Finding, _is_served, find_misconfigurations

SCRIPT = PROJECT_DIRECTORY / "debug_gpu.py"

H200 = GpuFacts(0, "NVIDIA H200", 150_000_000_000, (9, 0), True, True)
T4 = GpuFacts(0, "Tesla T4", 16_000_000_000, (7, 5), False, True)
GPU_HOST = Host(system="Linux", pci_gpus=1, device_files=["/dev/nvidia0"])
DRIVER = Driver("/usr/bin/nvidia-smi", "580.65.06", (13, 0), 1)
CPU_TORCH = Torch(version="2.13.0+cpu")
CUDA_TORCH = Torch(version="2.13.0", cuda_build="13.0")
WORKING_TORCH = Torch(
    version="2.13.0",
    cuda_build="13.0",
    is_cuda_available=True,
    gpus=[H200],
    architectures=["sm_80", "sm_90", "compute_120"],
)


def messages(host, driver, torch):
    return " ".join(
        f"{finding.level}: {finding.message} {finding.advice}"
        for finding in find_misconfigurations(host, driver, torch)
    )


def change(facts, **values):
    return type(facts)(**{**vars(facts), **values})


def test_working_gpu_has_no_problem():
    (only,) = find_misconfigurations(GPU_HOST, DRIVER, WORKING_TORCH)
    assert only == Finding("ok", "torch can use 1 GPU(s).")


@pytest.mark.parametrize(
    ("host", "driver", "torch", "expected"),
    [
        (GPU_HOST, DRIVER, CPU_TORCH, ["CPU-only build", "Install a build for CUDA 13"]),
        (
            GPU_HOST,
            change(DRIVER, version="550.1", cuda_version=(12, 4)),
            CUDA_TORCH,
            ["serves CUDA up to 12.4", "built for 13.0", "580.65.06 or newer", "for CUDA 12"],
        ),
        (
            change(GPU_HOST, cuda_visible_devices=""),
            DRIVER,
            CUDA_TORCH,
            ["CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES"],
        ),
        (change(GPU_HOST, cuda_visible_devices="-1"), DRIVER, CUDA_TORCH, ["hides every GPU"]),
        (
            change(GPU_HOST, cuda_visible_devices=""),
            DRIVER,
            CPU_TORCH,
            ["hides every GPU", "CPU-only build"],
        ),
        (
            Host(system="Linux", is_virtual_machine=True, pci_gpus=0),
            Driver(problem="NVML Shared Library Not Found"),
            CPU_TORCH,
            ["note: No NVIDIA GPU in this virtual machine", "pass it through"],
        ),
        (
            Host(system="Linux", pci_gpus=0),
            Driver(problem="NVML Shared Library Not Found"),
            CPU_TORCH,
            ["note: No NVIDIA GPU was found", "runs on the CPU"],
        ),
        (
            Host(system="Linux", pci_gpus=1),
            Driver(problem="NVML Shared Library Not Found"),
            CUDA_TORCH,
            ["no NVIDIA driver is loaded", "Install the NVIDIA driver"],
        ),
        (
            Host(system="Linux", pci_gpus=1, has_nouveau=True),
            Driver(problem="Driver Not Loaded"),
            CUDA_TORCH,
            ["nouveau"],
        ),
        (
            Host(system="Linux", pci_gpus=2, is_container=True),
            Driver(problem="NVML Shared Library Not Found"),
            CUDA_TORCH,
            ["this container has no /dev/nvidia*", "--gpus all"],
        ),
        (
            GPU_HOST,
            Driver(problem="NVML Shared Library Not Found"),
            CUDA_TORCH,
            ["/dev/nvidia0", "does not answer"],
        ),
        (
            GPU_HOST,
            Driver(problem="Driver/library version mismatch"),
            CUDA_TORCH,
            ["differ in version", "Reboot"],
        ),
        (
            GPU_HOST,
            DRIVER,
            change(CUDA_TORCH, problem="CUDA initialization: unknown error"),
            ["torch cannot use the GPU: CUDA initialization: unknown error"],
        ),
        (
            GPU_HOST,
            change(DRIVER, num_gpus=4),
            WORKING_TORCH,
            ["knows 4 GPUs, torch sees 1", "CUDA_VISIBLE_DEVICES"],
        ),
        (
            GPU_HOST,
            DRIVER,
            change(WORKING_TORCH, gpus=[T4]),
            ["no code for Tesla T4 (capability 7.5", "Tesla T4 has no bfloat16"],
        ),
        (
            GPU_HOST,
            DRIVER,
            Torch(problem="libcudart"),
            ["cannot be imported: libcudart", "setup.sh"],
        ),
        (
            Host(system="Darwin 25 arm64"),
            Driver(problem="none"),
            Torch(version="2.13.0", is_mps_available=True, is_mps_built=True),
            ["ok: torch can use this machine's Apple GPU"],
        ),
        (
            Host(system="Darwin 25 arm64"),
            Driver(problem="none"),
            Torch(version="2.13.0"),
            ["problem: torch cannot use this machine's Apple GPU"],
        ),
    ],
)
def test_misconfigurations_are_named_with_what_to_do(host, driver, torch, expected):
    text = messages(host, driver, torch)
    for part in expected:
        assert part in text


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
    capability, architectures, is_served
):
    assert _is_served(capability, architectures) is is_served


def test_gpus_are_counted_by_vendor_and_class(tmp_path):
    for name, vendor, kind in (
        ("a", "0x10de\n", "0x030200\n"),
        ("b", "0x10de\n", "0x030000\n"),
        ("audio-of-b", "0x10de\n", "0x040300\n"),
        ("other", "0x8086\n", "0x030000\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor)
        (tmp_path / name / "class").write_text(kind)
    (tmp_path / "empty").mkdir()
    assert _count_pci_gpus(tmp_path) == 2
    assert _count_pci_gpus(tmp_path / "nowhere") is None


def test_device_files_are_the_numbered_ones_and_those_of_wsl(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "dxg", "null"):
        (tmp_path / name).touch()
    names = [os.path.basename(path) for path in _find_device_files(tmp_path)]  # noqa: PTH119
    assert names == ["nvidia0", "nvidia1", "dxg"]


def test_gpu_is_shown_with_memory_capability_and_precisions():
    assert gpu_line(T4) == "  0: Tesla T4, 14.9 GiB, capability 7.5, bf16 no, fp16 yes"
    lines = torch_lines(WORKING_TORCH)
    assert "Build: CUDA 13.0" in lines
    assert "GPU Count: 1" in lines


def test_advice_stands_below_its_finding():
    lines = finding_lines([Finding("problem", "It is broken.", "Mend it."), Finding("ok", "Fine.")])
    assert lines == ["[problem] It is broken.", "    Mend it.", "[ok] Fine."]


def test_this_machine_is_diagnosed_with_exit_code_0(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("NVIDIA Driver:", "nvidia-smi:", "CPU: ", "Build: ", "cpu float32 1024 x 1024: "):
        assert part in result.stdout
    assert result.stdout.count("TFLOP/s") >= 1
    assert "Diagnosis:" in result.stdout


def test_machine_without_a_working_torch_is_diagnosed_too(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open')")
    result = subprocess.run(
        [sys.executable, SCRIPT, "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    value = json.loads(result.stdout)
    assert value["torch"]["problem"] == "libtorch_cpu.so: cannot open"
    assert value["matmul"] == []
    assert value["findings"][0]["advice"] == "Run: bash setup.sh"
    assert value["host"]["cpu_threads"] >= 1
