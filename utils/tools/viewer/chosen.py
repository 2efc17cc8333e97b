"""The checkpoints that a command of the viewer shows, of one run or of several.

    --run, --remote, names and paths of the command line -> shelves -> chosen checkpoints

No torch here.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.training_config import TrainingConfig
from utils.base.errors import UsageError
from utils.base.text import printable
from utils.base.uri import scheme_of
from utils.checkpoints.layout import MANIFEST_FILE, REMOTE_FOLDER, parse_checkpoint_name
from utils.checkpoints.views import CheckpointView
from utils.command_line.run_config import read_run_config
from utils.tools.viewer.shelf import Shelf, open_shelf


@dataclass(frozen=True)
class Chosen:
    """A checkpoint that is meant, its figures, where it is, and its run's configuration."""

    config: TrainingConfig
    where: str
    view: CheckpointView
    row: dict[str, Any]

    @property
    def label(self) -> str:
        """What it is called among those of several runs."""
        return f"{self.where}: {self.view.name}"


@dataclass(frozen=True)
class Place:
    """A run that the options name; `bucket` is the one that `--run` names itself."""

    config: TrainingConfig
    is_remote: bool = False
    bucket: str | None = None

    def open(self) -> contextlib.AbstractContextManager[Shelf]:
        """Open its checkpoints."""
        return open_shelf(self.config, is_remote=self.is_remote, place=self.bucket)


def find_places(args: argparse.Namespace, *, are_several: bool = False) -> list[Place]:
    """Return each run that the options name.

    Raises:
        UsageError: They are several where one is wanted.
    """
    if len(args.run or []) < 2 and not _is_bucket(args, (args.run or [""])[0]):
        return [Place(read_run_config(args), args.remote)]
    if len(args.run) > 1 and not are_several:
        raise UsageError("--run: this command looks at one run, name one directory.")
    places = []
    for run in args.run:
        bucket = run if _is_bucket(args, run) else None
        own = argparse.Namespace(**{**vars(args), "run": None if bucket else [run]})
        places.append(Place(read_run_config(own), args.remote, bucket))
    return places


def _is_bucket(args: argparse.Namespace, run: str) -> bool:
    return bool(args.remote and run and (scheme_of(run) or Path(run, REMOTE_FOLDER).is_dir()))


def choose_checkpoints(
    args: argparse.Namespace, names: Sequence[str], *, are_several: bool = True, num_newest: int = 1
) -> list[Chosen]:
    """Return the checkpoints of these names, each in every run that the options name.

    A name that is a path is of the run there. Without names, the `num_newest` of each run.

    Raises:
        UsageError: There is no such checkpoint, or there are several runs where one is wanted.
    """
    chosen: list[Chosen] = []
    paths = [_checkpoint_path(name) for name in names]
    are_all_paths = bool(names) and all(paths)
    places = [] if are_all_paths else find_places(args, are_several=are_several)
    with contextlib.ExitStack() as stack:
        shelves = [(place.config, stack.enter_context(place.open())) for place in places]

        def choose(config: TrainingConfig, shelf: Shelf, text: str) -> None:
            try:
                view = shelf.select(text)
            except UsageError as exc:
                raise UsageError(f"{exc}{remote_hint(args, config)}") from exc
            (row,) = shelf.rows([view], args.hourly_price)
            chosen.append(Chosen(config, shelf.where, view, row))

        for name, path in zip(names, paths, strict=True):
            if path is not None:
                place = Place(read_run_config(args, path.parent))
                choose(place.config, stack.enter_context(place.open()), path.name)
                continue
            for config, shelf in shelves:
                choose(config, shelf, name)
        for config, shelf in [] if names else shelves:
            for found in shelf.names[-num_newest:] or ("latest",):
                choose(config, shelf, str(found))
    return chosen


def remote_hint(args: argparse.Namespace, config: TrainingConfig) -> str:
    """Return how to look where a checkpoint may be that is not on this machine."""
    if args.remote or not config.bucket_uri:
        return ""
    return f" --remote looks in {printable(config.bucket_uri)}."


def _checkpoint_path(name: str) -> Path | None:
    """Return the directory of a checkpoint that a name is, None where it is another name."""
    path = Path(name).resolve()
    is_one = parse_checkpoint_name(path.name) is not None and (path / MANIFEST_FILE).is_file()
    return path if is_one else None
