"""What debug_gpu.py prints: rows of a label and a value, by section.

    Host, Driver, Torch, Timing, Forecast -> rows

Values come from the machine, its driver and its environment: whoever prints them passes them
through `printable`. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.base.text import format_bytes
from utils.tools.diagnosis.configuration_fit import Forecast, describe_forecast
from utils.tools.diagnosis.device_timing import Matmul, Timing, TrainingStep
from utils.tools.diagnosis.driver_facts import Driver, DriverGpu, Link
from utils.tools.diagnosis.host_facts import SHM, Host
from utils.tools.diagnosis.torch_facts import Torch, TorchGpu

Row = tuple[str, str]
SHOWN_PROCESSES = 4


def host_rows(host: Host, torch: Torch) -> list[Row]:
    """Return the machine."""
    kinds = [
        (
            f"virtual machine{f' ({host.hypervisor})' if host.hypervisor else ''}",
            host.is_virtual_machine,
        ),
        ("container", host.is_container),
        ("WSL", host.is_wsl),
    ]
    kind = ", ".join(name for name, holds in kinds if holds) or "no virtual machine, no container"
    rows = [
        ("System", _join([host.system, host.distribution])),
        ("Kind", kind),
        ("CPU", _cpu_text(host, torch)),
        ("Memory", _memory_text(host)),
        ("Python", host.python),
    ]
    rows += [("Variable", f"{name}={value}") for name, value in host.environment.items()]
    return rows


def _cpu_text(host: Host, torch: Torch) -> str:
    limit = f"limited to {host.cpu_limit:.1f} cores" if host.cpu_limit else None
    threads = f"torch uses {torch.num_threads}" if torch.num_threads else None
    return _join(
        [
            host.cpu_name,
            f"{host.cpu_cores or '?'} cores, {host.cpu_threads or '?'} threads",
            limit,
            threads,
            torch.cpu_capability,
        ]
    )


def _memory_text(host: Host) -> str:
    limit = host.memory_limit_bytes
    return _join(
        [
            f"{format_bytes(host.memory_bytes)}, {format_bytes(host.memory_available_bytes)} free",
            f"limited to {format_bytes(limit)}" if limit else None,
            f"{SHM} {format_bytes(host.shm_bytes)}" if host.shm_bytes is not None else None,
        ]
    )


def driver_rows(host: Host, driver: Driver) -> list[Row]:
    """Return the driver, and how GPUs can be reached."""
    cuda = ".".join(str(part) for part in driver.cuda_version or ()) or "-"
    module = f"{host.kernel_driver}" if host.kernel_driver else None
    rows = [
        ("Driver", _join([driver.version or "none", driver.problem])),
        ("CUDA", f"up to {cuda}" if driver.cuda_version else "-"),
        ("nvidia-smi", driver.nvidia_smi or "not on PATH"),
        ("Kernel", _join([module, ", ".join(host.kernel_modules) or "no GPU module loaded"])),
        ("PCI bus", _pci_text(host)),
        ("Devices", _files_text(host)),
    ]
    if host.has_iommu is not None and host.nvidia_gpus:
        rows.append(("IOMMU", "on" if host.has_iommu else "off"))
    return rows


def _pci_text(host: Host) -> str:
    if host.pci_gpus is None:
        return "cannot be read"
    gpus = [f"{g.vendor} {g.address} (driver: {g.driver or 'none'})" for g in host.pci_gpus]
    return ", ".join(gpus) or "no GPU"


def _files_text(host: Host) -> str:
    files = [
        f"{path}{'' if may_use else ' (no right)'}" for path, may_use in host.device_files.items()
    ]
    return ", ".join(files) or "no /dev/nvidia*, no /dev/kfd"


def driver_gpu_rows(driver: Driver) -> list[Row]:
    """Return each GPU as the driver sees it, without what it does not answer."""
    rows = []
    for gpu in driver.gpus:
        rows.append((f"GPU {gpu.index}", _join([gpu.name, _driver_memory_text(gpu)])))
        details = [_power_text(gpu), _link_text(gpu), _modes_text(gpu)]
        rows += [("", text) for text in details if text]
        for process in gpu.processes[:SHOWN_PROCESSES]:
            size = format_bytes(process.memory_bytes)
            rows.append(("", f"used by {process.name or 'process'} {process.pid}, {size}"))
    return rows + [_connection_row(link) for link in driver.links]


def _driver_memory_text(gpu: DriverGpu) -> str | None:
    if gpu.memory_bytes is None:
        return None
    return f"{format_bytes(gpu.memory_used_bytes)} of {format_bytes(gpu.memory_bytes)} in use"


def _power_text(gpu: DriverGpu) -> str:
    watts = f"{gpu.power_watts:.0f} W" if gpu.power_watts is not None else None
    if watts and gpu.power_limit_watts:
        watts += f" of {gpu.power_limit_watts:.0f} W"
    clock = f"{gpu.clock_mhz} of {gpu.max_clock_mhz} MHz" if gpu.clock_mhz else None
    heat = f"{gpu.temperature_celsius} C" if gpu.temperature_celsius is not None else None
    held = f"held down by: {', '.join(gpu.throttle_reasons)}" if gpu.throttle_reasons else None
    return _join([watts, clock, heat, held])


def _link_text(gpu: DriverGpu) -> str:
    link = None
    if gpu.pcie_width:
        link = f"PCIe generation {gpu.pcie_generation} of {gpu.max_pcie_generation}, "
        link += f"x{gpu.pcie_width} of x{gpu.max_pcie_width}"
    links = f"{gpu.nvlinks} NVLinks" if gpu.nvlinks else None
    return _join([link, links])


def _modes_text(gpu: DriverGpu) -> str:
    switches = [
        ("persistence", gpu.has_persistence),
        ("ECC", gpu.is_ecc_enabled),
        ("MIG", gpu.is_mig_enabled),
    ]
    texts = [f"{name} {'on' if state else 'off'}" for name, state in switches if state is not None]
    if gpu.ecc_errors is not None:
        texts.append(f"{gpu.ecc_errors} uncorrected errors")
    if gpu.compute_mode not in (None, "default"):
        texts.append(f"compute mode {gpu.compute_mode}")
    if gpu.virtualization not in (None, "none"):
        texts.append(f"in a virtual machine by {gpu.virtualization}")
    return ", ".join(texts)


def _connection_row(link: Link) -> Row:
    p2p = {True: "P2P", False: "no P2P", None: None}[link.has_p2p]
    return (f"GPU {link.first}-{link.second}", _join([link.way or "unknown way", p2p]))


def torch_rows(torch: Torch) -> list[Row]:
    """Return torch's build and the GPUs it sees."""
    if torch.version is None:
        return [("Version", f"none ({torch.problem})")]
    build = f"CUDA {torch.cuda_build}" if torch.cuda_build else "CPU only"
    if torch.hip_build:
        build = f"ROCm {torch.hip_build}"
    if torch.is_mps_built:
        build += ", MPS"
    rows = [("Version", torch.version), ("Build", build)]
    if torch.is_mps_built:
        rows.append(("MPS Available", str(torch.is_mps_available)))
    rows += [("CUDA Available", str(torch.is_cuda_available)), ("GPU Count", str(len(torch.gpus)))]
    for gpu in torch.gpus:
        rows += [(f"GPU {gpu.index}", line) for line in gpu_lines(gpu)[:1]]
        rows += [("", line) for line in gpu_lines(gpu)[1:]]
    libraries = [("cuDNN", torch.cudnn), ("NCCL", torch.nccl)]
    rows += [(name, version) for name, version in libraries if version]
    if torch.architectures and torch.gpus:
        rows.append(("Code For", " ".join(torch.architectures)))
    if torch.gpus and torch.is_tf32_on is not None:
        rows.append(("TF32", "on" if torch.is_tf32_on else "off by default; train.py turns it on"))
    rows.append(("CPU Attention", ", ".join(torch.attention) or "none ran"))
    return rows


