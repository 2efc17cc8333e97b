"""The words of prepare_data.py that say what is prepared, with what tokenizer, and where."""

from __future__ import annotations

import argparse
import warnings

from utils.base.text import printable
from utils.corpus.file_kinds import DEFAULT_COLUMN

SAMPLE_VOCAB_SIZE = 4096
DEFAULT_TOKEN_CACHE = "cache/tokens"  # noqa: S105 - not a password
NO_CACHE = "off"
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
    add_executor_arguments(choice, group)
    group.add_argument(
        "--tokenizer-sample",
        type=int,
        metavar="BYTES",
        help="text that the tokenizer of --tasks is trained on, from all over (default: 10^9)",
    )


def add_executor_arguments(
    choice: argparse._ActionsContainer, group: argparse._ActionsContainer
) -> None:
    """Add the words for datatrove's executors; `choice` is the group of which one may be given."""
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
