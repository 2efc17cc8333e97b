"""What slows or endangers a GPU that works, and what to do: pure functions of the facts.

    Driver (idle), what it says under load, environment -> findings

What the driver does not answer is no finding. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from utils.base.text import format_bytes
from utils.tools.diagnosis.diagnosis import NOTE, PROBLEM, Finding
from utils.tools.diagnosis.driver_facts import Driver, DriverGpu
from utils.tools.diagnosis.host_facts import Host

# Memory that the driver itself takes, and a desktop.
USUAL_MEMORY_BYTES = 2**30
MUCH_MEMORY = 0.25
SLOWED = ("hardware slowdown", "too hot", "too hot (hardware)", "power brake (hardware)")
LESS_POWER = 0.95
SHOWN_PROCESSES = 4


def find_health_findings(
    host: Host, driver: Driver, moments: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Finding]:
    """Return what is wrong or worth knowing of GPUs that the driver answers for.

    Args:
        host: For its variables.
        driver: As it was before anything ran here.
        moments: uuid of a GPU -> values of `DriverGpu` while it computed.
    """
    findings = []
    for gpu in driver.gpus:
        for judge in GPU_JUDGES:
            findings += judge(gpu)
        findings += _judge_load(gpu, (moments or {}).get(gpu.uuid or "", {}))
    return findings + _judge_links(host, driver)


def _judge_memory(gpu: DriverGpu) -> list[Finding]:
    """Judge what other processes hold; this diagnosis had not begun to use the GPU."""
    if not gpu.memory_bytes or not gpu.memory_used_bytes or gpu.is_mig_enabled:
        return []
    if gpu.memory_used_bytes <= USUAL_MEMORY_BYTES and not gpu.processes:
        return []
    share = gpu.memory_used_bytes / gpu.memory_bytes
    holders = [
        f"{process.name or 'process'} {process.pid}"
        + (f" {format_bytes(process.memory_bytes)}" if process.memory_bytes else "")
        for process in gpu.processes[:SHOWN_PROCESSES]
    ]
    text = f": {', '.join(holders)}" if holders else " (by processes that cannot be seen from here)"
    message = f"{_name(gpu)}: {format_bytes(gpu.memory_used_bytes)} are in use already{text}."
    if share < MUCH_MEMORY:
        return [Finding(NOTE, message)]
    return [
        Finding(PROBLEM, message, "Wait for them or end them (nvidia-smi), or take another GPU.")
    ]


def _judge_errors(gpu: DriverGpu) -> list[Finding]:
    if gpu.has_failed_repair:
        message = f"{_name(gpu)}: broken memory could not be replaced."
        return [Finding(PROBLEM, message, "Have the GPU replaced; its results cannot be trusted.")]
    findings = []
    if gpu.ecc_errors:
        message = (
            f"{_name(gpu)}: {gpu.ecc_errors} uncorrected memory errors since the driver started."
        )
        advice = "Reset it (nvidia-smi -r) or reboot; if they come back, have it replaced."
        findings.append(Finding(PROBLEM, message, advice))
    if gpu.has_pending_repair:
        message = f"{_name(gpu)}: broken memory is replaced at the next reset."
        findings.append(Finding(NOTE, message, "End what runs on it, then: sudo nvidia-smi -r"))
    if gpu.is_ecc_enabled is False:
        message = f"{_name(gpu)}: ECC is off: a flipped bit in its memory goes unnoticed."
        findings.append(Finding(NOTE, message, "For long runs: sudo nvidia-smi -e 1, then reboot."))
    return findings


def _judge_modes(gpu: DriverGpu) -> list[Finding]:
    findings = []
    if gpu.is_mig_enabled and gpu.mig_slices == 0:
        advice = (
            "Make some (sudo nvidia-smi mig -cgi ... -C), or turn it off (sudo nvidia-smi -mig 0)."
        )
        message = f"{_name(gpu)}: MIG is on and has no slices, so that CUDA sees nothing."
        findings.append(Finding(PROBLEM, message, advice))
    elif gpu.is_mig_enabled:
        message = f"{_name(gpu)}: MIG is on ({gpu.mig_slices} slices): a process uses one slice."
        advice = "One run a slice, by CUDA_VISIBLE_DEVICES=MIG-...; nvidia-smi -L lists them."
        findings.append(Finding(NOTE, message, advice))
    if gpu.compute_mode == "prohibited":
        message = f"{_name(gpu)}: its compute mode is prohibited: CUDA may not use it."
        findings.append(Finding(PROBLEM, message, "Run: sudo nvidia-smi -c 0"))
    if gpu.fabric_state in ("not started", "in progress"):
        message = f"{_name(gpu)}: the NVSwitch fabric is {gpu.fabric_state}; CUDA waits for it."
        advice = "Run: sudo systemctl start nvidia-fabricmanager (its version is the driver's)."
        findings.append(Finding(PROBLEM, message, advice))
    if gpu.has_persistence is False:
        message = f"{_name(gpu)}: persistence mode is off: each first use takes seconds longer."
        findings.append(Finding(NOTE, message, "Run: sudo nvidia-smi -pm 1"))
    return findings


def _judge_power(gpu: DriverGpu) -> list[Finding]:
    limit, usual = gpu.power_limit_watts, gpu.default_power_limit_watts
    if not limit or not usual or limit >= usual * LESS_POWER:
        return []
    message = f"{_name(gpu)}: its power limit is {limit:.0f} W, {usual:.0f} W by default: slower."
    return [Finding(NOTE, message, f"If nobody wants that: sudo nvidia-smi -pl {usual:.0f}")]


def _judge_width(gpu: DriverGpu) -> list[Finding]:
    if not gpu.pcie_width or not gpu.max_pcie_width or gpu.pcie_width >= gpu.max_pcie_width:
        return []
    message = f"{_name(gpu)}: PCIe x{gpu.pcie_width} where x{gpu.max_pcie_width} is possible."
    advice = (
        "Copies to the host take longer (saves). Another slot, a riser, or the board's settings."
    )
    return [Finding(NOTE, message, advice)]


def _judge_load(gpu: DriverGpu, moment: Mapping[str, Any]) -> list[Finding]:
    """Judge what held it down while it computed; an idle GPU lowers clocks and link by itself."""
    findings = []
    reasons: Sequence[str] = [*gpu.throttle_reasons, *moment.get("throttle_reasons", ())]
    slowed = sorted({reason for reason in reasons if reason in SLOWED})
    if slowed:
        heat = moment.get("temperature_celsius") or gpu.temperature_celsius
        at = f" at {heat} C" if heat else ""
        message = f"{_name(gpu)}: it is slowed{at}: {', '.join(slowed)}."
        advice = "Look at cooling and power supply: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"
        findings.append(Finding(PROBLEM, message, advice))
    if (
        "clocks set by hand" in reasons
        and (gpu.max_clock_mhz or 0) > (moment.get("clock_mhz") or 0) > 0
    ):
        message = f"{_name(gpu)}: its clocks are set by hand to {moment['clock_mhz']} MHz."
        advice = (
            f"They may go to {gpu.max_clock_mhz} MHz: sudo nvidia-smi -rgc; sudo nvidia-smi -rac"
        )
        findings.append(Finding(NOTE, message, advice))
    now, most = moment.get("pcie_generation"), moment.get("max_pcie_generation")
    if now and most and now < most:
        message = f"{_name(gpu)}: PCIe generation {now} under load where {most} is possible."
        findings.append(
            Finding(NOTE, message, "Copies to the host take longer: the board's settings.")
        )
    return findings


def _judge_links(host: Host, driver: Driver) -> list[Finding]:
    cut = [link for link in driver.links if link.has_p2p is False]
    findings = []
    if cut:
        pairs = ", ".join(f"{link.first}-{link.second}" for link in cut[:SHOWN_PROCESSES])
        more = f" and {len(cut) - SHOWN_PROCESSES} more" if len(cut) > SHOWN_PROCESSES else ""
        advice = (
            "Gradients go through host memory, which is slower. Usual for consumer cards and vGPUs."
        )
        if host.has_iommu and not host.is_virtual_machine:
            advice += " An IOMMU is on, which can prevent it on bare metal (iommu=pt)."
        message = f"GPUs {pairs}{more} cannot reach each other's memory (P2P)."
        findings.append(Finding(NOTE, message, advice))
    if driver.num_gpus > 1:
        for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
            if host.environment.get(name) == "1":
                message = f"{name}=1: NCCL takes a slower way between the GPUs."
                findings.append(Finding(NOTE, message, f"If nothing needs it: unset {name}"))
    return findings


def _name(gpu: DriverGpu) -> str:
    return f"GPU {gpu.index}"


GPU_JUDGES: tuple[Callable[[DriverGpu], list[Finding]], ...] = (
    _judge_memory,
    _judge_errors,
    _judge_modes,
    _judge_power,
    _judge_width,
)
