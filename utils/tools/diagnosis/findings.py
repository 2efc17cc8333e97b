"""What stands between training and this machine, and what to do: pure functions of the facts.

    Facts -> device files, driver, torch's build, GPUs, environment -> Diagnosis

Where the driver serves no GPU, the first cause alone is said: the others follow from it. No torch
here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from utils.base.text import format_bytes
from utils.tools.diagnosis.facts import SHM, Driver, DriverGpu, Facts, Host, Torch

PROBLEM, NOTE, OK = "problem", "note", "ok"
# Memory that the driver itself takes, and a desktop.
USUAL_MEMORY_BYTES = 2**30
MUCH_MEMORY = 0.25
SMALL_SHM_BYTES = 2**30
# Oldest driver of each CUDA major version on Linux:
# https://docs.nvidia.com/deploy/cuda-compatibility/
OLDEST_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
TORCH_BUILDS = "https://pytorch.org/get-started/locally/"
INSTALL_DRIVER = "Install the NVIDIA driver (Ubuntu: sudo ubuntu-drivers install) and reboot."

# What CUDA and NVML say -> what to do about it.
KNOWN_MESSAGES = {
    ("version mismatch", "error 803"): "The kernel module and the driver's libraries differ in "
    "version: reboot after a driver update; take `compat` folders out of LD_LIBRARY_PATH.",
    ("error 804", "forward compatibility"): "Take `compat` folders out of LD_LIBRARY_PATH: this "
    "GPU does not take their libcuda.",
    ("error 34", "stub library"): "Take `stubs` folders out of LD_LIBRARY_PATH.",
    ("busy or unavailable",): "Another process holds the GPU for itself, or its compute mode is "
    "prohibited (nvidia-smi -q -d COMPUTE).",
    ("out of memory",): "Other processes hold the GPU's memory: nvidia-smi names them.",
    ("unknown error", "error 999"): "In a container that had the GPU before: start it again. Else "
    "load the module again: sudo modprobe -r nvidia_uvm; sudo modprobe nvidia_uvm",
    ("is lost", "do not answer", "fallen off"): "Look for Xid in dmesg, then reboot; if it comes "
    "back, check power and cooling.",
}


@dataclass(frozen=True)
class Diagnosis:
    """Something worth saying, and what to do about it; the level is ok, note or problem."""

    level: str
    message: str
    advice: str = ""


def find_causes(facts: Facts) -> list[Diagnosis]:
    """Return what is wrong or worth knowing, the cause before what follows from it."""
    return [
        *_judge_gpu(facts.host, facts.driver, facts.torch),
        *(diagnosis for gpu in facts.driver.gpus for diagnosis in _judge_memory(gpu)),
        *_judge_limits(facts.host, facts.torch),
        *_judge_timings(facts),
    ]


def sort_diagnoses(diagnoses: Sequence[Diagnosis]) -> list[Diagnosis]:
    """Return problems first, each kind in its order."""
    return sorted(diagnoses, key=lambda diagnosis: (PROBLEM, NOTE, OK).index(diagnosis.level))


def summarize_findings(torch: Torch) -> str:
    """Return what train.py will use."""
    if torch.version is None:
        return "train.py cannot run: torch does not work."
    if torch.gpus:
        names = ", ".join(dict.fromkeys(gpu.name for gpu in torch.gpus))
        advice = "; bash run.sh uses them all" if len(torch.gpus) > 1 else ""
        precision = torch.gpus[0].precision
        return f"train.py can use {len(torch.gpus)} GPU(s) ({names}) in {precision}{advice}."
    if torch.is_mps_available:
        return "train.py uses the Apple GPU (MPS) in float32."
    return (
        f"train.py uses the CPU ({torch.num_threads or '?'} threads) in float32: enough for "
        "--config test, far too slow for production."
    )


def advise_on(message: str | None) -> str:
    """Return what to do about a message of CUDA or NVML, empty where it is not known."""
    text = (message or "").lower()
    found = (
        advice for marks, advice in KNOWN_MESSAGES.items() if any(mark in text for mark in marks)
    )
    return next(found, "")


def _judge_gpu(host: Host, driver: Driver, torch: Torch) -> Iterator[Diagnosis]:
    """Yield what stands between torch and a GPU, or that nothing does."""
    if torch.version is None:
        reason = f"torch cannot be imported: {torch.problem}."
        yield Diagnosis(PROBLEM, reason, "Run: bash setup.sh")
    if torch.is_cuda_available:
        yield from _judge_working_cuda(host, driver, torch)
    elif torch.is_mps_available:
        yield Diagnosis(OK, "torch can use this machine's Apple GPU (MPS).")
    elif host.pci_gpus or driver.num_gpus or host.device_files:
        yield from _judge_driver(host, driver, torch)
        if torch.version is not None:
            yield from _judge_unused_gpu(host, driver, torch)
    else:
        message = "No NVIDIA GPU was found: nothing on the PCI bus, no /dev/nvidia*."
        advice = "In a virtual machine: have the host pass its GPU through, or choose one with it."
        yield Diagnosis(NOTE, message, advice)


# Why the driver serves no GPU


def _judge_driver(host: Host, driver: Driver, torch: Torch) -> Iterator[Diagnosis]:
    """Yield why the driver serves no GPU, or CUDA cannot open its files: the first cause alone."""
    files = host.device_files
    denied = [path for path, may_use in files.items() if not may_use]
    needed = ("/dev/nvidiactl", "/dev/nvidia-uvm") * ("/dev/dxg" not in files)
    missing = [name for name in needed if name not in files]
    known = "" if driver.num_gpus else advise_on(driver.problem)
    if driver.num_gpus and not torch.cuda_build:
        return  # NVML answers without the files that CUDA needs, and a first use makes them
    if denied and not known:
        message = f"This user may not use {', '.join(denied)}."
        advice = "ls -l /dev/nvidia* shows their group: sudo usermod -aG GROUP $USER, then log in "
        advice += "again; in a container, give it the devices."
    elif not files and not driver.num_gpus:
        message, advice = _judge_holder(host)
    elif missing and not known:
        message = f"CUDA needs {' and '.join(missing)}, missing here."
        advice = "Run: sudo nvidia-modprobe -u -c 0 (or sudo modprobe nvidia_uvm)."
        if host.is_container:
            advice = "Start the container with --gpus all, which gives it all of them."
    elif not driver.num_gpus:
        message = "There is an NVIDIA GPU, and the driver serves none: "
        message += f"{driver.problem or 'it gives no reason'}."
        advice = "Install the driver's libraries; in a container, start it with --gpus all."
        if host.is_wsl:
            advice = "Update Windows' driver and WSL (wsl --update); no driver goes into Linux."
        advice = known or advice
    else:
        return
    yield Diagnosis(PROBLEM, message, advice)


def _judge_holder(host: Host) -> tuple[str, str]:
    """Return (what is the case, what to do) where a GPU on the bus has no device files."""
    holders = host.pci_gpus.values()
    if "vfio-pci" in holders:
        message = "vfio-pci holds the GPU: it is kept for a virtual machine."
        return message, "Train in that machine, or take the GPU out of vfio-pci.ids and reboot."
    if host.is_container:
        message = "The host has an NVIDIA GPU, but this container has no /dev/nvidia*."
        return message, "Install the NVIDIA Container Toolkit on the host; start with --gpus all."
    if "nvidia" in holders:
        message = "The NVIDIA module is loaded, but there is no /dev/nvidia*."
        return message, "Run: sudo nvidia-modprobe -u -c 0. If it fails: dmesg | grep NVRM"
    reason = "nouveau holds it" if "nouveau" in holders else "no NVIDIA driver is loaded"
    message = f"There is an NVIDIA GPU on the PCI bus and no /dev/nvidia*: {reason}."
    return message, f"{INSTALL_DRIVER} With Secure Boot, enrol the key that it asks about."


# A torch that does not use the GPU


def _judge_unused_gpu(host: Host, driver: Driver, torch: Torch) -> list[Diagnosis]:
    """Return what is wrong in torch or the environment on a machine that has a GPU."""
    diagnoses = list(_judge_visible_devices(host, driver))
    capabilities = host.environment.get("NVIDIA_DRIVER_CAPABILITIES", "all")
    if not {"compute", "all"} & set(capabilities.replace(" ", "").split(",")):
        message = f"NVIDIA_DRIVER_CAPABILITIES is {capabilities!r}: this container has no libcuda."
        advice = "Start it with -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        diagnoses.append(Diagnosis(PROBLEM, message, advice))
    served = driver.cuda_version
    if torch.cuda_build is None and torch.hip_build is None:
        message = f"torch {torch.version} is a CPU-only build on a machine with an NVIDIA GPU."
        wanted = f"CUDA {served[0]}" if served else "CUDA"
        advice = f"Install a build for {wanted}: {TORCH_BUILDS}"
        diagnoses.append(Diagnosis(PROBLEM, message, advice))
    elif served and served[0] < _read_build(torch)[0]:  # it serves each minor of its major version
        oldest = OLDEST_DRIVERS.get(_read_build(torch)[0], "a newer one")
        message = f"Driver {driver.version} serves CUDA up to {_dotted(served)}, torch was built "
        message += f"for {torch.cuda_build}."
        advice = f"Update the driver ({oldest} or newer), or install a torch that was built for "
        advice += f"CUDA {served[0]}: {TORCH_BUILDS}"
        diagnoses.append(Diagnosis(PROBLEM, message, advice))
    if not diagnoses and driver.num_gpus:
        message = f"torch cannot use the GPU: {torch.problem or 'it gives no reason'}"
        advice = advise_on(torch.problem) or "Look at nvidia-smi and at dmesg (NVRM, Xid)."
        diagnoses.append(Diagnosis(PROBLEM, message, advice))
    return diagnoses


def _judge_visible_devices(host: Host, driver: Driver) -> Iterator[Diagnosis]:
    """Judge a variable that hides GPUs: it is empty, or names one that is not there."""
    value = host.environment.get("CUDA_VISIBLE_DEVICES")
    words = [word.strip() for word in (value or "").split(",")]
    numbers = [int(word[:9]) for word in words if word.isdecimal()]
    wrong = next((number for number in numbers if number >= driver.num_gpus > 0), None)
    if value is not None and words[0] in ("", "-1"):
        message = f"CUDA_VISIBLE_DEVICES is {value!r}: it hides every GPU."
        yield Diagnosis(PROBLEM, message, "Run: unset CUDA_VISIBLE_DEVICES")
    elif wrong is not None:
        message = f"CUDA_VISIBLE_DEVICES is {value!r}: there is no GPU {wrong}, the last is "
        message += f"{driver.num_gpus - 1}; this one and those after it are not seen."
        advice = "Run: unset CUDA_VISIBLE_DEVICES, or name those that nvidia-smi -L lists."
        yield Diagnosis(PROBLEM, message, advice)


# A GPU that works


def _judge_working_cuda(host: Host, driver: Driver, torch: Torch) -> Iterator[Diagnosis]:
    if torch.gpus:
        kind = f"ROCm {torch.hip_build}" if torch.hip_build else f"CUDA {torch.cuda_build}"
        yield Diagnosis(OK, f"torch can use {len(torch.gpus)} GPU(s) with {kind}.")
    hidden = list(_judge_visible_devices(host, driver))
    yield from hidden
    if driver.num_gpus > len(torch.gpus) and not hidden:
        shown = host.environment.get("CUDA_VISIBLE_DEVICES", "not set")
        message = f"The driver knows {driver.num_gpus} GPUs, torch sees {len(torch.gpus)}."
        yield Diagnosis(NOTE, message, f"CUDA_VISIBLE_DEVICES is {shown}.")
    for gpu in torch.gpus:
        if torch.architectures and not is_served(gpu.capability, torch.architectures):
            has = " ".join(torch.architectures)
            capability = _dotted(gpu.capability)
            message = f"torch has no code for {gpu.name} (capability {capability}; it has {has})."
            advice = f"Install a build that has it (an older one for an older GPU): {TORCH_BUILDS}"
            yield Diagnosis(PROBLEM, message, advice)
        if gpu.precision == "fp16":
            message = f"{gpu.name} has no bfloat16: fp16 with a loss scaler is used instead."
            yield Diagnosis(NOTE, message)
    if torch.problem:
        level = NOTE if torch.gpus else PROBLEM
        yield Diagnosis(level, f"torch says: {torch.problem}", advise_on(torch.problem))
    if driver.version and driver.problem:
        yield Diagnosis(PROBLEM, f"{driver.problem}.", advise_on(driver.problem))
    served = driver.cuda_version
    if served and torch.cuda_build and served < _read_build(torch):
        message = f"The driver serves CUDA up to {_dotted(served)}, torch was built for "
        message += f"{torch.cuda_build}: it runs, but what is compiled (torch_compile) may fail."
        yield Diagnosis(NOTE, message, "Update the driver.")


def is_served(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Tell whether code runs: same major and no newer minor (sm_), or anything older (compute_)."""
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            return True  # ROCm's names are not judged
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def _judge_memory(gpu: DriverGpu) -> Iterator[Diagnosis]:
    """Judge what others hold: this diagnosis had not begun to use the GPU."""
    used, size = gpu.memory_used_bytes or 0, gpu.memory_bytes
    if size and (used > USUAL_MEMORY_BYTES or gpu.holders):
        holders = ", ".join(gpu.holders) or "processes that cannot be seen from here"
        message = f"GPU {gpu.index}: {format_bytes(used)} of {format_bytes(size)} are in use "
        message += f"already by {holders}."
        advice = "Wait for them, end them (nvidia-smi), or take another GPU."
        yield Diagnosis(PROBLEM if used >= MUCH_MEMORY * size else NOTE, message, advice)


