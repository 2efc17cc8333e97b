"""Configuration files and `key=value` words, read into the values of named and typed keys.

    base of configs/NAME.json, configs/NAME.json, --set key=value, --key value
        -> values by key -> TrainingConfig

An unknown key is an error that suggests the nearest known one. No torch and no transformers here.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.model_presets import PRESETS
from utils.base.errors import ConfigError
from utils.base.text import did_you_mean, parse_json, parse_json_object, unique_keys

PROJECT_DIRECTORY = Path(__file__).resolve().parents[1]
CONFIG_DIRECTORY = PROJECT_DIRECTORY / "configs"
TRAINING_CONFIG_FILE = "training_config.json"  # of a checkpoint

log = logging.getLogger(__name__)

COMMAND_LINE = "command line"
BASE_KEY = "base"  # of a file: the configuration that it begins from
OBJECT_KEYS = ("model_overrides", "lr_scheduler_kwargs")  # OBJECT.KEY is one of their values
RENAMED_KEYS = {
    "max_train_files": "max_files",
    "batch_size": "per_device_train_batch_size",
    "gradient_clipping": "max_grad_norm",
    "lr": "learning_rate",
    "num_layers": "model_overrides.num_hidden_layers",
}
REMOVED_KEYS = {"machine_type": "prices are no longer looked up; hourly_price sets one"}
"""Keys of earlier versions that are left out with a warning: a run that has one still resumes."""


@dataclass(frozen=True)
class ConfigValues:
    """Values by key, where each comes from, and the file as messages name it.

    `is_record`: a run wrote the file.
    """

    by_key: dict[str, Any]
    sources: dict[str, str]
    file: str
    is_record: bool = False


def read_values(
    name: str,
    overrides: Mapping[str, Any],
    annotations: Mapping[str, str],
    recorded: Mapping[str, Any] | None = None,
) -> ConfigValues:
    """Return what the file of a name and the overrides after it say.

    `annotations` has the type of each known key, as a dataclass's field has it. `recorded` is what
    the file `name` says of a run, where it has been read already.

    Raises:
        ConfigError: A file, key or type is wrong; the message says where.
    """
    files = [(name, dict(recorded))] if recorded is not None else list(_read_files(name))
    file = files[0][0]
    is_record = recorded is not None or Path(file).name == TRAINING_CONFIG_FILE
    values = ConfigValues({}, {}, file, is_record)
    for file, content in reversed(files):
        for key, value in content.items():
            if key in OBJECT_KEYS and isinstance(value, dict) and value:
                values.sources.update({f"{key}.{child}": file for child in value})
                value = {**values.by_key.get(key, {}), **value}
            _apply(values, annotations, key, value, file)
    for key, value in overrides.items():
        _apply(values, annotations, key, _as_typed(annotations.get(key), value), COMMAND_LINE)
    return values


def _read_files(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each file as messages name it, and what it says: the one of a name, its base, ..."""
    path = _find_config_file(f"--config {name}", name, Path())
    seen: list[str] = []
    while True:
        content, file = _read_config_file(path), _display_path(path)
        base = content.pop(BASE_KEY, None)
        yield file, content
        if base is None:
            return
        if not isinstance(base, str):
            raise ConfigError(f"{file}: {BASE_KEY} must be a string, got {json.dumps(base)}.")
        seen.append(os.path.realpath(path))
        path = _find_config_file(f"{file}: {BASE_KEY} {base}", base, path.parent)
        if os.path.realpath(path) in seen:
            raise ConfigError(
                f"{file}: {BASE_KEY} {base} leads back to {_display_path(path)}. A file must not "
                "begin from itself."
            )


def _find_config_file(words: str, name: str, folder: Path) -> Path:
    """Return the file of a name, or of a path from a folder; `words` are what says it."""
    path = folder / name if name.endswith(".json") else CONFIG_DIRECTORY / f"{name}.json"
    for found in (path, folder / name / TRAINING_CONFIG_FILE):
        if os.path.isfile(found):  # noqa: PTH113 - Path.is_file raises for too long a name
            return found
    known = sorted(file.stem for file in CONFIG_DIRECTORY.glob("*.json"))
    raise ConfigError(
        f"{words}: {path} does not exist.{did_you_mean(name, known)} Known names: "
        f"{', '.join(known)}; or give a path that ends in .json, or a checkpoint's directory."
    )


