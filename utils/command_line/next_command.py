"""The command that goes on with a run, as train.py prints it when an attempt ends."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from configs.config_files import parse_assignment
from configs.training_config import TrainingConfig
from utils.command_line.arguments import add_attempt_arguments
from utils.command_line.run_config import as_setting, config_alone

LAUNCHERS = {"torchrun", "accelerate", "torch.distributed.run", "torch.distributed.launch"}


@dataclass(frozen=True)
class NextCommand:
    """The command that goes on with a run after an attempt, to be typed as it stands."""

    words: tuple[str, ...] = ("python", "train.py", "--resume", "latest")
    max_steps: int | None = None
    has_epochs: bool = False

    def text(self, max_steps: int | None = None) -> str:
        """Return the command; `max_steps` is another length of the run."""
        steps, words = max_steps or self.max_steps, [*self.words]
        if max_steps and self.has_epochs:
            words += ["--set", "num_train_epochs=null"]
        return shlex.join([*words, *(["--max-steps", str(steps)] if steps else [])])


def next_command(args: argparse.Namespace, config: TrainingConfig) -> NextCommand:
    """Return the command that goes on after an attempt: as it was typed, but for what was of it."""
    recorded = ["init_from"] if args.config is None else []  # it is in the run's record
    words = _without(args.words, ["max_steps", *recorded])
    settings = dict(map(parse_assignment, args.set))
    if args.config is None:
        alone = config_alone(None, settings)
        for key in ("output_dir", "run_name"):  # where the record is found
            value = getattr(config, key)
            if value != getattr(alone, key):
                words += ["--set", f"{key}={as_setting(value)}"]
    typed = (*_typed_before(args.words), *words, "--resume", "latest")
    max_steps = settings.get("max_steps") if args.max_steps is None else args.max_steps
    return NextCommand(typed, max_steps, config.num_train_epochs is not None)


def _without(words: list[str], keys: list[str]) -> list[str]:
    """Return words without those of one attempt, and those that set one of these keys."""
    bare = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    add_attempt_arguments(bare)
    for key in keys:
        bare.add_argument(f"--{key}", f"--{key.replace('_', '-')}")
    kept: list[str] = []
    for word in bare.parse_known_args(words)[1]:
        if word.removeprefix("--set=").partition("=")[0] not in keys:
            kept.append(word)
        elif kept[-1:] == ["--set"]:
            kept.pop()
    return kept


def _typed_before(words: list[str]) -> list[str]:
    """Return what stands before these words in the command: Python or a launcher, and train.py."""
    import psutil

    launcher: list[str] = []
    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process(os.getppid()).cmdline()
    if not LAUNCHERS.intersection(Path(word).name for word in launcher):
        launcher = []
    for typed in (launcher, sys.orig_argv):
        count = len(typed) - len(words)
        if count > 1 and typed[count:] == words:
            script = Path(typed[1])
            if typed[1].startswith("-") or script.suffix == ".py":
                return typed[:count]
            is_found = shutil.which(script.name) == typed[1]  # a script that Python runs by itself
            return [script.name if is_found else typed[1], *typed[2:count]]
    size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    start = ["python"] if size == 1 else ["torchrun", f"--nproc_per_node={size}"]
    return [*start, "train.py"]
