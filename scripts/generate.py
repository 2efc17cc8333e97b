"""Let a trained model write: from a checkpoint, an exported model, a bucket or the Hub.

    python scripts/generate.py latest --prompt "Once upon a time"
    python scripts/generate.py best --prompts-file prompts.txt --temperature 0 --json
    python scripts/generate.py gs://BUCKET/a/latest --prompt "def " --num-samples 4 --stop return
    python scripts/generate.py EleutherAI/pythia-70m --interactive

One text appears as it is made; several are made together (--batch-size) and shown in the order of
their prompts. On a terminal without a prompt it asks for prompts. The same command gives the same
texts. Time to the first token and tokens a second stand at the end, on standard error. Exit codes:
0 done, 1 memory or a bucket failed, 2 usage or a damaged model, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.base.console import (
    configure_logging,
    new_parser,
    run_command,
    without_control_characters,
)
from utils.base.errors import PretrainError, UsageError
from utils.base.startup import load_libraries
from utils.base.text import printable, to_json_text
from utils.tools.generation.arguments import add_model_arguments, find_from, load_found
from utils.tools.generation.prompts import read_prompts

if TYPE_CHECKING:
    from utils.models.generation import Sampling
    from utils.tools.generation.texts import Text, TextGenerator, TextJob

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see train.py

# As the texts that a run writes at its evaluations.
TEMPERATURE, TOP_P = 0.8, 0.95
MAX_TOKENS = 128
BATCH_SIZE = 8
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"
MARKER = "> "
HELP = """\
Any line is a prompt; the model goes on from it. Ctrl-C ends a text.
  /set               what is set
  /set NAME VALUE    temperature, top_k, top_p, repetition_penalty, seed, max_tokens
  /quit              end (also Ctrl-D)
  //...              a prompt that begins with a slash"""

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(run, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("generate.py", __doc__)
    prompts = parser.add_argument_group("prompts").add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help='may be repeated; "": from nothing'
    )
    prompts.add_argument(
        "--prompts-file",
        metavar="F",
        help='a prompt a line, or JSON lines with "prompt"; - is standard input',
    )
    prompts.add_argument("--interactive", action="store_true", help="ask for prompts")
    _add_sampling_arguments(parser)
    add_model_arguments(parser)
    return parser


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("texts").add_argument
    add("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help=f"(default: {MAX_TOKENS})")
    add(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        metavar="T",
        help=f"0 takes the likeliest token each time (default: {TEMPERATURE})",
    )
    add("--top-k", type=int, default=0, metavar="K", help="of the K likeliest (default: all)")
    add(
        "--top-p",
        type=float,
        default=TOP_P,
        metavar="P",
        help=f"of the likeliest that together have P (default: {TOP_P})",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: what is there already becomes less likely (default: 1)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="sample n has N + n, the texts of a batch that of the first (default: 0)",
    )
    add("--num-samples", type=int, default=1, metavar="N", help="texts of each prompt")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends a text, and is no part of it; may be repeated; \\n and \\t are understood",
    )
    add("--ignore-eos", action="store_true", help="go on after the end of a text")
    add(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="N",
        help=f"texts made together (default: {BATCH_SIZE})",
    )
    add("--no-stream", action="store_true", help="show a text when it is finished")


def run(args: argparse.Namespace) -> None:
    """Load the model and write the texts that the command line asks for."""
    configure_logging("debug" if args.debug else "info", stderr=True)
    prompts = find_prompts(args)
    source = find_from(args)
    load_libraries()
    from utils.models.generation import Sampling
    from utils.tools.generation.texts import TextGenerator

    sampling = Sampling(
        args.max_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        args.seed,
        args.repetition_penalty,
    )
    loaded = load_found(args, source)
    _say(f"{loaded.source.name}: {str(loaded.model.dtype)[6:]} on {loaded.device}")
    generator = TextGenerator(
        loaded,
        stops=[text.replace("\\n", "\n").replace("\\t", "\t") for text in args.stop],
        ignore_end=args.ignore_eos,
        batch_size=args.batch_size,
    )
    if prompts is None:
        Session(generator, sampling).run()
        return
    jobs = generator.plan(prompts, sampling, args.num_samples)
    write_texts(generator, jobs, args)


def find_prompts(args: argparse.Namespace) -> list[str] | None:
    """Return the prompts of a command line; None where they are asked for.

    Raises:
        UsageError: There are none, or they cannot be read.
    """
    if args.prompt is not None:
        return list(args.prompt)
    if args.prompts_file is not None:
        return read_prompts(args.prompts_file)
    if not (args.interactive or sys.stdin.isatty()):
        raise UsageError("Give --prompt TEXT or --prompts-file F (- reads standard input).")
    if args.json:
        raise UsageError("--json needs --prompt or --prompts-file.")
    return None


