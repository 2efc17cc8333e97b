#!/usr/bin/env python3
"""Turn text into a tokenizer and NPZ token shards, in a directory or a gs:// bucket.

    python scripts/prepare_data.py --sample --output data/sample
    python scripts/prepare_data.py --input books/ notes.jsonl.gz --vocab-size 32000 --output data/a
    python scripts/prepare_data.py --input 'web/*.parquet' --tokenizer gpt2 --output gs://bucket/web

The same command again changes nothing when the output is whole, and goes on where it stopped when
it was interrupted.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import ExitCode, PretrainError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from utils.corpus import CorpusOptions, OnProgress, Preparation
    from utils.text_sources import Source

SAMPLE_VOCAB_SIZE = 4096
SIGINT_CODE = 130

_logger = logging.getLogger("prepare_data")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each parsed command carries its function as `command`."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=prepare)
    _add_source_arguments(parser.add_argument_group("sources (any number, read in this order)"))
    _add_tokenizer_arguments(parser.add_argument_group("tokenizer"))
    _add_output_arguments(parser.add_argument_group("output"))
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="say only what goes wrong")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _add_source_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sample",
        action="store_true",
        help="real English text that Python carries: help topics and docstrings, 1.7 MB",
    )
    group.add_argument(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="text, .jsonl or .parquet files (also .gz, .zst), directories, 'globs'",
    )
    group.add_argument(
        "--document-per",
        choices=("file", "line"),
        default="file",
        help="what a document is in a text file (default: file)",
    )
    group.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="column of the text in .jsonl, .parquet and --hf (default: text)",
    )
    group.add_argument("--hf", metavar="NAME", help="Hugging Face dataset, by name or directory")
    group.add_argument("--hf-config", metavar="NAME", help="named subset of the --hf dataset")
    group.add_argument("--split", default="train", help="split of --hf (default: train)")
    group.add_argument("--streaming", action="store_true", help="do not download --hf first")
    group.add_argument("--dedup", action="store_true", help="leave out exact repeats")


def _add_tokenizer_arguments(group: argparse._ArgumentGroup) -> None:
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"train a byte-level BPE of N tokens ({SAMPLE_VOCAB_SIZE} with --sample alone)",
    )
    choice.add_argument(
        "--tokenizer",
        metavar="T",
        help="take an existing one: directory, tokenizer.json or Hugging Face name",
    )


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", required=True, metavar="URI", help="directory or gs://bucket/prefix"
    )
    group.add_argument(
        "--shard-tokens",
        type=int,
        metavar="N",
        help="tokens in a shard (default: 50,000,000; with --sample alone, 5 even shards)",
    )
    group.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the documents that is held out (default: 0.05)",
    )
    group.add_argument("--compress", action="store_true", help="deflate the shards")
    group.add_argument("--overwrite", action="store_true", help="replace other data in the output")


def prepare(arguments: argparse.Namespace) -> int:
    """Prepare the corpus that the command line describes and say what came out."""
    from utils.corpus import prepare_corpus
    from utils.storage import open_bucket

    start = time.monotonic()
    sources, options = _build_request(arguments)
    bucket = open_bucket(arguments.output)
    try:
        with _progress_display(arguments) as on_progress:
            preparation = prepare_corpus(sources, bucket, options, arguments.overwrite, on_progress)
    finally:
        bucket.close()
    _report(preparation, bucket.uri, time.monotonic() - start, arguments)
    return ExitCode.DONE


def _build_request(arguments: argparse.Namespace) -> tuple[list[Source], CorpusOptions]:
    from utils.corpus import DEFAULT_SHARD_TOKENS, CorpusOptions
    from utils.text_sources import FileSource, HubSource, SampleSource, find_files

    sources: list[Source] = []
    if arguments.sample:
        sources.append(SampleSource())
    if arguments.input:
        paths = find_files(arguments.input)
        sources.append(FileSource(paths, arguments.document_per, arguments.text_column))
    if arguments.hf:
        names = (arguments.hf, arguments.split, arguments.hf_config, arguments.text_column)
        sources.append(HubSource(*names, streaming=arguments.streaming))
    if not sources:
        raise UsageError("Nothing to prepare: give --sample, --input PATH ... or --hf NAME.")
    is_sample_alone = arguments.sample and len(sources) == 1
    vocab_size = arguments.vocab_size
    if vocab_size is None and arguments.tokenizer is None and is_sample_alone:
        vocab_size = SAMPLE_VOCAB_SIZE
    shard_tokens = arguments.shard_tokens
    if shard_tokens is None and not is_sample_alone:
        shard_tokens = DEFAULT_SHARD_TOKENS
    return sources, CorpusOptions(
        vocab_size=vocab_size,
        tokenizer=arguments.tokenizer,
        validation_fraction=arguments.validation_fraction,
        shard_tokens=shard_tokens,
        compress=arguments.compress,
        deduplicate=arguments.dedup,
    )


def _report(
    preparation: Preparation, uri: str, seconds: float, arguments: argparse.Namespace
) -> None:
    summary = _summarize(preparation, uri, seconds)
    if arguments.json:
        sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    elif not arguments.quiet:
        sys.stdout.write(_format_summary(summary) + "\n")


def _summarize(preparation: Preparation, uri: str, seconds: float) -> dict[str, Any]:
    index = preparation.index
    names = [shard["name"] for shard in index["shards"]]
    num_validation = sum(name.startswith("val_") for name in names)
    return {
        "output": uri,
        "is_new": preparation.is_new,
        **index["summary"],
        "tokens_per_byte": index["summary"]["tokens"] / index["summary"]["bytes"],
        "vocab_size": index["vocab_size"],
        "training_shards": len(names) - num_validation,
        "validation_shards": num_validation,
        "shard_bytes": sum(shard["size"] for shard in index["shards"]),
        "seconds": round(seconds, 2),
    }


def _format_summary(summary: dict[str, Any]) -> str:
    head = "Prepared" if summary["is_new"] else "Already prepared, nothing to do:"
    left_out = summary["documents_left_out"]
    rows = {
        "documents": f"{summary['documents']:,}" + (f" ({left_out:,} left out)" * bool(left_out)),
        "text": f"{summary['bytes']:,} bytes",
        "tokens": f"{summary['tokens']:,} ({summary['training_tokens']:,} training, "
        f"{summary['validation_tokens']:,} validation)",
        "tokens per byte": f"{summary['tokens_per_byte']:.3f}",
        "vocabulary": f"{summary['vocab_size']:,}",
        "unigram entropy": f"{summary['unigram_entropy_nats']:.3f} nats",
        "shards": f"{summary['training_shards']} training, {summary['validation_shards']} "
        f"validation, {summary['shard_bytes']:,} bytes",
        "time": f"{summary['seconds']:.1f} s",
    }
    lines = [f"  {name:<16} {value}" for name, value in rows.items()]
    return "\n".join([f"{head} {summary['output']}", *lines])


@contextmanager
def _progress_display(arguments: argparse.Namespace) -> Iterator[OnProgress | None]:
    """Show a bar on a terminal, and nothing but the log lines elsewhere."""
    if arguments.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_terminal()) as progress:
        tasks: dict[str, Any] = {}

        def on_progress(stage: str, done_bytes: int, total_bytes: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total_bytes)
            progress.update(tasks[stage], completed=done_bytes, total=total_bytes)

        yield on_progress


@functools.cache
def _terminal() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _start_logging(arguments: argparse.Namespace) -> None:
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        # The same console as the bar's: lines then go above it, not through it.
        handler = RichHandler(console=_terminal(), show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        line = "%(asctime)s %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(line, "%H:%M:%S"))
    logging.basicConfig(
        level=logging.WARNING if arguments.quiet else logging.INFO, handlers=[handler]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = build_parser().parse_args(argv)
    _start_logging(arguments)
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    """Call the command; turn errors into one message and an exit code."""
    try:
        return int(arguments.command(arguments))
    except PretrainError as exc:
        if arguments.debug:
            _logger.exception("Traceback:")
        sys.stderr.write(f"{exc}\n")
        return exc.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. The same command goes on after the finished shards.\n")
        return SIGINT_CODE


if __name__ == "__main__":
    sys.exit(main())
