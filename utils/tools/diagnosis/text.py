"""What debug_gpu.py prints: tables of the facts, then what is wrong and what to do.

    Facts, Forecast, Diagnosis -> standard output

Values come from the machine, its driver and its environment: all pass through `printable`. No
torch here.
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.base.console import print_wrapped
from utils.base.tables import Column, print_table
from utils.base.text import format_bytes, printable
from utils.tools.diagnosis.facts import SHM, Driver, DriverGpu, Facts, Host, Timing, Torch, TorchGpu
from utils.tools.diagnosis.findings import Diagnosis, summarize_findings
from utils.tools.diagnosis.fit import Forecast, describe_forecast

VALUE_CHARACTERS = 500
VALUE_COLUMNS = (Column("Part"), Column("Found", kind="prose"))
DRIVER_COLUMNS = (
    Column("GPU", kind="number"),
    Column("Name", 2, "prose"),
    Column("Capability", 5),
    Column("Memory", 4, "number"),
    Column("In Use", 3, "number"),
    Column("By", 3, "prose"),
)
TORCH_COLUMNS = (
    *DRIVER_COLUMNS[:4],
    Column("Free", 3, "number"),
    Column("Precision", 3),
)
TIMING_COLUMNS = (Column("Device"), Column("Precision", 2), Column("Training Step", kind="prose"))
FORECAST_COLUMNS = (
    Column("Configuration", kind="name"),
    Column("Model", 5, "name"),
    Column("Needs About", 3, "number"),
    Column("Free", 4, "number"),
    Column("Result", 2, "prose"),
)
_STYLES = {"problem": "bold red", "note": "yellow", "ok": "green"}


def print_page(facts: Facts, forecasts: list[Forecast], diagnoses: list[Diagnosis]) -> None:
    """Print everything, the diagnoses last."""
    _print_values("System", host_values(facts.host, facts.torch))
    _print_values("NVIDIA Driver", driver_values(facts.host, facts.driver))
    _print_rows("GPUs of the Driver", [gpu_row(gpu) for gpu in facts.driver.gpus], DRIVER_COLUMNS)
    _print_values("PyTorch", torch_values(facts.torch))
    _print_rows("GPUs of PyTorch", [gpu_row(gpu) for gpu in facts.torch.gpus], TORCH_COLUMNS)
    _print_rows("Speed", [timing_row(timing) for timing in facts.timings], TIMING_COLUMNS)
    _print_rows(
        "Configurations", [forecast_row(forecast) for forecast in forecasts], FORECAST_COLUMNS
    )
    print_diagnoses(diagnoses, summarize_findings(facts.torch))


def host_values(host: Host, torch: Torch) -> dict[str, str]:
    """Return the machine."""
    where = " in a container" * host.is_container + " in WSL" * host.is_wsl
    uses = f", torch uses {torch.num_threads}" if torch.num_threads else ""
    size, free = map(format_bytes, (host.memory_bytes, host.memory_available_bytes))
    return {
        "System": host.system + where,
        "CPU": f"{host.cpu_threads or '?'} threads{uses}",
        "Memory": f"{size}, {free} free",
        str(SHM): format_bytes(host.shm_bytes),
        **host.environment,
    }


def driver_values(host: Host, driver: Driver) -> dict[str, str]:
    """Return the driver, and how GPUs can be reached."""
    held = (f"{address} (driver: {name or 'none'})" for address, name in host.pci_gpus.items())
    files = (f"{path}{'' if use else ' (no right)'}" for path, use in host.device_files.items())
    cuda = driver.cuda_version
    return {
        "Driver": ", ".join(filter(None, (driver.version or "none", driver.problem))),
        "CUDA": f"up to {cuda[0]}.{cuda[1]}" if cuda else "-",
        "nvidia-smi": driver.nvidia_smi or "not on PATH",
        "PCI Bus": ", ".join(held) or "no NVIDIA GPU",
        "Devices": ", ".join(files) or "no /dev/nvidia*",
    }


def gpu_row(gpu: DriverGpu | TorchGpu) -> dict[str, str]:
    """Return a GPU as the driver sees it, with who holds its memory, or as torch sees it."""
    row = {
        "GPU": str(gpu.index),
        "Name": gpu.name,
        "Capability": ".".join(map(str, gpu.capability)) if gpu.capability else "-",
        "Memory": format_bytes(gpu.memory_bytes),
    }
    if isinstance(gpu, TorchGpu):
        return {**row, "Free": format_bytes(gpu.memory_free_bytes), "Precision": gpu.precision}
    used = format_bytes(gpu.memory_used_bytes)
    return {**row, "In Use": used, "By": ", ".join(gpu.holders) or "-"}


def torch_values(torch: Torch) -> dict[str, str]:
    """Return torch's build."""
    if torch.version is None:
        return {"Version": f"none ({torch.problem})"}
    build = f"CUDA {torch.cuda_build}" if torch.cuda_build else "CPU only"
    values = {
        "Version": torch.version,
        "Build": f"ROCm {torch.hip_build}" if torch.hip_build else build,
        "CUDA Available": str(torch.is_cuda_available),
        "GPU Count": str(len(torch.gpus)),
        "MPS Available": "True" * torch.is_mps_available,
        "Code For": " ".join(torch.architectures),
    }
    return {name: value for name, value in values.items() if value}


def timing_row(timing: Timing) -> dict[str, str]:
    """Return the speed of a device."""
    step = "failed" if timing.problem else "-"
    if timing.step_seconds is not None:
        step = (
            f"{timing.step_seconds * 1000:.0f} ms, {timing.tokens_per_second:,.0f} tokens/s, "
            f"{timing.step_tflops:.3g} TFLOP/s ({timing.parameters / 1e6:.1f}M parameters)"
        )
    return {
        "Device": timing.device,
        "Precision": "float32" if timing.precision == "no" else timing.precision,
        "Training Step": step,
    }


def forecast_row(forecast: Forecast) -> dict[str, str]:
    """Return what a configuration needs."""
    return {
        "Configuration": forecast.configuration,
        "Model": forecast.model,
        "Needs About": format_bytes(forecast.needed_bytes),
        "Free": format_bytes(forecast.available_bytes),
        "Result": describe_forecast(forecast),
    }


def print_diagnoses(diagnoses: Sequence[Diagnosis], summary: str) -> None:
    """Print each diagnosis with what to do, and what it comes to."""
    print("Diagnosis")
    for diagnosis in diagnoses:
        label = f"  [{diagnosis.level}] "
        message = label + printable(diagnosis.message, VALUE_CHARACTERS)
        print_wrapped(message, hanging=6, style=_STYLES[diagnosis.level], styled=len(label))
        if diagnosis.advice:
            print_wrapped(f"      {printable(diagnosis.advice, VALUE_CHARACTERS)}", hanging=6)
    print_wrapped(f"  {printable(summary)}", hanging=2, style="bold")


def _print_values(title: str, values: dict[str, str]) -> None:
    rows = [{"Part": key, "Found": value} for key, value in values.items()]
    _print_rows(title, rows, VALUE_COLUMNS)


def _print_rows(title: str, rows: Sequence[dict[str, str]], columns: Sequence[Column]) -> None:
    if rows:
        shown = [{k: printable(v, VALUE_CHARACTERS) for k, v in row.items()} for row in rows]
        print_table(title, shown, columns)
        print()
