"""A witness of uploads, for campaigns: what must be here and there, held against what is.

    what was saved, checkpoint directory, journal, objects of the bucket -> what is wrong

It shares no verdict with the uploader: it knows every byte that was saved, follows the journal line
by line, reads archives with Python's own tarfile and compares. No torch here.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tests.campaigns.findings import Wrong
from utils.base.errors import CheckpointError
from utils.base.text import printable
from utils.checkpoints.journal import UploadState
from utils.checkpoints.layout import (
    ARCHIVE_SUFFIX,
    MANIFEST_FILE,
    CheckpointName,
    FileEntry,
    archive_object,
    find_checkpoints,
    parse_checkpoint_name,
    sidecar_object,
)
from utils.checkpoints.store import verify_checkpoint
from utils.storage.bucket import crc32c_of_bytes, crc32c_of_file

KINDS = {
    "corrupt": "a checkpoint, or an archive beside its sidecar, that is not what was saved",
    "lost": "neither on the disk, nor whole in the bucket, nor given up by the rules",
    "unverified": "said to be in the bucket without being there; or owed, or half, at the end",
    "leftover": "what an upload, a save or a start has left behind",
    "growth": "of memory, threads, files or the journal",
    "failed": "a start that ended as it must not, or hung",
}
# Four lines of a checkpoint are kept, and some more of the last start.
JOURNAL_BYTES_EACH, JOURNAL_BYTES = 4096, 2**16
# Between a decision of the retention and its line, one upload may have begun.
RACES = 1
OWN_FILES = ("uploads.jsonl", "uploads.jsonl.lock", ".lock", ".lock.owner")
WAITING = (UploadState.QUEUED, UploadState.FAILED)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint is: its validation loss, and size and checksum of each file."""

    loss: float
    files: dict[str, FileEntry]


class UploadWitness:
    """Follows one run from start to start.

    Args:
        directory: Its checkpoints.
        list_objects: Object name -> file that holds the bytes, of everything in the bucket.
        saved_at: Returns what the checkpoint of a step must be.
        keep_checkpoints: Of the run's configuration.
        max_unverified: Of the run's configuration.
    """

    def __init__(
        self,
        directory: Path,
        list_objects: Callable[[], dict[str, Path]],
        saved_at: Callable[[int], Saved],
        *,
        keep_checkpoints: int,
        max_unverified: int,
    ) -> None:
        self.saved: set[CheckpointName] = set()
        """Every checkpoint that was ever committed."""
        self.states: dict[CheckpointName, UploadState] = {}
        """Its last state in the journal."""
        self.lines: Counter[UploadState] = Counter()
        """Lines of the journal."""
        self.given_up: set[CheckpointName] = set()
        """Those that the retention gave up."""
        self.orphans: set[str] = set()
        """Archives of such ones, without a sidecar, at the end."""
        self._directory, self._list_objects, self._saved_at = directory, list_objects, saved_at
        self._keep, self._max_unverified = keep_checkpoints, max_unverified
        self._known_lines: set[bytes] = set()
        self._whole: dict[CheckpointName, tuple[object, ...]] = {}

    def look(self) -> list[Wrong]:
        """Return what is wrong after a start, however it ended."""
        local = set(find_checkpoints(self._directory))
        self.saved |= local
        wrong = list(self._follow_journal())
        wrong += self._check_directory(local)
        objects = self._list_objects()
        whole, problems = self._check_bucket(objects)
        wrong += problems
        for name, state in sorted(self.states.items()):
            if state is UploadState.VERIFIED and name not in whole:
                wrong.append(("unverified", f"{name}: the journal has it, the bucket has not."))
        wrong += self._find_lost(local, whole)
        return wrong

    def look_at_the_end(self) -> list[Wrong]:
        """Return what is wrong after a start that nothing disturbed; every byte is read again."""
        self._whole.clear()
        wrong = self.look()
        local, objects = find_checkpoints(self._directory), self._list_objects()
        whole, _ = self._check_bucket(objects)
        for name in sorted(self.saved - self.given_up - whole):
            wrong.append(("unverified", f"{name} is not whole in the bucket at the end."))
        for name in local:
            state = self.states.get(name)
            if state is not UploadState.VERIFIED:
                said = state.value if state else "unknown"
                wrong.append(("unverified", f"{name} is on the disk, and {said} at the end."))
        wrong += self._find_leftovers(objects, whole)
        wrong += self._weigh_journal()
        return wrong

    # The journal.

    def _follow_journal(self) -> Iterator[Wrong]:
        """Go through the lines that are new; compaction only takes lines away."""
        path = self._directory / "uploads.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for line in lines:
            entry = _parse(line) if line not in self._known_lines else None
            if entry is None:
                continue
            name, state = entry
            if state is UploadState.SUPERSEDED:
                self.given_up.add(name)
                yield from self._check_given_up(name)
            self.states[name] = state
            self.lines[state] += 1
        self._known_lines = set(lines)

    def _check_given_up(self, name: CheckpointName) -> Iterator[Wrong]:
        """Compare with the rule: past `max_unverified`, the oldest of those that wait."""
        known = sorted(self.states)
        spared = {*known[-self._keep :], self._best(known)}
        waiting = [n for n in known if n not in spared and self.states[n] in WAITING]
        if name not in waiting:
            state = self.states.get(name)
            yield "lost", f"{name} was given up, although it was {state.value if state else 'new'}."
        elif waiting.index(name) > RACES:
            yield "lost", f"{name} was given up before {waiting[0]}, which is older."
        elif len(waiting) + RACES <= self._max_unverified:
            yield "lost", f"{name} was given up, although only {len(waiting)} waited."

    def _weigh_journal(self) -> Iterator[Wrong]:
        path = self._directory / "uploads.jsonl"
        size, count = path.stat().st_size if path.is_file() else 0, len(self.saved)
        limit = JOURNAL_BYTES + JOURNAL_BYTES_EACH * count
        if size > limit:
            yield "growth", f"the journal of {count} checkpoints has {size} bytes, above {limit}."

    # The disk.

    def _check_directory(self, local: set[CheckpointName]) -> Iterator[Wrong]:
        for name in sorted(local):
            try:
                files = verify_checkpoint(self._directory / str(name)).files
            except CheckpointError as exc:
                yield "corrupt", str(exc)
                continue
            if files != self._saved_at(name.step).files:
                yield "corrupt", f"{name} on the disk is not what was saved."

    def _find_lost(self, local: set[CheckpointName], whole: set[CheckpointName]) -> Iterator[Wrong]:
        spared = {*sorted(self.saved)[-self._keep :], self._best(sorted(self.saved))}
        for name in sorted(self.saved - local):
            state = self.states.get(name)
            said = f"the journal has it as {state.value if state else 'unknown'}"
            if name in spared:
                yield "lost", f"{name} is gone, one of the newest {self._keep} or the best; {said}."
            elif name not in whole and name not in self.given_up:
                yield "lost", f"{name} is neither on the disk nor in the bucket; {said}."

    def _best(self, names: list[CheckpointName]) -> CheckpointName | None:
        return min(names, key=lambda name: self._saved_at(name.step).loss, default=None)

    # The bucket.

    def _check_bucket(self, objects: dict[str, Path]) -> tuple[set[CheckpointName], list[Wrong]]:
        """Return the checkpoints that are whole, and what is wrong with others with a sidecar."""
        whole, wrong = set(), []
        for name in _find_sidecars(objects):
            problem = self._check_archive(name, objects)
            if problem is None:
                whole.add(name)
            else:
                wrong.append(("corrupt", f"{name} in the bucket: {problem}."))
        return whole, wrong

    def _check_archive(self, name: CheckpointName, objects: dict[str, Path]) -> str | None:
        """Return what is wrong with an archive that has a sidecar, None where nothing is."""
        path = objects.get(archive_object(str(name)))
        if path is None:
            return "a sidecar without an archive"
        sidecar = objects[sidecar_object(str(name))].read_bytes()
        facts = path.stat()
        version = (str(path), facts.st_mtime_ns, facts.st_size, sidecar)
        if self._whole.get(name) == version:
            return None
        problem = _compare_archive(name, path, sidecar, self._saved_at(name.step).files)
        if problem is None:
            self._whole[name] = version
        return problem

    def _find_leftovers(
        self, objects: dict[str, Path], whole: set[CheckpointName]
    ) -> Iterator[Wrong]:
        for path in sorted(self._directory.glob("*")):
            if parse_checkpoint_name(path.name) is None and path.name not in OWN_FILES:
                yield "leftover", f"{path.name} is left beside the checkpoints."
        usual = {f(str(name)) for name in whole for f in (archive_object, sidecar_object)}
        for object_name in sorted(objects.keys() - usual):
            base = PurePosixPath(object_name).name.removesuffix(ARCHIVE_SUFFIX)
            name = parse_checkpoint_name(base)
            if name is None or archive_object(base) != object_name:
                yield "leftover", f"{object_name} is left in the bucket."
            elif name in self.given_up:
                self.orphans.add(object_name)
            else:
                yield "unverified", f"{object_name} is in the bucket without a sidecar."


