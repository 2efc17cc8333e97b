"""What stands in the way of a GPU, and what to do: a pure function of the facts. No torch here.

gpu_facts -> findings -> debug_gpu.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.gpu_facts import Driver, Host, Torch

# Oldest driver of each CUDA major version on Linux:
# https://docs.nvidia.com/deploy/cuda-compatibility/
MIN_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


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
        findings.append(Finding("ok", "torch can use this machine's Apple GPU (MPS)."))
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
    findings = []
    if host.cuda_visible_devices is not None and host.cuda_visible_devices.strip() in ("", "-1"):
        message = f"CUDA_VISIBLE_DEVICES is {host.cuda_visible_devices!r}: it hides every GPU."
        findings.append(Finding("problem", message, "Run: unset CUDA_VISIBLE_DEVICES"))
    if torch.cuda_build is None and torch.hip_build is None:
        findings.append(_describe_cpu_only_build(driver, torch))
    elif torch.cuda_build and _is_driver_too_old(driver, torch.cuda_build):
        findings.append(_describe_old_driver(driver, torch.cuda_build))
    if not findings and (torch.problem or driver.version):
        reason = torch.problem or "it gives no reason"
        advice = f"Look at nvidia-smi; CUDA_VISIBLE_DEVICES is {host.cuda_visible_devices!r}."
        findings.append(Finding("problem", f"torch cannot use the GPU: {reason}", advice))
    return findings


def _is_driver_too_old(driver: Driver, cuda_build: str) -> bool:
    # A driver serves every minor version of its CUDA major version.
    return driver.cuda_version is not None and driver.cuda_version[0] < int(
        cuda_build.split(".")[0]
    )


def _describe_old_driver(driver: Driver, cuda_build: str) -> Finding:
    served = ".".join(str(part) for part in driver.cuda_version or ())
    oldest = MIN_DRIVERS.get(int(cuda_build.split(".")[0]))
    return Finding(
        "problem",
        f"Driver {driver.version} serves CUDA up to {served}, torch was built for {cuda_build}.",
        f"Update the driver{f' ({oldest} or newer)' if oldest else ''}, or install a torch that "
        f"was built for CUDA {served.split('.')[0]}.",
    )


def _describe_cpu_only_build(driver: Driver, torch: Torch) -> Finding:
    wanted = f"CUDA {driver.cuda_version[0]}" if driver.cuda_version else "CUDA"
    return Finding(
        "problem",
        f"torch {torch.version} is a CPU-only build on a machine with an NVIDIA GPU.",
        f"Install a build for {wanted}: https://pytorch.org/get-started/locally/",
    )


def _judge_missing_gpu(host: Host) -> Finding:
    if host.is_virtual_machine and host.system.startswith("Linux"):
        return Finding(
            "note",
            "No NVIDIA GPU in this virtual machine: nothing on the PCI bus, no /dev/nvidia*.",
            "If the host has one, pass it through (PCI passthrough or vGPU), or choose a machine "
            "type with a GPU.",
        )
    if host.system.startswith("Darwin") and host.system.endswith("arm64"):
        return Finding(
            "problem",
            "torch cannot use this machine's Apple GPU (MPS).",
            "It needs a recent macOS and an arm64 Python with the usual torch build.",
        )
    return Finding("note", "No NVIDIA GPU was found in this machine.")
