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
import itertools
import json
import logging
import sys
import time
import warnings
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

if TYPE_CHECKING:
    from utils.base.progress import ProgressDisplay
    from utils.corpus.prepare import CorpusOptions, Preparation
    from utils.corpus.shard_inspection import Inspection
    from utils.corpus.tasks.tasks import TaskedCorpus
    from utils.corpus.text_sources import Source
    from utils.corpus.token_cache import TokenCache
    from utils.storage.bucket import Bucket

SAMPLE_VOCAB_SIZE = 4096
DEFAULT_VALIDATION_FRACTION = 0.05
DEFAULT_TOKEN_CACHE = "cache/tokens"  # noqa: S105 - not a password
TOKEN_CACHE_BYTES = 10**10  # the least recently used goes first
SHOWN_SHARDS = 3
NO_CACHE = "off"
# Options that say how sources are read, and the sources that they are for.
SOURCE_OPTIONS = {
    "document_per": "text files",
    "document_separator": "text files that hold it",
    "text_column": "JSON, .parquet, .arrow, saved datasets, MDS and --hf",
    "skip_null": "text in JSON, .parquet and --hf",
    "hf_config": "an --hf dataset that has it",
    "split": "an --hf dataset that has it",
    "streaming": "--hf NAME",
    "token_dtype": ".bin files and MDS",
    "eos_id": "token files",
    "token_cache": "text",
}
TOKENIZER_TASK = "tokenizer"
DEFAULT_TEXT_COLUMN = "text"
LONGEST_LINE = 2000

_logger = logging.getLogger("prepare_data")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of a preparation; the parsed arguments carry their function."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = new_parser("prepare_data.py", description, examples)
    parser.set_defaults(command=prepare)
    _add_source_arguments(parser.add_argument_group("sources (any number, read in this order)"))
    _add_tokenizer_arguments(parser.add_argument_group("tokenizer"))
    _add_validation_arguments(parser.add_argument_group("validation (one of)"))
    _add_output_arguments(parser.add_argument_group("output"))
    _add_task_arguments(parser.add_argument_group("many machines"))
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
        help="text, JSON lines or .parquet files (also .gz, .zst), token files of other tools "
        "(docs/DATA.md), directories, 'globs'; PATH::COLUMN names the column for this one alone",
    )
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--document-per",
        choices=("file", "line"),
        help="what a document is in a text file (default: file)",
    )
    choice.add_argument(
        "--document-separator",
        type=_read_escapes,
        metavar="TEXT",
        help="what stands between documents in a text file, such as '<|endoftext|>' or '\\n\\n'",
    )
    group.add_argument(
        "--text-column",
        metavar="NAME",
        help=f"column of the text in JSON, .parquet and --hf (default: {DEFAULT_TEXT_COLUMN}), or "
        "of token ids in tables and MDS (default: input_ids, tokens, token_ids or ids)",
    )
    group.add_argument(
        "--hf", metavar="NAME", help="Hugging Face dataset, by name or directory (or NAME::COLUMN)"
    )
    group.add_argument("--hf-config", metavar="NAME", help="named subset of the --hf dataset")
    group.add_argument("--split", metavar="NAME", help="split of --hf (default: train)")
    group.add_argument("--streaming", action="store_true", help="do not download --hf first")
    group.add_argument(
        "--token-dtype",
        metavar="TYPE",
        help="type of the ids in .bin files that do not say it: uint16, uint32, ...",
    )
    group.add_argument(
        "--eos-id",
        type=int,
        metavar="N",
        help="id that ends each document in token files; where the format does not say what a "
        "document is, a file without it is one",
    )
    group.add_argument("--dedup", action="store_true", help="leave out exact repeats")
    group.add_argument(
        "--skip-null",
        action="store_true",
        help="leave out documents whose text is null or missing (default: an error)",
    )


