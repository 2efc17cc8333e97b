"""Prove on your own configuration that kill -9 and --resume change nothing.

    a short run, straight -----------------------------------+
    the same run: killed, resumed, ..., once from the bucket -> the same bits

The second run is killed by SIGKILL at random instants between its first step and its end, and
started again with `--resume latest`. For one of the kills the whole local checkpoint directory is
deleted after a checkpoint was verified in the bucket, so that the next attempt has only the bucket.
Then batches, losses, weights, optimizer, schedule, random states and data position of both are
compared bit by bit. Exit code 0 means that there is no difference. Everything happens in a folder
of its own, with a directory as the bucket.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.config_files import parse_assignment
from utils.base.console import (
    add_output_arguments,
    configure_logging,
    new_parser,
    print_wrapped,
    run_command,
)
from utils.base.errors import ExitCode, UsageError
from utils.base.progress import ProgressDisplay
from utils.base.tables import Column, print_table
from utils.base.text import count_of, format_duration, printable, to_json_text
from utils.command_line.arguments import KeyParser
from utils.tools.proofs.proof import OWN_KEYS, Proof, Report
from utils.tools.proofs.started_runs import CommandLauncher, open_work_folder

SHOWN_DIFFERENCES = 5
ATTEMPT_COLUMNS = (
    Column("attempt", kind="number"),
    Column("resumed from", 2, "name"),
    Column("steps", 3),
    Column("ended", kind="prose"),
    Column("time", 4, "number"),
)
COMPARISON_COLUMNS = (
    Column("compared", kind="prose"),
    Column("extent", 2, "prose"),
    Column("result"),
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = new_parser("prove_resume.py", __doc__, kind=KeyParser)
    add = parser.add_argument
    add("--config", default="test", help="configs/NAME.json or a .json file (default: test)")
    add("--steps", type=int, default=24, metavar="N", help="length of the runs (default: 24)")
    add("--kills", type=int, default=3, metavar="K", help="at least 2 (default: 3)")
    add("--processes", type=int, default=1, metavar="P", help="ranks of each attempt (default: 1)")
    add("--seed", type=int, default=0, metavar="S", help="decides the instants (default: 0)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as train.py has it")
    add("--workdir", type=Path, metavar="DIR", help="a new or empty folder (default: a temporary)")
    add("--keep", action="store_true", help="keep the folder")
    add_output_arguments(parser)
    return parser.parse_args(argv)


def require_usable(args: argparse.Namespace) -> None:
    """Refuse a command line that cannot be carried out.

    Raises:
        UsageError: A number is out of its range, or a key is set that the proof sets itself.
    """
    for key, limit in (("kills", 2), ("steps", 4), ("processes", 1)):
        if getattr(args, key) < limit:
            raise UsageError(f"--{key} must be at least {limit}, got {getattr(args, key)}.")
    for text in args.set:
        key, _ = parse_assignment(text)
        if key in OWN_KEYS:
            raise UsageError(f"{key}: the proof decides this itself.")


def run(args: argparse.Namespace) -> int:
    """Carry the proof out and print it; 0 without a difference, 1 with any."""
    require_usable(args)
    configure_logging("debug" if args.debug else "info", stderr=True)
    with open_work_folder(args) as work, ProgressDisplay(unit="steps") as progress:
        report = Proof(args, work, CommandLauncher(args.processes), progress).run()
    if args.json:
        print(to_json_text({**asdict(report), "holds": report.holds}))
    else:
        print_report(report)
    return ExitCode.DONE if report.holds else ExitCode.UNEXPECTED


def print_report(report: Report) -> None:
    """Print the attempts, what was compared, and the verdict."""
    attempts = [
        {
            "attempt": attempt.number,
            "resumed from": attempt.source,
            "steps": f"{_shown(attempt.begin)} to {_shown(attempt.last)}",
            "ended": attempt.ended,
            "time": format_duration(attempt.seconds),
        }
        for attempt in report.starts
    ]
    print_table("Attempts of the interrupted run", attempts, ATTEMPT_COLUMNS)
    rows = []
    for one in report.comparisons:
        count = len(one.differences)
        result = count_of(count, "difference") if count else "the same"
        rows.append({"compared": one.what, "extent": one.extent, "result": result})
    print_table("Against the straight run", rows, COMPARISON_COLUMNS)
    for comparison in report.comparisons:
        for difference in comparison.differences[:SHOWN_DIFFERENCES]:
            print_wrapped(f"{comparison.what}: {printable(difference)}", hanging=2)
    for line in report.problems:
        print_wrapped(line, hanging=2)
    verdict = "no difference" if report.holds else "NOT proven"
    kills = sum(attempt.ended.startswith("killed") for attempt in report.starts)
    print(f"{report.steps} steps with {kills} kills (seed {report.seed}): {verdict}.")


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
