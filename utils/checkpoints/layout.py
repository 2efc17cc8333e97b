"""Names, paths, run ids and manifests: what lies where, read and written in one way.

    output_dir/[run_name/]
        checkpoint-epoch{E}-step{S}-files{F}/   committed when manifest.json is in it
        .saving-*                               a save in progress, or what a crash left of one
        set-aside/                              older branches, damaged and foreign checkpoints
        uploads.jsonl  run.json  .lock
    logging_dir/[run_name/]
        metrics.jsonl  samples.jsonl  train.log  evaluations.jsonl  RUN_ID[-branchN]/
    bucket/[run_name/]Checkpoints/
        NAME.tar.gz (or .tar.zst)  NAME.json

Guarantees: a name from outside (command line, bucket, archive) passes `parse_checkpoint_name`
before it becomes part of a path; a manifest is written last and read strictly. No torch here.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.model_config import CONFIG_FILE
from configs.training_config import TrainingConfig
from utils.base.archive_formats import ARCHIVE_SUFFIXES, Gzip
from utils.base.errors import CheckpointError, UsageError
from utils.base.files import read_regular_file
from utils.base.text import FOREIGN_ERRORS, parse_json

CHECKPOINT_PREFIX = "checkpoint-"
MANIFEST_FILE = "manifest.json"
METADATA_FILE = "metadata.json"
METRICS_HISTORY_FILE = "training_metrics.json"
DATA_STATE_FILE = "data_state.json"
SAFE_WEIGHTS_FILE = "model.safetensors"
BIN_WEIGHTS_FILE = "pytorch_model.bin"
RANDOM_STATES_PREFIX = "random_states_"
BATCHES_FILE = "batches.jsonl"
JOURNAL_FILE = "uploads.jsonl"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
REMOTE_FOLDER = "Checkpoints"
ARCHIVE_SUFFIX = Gzip.suffix  # of an archive whose sidecar does not name one
UPLOAD_LOCK_PREFIX = ".uploading-"
SAVING_PREFIX = ".saving-"
DOWNLOAD_PREFIX = f"{SAVING_PREFIX}download-"
SET_ASIDE_FOLDER = "set-aside"
MANIFEST_FORMAT = 1
MAX_SIDECAR_BYTES = 64 * 2**20

_CHECKPOINT_NAME = re.compile(
    rf"{CHECKPOINT_PREFIX}epoch(\d{{1,9}})-step(\d{{1,12}})-files(\d{{1,9}})"
)
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """The three numbers in a checkpoint's name; ordered by step first."""

    step: int
    epoch: int
    files: int

    def __str__(self) -> str:
        return f"{CHECKPOINT_PREFIX}epoch{self.epoch}-step{self.step}-files{self.files}"


def parse_checkpoint_name(text: str) -> CheckpointName | None:
    """Return the numbers in a checkpoint's name, or None where `text` is not exactly one."""
    match = _CHECKPOINT_NAME.fullmatch(text)
    if match is None:
        return None
    epoch, step, files = (int(group) for group in match.groups())
    name = CheckpointName(step=step, epoch=epoch, files=files)
    return name if str(name) == text else None


def require_checkpoint_name(text: str) -> CheckpointName:
    """Return the numbers in a checkpoint's name.

    Raises:
        UsageError: `text` is not a checkpoint's name.
    """
    name = parse_checkpoint_name(text)
    if name is None:
        raise UsageError(
            f"{text!r} is not a checkpoint name (checkpoint-epoch0-step50-files0, latest or best)."
        )
    return name


