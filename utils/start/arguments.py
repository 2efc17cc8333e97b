"""The command line of train.py, what other commands share of it, and the configuration meant.

No torch here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from configs.config_files import parse_assignment, settings_of_options
from configs.training_config import KEY_TYPES, TrainingConfig, get_training_config
from utils.base.console import add_output_arguments, new_parser
from utils.base.errors import ConfigError, UsageError
from utils.costs.costs import parse_hourly_price

EPILOG = """exit codes:
  0      done and all verified in the bucket (also after --stop-after and --dry-run)
  1      unexpected error
  2      wrong usage, configuration or data
  3      preflight refused: the machine or the bucket cannot do this run
  4      trained and saved, but not everything is verified in the bucket
  75     stopped by a signal, state saved: start again with --resume latest
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
        return super().parse_known_args(words, namespace)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line of train.py."""
    text = "Pre-train a causal language model from NPZ token shards in a bucket."
    parser = new_parser("train.py", text, EPILOG, kind=KeyParser)
    add = parser.add_argument
    add(
        "--config",
        default="test",
        metavar="{test,production,NAME,FILE.json}",
        help="configs/NAME.json or a path that ends in .json (default: test)",
    )
    add("--max-steps", type=int, metavar="N", help="length of the run and of its schedule")
    add("--stop-after", type=int, metavar="N", help="save and end this attempt after step N")
    add("--hourly-price", type=float, metavar="X", help="dollars an hour of all machines together")
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
    add("--no-background-upload", action="store_true", help="upload while training waits")
    add("--dry-run", action="store_true", help="show and check everything, train nothing")
    add("--json", action="store_true", help="with --dry-run: print JSON, the configuration too")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set any configuration key, as --KEY VALUE does; model_overrides.KEY for the model's",
    )
    add("--quiet", action="store_true", help="warnings and errors only")
    add("--debug", action="store_true", help="debug log lines, and the traceback of an error")
    return parser.parse_args(argv)


def load_config(args: argparse.Namespace) -> TrainingConfig:
    """Return the configuration of a command line."""
    if args.stop_after is not None and args.stop_after < 1:
        raise UsageError(f"--stop-after must be at least 1, got {args.stop_after}.")
    if args.json and not args.dry_run:
        raise UsageError("--json is for --dry-run.")
    overrides = dict(parse_assignment(text) for text in args.set)
    if args.max_steps is not None:
        overrides["max_steps"] = args.max_steps
    if args.hourly_price is not None:
        overrides["hourly_price"] = args.hourly_price
    if args.debug:
        overrides["log_level"] = "debug"
    return get_training_config(args.config, overrides)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that say which run a command looks at, and how it answers."""
    add = parser.add_argument
    add("--config", default="test", help="name or .json file (default: test)")
    add("--output-dir", help="directory of the checkpoints (default: the config's)")
    add("--run-name", help="folder of the run (default: the config's)")
    add_output_arguments(parser)


def add_price_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--hourly-price`, as commands take it that show what a run has cost."""
    parser.add_argument(
        "--hourly-price",
        type=parse_hourly_price,
        metavar="X",
        help="dollars an hour, for time that the run itself had no price for",
    )


def read_run_config(args: argparse.Namespace) -> TrainingConfig:
    """Return the configuration that the words of `add_run_arguments` name.

    Raises:
        ConfigError: A file or value is wrong.
    """
    words = {key: getattr(args, key, None) for key in ("output_dir", "logging_dir", "run_name")}
    return get_training_config(args.config, {k: v for k, v in words.items() if v is not None})
