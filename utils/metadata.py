"""Everything the scripts show, read from disk or bucket: checkpoints, metrics, upload states.

    metadata.json, metrics.jsonl, journal -> viewer, upload manager, monitor

Readers never stop at a bad file: what can be read is returned, what cannot is named in `problem`.
What a file says may be of any type and hold terminal escapes: it passes `number` before arithmetic,
`printable` before a terminal, `to_json_text` before `--json`. `metrics.jsonl` is append-only; a
`resume` record in it takes back every later step, so that a curve never goes back in time while
nothing is lost. No torch here: 1,000 checkpoints list in 0.5 s.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from utils.errors import CheckpointError, StorageError, UsageError, first_line
from utils.followed_file import FollowedFile
from utils.journal import Journal, JournalEntry, UploadState, utc_now
from utils.json_text import FOREIGN_ERRORS, parse_json
from utils.layout import (
    ARCHIVE_SUFFIX,
    MANIFEST_FILE,
    METADATA_FILE,
    REMOTE_FOLDER,
    CheckpointName,
    Manifest,
    find_checkpoints,
    parse_checkpoint_name,
)
from utils.regular_file import read_regular_file
from utils.storage import Bucket, ObjectInfo, crc32c_of_bytes, normalize_uri

HISTORY_LIMIT = 100
MAX_CARD_BYTES = 64 * 2**20
MAX_SHOWN_CHARACTERS = 300
MAX_DEPTH = 32
MAX_STEP = 2**63
RECORD_BYTES = 512  # of a line of metrics.jsonl, at most
TOO_DEEP = "(too deep)"
START_EVENTS = ("start", "resume")

# The numbers that a history begins with, to the last comma behind them. Its name ends with a bare
# quote, so this never matches within a JSON string.
_LONG_HISTORY = re.compile(rb'("(?:loss_history|learning_rates)":\s*\[)[-+.,0-9eE\sNaInfityul]*,')


@dataclass(frozen=True)
class CheckpointView:
    """One checkpoint as the scripts see it.

    Attributes:
        name: Its name and numbers.
        metadata: `metadata.json`, empty where it cannot be read.
        manifest: The manifest, None where it cannot be read.
        path: Its directory, None for one that is only in the bucket.
        upload: The newest journal entry about it, None where there is none.
        archive_bytes: Size of the archive in the bucket, None where unknown.
        problem: What is wrong with it, None where nothing is.
        manifest_crc32c: Of `manifest.json` as it was read, None where it was not.
    """

    name: CheckpointName
    metadata: dict[str, Any]
    manifest: Manifest | None
    path: Path | None = None
    upload: JournalEntry | None = None
    archive_bytes: int | None = None
    problem: str | None = None
    manifest_crc32c: str | None = None

    @property
    def loss(self) -> float | None:
        """Training loss at the save."""
        return number(self.metadata.get("current_loss"))

    @property
    def validation_loss(self) -> float | None:
        """Validation loss at the save."""
        metrics = self.metadata.get("validation_metrics")
        return number(metrics.get("validation_loss")) if isinstance(metrics, dict) else None

    @property
    def total_bytes(self) -> int | None:
        """Bytes of its files on disk."""
        return None if self.manifest is None else self.manifest.total_bytes


def number(value: object) -> float | None:
    """Return a finite number as float, None for anything else (booleans too)."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def parse_time(value: object) -> datetime | None:
    """Return an ISO 8601 time, in UTC where it names no zone; None for anything else."""
    try:
        moment = datetime.fromisoformat(str(value))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def epoch_seconds(value: object) -> float | None:
    """Return an ISO 8601 time in seconds since 1970, None where it is none."""
    moment = parse_time(value) if isinstance(value, str) else None
    return None if moment is None else moment.timestamp()


