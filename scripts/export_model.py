"""Export a trained model: a folder of Hugging Face files, or a GGUF file for llama.cpp.

    python scripts/export_model.py latest --output my-model
    python scripts/export_model.py best --dtype bfloat16 --output gs://my-bucket/models/my-model
    python scripts/export_model.py latest --average 5 --output my-model
    python scripts/export_model.py checkpoints/NAME --output hub:OWNER/NAME --private
    python scripts/export_model.py latest --format gguf --dtype float16 --output my-model.gguf

The folder has safetensors, config.json, generation_config.json, the tokenizer and a model card with
the facts of the run. Rows that only padded the vocabulary are removed; weights keep their data type
unless --dtype says otherwise. What was written is loaded again and compared, bit for bit, before it
is taken to --output. GGUF needs `pip install gguf`; it takes GPT-NeoX, GPT-2 and Llama.
Exit codes: 0 done and checked, 1 the disk, the bucket, the Hub or the check failed, 2 wrong usage
or a model that cannot be used.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.training_config import TrainingConfig
from utils.base.console import configure_logging, new_parser, run_command
from utils.base.errors import UsageError
from utils.base.progress import ProgressDisplay
from utils.base.text import count_of, format_bytes, printable, to_json_text
from utils.checkpoints.layout import RunPaths
from utils.tools.export.gguf import require_gguf
from utils.tools.export.hub_target import HUB_PREFIX, HubTarget
from utils.tools.export.target import GGUF_SUFFIX, BucketTarget, DiskTarget, open_target
from utils.tools.generation.arguments import (
    add_model_arguments,
    find_from,
    load_found,
    read_model_config,
)

if TYPE_CHECKING:
    from utils.tools.export.export import ExportReport

ExportTarget = DiskTarget | BucketTarget | HubTarget

FORMATS = ("hf", "gguf")
SCRATCH_FOLDER = "exports"
DEFAULT_SHARD_SIZE = "5GB"
_SHARD_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB|KiB|MiB|GiB)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(run, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("export_model.py", __doc__)
    add = parser.add_argument
    add(
        "--output",
        required=True,
        metavar="WHERE",
        help="a folder, gs://bucket/prefix or hub:OWNER/NAME; of a GGUF file its name in .gguf",
    )
    add("--format", choices=FORMATS, default="hf", help="Hugging Face files (default), or GGUF")
    add(
        "--max-shard-size",
        default=DEFAULT_SHARD_SIZE,
        metavar="SIZE",
        help=f"a larger model gets several files of weights (default: {DEFAULT_SHARD_SIZE})",
    )
    add("--overwrite", action="store_true", help="replace an exported model that is there")
    add("--private", action="store_true", help="of a repository that is made on the Hub")
    add("--no-check", action="store_true", help="do not load and compare what was written")
    add_model_arguments(parser, averages=True)
    return parser


def run(args: argparse.Namespace) -> None:
    """Export the named model and say where it is."""
    configure_logging("debug" if args.debug else "warning", stderr=True)
    check_arguments(args)
    if args.format == "gguf":
        require_gguf()
    config = read_model_config(args)
    target = find_target(args, config)
    target.require_free()
    source = find_from(args, config=config)
    from utils.tools.export.export import ExportOptions, export_model  # loads torch

    options = ExportOptions(
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        is_checked=not args.no_check,
        tokenizer=args.tokenizer,
        gguf_name=file_name(args.output) if args.format == "gguf" else None,
    )
    if args.format == "gguf":
        args.dtype = "auto"  # only the matrices are cast, when they are written
    with ProgressDisplay(enabled=not args.json) as display, target.staging() as staged:
        report = export_model(load_found(args, source), staged, options, display.update)
        target.publish(staged, display.update)
    if args.json:
        place = {"model": source.name, "output": target.location, "format": args.format}
        print(to_json_text({**place, **asdict(report)}))
    else:
        show(source.name, target, report)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not fit together, before anything is loaded.

    Raises:
        UsageError: It does not.
    """
    if not _SHARD_SIZE.fullmatch(args.max_shard_size):
        raise UsageError(
            f"--max-shard-size {printable(args.max_shard_size)}: give a number and KB, MB or GB."
        )
    is_hub, is_named_gguf = args.output.startswith(HUB_PREFIX), args.output.endswith(GGUF_SUFFIX)
    if args.format == "gguf" and not (is_hub or is_named_gguf):
        raise UsageError(
            f"--output {printable(args.output)}: a GGUF file has a name that ends in {GGUF_SUFFIX}."
        )
    if args.format == "hf" and is_named_gguf and not is_hub:
        raise UsageError(f"--output {printable(args.output)} wants --format gguf.")
    if args.private and not is_hub:
        raise UsageError("--private is for --output hub:OWNER/NAME.")


def find_target(args: argparse.Namespace, config: TrainingConfig) -> ExportTarget:
    """Return where the model goes."""
    scratch = RunPaths.of(config).cache / SCRATCH_FOLDER
    if args.output.startswith(HUB_PREFIX):
        return HubTarget(
            args.output,
            scratch,
            is_whole=args.format == "hf",
            overwrite=args.overwrite,
            is_private=args.private,
        )
    return open_target(
        args.output,
        scratch,
        overwrite=args.overwrite,
        user_project=config.gcs_user_project,
    )


def file_name(output: str) -> str:
    """Return the name of a GGUF file: the output's last part."""
    name = output.rstrip("/").rpartition("/")[2]
    return name if name.endswith(GGUF_SUFFIX) else f"{name}{GGUF_SUFFIX}"


def show(name: str, target: ExportTarget, report: ExportReport) -> None:
    """Print what was made of a model."""
    size = format_bytes(sum(entry.size for entry in report.files.values()))
    print(f"{printable(name)} -> {printable(target.location)}")
    files = count_of(len(report.files), "file")
    print(f"  {report.parameters:,} parameters in {report.dtype}, {files}, {size}")
    if report.removed_rows:
        print(
            f"  vocabulary {report.vocab_size:,}: {report.removed_rows} rows that only padded it "
            "are left out"
        )
    if report.compared_tensors is None:
        print("  not checked")
    else:
        print(f"  read back: {report.compared_tensors} tensors, every bit the same")
    if report.max_logit_difference is not None:
        print(f"  logits of a fixed batch: largest difference {report.max_logit_difference:g}")


if __name__ == "__main__":
    sys.exit(main())