def _parse(line: bytes) -> tuple[CheckpointName, UploadState] | None:
    """Return what a line of the journal says; None for one that a kill has torn."""
    try:
        value: Any = json.loads(line)
        name = parse_checkpoint_name(value["checkpoint"])
        return None if name is None else (name, UploadState(value["state"]))
    except (ValueError, KeyError, TypeError):
        return None


def _find_sidecars(objects: dict[str, Path]) -> list[CheckpointName]:
    """Return the checkpoints of which there is a sidecar directly below `Checkpoints/`."""
    names = (parse_checkpoint_name(PurePosixPath(name).stem) for name in objects)
    return sorted({name for name in names if name and sidecar_object(str(name)) in objects})


def _compare_archive(
    name: CheckpointName, path: Path, sidecar: bytes, files: dict[str, FileEntry]
) -> str | None:
    """Return how an archive differs from its sidecar and from what was saved."""
    try:
        value = json.loads(sidecar)
        said = FileEntry(value["archive"]["size"], value["archive"]["crc32c"])
    except (ValueError, KeyError, TypeError) as exc:
        return f"its sidecar cannot be read ({exc})"
    found = FileEntry(path.stat().st_size, crc32c_of_file(path))
    if found != said:
        return f"the archive is {found}, its sidecar says {said}"
    try:
        unpacked = dict(_unpack(path, str(name)))
    except (tarfile.TarError, OSError, EOFError) as exc:
        return f"the archive cannot be unpacked ({printable(exc)})"
    manifest = unpacked.pop(MANIFEST_FILE, None)
    if {file: FileEntry(len(d), crc32c_of_bytes(d)) for file, d in unpacked.items()} != files:
        return f"the archive holds {sorted(unpacked)}, not what was saved"
    if manifest is None or json.loads(manifest) != value["manifest"]:
        return "the manifest in the archive is not that of the sidecar"
    return None


def _unpack(path: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is None or not member.name.startswith(f"{folder}/"):
                raise tarfile.TarError(f"{member.name} does not belong into it")
            yield member.name.removeprefix(f"{folder}/"), content.read()
