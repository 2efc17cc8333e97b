"""cloud/colab.ipynb: well formed, and run as a whole with a directory in the place of Drive."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.config_files import PROJECT_DIRECTORY
from configs.training_config import get_training_config
from tests.conftest import TINY
from utils.checkpoints.layout import find_checkpoints

NOTEBOOK = PROJECT_DIRECTORY / "cloud" / "colab.ipynb"
SOURCES = (
    "cloud",
    "configs",
    "scripts",
    "utils",
    "train.py",
    "debug_gpu.py",
    "requirements.txt",
    "constraints.txt",
)


def cells() -> list[dict[str, Any]]:
    return list(json.loads(NOTEBOOK.read_text("utf-8"))["cells"])


def code_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_the_notebook_is_valid_and_keeps_no_output() -> None:
    nbformat = pytest.importorskip("nbformat", reason="bash setup.sh --dev installs it")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]] == []
    assert len(code) <= 12
    assert "parameters" in code[0]["metadata"]["tags"]


def test_every_cell_checks_how_its_command_ended() -> None:
    """A `!` line does not stop a notebook: nobody would see that training never began."""
    unchecked = []
    for cell in cells():
        lines = [line.strip() for line in code_of(cell).splitlines()]
        last = max((at for at, line in enumerate(lines) if line.startswith("!")), default=None)
        if last is not None and lines[last + 1 : last + 2] != ["require_done(_exit_code)"]:
            unchecked.append(cell["id"])
    assert unchecked == ["gpu"]  # it ends with 0 whatever it finds


def test_every_file_that_the_notebook_runs_is_there() -> None:
    text = "\n".join(code_of(cell) for cell in cells())
    files = re.findall(r'\brun\(\s*"([^"]+\.py)"', text)
    assert {"train.py", "debug_gpu.py", "scripts/prepare_data.py"} <= set(files)
    assert [file for file in files if not (PROJECT_DIRECTORY / file).is_file()] == []


def settings_cells(tmp_path: Path) -> dict[str, Any]:
    """Return what the first two cells leave, run without Colab in a folder."""
    given = f"WITHOUT_COLAB, LOCAL = {str(tmp_path)!r}, {str(tmp_path)!r}"
    namespace: dict[str, Any] = {}
    for code in (code_of(cells()[1]), given, code_of(cells()[2])):
        exec(code, namespace)  # noqa: S102 - our own file
    return namespace


def test_its_first_settings_are_those_of_the_project(tmp_path: Path) -> None:
    settings = settings_cells(tmp_path)
    assert get_training_config(settings["CONFIG"]).model
    assert settings["RUN_NAME"]
    assert 'LOCAL = "/content"' in code_of(cells()[1])


def test_a_command_that_fails_ends_its_cell_and_a_stop_is_none(tmp_path: Path) -> None:
    require_done = settings_cells(tmp_path)["require_done"]
    require_done(0)
    with pytest.raises(RuntimeError, match="ended with code 2"):
        require_done(2)
    with pytest.raises(SystemExit, match="Run this cell again to go on"):
        require_done(75)


def test_the_stop_button_reaches_the_program(tmp_path: Path) -> None:
    """Colab runs a `!` line by bash and interrupts that process alone."""
    namespace = settings_cells(tmp_path)
    namespace["PROJECT"].mkdir()
    (namespace["PROJECT"] / "a b.py").write_text("import os, sys; print(os.getpid(), sys.argv[1])")
    command = namespace["run"]("a b.py", "c $d")
    process = subprocess.Popen(
        command, shell=True, executable="/bin/bash", stdout=subprocess.PIPE, text=True
    )
    assert process.communicate(timeout=60)[0] == f"{process.pid} c $d\n"


@pytest.fixture
def colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Run the notebook's cells as a new machine would; return what each one printed."""
    nbclient = pytest.importorskip("nbclient", reason="bash setup.sh --dev installs it")
    pytest.importorskip("ipykernel", reason="bash setup.sh --dev installs it")
    import nbformat

    project = tmp_path / "drive" / "pretrain" / "project"
    project.mkdir(parents=True)
    for name in SOURCES:
        source = PROJECT_DIRECTORY / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, project / name)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TMPDIR": str(scratch),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "OMP_NUM_THREADS": "1",
        "PIP_NO_INDEX": "1",
        "PYTHONWARNINGS": "ignore",
    }
    for key, value in variables.items():
        monkeypatch.setenv(key, value)

    def run(until: str = "", **settings: Any) -> list[str]:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        given = {"WITHOUT_COLAB": str(tmp_path / "drive"), "LOCAL": str(tmp_path / "content")}
        lines = [f"{key} = {value!r}" for key, value in {**given, **settings}.items()]
        notebook.cells[1].source += "\n" + "\n".join(lines)
        if until:
            names = [cell.id for cell in notebook.cells]
            notebook.cells = notebook.cells[: names.index(until) + 1]
        resources = {"metadata": {"path": str(tmp_path)}}
        client = nbclient.NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources=resources
        )
        client.execute()
        done = [cell for cell in notebook.cells if cell.cell_type == "code"]
        return ["".join(out.get("text", "") for out in cell.outputs) for cell in done]

    yield run
    for info in scratch.glob(".tensorboard-info/pid-*.info"):
        os.kill(int(info.name.removeprefix("pid-").removesuffix(".info")), signal.SIGTERM)


def more(*words: str) -> str:
    """Return MORE with the settings of a very small run."""
    fast = ("logging_steps=1", "save_steps=2", "eval_steps=100", "gradient_checkpointing=true")
    settings = [word for word in (*TINY, *fast) if "vocab_size" not in word and "uri" not in word]
    return " ".join([*words, *(f"--set {setting}" for setting in settings)])


PREPARE = "--sample --vocab-size 512"


@pytest.mark.slow
def test_every_cell_runs_and_a_run_goes_on_from_drive_after_a_disconnect(
    colab: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = {"CONFIG": "test", "PREPARE": "--sample --vocab-size 512", "MAX_STEPS": 4}
    first = colab(MORE=more("--stop-after 2"), until="train", **words)
    assert "512 tokens in the vocabulary" in "".join(first)
    drive = tmp_path / "drive" / "pretrain"
    archives = drive / "checkpoints" / "first" / "Checkpoints"
    assert [path.name for path in archives.glob("*step2*.tar.gz")] != []
    prepared = (drive / "data" / "index.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "content")
    second = "".join(colab(MORE=more(), **words))
    assert "Downloaded checkpoint-epoch0-step2" in second
    (newest,) = find_checkpoints(tmp_path / "content" / "run" / "checkpoints" / "first")[-1:]
    assert newest.step == 4
    assert list(archives.glob("*step4*.tar.gz"))
    assert (drive / "data" / "index.json").stat().st_mtime_ns == prepared
    assert (drive / "exported" / "first" / "config.json").is_file()
