#!/usr/bin/env python3
"""Turn text into a tokenizer and NPZ token shards, in a directory or a gs:// bucket.

    python scripts/prepare_data.py --sample --output data/sample
    python scripts/prepare_data.py --input books/ notes.jsonl.gz --vocab-size 32000 --output data/a
    python scripts/prepare_data.py --input 'web/*.parquet' --tokenizer gpt2 --output gs://bucket/web
    python scripts/prepare_data.py --input t.bin --token-dtype uint16 --vocab-size 50257 --output b

The same command again changes nothing when the output is whole, and goes on where it stopped when
it was interrupted.

On many machines, --task 0 to --task 63 each prepare a part, then these become one:

    python scripts/prepare_data.py --input web --tokenizer gpt2 --output OUT --tasks 64 --task 0
    python scripts/prepare_data.py merge OUT

Data that is there already (prepare_data.py COMMAND --help says more):

    merge OUTPUT    write index.json of what all tasks have prepared
    index URI       write index.json for shards from elsewhere, from their headers
    inspect URI     show keys, shapes, dtypes, tokens, text, and what is bad
    put SRC URI     copy a file or directory into a bucket or directory, verified
    get URI DIR     copy from a bucket or directory, verified
    ls URI          list what is there
    rm URI          delete it
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.base.console import (
    add_output_arguments,
    configure_logging,
    new_parser,
    print_wrapped,
    run_command,
)
from utils.base.errors import DataError, ExitCode, UsageError
from utils.base.text import count_of, format_bytes, printable
from utils.base.uri import local_path, require_path, require_place, split_uri
from utils.tools.preparation.arguments import add_request_arguments
from utils.tools.preparation.request import (
    build_request,
    build_tasks,
    open_token_cache,
    plan_executor,
)

if TYPE_CHECKING:
    from utils.base.progress import ProgressDisplay
    from utils.corpus.prepare import Preparation
    from utils.corpus.shard_inspection import Inspection
    from utils.corpus.tasks.tasks import TaskedCorpus
    from utils.corpus.token_cache import TokenCache
    from utils.storage.bucket import Bucket

LONGEST_LINE = 2000

_logger = logging.getLogger("prepare_data")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of a preparation; the parsed arguments carry their function."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = new_parser("prepare_data.py", description, examples)
    parser.set_defaults(command=prepare)
    add_request_arguments(parser)
    _add_common_arguments(parser)
    return parser


def build_command_parser() -> argparse.ArgumentParser:
    """Return the parser of the commands on data that is there already."""
    parser = argparse.ArgumentParser(prog="prepare_data.py")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> Any:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(command=command)
        _add_common_arguments(added)
        return added

    merge = add("merge", merge_parts, "write index.json of what all tasks have prepared")
    merge.add_argument("output", metavar="OUTPUT")
    index = add("index", write_index, "write index.json for shards from elsewhere, from headers")
    index.add_argument("uri", metavar="URI")
    index.add_argument("--vocab-size", type=int, metavar="N", help="where no tokenizer says it")
    index.add_argument("--overwrite", action="store_true", help="replace a prepared one's index")
    inspect = add("inspect", inspect_data, "show what shards hold; exit code 2 if any is bad")
    inspect.add_argument("uri", metavar="URI", help="of all shards, or of one (*.npz)")
    inspect.add_argument("--verify", action="store_true", help="read all: checksums and token ids")
    put = add("put", put_data, "copy a file or directory into a bucket or directory, verified")
    put.add_argument("source", metavar="SRC")
    put.add_argument("uri", metavar="URI")
    get = add("get", get_data, "copy from a bucket or directory into a directory, verified")
    get.add_argument("uri", metavar="URI")
    get.add_argument("directory", metavar="DIR")
    add("ls", list_data, "list what is there").add_argument("uri", metavar="URI")
    remove = add("rm", remove_data, "delete what is there")
    remove.add_argument("uri", metavar="URI")
    remove.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="say only what goes wrong")


def prepare(arguments: argparse.Namespace) -> int:
    """Prepare the corpus that the command line describes and say what came out."""
    from utils.corpus.output import open_output
    from utils.corpus.prepare import prepare_corpus

    start = time.monotonic()
    sources, validation_sources, options = build_request(arguments)
    cache = open_token_cache(arguments)
    corpus = build_tasks(arguments, sources, validation_sources, options)
    with closing(open_output(arguments.output)) as bucket, _progress(arguments) as progress:
        if corpus is None:
            preparation: Preparation | None = prepare_corpus(
                sources,
                bucket,
                options,
                arguments.overwrite,
                progress.update,
                validation_sources=validation_sources,
                token_cache=cache,
            )
        else:
            preparation = _do_tasks(arguments, corpus, bucket, progress, cache)
    if cache and cache.num_hits:
        num_all = cache.num_hits + cache.num_misses
        _logger.info("Token cache %s: %d of %d found.", cache.directory, cache.num_hits, num_all)
    if preparation is not None:
        _say_prepared(arguments, preparation, bucket.uri, start)
    return ExitCode.DONE


def _do_tasks(
    arguments: argparse.Namespace,
    corpus: TaskedCorpus,
    bucket: Bucket,
    progress: ProgressDisplay,
    cache: TokenCache | None,
) -> Preparation | None:
    """Do what is asked of a corpus in tasks; return what is prepared, None where that comes later.

    The tokenizer comes first, and only that step replaces other data.
    """
    from utils.corpus.tasks.tasks import merge_tasks

    replaces = {"overwrite": arguments.overwrite}
    if isinstance(arguments.task, int):
        on_progress = progress.update
        return corpus.prepare(bucket, arguments.task, on_progress, token_cache=cache, **replaces)
    run = None if arguments.executor is None else plan_executor(arguments, bucket.uri)
    tokenizer = corpus.begin(bucket, may_train=True, **replaces)
    if run is None:
        text = f"{bucket.uri}: the tokenizer is there. Now --task 0 to {corpus.num_tasks - 1}."
        _say(arguments, {"output": bucket.uri, "vocab_size": tokenizer.vocab_size}, text)
    elif run():
        return merge_tasks(bucket)
    else:
        text = f"{bucket.uri}: {corpus.num_tasks} tasks are submitted, and the merge after them."
        _say(arguments, {"output": bucket.uri, "submitted_tasks": corpus.num_tasks}, text)
    return None


def merge_parts(arguments: argparse.Namespace) -> int:
    """Write the index of what all tasks have prepared and say what came out."""
    from utils.corpus.output import open_output
    from utils.corpus.tasks.tasks import merge_tasks

    start = time.monotonic()
    with closing(open_output(arguments.output, "merge")) as bucket:
        preparation = merge_tasks(bucket)
    _say_prepared(arguments, preparation, bucket.uri, start)
    return ExitCode.DONE


def _say_prepared(
    arguments: argparse.Namespace, preparation: Preparation, uri: str, start: float
) -> None:
    summary = _summarize(preparation, uri, time.monotonic() - start)
    if getattr(arguments, "task", None) is not None:
        summary["task"] = arguments.task
    _say(arguments, summary, _format_summary(summary))


def _summarize(preparation: Preparation, uri: str, seconds: float) -> dict[str, Any]:
    from utils.data.shard_index import is_validation_shard

    index = preparation.index
    names = [shard["name"] for shard in index["shards"]]
    num_validation = sum(map(is_validation_shard, names))
    num_bytes, num_tokens = index["summary"]["bytes"], index["summary"]["tokens"]
    return {
        "output": uri,
        "is_new": preparation.is_new,
        **index["summary"],
        "validation_share": index["summary"]["validation_tokens"] / (num_tokens or 1),
        "tokens_per_byte": num_tokens / num_bytes if num_bytes else None,
        "vocab_size": index["vocab_size"],
        "training_shards": len(names) - num_validation,
        "validation_shards": num_validation,
        "shard_bytes": sum(shard["size"] for shard in index["shards"]),
        "seconds": round(seconds, 2),
    }


def _format_summary(summary: dict[str, Any]) -> str:
    head = "Prepared" if summary["is_new"] else "Already prepared, nothing to do:"
    left_out = {"left out": summary["documents_left_out"], "null": summary["documents_null"]}
    others = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
    rows = {
        "documents": f"{summary['documents']:,}" + f" ({others})" * bool(others),
        "text": f"{summary['bytes']:,} bytes",
        "tokens": f"{summary['tokens']:,} ({summary['training_tokens']:,} training, "
        f"{summary['validation_tokens']:,} validation, {summary['validation_share']:.2%})",
        "tokens per byte": f"{summary['tokens_per_byte'] or 0:.3f}",
        "vocabulary": f"{summary['vocab_size']:,}",
        "unigram entropy": f"{summary['unigram_entropy_nats']:.3f} nats",
        "shards": f"{summary['training_shards']} training, {summary['validation_shards']} "
        f"validation, {summary['shard_bytes']:,} bytes",
        "time": f"{summary['seconds']:.1f} s",
    }
    if summary["tokens_per_byte"] is None:  # token ids alone: no text was seen
        del rows["text"], rows["tokens per byte"]
    lines = [f"  {name:<16} {value}" for name, value in rows.items()]
    part = f", task {summary['task']}" if "task" in summary else ""
    return "\n".join([f"{head} {summary['output']}{part}", *lines])


def write_index(arguments: argparse.Namespace) -> int:
    """Write the index of shards from elsewhere."""
    from utils.corpus.output import open_output
    from utils.corpus.shard_inspection import build_index_file

    if arguments.vocab_size is not None and arguments.vocab_size < 1:
        raise UsageError(f"--vocab-size must be at least 1, got {arguments.vocab_size}.")
    with closing(open_output(arguments.uri, "index")) as bucket:
        index = build_index_file(bucket, arguments.vocab_size, arguments.overwrite)
    summary = index["summary"]
    _say(
        arguments,
        {"uri": bucket.uri, "shards": len(index["shards"]), **summary},
        f"Wrote {bucket.uri}/index.json: {count_of(len(index['shards']), 'shard')}, "
        f"{summary['tokens']:,} tokens ({summary['training_tokens']:,} training, "
        f"{summary['validation_tokens']:,} validation).",
    )
    return ExitCode.DONE


def inspect_data(arguments: argparse.Namespace) -> int:
    """Show what shards hold; exit code 2 where one is bad."""
    from utils.corpus.shard_inspection import inspect_shards
    from utils.data.shard_index import SHARD_SUFFIX
    from utils.storage.open import open_bucket

    uri, only = arguments.uri, None
    require_place(uri)
    path = local_path(uri)
    if path is not None and not path.exists():
        raise DataError(f"{uri} does not exist.")
    place = split_uri(uri)
    if place is not None and (uri.endswith(SHARD_SUFFIX) if path is None else path.is_file()):
        uri, only = place
    with closing(open_bucket(uri)) as bucket:
        inspection = inspect_shards(bucket, arguments.verify, only)
    content = {**dataclasses.asdict(inspection), "num_bad": len(inspection.bad)}
    _say(arguments, content, _format_inspection(inspection))
    for shard in inspection.bad:
        print(f"{printable(shard.name)}: {printable(shard.problem, LONGEST_LINE)}", file=sys.stderr)
    if inspection.tokenizer_problem:
        print(printable(inspection.tokenizer_problem, LONGEST_LINE), file=sys.stderr)
    is_good = not inspection.bad and not inspection.tokenizer_problem
    return ExitCode.DONE if is_good else ExitCode.USAGE


def _format_inspection(inspection: Inspection) -> str:
    lines = []
    for shard in inspection.shards:
        arrays = ", ".join(f"{a.key} {list(a.shape)} {a.dtype}" for a in shard.arrays)
        what = f"{shard.tokens:,} tokens, {arrays}" if not shard.problem else "BAD"
        lines.append(f"{printable(shard.name)}  {what}, {format_bytes(shard.size)}")
    for name, text in inspection.samples.items():
        lines.append(f"{printable(name)} begins: {text!r}")
    good = [shard for shard in inspection.shards if not shard.problem]
    vocabulary = f"{inspection.vocab_size:,}" if inspection.vocab_size else "unknown"
    lines.append(
        f"{inspection.uri}: {count_of(len(good), 'good shard')}, {len(inspection.bad):,} bad, "
        f"{sum(shard.tokens for shard in good):,} tokens, vocabulary {vocabulary}, "
        f"{'with' if inspection.has_index else 'no'} index.json."
    )
    return "\n".join(lines)


def put_data(arguments: argparse.Namespace) -> int:
    """Copy files into a bucket or directory."""
    from utils.corpus.output import open_output
    from utils.data.transfer import put_tree

    require_path(arguments.source)
    source = Path(arguments.source).expanduser()
    with closing(open_output(arguments.uri, "put")) as bucket, _progress(arguments) as progress:
        report = put_tree(source, bucket, progress.update)
    _say_transfer(arguments, report, bucket.uri)
    return ExitCode.DONE


def get_data(arguments: argparse.Namespace) -> int:
    """Copy files from a bucket or directory."""
    from utils.data.transfer import find_objects, get_tree

    require_path(arguments.directory)
    directory = Path(arguments.directory).expanduser()
    found = find_objects(arguments.uri)
    with closing(found.bucket), _progress(arguments) as progress:
        report = get_tree(found, directory, progress.update)
    _say_transfer(arguments, report, str(directory))
    return ExitCode.DONE


def list_data(arguments: argparse.Namespace) -> int:
    """List the objects below a URI."""
    from utils.data.transfer import find_objects

    found = find_objects(arguments.uri)
    found.bucket.close()
    objects = [
        {"name": info.name, "size": info.size, "crc32c": info.crc32c} for info in found.objects
    ]
    lines = [
        f"{info.size:>15,}  {info.crc32c or '-':<8}  {printable(info.name, LONGEST_LINE)}"
        for info in found.objects
    ]
    lines.append(f"{count_of(len(objects), 'file')}, {format_bytes(found.num_bytes)}")
    content = {"uri": found.bucket.uri, "objects": objects, "bytes": found.num_bytes}
    _say(arguments, content, "\n".join(lines), always=True)
    return ExitCode.DONE


def remove_data(arguments: argparse.Namespace) -> int:
    """Delete the objects below a URI, after asking."""
    from utils.data.transfer import find_objects, remove_objects

    found = find_objects(arguments.uri)
    size = f"{count_of(len(found.objects), 'file')}, {format_bytes(found.num_bytes)}"
    what = f"{size}, in {found.bucket.uri}"
    with closing(found.bucket):
        if not arguments.yes and not _confirm(f"Delete {what}"):
            print("Nothing was deleted.")
            return ExitCode.DONE
        with _progress(arguments) as progress:
            remove_objects(found, progress.update)
    _say(arguments, {"uri": arguments.uri, "removed": len(found.objects)}, f"Deleted {what}.")
    return ExitCode.DONE


def _confirm(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(f"{question}? There is no terminal to ask on: give --yes.")
    return input(f"{question}? [y/N] ").strip().lower() in ("y", "yes")


def _say_transfer(arguments: argparse.Namespace, report: Any, where: str) -> None:
    text = (
        f"{where}: {count_of(report.files, 'file')}, {format_bytes(report.bytes)}, verified "
        f"({report.skipped_files:,} were there already)."
    )
    _say(arguments, {"to": where, **dataclasses.asdict(report)}, text)


def _say(
    arguments: argparse.Namespace, content: dict[str, Any], text: str, always: bool = False
) -> None:
    if arguments.json:
        print(json.dumps(content, indent=1))
    elif always or not arguments.quiet:
        print_wrapped(text, hanging=2)


def _progress(arguments: argparse.Namespace) -> ProgressDisplay:
    from utils.base.progress import ProgressDisplay

    return ProgressDisplay(enabled=not arguments.quiet)


COMMANDS = ("merge", "index", "inspect", "put", "get", "ls", "rm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    is_command = bool(words) and words[0] in COMMANDS
    arguments = (build_command_parser() if is_command else build_parser()).parse_args(words)
    arguments.words = words
    level = "debug" if arguments.debug else "info"
    configure_logging(level, quiet=arguments.quiet, stderr=True)
    return run_command(arguments.command, arguments)


if __name__ == "__main__":
    sys.exit(main())
