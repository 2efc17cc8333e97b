"""What the campaigns share: their options, what they find, how they end. No torch here."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from utils.base.errors import ExitCode
from utils.base.tables import print_table

log = logging.getLogger(__name__)


Wrong = tuple[str, str]
"""A kind of finding, and what it is."""


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


@dataclass
class CampaignResults:
    """What every campaign keeps besides its own figures.

    Attributes:
        seed: Seed of the plan.
        findings: What must not be.
    """

    seed: int
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, after: int, text: str) -> None:
        """Keep and log a finding, unless its text is there: what stays is found again and again."""
        if all(known.text != text for known in self.findings):
            self.findings.append(Finding(kind, after, text))
            log.error("%s after %d: %s", kind, after, text)

    def count(self, kind: str) -> int:
        """Return how many findings of a kind there are."""
        return sum(finding.kind == kind for finding in self.findings)


def build_parser(program: str, description: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a command line with the options of every campaign; `quick` is what `--quick` means."""
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


def print_counts(title: str, label: str, counts: Counter[str], what: str = "kills") -> None:
    """Print what was counted, the most frequent first."""
    print_table(title, [{label: key, what: count} for key, count in counts.most_common()])


def conclude(results: CampaignResults, file: Path | None, after: str) -> ExitCode:
    """Write the results, print the findings, and return the exit code.

    `file` gets everything as JSON; `after` is what findings are counted by: kill or start.
    """
    if file:
        file.write_text(json.dumps(asdict(results), indent=1) + "\n", "utf-8")
    for finding in results.findings:
        print(f"{finding.kind} after {after} {finding.after}: {finding.text}")
    print(f"seed {results.seed}: {len(results.findings)} findings.")
    return ExitCode.UNEXPECTED if results.findings else ExitCode.DONE
