"""What a campaign of crashes finds: each thing once, said at once, counted. No torch here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

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
