"""The checkpoints in a run's bucket: one listing of them, and as many of their sidecars as needed.

    Checkpoints/NAME.tar.gz, Checkpoints/NAME.json -> upload manager

A listing costs one request for a thousand objects, a sidecar one request; several are read at once.
Names that are not ours stay strings and are never part of a path. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from utils.base.archive_formats import ARCHIVE_SUFFIXES
from utils.base.errors import CheckpointError, UsageError
from utils.base.text import printable
from utils.base.uri import require_place, scheme_of
from utils.checkpoints.layout import (
    REMOTE_FOLDER,
    CheckpointName,
    Manifest,
    RunIdentity,
    parse_checkpoint_name,
    strip_archive_suffix,
)
from utils.checkpoints.views import (
    CheckpointView,
    choose_name,
    find_best,
    read_remote_checkpoint,
)
from utils.remote.archive_reading import read_sidecar
from utils.storage.bucket import Bucket, ObjectInfo

SIDECAR_SUFFIX = ".json"
SIDECARS_AT_A_TIME = 8
NEWEST_SIDECARS = 50  # each is a request; older ones are named


@dataclass(frozen=True)
class RemoteListing:
    """What lies below `Checkpoints/`: archives and sidecars by checkpoint, all else."""

    archives: dict[CheckpointName, ObjectInfo] = field(default_factory=dict)
    sidecars: dict[CheckpointName, ObjectInfo] = field(default_factory=dict)
    others: list[ObjectInfo] = field(default_factory=list)

    @property
    def complete(self) -> list[CheckpointName]:
        """Checkpoints with archive and sidecar, by step."""
        return sorted(self.archives.keys() & self.sidecars.keys())


def list_remote(bucket: Bucket) -> RemoteListing:
    """Return what lies below `Checkpoints/`.

    Raises:
        StorageError: The bucket cannot be listed.
    """
    listing = RemoteListing()
    for info in bucket.list(f"{REMOTE_FOLDER}/"):
        text = info.name.removeprefix(f"{REMOTE_FOLDER}/")
        archive = parse_checkpoint_name(strip_archive_suffix(text))
        sidecar = parse_checkpoint_name(text.removesuffix(SIDECAR_SUFFIX))
        if archive is not None and text.endswith(ARCHIVE_SUFFIXES):
            known = listing.archives.get(archive, info)
            # Of several archives, the sidecar describes the one that was written last.
            listing.archives[archive] = max(known, info, key=lambda one: one.generation or 0)
        elif sidecar is not None and text.endswith(SIDECAR_SUFFIX):
            listing.sidecars[sidecar] = info
        else:
            listing.others.append(info)
    return listing


def find_damage(
    bucket: Bucket,
    listing: RemoteListing,
    name: CheckpointName,
    *,
    manifest: Manifest | None = None,
    should_read: bool = False,
) -> str | None:
    """Say why a checkpoint of the bucket cannot be counted on; None where it can.

    `manifest` is what it has to be, where that is known. `should_read` asks for the checksum of an
    archive where the bucket keeps none.

    Raises:
        StorageError: It cannot be read.
    """
    archive = listing.archives.get(name)
    if archive is None or name not in listing.sidecars:
        return f"its {'archive' if archive is None else 'sidecar'} is missing"
    try:
        sidecar = read_sidecar(bucket, str(name))
    except CheckpointError as exc:
        return str(exc)
    if manifest not in (None, sidecar.manifest):
        return "its sidecar is of other files"
    crc32c = bucket.crc32c(archive.name) if should_read and not archive.crc32c else archive.crc32c
    difference = sidecar.find_difference(archive.size, crc32c)
    return difference and f"its archive is damaged ({difference})"


def parse_remote_name(text: str) -> tuple[str, str] | None:
    """Return (bucket URI, which) of `URI/[Checkpoints/]WHICH`, None where it is something else.

    Raises:
        UsageError: It is a bucket's and names no checkpoint, or is an address that is not
            supported.
    """
    require_place(text)
    base, _, which = text.rstrip("/").rpartition("/")
    base = base.removesuffix(f"/{REMOTE_FOLDER}").rstrip("/")
    which = strip_archive_suffix(which)
    scheme = scheme_of(text)
    if scheme is not None:
        if scheme_of(base) is None:
            raise UsageError(f"{text}: say {scheme}://BUCKET[/PREFIX]/latest or /NAME.")
        return base, which
    is_bucket = bool(base) and (Path(base) / REMOTE_FOLDER).is_dir() and not Path(text).is_dir()
    return (base, which) if is_bucket else None


def read_sidecars(
    bucket: Bucket, listing: RemoteListing, names: Iterable[CheckpointName] | None = None
) -> list[CheckpointView]:
    """Return checkpoints of the bucket as far as their sidecars can be read, by step.

    `names` says which; None for all that have a sidecar.
    """

    def read(name: CheckpointName) -> CheckpointView:
        return read_remote_checkpoint(bucket, name, listing.archives.get(name))

    with ThreadPoolExecutor(SIDECARS_AT_A_TIME) as pool:
        return list(pool.map(read, sorted(listing.sidecars if names is None else names)))


def read_remote_checkpoints(bucket: Bucket, newest: int | None = None) -> list[CheckpointView]:
    """Return the checkpoints of a run's bucket that have a sidecar, by step.

    `newest` reads only the sidecars of so many highest steps; None reads all.
    """
    listing = list_remote(bucket)
    names = sorted(listing.sidecars)
    return read_sidecars(bucket, listing, names[-newest:] if newest else names)


def newest_branch(
    views: Sequence[CheckpointView], recorded: RunIdentity | None
) -> RunIdentity | None:
    """Return the run and branch that checkpoints of a bucket belong to, None where there are none.

    `recorded` is what this machine goes on with, None where it has no run.

    Raises:
        UsageError: They are of several runs, and nothing says which one is meant.
    """
    known = [(view, view.manifest.identity) for view in views if view.manifest is not None]
    runs = sorted({identity.run_id for _, identity in known})
    if recorded is None and len(runs) > 1:
        raise UsageError(
            f"The bucket holds checkpoints of several runs: {', '.join(map(printable, runs))}. "
            "Say which one is meant: a checkpoint's full name, or prune --run-id RUN."
        )
    own = [
        (identity.branch, view.name, identity)
        for view, identity in known
        if recorded is None or identity.run_id == recorded.run_id
    ]
    newest = max(own, key=lambda one: one[:2])[2] if own else None
    if recorded is None or (newest is not None and newest.branch > recorded.branch):
        return newest
    return recorded


def is_part_of(identity: RunIdentity | None, view: CheckpointView) -> bool:
    """Tell whether a checkpoint is of this run and branch."""
    return (
        identity is not None
        and view.manifest is not None
        and identity.includes(view.manifest.identity, view.name.step)
    )


def choose_remote(bucket: Bucket, text: str, recorded: RunIdentity | None) -> CheckpointName:
    """Return the checkpoint of a bucket that a user means: `latest`, `best`, or for `choose_name`.

    Only sidecars that decide it are read. `recorded` is as in `newest_branch`.

    Raises:
        UsageError: There is none.
        StorageError: The bucket cannot be listed.
    """
    listing = list_remote(bucket)
    names = listing.complete
    named = parse_checkpoint_name(text)
    if named in listing.archives or named in listing.sidecars:
        return named  # the reader says what it lacks
    if text in ("latest", "best"):
        read = names[-NEWEST_SIDECARS:] if text == "latest" else names
        views = [view for view in read_sidecars(bucket, listing, read) if view.problem is None]
        identity = newest_branch(views, recorded)
        own = [view for view in views if is_part_of(identity, view)]
        best = find_best(own) if text == "best" else (own[-1] if own else None)
        if best is not None:
            return best.name
    return choose_name(text, names, bucket.uri)
