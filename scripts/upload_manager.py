"""See, finish, check and use the uploads of a run's checkpoints.

No torch is loaded. What this command does is recorded in the same journal as the trainer's uploads.
Exit codes: 0 done, 1 the bucket failed, 2 usage or no such run, 4 not everything is verified in the
bucket.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.training_config import TrainingConfig
from utils.base.console import configure_logging, new_parser, print_wrapped, run_command
from utils.base.errors import ExitCode, StorageError, UploadError, UsageError
from utils.base.progress import ProgressDisplay
from utils.base.text import count_of, format_bytes, printable, to_json_text
from utils.base.uri import require_path
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import (
    RunIdentity,
    RunPaths,
    find_checkpoints,
    parse_checkpoint_name,
    require_checkpoint_name,
)
from utils.checkpoints.retention import Decision
from utils.checkpoints.run_record import find_run_identity
from utils.checkpoints.views import (
    CheckpointView,
    choose_name,
    describe_lack,
    read_local_checkpoints,
    select_checkpoint,
)
from utils.command_line.arguments import add_run_arguments
from utils.command_line.run_config import read_run_config
from utils.remote.listing import RemoteListing, read_remote_checkpoints
from utils.remote.pruning import PrunePlan, delete_all, find_doomed, plan_bucket
from utils.remote.verification import CheckpointReport, Verifier
from utils.storage.bucket import Bucket
from utils.tools.uploads.overview import (
    LISTING_RETRY_SECONDS,
    describe_places,
    opened_bucket,
    read_overview,
    read_remote,
    require_run,
    require_uri,
)
from utils.tools.uploads.text import print_checkpoints, print_plan, print_reports, print_status
from utils.tools.uploads.transfer import bring_back, find_lost, upload
from utils.uploads.status import build_upload_rows
from utils.uploads.uploader import find_unfinished

log = logging.getLogger(__name__)

Command = Callable[[TrainingConfig, RunPaths, argparse.Namespace], int]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    common = argparse.ArgumentParser(add_help=False)
    add_run_arguments(common)
    parser = new_parser("upload_manager.py", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, parents=[common], help=text)
        parser.set_defaults(command=command)
        return parser

    add(
        "status",
        show_status,
        "every checkpoint, here and in the bucket; the queue; the last errors",
    )
    add("list", show_list, "the checkpoints on this machine, or in the bucket").add_argument(
        "--remote", action="store_true", help="those in the bucket"
    )
    which = "a name, its unique beginning or end, a step number, latest or best"
    one = add("upload", upload_one, "upload one checkpoint")
    one.add_argument("name", metavar="NAME", help=which)
    add("upload-all", upload_all, "upload everything that is not verified in the bucket")
    add("retry", retry_failed, "upload what failed, also what failed for good")
    verify = add("verify", verify_uploads, "compare journal, directory and bucket")
    verify.add_argument("names", nargs="*", metavar="NAME", help="a name, a step number, ...")
    verify.add_argument("--deep", action="store_true", help="read every byte, here and there")
    down = add("download", download, "bring a checkpoint back: verified, unpacked, committed")
    down.add_argument("name", metavar="NAME", help=which)
    down.add_argument("--to", metavar="DIR", help="directory (default: the run's checkpoints)")
    prune = add(
        "prune", prune_remote, "delete old checkpoints from the bucket, after a look and a question"
    )
    prune.add_argument("--remote", action="store_true", help="in the bucket; needed")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="newest to keep")
    prune.add_argument("--keep-every", type=int, metavar="STEPS", help="keep multiples of it too")
    prune.add_argument("--run-id", metavar="RUN", help="run id, where the bucket holds several")
    prune.add_argument("--dry-run", action="store_true", help="only show what would go")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Do one command; return the exit code."""
    configure_logging("debug" if args.debug else "info", stderr=args.json)
    config = read_run_config(args)
    command: Command = args.command
    return command(config, RunPaths.of(config), args)


