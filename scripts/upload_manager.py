"""See and finish the uploads of a run's checkpoints.

    status        every checkpoint, here and in the bucket, and what the journal says of it
    list          the checkpoints on this machine
    upload NAME   upload one (a name, a step number, latest or best)
    upload-all    upload everything that is not verified in the bucket

No torch is loaded. An upload by this command is recorded in the same journal as the trainer's.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.training_config import TrainingConfig, get_training_config, parse_assignment
from utils.checkpoint_store import verify_checkpoint
from utils.console import (
    configure_logging,
    format_bytes,
    get_console,
    run_command,
)
from utils.errors import ExitCode, PretrainError, UploadError, UsageError
from utils.journal import Journal, UploadState
from utils.layout import RunPaths
from utils.metadata import (
    CheckpointView,
    find_best,
    is_verified_in,
    read_local_checkpoints,
    read_remote_checkpoints,
    select_checkpoint,
)
from utils.storage import join_uri, open_bucket
from utils.transports import build_transport
from utils.uploader import Uploader, find_unfinished

LISTING_RETRY_SECONDS = 5.0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", default="test", help="the run's configuration (default: test)")
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    common.add_argument("--debug", action="store_true", help="debug log lines and tracebacks")
    parser = argparse.ArgumentParser(
        prog="upload_manager.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (("status", "here, in the bucket, journal"), ("list", "on this machine")):
        command = commands.add_parser(name, parents=[common], help=text)
        command.add_argument("--json", action="store_true", help="print JSON")
    upload = commands.add_parser("upload", parents=[common], help="upload one checkpoint")
    upload.add_argument("name", metavar="NAME", help="a name, a step number, latest or best")
    commands.add_parser("upload-all", parents=[common], help="upload all that is not verified")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Do one command; return the exit code."""
    config = get_training_config(args.config, dict(parse_assignment(text) for text in args.set))
    configure_logging("debug" if args.debug else "info")
    paths = RunPaths.of(config)
    if args.command == "status":
        return show_status(config, paths, as_json=args.json)
    if args.command == "list":
        return show_list(paths, as_json=args.json)
    journal = Journal(paths.journal)
    if args.command == "upload":
        view = select_checkpoint(args.name, read_local_checkpoints(paths.checkpoints))
        assert view.path is not None
        return upload(config, journal, [view.path])
    uri = join_uri(config.checkpoint_uri, config.run_name)
    unfinished = find_unfinished(paths.checkpoints, journal, uri)
    if not unfinished:
        print("Everything on this machine is verified in the bucket.")
        return ExitCode.DONE
    return upload(config, journal, unfinished)


def upload(config: TrainingConfig, journal: Journal, checkpoints: list[Path]) -> int:
    """Upload checkpoints one after the other; return the exit code.

    Raises:
        UsageError: The configuration names no bucket.
        UploadError: Not all could be verified in the bucket.
    """
    if not config.checkpoint_uri:
        raise UsageError("checkpoint_uri is empty: --set checkpoint_uri=gs://... or a directory.")
    transport = build_transport(
        join_uri(config.checkpoint_uri, config.run_name),
        config.upload_transport,
        config.gcs_user_project or None,
    )
    with Uploader(transport, journal, background=False) as uploader:
        for checkpoint in checkpoints:
            verify_checkpoint(checkpoint)
            uploader.submit(checkpoint)
    if uploader.failures:
        raise UploadError(
            f"{len(uploader.failures)} of {len(checkpoints)} checkpoints were not uploaded: "
            f"{', '.join(uploader.failures)}."
        )
    return ExitCode.DONE


def show_list(paths: RunPaths, *, as_json: bool) -> int:
    """Print the checkpoints on this machine."""
    rows = collect_rows(read_local_checkpoints(paths.checkpoints), [])
    if as_json:
        print(json.dumps(rows, indent=1))
        return ExitCode.DONE
    if not rows:
        print(f"No checkpoints in {paths.checkpoints} yet.")
        return ExitCode.DONE
    print_table(f"Checkpoints in {paths.checkpoints}", rows, ["checkpoint", "size", "state"])
    return ExitCode.DONE


