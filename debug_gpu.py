"""Say what this machine can train on, and what stands in the way of its GPU.

    operating system, driver, torch, timings -> facts -> findings, each with what to do

It works without a GPU, a driver or torch, and exits 0 there: then that is the diagnosis. Driver and
torch are asked in processes of their own, so that one that hangs or crashes is a finding too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from configs.training_config import get_training_config
from utils.base.console import LiveLine, get_console, run_command
from utils.base.text import printable, to_json_text
from utils.tools.diagnosis.configuration_fit import (
    CONFIGURATIONS,
    Forecast,
    find_forecast_findings,
    forecast_run,
)
from utils.tools.diagnosis.device_timing import Timing, find_devices, time_device
from utils.tools.diagnosis.diagnosis import NOTE, OK, PROBLEM, Broken, Finding, ask, run_apart
from utils.tools.diagnosis.driver_facts import Driver, read_driver
from utils.tools.diagnosis.driver_findings import advise_on
from utils.tools.diagnosis.gpu_findings import find_gpu_findings
from utils.tools.diagnosis.gpu_health import find_health_findings
from utils.tools.diagnosis.gpu_text import (
    Row,
    driver_gpu_rows,
    driver_rows,
    forecast_rows,
    host_rows,
    timing_rows,
    torch_rows,
)
from utils.tools.diagnosis.host_facts import Host, read_host
from utils.tools.diagnosis.host_findings import find_host_findings
from utils.tools.diagnosis.torch_facts import Torch, read_torch

DRIVER_LIMIT_SECONDS = 60.0
TORCH_LIMIT_SECONDS = 240.0  # a first import from a slow disk takes minutes
VALUE_CHARACTERS = 500
LABEL_WIDTH = 16  # of the longest, "CUDA Available", and two spaces before it
STYLES = {PROBLEM: "bold red", NOTE: "yellow", OK: "green"}


@dataclass(frozen=True)
class Facts:
    """Everything that was found out."""

    host: Host = field(default_factory=Host)
    driver: Driver = field(default_factory=Driver)
    torch: Torch = field(default_factory=Torch)
    timings: list[Timing] = field(default_factory=list)
    interrupted: str | None = None
    """Why the timings are not complete."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Diagnose this machine's GPU, driver, torch and limits, and time it. "
        "Whatever is wrong is said, and the exit code is 0."
    )
    parser.add_argument("--quick", action="store_true", help="leave the timings out")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_command(run_diagnosis, parser.parse_args(argv))


def run_diagnosis(args: argparse.Namespace) -> None:
    """Gather the facts, judge them, print them."""
    facts = gather_facts(is_quick=args.quick, is_silent=args.json)
    forecasts = find_forecasts(facts)
    findings = judge(facts, forecasts)
    if args.json:
        print_json(facts, forecasts, findings)
        return
    print_section("System", host_rows(facts.host, facts.torch))
    print_section(
        "NVIDIA Driver", driver_rows(facts.host, facts.driver) + driver_gpu_rows(facts.driver)
    )
    print_section("PyTorch", torch_rows(facts.torch))
    if facts.timings:
        print_section("Speed", timing_rows(facts.timings))
    if forecasts:
        print_section("Configurations", forecast_rows(forecasts))
    print_findings(findings, verdict(facts))


# Facts


def gather_facts(*, is_quick: bool, is_silent: bool) -> Facts:
    """Return all facts; what could not be found out says why.

    Args:
        is_quick: Leave the timings out.
        is_silent: Show no live line.
    """
    line = LiveLine(enabled=not is_silent)
    try:
        host = ask(read_host) or Host(problem="the operating system cannot be asked")
        line.show("Asking the NVIDIA driver ...")
        driver = _gather_driver()
        line.show("Asking torch ...")
        torch, timings, interrupted = Torch(problem="it was not asked"), [], None
        for value in run_apart(examine_torch, is_quick, limit_seconds=TORCH_LIMIT_SECONDS):
            if isinstance(value, Torch):
                torch = value
                line.show("Timing ...")
            elif isinstance(value, Timing):
                timings.append(value)
            elif torch.version is None:
                torch = Torch(problem=value.reason)
            else:
                interrupted = value.reason
    finally:
        line.close()
    return Facts(host, driver, torch, timings, interrupted)


def _gather_driver() -> Driver:
    for value in run_apart(examine_driver, limit_seconds=DRIVER_LIMIT_SECONDS):
        return Driver(problem=value.reason) if isinstance(value, Broken) else value
    return Driver(problem="it was not asked")


def examine_driver() -> Iterator[Driver]:
    """Yield what the driver says."""
    yield read_driver()


def examine_torch(is_quick: bool) -> Iterator[Torch | Timing]:
    """Yield what torch says, then the speed of each device."""
    facts = read_torch()
    yield facts
    if not is_quick:
        for device in find_devices(facts):
            yield time_device(device)


# Judgements