def _read_escapes(text: str) -> str:
    r"""Return a text in which `\n`, `\x1e` and the like, as Python writes them, are read."""
    try:
        with warnings.catch_warnings(action="error"):  # of an escape that is not known
            found = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
        found.encode()
    except (UnicodeError, Warning) as exc:
        raise argparse.ArgumentTypeError(
            f"{printable(text)} cannot be read as text. Escapes are \\n \\r \\t \\f \\v \\0 \\xNN "
            "\\uNNNN; a backslash is \\\\."
        ) from exc
    if not found:
        raise argparse.ArgumentTypeError("it is empty; a text is needed.")
    return found


def _add_tokenizer_arguments(group: argparse._ArgumentGroup) -> None:
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"train a byte-level BPE of N tokens ({SAMPLE_VOCAB_SIZE} with --sample alone); with "
        "token files alone: the size of their vocabulary",
    )
    choice.add_argument(
        "--tokenizer",
        metavar="T",
        help="take an existing one: directory, tokenizer.json, Hugging Face name, SentencePiece "
        ".model, tiktoken:NAME or .tiktoken file",
    )
    group.add_argument(
        "--special-token",
        action="append",
        default=[],
        metavar="T",
        help="further special token of a trained tokenizer, besides <|endoftext|> (repeatable)",
    )
    group.add_argument(
        "--token-cache",
        metavar="DIR",
        help="what was tokenized before is taken from here, of at most 10 GB (default: "
        f"{DEFAULT_TOKEN_CACHE}; with --sample alone, --tasks and for '{NO_CACHE}': none)",
    )


def _add_validation_arguments(group: argparse._ArgumentGroup) -> None:
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="about this share of the tokens, in whole documents from all over (default: 0.05)",
    )
    choice.add_argument(
        "--validation-tail",
        type=float,
        metavar="F",
        help="the last documents: those that begin in this share of the text at its end",
    )
    choice.add_argument(
        "--validation-input",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="files, directories or globs of their own (also PATH::COLUMN)",
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
    group.add_argument("--compress", action="store_true", help="deflate the shards")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace other data in the output; with --task I, in that part alone",
    )


def _add_task_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tasks",
        type=int,
        metavar="N",
        help="divide the sources into N parts of about as many bytes; validation is then by a hash "
        "of each document, the same for every N",
    )
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--task",
        type=_read_task,
        metavar="I",
        help=f"prepare part I, from 0; '{TOKENIZER_TASK}': train the tokenizer of --vocab-size, "
        "once, before the parts",
    )
    _add_executor_arguments(choice, group)
    group.add_argument(
        "--tokenizer-sample",
        type=int,
        metavar="BYTES",
        help="text that the tokenizer of --tasks is trained on, from all over (default: 10^9)",
    )


def _add_executor_arguments(
    choice: argparse._ActionsContainer, group: argparse._ActionsContainer
) -> None:
    choice.add_argument(
        "--executor",
        choices=("local", "slurm", "ray"),
        help="run all tasks and the merge through datatrove (pip install datatrove)",
    )
    group.add_argument(
        "--executor-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of datatrove's executor, such as workers=4, partition=cpu, time=10:00:00 "
        "(repeatable)",
    )


def _read_task(text: str) -> int | str:
    if text == TOKENIZER_TASK or text.isdecimal():
        return text if text == TOKENIZER_TASK else int(text)
    raise argparse.ArgumentTypeError(f"a number from 0, or {TOKENIZER_TASK}, is needed.")


def prepare(arguments: argparse.Namespace) -> int:
    """Prepare the corpus that the command line describes and say what came out."""
    from utils.corpus.output import open_output
    from utils.corpus.prepare import prepare_corpus

    start = time.monotonic()
    sources, validation_sources, options = _build_request(arguments)
    cache = _open_cache(arguments)
    corpus = _build_tasks(arguments, sources, validation_sources, options)
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


