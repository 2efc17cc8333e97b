"""The checkpoints that the viewer looks at, in a directory or in a bucket.

    checkpoint directory, journal | sidecars in the bucket -> names, views, rows

Names come from one listing, and only the checkpoints that a command shows are read. What cannot be
listed is named in `notes`. Nothing is locked or changed. No torch here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.training_config import TrainingConfig
from utils.base.errors import CheckpointError, UsageError
from utils.base.text import count_of, printable
from utils.checkpoints.journal import Journal, JournalEntry
from utils.checkpoints.layout import (
    MANIFEST_FILE,
    RUN_FILE,
    CheckpointName,
    RunPaths,
    find_checkpoints,
    parse_checkpoint_name,
)
from utils.checkpoints.retention import decide_retention
from utils.checkpoints.run_record import find_run_identity
from utils.checkpoints.views import (
    CheckpointView,
    choose_name,
    describe_lack,
    find_best,
    read_local_checkpoints,
)
from utils.remote.listing import RemoteListing, list_remote, read_sidecars
from utils.storage.bucket import Bucket
from utils.storage.open import open_bucket
from utils.tools.viewer.report import summarize_all
from utils.uploads.status import describe_decision, describe_state

_RETRY_SECONDS = 15.0
NOT_READ = "it was not read"


class Shelf:
    """Checkpoints in one place.

    Attributes:
        where: Directory or bucket.
        names: The complete checkpoints, by step.
        notes: What else is there and why it is not listed.
    """

    def __init__(self, where: str, names: list[CheckpointName], notes: list[str]) -> None:
        self.where, self.names, self.notes = where, names, notes
        self._views: dict[tuple[CheckpointName, bool], CheckpointView] = {}

    def _read(self, names: Sequence[CheckpointName], *, brief: bool) -> list[CheckpointView]:
        raise NotImplementedError

    def _all_known(self) -> list[CheckpointView] | None:
        """Return all checkpoints; None where that would take many requests."""
        raise NotImplementedError

    def _add_states(self, views: Sequence[CheckpointView], rows: list[dict[str, Any]]) -> None:
        raise NotImplementedError

    def read(self, names: Sequence[CheckpointName], *, brief: bool = False) -> list[CheckpointView]:
        """Return checkpoints in the order of `names`, each read once; deleted ones are left out.

        With `brief` their histories are not read.
        """
        missing = [name for name in dict.fromkeys(names) if (name, brief) not in self._views]
        found = self._read(missing, brief=brief) if missing else []
        self._views.update({(view.name, brief): view for view in found})
        return [self._views[name, brief] for name in names if (name, brief) in self._views]

    def select(self, text: str) -> CheckpointView:
        """Return the checkpoint that a user means: `latest`, `best`, or a text for `choose_name`.

        Raises:
            UsageError: No checkpoint fits, or more than one.
        """
        name: CheckpointName | None = None
        if not self.names:
            raise UsageError(describe_lack(printable(self.where)))
        if text == "latest":
            newest = (view for name in reversed(self.names) for view in self.read([name]))
            sound = (view.name for view in newest if view.problem is None)
            name = next(sound, self.names[-1])
        elif text == "best":
            best = find_best(self.read(self.names, brief=True))
            name = best.name if best is not None else None
        found = self.read([name or choose_name(text, self.names, printable(self.where))])
        if not found:
            raise UsageError(f"{printable(text)} has just been deleted; list shows the others.")
        return found[0]

    def rows(
        self, views: Sequence[CheckpointView], hourly_price: float | None = None
    ) -> list[dict[str, Any]]:
        """Return the figures of checkpoints, their states in the bucket, and why they are kept.

        `hourly_price` is dollars an hour for time that the run itself had no price for.
        """
        rows = summarize_all(views, self._all_known(), hourly_price)
        self._add_states(views, rows)
        return rows


class LocalShelf(Shelf):
    """The checkpoints of a run on this machine.

    Raises:
        CheckpointError: The directory cannot be read.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._config, self._paths = config, RunPaths.of(config)
        directory = self._paths.checkpoints
        try:
            names = find_checkpoints(directory)
            notes = _notes_on_others(directory, names)
        except OSError as exc:
            raise CheckpointError(f"{directory} cannot be read: {exc.strerror or exc}.") from exc
        super().__init__(str(directory), names, notes)
        self._uploads = self._read_journal(self._paths.journal)

    def _read_journal(self, path: Path) -> dict[str, JournalEntry]:
        try:
            return Journal(path).latest()
        except (OSError, RecursionError) as exc:
            self.notes.append(f"upload states are unknown, the journal cannot be read: {exc}")
            return {}

    def _read(self, names: Sequence[CheckpointName], *, brief: bool) -> list[CheckpointView]:
        return read_local_checkpoints(self._paths.checkpoints, self._uploads, names, brief=brief)

    def _all_known(self) -> list[CheckpointView]:
        return self.read(self.names, brief=True)

    def _add_states(self, views: Sequence[CheckpointView], rows: list[dict[str, Any]]) -> None:
        uri, identity = self._config.bucket_uri, find_run_identity(self._paths)
        every = self._all_known()  # which one is kept depends on the others
        run_id = identity.run_id if identity else ""
        found = decide_retention(every, self._config, run_id=run_id, is_uploading_on=bool(uri))
        decisions = {decision.name: decision for decision in found}
        for view, row in zip(views, rows, strict=True):
            row["state"] = describe_state(view, None, uri, NOT_READ)
            row["kept"] = describe_decision(decisions.get(str(view.name)))