@dataclass(frozen=True)
class RunPaths:
    """Where one run keeps its things on this machine.

    The journal and the lock lie beside the checkpoints, TensorBoard's events with the logs.
    """

    checkpoints: Path
    logs: Path
    cache: Path

    @classmethod
    def of(cls, config: TrainingConfig) -> RunPaths:
        """Return the paths that a configuration asks for, relative to the current directory."""
        folder = validate_run_name(config.run_name)
        return cls(
            checkpoints=Path(config.output_dir) / folder,
            logs=Path(config.logging_dir) / folder,
            cache=Path(config.cache_dir) / folder,
        )

    @property
    def journal(self) -> Path:
        """What happened to each checkpoint after its commit."""
        return self.checkpoints / JOURNAL_FILE

    @property
    def run_file(self) -> Path:
        """Which run and branch last wrote here."""
        return self.checkpoints / RUN_FILE

    @property
    def lock(self) -> Path:
        """Held by the trainer that works in this directory."""
        return self.checkpoints / ".lock"

    @property
    def set_aside(self) -> Path:
        """Checkpoints that are kept but no longer part of this branch."""
        return self.checkpoints / SET_ASIDE_FOLDER

    @property
    def metrics(self) -> Path:
        """Everything that was logged, one JSON object a line."""
        return self.logs / METRICS_FILE

    @property
    def batches(self) -> Path:
        """Checksums of each step's tokens, where `record_batches` asks for them."""
        return self.logs / BATCHES_FILE

    @property
    def samples(self) -> Path:
        """Texts that the model wrote at its evaluations, one JSON object a line."""
        return self.logs / "samples.jsonl"

    @property
    def evaluations(self) -> Path:
        """What evaluate.py measured, one JSON object a line."""
        return self.logs / "evaluations.jsonl"

    @property
    def train_log(self) -> Path:
        """The log lines of every attempt of this run."""
        return self.logs / "train.log"


def validate_run_name(run_name: str) -> str:
    """Return `run_name` if it is safe as a folder and an object prefix.

    Raises:
        UsageError: It could leave its folder or confuse a tool.
    """
    if run_name and not _RUN_NAME.fullmatch(run_name):
        raise UsageError(
            f"run_name {run_name!r} may hold letters, digits, '.', '_' and '-' only, at most 100, "
            "and begins with a letter or digit."
        )
    return run_name


def archive_object(name: str, suffix: str = ARCHIVE_SUFFIX) -> str:
    """Return the object name of a checkpoint's archive, relative to the run's bucket URI."""
    return f"{REMOTE_FOLDER}/{name}{suffix}"


def strip_archive_suffix(text: str) -> str:
    """Return the name of the checkpoint whose archive is called `text`; other texts as they are."""
    for suffix in ARCHIVE_SUFFIXES:
        if text.endswith(suffix):
            return text.removesuffix(suffix)
    return text


def sidecar_object(name: str) -> str:
    """Return the object name of the manifest and metadata beside the archive."""
    return f"{REMOTE_FOLDER}/{name}.json"


def new_run_id() -> str:
    """Return an id for a new run: the UTC date and 8 random hex digits."""
    return f"{time.strftime('%Y%m%d', time.gmtime())}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class RunIdentity:
    """Which run a checkpoint belongs to.

    Attributes:
        run_id: Id of the run.
        branch: How often it was resumed from an older checkpoint than its newest.
        forks: The branches that it comes from, oldest first and itself last, as (branch, step at
            which it began); empty for a run that never branched. What a branch did after the step
            where the next one left it is not part of this one.
    """

    run_id: str
    branch: int = 0
    forks: tuple[tuple[int, int], ...] = ()

    def fork(self, step: int, taken: Iterable[int] = ()) -> RunIdentity:
        """Return the identity of a new branch that leaves this one at `step`.

        `taken` are the branch numbers that the run has used already.
        """
        branch = max([self.branch, *taken]) + 1
        forks = self.forks or ((self.branch, 0),)
        return RunIdentity(self.run_id, branch, (*forks, (branch, step)))

    def includes(self, other: RunIdentity, step: int) -> bool:
        """Tell whether a checkpoint that `other` wrote at `step` is part of this branch."""
        if other.run_id != self.run_id:
            return False
        line = [branch for branch, _ in self.forks] or [self.branch]
        if other.branch not in line:
            return False
        later = self.forks[line.index(other.branch) + 1 :]
        return all(step <= begin for _, begin in later)

    def to_json(self) -> dict[str, Any]:
        """Return the identity as it is written."""
        return {**asdict(self), "forks": [list(fork) for fork in self.forks]}

    @classmethod
    def from_json(cls, value: Any) -> RunIdentity:
        """Return the identity in `value`; raises the errors of a malformed JSON value."""
        return cls(str(value["run_id"]), int(value["branch"]), _parse_forks(value))


