"""What both campaigns share: their options, what they find, how they end. No torch here.

A finding is kept and logged once, however often it is found.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.base.errors import ExitCode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """Something that must not be.

    Attributes:
        kind: One word that the campaign explains.
        after: Number of the kill, or of the start, before it.
        text: What it is.
    """

    kind: str
    after: int
    text: str


def note_finding(findings: list[Finding], finding: Finding) -> None:
    """Add a finding and log it, unless its text is there: what stays is found again and again."""
    if any(known.text == finding.text for known in findings):
        return
    findings.append(finding)
    log.error("%s after %d: %s", finding.kind, finding.after, finding.text)


def count_findings(findings: Sequence[Finding], kind: str) -> int:
    """Return how many findings of a kind there are."""
    return sum(finding.kind == kind for finding in findings)


def build_parser(program: str, description: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a command line with the options of every campaign.

    Args:
        program: Its file.
        description: What it does.
        quick: What `--quick` means.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=quick)
    add("--seed", type=int, default=0, metavar="S", help="decides the plan (default: 0)")
    add("--workdir", type=Path, metavar="DIR", help="a new or empty folder (default: a temporary)")
    add("--keep", action="store_true", help="keep the folder; it is kept where anything was found")
    add("--json", type=Path, metavar="FILE", help="write everything to FILE")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def conclude(results: Any, file: Path | None, after: str) -> ExitCode:
    """Write the results, print the findings, and return the exit code.

    Args:
        results: A dataclass with the fields `seed` and `findings`.
        file: Gets everything as JSON, where it is given.
        after: What findings are counted by: kill or start.
    """
    if file:
        file.write_text(json.dumps(asdict(results), indent=1) + "\n", "utf-8")
    for finding in results.findings:
        print(f"{finding.kind} after {after} {finding.after}: {finding.text}")
    print(f"seed {results.seed}: {len(results.findings)} findings.")
    return ExitCode.UNEXPECTED if results.findings else ExitCode.DONE
