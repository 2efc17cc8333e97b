"""See, finish, check and use the uploads of a run's checkpoints.

    status              every checkpoint, here and in the bucket; the queue; the last errors
    list [--remote]     the checkpoints on this machine, or in the bucket
    upload NAME         upload one (a name or its end, a step number, latest or best)
    upload-all          upload everything that is not verified in the bucket
    retry               upload what failed, also what failed for good
    verify [--deep]     compare journal, directory and bucket; --deep reads every byte
    download NAME       bring one back: verified, unpacked, committed
    prune --remote      delete old checkpoints from the bucket, after a look and a question

No torch is loaded. What this command does is recorded in the same journal as the trainer's uploads.
Exit codes: 0 done, 1 the bucket failed, 2 usage or no such run, 4 not everything is verified in the
bucket.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.training_config import TrainingConfig
from utils.base.console import (
    LiveLine,
    configure_logging,
    new_parser,
    print_table,
    print_wrapped,
    run_command,
)
from utils.base.errors import (
    CheckpointError,
    ExitCode,
    LockedError,
    PretrainError,
    StorageError,
    UploadError,
    UsageError,
)
from utils.base.progress import ProgressDisplay
from utils.base.text import Column, count_of, format_bytes, printable, to_json_text
from utils.base.uri import require_path
from utils.checkpoints.journal import Journal, JournalEntry, UploadState
from utils.checkpoints.layout import (
    REMOTE_FOLDER,
    RunIdentity,
    RunPaths,
    find_checkpoints,
    parse_checkpoint_name,
    require_checkpoint_name,
)
from utils.checkpoints.retention import Action, Decision, decide_retention
from utils.checkpoints.run_record import find_run_identity
from utils.checkpoints.store import hold_output_directory
from utils.checkpoints.views import (
    CheckpointView,
    choose_name,
    describe_lack,
    read_local_checkpoints,
    select_checkpoint,
)
from utils.command_line.arguments import add_run_arguments
from utils.command_line.run_config import read_run_config
from utils.remote.archive_reading import read_sidecar
from utils.remote.download import download_checkpoint
from utils.remote.listing import RemoteListing, choose_remote, read_remote_checkpoints
from utils.remote.pruning import PrunePlan, delete_all, find_doomed, plan_bucket
from utils.remote.verification import CheckpointReport, Orphan, Verifier, find_unconfirmed
from utils.storage.bucket import Bucket
from utils.storage.open import open_bucket
from utils.uploads.status import build_queue, build_upload_rows, last_errors
from utils.uploads.transports import TransportOptions, probe_transport
from utils.uploads.uploader import Uploader, find_unfinished

WAIT_LINE_SECONDS = 30.0
LISTING_RETRY_SECONDS = 5.0
READING_RETRY_SECONDS = 60.0
STATUS_COLUMNS = (
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
LIST_COLUMNS = (
    Column("checkpoint", kind="name"),
    Column("step", 6, "number"),
    Column("unpacked", 4, "number"),
    Column("archive", 5, "number"),
    Column("state", 2),
    Column("note", 3, "prose"),
)
QUEUE_COLUMNS = (
    Column("place", 5, "number"),
    Column("checkpoint", kind="name"),
    Column("state", 2),
    Column("attempts", 4, "number"),
    Column("next try", 3, "prose"),
)
PRUNE_COLUMNS = (
    Column("checkpoint", kind="name"),
    Column("step", 5, "number"),
    Column("archive", 4, "number"),
    Column("action", 2),
    Column("reason", 3, "prose"),
)

log = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    common = argparse.ArgumentParser(add_help=False)
    add_run_arguments(common)
    parser = new_parser("upload_manager.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=text)

    add("status", "here, in the bucket, queue, errors")
    add("list", "the checkpoints").add_argument(
        "--remote", action="store_true", help="those in the bucket"
    )
    which = "a name, its unique beginning or end, a step number, latest or best"
    add("upload", "upload one checkpoint").add_argument("name", metavar="NAME", help=which)
    add("upload-all", "upload all that is not verified in the bucket")
    add("retry", "upload what failed")
    verify = add("verify", "compare journal, directory and bucket")
    verify.add_argument("names", nargs="*", metavar="NAME", help="a name, a step number, ...")
    verify.add_argument("--deep", action="store_true", help="read every byte, here and there")
    download = add("download", "bring a checkpoint back from the bucket")
    download.add_argument("name", metavar="NAME", help=which)
    download.add_argument("--to", metavar="DIR", help="directory (default: the run's checkpoints)")
    prune = add("prune", "delete old checkpoints from the bucket")
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
    command = {
        "status": show_status,
        "list": show_list,
        "upload": upload_one,
        "upload-all": upload_all,
        "retry": retry_failed,
        "verify": verify_uploads,
        "download": download,
        "prune": prune_remote,
    }[args.command]
    return command(config, RunPaths.of(config), args)


def print_json(value: object) -> None:
    """Print a command's result as JSON."""
    print(to_json_text(value, indent=1))