def show_status(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Print every checkpoint here and in the bucket, the queue, then the last errors."""
    overview = read_overview(config, paths)
    if args.json:
        print(to_json_text(overview))
    else:
        print_status(overview)
    return ExitCode.DONE


def show_list(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Print the checkpoints on this machine, or those in the bucket."""
    where = str(paths.checkpoints)
    if args.remote:
        where = require_uri(config)
        with opened_bucket(config, LISTING_RETRY_SECONDS) as bucket:
            rows = build_upload_rows([], read_remote_checkpoints(bucket), bucket_problem=None)
    else:
        rows = build_upload_rows(read_local_checkpoints(paths.checkpoints), [])
    if not rows:
        require_run(paths, where if args.remote else "", [], None)
    if args.json:
        print(to_json_text(rows))
    elif rows:
        print_checkpoints(f"Checkpoints in {where}", rows)
    else:
        print_wrapped(describe_lack(where))
    return ExitCode.DONE


def upload_one(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Upload the checkpoint that the user names."""
    view = select_checkpoint(args.name, read_local_checkpoints(paths.checkpoints))
    return upload_and_report(config, paths, [paths.checkpoints / str(view.name)], args)


def upload_all(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Upload what the journal has not as verified, or the bucket does not have as it says."""
    journal = Journal(paths.journal)
    owed = find_unfinished(paths.checkpoints, journal, require_uri(config))
    owed += find_lost(config, paths, journal)
    owed.sort(key=lambda path: require_checkpoint_name(path.name))
    return upload_and_report(config, paths, owed, args)


def retry_failed(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Upload what the journal has as failed."""
    uploads = Journal(paths.journal).latest()
    failed = {name for name, entry in uploads.items() if entry.state is UploadState.FAILED}
    here = [str(name) for name in find_checkpoints(paths.checkpoints)]
    for name in sorted(failed.difference(here)):
        log.warning("%s failed and is no longer here.", printable(name))
    wanted = [paths.checkpoints / name for name in here if name in failed]
    return upload_and_report(config, paths, wanted, args)


def upload_and_report(
    config: TrainingConfig, paths: RunPaths, checkpoints: list[Path], args: argparse.Namespace
) -> int:
    """Upload checkpoints and print what became of them.

    Raises:
        UploadError: Not all could be verified in the bucket.
    """
    require_uri(config)
    failures: dict[str, str] = {}
    if checkpoints:
        failures = upload(config, Journal(paths.journal), checkpoints, is_shown=not args.json)
    elif not paths.checkpoints.exists():
        require_run(paths, config.bucket_uri, *read_remote(config))
    verified = [path.name for path in checkpoints if path.name not in failures]
    if args.json:
        print(to_json_text({"verified": verified, "failed": failures}))
    elif not checkpoints:
        print("Nothing is left to upload.")
    elif verified:
        print(f"{len(verified)} verified in the bucket.")
    if failures:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failures.items())
        raise UploadError(
            f"{len(failures)} of {len(checkpoints)} checkpoints were not uploaded:{reasons}"
        )
    return ExitCode.DONE


def verify_uploads(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Say of each checkpoint what is right and what is wrong with its upload."""
    identity = find_run_identity(paths)
    with opened_bucket(config) as bucket, ProgressDisplay(enabled=args.deep) as display:
        verifier = Verifier(
            paths.checkpoints,
            Journal(paths.journal).latest(),
            bucket,
            run_id=identity.run_id if identity else None,
            is_deep=args.deep,
            on_progress=display.update,
        )
        known = verifier.names()
        # A name may also be of a checkpoint that is nowhere any more.
        names = [
            parse_checkpoint_name(text)
            or choose_name(str(known[-1]) if text == "latest" and known else text, known)
            for text in args.names
        ]
        reports, orphans = verifier.split([verifier.check(name) for name in names or known])
    if args.names:
        orphans = []
    if args.json:
        rows = [report_row(report) for report in reports]
        print(to_json_text({"checkpoints": rows, "orphans": [vars(orphan) for orphan in orphans]}))
    elif reports or orphans:
        print_reports(reports, orphans)
    if not reports:
        raise UsageError(f"{describe_places(paths.checkpoints, bucket.uri)} Nothing was verified.")
    is_verified = all(report.is_verified for report in reports)
    return ExitCode.DONE if is_verified else ExitCode.NOT_VERIFIED


def report_row(report: CheckpointReport) -> dict[str, Any]:
    """Return a report as JSON has it."""
    return {
        "checkpoint": str(report.name),
        "run_id": report.run_id,
        "local": report.is_local,
        "verified": report.is_verified,
        "right": report.right,
        "wrong": report.wrong,
    }


def download(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Bring a checkpoint from the bucket into the run's directory or another one."""
    if args.to is not None:
        require_path(args.to, "--to")
    directory = paths.checkpoints if args.to is None else Path(args.to)
    path, was_here = bring_back(config, paths, args.name, directory, is_shown=not args.json)
    if args.json:
        found = {"checkpoint": path.name, "path": str(path), "downloaded": not was_here}
        print(to_json_text(found))
    else:
        outcome = "already here" if was_here else "complete"
        print_wrapped(f"{path} is {outcome}: every file verified.")
    return ExitCode.DONE


def prune_remote(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Delete old checkpoints from the bucket."""
    if not args.remote:
        raise UsageError("prune deletes in the bucket: say so with --remote.")
    if args.keep < 1 or (args.keep_every is not None and args.keep_every < 1):
        raise UsageError("--keep and --keep-every must be at least 1.")
    if not (args.yes or args.dry_run or (sys.stdin.isatty() and not args.json)):
        raise UsageError(
            "prune asks before it deletes, which needs a terminal: add --yes, or --dry-run to see "
            "what would go."
        )
    journal = Journal(paths.journal)
    with opened_bucket(config) as bucket:
        listing, plan = plan_prune(bucket, paths, journal, args)
        doomed = find_doomed(plan)
        result: dict[str, Any] = {
            "checkpoints": [prune_row(view, decision) for view, decision in plan],
            "notes": bucket.deletion_notes() if doomed else [],
            "deleted": [],
            "failed": {},
        }
        if not args.json:
            print_plan(bucket.uri, result, len(doomed))
        if doomed and not args.dry_run and (args.yes or is_confirmed(len(doomed), bucket.uri)):
            if not args.yes:  # a trainer may have gone on, or begun a branch, before the answer
                listing, plan = plan_prune(bucket, paths, journal, args)
                doomed = find_doomed(plan, {view.name for view in doomed})
            deleted = delete_all(bucket, doomed, listing, journal)
            result["deleted"], result["failed"] = deleted
    if args.json:
        print(to_json_text(result))
    if result["failed"]:
        reasons = "".join(f"\n  {name}: {text}" for name, text in result["failed"].items())
        raise StorageError(f"{len(result['failed'])} could not be deleted:{reasons}")
    return ExitCode.DONE


def plan_prune(
    bucket: Bucket, paths: RunPaths, journal: Journal, args: argparse.Namespace
) -> tuple[RemoteListing, PrunePlan]:
    """Return what lies in the bucket now and what to delete of it; nothing is changed."""
    return plan_bucket(
        bucket,
        RunIdentity(args.run_id) if args.run_id else find_run_identity(paths),
        is_under_way={name for name, one in journal.latest().items() if one.state.is_pending},
        keep=args.keep,
        keep_every_steps=args.keep_every,
    )


def prune_row(view: CheckpointView, decision: Decision) -> dict[str, Any]:
    """Return what becomes of a checkpoint, and why."""
    return {
        "checkpoint": decision.name,
        "step": view.name.step,
        "archive": format_bytes(view.archive_bytes),
        "archive_bytes": view.archive_bytes,
        "action": decision.action.value,
        "reason": printable(decision.reason),
    }


def is_confirmed(count: int, uri: str) -> bool:
    """Ask the person at the terminal."""
    answer = input(f"Delete {count_of(count, 'checkpoint')} from {uri}? Type yes: ")
    if answer.strip().lower() in ("y", "yes"):
        return True
    print("Nothing was deleted.")
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    logging.captureWarnings(capture=True)
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