def _build_tasks(
    arguments: argparse.Namespace,
    sources: list[Source],
    validation_sources: list[Source],
    options: CorpusOptions,
) -> TaskedCorpus | None:
    """Return the corpus as tasks prepare it; None where one process does."""
    from utils.corpus.tasks.tasks import DEFAULT_SAMPLE_BYTES, TaskedCorpus

    if arguments.tasks is None:
        for name in ("task", "executor", "tokenizer_sample"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} goes with --tasks N.")
    elif arguments.task is None and arguments.executor is None:
        raise UsageError("--tasks needs --task I (one part), or --executor NAME (all of them).")
    if arguments.executor_option and not arguments.executor:
        raise UsageError("--executor-option goes with --executor NAME.")
    if arguments.tasks is None:
        return None
    sample_bytes = arguments.tokenizer_sample
    if sample_bytes is not None and options.tokenizer is not None:
        raise UsageError(
            "--tokenizer-sample goes with --vocab-size: --tokenizer is trained already."
        )
    sample_bytes = DEFAULT_SAMPLE_BYTES if sample_bytes is None else sample_bytes
    return TaskedCorpus(sources, validation_sources, options, arguments.tasks, sample_bytes)


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
    run = None if arguments.executor is None else _plan_tasks(arguments, bucket.uri)
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


def _plan_tasks(arguments: argparse.Namespace, uri: str) -> Callable[[], bool]:
    """Return what runs all tasks; each is this command, with --task in place of --executor."""
    from configs.config_files import parse_assignment
    from utils.corpus.tasks.executors import plan_tasks

    own = argparse.ArgumentParser(add_help=False)
    _add_executor_arguments(own, own)
    _, words = own.parse_known_args(arguments.words)
    settings = dict(map(parse_assignment, arguments.executor_option))
    return plan_tasks(arguments.executor, words, arguments.tasks, uri, settings)


def merge_parts(arguments: argparse.Namespace) -> int:
    """Write the index of what all tasks have prepared and say what came out."""
    from utils.corpus.output import open_output
    from utils.corpus.tasks.tasks import merge_tasks

    start = time.monotonic()
    with closing(open_output(arguments.output, "merge")) as bucket:
        preparation = merge_tasks(bucket)
    _say_prepared(arguments, preparation, bucket.uri, start)
    return ExitCode.DONE


def _build_request(
    arguments: argparse.Namespace,
) -> tuple[list[Source], list[Source], CorpusOptions]:
    from utils.checkpoints.store import require_recorded_tokenizer
    from utils.corpus.prepare import DEFAULT_SHARD_TOKENS, CorpusOptions

    if not (arguments.sample or arguments.input or arguments.hf):
        raise UsageError("Nothing to prepare: give --sample, --input PATH ... or --hf NAME.")
    if arguments.eos_id is not None and arguments.eos_id < 0:
        raise UsageError(f"--eos-id must be at least 0, got {arguments.eos_id}.")
    if arguments.tokenizer is not None:
        require_recorded_tokenizer(arguments.tokenizer)
    is_sample_alone = _is_sample_alone(arguments)
    vocab_size = arguments.vocab_size
    if vocab_size is None and arguments.tokenizer is None and is_sample_alone:
        vocab_size = SAMPLE_VOCAB_SIZE
    shard_tokens = arguments.shard_tokens
    if shard_tokens is None and not is_sample_alone:
        shard_tokens = DEFAULT_SHARD_TOKENS
    fraction = arguments.validation_fraction
    if fraction is None:
        is_other = arguments.validation_tail is not None or arguments.validation_input
        fraction = 0.0 if is_other else DEFAULT_VALIDATION_FRACTION
    sources = _build_sources(arguments, shard_tokens)
    if vocab_size is None and arguments.tokenizer is None and all(s.holds_tokens for s in sources):
        raise UsageError(
            "The input holds token ids: give --tokenizer T, the one they were made with, or "
            "--vocab-size N and --eos-id N."
        )
    options = CorpusOptions(
        vocab_size=vocab_size,
        tokenizer=arguments.tokenizer,
        special_tokens=tuple(arguments.special_token),
        eos_token_id=arguments.eos_id if arguments.tokenizer is None else None,
        validation_fraction=fraction,
        validation_tail=arguments.validation_tail or 0.0,
        shard_tokens=shard_tokens,
        compress=arguments.compress,
        deduplicate=arguments.dedup,
        skip_null=arguments.skip_null,
    )
    validation_sources = _file_sources(
        arguments.validation_input, arguments, shard_tokens, "--validation-input"
    )
    _refuse_unused(arguments, [*sources, *validation_sources])
    return sources, validation_sources, options