# Environment, limits, timings


def _judge_limits(host: Host, torch: Torch) -> Iterator[Diagnosis]:
    """Judge shared memory (of NCCL and data loaders) and CPU threads."""
    if host.shm_bytes is not None and host.shm_bytes < SMALL_SHM_BYTES:
        has_several = len(torch.gpus) > 1
        what = "NCCL between several GPUs can fail" if has_several else "little for data loaders"
        message = f"{SHM} has {format_bytes(host.shm_bytes)}: {what}."
        advice = f"Mount it larger: sudo mount -o remount,size=8G {SHM}"
        if host.is_container:
            advice = "Start the container with --shm-size=8g or --ipc=host."
        yield Diagnosis(PROBLEM if has_several else NOTE, message, advice)
    threads, variable = host.cpu_threads or 1, host.environment.get("OMP_NUM_THREADS")
    if variable is not None and torch.num_threads == 1 < threads:
        level = PROBLEM if torch.device == "cpu" else NOTE
        message = f"OMP_NUM_THREADS={variable}: torch uses 1 of {threads} CPU threads."
        yield Diagnosis(level, message, "Run: unset OMP_NUM_THREADS")


def _judge_timings(facts: Facts) -> Iterator[Diagnosis]:
    for timing in facts.timings:
        if timing.problem:
            message = f"{timing.device}: {timing.problem}"
            yield Diagnosis(PROBLEM, message, advise_on(timing.problem))
    if facts.interrupted:
        yield Diagnosis(PROBLEM, f"Timing was cut short: {facts.interrupted}.")


def _read_build(torch: Torch) -> tuple[int, int]:
    """Return the CUDA version that torch was built for."""
    major, _, minor = (torch.cuda_build or "0").partition(".")
    return int(major), int(minor.partition(".")[0] or 0)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
