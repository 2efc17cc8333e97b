"""Where every checkpoint stands on its way to the bucket, as the upload manager shows it.

    journal, checkpoint directory, bucket -> rows, queue, last errors

Everything is read, nothing is locked or changed, so it works beside a run, and on a machine that
has only the bucket. Values come from files that may be foreign: what is shown passes `printable`.
No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from utils.base.text import epoch_seconds, format_bytes, format_duration, number, printable
from utils.checkpoints.journal import JournalEntry, UploadState
from utils.checkpoints.retention import Action, Decision
from utils.checkpoints.views import CheckpointView, find_best, is_verified_in

STALE_SECONDS = 60.0
SHOWN_ERRORS = 5
_FIGURES = ("sent", "size", "read", "total", "bytes_per_second", "eta_seconds", "attempt")
_UNDER_WAY = (UploadState.ARCHIVING, UploadState.UPLOADING)


def build_upload_rows(
    local: Sequence[CheckpointView],
    remote: Sequence[CheckpointView],
    *,
    uri: str = "",
    bucket_problem: str | None = "it was not read",
    decisions: Iterable[Decision] = (),
) -> list[dict[str, Any]]:
    """Return one row a checkpoint, by step, from what is here and what is in the bucket.

    `bucket_problem` says why the bucket could not be read; it is None where it was.
    """
    here = {view.name: view for view in local}
    there = {view.name: view for view in remote}
    kept = {decision.name: decision for decision in decisions}
    best = find_best(local) or find_best(remote)
    newest = (local or remote)[-1:]
    rows = []
    for name in sorted(here.keys() | there.keys()):
        view, sidecar = here.get(name), there.get(name)
        entry = view.upload if view else None
        found = [one for one in (view, sidecar) if one is not None]
        problem = next((one.problem for one in found if one.problem), "")
        notes = [
            "latest" if any(name == one.name for one in newest) else "",
            "best" if best is not None and name == best.name else "",
            "damaged" if problem else "",
        ]
        unpacked = next((one.total_bytes for one in found if one.total_bytes is not None), None)
        archive = sidecar.archive_bytes if sidecar else None
        state = describe_state(view, sidecar, uri, bucket_problem)
        progress = describe_progress(entry) if entry and entry.state in _UNDER_WAY else {}
        rows.append(
            {
                "checkpoint": str(name),
                "step": name.step,
                "unpacked": format_bytes(unpacked),
                "bytes": unpacked,
                "archive": "" if archive is None else format_bytes(archive),
                "archive_bytes": archive,
                "local": "yes" if view else "no",
                "bucket": "yes" if sidecar else "unknown" if bucket_problem else "no",
                "state": state,
                "verified": state == "verified",
                "progress": progress.get("text", ""),
                "upload": progress,
                "kept": describe_decision(kept.get(str(name))),
                "error": _error_of(entry),
                "note": ", ".join(note for note in notes if note),
                "problem": printable(problem),
            }
        )
    return rows


def describe_state(
    view: CheckpointView | None, sidecar: CheckpointView | None, uri: str, problem: str | None
) -> str:
    """Say where a checkpoint stands: `view` is of this machine, `sidecar` of the bucket `uri`.

    What the journal says is compared with the bucket, unless that had a `problem`.
    """
    entry = view.upload if view else None
    if view is None or view.path is None or entry is None:
        if sidecar is None:
            return "not queued"
        return "verified" if sidecar.problem is None else "damaged in bucket"
    if entry.state is not UploadState.VERIFIED:
        return str(entry.state.value)
    if uri and not is_verified_in(uri, view.path, entry, view.manifest_crc32c):
        return "not in this bucket"
    size = entry.details.get("bytes")
    if problem is None and (sidecar is None or sidecar.problem or sidecar.archive_bytes != size):
        return "missing in bucket" if sidecar is None else "damaged in bucket"
    return "verified"


def describe_decision(decision: Decision | None) -> str:
    """Say why a checkpoint is kept on this machine, or that it goes; "" where no rule says."""
    if decision is None:
        return ""
    return f"{'' if decision.action is Action.KEEP else 'goes: '}{decision.reason}"


def _error_of(entry: JournalEntry | None) -> str:
    return printable(entry.details.get("error", "")) if entry else ""


def describe_progress(entry: JournalEntry, now: datetime | None = None) -> dict[str, Any]:
    """Return how far an upload is: percent, rate, remaining time, and a line of text."""
    found = {key: number(entry.details.get(key)) for key in _FIGURES}
    rate, eta = found["bytes_per_second"], found["eta_seconds"]
    parts = ("sent", "size") if found["size"] else ("read", "total")  # its size may be unknown
    done, all_bytes = (found[key] for key in parts)
    percent = min(100.0, 100 * done / all_bytes) if done is not None and all_bytes else None
    written = epoch_seconds(entry.time)
    now = now or datetime.now(UTC)
    age = None if written is None else max(0.0, now.timestamp() - written)
    words = [
        "" if percent is None else f"{percent:.0f}%",
        "" if rate is None else f"{format_bytes(rate)}/s",
        "" if eta is None or eta < 0 else f"{format_duration(eta)} left",
        "" if age is None or age < STALE_SECONDS else f"no news for {format_duration(age)}",
    ]
    return {
        "percent": percent,
        **found,
        "age_seconds": age,
        "text": ", ".join(word for word in words if word),
    }


def build_queue(owed: Sequence[str], uploads: Mapping[str, JournalEntry]) -> list[dict[str, Any]]:
    """Return what is owed to the bucket: what is under way, then the rest by step."""
    entries = [(name, uploads.get(name)) for name in owed]
    entries.sort(key=lambda one: one[1] is None or one[1].state not in _UNDER_WAY)
    queue = []
    for position, (name, entry) in enumerate(entries, 1):
        details = entry.details if entry else {}
        attempts = number(details.get("attempts", details.get("attempt")))
        queue.append(
            {
                "place": position,
                "checkpoint": name,
                "state": entry.state.value if entry else "not queued",
                "attempts": int(attempts or 0),
                "next try": _describe_next_try(entry),
                "error": _error_of(entry),
            }
        )
    return queue


def _describe_next_try(entry: JournalEntry | None) -> str:
    if entry is None or entry.state is UploadState.QUEUED:
        return "in its turn"
    if entry.state is not UploadState.FAILED:
        return "now"
    if entry.details.get("permanent") is True:
        return "at the next run, or with the command retry"
    next_try = entry.details.get("next_try")
    return printable(next_try, 40) if next_try else "at the next run"


def last_errors(
    entries: Iterable[JournalEntry], uploads: Mapping[str, JournalEntry]
) -> list[dict[str, Any]]:
    """Return the last failures of checkpoints that are still owed, newest last."""
    failures = {
        entry.checkpoint: entry
        for entry in entries
        if entry.state is UploadState.FAILED and uploads[entry.checkpoint].state.is_pending
    }
    newest = sorted(failures.values(), key=lambda entry: entry.time)[-SHOWN_ERRORS:]
    return [
        {
            "time": printable(entry.time, 40),
            "checkpoint": printable(entry.checkpoint, 80),
            "attempts": int(number(entry.details.get("attempts")) or 0),
            "permanent": entry.details.get("permanent") is True,
            "next try": _describe_next_try(entry),
            "error": _error_of(entry),
        }
        for entry in newest
    ]
