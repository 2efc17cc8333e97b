"""Tasks of EleutherAI's lm-evaluation-harness on a loaded model.

    loaded model, names of tasks -> lm_eval (an optional package) -> figures

The harness brings its tasks, and code with some of them; what it needs of data comes from the Hub
or, for tasks of one's own, from local files.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.errors import PretrainError, UsageError
from utils.base.text import number, printable, reason_of
from utils.tools.evaluation.log import ERROR_SUFFIX
from utils.tools.generation.loading import LoadedModel

BOOTSTRAP_ROUNDS = 1000
INSTALL = 'pip install "lm-eval[hf]>=0.4.9"'


@dataclass(frozen=True)
class HarnessResult:
    """Figures of one task.

    Attributes:
        task: Its name.
        values: Figures by name, and their standard errors.
        what: Version, shots and number of questions: what the figures depend on.
    """

    task: str
    values: dict[str, float | None]
    what: dict[str, Any]


def require_harness() -> str:
    """Return the version of the harness.

    Raises:
        UsageError: It is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(f"--tasks needs EleutherAI's lm-evaluation-harness: {INSTALL}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm_eval")
    except PackageNotFoundError:
        return "unknown"


def run_harness(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    tasks_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[HarnessResult]:
    """Return the figures of tasks.

    Args:
        loaded: The model; its tokenizer is needed.
        tasks: Names that the harness knows, of groups too.
        tasks_path: A directory with the YAML of more tasks.
        num_fewshot: Examples before each question; None for what the task says.
        limit: Only so many questions of each task; None for all.
        batch_size: Continuations in one forward.

    Raises:
        UsageError: The harness is not installed, or knows no such task, or cannot load its data.
    """
    version = require_harness()
    # Its processes for bootstrapping would be forked from one with threads of torch.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = _find_tasks(tasks, tasks_path, version)
    try:
        model = HFLM(
            pretrained=loaded.model,
            # It may give it a padding token.
            tokenizer=copy.deepcopy(loaded.require_tokenizer()),
            batch_size=batch_size,
            max_length=loaded.context,
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
    except Exception as exc:  # whatever a task, its data or the network meets first
        raise UsageError(f"lm-evaluation-harness {version}: {reason_of(exc)}") from exc
    return [_result(task, found, version, limit) for task in found["results"]]


def _find_tasks(tasks: Sequence[str], tasks_path: Path | None, version: str) -> Any:
    """Return the harness's manager, which knows these tasks."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if tasks_path is None else str(tasks_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        names = ", ".join(printable(task) for task in unknown)
        raise UsageError(
            f"--tasks: lm-evaluation-harness {version} knows no {names}. lm_eval ls tasks lists "
            "all; --tasks-path DIR adds those of a directory."
        )
    return manager


def _result(task: str, found: Mapping[str, Any], version: str, limit: int | None) -> HarnessResult:
    counts = found.get("n-samples", {}).get(task) or {}
    what = {
        "harness": f"lm_eval {version}",
        "version": found.get("versions", {}).get(task),
        "num_fewshot": found.get("n-shot", {}).get(task),
        "limit": limit,
        "items": counts.get("effective"),
    }
    return HarnessResult(task, harness_values(found["results"][task]), what)


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
