"""Checkpoints as the scripts show them, read from disk or bucket.

    manifest.json, metadata.json, journal, sidecar -> CheckpointView -> viewer, manager, monitor

Readers never stop at a bad file: what can be read is returned, what cannot is named in `problem`.
No torch here: 1,000 checkpoints list in 0.5 s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.config_files import TRAINING_CONFIG_FILE
from utils.base.errors import CheckpointError, StorageError, UsageError
from utils.base.files import read_regular_file
from utils.base.text import (
    FOREIGN_ERRORS,
    did_you_mean,
    number,
    parse_json,
    parse_json_object,
    printable,
)
from utils.base.uri import local_path, normalize_uri
from utils.checkpoints.journal import Journal, JournalEntry, UploadState
from utils.checkpoints.layout import (
    JOURNAL_FILE,
    MANIFEST_FILE,
    MAX_SIDECAR_BYTES,
    METADATA_FILE,
    CheckpointName,
    Manifest,
    find_checkpoints,
    json_file_text,
    parse_checkpoint_name,
    sidecar_object,
)
from utils.storage.bucket import Bucket, ObjectInfo, crc32c_of_bytes

_NUM_SHOWN = 5  # names in an error

# The numbers that a history begins with, to the last comma after them. Its name ends with a bare
# quote, so this never matches within a JSON string.
_LONG_HISTORY = re.compile(rb'("(?:loss_history|learning_rates)":\s*\[)[-+.,0-9eE\sNaInfityul]*,')

_LIKENESS = 0.8  # `bert`, a model of the Hub, is less like `best`


@dataclass(frozen=True)
class CheckpointView:
    """One checkpoint as the scripts see it.

    `metadata` is empty and `manifest` None where they cannot be read; `path` is None for one that
    is only in the bucket. `upload` is the newest journal entry about it, `archive_bytes` the size
    in the bucket. `problem` says what is wrong with it, None where nothing is. `manifest_crc32c` is
    that of `manifest.json` as it was read, `config` the configuration that a sidecar has.
    """

    name: CheckpointName
    metadata: dict[str, Any]
    manifest: Manifest | None
    path: Path | None = None
    upload: JournalEntry | None = None
    archive_bytes: int | None = None
    problem: str | None = None
    manifest_crc32c: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """Mean training loss since the last log line before the save."""
        return number(self.metadata.get("current_loss"))

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the last step; of older checkpoints that of their last log line."""
        rates = self.metadata.get("learning_rates")
        logged = rates[-1] if isinstance(rates, list) and rates else None
        return number(self.metadata.get("current_learning_rate", logged))

    @property
    def validation_loss(self) -> float | None:
        """Validation loss at the save."""
        metrics = self.metadata.get("validation_metrics")
        return number(metrics.get("validation_loss")) if isinstance(metrics, dict) else None

    @property
    def total_bytes(self) -> int | None:
        """Bytes of its files on disk."""
        return None if self.manifest is None else self.manifest.total_bytes


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file that may be damaged or foreign.

    Raises:
        CheckpointError: It is missing, no regular file, too large, or not a JSON object.
    """
    return _parse_object(path.name, _read_file(path.name, str(path)))


def read_json_part(path: Path, manifest: Manifest | None) -> tuple[dict[str, Any], str | None]:
    """Return (a JSON file of a checkpoint as far as it can be read, what is wrong with it)."""
    try:
        data = _read_file(path.name, str(path))
        value = _parse_object(path.name, data)
    except CheckpointError as exc:
        return {}, str(exc)
    return value, find_file_damage(path.name, data, manifest)


def find_file_damage(name: str, data: bytes, manifest: Manifest | None) -> str | None:
    """Say why a file of a checkpoint is not what was written; None where nothing says so."""
    entry = manifest.files.get(name) if manifest is not None else None
    if entry is None or crc32c_of_bytes(data) == entry.crc32c:
        return None
    return f"{name} is damaged (its crc32c is not the manifest's)"


def find_sidecar_damage(metadata: object, manifest: Manifest) -> str | None:
    """Say why the metadata in a sidecar are not those of the archive; None where they are."""
    data = json_file_text(metadata).encode("utf-8")
    damage = find_file_damage(METADATA_FILE, data, manifest)
    return damage and f"its metadata are not those that its manifest vouches for ({METADATA_FILE})"


def _read_file(name: str, path: str) -> bytes:
    try:
        return read_regular_file(path)
    except FileNotFoundError as exc:
        raise CheckpointError(f"{name} is missing") from exc
    except (OSError, ValueError) as exc:  # a zero byte in the path
        reason = getattr(exc, "strerror", None) or exc
        raise CheckpointError(f"{name} cannot be read ({reason})") from exc


def _parse_object(name: str, data: bytes) -> dict[str, Any]:
    try:
        return parse_json_object(data)
    except ValueError as exc:
        raise CheckpointError(f"{name} cannot be read ({exc})") from exc


def is_verified_in(
    uri: str, checkpoint: Path, entry: JournalEntry | None, manifest_crc32c: str | None = None
) -> bool:
    """Tell whether the journal has these very files of a checkpoint as verified in this bucket.

    A name alone says too little: another branch may have written it, or another bucket hold it.

    `manifest_crc32c` is that of its manifest, where that has been read already.
    """
    if entry is None or entry.state is not UploadState.VERIFIED:
        return False
    if "manifest_crc32c" not in entry.details:
        return True  # the entry names no files
    if entry.details.get("bucket") != normalize_uri(uri):
        return False
    try:
        found = manifest_crc32c or crc32c_of_bytes(read_regular_file(checkpoint / MANIFEST_FILE))
    except (OSError, ValueError):
        return False
    return bool(entry.details["manifest_crc32c"] == found)


def read_local_checkpoints(
    directory: Path,
    uploads: Mapping[str, JournalEntry] | None = None,
    names: Iterable[CheckpointName] | None = None,
    *,
    brief: bool = False,
) -> list[CheckpointView]:
    """Return the committed checkpoints of an output directory, by step, or those of these names.

    `uploads` has the newest journal entry of each checkpoint; None reads the journal there. `brief`
    is as in `read_local_checkpoint`.

    Raises:
        OSError: The journal is there and cannot be read.
    """
    if uploads is None:
        uploads = Journal(directory / JOURNAL_FILE).latest()
    views = []
    for name in find_checkpoints(directory) if names is None else names:
        path = directory / str(name)
        view = read_local_checkpoint(path, uploads.get(path.name), brief=brief)
        # Retention may delete one between the listing and the reading; its manifest goes first.
        if view.manifest is not None or (path / MANIFEST_FILE).exists():
            views.append(view)
    return views


def read_local_checkpoint(
    path: Path, upload: JournalEntry | None = None, *, brief: bool = False
) -> CheckpointView:
    """Return one checkpoint directory as far as it can be read.

    `upload` is the newest journal entry about it. `brief` reads only the last entry of each history
    in its metadata: a quarter of the time.

    Raises:
        CheckpointError: The directory's name is not a checkpoint's.
    """
    name = parse_checkpoint_name(path.name)
    if name is None:
        raise CheckpointError(f"{path} is not a checkpoint directory.")
    problems, manifest, metadata = [], None, {}
    crc32c = None
    directory = str(path)  # of 1,000 checkpoints, Path objects take as long as reading
    try:
        source = f"{directory}/{MANIFEST_FILE}"
        data = _read_file(MANIFEST_FILE, source)
        crc32c = crc32c_of_bytes(data)
        manifest = Manifest.from_json(_parse_object(MANIFEST_FILE, data), source)
        if manifest.step != name.step:
            problems.append(f"its manifest is of step {manifest.step}")
    except CheckpointError as exc:
        problems.append(str(exc))
    try:
        data = _read_file(METADATA_FILE, f"{directory}/{METADATA_FILE}")
        short = _LONG_HISTORY.sub(rb"\1", data) if brief else data
        metadata = _parse_object(METADATA_FILE, short)
        damage = find_file_damage(METADATA_FILE, data, manifest)
        problems += [damage] if damage else []
    except CheckpointError as exc:
        problems.append(str(exc))
    problem = "; ".join(problems) or None
    return CheckpointView(
        name, metadata, manifest, path, upload, problem=problem, manifest_crc32c=crc32c
    )


def read_remote_checkpoint(
    bucket: Bucket, name: CheckpointName, archive: ObjectInfo | None
) -> CheckpointView:
    """Return one checkpoint of a run's bucket as far as its sidecar can be read.

    `archive` is what the bucket says of its archive, None where there is none.
    """
    object_name = sidecar_object(str(name))
    archive_bytes = None if archive is None else archive.size
    try:
        data = bucket.read_bytes(object_name, 0, MAX_SIDECAR_BYTES + 1)
        if len(data) > MAX_SIDECAR_BYTES:
            raise ValueError(f"it has more than {MAX_SIDECAR_BYTES} bytes")
        sidecar = parse_json(data)
        manifest = Manifest.from_json(sidecar["manifest"], object_name)
        metadata = sidecar["metadata"] if isinstance(sidecar.get("metadata"), dict) else {}
        problem = find_sidecar_damage(sidecar.get("metadata"), manifest)
        problem = problem or _archive_problem(sidecar.get("archive"), archive)
        config = _vouched_config(sidecar, manifest)
        return CheckpointView(
            name, metadata, manifest, archive_bytes=archive_bytes, problem=problem, config=config
        )
    except (StorageError, CheckpointError, *FOREIGN_ERRORS) as exc:
        reason = f"{object_name}: {exc or type(exc).__name__}"
        return CheckpointView(name, {}, None, archive_bytes=archive_bytes, problem=reason)


def _vouched_config(sidecar: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Return the configuration in a sidecar; empty where it is not that of the archive."""
    config = sidecar.get("config")
    data = json_file_text(config).encode("utf-8")
    if not isinstance(config, dict) or find_file_damage(TRAINING_CONFIG_FILE, data, manifest):
        return {}
    return config