def gpu_lines(gpu: TorchGpu) -> list[str]:
    """Return one GPU: memory and capability, then precisions and attention."""
    precisions = {
        "bf16": gpu.is_bf16_supported,
        "fp16": gpu.is_fp16_supported,
        "fp8": gpu.is_fp8_supported,
        "TF32": gpu.is_tf32_supported,
    }
    has = ", ".join(name for name, holds in precisions.items() if holds) or "float32 only"
    lacks = ", ".join(name for name, holds in precisions.items() if not holds)
    free = f"{format_bytes(gpu.memory_free_bytes)} free" if gpu.memory_free_bytes else None
    capability = f"capability {gpu.capability[0]}.{gpu.capability[1]}"
    processors = f"{gpu.num_processors} processors" if gpu.num_processors else None
    return [
        _join([gpu.name, format_bytes(gpu.memory_bytes), free, capability, processors]),
        f"has {has}" + (f"; no {lacks}" if lacks else ""),
        f"attention: {', '.join(gpu.attention) or 'no kernel ran'}",
    ]


def timing_rows(timings: Sequence[Timing]) -> list[Row]:
    """Return the speed of each device."""
    rows = []
    for timing in timings:
        texts = [*map(matmul_text, timing.matmuls), step_text(timing.step)]
        rows += [(timing.device if not number else "", text) for number, text in enumerate(texts)]
    return rows


def matmul_text(matmul: Matmul) -> str:
    """Return one timed product."""
    head = f"{matmul.dtype} {matmul.size} x {matmul.size} product"
    if matmul.milliseconds is None:
        return f"{head}: failed ({matmul.problem})"
    share = f" ({matmul.peak_share:.0%} of its peak)" if matmul.peak_share else ""
    return f"{head}: {matmul.milliseconds:.2f} ms, {matmul.tflops:.3g} TFLOP/s{share}"


def step_text(step: TrainingStep) -> str:
    """Return the timed training step."""
    precision = "float32" if step.precision == "no" else step.precision
    if step.tokens_per_second is None:
        return f"{precision} training step: failed ({step.problem})"
    share = f" (MFU {step.mfu:.0%})" if step.mfu else ""
    return (
        f"{precision} training step, {step.parameters / 1e6:.1f}M parameters: "
        f"{step.milliseconds:.0f} ms, {step.tokens_per_second:,.0f} tokens/s, "
        f"{step.tflops:.3g} TFLOP/s{share}"
    )


def forecast_rows(forecasts: Sequence[Forecast]) -> list[Row]:
    """Return what the configurations need."""
    return [(item.configuration, describe_forecast(item)) for item in forecasts]


def _join(texts: Sequence[str | None]) -> str:
    return ", ".join(text for text in texts if text)
