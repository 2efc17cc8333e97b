"""What prepare_data.py is asked for: the words, and the sources, options and tasks they mean.

    command line -> sources, CorpusOptions, TokenCache, TaskedCorpus

What contradicts itself or has no effect is refused before anything is written.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.base.errors import UsageError
from utils.base.text import printable
from utils.base.uri import require_path
from utils.corpus.file_kinds import DEFAULT_COLUMN, find_files, list_names, split_column

if TYPE_CHECKING:
    from utils.corpus.documents import Source
    from utils.corpus.prepare import CorpusOptions
    from utils.corpus.tasks.tasks import TaskedCorpus
    from utils.corpus.token_cache import TokenCache

SAMPLE_VOCAB_SIZE = 4096
DEFAULT_TOKEN_CACHE = "cache/tokens"  # noqa: S105 - not a password
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
    "eos_id": "token files (in tables, a column of lists of integers)",
    "token_cache": "text",
}
TOKENIZER_TASK = "tokenizer"


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that say what is prepared, with what tokenizer, and where."""
    _add_source_arguments(parser.add_argument_group("sources (any number, read in this order)"))
    _add_tokenizer_arguments(parser.add_argument_group("tokenizer"))
    _add_validation_arguments(parser.add_argument_group("validation (one of)"))
    _add_output_arguments(parser.add_argument_group("output"))
    _add_task_arguments(parser.add_argument_group("many machines"))


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
        help=f"column of the text in JSON, .parquet and --hf (default: {DEFAULT_COLUMN}), or "
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


def build_request(
    arguments: argparse.Namespace,
) -> tuple[list[Source], list[Source], CorpusOptions]:
    """Return what is prepared, what is held out besides, and how.

    Raises:
        UsageError: Words are missing, contradict each other or have no effect.
        DataError: A file cannot be read.
    """
    from utils.checkpoints.store import require_recorded_tokenizer
    from utils.corpus.prepare import (
        DEFAULT_SHARD_TOKENS,
        DEFAULT_VALIDATION_FRACTION,
        CorpusOptions,
    )

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
    trained, held = ({path.resolve() for path in _paths(s)} for s in (sources, validation_sources))
    if both := sorted(trained & held):
        raise UsageError(
            f"--validation-input: {list_names(both)} is in --input, too, and would be trained on. "
            "Take it out of there."
        )
    return sources, validation_sources, options


def _paths(sources: Sequence[Source]) -> list[Path]:
    return [path for source in sources for path in getattr(source, "paths", ())]


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
    from utils.corpus.text_sources.hub import HubSource
    from utils.corpus.text_sources.sample import SampleSource

    sources: list[Source] = []
    if arguments.sample:
        sources.append(SampleSource())
    sources += _file_sources(arguments.input, arguments, shard_tokens, "--input")
    if arguments.hf:
        name, column = split_column(arguments.hf, arguments.text_column or DEFAULT_COLUMN)
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
    from utils.corpus.text_sources.files import FileSource
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
    found = find_files(patterns, is_tokens, option, arguments.text_column or DEFAULT_COLUMN)
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


def build_tasks(
    arguments: argparse.Namespace,
    sources: list[Source],
    validation_sources: list[Source],
    options: CorpusOptions,
) -> TaskedCorpus | None:
    """Return the corpus as tasks prepare it; None where one process does.

    Raises:
        UsageError: Words of tasks are missing or contradict each other.
    """
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


def plan_executor(arguments: argparse.Namespace, uri: str) -> Callable[[], bool]:
    """Return what runs all tasks; each is this command, with --task in place of --executor."""
    from configs.config_files import parse_assignment
    from utils.corpus.tasks.executors import plan_tasks

    own = argparse.ArgumentParser(add_help=False)
    _add_executor_arguments(own, own)
    _, words = own.parse_known_args(arguments.words)
    settings = dict(map(parse_assignment, arguments.executor_option))
    return plan_tasks(arguments.executor, words, arguments.tasks, uri, settings)


def open_token_cache(arguments: argparse.Namespace) -> TokenCache | None:
    """Return the cache of what was tokenized before, None where there is to be none.

    Raises:
        UsageError: Its place is no directory.
    """
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
    return TokenCache(directory)