def _archive_problem(told: object, archive: ObjectInfo | None) -> str | None:
    """Return what is wrong with an archive: does its sidecar describe what the bucket has?"""
    if archive is None:
        return "its archive is not in the bucket"
    if not isinstance(told, dict):
        return "its sidecar does not describe its archive"
    found = (archive.size, archive.crc32c or told.get("crc32c"))
    if found != (told.get("size"), told.get("crc32c")):
        return "its archive is not the one that its sidecar describes"
    return None


def find_best(views: Iterable[CheckpointView]) -> CheckpointView | None:
    """Return the checkpoint with the lowest validation loss (training loss where none has one).

    Damaged ones are chosen only where no other has a loss.
    """
    known = list(views)
    for candidates in ([view for view in known if view.problem is None], known):
        scored = [(view.validation_loss, view) for view in candidates]
        if all(score is None for score, _ in scored):
            scored = [(view.loss, view) for view in candidates]
        ranked = [(score, -view.name.step, view) for score, view in scored if score is not None]
        if ranked:
            return min(ranked, key=lambda item: item[:2])[2]
    return None


def find_latest_view(views: Sequence[CheckpointView]) -> CheckpointView | None:
    """Return the newest checkpoint without a known problem, else the newest, else None."""
    candidates = [view for view in views if view.problem is None] or views
    return candidates[-1] if candidates else None


