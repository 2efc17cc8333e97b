"""The command line of train.py, and what other commands share of it. No torch here."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from configs.config_files import CONFIG_DIRECTORY, settings_of_options
from configs.training_config import KEY_TYPES
from utils.base.console import add_output_arguments, new_parser
from utils.base.errors import ConfigError
from utils.costs.costs import parse_hourly_price

EPILOG = """exit codes:
  0      done and all verified in the bucket (also after --stop-after and --dry-run)
  1      unexpected error
  2      wrong usage, configuration or data
  3      preflight refused: the machine or the bucket cannot do this run
  4      trained and saved, but not everything is verified in the bucket
  75     stopped by a signal, state saved: the command that it printed last goes on
  128+n  second signal n: left at once
"""


class KeyParser(argparse.ArgumentParser):
    """The parser of a command with `--set`: any configuration key is an option of it, too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "allow_abbrev": False})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse words, those of keys as `--set` has them."""
        words, options = sys.argv[1:] if args is None else args, self._option_string_actions
        if "--set" in options:  # not so of a command whose subcommands have it
            try:
                words = settings_of_options(words, options, KEY_TYPES)
            except ConfigError as exc:
                self.error(str(exc))
        found, rest = super().parse_known_args(words, namespace)
        for word in rest:
            if (CONFIG_DIRECTORY / f"{word}.json").is_file():
                self.error(f"unrecognized argument {word}. Did you mean --config {word}?")
        return found, rest


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line of train.py; `words` is it as it was typed."""
    words = list(sys.argv[1:] if argv is None else argv)
    text = (
        "Pre-train a causal language model from NPZ token shards in a bucket. Any key of "
        "docs/CONFIGURATION.md is an option too: --learning-rate 1e-3."
    )
    parser = new_parser("train.py", text, EPILOG, kind=KeyParser)
    add = parser.add_argument
    add(
        "--config",
        metavar="{test,production,NAME,FILE.json}",
        help="configs/NAME.json, a path that ends in .json, or a checkpoint's directory (default: "
        "with --resume that of the run, else test)",
    )
    add_attempt_arguments(parser)
    add("--hourly-price", type=float, metavar="X", help="dollars an hour of all machines together")
    add("--no-background-upload", action="store_true", help="upload while training waits")
    add("--dry-run", action="store_true", help="show and check everything, train nothing")
    add("--json", action="store_true", help="with --dry-run: print JSON, the configuration too")
    _add_set_argument(parser)
    add("--quiet", action="store_true", help="warnings and errors only")
    add("--debug", action="store_true", help="debug log lines, and the traceback of an error")
    args = parser.parse_args(words)
    args.words = words
    return args


def add_attempt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is of one attempt alone, and the length of the run."""
    add = parser.add_argument
    add("--max-steps", type=int, metavar="N", help="length of the run and of its schedule")
    add("--stop-after", type=int, metavar="N", help="save and end this attempt after step N")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="WHICH",
        help="NAME, latest, best, a step, a path, or gs://BUCKET[/PREFIX]/latest or /NAME",
    )
    start.add_argument("--fresh", action="store_true", help="set an old run aside, begin anew")
    add(
        "--accept-data-change",
        action="store_true",
        help="resume although the shards changed: go on at the next epoch of the new ones",
    )
    add(
        "--accept-config-change",
        action="store_true",
        help="resume although the configuration trains something else than the checkpoint's",
    )
    add(
        "--accept-missing-random-state",
        action="store_true",
        help="resume although the random states are damaged: they are seeded anew",
    )


def _add_set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a configuration key, or with model_overrides.KEY one of the model",
    )


NAME_THE_RUN = "Name the run: --run-name NAME or --run DIR."


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that say which run a command looks at, and how it answers."""
    add = parser.add_argument
    add("--config", help="name, .json file or checkpoint (default: that of the run, or test)")
    add("--output-dir", metavar="DIR", help="directory of the runs (default: the config's)")
    add("--run-name", metavar="NAME", help="folder of the run in it (default: the config's)")
    add("--run", action="append", metavar="DIR", help="the run's own directory of checkpoints")
    _add_set_argument(parser)
    add_output_arguments(parser)


def run_words(args: argparse.Namespace) -> str:
    """Return the words of `add_run_arguments` that were typed, to put after a command."""
    typed: list[tuple[str, str]] = []
    for name in ("config", "output_dir", "run_name", "run", "set"):
        value = getattr(args, name) or []
        values = [value] if isinstance(value, str) else value
        typed += [(f"--{name.replace('_', '-')}", one) for one in values]
    return "".join(f" {option} {shlex.quote(value)}" for option, value in typed)


def add_price_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--hourly-price`, as commands take it that show what a run has cost."""
    parser.add_argument(
        "--hourly-price",
        type=parse_hourly_price,
        metavar="X",
        help="dollars an hour, for time that the run itself had no price for",
    )