def settings_of_options(
    words: Iterable[str], options: Collection[str], annotations: Mapping[str, str]
) -> list[str]:
    """Return a command line whose `--learning-rate 1e-3` is `--set learning_rate=1e-3`.

    `options` are the command's own, which win over a key of the same name. A key that is true or
    false may stand alone, and means true.

    Raises:
        ConfigError: An option is neither, or has no value.
    """
    rest = deque(words)
    found: list[str] = []
    while rest:
        word = rest.popleft()
        name, is_joined, value = word.partition("=")
        if word == "--":
            return [*found, word, *rest]
        if not word.startswith("--") or name in options:
            found.append(word)
            continue
        key = name[2:].replace("-", "_")
        if key not in annotations and not key.startswith(tuple(f"{one}." for one in OBJECT_KEYS)):
            near = _suggest(key, [*options, *(f"--{key}" for key in annotations)], name)
            help_text = " --help lists the options, docs/CONFIGURATION.md the keys."
            raise ConfigError(f"unknown option {name}.{near or help_text}")
        if not is_joined:
            has_value = bool(rest) and not rest[0].startswith("--")
            if not has_value and "bool" not in annotations.get(key, ""):
                raise ConfigError(f"{name} needs a value.")
            value = rest.popleft() if has_value else "true"
        found += ["--set", f"{key}={value}"]
    return found


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return (key, value) of a `key=value` from the command line; the value is read as JSON.

    What is not JSON is taken as a string.

    Raises:
        ConfigError: There is no `=`.
    """
    key, separator, raw = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text}: use key=value.")
    try:
        value = parse_json(raw)
    except ValueError:
        value = raw
    return key.strip(), value


def _read_config_file(path: Path) -> dict[str, Any]:
    try:
        return parse_json_object(path.read_text("utf-8"), object_pairs_hook=unique_keys)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{_display_path(path)}: cannot be read: {exc}.") from exc
    except ValueError as exc:
        raise ConfigError(f"{_display_path(path)}: not valid JSON: {exc}.") from exc


def _display_path(path: Path) -> str:
    if path.is_absolute() and path.is_relative_to(PROJECT_DIRECTORY):
        return str(path.relative_to(PROJECT_DIRECTORY))
    return str(path)


def _apply(
    values: ConfigValues, annotations: Mapping[str, str], key: str, value: Any, source: str
) -> None:
    merged = values.by_key
    values.sources[key] = source
    parent, _, child = key.partition(".")
    if child and parent in OBJECT_KEYS:
        values.sources.setdefault(parent, source)
        merged[parent] = {**merged.get(parent, {}), child: _expand(value)}
        return
    is_newer = values.is_record and source != COMMAND_LINE and key not in annotations
    if key in REMOVED_KEYS or is_newer:
        if os.environ.get("RANK", "0") == "0":
            why = REMOVED_KEYS.get(key, "this version does not know the key, a newer one wrote it")
            log.warning("%s: %s is ignored: %s.", source, key, why)
        return
    if key == "per_device_train_batch_size":
        merged["auto_find_batch_size"] = value == "auto"
        value = 1 if value == "auto" else value
    if key not in annotations:
        near = _suggest(key, annotations) or " Known keys: see docs/CONFIGURATION.md."
        raise ConfigError(f"{source}: unknown key {key!r}.{near}")
    merged[key] = _expand(_checked_type(source, key, annotations[key], value))


def _suggest(key: str, known: Iterable[str], option: str = "") -> str:
    """Return what a key, or the option that means it, should have been, where that is known."""
    parent, _, child = key.partition(".")
    renamed = RENAMED_KEYS.get(key)
    if any(key in preset.values for preset in PRESETS.values()):
        renamed = f"model_overrides.{key}"
    if parent == "model" and child:
        renamed = RENAMED_KEYS.get(child, f"model_overrides.{child}")
    if renamed:
        return f" Did you mean {'--' if option else ''}{renamed}?"
    return did_you_mean(option or key, known)


def _as_typed(annotation: str | None, value: Any) -> Any:
    """Return what a word of the command line means to a key: `run_name=5`, `bf16=True`."""
    if annotation == "str" and type(value) is int:
        return str(value)
    if annotation == "list[str]" and isinstance(value, str):
        return [value]
    if annotation in ("bool", "bool | None") and value in ("True", "False"):
        return value == "True"
    return value


# Annotation of a field -> what it is called, and whether a JSON value is one.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda value: type(value) is int),
    "float": ("a number", lambda value: type(value) is float),
    "bool": ("true or false", lambda value: type(value) is bool),
    "str": ("a string", lambda value: type(value) is str),
    "None": ("null", lambda value: value is None),
    "dict[str, Any]": ("an object", lambda value: type(value) is dict),
    "list[str]": ("a list of strings", lambda value: _is_list_of(str, value)),
    "list[dict[str, Any]]": ("a list of objects", lambda value: _is_list_of(dict, value)),
}


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _checked_type(source: str, key: str, annotation: str, value: Any) -> Any:
    options = annotation.split(" | ")
    if "float" in options and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{source}: {key} holds a NUL character, got {json.dumps(value)}.")
    if any(_TYPES[option][1](value) for option in options):
        return value
    wanted = " or ".join(_TYPES[option][0] for option in options)
    raise ConfigError(f"{source}: {key} must be {wanted}, got {json.dumps(value, default=str)}.")


def _expand(value: Any) -> Any:
    if isinstance(value, str):
        # The folder of a clone; among packages that pip has installed, the working folder.
        is_clone = (PROJECT_DIRECTORY / "run.sh").exists()
        return value.replace("{project}", str(PROJECT_DIRECTORY if is_clone else Path.cwd()))
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    return value
