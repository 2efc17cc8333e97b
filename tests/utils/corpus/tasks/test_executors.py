"""Tasks through datatrove: on this machine, a local Ray, and a stand-in for Slurm's commands."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from configs.config_files import PROJECT_DIRECTORY
from tests.processes import run_python
from tests.sample_shards import read_texts

SCRIPT = PROJECT_DIRECTORY / "scripts" / "prepare_data.py"
# What sbatch and its friends do, one task after the other, on this machine.
SBATCH = """#!/bin/bash
script="${@: -1}"
export SLURM_NODELIST=here SLURM_JOB_ID=7 RUN_OFFSET=0
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for index in $(seq 0 "${last:-0}"); do
    SLURM_ARRAY_TASK_ID=$index bash "$script" >> jobs.log 2>&1
done
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""


@pytest.fixture
def texts(tmp_path: Path) -> Counter[str]:
    """The documents of the folder `web`: JSON lines, some of them nearly alike."""
    generator = np.random.default_rng(5)
    vocabulary = ["".join(map(chr, generator.integers(97, 123, 6))) for _ in range(500)]
    found = [" ".join(generator.choice(vocabulary, 60)) for _ in range(60)]
    found += [text + " more" for text in found[:10]]
    (tmp_path / "web").mkdir()
    for number in range(2):
        lines = (json.dumps({"text": text}) + "\n" for text in found[number::2])
        (tmp_path / "web" / f"{number}.jsonl").write_text("".join(lines))
    return Counter(found)


def prepare(tmp_path: Path, *words: object, **environment: str) -> str:
    done = run_python(SCRIPT, *words, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def require(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"needs the optional package {module}")


def test_an_executor_that_is_not_installed_is_named(tmp_path: Path, texts: Counter[str]) -> None:
    (tmp_path / "none" / "datatrove").mkdir(parents=True)
    (tmp_path / "none" / "datatrove" / "__init__.py").write_text("raise ImportError('not here')")
    words = ["--input", "web", "--vocab-size", 300, "--output", "out", "--tasks", 2]
    path = f"{tmp_path / 'none'}:{PROJECT_DIRECTORY}"
    done = run_python(*(SCRIPT, *words, "--executor", "local"), cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 2
    assert "--executor local needs datatrove (not here): pip install 'datatrove>=" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "ray", "slurm"])
def test_an_executor_prepares_what_the_tasks_by_hand_do(
    tmp_path: Path, texts: Counter[str], name: str
) -> None:
    require("datatrove", *["ray"] * (name == "ray"))
    words = ["--input", "web", "--vocab-size", 300, "--tasks", 3]
    for task in ("tokenizer", 0, 1, 2):
        prepare(tmp_path, *words, "--output", "hand", "--task", task)
    prepare(tmp_path, "merge", "hand")

    more = {
        "local": ["workers=2"],
        "ray": ["mem_per_cpu_gb=0.1", "logging_dir=logs"],
        "slurm": ["time=1:00", "partition=cpu", "logging_dir=logs"],
    }
    options = [word for option in more[name] for word in ("--executor-option", option)]
    command = [*words, "--output", "out", "--executor", name, *options]
    programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": "#!/bin/bash\necho here\n"}
    for program, text in programs.items():
        (tmp_path / program).write_text(text)
        (tmp_path / program).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    shown = prepare(tmp_path, *command, PATH=path)
    assert ("3 tasks are submitted, and the merge" if name == "slurm" else "Prepared") in shown
    assert Counter(chain(*read_texts(tmp_path / "out").values())) == texts
    for file in (tmp_path / "hand").rglob("*.*"):
        assert (tmp_path / "out" / file.relative_to(tmp_path / "hand")).read_bytes() == (
            file.read_bytes()
        )
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("*"))]
    prepare(tmp_path, *command, PATH=path)
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("*"))] == times


@pytest.mark.slow
def test_a_failed_task_is_named_and_the_others_are_done(
    tmp_path: Path, texts: Counter[str]
) -> None:
    require("datatrove")
    with (tmp_path / "web" / "1.jsonl").open("a") as file:
        file.write('{"text": 3}\n')
    words = ["--input", "web", "--tokenizer", "first", "--tasks", 3, "--output", "out"]
    prepare(tmp_path, "--input", "web/0.jsonl", "--vocab-size", 300, "--output", "first")
    done = run_python(SCRIPT, *words, "--executor", "local", cwd=tmp_path)
    assert done.returncode == 2
    assert "1 of 3 tasks are not done: 2." in done.stderr
    assert "column 'text' is int" in done.stderr
    assert len(list((tmp_path / "out").glob("task-*/index.json"))) == 2


@pytest.mark.slow
def test_the_pipeline_of_the_page_runs_as_it_is_written(
    tmp_path: Path, texts: Counter[str]
) -> None:
    require("datatrove", "spacy")
    page = (PROJECT_DIRECTORY / "docs" / "DATA.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?WriteShards.*?)```", page, re.DOTALL)
    (tmp_path / "pipeline.py").write_text(code)
    prepare(tmp_path, "--input", "web", "--vocab-size", 300, "--output", "my-tokenizer")
    for _ in range(2):  # what is done is not done again
        done = run_python("pipeline.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    prepare(tmp_path, "merge", "data/web")
    found = Counter(chain(*read_texts(tmp_path / "data" / "web").values()))
    # One of each pair that is nearly alike is left.
    assert found.total() == 60
    assert not found - texts
    before = (tmp_path / "data" / "web" / "index.json").read_bytes()
    prepare(tmp_path, "merge", "data/web")
    assert (tmp_path / "data" / "web" / "index.json").read_bytes() == before
