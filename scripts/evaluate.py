"""Measure trained models: loss, perplexity, bits per byte, HellaSwag, last words, any task.

    python scripts/evaluate.py latest                        validation shards of its run
    python scripts/evaluate.py all --plot losses.png         every checkpoint; 100-500: those steps
    python scripts/evaluate.py latest best exported/ --data gs://bucket/data --stride 256
    python scripts/evaluate.py latest --hellaswag hellaswag_val.jsonl --lambada lambada_test.jsonl
    python scripts/evaluate.py latest --average 5    the mean of it and the four before it
    python scripts/evaluate.py latest --tasks arc_easy,piqa --limit 100

Without a task, loss and perplexity are measured; with tasks only where --data or --perplexity is
there, too. Every token of the validation shards but the first is predicted exactly once, in windows
of --sequence-length tokens. The evaluations of training cut the shards into samples, and differ a
little: --like-training measures as they do. A --stride below --sequence-length gives each token
more context, and takes so much longer. Bits per byte: nats / ln 2 over the UTF-8 bytes of the text
that the predicted tokens stand for, by the model's own tokenizer; special tokens have none.

HellaSwag (acc_norm: by log-likelihood for each character of the ending) and last words (LAMBADA)
are tasks of EleutherAI's lm-evaluation-harness over that file, --tasks any other of its tasks
(pip install "lm-eval[hf]"). Every result is appended to logs/evaluations.jsonl, and
checkpoint_viewer.py view NAME shows it. If one model cannot be measured, the others
still are. Exit codes: 0 done, 1 something failed, 2 usage, or a model or data that cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.config_files import parse_assignment
from configs.training_config import TrainingConfig
from utils.base.console import configure_logging, new_parser, print_wrapped, run_command
from utils.base.errors import (
    DataError,
    ExitCode,
    PretrainError,
    SaveError,
    StorageError,
    UsageError,
)
from utils.base.progress import ProgressDisplay
from utils.base.tables import print_table
from utils.base.text import printable, to_json_text
from utils.base.uri import require_place
from utils.checkpoints.layout import RunPaths
from utils.checkpoints.views import describe_lack
from utils.tools.evaluation.evaluator import MEASURED_SPLITS, EvaluationPlan, Evaluator, TextPlan
from utils.tools.evaluation.harness import require_harness
from utils.tools.evaluation.log import Evaluation, append_evaluation, metric_points
from utils.tools.evaluation.questions import HELLASWAG, LAMBADA, read_questions
from utils.tools.evaluation.text import (
    describe_drawn,
    draw_evaluations,
    left_out_notes,
    table_columns,
    tables,
)
from utils.tools.generation.arguments import (
    add_model_arguments,
    find_from,
    load_found,
    read_model_config,
)
from utils.tools.viewer.shelf import open_shelf
from utils.tracking.plots import picture_path

ALL = "all"
_RANGE = re.compile(r"(?=.*\d)(\d{0,12})-(\d{0,12})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(run, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("evaluate.py", __doc__)
    add_model_arguments(parser, several=True, averages=True)
    add_text_options(parser.add_argument_group("loss and perplexity"))
    add_task_options(parser.add_argument_group("tasks"))
    add = parser.add_argument
    add(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help="samples or answers in one forward (default: as many as are quick)",
    )
    add("--plot", type=Path, metavar="F", help="draw the main figures over steps: PNG, SVG, PDF")
    return parser


def add_text_options(group: argparse._ArgumentGroup) -> None:
    """Add what says which text is measured, and how."""
    add = group.add_argument
    add("--perplexity", action="store_true", help="also where tasks are named")
    add(
        "--data",
        metavar="URI",
        help="shards (default: those of the model's run, of a mixture the first source)",
    )
    add(
        "--split",
        choices=MEASURED_SPLITS,
        default=MEASURED_SPLITS[0],
        help=f"(default: {MEASURED_SPLITS[0]})",
    )
    # The first token is not predicted.
    add("--max-tokens", type=at_least(2), metavar="N", help="only so many, the first")
    add(
        "--sequence-length",
        type=at_least(1),
        metavar="N",
        help="tokens that the model sees at once (default: as in its run, else at most 2048)",
    )
    add(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="from one window to the next (default: the sequence length)",
    )
    add("--like-training", action="store_true", help="the samples of a run's own evaluations")


def add_task_options(group: argparse._ArgumentGroup) -> None:
    """Add what says which tasks are measured."""
    add = group.add_argument
    formats = {HELLASWAG: "JSONL of its own format", LAMBADA: "JSONL with text, or a text a line"}
    for task, text in formats.items():
        add(
            f"--{task}",
            nargs="?",
            const="",
            metavar="FILE",
            help=f"{text}; no file: from the Hub",
        )
    add("--tasks", metavar="A,B", help="tasks of lm-evaluation-harness")
    add("--tasks-path", type=Path, metavar="DIR", help="YAML files of more of its tasks")
    add(
        "--num-fewshot",
        type=at_least(0),
        metavar="N",
        help="examples before a question of --tasks",
    )
    add("--limit", type=at_least(1), metavar="N", help="only so many questions of each task")


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number of an option, `least` or more."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole_number


def run(args: argparse.Namespace) -> int:
    """Measure the models that the command line names; what is done is kept, whatever comes next."""
    configure_logging("debug" if args.debug else "warning", stderr=True)
    if not sys.stderr.isatty():  # the bars of the libraries, which read this when they are loaded
        os.environ.setdefault("TQDM_DISABLE", "1")
    if args.plot is not None:
        args.plot = picture_path(args.plot)
    config = read_model_config(args)
    plan = build_plan(args)
    names = choose_models(args.models, config)
    session = Session(args, config)
    try:
        with contextlib.closing(Evaluator(plan, config)) as evaluator:
            for name in names:
                session.measure(name, evaluator)
    finally:
        session.show()
    return session.exit_code


def build_plan(args: argparse.Namespace) -> EvaluationPlan:
    """Return what is measured; the questions of tasks are read already.

    Raises:
        UsageError: Options do not fit each other, or a file cannot be used.
    """
    if args.data is not None:
        require_place(args.data, "--data")
    fixed = [args.stride, args.sequence_length, args.max_tokens]
    if args.like_training and (any(fixed) or args.split != MEASURED_SPLITS[0]):
        raise UsageError(
            "--like-training is what the run did: it takes no --stride, --sequence-length, "
            "--max-tokens or --split."
        )
    if args.tasks_path is not None and not args.tasks_path.is_dir():
        raise UsageError(f"--tasks-path {printable(str(args.tasks_path))} is no directory.")
    tasks = [task.strip() for task in (args.tasks or "").split(",") if task.strip()]
    given = {task: getattr(args, task) for task in (HELLASWAG, LAMBADA)}
    given = {task: source for task, source in given.items() if source is not None}
    for option in [*given, *(["tasks"] if tasks else [])]:
        require_harness(f"--{option}")
    questions = {
        task: read_questions(task, source) if source else None for task, source in given.items()
    }
    is_text = not (tasks or questions) or args.perplexity or args.data or args.like_training
    data = args.data or dict(map(parse_assignment, args.set)).get("data_uri")
    text = TextPlan(
        data if isinstance(data, str) else None,
        args.split,
        args.sequence_length,
        args.stride,
        args.max_tokens,
        is_like_training=args.like_training,
    )
    return EvaluationPlan(
        text if is_text else None,
        questions,
        tasks,
        args.tasks_path,
        args.num_fewshot,
        args.limit,
        args.batch_size,
    )


def choose_models(texts: Sequence[str], config: TrainingConfig) -> list[str]:
    """Return the models that are meant: `all` and ranges of steps become names.

    Raises:
        UsageError: There are no such checkpoints.
    """
    names: list[str] = []
    for text in texts:
        match = _RANGE.fullmatch(text)
        if (text != ALL and match is None) or Path(text).is_dir():
            names.append(text)
            continue
        first, last = (match[1], match[2]) if match is not None else ("", "")
        with open_shelf(config) as shelf:
            found = [
                str(name)
                for name in shelf.names
                if int(first or 0) <= name.step and (not last or name.step <= int(last))
            ]
        if not found:
            lack = f"there is no such checkpoint in {shelf.where}."
            lack = lack if shelf.names else describe_lack(shelf.where)
            raise UsageError(f"{printable(text)}: {lack}")
        names += found
    return list(dict.fromkeys(names))


class Session:
    """One call of the command: what was measured, what failed, and where it is kept."""

    def __init__(self, args: argparse.Namespace, config: TrainingConfig) -> None:
        self._args, self._config, self._log = args, config, RunPaths.of(config).evaluations
        self.evaluations: list[Evaluation] = []
        self.problems: list[dict[str, str]] = []
        self.exit_code = int(ExitCode.DONE)
        self._num_kept = 0

    def measure(self, name: str, evaluator: Evaluator) -> None:
        """Measure one model; each result is written when it is there.

        Raises:
            DataError: The data cannot be used, by no other model either.
            StorageError: They cannot be read.
        """
        try:
            loaded = load_found(self._args, find_from(self._args, name, self._config))
        except PretrainError as exc:
            self._note(name, exc)
            return
        with ProgressDisplay(enabled=not self._args.json, unit="tokens") as display:
            for task, measure in evaluator.measures():
                try:
                    found = measure(loaded, display.update)
                except (DataError, StorageError):
                    raise
                except PretrainError as exc:
                    self._note(f"{loaded.source.name}, {task}", exc)
                    continue
                for evaluation in found:
                    self.evaluations.append(evaluation)
                    self._keep(evaluation)
        del loaded
        _free_memory()

    def _keep(self, evaluation: Evaluation) -> None:
        """Append an evaluation to the log; one that cannot be written is shown all the same."""
        try:
            append_evaluation(self._log, evaluation)
            self._num_kept += 1
        except OSError as exc:
            reason = f"{self._log} cannot be written: {exc.strerror or exc}."
            self._note(f"{evaluation.model}, {evaluation.task}", SaveError(reason))

    def _note(self, name: str, exc: PretrainError) -> None:
        """Keep what is wrong with a model, and say it now: others may take long."""
        self.problems.append({"model": name, "problem": str(exc)})
        self.exit_code = max(self.exit_code, int(exc.exit_code))
        print(f"Error: {printable(name)}: {printable(str(exc), 1000)}", file=sys.stderr)

    def show(self) -> None:
        """Print the results, and draw them where a picture is asked for."""
        args = self._args
        known = [found for found in self.evaluations if found.main_metric is not None]
        names = dict.fromkeys(f"{found.task}.{found.main_metric}" for found in known)
        drawn = [metric_points(self.evaluations, name) for name in names]
        drawn = [points for points in drawn if points.steps]
        saved = None
        if args.plot is not None and drawn:
            saved = draw_evaluations(drawn, args.plot)
        if args.json:
            values = {
                "evaluations": [found.to_json() for found in self.evaluations],
                "problems": self.problems,
                "saved": None if saved is None else str(saved),
                "log": str(self._log),
            }
            print(to_json_text(values))
            return
        for title, rows in tables(self.evaluations):
            print_table(title, rows, table_columns(rows[0]))
        if saved is not None:
            print_wrapped(f"Plot saved to {printable(str(saved))}: {describe_drawn(drawn)}")
            for note in left_out_notes(drawn):
                print_wrapped(f"Note: {printable(note)}.")
        elif args.plot is not None:
            print("Nothing to draw: no figure of a checkpoint.", file=sys.stderr)
        if self._num_kept:
            print_wrapped(f"Results saved in {printable(str(self._log))}")


def _free_memory() -> None:
    """Give back what a model took, before the next one is loaded."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