def _parse_forks(value: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(branch), int(step)) for branch, step in value.get("forks", []))


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and base64 crc32c of one file of a checkpoint, or of its archive."""

    size: int
    crc32c: str


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint consists of.

    `files` are all others of the checkpoint. Each of the `world_size` ranks has a random state
    file. `branch` and `forks` are those of `RunIdentity`.
    """

    run_id: str
    step: int
    branch: int
    world_size: int
    files: dict[str, FileEntry] = field(default_factory=dict)
    forks: tuple[tuple[int, int], ...] = ()

    @property
    def identity(self) -> RunIdentity:
        """Run and branch that wrote it."""
        return RunIdentity(self.run_id, self.branch, self.forks)

    @property
    def total_bytes(self) -> int:
        """Sum of the sizes of all files."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as it is written."""
        forks = [list(fork) for fork in self.forks]
        return {"format": MANIFEST_FORMAT, **asdict(self), "forks": forks}

    @classmethod
    def from_json(cls, value: object, source: str) -> Manifest:
        """Return the manifest in `value`.

        Raises:
            CheckpointError: It is not a manifest of a known format.
        """
        try:
            if not isinstance(value, dict) or value["format"] != MANIFEST_FORMAT:
                raise ValueError(f"format {MANIFEST_FORMAT} expected")
            files = {
                _plain_file_name(name): FileEntry(int(entry["size"]), str(entry["crc32c"]))
                for name, entry in value["files"].items()
            }
            return cls(
                run_id=str(value["run_id"]),
                step=int(value["step"]),
                branch=int(value["branch"]),
                world_size=int(value["world_size"]),
                files=files,
                forks=_parse_forks(value),
            )
        except FOREIGN_ERRORS as exc:
            raise CheckpointError(f"{source} is not a usable manifest: {exc}.") from exc


def _plain_file_name(name: str) -> str:
    if "/" in name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"file name {name!r}")
    return name


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint directory.

    Raises:
        CheckpointError: There is none, so the checkpoint is incomplete, or it cannot be read.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        return Manifest.from_json(read_json(path), str(path))
    except FileNotFoundError as exc:
        text = f"{checkpoint} is incomplete: it has no {MANIFEST_FILE}."
        if not parse_checkpoint_name(checkpoint.name) and (checkpoint / CONFIG_FILE).is_file():
            text += f" To begin a new run with this model: --set init_from={checkpoint}."
        raise CheckpointError(text) from exc
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}.") from exc


def find_checkpoints(directory: Path) -> list[CheckpointName]:
    """Return the committed checkpoints of a directory, by step, without verifying them."""
    try:
        names = [parse_checkpoint_name(entry.name) for entry in os.scandir(directory)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # For 1,000 checkpoints, Path objects would take longer than the disk.
    manifests = {name: f"{directory}/{name}/{MANIFEST_FILE}" for name in names if name}
    return sorted(name for name, path in manifests.items() if os.path.isfile(path))  # noqa: PTH113


def upload_lock(checkpoint: Path) -> Path:
    """Return the lock that is held while a checkpoint is uploaded."""
    return checkpoint.with_name(f"{UPLOAD_LOCK_PREFIX}{checkpoint.name}.lock")


def local_archive(checkpoint: Path, suffix: str = ARCHIVE_SUFFIX) -> Path:
    """Return where a checkpoint's archive lies while a transport needs it on this machine."""
    return checkpoint.with_name(f"{SAVING_PREFIX}{checkpoint.name}{suffix}")


def read_json(path: Path) -> Any:
    """Return a JSON file's value.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON.
    """
    return parse_json(read_regular_file(path))


def json_file_text(
    value: object, *, indent: int | None = 1, default: Callable[[Any], object] | None = None
) -> str:
    """Return what a JSON file of ours holds; a value that was read from one gives its text again.

    Readers of a sidecar count on that: it has the values of files whose checksums are known.
    """
    return f"{json.dumps(value, indent=indent, default=default)}\n"


def write_json(path: Path, value: object, *, indent: int | None = 1) -> None:
    """Write a JSON file and sync it; the caller syncs the directory."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json_file_text(value, indent=indent))
        file.flush()
        os.fsync(file.fileno())