def write_texts(
    generator: TextGenerator, jobs: Sequence[TextJob], args: argparse.Namespace
) -> None:
    """Write the texts of jobs to standard output, and what they took to standard error."""
    one_by_one = len(jobs) == 1 or args.batch_size == 1
    streams = one_by_one and not (args.no_stream or args.json)
    texts = generator.write(jobs, _show_piece if streams else None)
    try:
        for number, job in enumerate(jobs, start=1):
            if streams:
                _show_begin(job, number, len(jobs))
            text = next(texts)
            if args.json:
                print(to_json_text(describe(text), indent=None), flush=True)
            else:
                if not streams:
                    _show_begin(job, number, len(jobs))
                    _show_piece(text.text)
                _show_end(text)
    except KeyboardInterrupt:
        if streams:
            print()
        raise
    finally:
        if generator.speed.texts:
            _say(generator.speed.describe())


def describe(text: Text) -> dict[str, Any]:
    """Return what `--json` says of a text."""
    return {
        "prompt": text.job.prompt,
        "sample": text.job.sample,
        "text": text.text,
        "finish_reason": text.finish,
        "tokens": len(text.token_ids),
        "token_ids": text.token_ids,
        "prompt_tokens": len(text.job.ids),
        "seed": text.job.sampling.seed,
        "first_token_seconds": round(text.first_token_seconds, 6),
        "seconds": round(text.seconds, 6),
    }


class Session:
    """Asks for prompts and writes a text of each, until the user ends it.

    Every text has a seed of its own: the first that of the command line, then one more each.
    """

    def __init__(self, generator: TextGenerator, sampling: Sampling) -> None:
        self._generator, self._sampling = generator, sampling

    def run(self) -> None:
        """Ask until `/quit` or the end of the input; Ctrl-C ends a text, between texts all."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then has a history
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        _say("Type a prompt; /help says what else.")
        while True:
            try:
                line = input(MARKER if is_terminal else "")
            except EOFError:
                return
            if line.strip() == "/quit":
                return
            try:
                self._obey(line)
            except PretrainError as exc:
                _say(f"Error: {exc}")

    def _obey(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            word, *rest = line.split()
            if word == "/set":
                self._set(rest)
            else:
                _say(HELP if word == "/help" else f"{printable(word)} is no command.\n{HELP}")
        elif line.strip():
            self._write(line.removeprefix("/"))

    def _set(self, words: Sequence[str]) -> None:
        values = asdict(self._sampling)
        if len(words) == 2:
            name, value = words[0].replace("-", "_"), words[1]
            if name not in values:
                raise UsageError(f"{printable(name)} is none of {', '.join(values)}.")
            try:
                changed = {name: type(values[name])(value)}
            except ValueError as exc:
                raise UsageError(f"{printable(value)} is no number for {name}.") from exc
            self._sampling = replace(self._sampling, **changed)
        elif words:
            raise UsageError("Say /set NAME VALUE.")
        _say("  ".join(f"{name}={value}" for name, value in asdict(self._sampling).items()))

    def _write(self, prompt: str) -> None:
        from utils.tools.generation.texts import Speed

        (job,) = self._generator.plan([prompt], self._sampling)
        self._generator.speed = Speed()
        _show_begin(job)
        try:
            (text,) = self._generator.write([job], _show_piece)
            _show_end(text)
            _say(f"{self._generator.speed.describe()}; seed {self._sampling.seed}")
        except KeyboardInterrupt:
            print()
            _say("The text was ended.")
        self._sampling = replace(self._sampling, seed=self._sampling.seed + 1)


def _show_begin(job: TextJob, number: int = 1, count: int = 1) -> None:
    if count > 1:
        print(f"--- {number} of {count}")
    prompt = without_control_characters(job.prompt)
    print(f"{BOLD}{prompt}{PLAIN}" if prompt and _has_colours() else prompt, end="", flush=True)


def _show_piece(piece: str) -> None:
    print(without_control_characters(piece), end="", flush=True)


def _show_end(text: Text) -> None:
    """End the line of a text; say what ended it where that is a fault."""
    print(flush=True)
    if text.finish == "not_finite":
        _say("The model's logits are not finite: its weights are broken.")


def _has_colours() -> bool:
    return (
        sys.stdout.isatty()
        and "NO_COLOR" not in os.environ
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def _say(message: str) -> None:
    sys.stdout.flush()
    print(without_control_characters(message), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
