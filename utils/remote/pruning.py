"""Which checkpoints to delete from the bucket, and how: the sidecar first, then the archive.

A checkpoint without its sidecar does not count as uploaded, so a crash between the two leaves an
archive that nobody takes for a checkpoint. Only checkpoints of this run and branch are ever
deleted. No torch here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

from utils.base.errors import ConflictError, StorageError
from utils.base.text import printable
from utils.base.uri import join_uri
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import CheckpointName, RunIdentity, sidecar_object
from utils.checkpoints.retention import Action, CheckpointFacts, Decision, keep_reasons
from utils.checkpoints.views import CheckpointView, find_best
from utils.remote.listing import (
    SIDECARS_AT_A_TIME,
    RemoteListing,
    find_damage,
    is_part_of,
    list_remote,
    newest_branch,
    read_sidecars,
)
from utils.storage.bucket import Bucket

log = logging.getLogger(__name__)

PrunePlan = list[tuple[CheckpointView, Decision]]
"""What becomes of each checkpoint of a bucket, by step."""


def plan_bucket(
    bucket: Bucket,
    recorded: RunIdentity | None,
    *,
    is_under_way: Collection[str] = (),
    keep: int,
    keep_every_steps: int | None = None,
) -> tuple[RemoteListing, PrunePlan]:
    """Return what lies in a bucket, and a decision for each checkpoint that has a sidecar.

    What is not of this branch is kept. Damaged ones are kept too, but do not count as the newest.
    `is_under_way` has those whose upload is owed; `recorded` is as in `newest_branch`.

    Raises:
        UsageError: The bucket holds several runs and nothing says which one is meant.
        StorageError: The bucket cannot be read.
    """
    listing = list_remote(bucket)
    views = read_sidecars(bucket, listing)
    identity = newest_branch(views, recorded)
    own = [view for view in views if is_part_of(identity, view)]
    with ThreadPoolExecutor(SIDECARS_AT_A_TIME) as pool:
        damages = list(pool.map(lambda view: find_damage(bucket, listing, view.name), own))
    usable = [view for view, damage in zip(own, damages, strict=True) if damage is None]
    best = find_best(usable)
    facts = [
        CheckpointFacts(
            str(view.name),
            view.name.step,
            is_best=view is best,
            is_uploading=str(view.name) in is_under_way,
        )
        for view in usable
    ]
    decisions = {}
    for one, reason in keep_reasons(facts, keep=keep, keep_every_steps=keep_every_steps):
        action = Action.KEEP if reason else Action.DELETE
        decisions[one.name] = Decision(one.name, action, reason or f"older than the newest {keep}")
    damaged = {view.name: damage for view, damage in zip(own, damages, strict=True) if damage}
    for view in views:
        name, damage = str(view.name), damaged.get(view.name)
        reason = f"damaged, not touched: {damage}" if damage else _why_left(view, identity)
        decisions.setdefault(name, Decision(name, Action.KEEP, reason))
    return listing, [(view, decisions[str(view.name)]) for view in views]


def _why_left(view: CheckpointView, identity: RunIdentity | None) -> str:
    if view.manifest is None:
        return f"damaged, not touched: {view.problem}"
    if identity is None or view.manifest.run_id != identity.run_id:
        return f"of another run, {view.manifest.run_id}"
    return "of another branch"


def find_doomed(
    plan: PrunePlan, confirmed: set[CheckpointName] | None = None
) -> list[CheckpointView]:
    """Return what to delete, only of what was `confirmed`; log why others of that stay."""
    doomed = []
    for view, decision in plan:
        is_asked_for = confirmed is None or view.name in confirmed
        if is_asked_for and decision.action is Action.DELETE:
            doomed.append(view)
        elif is_asked_for and confirmed is not None:
            log.warning("%s is kept after all: %s.", view.name, printable(decision.reason))
    return doomed


def delete_remote(
    bucket: Bucket, view: CheckpointView, listing: RemoteListing, journal: Journal
) -> None:
    """Delete a checkpoint from the bucket and note it in the journal.

    Raises:
        ConflictError: It was uploaded anew meanwhile; it was left.
        StorageError: It could not be deleted; where its archive stays, its sidecar does.
    """
    assert view.manifest is not None, "only usable checkpoints are deleted"
    name = str(view.name)
    sidecar, version = bucket.read_version(sidecar_object(name))
    archive = listing.archives[view.name]
    for planned in (listing.sidecars[view.name], archive):
        if bucket.stat(planned.name) != planned:
            raise ConflictError(f"{bucket.uri}/{planned.name} was changed since it was listed.")
    bucket.delete_if(sidecar_object(name), version)
    try:
        if archive.crc32c is not None:
            bucket.delete_if(archive.name, archive)
        else:
            bucket.delete(archive.name)
    except StorageError:
        bucket.put_bytes_if(sidecar_object(name), sidecar, None)
        raise
    uri = join_uri(bucket.uri, archive.name)
    journal.record(name, view.manifest.run_id, UploadState.REMOVED, uri=uri, bytes=archive.size)
    log.info("Deleted %s from %s.", name, bucket.uri)


def delete_all(
    bucket: Bucket, views: Iterable[CheckpointView], listing: RemoteListing, journal: Journal
) -> tuple[list[str], dict[str, str]]:
    """Delete checkpoints from the bucket; return those that are gone, and why others are not."""
    deleted: list[str] = []
    failed: dict[str, str] = {}
    for view in views:
        try:
            delete_remote(bucket, view, listing, journal)
        except StorageError as exc:
            failed[str(view.name)] = str(exc)
        else:
            deleted.append(str(view.name))
    return deleted, failed