def describe_lack(where: str) -> str:
    """Say that a place has no checkpoints, or that there is no such directory."""
    path = local_path(where)
    if path is not None:
        where = str(path.absolute())  # a wrong folder is seen as one
        if not os.path.lexists(path):
            return f"{where} does not exist."
    return f"No checkpoints in {where}."


def select_checkpoint(text: str, views: Sequence[CheckpointView]) -> CheckpointView:
    """Return the checkpoint that a user means: `latest`, `best`, or a text for `choose_name`.

    Raises:
        UsageError: There is none, or more than one; the message lists what there is.
    """
    chosen = None
    if text == "latest":
        chosen = find_latest_view(views)
    elif text == "best":
        chosen = find_best(views)
    if chosen is not None:
        return chosen
    name = choose_name(text, [view.name for view in views])
    return next(view for view in views if view.name == name)


def choose_name(text: str, names: Sequence[CheckpointName], where: str = "") -> CheckpointName:
    """Return the checkpoint with this name, this step, or this beginning or end of its name.

    A beginning may leave out `checkpoint-`. Digits are a step, with or without `step` before them.

    Raises:
        UsageError: No checkpoint there (`where`) fits, or more than one.
    """
    step = text.removeprefix("step")
    if step.isdecimal():
        found = [name for name in names if str(name.step) == step]
    else:
        exact = [name for name in names if str(name) == text]
        found = exact or [name for name in names if text and _is_part(text, str(name))]
    if len(found) == 1:
        return found[0]
    shown = printable(text)
    if found:
        fitting = ", ".join(map(str, found[-_NUM_SHOWN:]))
        count = "" if len(found) <= _NUM_SHOWN else f"{len(found)} checkpoints, the newest "
        raise UsageError(f"{shown!r} fits {count}{fitting}. Write more of the name.")
    raise no_such_checkpoint(text, names, where)


def _is_part(text: str, name: str) -> bool:
    return name.startswith((text, f"checkpoint-{text}")) or name.endswith(text)


def no_such_checkpoint(text: str, names: Sequence[CheckpointName], where: str = "") -> UsageError:
    """Return the error that says which checkpoints there are in place of the one that is meant."""
    place = f" in {where}" if where else ""
    near = near_checkpoint(text, names)
    known = ", ".join(map(str, names[-_NUM_SHOWN:])) or "none yet"
    return UsageError(
        f"There is no checkpoint {printable(text)!r}{place}.{near} The newest are: {known}."
    )


def near_checkpoint(text: str, names: Sequence[CheckpointName]) -> str:
    """Return ` Did you mean X?` where a text is nearly `latest`, `best` or a checkpoint's name."""
    known = ["latest", "best", *map(str, names)]
    return did_you_mean(text, [name for name in known if name != text], _LIKENESS)
