"""The words by which a command names a trained model, the same in every command.

    command line -> MODEL, --config, --device, ... -> find_model -> load_model -> loaded model

A download shows its progress on standard error. No torch here before a model is loaded.
"""

from __future__ import annotations

import argparse
import os
import re

from configs.training_config import ATTENTION_IMPLEMENTATIONS, TrainingConfig
from utils.base.progress import ProgressDisplay
from utils.command_line.arguments import add_run_arguments
from utils.command_line.run_config import read_run_config
from utils.remote.loading import DTYPES, LoadedModel, ModelSource, load_model
from utils.tools.generation.finding import AverageSpan, find_average, find_model

MODEL_HELP = (
    "a checkpoint's name, step, latest or best; a directory of a checkpoint or of an exported "
    "model; gs://BUCKET/... of an archive or of an exported model; or a name on the Hugging Face "
    "Hub (default: latest)"
)

_SPAN = re.compile(r"(\d{1,12})(-(\d{1,12}))?")


def add_model_arguments(
    parser: argparse.ArgumentParser,
    *,
    several: bool = False,
    loads: bool = True,
    averages: bool = False,
) -> None:
    """Add the words that say which model (`args.model`, or `args.models` of several).

    With `averages`, a model may be the mean of several checkpoints (`args.average`). Where the
    command computes with it (`loads`), also how it is loaded: device, data type, ...
    """
    add = parser.add_argument
    if several:
        text = f"{MODEL_HELP}; all: every checkpoint; A-B: those of these steps"
        add("models", metavar="MODEL", nargs="*", default=["latest"], help=text)
    else:
        add("model", metavar="MODEL", nargs="?", default="latest", help=MODEL_HELP)
    if averages:
        add(
            "--average",
            type=parse_span,
            metavar="N|A-B",
            help="the mean of the weights of the checkpoint and the N-1 before it on its branch, "
            "or of those of steps A to B; here or in the bucket",
        )
    if loads:
        _add_loading_arguments(parser)
    add_run_arguments(parser)


def _add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is loaded")
    group.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:N or mps (default: the GPU where there is one)",
    )
    group.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of the weights (default: as they are)"
    )
    group.add_argument(
        "--attention",
        default="sdpa",
        choices=ATTENTION_IMPLEMENTATIONS,
        metavar="NAME",
        help=f"{', '.join(ATTENTION_IMPLEMENTATIONS)} (default: sdpa)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="T",
        help="another tokenizer: a directory, a tokenizer.json or a name on the Hub",
    )


def parse_span(text: str) -> AverageSpan:
    """Return which checkpoints `--average` means."""
    match = _SPAN.fullmatch(text)
    if match is None or (match[3] is None and int(match[1]) < 2):
        raise argparse.ArgumentTypeError("give a number from 2 on, or steps such as 100-500")
    if match[3] is None:
        return AverageSpan(count=int(match[1]))
    return AverageSpan(None, int(match[1]), int(match[3]))


def read_model_config(args: argparse.Namespace) -> TrainingConfig:
    """Return the configuration of the run; where no model is of it, there may be none."""
    texts = args.models if "models" in args else [args.model]
    is_run_needed = not all("/" in text or os.path.isdir(text) for text in texts)  # noqa: PTH112 - Path.is_dir raises for too long a name
    return read_run_config(args, is_run_needed=is_run_needed)


def find_from(
    args: argparse.Namespace, text: str | None = None, config: TrainingConfig | None = None
) -> ModelSource:
    """Return where `args.model` is, or `text` of `args.models`; from a bucket it is downloaded.

    `config` is that of the run which `args` names, where it has been read already.

    Raises:
        UsageError: There is no such model.
        CheckpointError: It is damaged or incomplete.
        StorageError: The bucket cannot be read.
    """
    with ProgressDisplay(enabled=not args.json) as display:
        name, config = args.model if text is None else text, config or read_model_config(args)
        names = (args.config, args.output_dir, args.run_name, args.run)
        source = find_model(name, config, display.update, is_run_named=any(names))
        span = getattr(args, "average", None)
        return find_average(source, span, config, display.update) if span else source


def load_found(args: argparse.Namespace, source: ModelSource) -> LoadedModel:
    """Return a model that was found, loaded as the command line says.

    Raises:
        CheckpointError: It is damaged, or its weights do not fit its config.
        UsageError: There is no such device or tokenizer.
    """
    return load_model(
        source,
        device=args.device,
        dtype=args.dtype,
        attention=args.attention,
        tokenizer=args.tokenizer,
    )