class RemoteShelf(Shelf):
    """The checkpoints in an open bucket, by the sidecars beside their archives.

    Raises:
        StorageError: It cannot be listed.
    """

    def __init__(self, where: str, bucket: Bucket) -> None:
        self._bucket = bucket
        self._listing: RemoteListing = list_remote(bucket)
        notes = [
            f"{name} is not listed: it has no sidecar, so its upload is not finished."
            for name in sorted(self._listing.archives.keys() - self._listing.sidecars.keys())
        ]
        super().__init__(where, sorted(self._listing.sidecars), notes)

    def _read(self, names: Sequence[CheckpointName], *, brief: bool) -> list[CheckpointView]:
        return read_sidecars(self._bucket, self._listing, names)

    def read(self, names: Sequence[CheckpointName], *, brief: bool = False) -> list[CheckpointView]:
        """Return checkpoints as `Shelf.read` does; a sidecar is always read whole."""
        return super().read(names)

    def _all_known(self) -> list[CheckpointView] | None:
        is_read = all((name, False) in self._views for name in self.names)
        return self.read(self.names) if is_read else None  # each sidecar is a request

    def _add_states(self, views: Sequence[CheckpointView], rows: list[dict[str, Any]]) -> None:
        for view, row in zip(views, rows, strict=True):
            row["state"] = describe_state(None, view, self._bucket.uri, None)
            row["kept"] = ""


@contextlib.contextmanager
def open_shelf(
    config: TrainingConfig, *, is_remote: bool = False, place: str | None = None
) -> Iterator[Shelf]:
    """Open the checkpoints of a run on this machine, or in its bucket.

    `place` is a bucket to use instead of the configuration's.

    Raises:
        UsageError: The configuration names no bucket.
        CheckpointError: The directory cannot be read.
        StorageError: The bucket cannot be listed.
    """
    if not is_remote:
        yield LocalShelf(config)
        return
    uri = place or config.bucket_uri
    if not uri:
        raise UsageError("--remote: this configuration has no checkpoint_uri.")
    bucket = open_bucket(uri, config.gcs_user_project, _RETRY_SECONDS)
    with contextlib.closing(bucket):
        yield RemoteShelf(uri, bucket)


def _notes_on_others(directory: Path, complete: Sequence[CheckpointName]) -> list[str]:
    """Name what is called like a checkpoint but was never committed, and runs below this one."""
    if not directory.is_dir():
        return []
    known = {str(name) for name in complete}
    others = sorted(entry.name for entry in os.scandir(directory) if entry.name not in known)
    notes = [
        f"{name} is not listed: it has no {MANIFEST_FILE}, so it is incomplete."
        for name in others
        if parse_checkpoint_name(name)
    ]
    for name in others if complete else []:
        below = directory / name
        if (below / RUN_FILE).is_file():
            count = len(find_checkpoints(below))
            notes.append(
                f"{below} is another run with {count_of(count, 'checkpoint')}: --run-name {name}."
            )
    return notes
