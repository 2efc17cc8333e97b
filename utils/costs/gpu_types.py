"""GPUs and the machines they stand in, for plans on paper: memory, speeds, links.

    kind of GPU, bytes, number of GPUs -> seconds that a collective takes

Peak FLOPs are those of utils/models/mfu.py. The other figures are of data sheets, less what
collective benchmarks usually lose; each is an assumption that a plan states, and that options
override. Nothing here asks a device. No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.base.errors import UsageError
from utils.models.mfu import find_peak_flops

GIB = 2**30
LINK_HOP_SECONDS = 2e-6
NETWORK_HOP_SECONDS = 10e-6


@dataclass(frozen=True)
class GpuType:
    """A GPU in a machine with several of its kind.

    Attributes:
        name: As utils/models/mfu.py knows it.
        memory_bytes: What the driver reports as its memory.
        memory_bytes_per_second: Bandwidth of its own memory.
        link_bytes_per_second: Sent by one GPU to the others of its machine, in one direction, as
            collectives reach it.
        network_bytes_per_second: Sent by one machine to others, over all of its cards together.
        gpus_per_machine: GPUs in a machine.
        efficiency: Share of the peak that the products of a very wide model reach, with all else
            that a GPU does in a step without communication.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    gpus_per_machine: int
    efficiency: float

    @property
    def peak_flops(self) -> float:
        """FLOPs a second, dense, 16 bits."""
        peak = find_peak_flops(self.name, "bf16")
        assert peak is not None
        return peak


GPU_TYPES = {
    gpu.name: gpu
    for gpu in (
        # NVLink 4: 450 GB/s a direction; a network card of 400 Gb/s for each GPU.
        GpuType("H100", 79 * GIB, 3.35e12, 360e9, 320e9, 8, 0.6),
        GpuType("H200", 139 * GIB, 4.8e12, 360e9, 320e9, 8, 0.6),
        # NVLink 3: 300 GB/s a direction; 200 Gb/s for each GPU.
        GpuType("A100", 79 * GIB, 2.0e12, 240e9, 160e9, 8, 0.7),
        # No NVLink: PCIe through the host; 100 Gb/s and 50 Gb/s for the machine.
        GpuType("L4", 22 * GIB, 0.3e12, 10e9, 10e9, 8, 0.5),
        GpuType("T4", 14 * GIB, 0.32e12, 5e9, 5e9, 4, 0.5),
    )
}


def find_gpu_type(name: str) -> GpuType:
    """Return the GPU of a name, in any case.

    Raises:
        UsageError: There is none; the message lists those there are.
    """
    found = GPU_TYPES.get(name.upper())
    if found is None:
        raise UsageError(f"GPU {name!r} is not known ({', '.join(GPU_TYPES)}).")
    return found


def hop_seconds(gpus: int, gpu: GpuType) -> float:
    """Return the latency of a ring through all GPUs, once around."""
    machines = math.ceil(gpus / gpu.gpus_per_machine)
    between = machines if machines > 1 else 0
    return (gpus - 1 - max(0, between - 1)) * LINK_HOP_SECONDS + between * NETWORK_HOP_SECONDS


def ring_speed(gpus: int, gpu: GpuType) -> float:
    """Return the bytes a second that each GPU of a ring sends: all cards of a machine together."""
    if gpus <= gpu.gpus_per_machine:
        return gpu.link_bytes_per_second
    return min(gpu.link_bytes_per_second, gpu.network_bytes_per_second)


def gather_seconds(num_bytes: float, gpus: int, gpu: GpuType) -> float:
    """Return the time of an all-gather or a reduce-scatter of a message of so many bytes."""
    if gpus == 1:
        return 0.0
    sent = num_bytes * (gpus - 1) / gpus
    return sent / ring_speed(gpus, gpu) + hop_seconds(gpus, gpu)


def reduce_seconds(num_bytes: float, gpus: int, gpu: GpuType) -> float:
    """Return the time of an all-reduce: bandwidth of a ring, latency of a tree between machines."""
    if gpus == 1:
        return 0.0
    sent = 2 * num_bytes * (gpus - 1) / gpus
    machines = math.ceil(gpus / gpu.gpus_per_machine)
    inside = min(gpus, gpu.gpus_per_machine) - 1
    hops = inside * LINK_HOP_SECONDS + math.ceil(math.log2(machines)) * NETWORK_HOP_SECONDS
    return sent / ring_speed(gpus, gpu) + 2 * hops
