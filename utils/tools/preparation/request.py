"""What prepare_data.py is asked for: the sources, options and tasks that its words mean.

    command line -> sources, CorpusOptions, TokenCache, TaskedCorpus

What contradicts itself or has no effect is refused before anything is written.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.base.errors import UsageError
from utils.base.uri import require_path
from utils.corpus.file_kinds import DEFAULT_COLUMN, find_files, list_names, split_column
from utils.tools.preparation.arguments import (
    DEFAULT_TOKEN_CACHE,
    NO_CACHE,
    SAMPLE_VOCAB_SIZE,
    add_executor_arguments,
)

if TYPE_CHECKING:
    from utils.corpus.documents import Source
    from utils.corpus.prepare import CorpusOptions
    from utils.corpus.tasks.tasks import TaskedCorpus
    from utils.corpus.token_cache import TokenCache

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
    add_executor_arguments(own, own)
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