def require_uri(config: TrainingConfig) -> str:
    """Return the run's bucket.

    Raises:
        UsageError: The configuration names none.
    """
    if not config.bucket_uri:
        raise UsageError("checkpoint_uri is empty: --set checkpoint_uri=gs://... or a directory.")
    return config.bucket_uri


def opened_bucket(
    config: TrainingConfig, retry_seconds: float = READING_RETRY_SECONDS
) -> contextlib.closing[Bucket]:
    """Open the run's bucket for a while."""
    project = config.gcs_user_project or None
    return contextlib.closing(open_bucket(require_uri(config), project, retry_seconds))


def show_status(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Print every checkpoint here and in the bucket, the queue, then the last errors."""
    uri = config.bucket_uri
    journal, problems = Journal(paths.journal), []
    entries: list[JournalEntry] = []
    local: list[CheckpointView] = []
    identity: RunIdentity | None = None
    try:
        entries = list(journal.entries())
    except OSError as exc:
        problems.append(f"{paths.journal} cannot be read: {exc.strerror or exc}")
    uploads = {entry.checkpoint: entry for entry in entries}
    try:
        identity = find_run_identity(paths)
        local = read_local_checkpoints(paths.checkpoints, uploads)
        if paths.checkpoints.exists() and not paths.checkpoints.is_dir():
            problems.append(f"{paths.checkpoints} is no directory")
    except OSError as exc:
        problems.append(f"{paths.checkpoints} cannot be read: {exc.strerror or exc}")
    remote, problem = read_remote(config)
    if not problems:
        require_run(paths, uri, remote, problem)
    decisions: list[Decision] = []
    if identity is not None:
        decisions = decide_retention(
            local, config, run_id=identity.run_id, is_uploading_on=bool(uri)
        )
    owed = find_unfinished(paths.checkpoints, journal, uri, uploads) if uri and local else []
    result: dict[str, Any] = {
        "run_id": identity.run_id if identity else None,
        "directory": str(paths.checkpoints),
        "bucket": uri or None,
        "bucket_problem": problem,
        "problems": problems,
        "checkpoints": build_upload_rows(
            local, remote, uri=uri, bucket_problem=problem, decisions=decisions
        ),
        "queue": build_queue([path.name for path in owed], uploads),
        "errors": last_errors(entries, uploads),
    }
    if args.json:
        print_json(result)
    else:
        print_status(result, paths)
    return ExitCode.DONE


def print_status(result: dict[str, Any], paths: RunPaths) -> None:
    """Print what `status` found."""
    rows, bucket = result["checkpoints"], result["bucket"] or "no bucket"
    if rows:
        title = f"Uploads from {result['directory']} to {bucket}"
        print_table(title, rows, STATUS_COLUMNS)
        print_problems(rows)
    else:
        print_wrapped(describe_places(paths, result["bucket"] or ""))
    if result["bucket"]:
        print(f"{sum(row['state'] != 'verified' for row in rows)} not verified in the bucket.")
    print_table("Queue", result["queue"], QUEUE_COLUMNS)
    if result["errors"]:
        print("Last errors")
        for row in result["errors"]:
            tries = f" ({count_of(row['attempts'], 'attempt')})" if row["attempts"] else ""
            text = f"  {row['time']}  {row['checkpoint']}{tries}: {row['error']}"
            print_wrapped(text, hanging=4)
    for text in result["problems"]:
        print_wrapped(printable(text))
    if result["bucket_problem"]:
        print_wrapped(f"The bucket could not be read: {printable(result['bucket_problem'])}")


def print_problems(rows: Sequence[dict[str, Any]]) -> None:
    """Print what is wrong with checkpoints, below their table."""
    for row in rows:
        if row["problem"]:
            print_wrapped(f"{row['checkpoint']}: {row['problem']}", hanging=2)


def read_remote(config: TrainingConfig) -> tuple[list[CheckpointView], str | None]:
    """Return the checkpoints in the bucket, or none and why it could not be read."""
    try:
        with opened_bucket(config, LISTING_RETRY_SECONDS) as bucket:
            return read_remote_checkpoints(bucket), None
    except PretrainError as exc:
        return [], str(exc)


def require_run(
    paths: RunPaths, uri: str, remote: Sequence[CheckpointView], problem: str | None
) -> None:
    """Refuse what looks like success where there is no run, neither here nor in its bucket.

    Raises:
        UsageError: The run's directory does not exist, and its bucket, if any, has no checkpoint.
    """
    is_unknown = bool(uri and problem)
    if not (paths.checkpoints.exists() or remote or is_unknown):
        raise UsageError(
            f"{describe_places(paths, uri)} Name the run: --run-name NAME or --run DIR."
        )


def describe_places(paths: RunPaths, uri: str) -> str:
    """Say that there are no checkpoints of a run, here and in its bucket if it has one."""
    return " ".join(describe_lack(place) for place in (str(paths.checkpoints), uri) if place)


def show_list(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Print the checkpoints on this machine, or those in the bucket."""
    where = str(paths.checkpoints)
    if args.remote:
        where = require_uri(config)
        with opened_bucket(config, LISTING_RETRY_SECONDS) as bucket:
            rows = build_upload_rows([], read_remote_checkpoints(bucket), bucket_problem=None)
    else:
        rows = build_upload_rows(read_local_checkpoints(paths.checkpoints), [])
    if args.json:
        print_json(rows)
    elif rows:
        print_table(f"Checkpoints in {where}", rows, LIST_COLUMNS)
        print_problems(rows)
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


def find_lost(config: TrainingConfig, paths: RunPaths, journal: Journal) -> list[Path]:
    """Return the checkpoints here that are verified by the journal alone."""
    try:
        with opened_bucket(config, LISTING_RETRY_SECONDS) as bucket:
            lost = find_unconfirmed(paths.checkpoints, journal.latest(), bucket)
    except StorageError as exc:
        log.warning("The bucket cannot be read (%s): the journal alone decides.", exc)
        return []
    for checkpoint, problem in lost.items():
        log.warning("%s is uploaded again: %s.", checkpoint.name, problem.rstrip("."))
    return list(lost)


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
        print_json({"verified": verified, "failed": failures})
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


def upload(
    config: TrainingConfig, journal: Journal, checkpoints: list[Path], *, is_shown: bool
) -> dict[str, str]:
    """Upload checkpoints, newest first; return name -> error of those that failed."""
    wanted = TransportOptions.of(config, journal.path.parent)
    if wanted.name in ("auto", "python"):  # which one works, and whether it may make parts
        wanted, _ = probe_transport(wanted, REMOTE_FOLDER, LISTING_RETRY_SECONDS)
    uploader = Uploader(wanted, journal, compression=config.upload_compression)
    line = LiveLine(enabled=is_shown, plain_seconds=WAIT_LINE_SECONDS)
    with uploader, contextlib.closing(line) as live:
        for checkpoint in checkpoints:
            try:
                uploader.submit(checkpoint)
            except CheckpointError as exc:
                uploader.failures[checkpoint.name] = str(exc)
        uploader.drain(math.inf, live.show)
    return uploader.failures


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
        print_json({"checkpoints": rows, "orphans": [vars(orphan) for orphan in orphans]})
    elif reports or orphans:
        print_reports(reports, orphans)
    if not reports:
        raise UsageError(f"{describe_places(paths, bucket.uri)} Nothing was verified.")
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


def download(config: TrainingConfig, paths: RunPaths, args: argparse.Namespace) -> int:
    """Bring a checkpoint from the bucket into the run's directory or another one."""
    directory = paths.checkpoints
    if args.to is not None:
        require_path(args.to, "--to")
        directory = Path(args.to)
    is_own = directory.resolve() == paths.checkpoints.resolve()
    # No trainer may begin meanwhile: it would take the files so far for what a crash has left.
    held = hold_output_directory(paths) if is_own else contextlib.nullcontext()
    shown = ProgressDisplay(enabled=not args.json)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held)
        except LockedError as exc:
            raise LockedError(f"{exc} Or download elsewhere: --to DIR.") from exc
        bucket, display = stack.enter_context(opened_bucket(config)), stack.enter_context(shown)
        identity = find_run_identity(paths)  # once held: a trainer may have been here until now
        name = str(choose_remote(bucket, args.name, identity))
        if is_own and identity is not None:
            found = read_sidecar(bucket, name).manifest.run_id
            if found != identity.run_id:
                raise CheckpointError(
                    f"{name} in {bucket.uri} is of run {printable(found)}, the run here is "
                    f"{identity.run_id}. Nothing was downloaded. Choose another place: --to DIR."
                )
        was_here = (directory / name).exists()
        journal = Journal(paths.journal) if is_own else None
        path = download_checkpoint(bucket, name, directory, journal, display.update)
    if args.json:
        print_json({"checkpoint": name, "path": str(path), "downloaded": not was_here})
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
        print_json(result)
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


def print_plan(uri: str, result: dict[str, Any], num_doomed: int) -> None:
    """Print what `prune` is about to do."""
    rows = result["checkpoints"]
    print_table(f"Checkpoints in {uri}", rows, PRUNE_COLUMNS)
    freed = sum(row["archive_bytes"] or 0 for row in rows if row["action"] == Action.DELETE.value)
    print(f"{num_doomed} to delete, {format_bytes(freed)}.")
    for note in result["notes"]:
        print_wrapped(f"  {printable(note)}", hanging=2)


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
