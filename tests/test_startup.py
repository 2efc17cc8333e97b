"""An attempt up to its first step: what it loads, when, and what it does meanwhile."""

from __future__ import annotations

import json
import platform
import signal
from pathlib import Path
from typing import Any

import pytest

from configs.config_files import PROJECT_DIRECTORY
from tests.conftest import TINY
from tests.processes import run_python
from utils.base.errors import ExitCode

# What an attempt does without before its first step, and whom it is for.
NOT_NEEDED = {
    "matplotlib": "the viewer's curves as pictures",
    "pandas": "data preparation, through datasets",
    "pyarrow": "data preparation",
    "datasets": "data preparation",
    "sklearn": "nobody: transformers tries it for metrics",
    "scipy": "nobody: transformers tries it for speech and vision",
    "wandb": "report_to=wandb",
    "tensorflow": "nobody: TensorBoard tries it",
    "google.cloud": "gs:// alone",
    "google.auth": "gs:// alone",
    "grpc": "nobody: some clients of Google would",
    "requests": "gs:// alone",
    "deepspeed": "a launch with DeepSpeed",
    "torch._inductor.compile_fx": "torch_compile",
    "networkx": "torch.compile's partitioner",
    "rich": "tables of the commands that read",
    "pytest": "tests",
}

# In place of train.loop: one step, then what there is by now.
CHILD = """
import gc, json, os, resource, sys
import train

def look(run, config, stop_after):
    for batches in run.batches(1):
        run.train_step(batches)
    saver = run._saving.saver
    torch = sys.modules["torch"]
    faults = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64 * 2**20 // 4)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(json.dumps({
        "modules": sorted(sys.modules),
        "frozen": gc.get_freeze_count(),
        "collects": gc.isenabled(),
        "page_faults": faults,
        "early_writer": run._options.writer is not None and saver._writer is run._options.writer,
    }))
    return 0

train.loop = look
code = train.main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)
"""


@pytest.fixture(scope="module")
def first_step(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process looks like that has just done its first step."""
    words = [f"--set={value}" for value in (*TINY, f"data_uri={sample_data}")]
    result = run_python("-c", CHILD, "--quiet", *words, cwd=tmp_path_factory.mktemp("start"))
    assert result.returncode == 0, result.stderr
    state: dict[str, Any] = json.loads(result.stdout)
    return state


def test_what_a_first_step_does_not_need_is_not_loaded(first_step: dict[str, Any]) -> None:
    modules = set(first_step["modules"])
    if "httpx" in modules:  # an older huggingface_hub's client, whose own command line loads it
        modules.discard("rich")
    assert not NOT_NEEDED.keys() & modules
    assert "transformers.models.gpt_neox.modeling_gpt_neox" in first_step["modules"]


def test_the_collector_leaves_the_libraries_alone_and_is_on(first_step: dict[str, Any]) -> None:
    assert first_step["frozen"] > 200_000
    assert first_step["collects"]


def test_the_writer_process_of_the_run_is_the_one_that_was_started_first(
    first_step: dict[str, Any],
) -> None:
    assert first_step["early_writer"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_a_step_gets_the_memory_that_the_one_before_freed(first_step: dict[str, Any]) -> None:
    # Of several: a thread of the run may take a piece of the memory that was just freed.
    assert min(first_step["page_faults"][1:]) < 10


def test_an_attempt_that_is_refused_for_its_words_or_checkpoints_does_not_wait_for_torch(
    tmp_path: Path,
) -> None:
    checkpoint = tmp_path / "checkpoints" / "checkpoint-epoch0-step2-files0"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    code = (
        "import sys, train\n"
        "assert train.main(['--set', 'max_step=1']) == 2\n"
        "code = train.main(['--set', 'data_uri=data'])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert result.returncode == ExitCode.USAGE, result.stderr
    assert "--resume latest" in result.stderr
    assert "--fresh" in result.stderr


INTERRUPTED = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
script = sys.argv[2]
sys.argv[1:] = [sys.argv[1], *sys.argv[3:]]
sys.path[:0] = [os.path.dirname(script)]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "module"),
    [
        *(
            (path, "utils.base.errors")
            for path in sorted(PROJECT_DIRECTORY.glob("scripts/[a-z]*.py"))
        ),
        (PROJECT_DIRECTORY / "debug_gpu.py", "utils.base.errors"),
        (PROJECT_DIRECTORY / "train.py", "utils.base.errors"),
    ],
    ids=lambda value: getattr(value, "stem", None),
)
def test_ctrl_c_while_a_command_loads_is_no_traceback(script: Path, module: str) -> None:
    result = run_python("-c", INTERRUPTED, module, script)
    assert result.returncode == -signal.SIGINT  # of which a shell makes 130
    assert result.stderr == ""


@pytest.mark.parametrize("name", ["train.py", "debug_gpu.py", "scripts/checkpoint_viewer.py"])
def test_a_python_without_the_libraries_is_told_of_the_environment(name: str) -> None:
    result = run_python("-S", PROJECT_DIRECTORY / name)
    assert result.returncode == ExitCode.UNEXPECTED
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: No module named")
    assert "source venv/bin/activate" in line
