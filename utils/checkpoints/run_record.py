"""run.json and its like: which run a directory of checkpoints is of, and its configuration.

    attempt -> run.json -> every command that looks at the run, and the next attempt

What is read may be of an earlier version, damaged or foreign: what cannot be used is passed over. A
configuration that was recorded is relative to the directory that the attempt ran in. No torch here.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from configs.config_files import TRAINING_CONFIG_FILE
from configs.model_config import is_model_file
from configs.training_config import TrainingConfig, get_training_config
from utils.base.errors import CheckpointError, ConfigError
from utils.base.text import FOREIGN_ERRORS, did_you_mean
from utils.base.uri import local_path
from utils.checkpoints.layout import (
    RUN_FILE,
    SET_ASIDE_FOLDER,
    RunIdentity,
    RunPaths,
    find_checkpoints,
    read_json,
    read_manifest,
    write_json,
)
from utils.checkpoints.views import read_json_part

_PATH_KEYS = ("output_dir", "logging_dir", "cache_dir", "checkpoint_uri")
_SHOWN_RUNS = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """What the newest attempt noted where it writes.

    `config` is its whole configuration, `directory` the one it ran in, `command` the words that go
    on with the run; they are empty in records of earlier versions.
    """

    identity: RunIdentity
    config: Mapping[str, Any] = field(default_factory=dict)
    directory: str = ""
    command: str = ""


@dataclass(frozen=True)
class RunValues:
    """A configuration that was recorded, ready for `get_training_config`, and the file it is in.

    `lost_uri` is a relative bucket that cannot be found from here: `values` has none in its place.
    """

    values: Mapping[str, Any]
    source: str
    lost_uri: str = ""

    def to_config(self, overrides: Mapping[str, Any]) -> TrainingConfig:
        """Return it with other values in place of some."""
        return get_training_config(self.source, overrides, self.values)


def write_run_record(paths: RunPaths, record: RunRecord) -> None:
    """Note which run writes here, and how; the file is replaced as a whole."""
    temporary = paths.run_file.with_suffix(".json.new")
    rest = {"config": record.config, "directory": record.directory, "command": record.command}
    write_json(temporary, {**record.identity.to_json(), **rest})
    temporary.replace(paths.run_file)


def read_run_record(directory: Path, *, level: int = logging.DEBUG) -> RunRecord | None:
    """Return what the newest attempt noted in a directory of checkpoints; None for nothing.

    `level` is that of the log line which says why it cannot be read.
    """
    path = directory / RUN_FILE
    try:
        value = read_json(path)
        config, texts = value.get("config"), (value.get("directory"), value.get("command"))
        return RunRecord(
            RunIdentity.from_json(value),
            config if isinstance(config, dict) else {},
            *(text if isinstance(text, str) else "" for text in texts),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, *FOREIGN_ERRORS) as exc:
        log.log(level, "%s cannot be read (%s) and is ignored.", path, exc)
        return None


def read_run_identity(paths: RunPaths) -> RunIdentity | None:
    """Return which run and branch last wrote here; None where that is not known.

    It decides between checkpoints that are there; without it they decide themselves.
    """
    record = read_run_record(paths.checkpoints, level=logging.WARNING)
    return None if record is None else record.identity


def find_run_identity(paths: RunPaths) -> RunIdentity | None:
    """Return which run and branch is here: as the newest attempt noted, else of a checkpoint."""
    recorded = read_run_identity(paths)
    if recorded is not None:
        return recorded
    for name in reversed(find_checkpoints(paths.checkpoints)):
        with contextlib.suppress(CheckpointError):
            return read_manifest(paths.checkpoints / str(name)).identity
    return None


def find_run_values(directory: Path) -> RunValues | None:
    """Return the configuration of the run in a directory of checkpoints; None where there is none.

    It is that of the newest attempt, else that of the newest checkpoint that can be read.
    """
    if not os.path.isdir(directory):  # noqa: PTH112 - Path.is_dir raises for too long a name
        return None
    record = read_run_record(directory)
    if record is not None and record.config:
        source = str(directory / RUN_FILE)
        with contextlib.suppress(ConfigError):
            return usable_values(record.config, source, directory, record.directory)
    for name in reversed(find_checkpoints(directory)):
        with contextlib.suppress(CheckpointError, ConfigError):
            return read_checkpoint_values(directory / str(name), record)
    return None


def read_checkpoint_values(checkpoint: Path, record: RunRecord | None = None) -> RunValues:
    """Return the configuration in a checkpoint's directory; `record` is what lies beside it.

    Raises:
        CheckpointError: It is damaged or incomplete.
        ConfigError: It is none that can be used.
    """
    path = checkpoint / TRAINING_CONFIG_FILE
    values, problem = read_json_part(path, read_manifest(checkpoint))
    if problem is not None:
        raise CheckpointError(f"{checkpoint}: {problem}.")
    record = record or read_run_record(checkpoint.parent)
    directory = record.directory if record else ""
    return usable_values(values, str(path), checkpoint.parent, directory)


def usable_values(
    values: Mapping[str, Any], source: str, place: Path | None = None, directory: str = ""
) -> RunValues:
    """Return what a file says of a run, without keys that this version does not know.

    `place` is the directory of checkpoints that the file is from, None for one in a bucket.
    Relative paths are made absolute where they do not begin in the current directory. `directory`
    is the one the run ran in, as far as that was noted.

    Raises:
        ConfigError: It is no configuration.
    """
    get_training_config(source, {}, values)  # tells of keys that this version does not know
    known = {one.name for one in fields(TrainingConfig)}
    values = {key: value for key, value in values.items() if key in known}
    base = None if place is None else _find_base(place, values, directory)
    uri = values.get("checkpoint_uri", "")
    path = local_path(uri) if uri else None
    if base is not None and base != Path.cwd():
        values = _relative_to(base, values)
    elif base is None and place is not None and path is not None and not path.is_absolute():
        return RunValues({**values, "checkpoint_uri": ""}, source, lost_uri=uri)
    return RunValues(values, source)


def _find_base(place: Path, values: Mapping[str, Any], directory: str) -> Path | None:
    """Return where the relative paths of a run begin, from where its checkpoints are.

    That is the directory it ran in, if they are there. Where that is copied or moved as a whole, it
    is the new one; where its checkpoints alone are, the old one if the run is still there. A bucket
    of the same name elsewhere is another one.
    """
    output_dir, name = Path(values.get("output_dir", "checkpoints")), values.get("run_name", "")
    full = place.resolve()
    original = Path(directory, output_dir, name)
    if directory and original.resolve() == full:
        return Path(directory)
    parts = output_dir.parts
    for parent in [full] if "run_name" in values and not name else [full.parent, full]:
        if parts and not output_dir.is_absolute() and parent.parts[-len(parts) :] == parts:
            return Path(*parent.parts[: -len(parts)])
    here, there = read_run_record(place), read_run_record(original) if directory else None
    if here is not None and there is not None and here.identity.run_id == there.identity.run_id:
        return Path(directory)
    return None


def _relative_to(directory: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return values whose relative paths begin in a directory."""

    def place(text: str) -> str:
        path = local_path(text) if text else None
        return text if path is None else str(directory / path)

    placed: dict[str, Any] = {key: place(values[key]) for key in _PATH_KEYS if key in values}
    if is_model_file(values.get("model", "")):
        placed["model"] = place(values["model"])
    data = values.get("data_uri", "")
    placed["data_uri"] = (
        place(data)
        if isinstance(data, str)
        else [{**one, "uri": place(one["uri"])} for one in data]
    )
    return {**values, **placed}


