"""Our scores against EleutherAI's lm-evaluation-harness itself, offline, on the same local files.

Runs where the package is, or can be installed into a folder of the test's own; else it is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.training_config import PROJECT_DIRECTORY
from tests.small_models import TASK_FILES

pytestmark = pytest.mark.slow

# Without their dependencies, which would bring torch once more.
PACKAGES = (
    "lm-eval",
    "absl-py",
    "chardet",
    "colorama",
    "DataProperty",
    "evaluate",
    "joblib",
    "jsonlines",
    "lxml",
    "mbstrdecoder",
    "more_itertools",
    "nltk",
    "pathvalidate",
    "portalocker",
    "pytablewriter",
    "regex",
    "rouge-score",
    "sacrebleu",
    "scikit-learn",
    "scipy",
    "sqlitedict",
    "tabledata",
    "tabulate",
    "tcolorpy",
    "threadpoolctl",
    "typepy",
    "word2number",
)
LIMIT_SECONDS = 300
TRAINING_STEPS = 60


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what a process needs to have the harness and no network."""
    folder = tmp_path_factory.mktemp("harness")
    values = {
        **os.environ,
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    if importlib.util.find_spec("lm_eval") is None:
        site = folder / "site"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
        done = subprocess.run(
            [*command, *PACKAGES], capture_output=True, text=True, check=False, timeout=600
        )
        if done.returncode:
            pytest.skip(f"lm-eval cannot be installed: {done.stderr.strip()[-300:]}")
        values["PYTHONPATH"] = str(site)
    return values


@pytest.fixture(scope="module")
def tasks(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the harness's own tasks, which take their questions from the local files."""
    found = subprocess.run(
        [sys.executable, "-c", "import lm_eval; print(lm_eval.__path__[0])"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    source = Path(found.stdout.strip()) / "tasks"
    target = tmp_path_factory.mktemp("tasks")
    shutil.copy(source / "hellaswag" / "utils.py", target)
    changes = {
        "hellaswag/hellaswag.yaml": ("validation", "training_split: train\n"),
        "lambada/lambada_openai.yaml": ("test", ""),
    }
    for file, (split, left_out) in changes.items():
        name = Path(file).stem.partition("_")[0]
        lines = (source / file).read_text("utf-8").replace(left_out, "").splitlines()
        text = "\n".join(_without_its_data(lines))
        questions = TASK_FILES / f"{name}.jsonl"
        text += (
            f"\ntask: local_{name}\ndataset_path: json\n"
            f"dataset_kwargs:\n  data_files:\n    {split}: {questions}\n"
        )
        (target / f"local_{name}.yaml").write_text(text, "utf-8")
    return target


def _without_its_data(lines: list[str]) -> list[str]:
    """Leave out of a task its name, its data set and its tags, and nothing else."""
    kept, is_tag = [], False
    for line in lines:
        is_tag = line.startswith("tag:") or (is_tag and line.startswith("  - "))
        if not is_tag and not line.startswith(("task:", "dataset_")):
            kept.append(line)
    return kept


@pytest.fixture(scope="module")
def model(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that has learned some of the questions, and not the others."""
    import torch

    from tests.small_models import build_small_model
    from utils.tools.generation.loading import load_named_tokenizer

    tokenizer = load_named_tokenizer(str(sample_data))
    small = build_small_model(context=128)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.div_(4.0)
    texts = [record["text"] for record in read_records("lambada.jsonl")[::2]]
    for record in read_records("hellaswag.jsonl")[::2]:
        ending = record["endings"][record["label"]]
        texts.append(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b']} {ending}")
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    rows = [torch.tensor([tokenizer.encode(text)[:128]]) for text in texts]
    for _ in range(TRAINING_STEPS):
        for row in rows:
            torch.autograd.backward(small(input_ids=row, labels=row).loss)
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("model") / "learned"
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read_records(name: str) -> list[dict[str, Any]]:
    lines = (TASK_FILES / name).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def found(
    model: Path, tasks: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    """Return the figures of evaluate.py by task, ours and those of the harness within it."""
    words = ["--hellaswag", str(TASK_FILES / "hellaswag.jsonl")]
    words += ["--lambada", str(TASK_FILES / "lambada.jsonl")]
    words += ["--tasks", "local_hellaswag,local_lambada", "--tasks-path", str(tasks)]
    done = evaluate(environment, tmp_path_factory.mktemp("run"), str(model), *words, "--json")
    assert done.returncode == 0, done.stderr
    return {one["task"]: one["values"] for one in json.loads(done.stdout)["evaluations"]}


def evaluate(
    environment: dict[str, str], folder: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    script = PROJECT_DIRECTORY / "scripts" / "evaluate.py"
    return subprocess.run(
        [sys.executable, str(script), *words, "--device", "cpu"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )


def test_hellaswag_is_that_of_the_harness(found: dict[str, dict[str, float]]) -> None:
    ours, theirs = found["hellaswag"], found["local_hellaswag"]
    for figure in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        assert ours[figure] == pytest.approx(theirs[figure], abs=1e-12), figure
    assert 0.3 < ours["acc_norm"] < 1.0
    assert ours["acc"] != ours["acc_norm"]


def test_last_words_are_those_of_the_harness(found: dict[str, dict[str, float]]) -> None:
    ours, theirs = found["lambada"], found["local_lambada"]
    assert ours["acc"] == theirs["acc"]
    assert ours["acc_stderr"] == pytest.approx(theirs["acc_stderr"], abs=1e-12)
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
    assert 0.2 < ours["acc"] < 1.0


def test_the_harness_alone_loads_what_was_exported_and_finds_the_same(
    found: dict[str, dict[str, float]],
    model: Path,
    tasks: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    exported = tmp_path / "exported"
    script = PROJECT_DIRECTORY / "scripts" / "export_model.py"
    subprocess.run(
        [sys.executable, str(script), str(model), "--output", str(exported)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    words = ["--model", "hf", "--model_args", f"pretrained={exported},dtype=float32"]
    words += ["--tasks", "local_hellaswag,local_lambada", "--include_path", str(tasks)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lm_eval",
            *words,
            "--device",
            "cpu",
            "--batch_size",
            "1",
            "--output_path",
            str(tmp_path / "out"),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    results: Any = json.loads(next((tmp_path / "out").rglob("*.json")).read_text())["results"]
    for figure in ("acc", "acc_norm"):
        assert found["hellaswag"][figure] == results["local_hellaswag"][f"{figure},none"]
    assert found["lambada"]["acc"] == results["local_lambada"]["acc,none"]


@pytest.mark.parametrize(
    ("task", "told"), [("no_such_task", "knows no no_such_task"), ("arc_easy", "lm-evaluation-har")]
)
def test_a_task_that_cannot_run_is_one_line(
    model: Path, environment: dict[str, str], tmp_path: Path, task: str, told: str
) -> None:
    done = evaluate(environment, tmp_path, str(model), "--tasks", task)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
