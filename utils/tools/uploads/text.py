"""What the upload manager prints: tables of checkpoints, reports, the plan of a prune.

    rows of utils/uploads/status.py, reports of the verifier -> standard output

What files and the bucket say passes `printable`. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.base.console import print_wrapped
from utils.base.tables import Column, print_table
from utils.base.text import count_of, format_bytes, printable
from utils.checkpoints.retention import Action
from utils.remote.verification import CheckpointReport, Orphan
from utils.tools.uploads.overview import describe_places

_STATUS_COLUMNS = (
    Column("checkpoint", kind="name"),
    Column("step", 9, "number"),
    Column("unpacked", 5, "number"),
    Column("archive", 8, "number"),
    Column("local", 6),
    Column("bucket", 7),
    Column("state", 2),
    Column("progress", 3, "prose"),
    Column("kept", 10, "prose"),
    Column("note", 4, "prose"),
)
_LIST_COLUMNS = (
    Column("checkpoint", kind="name"),
    Column("step", 6, "number"),
    Column("unpacked", 4, "number"),
    Column("archive", 5, "number"),
    Column("state", 2),
    Column("note", 3, "prose"),
)
_QUEUE_COLUMNS = (
    Column("place", 5, "number"),
    Column("checkpoint", kind="name"),
    Column("state", 2),
    Column("attempts", 4, "number"),
    Column("next try", 3, "prose"),
)
_PRUNE_COLUMNS = (
    Column("checkpoint", kind="name"),
    Column("step", 5, "number"),
    Column("archive", 4, "number"),
    Column("action", 2),
    Column("reason", 3, "prose"),
)


def print_status(overview: dict[str, Any]) -> None:
    """Print what `status` found."""
    rows, bucket = overview["checkpoints"], overview["bucket"]
    if rows:
        title = f"Uploads from {overview['directory']} to {bucket or 'no bucket'}"
        print_checkpoints(title, rows, _STATUS_COLUMNS)
    else:
        print_wrapped(describe_places(overview["directory"], bucket))
    if bucket:
        owed = sum(row["state"] != "verified" for row in rows)
        if rows:
            print(f"{owed or 'All'} {'not' if owed else 'are'} verified in the bucket.")
    print_table("Queue", overview["queue"], _QUEUE_COLUMNS)
    if overview["errors"]:
        print("Last errors")
        for row in overview["errors"]:
            tries = f" ({count_of(row['attempts'], 'attempt')})" if row["attempts"] else ""
            text = f"  {row['time']}  {row['checkpoint']}{tries}: {row['error']}"
            print_wrapped(text, hanging=4)
    for text in overview["problems"]:
        print_wrapped(printable(text))
    if overview["bucket_problem"]:
        print_wrapped(f"The bucket could not be read: {printable(overview['bucket_problem'])}")


def print_checkpoints(
    title: str, rows: Sequence[dict[str, Any]], columns: Sequence[Column] = _LIST_COLUMNS
) -> None:
    """Print checkpoints, and below their table what is wrong with them."""
    print_table(title, rows, columns)
    for row in rows:
        if row["problem"]:
            print_wrapped(f"{row['checkpoint']}: {row['problem']}", hanging=2)


def print_reports(reports: Sequence[CheckpointReport], orphans: Sequence[Orphan]) -> None:
    """Print what `verify` found."""
    for report in reports:
        print(f"{report.name}: {'verified' if report.is_verified else 'NOT verified'}")
        for line in report.right:
            print_wrapped(f"  ok     {printable(line)}", hanging=9)
        for line in report.wrong:
            print_wrapped(f"  wrong  {printable(line, 1000)}", hanging=9)
    if orphans:
        print("Also in the bucket:")
        for orphan in orphans:
            text = f"  {printable(orphan.object_name)}: {printable(orphan.problem)}"
            print_wrapped(text, hanging=4)
    wrong = sum(not report.is_verified for report in reports)
    print(f"{len(reports) - wrong} verified, {wrong} not.")


def print_plan(uri: str, result: dict[str, Any], num_doomed: int) -> None:
    """Print what `prune` is about to do."""
    rows = result["checkpoints"]
    print_table(f"Checkpoints in {uri}", rows, _PRUNE_COLUMNS)
    freed = sum(row["archive_bytes"] or 0 for row in rows if row["action"] == Action.DELETE.value)
    print(f"{num_doomed} to delete, {format_bytes(freed)}.")
    for note in result["notes"]:
        print_wrapped(f"  {printable(note)}", hanging=2)
