"""Say what this machine can train on, and what stands in the way of its GPU.

    driver, device files, environment, torch -> facts -> findings, each with what to do

It works without a GPU, a driver or torch, and exits 0 there: then that is the diagnosis.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from utils.console import format_bytes, run_command
from utils.gpu_facts import (
    Driver,
    GpuFacts,
    Host,
    Matmul,
    Torch,
    read_driver,
    read_host,
    read_torch,
    time_matmuls,
)
from utils.gpu_findings import Finding, find_misconfigurations
from utils.metadata import printable, to_json_text


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis and return the exit code."""
    parser = argparse.ArgumentParser(description="Diagnose GPU, driver and torch.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_command(run_diagnosis, parser.parse_args(argv))


def run_diagnosis(args: argparse.Namespace) -> None:
    """Gather the facts, judge them, print them."""
    host, driver = read_host(), read_driver()
    torch_facts = read_torch()
    matmuls = time_matmuls(torch_facts)
    findings = find_misconfigurations(host, driver, torch_facts)
    findings += [
        Finding("problem", f"matmul on {m.device} in {m.dtype} failed: {m.problem}")
        for m in matmuls
        if m.problem
    ]
    if args.json:
        values = {
            "host": asdict(host),
            "driver": asdict(driver),
            "torch": asdict(torch_facts),
            "matmul": [asdict(matmul) for matmul in matmuls],
            "findings": [asdict(finding) for finding in findings],
        }
        print(to_json_text(values))
        return
    print_section("System", host_lines(host, torch_facts))
    print_section("NVIDIA Driver", driver_lines(host, driver))
    print_section("PyTorch", torch_lines(torch_facts))
    print_section("Matmul", [matmul_line(matmul) for matmul in matmuls] or ["not run: no torch"])
    print_section("Diagnosis", finding_lines(findings))


def print_section(title: str, lines: Sequence[str]) -> None:
    """Print lines below a heading."""
    print(f"{title}:")
    print("-" * 30)
    for line in lines:
        print(printable(line, limit=500))
    print()


def host_lines(host: Host, torch: Torch) -> list[str]:
    """Return the machine."""
    kinds = [("virtual machine", host.is_virtual_machine), ("container", host.is_container)]
    kind = ", ".join(name for name, holds in kinds if holds) or "no virtual machine, no container"
    return [
        f"System: {host.system} ({kind})",
        f"Python: {host.python}",
        f"CPU: {host.cpu_cores or '?'} cores, {host.cpu_threads or '?'} threads"
        + (f", torch uses {torch.num_threads}" if torch.num_threads else ""),
        f"Memory: {format_bytes(host.memory_bytes)}",
    ]


def driver_lines(host: Host, driver: Driver) -> list[str]:
    """Return the driver and how the GPU can be reached."""
    cuda = ".".join(str(part) for part in driver.cuda_version or ()) or "-"
    visible = host.cuda_visible_devices
    return [
        f"Driver: {driver.version or 'none'}" + (f" ({driver.problem})" if driver.problem else ""),
        f"Driver's CUDA: {cuda}",
        f"GPUs Known To Driver: {driver.num_gpus}",
        f"nvidia-smi: {driver.nvidia_smi or 'not on PATH'}",
        f"NVIDIA GPUs On PCI Bus: {'unknown' if host.pci_gpus is None else host.pci_gpus}",
        f"Device Files: {', '.join(host.device_files) or 'no /dev/nvidia*'}",
        f"CUDA_VISIBLE_DEVICES: {'not set' if visible is None else repr(visible)}",
    ]


def torch_lines(torch: Torch) -> list[str]:
    """Return torch's build and the GPUs it sees."""
    if torch.version is None:
        return [f"Version: none ({torch.problem})"]
    build = f"CUDA {torch.cuda_build}" if torch.cuda_build else "CPU only"
    if torch.hip_build:
        build = f"ROCm {torch.hip_build}"
    mps = "available" if torch.is_mps_available else "not available"
    return [
        f"Version: {torch.version}",
        f"Build: {build}",
        f"CUDA Available: {torch.is_cuda_available}",
        f"GPU Count: {len(torch.gpus)}",
        *(gpu_line(gpu) for gpu in torch.gpus),
        f"MPS: {mps}" + ("" if torch.is_mps_built else " (not in this build)"),
    ]


def gpu_line(gpu: GpuFacts) -> str:
    """Return one GPU."""
    return (
        f"  {gpu.index}: {gpu.name}, {format_bytes(gpu.memory_bytes)}, "
        f"capability {gpu.capability[0]}.{gpu.capability[1]}, "
        f"bf16 {'yes' if gpu.is_bf16_supported else 'no'}, "
        f"fp16 {'yes' if gpu.is_fp16_supported else 'no'}"
    )


def matmul_line(matmul: Matmul) -> str:
    """Return one timed product."""
    head = f"{matmul.device} {matmul.dtype} {matmul.size} x {matmul.size}"
    if matmul.milliseconds is None:
        return f"{head}: failed ({matmul.problem})"
    return f"{head}: {matmul.milliseconds:.2f} ms, {matmul.tflops:.3f} TFLOP/s"


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Return the findings, each with what to do below it."""
    lines = []
    for finding in findings:
        lines.append(f"[{finding.level}] {finding.message}")
        if finding.advice:
            lines.append(f"    {finding.advice}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
