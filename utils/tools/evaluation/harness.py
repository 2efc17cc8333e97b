"""Tasks of EleutherAI's lm-evaluation-harness on a loaded model.

    loaded model, tasks -> lm_eval (an optional package) -> figures

The harness brings its tasks, and code with some of them. Their data come from the Hub or, for tasks
of one's own, from local files. What stands before a text in the model's data stands there too: the
tokenizer that `load_model` returns sees to it, and `begin_of_text` where there is no context.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.base.errors import PretrainError, ResourceShortageError, UsageError
from utils.base.text import number, printable, reason_of
from utils.models.tokenizer import begin_of_text
from utils.remote.loading import LoadedModel
from utils.tools.evaluation.log import ERROR_SUFFIX
from utils.tools.evaluation.questions import HELLASWAG, LAMBADA, Questions

BOOTSTRAP_ROUNDS = 1000
# What the harness calls the tasks of `--hellaswag` and `--lambada`.
TASKS = {HELLASWAG: "hellaswag", LAMBADA: "lambada_openai"}

Task = str | dict[str, Any]
"""A name that the harness knows, of a group too, or the configuration of a task."""

Result = tuple[str, dict[str, float | None], dict[str, Any]]
"""A task's name; its figures and their standard errors by name; what these depend on."""


def require_harness(option: str) -> str:
    """Return the version of the harness, which an option needs.

    Raises:
        UsageError: It is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            f'{option} needs EleutherAI\'s lm-evaluation-harness: pip install "lm-eval[hf]"'
        )
    return importlib.metadata.version("lm_eval")


def task_of(name: str, questions: Questions | None) -> Task:
    """Return HellaSwag or LAMBADA as the harness has it, over questions of a file; None: the Hub's.

    What its own YAML says (`hellaswag`, `lambada_openai`, version 1.0 of both), but for the data.
    """
    if questions is None:
        return TASKS[name]
    import datasets
    from lm_eval.tasks.hellaswag.utils import process_docs

    rows = datasets.Dataset.from_list([dict(record) for record in questions.records])
    common = {
        "task": TASKS[name],
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    if name == HELLASWAG:
        return {
            **common,
            "output_type": "multiple_choice",
            "process_docs": process_docs,
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
            "metric_list": _metrics(acc="mean", acc_norm="mean"),
        }
    return {
        **common,
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": _metrics(perplexity="perplexity", acc="mean"),
    }


def _metrics(**aggregations: str) -> list[dict[str, Any]]:
    return [
        {"metric": name, "aggregation": how, "higher_is_better": name != "perplexity"}
        for name, how in aggregations.items()
    ]


def run_harness(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    *,
    tasks_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    softmax_dtype: str | None = None,
) -> list[Result]:
    """Return the figures of tasks.

    Args:
        loaded: The model; its tokenizer is needed.
        tasks: What to run.
        tasks_path: A directory with the YAML of more tasks.
        num_fewshot: Examples before each question; None for what the task says.
        limit: Only so many questions of each task; None for all.
        batch_size: Continuations in one forward.
        softmax_dtype: Data type of log-probabilities; None for the model's.

    Raises:
        UsageError: The harness is not installed, or knows no such task, or cannot load its data.
        ResourceShortageError: The device's memory does not suffice.
    """
    version = require_harness("A task")
    _prepare_harness()
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(loaded.require_tokenizer())  # it may be given a token for padding
    manager = _find_tasks(tasks, tasks_path, version)
    try:
        model = HFLM(
            pretrained=loaded.model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=loaded.context,
            prefix_token_id=begin_of_text(tokenizer),
            softmax_dtype=softmax_dtype,
        )
        with contextlib.redirect_stdout(sys.stderr):  # standard output is the result
            found = simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=BOOTSTRAP_ROUNDS,
                log_samples=False,
            )
    except PretrainError:
        raise
    except torch.OutOfMemoryError as exc:
        advice = "lower --batch-size, or take --dtype bfloat16"
        raise ResourceShortageError(f"{loaded.device} is out of memory: {advice}.") from exc
    except Exception as exc:  # whatever a task, its data or the network meets first
        raise UsageError(f"lm-evaluation-harness {version}: {reason_of(exc)}") from exc
    return [_result(task, found, version, limit) for task in found["results"]]


def _prepare_harness() -> None:
    """Set what the harness reads when it is imported, and keep its log quiet."""
    # Its processes for bootstrapping would be forked from one with threads of torch.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _find_tasks(tasks: Sequence[Task], tasks_path: Path | None, version: str) -> Any:
    """Return the harness's manager, which knows these tasks."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if tasks_path is None else str(tasks_path))
    named = [task for task in tasks if isinstance(task, str)]
    unknown = [task for task in named if not manager.match_tasks([task])]
    if unknown:
        names = ", ".join(printable(task) for task in unknown)
        raise UsageError(
            f"--tasks: lm-evaluation-harness {version} knows no {names}. lm_eval ls tasks lists "
            "all; --tasks-path DIR adds those of a directory."
        )
    return manager


def _result(task: str, found: Mapping[str, Any], version: str, limit: int | None) -> Result:
    counts = found.get("n-samples", {}).get(task) or {}
    what = {
        "harness": f"lm_eval {version}",
        "version": found.get("versions", {}).get(task),
        "num_fewshot": found.get("n-shot", {}).get(task),
        "limit": limit,
        "items": counts.get("effective"),
    }
    values = harness_values(found["results"][task])
    if "effective" in counts:
        values["items"] = counts["effective"]
    return task, values, what


def harness_values(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the figures of a row of results: `acc,none` is `acc`, another filter is told."""
    values = {}
    for key, value in row.items():
        metric, _, filtered = key.partition(",")
        if not filtered or isinstance(value, str):
            continue
        base = metric.removesuffix(ERROR_SUFFIX)
        suffix = ERROR_SUFFIX if metric != base else ""
        name = base if filtered == "none" else f"{base} ({filtered})"
        values[f"{name}{suffix}"] = number(value)
    return values
