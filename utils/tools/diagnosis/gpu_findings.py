"""What stands between torch and a GPU, and what to do: pure functions of the facts. No torch here.

Host, Driver, Torch -> PCI bus, kernel driver, device files, library, torch build -> findings
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.tools.diagnosis.diagnosis import NOTE, OK, PROBLEM, Finding
from utils.tools.diagnosis.driver_facts import Driver
from utils.tools.diagnosis.driver_findings import (
    advise_on,
    device_names,
    judge_driver,
    nvidia_files,
)
from utils.tools.diagnosis.host_facts import Host
from utils.tools.diagnosis.torch_facts import Torch, TorchGpu

# Oldest driver of each CUDA major version on Linux:
# https://docs.nvidia.com/deploy/cuda-compatibility/
MIN_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
TORCH_BUILDS = "https://pytorch.org/get-started/locally/"


def find_gpu_findings(host: Host, driver: Driver, torch: Torch) -> list[Finding]:
    """Return what is wrong or worth knowing, the cause before what follows from it."""
    findings = _judge_import(torch)
    if torch.is_cuda_available:
        return findings + _judge_working_cuda(host, driver, torch)
    if torch.is_mps_available:
        return [*findings, Finding(OK, "torch can use this machine's Apple GPU (MPS).")]
    if (
        host.nvidia_gpus
        or driver.num_gpus
        or nvidia_files(host)
        or "/dev/dxg" in device_names(host)
    ):
        return findings + judge_driver(host, driver, torch) + _judge_torch(host, driver, torch)
    if any(gpu.vendor == "AMD" for gpu in host.pci_gpus or []) or "/dev/kfd" in device_names(host):
        return findings + _judge_rocm(host, torch)
    return [*findings, _judge_missing_gpu(host)]


def _judge_import(torch: Torch) -> list[Finding]:
    if torch.version is not None:
        return []
    return [Finding(PROBLEM, f"torch cannot be imported: {torch.problem}.", "Run: bash setup.sh")]


# A GPU that works


def _judge_working_cuda(host: Host, driver: Driver, torch: Torch) -> list[Finding]:
    kind = f"with ROCm {torch.hip_build}" if torch.hip_build else f"with CUDA {torch.cuda_build}"
    findings = [Finding(OK, f"torch can use {len(torch.gpus)} GPU(s) {kind}.")]
    findings += _judge_visible_devices(host, driver, torch)
    for gpu in torch.gpus:
        findings += _judge_torch_gpu(gpu, torch)
    apart = [gpu for gpu in host.nvidia_gpus if gpu.driver not in ("nvidia", None)]
    if apart:
        held = ", ".join(f"{gpu.address} by {gpu.driver}" for gpu in apart)
        findings.append(Finding(NOTE, f"Held by other kernel drivers, not usable here: {held}."))
    if torch.problem:
        message = f"torch says: {torch.problem}"
        findings.append(Finding(NOTE, message, advise_on(torch.problem)))
    if driver.problem and driver.version:
        findings.append(Finding(PROBLEM, f"{driver.problem}.", advise_on(driver.problem)))
    if _is_minor_behind(driver, torch):
        findings.append(
            Finding(
                NOTE,
                f"The driver serves CUDA up to {_dotted(driver.cuda_version)}, torch was built for "
                f"{torch.cuda_build}: it runs, but what is compiled on the way (torch_compile) may "
                "fail.",
                "Update the driver.",
            )
        )
    return findings


def _judge_visible_devices(host: Host, driver: Driver, torch: Torch) -> list[Finding]:
    value = host.environment.get("CUDA_VISIBLE_DEVICES")
    findings = _judge_wrong_index(value, driver)
    if driver.num_gpus > len(torch.gpus) and not findings:
        shown = "not set" if value is None else repr(value)
        findings.append(
            Finding(
                NOTE,
                f"The driver knows {driver.num_gpus} GPUs, torch sees {len(torch.gpus)}.",
                f"CUDA_VISIBLE_DEVICES is {shown}.",
            )
        )
    names = {gpu.name for gpu in torch.gpus}
    if len(names) > 1:
        advice = "The slowest sets the pace of a run: choose equal ones by CUDA_VISIBLE_DEVICES"
        if host.environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            advice += " (and CUDA_DEVICE_ORDER=PCI_BUS_ID, to count as nvidia-smi does)"
        findings.append(
            Finding(NOTE, f"The GPUs differ: {', '.join(sorted(names))}.", f"{advice}.")
        )
    return findings


def _judge_wrong_index(value: str | None, driver: Driver) -> list[Finding]:
    """Return a finding where the variable names a GPU that the driver does not have."""
    if not value or not driver.num_gpus:
        return []
    for word in (word.strip() for word in value.split(",")):
        if word.isascii() and word.isdigit() and int(word[:9]) >= driver.num_gpus:
            return [
                Finding(
                    PROBLEM,
                    f"CUDA_VISIBLE_DEVICES is {value!r}: there is no GPU {word}, the last is "
                    f"{driver.num_gpus - 1}; this one and those behind it are not seen.",
                    "Run: unset CUDA_VISIBLE_DEVICES, or name those that nvidia-smi -L lists.",
                )
            ]
    return []


def _judge_torch_gpu(gpu: TorchGpu, torch: Torch) -> list[Finding]:
    findings = []
    if torch.architectures and not _is_served(gpu.capability, torch.architectures):
        findings.append(
            Finding(
                PROBLEM,
                f"This torch has no code for {gpu.name} (capability {_dotted(gpu.capability)}; it "
                f"has {' '.join(torch.architectures)}).",
                f"Install a torch build for it: {TORCH_BUILDS}",
            )
        )
    if not gpu.is_bf16_supported:
        message = f"{gpu.name} has no bfloat16: fp16 with a loss scaler is used instead."
        findings.append(Finding(NOTE, message))
    if gpu.attention and not {"flash", "cudnn"} & set(gpu.attention):
        message = f"{gpu.name} has no flash attention (it has {', '.join(gpu.attention)}): "
        findings.append(Finding(NOTE, f"{message}long sequences are slower and take more memory."))
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


def _is_minor_behind(driver: Driver, torch: Torch) -> bool:
    if driver.cuda_version is None or not torch.cuda_build:
        return False
    major, _, minor = torch.cuda_build.partition(".")
    same_major = driver.cuda_version[0] == int(major)
    return same_major and driver.cuda_version[1] < int(minor.partition(".")[0] or 0)


# A torch that does not use the GPU


def _judge_torch(host: Host, driver: Driver, torch: Torch) -> list[Finding]:
    """Return what is wrong in torch or the environment on a machine that has a GPU."""
    if torch.version is None:
        return []
    findings = _judge_hidden(host) or _judge_wrong_index(
        host.environment.get("CUDA_VISIBLE_DEVICES"), driver
    )
    capabilities = host.environment.get("NVIDIA_DRIVER_CAPABILITIES", "all")
    if not {"compute", "all"} & set(capabilities.replace(" ", "").split(",")):
        findings.append(
            Finding(
                PROBLEM,
                f"NVIDIA_DRIVER_CAPABILITIES is {capabilities!r}: this container has no libcuda.",
                "Start it with -e NVIDIA_DRIVER_CAPABILITIES=compute,utility",
            )
        )
    if torch.cuda_build is None and torch.hip_build is None:
        findings.append(_describe_cpu_only_build(driver, torch))
    elif torch.cuda_build and _is_driver_too_old(driver, torch.cuda_build):
        findings.append(_describe_old_driver(driver, torch.cuda_build))
    if not findings and driver.num_gpus:
        reason = torch.problem or "it gives no reason"
        advice = advise_on(torch.problem) or "Look at nvidia-smi and at dmesg (NVRM, Xid)."
        findings.append(Finding(PROBLEM, f"torch cannot use the GPU: {reason}", advice))
    return findings


def _judge_hidden(host: Host) -> list[Finding]:
    value = host.environment.get("CUDA_VISIBLE_DEVICES")
    if value is None or value.strip() not in ("", "-1"):
        return []
    message = f"CUDA_VISIBLE_DEVICES is {value!r}: it hides every GPU."
    return [Finding(PROBLEM, message, "Run: unset CUDA_VISIBLE_DEVICES")]


def _is_driver_too_old(driver: Driver, cuda_build: str) -> bool:
    # A driver serves every minor version of its CUDA major version.
    return driver.cuda_version is not None and driver.cuda_version[0] < int(
        cuda_build.split(".")[0]
    )


def _describe_old_driver(driver: Driver, cuda_build: str) -> Finding:
    served = _dotted(driver.cuda_version)
    oldest = MIN_DRIVERS.get(int(cuda_build.split(".")[0]))
    return Finding(
        PROBLEM,
        f"Driver {driver.version} serves CUDA up to {served}, torch was built for {cuda_build}.",
        f"Update the driver{f' ({oldest} or newer)' if oldest else ''}, or install a torch that "
        f"was built for CUDA {served.split('.')[0]}: {TORCH_BUILDS}",
    )


def _describe_cpu_only_build(driver: Driver, torch: Torch) -> Finding:
    wanted = f"CUDA {driver.cuda_version[0]}" if driver.cuda_version else "CUDA"
    return Finding(
        PROBLEM,
        f"torch {torch.version} is a CPU-only build on a machine with an NVIDIA GPU.",
        f"Install a build for {wanted}: {TORCH_BUILDS}",
    )


def _dotted(numbers: Sequence[int] | None) -> str:
    return ".".join(str(number) for number in numbers or ()) or "?"


# No NVIDIA GPU


def _judge_rocm(host: Host, torch: Torch) -> list[Finding]:
    """Judge a machine with an AMD GPU; most of the small ones in CPUs cannot compute."""
    if torch.version is None:
        return []
    if torch.hip_build is None:
        return [
            Finding(
                NOTE,
                f"There is an AMD GPU, and torch {torch.version} was not built for ROCm.",
                f"If ROCm supports the GPU, install a build for it: {TORCH_BUILDS}",
            )
        ]
    if "/dev/kfd" not in device_names(host):
        advice = "Load the amdgpu module (ROCm's installation does)."
        if host.is_container:
            advice = "Start it with --device=/dev/kfd --device=/dev/dri --group-add video."
        return [Finding(PROBLEM, "There is an AMD GPU and no /dev/kfd.", advice)]
    if not all(host.device_files.values()):
        denied = ", ".join(path for path, may_use in host.device_files.items() if not may_use)
        advice = "Run: sudo usermod -aG render,video $USER, and log in again."
        return [Finding(PROBLEM, f"This user may not use {denied}.", advice)]
    reason = torch.problem or "it gives no reason"
    advice = "rocminfo says what ROCm sees; HSA_OVERRIDE_GFX_VERSION helps some unlisted GPUs."
    return [Finding(PROBLEM, f"torch (ROCm) cannot use the AMD GPU: {reason}", advice)]


def _judge_missing_gpu(host: Host) -> Finding:
    if host.is_virtual_machine and host.system.startswith("Linux"):
        where = f" ({host.hypervisor})" if host.hypervisor else ""
        return Finding(
            NOTE,
            f"No NVIDIA GPU in this virtual machine{where}: nothing on the PCI bus, no "
            "/dev/nvidia*.",
            "If the host has one, pass it through (PCI passthrough or vGPU), or choose a machine "
            "type with a GPU.",
        )
    if host.system.startswith("Darwin") and host.system.endswith("arm64"):
        return Finding(
            PROBLEM,
            "torch cannot use this machine's Apple GPU (MPS).",
            "It needs a recent macOS and an arm64 Python with the usual torch build.",
        )
    return Finding(NOTE, "No GPU was found in this machine.")
