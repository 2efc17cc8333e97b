"""A witness of crashes, for campaigns: what a straight run made, held against what is there.

straight run; checkpoints, logs and bucket of a run that is killed -> what is wrong
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaigns.findings import Wrong
from utils.base.errors import CheckpointError
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import (
    ARCHIVE_SUFFIX,
    MANIFEST_FILE,
    SAVING_PREFIX,
    CheckpointName,
    Manifest,
    RunPaths,
    archive_object,
    find_checkpoints,
    read_manifest,
    sidecar_object,
)
from utils.checkpoints.store import verify_checkpoint
from utils.remote.listing import read_remote_checkpoints
from utils.storage.open import open_bucket
from utils.tools.proofs.run_comparison import compare_checkpoints, compare_logs, values_by_step

TENSOR_FILES = ("model.safetensors", "pytorch_model.bin", "optimizer.bin", "scheduler.bin")
MAY_GO = (UploadState.VERIFIED, UploadState.SUPERSEDED, UploadState.REMOVED)


@dataclass
class Round:
    """One run that is killed and resumed until its end.

    `committed` are its checkpoints after the last kill, `leftovers` what was unfinished then, as
    `find_leftovers` returns it.
    """

    number: int
    paths: RunPaths
    bucket: Path
    committed: set[CheckpointName] = field(default_factory=set)
    leftovers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        """Step of the newest committed checkpoint, 0 where there is none."""
        return max((name.step for name in self.committed), default=0)


class CrashWitness:
    """Holds rounds against a straight run that has come to its end."""

    def __init__(self, straight: RunPaths, keep_checkpoints: int) -> None:
        self.names: dict[int, CheckpointName] = {}
        """Step -> the checkpoint that is saved there."""
        self.verified = 0
        """Checkpoints that were verified after kills."""
        self._straight, self._keep = straight, keep_checkpoints
        self._checksums: dict[int, dict[str, str]] = {}
        for name in find_checkpoints(straight.checkpoints):
            self.names[name.step] = name
            manifest = read_manifest(straight.checkpoints / str(name))
            self._checksums[name.step] = tensor_checksums(manifest)
        keys = ("loss", "grad_norm", "learning_rate")
        self._logged = {key: values_by_step(straight.metrics, key) for key in keys}
        self._logged["crc32c"] = values_by_step(straight.batches, "crc32c")

    def look_at_start(self, current: Round, begin: int | None) -> Iterator[Wrong]:
        """Look at the step where a start has begun, and whether it has tidied up."""
        if begin != current.newest:
            yield (
                "lost",
                f"it went on from step {begin}, although the newest committed checkpoint was of "
                f"step {current.newest}.",
            )
        left = find_leftovers(current.paths.checkpoints)
        for name, facts in current.leftovers.items():
            if left.get(name) == facts:
                yield "leftover", f"{name} is still there."

    def look(self, current: Round) -> Iterator[Wrong]:
        """Look at everything on disk after a kill, and note it in the round."""
        directory = current.paths.checkpoints
        names = set(find_checkpoints(directory))
        for name in sorted(names):
            yield from self._verify(directory / str(name), name.step)
        yield from self._find_lost(current, names)
        current.committed = names
        current.leftovers = find_leftovers(directory)
        yield from self._compare_logged(current)

    def look_at_the_end(self, current: Round) -> Iterator[Wrong]:
        """Compare a round that came to its end with the straight run, here and in the bucket."""
        yield from self.look(current)
        steps = max(self.names)
        straight, paths, last = self._straight, current.paths, str(self.names[steps])
        comparisons = compare_logs(straight.logs, paths.logs, steps)
        if not (paths.checkpoints / last / MANIFEST_FILE).is_file():
            yield "lost", f"it ended without {last}."
        else:
            comparisons += compare_checkpoints(
                straight.checkpoints / last, paths.checkpoints / last
            )
        for comparison in comparisons:
            for difference in comparison.differences:
                yield "different", f"{comparison.what} {difference}"
        yield from self._look_into_bucket(str(current.bucket), last)

    def _verify(self, checkpoint: Path, step: int) -> Iterator[Wrong]:
        self.verified += 1
        try:
            manifest = verify_checkpoint(checkpoint)
        except CheckpointError as exc:
            yield "corrupt", str(exc)
            return
        if checkpoint.name != str(self.names.get(step)):
            yield "different", f"it has {checkpoint.name}."
        elif tensor_checksums(manifest) != self._checksums[step]:
            yield "corrupt", f"{checkpoint.name} has other tensors."

    def _find_lost(self, current: Round, names: set[CheckpointName]) -> Iterator[Wrong]:
        """Find committed checkpoints that went without the right to."""
        states = Journal(current.paths.journal).latest()
        for name in sorted(current.committed - names):
            newer = sum(other.step > name.step for other in names)
            entry = states.get(str(name))
            if newer < self._keep or entry is None or entry.state not in MAY_GO:
                yield (
                    "lost",
                    f"{name} is gone, {newer} newer ones are there, the journal has it as "
                    f"{entry.state.value if entry else 'unknown'}.",
                )
        for folder in current.paths.set_aside.glob("*"):
            if (folder / MANIFEST_FILE).is_file():
                yield "lost", f"{folder.name} was set aside."

    def _compare_logged(self, current: Round) -> Iterator[Wrong]:
        """Compare every value that a round has logged with the straight run's."""
        for key, straight in self._logged.items():
            file = current.paths.batches if key == "crc32c" else current.paths.metrics
            for step, values in values_by_step(file, key).items():
                if values != straight.get(step):
                    expected = sorted(straight.get(step, ()))
                    yield "different", f"step {step}: {key} {sorted(values)}, not {expected}."

    def _look_into_bucket(self, uri: str, last: str) -> Iterator[Wrong]:
        """Compare every archive with its sidecar, and the sidecar with the straight run."""
        bucket = open_bucket(uri)
        views = read_remote_checkpoints(bucket)
        if last not in [str(view.name) for view in views]:
            yield "lost", f"{last} is not in the bucket."
        for view in views:
            sidecar = json.loads(bucket.read_bytes(sidecar_object(str(view.name))))
            stored = bucket.crc32c(archive_object(str(view.name))) if not view.problem else ""
            sums = {} if view.manifest is None else tensor_checksums(view.manifest)
            is_same = sums == self._checksums.get(view.name.step)
            if stored != sidecar["archive"]["crc32c"] or not is_same:
                problem = view.problem or "by its checksums"
                yield (
                    "different",
                    f"{view.name} in the bucket is not what it should be ({problem}).",
                )


def find_leftovers(directory: Path) -> dict[str, tuple[int, int]]:
    """Return unfinished saves, deletions and archives of a directory: name -> inode and ctime.

    A new one may have the name of an old one, and its inode.
    """
    if not directory.is_dir():
        return {}
    found = {}
    for path in directory.iterdir():
        if path.name.startswith(SAVING_PREFIX) or path.name.endswith(ARCHIVE_SUFFIX):
            with contextlib.suppress(FileNotFoundError):  # the run that is watched may remove it
                facts = path.stat()
                found[path.name] = facts.st_ino, facts.st_ctime_ns
    return found


def tensor_checksums(manifest: Manifest) -> dict[str, str]:
    """Return the checksums of the files whose bytes depend on the training alone."""
    return {name: manifest.files[name].crc32c for name in TENSOR_FILES if name in manifest.files}