def printable(value: object, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    """Return a value as one line of text that cannot steer a terminal."""
    try:
        begin = str(value)[: limit + 1]
    except RecursionError:
        begin = TOO_DEEP
    text = begin
    if not begin.isprintable():
        text = "".join(character if character.isprintable() else "?" for character in begin)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def reason_of(exc: BaseException) -> str:
    """Return what an error of a library says, in one line that no terminal obeys."""
    return printable(first_line(exc))


def printable_lines(text: str) -> str:
    """Return a text of several lines that cannot steer a terminal."""
    lines = text.expandtabs(4).split("\n")
    return "\n".join(
        "".join(character if character.isprintable() else "?" for character in line)
        for line in lines
    )


def to_json_text(value: object, *, indent: int | None = 2) -> str:
    """Return a value as strict JSON.

    NaN and infinities, which JSON lacks, become null; what is nested deeper than anything of ours
    is cut.
    """
    return json.dumps(_plain(value, 0), indent=indent, allow_nan=False, default=str)


def _plain(value: object, depth: int) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth > MAX_DEPTH:
        return TOO_DEEP if isinstance(value, (dict, list, tuple)) else value
    if isinstance(value, dict):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file that may be damaged or foreign.

    Raises:
        CheckpointError: It is missing, no regular file, too large, or not a JSON object.
    """
    return _require_object(path.name, _parse_json(path.name, _read_file(path.name, str(path))))


def read_json_part(path: Path, manifest: Manifest | None) -> tuple[dict[str, Any], str | None]:
    """Return (a JSON file of a checkpoint as far as it can be read, what is wrong with it)."""
    try:
        data = _read_file(path.name, str(path))
        value = _require_object(path.name, _parse_json(path.name, data))
    except CheckpointError as exc:
        return {}, str(exc)
    return value, find_damage(path.name, data, manifest)


def find_damage(name: str, data: bytes, manifest: Manifest | None) -> str | None:
    """Say why a file of a checkpoint is not what was written; None where nothing says so."""
    entry = manifest.files.get(name) if manifest is not None else None
    if entry is None or crc32c_of_bytes(data) == entry.crc32c:
        return None
    return f"{name} is damaged (its crc32c is not the manifest's)"


def _require_object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} cannot be read (it holds no JSON object)")
    return value


def _read_file(name: str, path: str) -> bytes:
    try:
        return read_regular_file(path)
    except FileNotFoundError as exc:
        raise CheckpointError(f"{name} is missing") from exc
    except OSError as exc:
        raise CheckpointError(f"{name} cannot be read ({exc.strerror or exc})") from exc
    except ValueError as exc:  # a zero byte in the path
        raise CheckpointError(f"{name} cannot be read ({exc})") from exc


def _parse_json(name: str, data: bytes) -> Any:
    try:
        return parse_json(data)
    except ValueError as exc:
        raise CheckpointError(f"{name} cannot be read ({exc})") from exc


@functools.lru_cache(maxsize=8)
def _normalize(uri: str, directory: str) -> str:
    """Return the one spelling of a bucket URI; a relative one depends on the current directory."""
    del directory
    return normalize_uri(uri)


def is_verified_in(
    uri: str, checkpoint: Path, entry: JournalEntry | None, manifest_crc32c: str | None = None
) -> bool:
    """Tell whether the journal has these very files of a checkpoint as verified in this bucket.

    A name alone says too little: another branch may have written it, or another bucket hold it.

    Args:
        uri: The bucket.
        checkpoint: Directory of the checkpoint.
        entry: What the journal has of it.
        manifest_crc32c: Of its manifest, where that has been read already.
    """
    if entry is None or entry.state is not UploadState.VERIFIED:
        return False
    if "manifest_crc32c" not in entry.details:
        return True  # the entry names no files
    if entry.details.get("bucket") != _normalize(uri, os.getcwd()):  # noqa: PTH109
        return False
    try:
        found = manifest_crc32c or crc32c_of_bytes(read_regular_file(checkpoint / MANIFEST_FILE))
    except (OSError, ValueError):
        return False
    return bool(entry.details["manifest_crc32c"] == found)


def read_local_checkpoints(
    directory: Path, uploads: Mapping[str, JournalEntry] | None = None
) -> list[CheckpointView]:
    """Return the committed checkpoints of an output directory, by step.

    Args:
        directory: Where the checkpoints lie.
        uploads: Newest journal entry of each checkpoint; None reads the journal there.

    Raises:
        OSError: The journal is there and cannot be read.
    """
    if uploads is None:
        uploads = Journal(directory / "uploads.jsonl").latest()
    views = []
    for name in find_checkpoints(directory):
        view = read_local_checkpoint(directory / str(name), uploads.get(str(name)))
        # Retention may delete one between the listing and the reading; its manifest goes first.
        if view.manifest is not None or (directory / str(name) / MANIFEST_FILE).exists():
            views.append(view)
    return views


def read_local_checkpoint(
    path: Path, upload: JournalEntry | None = None, *, brief: bool = False
) -> CheckpointView:
    """Return one checkpoint directory as far as it can be read.

    Args:
        path: The directory.
        upload: The newest journal entry about it.
        brief: Of each history in its metadata, only the last entry: a quarter of the time.

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
        manifest = Manifest.from_json(_parse_json(MANIFEST_FILE, data), source)
        if manifest.step != name.step:
            problems.append(f"its manifest is of step {manifest.step}")
    except CheckpointError as exc:
        problems.append(str(exc))
    try:
        data = _read_file(METADATA_FILE, f"{directory}/{METADATA_FILE}")
        short = _LONG_HISTORY.sub(rb"\1", data) if brief else data
        metadata = _require_object(METADATA_FILE, _parse_json(METADATA_FILE, short))
        damage = find_damage(METADATA_FILE, data, manifest)
        problems += [damage] if damage else []
    except CheckpointError as exc:
        problems.append(str(exc))
    problem = "; ".join(problems) or None
    return CheckpointView(
        name, metadata, manifest, path, upload, problem=problem, manifest_crc32c=crc32c
    )


def read_remote_checkpoints(bucket: Bucket, newest: int | None = None) -> list[CheckpointView]:
    """Return the checkpoints of a run's bucket that have a card, by step.

    One whose archive is missing says so in `problem`.

    Args:
        bucket: The run's bucket.
        newest: Read only the cards of so many highest steps; None for all.
    """
    objects = {
        info.name.removeprefix(f"{REMOTE_FOLDER}/"): info
        for info in bucket.list(f"{REMOTE_FOLDER}/")
    }
    found = (parse_checkpoint_name(name.removesuffix(".json")) for name in objects
             if name.endswith(".json"))  # fmt: skip
    names = sorted(name for name in found if name is not None)
    views = []
    for name in names[-newest:] if newest else names:
        archive = objects.get(f"{name}{ARCHIVE_SUFFIX}")
        views.append(read_remote_checkpoint(bucket, name, archive))
    return views


def read_remote_checkpoint(
    bucket: Bucket, name: CheckpointName, archive: ObjectInfo | None
) -> CheckpointView:
    """Return one checkpoint of a bucket as far as its card can be read.

    Args:
        bucket: The run's bucket.
        name: The checkpoint's name.
        archive: What the bucket says of its archive, None where there is none.
    """
    object_name = f"{REMOTE_FOLDER}/{name}.json"
    archive_bytes = None if archive is None else archive.size
    try:
        data = bucket.read_bytes(object_name, 0, MAX_CARD_BYTES + 1)
        if len(data) > MAX_CARD_BYTES:
            raise ValueError(f"it has more than {MAX_CARD_BYTES} bytes")
        card = parse_json(data)
        manifest = Manifest.from_json(card["manifest"], object_name)
        metadata = card["metadata"] if isinstance(card.get("metadata"), dict) else {}
        problem = _archive_problem(card.get("archive"), archive)
        return CheckpointView(name, metadata, manifest, None, None, archive_bytes, problem)
    except (StorageError, CheckpointError, *FOREIGN_ERRORS) as exc:
        reason = f"{object_name}: {exc or type(exc).__name__}"
        return CheckpointView(name, {}, None, None, None, archive_bytes, reason)


def _archive_problem(told: object, archive: ObjectInfo | None) -> str | None:
    """Return what is wrong with an archive, from what its card tells and the bucket says."""
    if archive is None:
        return "its archive is not in the bucket"
    if not isinstance(told, dict):
        return "its card says nothing of its archive"
    found = (archive.size, archive.crc32c or told.get("crc32c"))
    if found != (told.get("size"), told.get("crc32c")):
        return "its archive is not the one that its card tells of"
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


def select_checkpoint(text: str, views: Sequence[CheckpointView]) -> CheckpointView:
    """Return the checkpoint that a user means: a name, a step number, `latest` or `best`.

    Raises:
        UsageError: There is none; the message lists what there is.
    """
    chosen = None
    if text == "latest":
        chosen = find_latest_view(views)
    elif text == "best":
        chosen = find_best(views)
    else:
        matches = (view for view in views if text in (str(view.name), str(view.name.step)))
        chosen = next(matches, None)
    if chosen is not None:
        return chosen
    known = ", ".join(str(view.name) for view in views[-5:]) or "none yet"
    raise UsageError(f"There is no checkpoint {printable(text)!r}. The newest are: {known}.")


@dataclass
class MetricsLog:
    """`metrics.jsonl`, folded to the current branch.

    Attributes:
        limit: How many of the newest records are kept, and as many events; None for all. Of a long
            file only the end is parsed then, and the events before it.
        records: Metric records by step, oldest first; several may share a step.
        events: Records with an `event` (start, resume, rollback, bad_step, evaluating, finishing,
            end), oldest first.
        bad_lines: Lines that could not be read.
    """

    limit: int | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    bad_lines: int = 0
    _file: FollowedFile | None = None
    _is_shortened: bool = False

    def read_new(self, path: Path) -> bool:
        """Read what was appended to the file since the last call; tell whether there was any.

        What is known stays when the file is gone.

        Raises:
            OSError: It is there and cannot be read.
        """
        if self._file is None or self._file.path != path:
            self._file = FollowedFile(path)
        try:
            num_lines = self._read_blocks(self._file, self.limit)
            if self._is_shortened and not self.records:  # all that was kept has been taken back
                self._file = FollowedFile(path)
                self._read_blocks(self._file, None)
                self._shorten(self.limit)
        except FileNotFoundError:
            return False
        return num_lines > 0

    def _read_blocks(self, file: FollowedFile, limit: int | None) -> int:
        """Take in what is new, keeping so many records; return the number of lines."""
        num_lines = 0
        for block in file.read_new():
            if block.is_first:
                self.records, self.events, self.bad_lines = [], [], 0
                self._is_shortened = False
            lines = block.data.splitlines()
            if limit is not None and block.bytes_left > limit * RECORD_BYTES:
                self._is_shortened = True
                lines = [line for line in lines if b'"event"' in line]
            self.bad_lines += block.num_too_long
            num_lines += len(lines) + block.num_too_long
            for line in lines:
                self._take(line)
            self._shorten(limit)
        return num_lines

    def _shorten(self, limit: int | None) -> None:
        """Keep the newest, at most so many."""
        if limit is None:
            return
        if len(self.records) > limit:
            self._is_shortened = True
            del self.records[:-limit]
        if len(self.events) > limit:
            del self.events[:-limit]

    def _take(self, line: bytes) -> None:
        try:
            record = parse_json(line)
            step = record["step"] = int(record["step"])
            if abs(step) >= MAX_STEP:
                raise OverflowError
        except FOREIGN_ERRORS:
            self.bad_lines += 1
            return
        if "event" not in record:
            self.records.append(record)
            return
        self.events.append(record)
        if record["event"] in ("start", "resume", "rollback"):
            while self.records and self.records[-1]["step"] > step:
                self.records.pop()

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return (steps, values) of one metric; what is no finite number is left out."""
        points = [(record["step"], number(record.get(key))) for record in self.records]
        known = [(step, value) for step, value in points if value is not None]
        return [step for step, _ in known], [value for _, value in known]


def read_metrics(path: Path) -> MetricsLog:
    """Return everything in a `metrics.jsonl`; empty where there is none."""
    metrics = MetricsLog()
    metrics.read_new(path)
    return metrics


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Append one record with the time; `step` is required.

    A torn last line, left by a crash, is closed first: it would swallow this record.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = to_json_text({"time": utc_now(), **record}, indent=None) + "\n"
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = f"\n{line}"
        file.write(line.encode("utf-8"))


def loss_trend(losses: Sequence[float]) -> str:
    """Say where a loss history goes: improving, worsening, flat, or unknown below 2 entries.

    The mean of the newer half is compared with that of the older half; 0.5% is flat.
    """
    recent = list(losses[-HISTORY_LIMIT:])
    if len(recent) < 2:
        return "unknown"
    half = len(recent) // 2
    older, newer = sum(recent[:half]) / half, sum(recent[-half:]) / half
    change = (newer - older) / abs(older) if older else 0.0
    if abs(change) < 0.005:
        return "flat"
    return "improving" if change < 0 else "worsening"