def _is_sample_alone(arguments: argparse.Namespace) -> bool:
    others = (arguments.input, arguments.hf, arguments.validation_input)
    return bool(arguments.sample and not any(others))


def _refuse_unused(arguments: argparse.Namespace, sources: Sequence[Source]) -> None:
    for option, what in SOURCE_OPTIONS.items():
        value = getattr(arguments, option)
        if value in (None, NO_CACHE) or value is False:
            continue
        if not any(source.uses(option) for source in sources):
            words = f"--{option.replace('_', '-')}" + f" {value!r}" * (value is not True)
            raise UsageError(f"{words} has no effect here: it goes with {what}.")


def _build_sources(arguments: argparse.Namespace, shard_tokens: int | None) -> list[Source]:
    from utils.corpus.file_kinds import split_column
    from utils.corpus.text_sources import HubSource, SampleSource

    sources: list[Source] = []
    if arguments.sample:
        sources.append(SampleSource())
    sources += _file_sources(arguments.input, arguments, shard_tokens, "--input")
    if arguments.hf:
        name, column = split_column(arguments.hf, arguments.text_column or DEFAULT_TEXT_COLUMN)
        names = (name, arguments.split or "train", arguments.hf_config, column)
        sources.append(HubSource(*names, streaming=arguments.streaming))
    return sources


def _file_sources(
    patterns: Sequence[str],
    arguments: argparse.Namespace,
    shard_tokens: int | None,
    option: str,
) -> list[Source]:
    """Return the sources that paths name; neighbours of one kind are one source."""
    from utils.corpus.file_kinds import find_files
    from utils.corpus.text_sources import FileSource
    from utils.corpus.token_files.kinds import ARROW, FLAT, token_kind
    from utils.corpus.token_files.source import BLOCK_TOKENS, TokenFileSource

    def is_tokens(path: Path, column: str) -> bool:
        # A directory may hold a .bin of any kind: only who tells the type means token ids.
        # The .arrow files of a saved dataset are one: beside them lie those that `map` has kept.
        kind = token_kind(path, column)
        is_part = kind == ARROW and (path.parent / "state.json").exists()
        is_unknown = kind == FLAT and arguments.token_dtype is None
        return kind is not None and not is_part and not is_unknown

    sources: list[Source] = []
    found = find_files(patterns, is_tokens, option, arguments.text_column or DEFAULT_TEXT_COLUMN)
    groups = itertools.groupby(found, lambda one: (token_kind(*one) is not None, one[1]))
    for (holds_tokens, column), group in groups:
        paths = tuple(path for path, _ in group)
        if holds_tokens:
            part_tokens = max(1, min(BLOCK_TOKENS, shard_tokens or BLOCK_TOKENS))
            how = (arguments.token_dtype, arguments.eos_id)
            sources.append(TokenFileSource(paths, *how, part_tokens=part_tokens, column=column))
        else:
            cut = (arguments.document_per, column, arguments.document_separator or "")
            sources.append(FileSource(paths, *cut))
    return sources


def _open_cache(arguments: argparse.Namespace) -> TokenCache | None:
    from utils.corpus.token_cache import TokenCache

    name = arguments.token_cache
    if name is None:
        is_off = _is_sample_alone(arguments) or arguments.tasks is not None
        name = NO_CACHE if is_off else DEFAULT_TOKEN_CACHE
    if name == NO_CACHE:
        return None
    require_path(name, "--token-cache")
    directory = Path(name).expanduser()
    if any(path.exists() and not path.is_dir() for path in (directory, *directory.parents)):
        raise UsageError(f"--token-cache {name} is a file; a directory is needed.")
    return TokenCache(directory, TOKEN_CACHE_BYTES)


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
        inspection = inspect_shards(bucket, SHOWN_SHARDS, arguments.verify, only)
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
