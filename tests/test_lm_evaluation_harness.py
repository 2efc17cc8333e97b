"""evaluate.py with EleutherAI's lm-evaluation-harness itself, offline, on local files.

Runs where the package is, or can be installed into a folder of the test's own; else it is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import evaluate, export_model
from tests.processes import run_python
from tests.small_models import TASK_FILES, build_small_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

# What it imports here, without their dependencies, which would bring torch once more.
PACKAGES = ("lm-eval", "colorama", "lxml", "portalocker", "sacrebleu", "tabulate")
HELLASWAG, LAMBADA = (TASK_FILES / f"{name}.jsonl" for name in ("hellaswag", "lambada"))
BEGIN = "<s>"
ALONE = "Alone"  # a text of one word: nothing of it stands before the last word
SCORE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
model, tasks = sys.argv[1:]
found = simple_evaluate(
    model="hf",
    model_args=f"pretrained={model},dtype=float32",
    device="cpu",
    tasks=["local_hellaswag", "local_lambada"],
    task_manager=TaskManager(include_path=tasks),
    bootstrap_iters=0,
)
print(json.dumps(found["results"], default=str))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Let this process import the harness, without a network; return the folder that has it."""
    folder = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(folder / "hf"))
        if importlib.util.find_spec("lm_eval") is None:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
            done = subprocess.run(
                [*command, "--target", str(folder), *PACKAGES],
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
            if done.returncode:
                pytest.skip(f"lm-eval cannot be installed: {done.stderr.strip()[-300:]}")
            patch.setattr(sys, "path", [*sys.path, str(folder)])
            patch.setenv("PYTHONPATH", str(folder))
        yield str(folder)


@pytest.fixture(scope="module")
def model(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that learned some of the questions, and whose texts begin with a token."""
    import torch
    from transformers import PreTrainedTokenizerFast

    plain: Any = PreTrainedTokenizerFast
    tokenizer = plain.from_pretrained(str(sample_data))
    tokenizer.add_special_tokens({"bos_token": BEGIN})
    tokenizer.add_bos_token = True
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    small = build_small_model(context=128, vocab_size=len(tokenizer))
    small.config.bos_token_id = small.generation_config.bos_token_id = tokenizer.bos_token_id
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.div_(4.0)
    texts = [record["text"] for record in read_records(LAMBADA)[::2]]
    for record in read_records(HELLASWAG)[::2]:
        ending = record["endings"][record["label"]]
        texts.append(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b']} {ending}")
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    rows = [torch.tensor([tokenizer.encode(text)[:128]]) for text in texts]
    for _ in range(60):
        for row in rows:
            torch.autograd.backward(small(input_ids=row, labels=row).loss)
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("model") / "learned"
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def lambada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of last words with a text more, of one word."""
    path = tmp_path_factory.mktemp("questions") / "lambada.jsonl"
    path.write_text(LAMBADA.read_text("utf-8") + json.dumps({"text": ALONE}) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def found(
    site: str, model: Path, lambada: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    """Return the figures of evaluate.py by task."""
    folder = tmp_path_factory.mktemp("run")
    words = ["--hellaswag", str(HELLASWAG), "--lambada", str(lambada), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert evaluate.main([str(model), *words]) == 0
    lines = (folder / "logs" / "evaluations.jsonl").read_text("utf-8").splitlines()
    return {one["task"]: one["values"] for one in map(json.loads, lines)}


def test_the_harness_alone_loads_what_was_exported_and_finds_the_same(
    found: dict[str, dict[str, float]], site: str, model: Path, lambada: Path, tmp_path: Path
) -> None:
    exported, tasks = tmp_path / "exported", tmp_path / "tasks"
    assert export_model.main([str(model), "--output", str(exported), "--device", "cpu"]) == 0
    tasks.mkdir()
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    own = Path(spec.origin).parent / "tasks"
    shutil.copy(own / "hellaswag" / "utils.py", tasks)
    write_task(own / "hellaswag" / "hellaswag.yaml", tasks, "hellaswag", "validation", HELLASWAG)
    write_task(own / "lambada" / "lambada_openai.yaml", tasks, "lambada", "test", lambada)
    done = run_python("-c", SCORE, exported, tasks, cwd=tmp_path, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert 0.3 < found["hellaswag"]["acc_norm"] < 1.0
    for task, figure in (("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("lambada", "acc")):
        assert found[task][figure] == pytest.approx(results[f"local_{task}"][f"{figure},none"])
    assert found["lambada"]["perplexity"] == pytest.approx(
        results["local_lambada"]["perplexity,none"], rel=1e-5
    )


def write_task(own: Path, folder: Path, name: str, split: str, questions: Path) -> None:
    """Write a task of the harness with its questions from a file, and nothing else changed."""
    kept, is_tag = [], False
    for line in own.read_text("utf-8").splitlines():
        is_tag = line.startswith("tag:") or (is_tag and line.startswith("  - "))
        if not is_tag and not line.startswith(("task:", "dataset_", "training_split:")):
            kept.append(line)
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    {split}: {questions}"
    text = "\n".join([*kept, f"task: local_{name}", data, ""])
    (folder / f"local_{name}.yaml").write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "no_such_task"], "knows no no_such_task"),
        (["--tasks", "arc_easy"], "lm-evaluation-harness"),
        (["--lambada"], "lm-evaluation-harness"),
    ],
)
def test_a_task_that_cannot_run_is_one_line(
    site: str,
    model: Path,
    tmp_path: Path,
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([str(model), *words, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
