"""Why the NVIDIA driver serves no GPU, and what to do: pure functions of the facts. No torch here.

PCI bus -> kernel driver -> device files -> library; the first that is wrong is the cause
"""

from __future__ import annotations

from collections.abc import Callable

from utils.tools.diagnosis.diagnosis import PROBLEM, Finding
from utils.tools.diagnosis.driver_facts import Driver
from utils.tools.diagnosis.host_facts import Host
from utils.tools.diagnosis.torch_facts import Torch

INSTALL_DRIVER = "Install the NVIDIA driver (Ubuntu: sudo ubuntu-drivers install) and reboot."

# What CUDA and NVML say -> what to do about it.
KNOWN_MESSAGES = (
    (
        ("error 802", "system not yet initialized"),
        "The NVSwitch fabric is not up. Run: sudo systemctl start nvidia-fabricmanager",
    ),
    (
        ("error 803", "unsupported display driver"),
        "libcuda and the kernel module differ in version: take `compat` folders out of "
        "LD_LIBRARY_PATH, reboot after a driver update.",
    ),
    (
        ("error 804", "forward compatibility"),
        "A libcuda of a `compat` folder was found that this GPU does not take: take the folder out "
        "of LD_LIBRARY_PATH.",
    ),
    (
        ("error 34", "stub library"),
        "A stub of libcuda was found: take `stubs` folders out of LD_LIBRARY_PATH.",
    ),
    (
        ("error 101", "invalid device ordinal"),
        "CUDA_VISIBLE_DEVICES names a GPU that is not there.",
    ),
    (
        ("busy or unavailable",),
        "Another process holds the GPU in an exclusive mode (nvidia-smi -q -d COMPUTE).",
    ),
    (
        ("out of memory",),
        "Other processes hold the GPU's memory: nvidia-smi names them.",
    ),
    (
        ("error 999", "unknown error"),
        "Load the module again (sudo modprobe -r nvidia_uvm; sudo modprobe nvidia_uvm), as after a "
        "suspend; in a container that had the GPU before, start it again.",
    ),
    (
        ("is lost", "do not answer", "fallen off"),
        "The GPU has fallen off the bus: look for Xid in dmesg, then reset or reboot; if it comes "
        "back, check power and cooling.",
    ),
)


def advise_on(message: str | None) -> str:
    """Return what to do about a message of CUDA or NVML, empty where it is not known."""
    text = (message or "").lower()
    for marks, advice in KNOWN_MESSAGES:
        if any(mark in text for mark in marks):
            return advice
    return ""


def device_names(host: Host) -> list[str]:
    """Return the device files by their names below /dev, wherever that was read."""
    return [f"/dev/{path.rpartition('/dev/')[2]}" for path in host.device_files]


def nvidia_files(host: Host) -> list[str]:
    """Return the device files of NVIDIA GPUs."""
    return [name for name in device_names(host) if name.startswith("/dev/nvidia")]


def judge_driver(host: Host, driver: Driver, torch: Torch) -> list[Finding]:
    """Return what is wrong below torch on a machine that has an NVIDIA GPU: the first cause alone.

    Every cause has one consequence: the driver serves no GPU, or CUDA cannot open its device files.
    """
    steps = CAUSES
    if driver.version is not None and driver.num_gpus:
        # NVML answers without the files that CUDA needs, and a first use of CUDA makes them.
        steps = (_judge_permissions, _judge_missing_files) if torch.cuda_build else ()
    found = (step(host, driver) for step in steps)
    return [finding for finding in found if finding is not None][:1]


def _judge_versions(host: Host, driver: Driver) -> Finding | None:
    if "version mismatch" not in (driver.problem or "").lower():
        return None
    loaded = f" ({host.kernel_driver})" if host.kernel_driver else ""
    return Finding(
        PROBLEM,
        f"The loaded kernel module{loaded} and the installed driver differ in version.",
        "Reboot (or reload the nvidia kernel modules) after a driver update.",
    )


def _judge_permissions(host: Host, driver: Driver) -> Finding | None:
    del driver
    denied = [
        path for path, may_use in host.device_files.items() if not may_use and "/nvidia" in path
    ]
    if not denied:
        return None
    return Finding(
        PROBLEM,
        f"This user may not use {', '.join(denied)}.",
        "ls -l /dev/nvidia* shows their group: sudo usermod -aG GROUP $USER, then log in again; in "
        "a container, give it the devices.",
    )


