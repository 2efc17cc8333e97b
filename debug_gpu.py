"""Say what this machine can train on, and what stands in the way of its GPU.

    operating system, driver, torch, timings -> facts -> diagnoses, each with what to do

It works without a GPU, a driver or torch, and exits 0 there: then that is the diagnosis. Driver and
torch are asked in processes of their own, so that one that hangs or crashes is a diagnosis too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from utils.base.console import LiveLine, add_output_arguments, run_command
from utils.base.text import to_json_text
from utils.tools.diagnosis.facts import (
    Broken,
    Driver,
    Facts,
    Timing,
    Torch,
    read_driver,
    read_host,
    read_torch,
    run_apart,
)
from utils.tools.diagnosis.findings import find_causes, sort_diagnoses, summarize_findings
from utils.tools.diagnosis.fit import find_forecasts, find_misfits
from utils.tools.diagnosis.text import print_page

DRIVER_LIMIT_SECONDS = 60.0
TORCH_LIMIT_SECONDS = 240.0  # a first import from a slow disk takes minutes


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Diagnose this machine's GPU, driver, torch and limits, and time it. "
        "Whatever is wrong is said, and the exit code is 0."
    )
    parser.add_argument("--quick", action="store_true", help="leave the timings out")
    add_output_arguments(parser)
    return run_command(run_diagnosis, parser.parse_args(argv))


def run_diagnosis(args: argparse.Namespace) -> None:
    """Gather the facts, judge them, print them."""
    facts = gather_facts(is_quick=args.quick, is_silent=args.json)
    forecasts = find_forecasts(facts)
    diagnoses = sort_diagnoses([*find_causes(facts), *find_misfits(forecasts)])
    if not args.json:
        print_page(facts, forecasts, diagnoses)
        return
    value = {
        **asdict(facts),
        "forecasts": [asdict(forecast) for forecast in forecasts],
        "findings": [asdict(diagnosis) for diagnosis in diagnoses],
        "verdict": summarize_findings(facts.torch),
    }
    print(to_json_text(value))


def gather_facts(*, is_quick: bool, is_silent: bool) -> Facts:
    """Return all facts; what could not be found out says why.

    Args:
        is_quick: Leave the timings out.
        is_silent: Show no live line.
    """
    line = LiveLine(enabled=not is_silent)
    driver, torch, timings, interrupted = Driver(), Torch(), [], None
    try:
        line.show("Asking the NVIDIA driver ...")
        for value in run_apart(examine_driver, limit_seconds=DRIVER_LIMIT_SECONDS):
            driver = Driver(problem=value.reason) if isinstance(value, Broken) else value
        line.show("Asking torch ...")
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
    return Facts(read_host(), driver, torch, timings, interrupted)


def examine_driver() -> Iterator[Driver]:
    """Yield what the driver says."""
    yield read_driver()


def examine_torch(is_quick: bool) -> Iterator[Torch | Timing]:
    """Yield what torch says, then the speed of each device."""
    facts = read_torch()
    yield facts
    if facts.version is not None and not is_quick:
        from utils.tools.diagnosis.timing import time_devices

        yield from time_devices(facts)


if __name__ == "__main__":
    sys.exit(main())
