"""What in the environment and in a container's limits gets in the way: pure functions of the facts.

    Host, Torch -> findings

No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

from utils.base.text import format_bytes
from utils.tools.diagnosis.diagnosis import NOTE, PROBLEM, Finding
from utils.tools.diagnosis.host_facts import SHM, Host
from utils.tools.diagnosis.torch_facts import Torch

SMALL_SHM_BYTES = 2**30
BUSY = 0.5  # of its threads
FEW_CORES = 0.9  # of the machine's, to be worth a word
# Switches for debugging that cost speed: value -> what they do.
SLOW_SWITCHES = {
    "CUDA_LAUNCH_BLOCKING": ("1", "each kernel waits for the one before: slow"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "each tensor asks the driver for memory: very slow"),
    "NVIDIA_TF32_OVERRIDE": ("0", "float32 products may not use TF32: slower"),
}


def find_host_findings(host: Host, torch: Torch) -> list[Finding]:
    """Return what is wrong or worth knowing of environment and limits."""
    return [finding for judge in JUDGES for finding in judge(host, torch)]


def _judge_libraries(host: Host, torch: Torch) -> list[Finding]:
    """Judge the libcuda that LD_LIBRARY_PATH puts before the driver's."""
    first = next(iter(host.cuda_libraries), None)
    if first is None:
        return []
    folder = PurePath(first).parent
    if "stubs" in folder.parts:
        message = f"LD_LIBRARY_PATH puts {first} first: a stub for compiling, which finds no GPU."
        return [Finding(PROBLEM, message, f"Take {folder} out of LD_LIBRARY_PATH.")]
    if any("compat" in part for part in folder.parts):
        level = NOTE if torch.is_cuda_available else PROBLEM
        message = f"LD_LIBRARY_PATH puts {first} first: for drivers older than that CUDA."
        advice = f"With a new driver or a consumer GPU, take {folder} out of LD_LIBRARY_PATH."
        return [Finding(level, message, advice)]
    return []


def _judge_shm(host: Host, torch: Torch) -> list[Finding]:
    """Judge the memory that NCCL and data loaders share; train.py's own saves need none of it."""
    if host.shm_bytes is None or host.shm_bytes >= SMALL_SHM_BYTES:
        return []
    several = len(torch.gpus) > 1
    message = f"{SHM} has {format_bytes(host.shm_bytes)}"
    message += (
        ": NCCL between several GPUs can fail." if several else ": little for NCCL and workers."
    )
    advice = "Mount it larger: sudo mount -o remount,size=8G /dev/shm"
    if host.is_container:
        advice = "Start the container with --shm-size=8g or --ipc=host."
    return [Finding(PROBLEM if several else NOTE, message, advice)]


def _judge_threads(host: Host, torch: Torch) -> list[Finding]:
    usable, used = host.threads, torch.num_threads
    if not usable or not used:
        return []
    on_cpu = not torch.is_cuda_available and not torch.is_mps_available
    names = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in host.environment]
    if used == 1 and usable > 1 and names:
        message = f"{names[0]}={host.environment[names[0]]}: torch uses 1 of {usable} CPU threads."
        advice = f"Run: unset {names[0]} (accelerate and torchrun set it to 1 for each rank)"
        return [Finding(PROBLEM if on_cpu else NOTE, message, advice)]
    if used > usable:
        message = f"torch uses {used} threads where {usable} can run at a time: they wait in turn."
        return [
            Finding(PROBLEM if on_cpu else NOTE, message, f"Run: export OMP_NUM_THREADS={usable}")
        ]
    return []


def _judge_limits(host: Host, torch: Torch) -> list[Finding]:
    """Judge what a container, or its user, may take of the machine."""
    del torch
    findings = []
    if host.threads and host.cpu_threads and host.threads < FEW_CORES * host.cpu_threads:
        limit = (
            f"{host.cpu_limit:.1f} cores" if host.cpu_limit else f"{host.usable_threads} threads"
        )
        message = f"The CPU is limited to {limit} of {host.cpu_threads}."
        advice = "Docker: --cpus, --cpuset-cpus; Kubernetes: resources.limits.cpu; else taskset."
        findings.append(Finding(NOTE, message, advice))
    limit_bytes = host.memory_limit_bytes
    if limit_bytes and host.memory_bytes and limit_bytes < host.memory_bytes:
        message = (
            f"Memory is limited to {format_bytes(limit_bytes)} of "
            f"{format_bytes(host.memory_bytes)}: above it the kernel ends the process."
        )
        advice = "Docker: --memory; Kubernetes: resources.limits.memory."
        findings.append(Finding(NOTE, message, advice))
    return findings


def _judge_load(host: Host, torch: Torch) -> list[Finding]:
    """Judge what others compute at the same time: a thread that waits keeps the rest waiting."""
    del torch
    if host.load is None or not host.cpu_threads or host.load < BUSY * host.cpu_threads:
        return []
    message = f"The CPU is busy: load {host.load:.1f} on {host.cpu_threads} threads."
    return [Finding(NOTE, message, "On a CPU, speeds are those of a machine that shares.")]


def _judge_switches(host: Host, torch: Torch) -> list[Finding]:
    if not torch.is_cuda_available:
        return []
    return [
        Finding(NOTE, f"{name}={value}: {effect}.", f"Unless you are debugging: unset {name}")
        for name, (value, effect) in SLOW_SWITCHES.items()
        if host.environment.get(name) == value
    ]


def _judge_allocator(host: Host, torch: Torch) -> list[Finding]:
    newer = host.environment.get("PYTORCH_ALLOC_CONF")
    older = host.environment.get("PYTORCH_CUDA_ALLOC_CONF")
    if not torch.is_cuda_available or not older:
        return []
    if newer is not None and newer != older:
        message = (
            "PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF differ; the first is the newer name."
        )
        return [Finding(NOTE, message, "Run: unset PYTORCH_CUDA_ALLOC_CONF")]
    return []


JUDGES: tuple[Callable[[Host, Torch], list[Finding]], ...] = (
    _judge_libraries,
    _judge_shm,
    _judge_threads,
    _judge_limits,
    _judge_load,
    _judge_switches,
    _judge_allocator,
)