def _judge_passthrough(host: Host, driver: Driver) -> Finding | None:
    del driver
    held = [gpu.address for gpu in host.nvidia_gpus if gpu.driver == "vfio-pci"]
    if held and len(held) == len(host.nvidia_gpus):
        return Finding(
            PROBLEM,
            f"vfio-pci holds the GPU at {', '.join(held)}: it is kept for a virtual machine.",
            "Train in that virtual machine; or take the GPU out of vfio-pci.ids on the kernel's "
            "command line and reboot.",
        )
    unmapped = [gpu.address for gpu in host.nvidia_gpus if gpu.has_memory_windows is False]
    if unmapped:
        return Finding(
            PROBLEM,
            f"The firmware gave the GPU at {', '.join(unmapped)} no address space (dmesg: BAR 0M).",
            "In a virtual machine: UEFI firmware (OVMF) with a large 64-bit MMIO window; on a "
            "board: Above 4G Decoding.",
        )
    return None


def _judge_container(host: Host, driver: Driver) -> Finding | None:
    if not host.is_container:
        return None
    if not nvidia_files(host) and "/dev/dxg" not in device_names(host):
        return Finding(
            PROBLEM,
            "The host has an NVIDIA GPU, but this container has no /dev/nvidia*.",
            "Install the NVIDIA Container Toolkit on the host and start with --gpus all.",
        )
    if "unknown error" in (driver.problem or "").lower():
        return Finding(
            PROBLEM,
            "This container has lost its GPU (NVML: Unknown Error), as after a daemon-reload of "
            "the host.",
            "Start it again; against the next time: native.cgroupdriver=cgroupfs in Docker's "
            "daemon.json, or --device=/dev/nvidia0 for each device file.",
        )
    return None


def _judge_kernel_driver(host: Host, driver: Driver) -> Finding | None:
    """Judge a machine whose GPU no NVIDIA module drives."""
    if nvidia_files(host) or driver.num_gpus or host.is_container or host.is_wsl:
        return None
    holders = {gpu.driver for gpu in host.nvidia_gpus if gpu.driver}
    if "nouveau" in holders | set(host.kernel_modules):
        return Finding(
            PROBLEM,
            "There is an NVIDIA GPU on the PCI bus and no /dev/nvidia*: nouveau holds it.",
            f"{INSTALL_DRIVER} It keeps nouveau from being loaded.",
        )
    if "nvidia" in holders | set(host.kernel_modules):
        return Finding(
            PROBLEM,
            "The NVIDIA module is loaded, but there is no /dev/nvidia*.",
            "Run: sudo nvidia-modprobe -u -c 0. If it fails, dmesg | grep NVRM says why.",
        )
    advice = INSTALL_DRIVER
    if host.has_secure_boot:
        advice += " Secure Boot is on: enrol the key that the installation asks about (mokutil)."
    return Finding(
        PROBLEM,
        "There is an NVIDIA GPU on the PCI bus and no /dev/nvidia*: no NVIDIA driver is loaded.",
        advice,
    )


def _judge_missing_files(host: Host, driver: Driver) -> Finding | None:
    files = nvidia_files(host)
    missing = [name for name in ("/dev/nvidiactl", "/dev/nvidia-uvm") if name not in files]
    if not files or not missing:
        return None
    if host.is_container:
        advice = "Start the container with --gpus all, which gives it all of them."
    else:
        advice = "Run: sudo nvidia-modprobe -u -c 0 (or sudo modprobe nvidia_uvm)."
    return Finding(PROBLEM, f"{' and '.join(missing)} is missing, which CUDA needs.", advice)


def _judge_library(host: Host, driver: Driver) -> Finding:
    present = next(iter(device_names(host)), "an NVIDIA GPU")
    reason = driver.problem or "it knows no GPU"
    advice = "Install the driver's libraries; in a container, start it with --gpus all."
    if host.is_wsl:
        advice = "Update the driver of Windows, and WSL (wsl --update); no driver goes into Linux."
    return Finding(
        PROBLEM,
        f"There is {present}, but the driver library does not answer: {reason}.",
        advise_on(driver.problem) or advice,
    )


# In this order: one that is further up explains what is further down.
CAUSES: tuple[Callable[[Host, Driver], Finding | None], ...] = (
    _judge_versions,
    _judge_permissions,
    _judge_passthrough,
    _judge_container,
    _judge_kernel_driver,
    _judge_missing_files,
    _judge_library,
)