def show_status(config: TrainingConfig, paths: RunPaths, *, as_json: bool) -> int:
    """Print every checkpoint here and in the bucket, then the last errors."""
    local = read_local_checkpoints(paths.checkpoints)
    remote, problem = read_remote(config)
    rows = collect_rows(local, remote, join_uri(config.checkpoint_uri, config.run_name), problem)
    if as_json:
        print(json.dumps({"checkpoints": rows, "bucket_problem": problem}, indent=1))
        return ExitCode.DONE
    uri = join_uri(config.checkpoint_uri, config.run_name) if config.checkpoint_uri else "-"
    if rows:
        columns = ["checkpoint", "step", "size", "local", "bucket", "state", "note"]
        print_table(f"Uploads from {paths.checkpoints} to {uri}", rows, columns)
    else:
        print(f"No checkpoints in {paths.checkpoints}, none in {uri}.")
    unfinished = [row for row in rows if row["local"] == "yes" and row["state"] != "verified"]
    print(f"{len(unfinished)} not verified in the bucket." if rows else "")
    for row in unfinished:
        if row["error"]:
            print(f"  {row['checkpoint']}: {row['error']}")
    if problem:
        print(f"The bucket could not be read: {problem}")
    return ExitCode.DONE


def read_remote(config: TrainingConfig) -> tuple[list[CheckpointView], str | None]:
    """Return the checkpoints in the bucket, or none and why it could not be read."""
    if not config.checkpoint_uri:
        return [], "checkpoint_uri is empty"
    try:
        bucket = open_bucket(
            join_uri(config.checkpoint_uri, config.run_name),
            config.gcs_user_project or None,
            LISTING_RETRY_SECONDS,
        )
        try:
            return read_remote_checkpoints(bucket), None
        finally:
            bucket.close()
    except PretrainError as exc:
        return [], str(exc)


def collect_rows(
    local: Sequence[CheckpointView],
    remote: Sequence[CheckpointView],
    uri: str = "",
    problem: str | None = "the bucket was not read",
) -> list[dict[str, Any]]:
    """Return one row a checkpoint, by step, from what is here and what is in the bucket.

    Args:
        local: Checkpoints on this machine.
        remote: Checkpoints in the bucket.
        uri: The bucket.
        problem: Why the bucket could not be read, None where it was.
    """
    here = {view.name: view for view in local}
    there = {view.name: view for view in remote}
    best = find_best(local) or find_best(remote)
    rows = []
    for name in sorted(here.keys() | there.keys()):
        view, card = here.get(name), there.get(name)
        upload = view.upload if view else None
        notes = [
            "latest" if local and name == local[-1].name else "",
            "best" if best is not None and name == best.name else "",
            (view.problem if view else None) or (card.problem if card else None) or "",
        ]
        size = view.total_bytes if view else card.archive_bytes if card else None
        rows.append(
            {
                "checkpoint": str(name),
                "step": name.step,
                "size": format_bytes(size),
                "bytes": size,
                "local": "yes" if view else "no",
                "bucket": "yes" if card else "no",
                "state": _describe_state(view, card, uri, problem),
                "error": str(upload.details.get("error", "")) if upload else "",
                "note": ", ".join(note for note in notes if note),
            }
        )
    return rows


def _describe_state(
    view: CheckpointView | None, card: CheckpointView | None, uri: str, problem: str | None
) -> str:
    """Say where a checkpoint stands; what the journal says is held against the bucket."""
    entry = view.upload if view else None
    if view is None or view.path is None or entry is None:
        return "verified" if card else "not queued"
    if entry.state is not UploadState.VERIFIED:
        return str(entry.state.value)
    if uri and not is_verified_in(uri, view.path, entry):
        return "not in this bucket"
    size = entry.details.get("bytes")
    if problem is None and (card is None or card.archive_bytes != size):
        return "missing in bucket" if card is None else "damaged in bucket"
    return "verified"


def print_table(title: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows as a table; plain columns where the output is not a terminal."""
    from rich.table import Table

    print(title)
    if not sys.stdout.isatty():
        widths = {c: max(len(c), *(len(str(row[c])) for row in rows)) for c in columns}
        for row in [{c: c for c in columns}, *rows]:
            print("  ".join(str(row[c]).ljust(widths[c]) for c in columns).rstrip())
        return
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column in ("step", "size") else "left")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    get_console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    logging.captureWarnings(capture=True)
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
