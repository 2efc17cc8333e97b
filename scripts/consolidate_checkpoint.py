"""Merge a checkpoint that ranks wrote in parts (sharding=fsdp2) into one of whole files.

    python scripts/consolidate_checkpoint.py latest
    python scripts/consolidate_checkpoint.py NAME --output whole

The result is in --output under the checkpoint's own name: model.safetensors, optimizer.bin and
all the rest, with a manifest. AutoModelForCausalLM.from_pretrained loads it, and
`train.py --resume whole/NAME` goes on from it. Going on needs none of this: train.py reads parts at
any number of ranks. Exit codes: 0 done, 1 the disk failed, 2 usage or a damaged checkpoint.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.base.console import new_parser, run_command
from utils.base.errors import UsageError
from utils.base.text import format_bytes, printable, to_json_text
from utils.base.uri import require_path
from utils.checkpoints.layout import read_manifest
from utils.tools.generation.arguments import add_model_arguments, find_from


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(run, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("consolidate_checkpoint.py", __doc__)
    add_model_arguments(parser, loads=False)
    parser.add_argument(
        "--output", default="whole", metavar="DIR", help="where it is written (default: whole)"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Put the named checkpoint together and say where it is.

    Raises:
        UsageError: There is no such checkpoint.
    """
    require_path(args.output, "--output")
    source = find_from(args)
    if source.manifest is None or source.directory is None:
        raise UsageError(f"{printable(args.model)} is no checkpoint.")
    from utils.checkpoints.consolidation import consolidate  # loads torch

    target = consolidate(source.directory, Path(args.output))
    size = read_manifest(target).total_bytes
    if args.json:
        print(to_json_text({"name": target.name, "path": str(target), "size_bytes": size}))
        return
    print(f"{printable(str(target))}: {format_bytes(size)} in whole files.")
    print(f"Go on from it: python train.py --resume {shlex.quote(str(target))}")


if __name__ == "__main__":
    sys.exit(main())