def describe_other_runs(
    output_dir: Path, own: str, option: str, *, are_similar: bool = False
) -> str:
    """Say that no run of a name (`own`) is in an output directory, and which others do.

    `option` is what a name of theirs is put after. Empty where there are no others, or none of a
    similar name where `are_similar`.
    """
    folders = dict(_folders(output_dir))
    names = sorted(name for name in folders if name != own and _has_run(folders[name]))
    near = did_you_mean(own, names)
    if own and are_similar:
        names = difflib.get_close_matches(own, names)
    if not names:
        return ""
    first = f"{names[0] or 'one without a name'} ({option}{shlex.quote(names[0])})"
    shown = ", ".join([first, *names[1:_SHOWN_RUNS]])
    more = f" and {len(names) - _SHOWN_RUNS} more" if len(names) > _SHOWN_RUNS else ""
    return (
        f"There is no run in {output_dir / own}{'' if own else ' itself'}.{near} "
        f"Runs in {output_dir}: {shown}{more}."
    )


def _folders(output_dir: Path) -> Iterator[tuple[str, Path]]:
    yield "", output_dir
    with contextlib.suppress(OSError):
        for entry in os.scandir(output_dir):
            if entry.name != SET_ASIDE_FOLDER and entry.is_dir():
                yield entry.name, output_dir / entry.name


def _has_run(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return (folder / RUN_FILE).is_file() or bool(find_checkpoints(folder))
    return False
