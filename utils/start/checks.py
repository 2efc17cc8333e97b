"""The outcome of a check before a run, and how all of them are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.base.errors import PreflightError
from utils.base.tables import Column, print_table

COLUMNS = (Column("check"), Column("status"), Column("finding", kind="prose"))


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    `status` is ok, warn or fail; where it is not ok, `message` also says what to do. `example` is
    a text that is shown once below the failed checks that have it.
    """

    name: str
    status: str
    message: str
    example: str = ""


def print_checks(checks: Sequence[Check]) -> None:
    """Print a table of the checks."""
    rows = [
        {"check": check.name, "status": check.status, "finding": check.message} for check in checks
    ]
    print_table("Preflight", rows, COLUMNS)


def require_all(checks: Sequence[Check]) -> None:
    """Raise where a check failed.

    Raises:
        PreflightError: The message holds all reasons.
    """
    failed = [check for check in checks if check.status == "fail"]
    if failed:
        lines = [f"  {check.name}: {check.message}" for check in failed]
        examples = dict.fromkeys(check.example for check in failed if check.example)
        raise PreflightError("\n".join(["This run cannot start here:", *lines, *examples]))