def find_forecasts(facts: Facts) -> list[Forecast]:
    """Return which configurations fit the device that train.py takes."""
    found = (ask(_forecast, name, facts) for name in CONFIGURATIONS)
    return [forecast for forecast in found if forecast is not None]


def _forecast(name: str, facts: Facts) -> Forecast | None:
    gpu = next(iter(facts.torch.gpus), None)
    host = facts.host
    limits = [host.memory_available_bytes, host.memory_limit_bytes]
    available = min((limit for limit in limits if limit is not None), default=None)
    if gpu is not None:
        available = gpu.memory_free_bytes or gpu.memory_bytes
    if available is None or facts.torch.version is None:
        return None
    wanted = _device_name(facts.torch)
    rate = next((t.step.tflops for t in facts.timings if t.device == wanted), None)
    return forecast_run(
        name,
        get_training_config(name),
        available_bytes=available,
        precision=gpu.precision if gpu is not None else "no",
        device=wanted.partition(":")[0],
        flops_per_second=rate * 1e12 if rate else None,
    )


def _device_name(torch: Torch) -> str:
    """Return the device that train.py takes."""
    if torch.gpus:
        return "cuda:0"
    return "mps" if torch.is_mps_available else "cpu"


def judge(facts: Facts, forecasts: list[Forecast]) -> list[Finding]:
    """Return all findings: problems first, each kind in the order of cause and consequence."""
    moments = {
        gpu.uuid: timing.moment
        for timing in facts.timings
        for gpu in facts.torch.gpus
        if gpu.uuid and timing.device == f"cuda:{gpu.index}"
    }
    groups = {
        "GPU": lambda: find_gpu_findings(facts.host, facts.driver, facts.torch),
        "health": lambda: find_health_findings(facts.host, facts.driver, moments),
        "environment": lambda: find_host_findings(facts.host, facts.torch),
        "timings": lambda: find_failures(facts),
        "configurations": lambda: find_forecast_findings(forecasts, on_gpu=bool(facts.torch.gpus)),
    }
    findings = []
    for name, find in groups.items():
        found = ask(find)
        if found is None:
            found = [
                Finding(NOTE, f"What was found of {name} could not be judged.", "--json has it.")
            ]
        findings += found
    order = (PROBLEM, NOTE, OK)
    return sorted(findings, key=lambda finding: order.index(finding.level))


def find_failures(facts: Facts) -> list[Finding]:
    """Return what could not be timed."""
    findings = []
    for timing in facts.timings:
        problems = {f"product in {matmul.dtype}": matmul.problem for matmul in timing.matmuls}
        problems["training step"] = timing.step.problem
        findings += [
            Finding(PROBLEM, f"{timing.device}: the {what} failed: {problem}", advise_on(problem))
            for what, problem in problems.items()
            if problem
        ]
    if facts.interrupted:
        findings.append(Finding(PROBLEM, f"Timing was cut short: {facts.interrupted}."))
    return findings


def verdict(facts: Facts) -> str:
    """Return what train.py will use."""
    torch = facts.torch
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


# Output


def print_json(facts: Facts, forecasts: list[Forecast], findings: list[Finding]) -> None:
    """Print everything as one JSON object."""
    value: dict[str, Any] = {
        **asdict(facts),
        "forecasts": [asdict(forecast) for forecast in forecasts],
        "findings": [asdict(finding) for finding in findings],
        "verdict": verdict(facts),
    }
    print(to_json_text(value))


def print_section(title: str, rows: Sequence[Row]) -> None:
    """Print labels and values below a heading; in a pipe, a line each."""
    shown = [(label, printable(value, limit=VALUE_CHARACTERS)) for label, value in rows]
    if not sys.stdout.isatty():
        print(f"{title}:")
        for label, value in shown:
            print(f"  {label}: {value}" if label else f"    {value}")
        print()
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=LABEL_WIDTH)
    table.add_column(overflow="fold")
    for label, value in shown:
        table.add_row(f"  {label}", Text(value))
    get_console().print(Text(title, style="bold cyan"))
    get_console().print(table)
    get_console().print()


def print_findings(findings: Sequence[Finding], result: str) -> None:
    """Print the findings, each with what to do, and what it comes to."""
    if not sys.stdout.isatty():
        print("Diagnosis:")
        for line in finding_lines(findings):
            print(f"  {line}")
        print(f"  {printable(result)}")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(printable(finding.message, limit=VALUE_CHARACTERS))
        if finding.advice:
            text.append(f"\n-> {printable(finding.advice, limit=VALUE_CHARACTERS)}", style="cyan")
        table.add_row(Text(f"  {finding.level}", style=STYLES[finding.level]), text)
    get_console().print(Text("Diagnosis", style="bold cyan"))
    get_console().print(table)
    get_console().print(Text(printable(result), style="bold"))


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Return the findings as plain lines, each with what to do below it."""
    lines = []
    for finding in findings:
        lines.append(f"[{finding.level}] {printable(finding.message, limit=VALUE_CHARACTERS)}")
        if finding.advice:
            lines.append(f"    {printable(finding.advice, limit=VALUE_CHARACTERS)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
