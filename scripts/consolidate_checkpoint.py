"""Put a checkpoint that ranks wrote in parts (sharding=fsdp2) together into one of whole files.

    python scripts/consolidate_checkpoint.py latest
    python scripts/consolidate_checkpoint.py NAME --output whole

The result lies in --output under the checkpoint's own name: model.safetensors, optimizer.bin and
all the rest, with a manifest. AutoModelForCausalLM.from_pretrained loads it, and
`train.py --resume whole/NAME` goes on from it. Going on needs none of this: train.py reads parts at
any number of ranks. Exit codes: 0 done, 1 the disk failed, 2 usage or a damaged checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.base.console import run_command
from utils.base.text import format_bytes, printable, to_json_text
from utils.base.uri import require_path
from utils.checkpoints.layout import MANIFEST_FILE, read_manifest
from utils.tools.viewer.shelf import open_shelf, run_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(run, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="consolidate_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="name, step number, latest, best, or a path")
    add("--output", default="whole", metavar="DIR", help="where it comes to lie (default: whole)")
    add("--config", default="test", help="name or .json file (default: test)")
    add("--output-dir", help="directory of the checkpoints (default: the config's)")
    add("--run-name", help="folder of the run (default: the config's)")
    add("--json", action="store_true", help="print JSON")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def run(args: argparse.Namespace) -> None:
    """Put the named checkpoint together and say where it is."""
    require_path(args.output, "--output")
    checkpoint = find_checkpoint(args)
    from utils.checkpoints.consolidation import consolidate  # loads torch

    target = consolidate(checkpoint, Path(args.output))
    size = read_manifest(target).total_bytes
    if args.json:
        print(to_json_text({"name": target.name, "path": str(target), "size_bytes": size}))
        return
    print(f"{printable(str(target))}: {format_bytes(size)} in whole files.")
    print(f"Go on from it: python train.py ... --resume {printable(str(target))}")


def find_checkpoint(args: argparse.Namespace) -> Path:
    """Return the directory of the checkpoint that the command line names.

    Raises:
        UsageError: There is none, or more than one.
    """
    path = Path(args.name)
    if (path / MANIFEST_FILE).is_file():
        return path
    with open_shelf(run_config(args.config, args.output_dir, args.run_name)) as shelf:
        return Path(shelf.where) / str(shelf.select(args.name).name)


if __name__ == "__main__":
    sys.exit(main())
