"""setup.sh and run.sh as a user calls them, in a copy of the project."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.config_files import PROJECT_DIRECTORY
from tests.processes import run_in_terminal
from utils.checkpoints.layout import find_checkpoints

ENVIRONMENT = Path(sys.prefix)
needs_environment = pytest.mark.skipif(
    not list(ENVIRONMENT.glob(".installed-*")), reason="not in an environment made by setup.sh"
)
SMALL = [
    "--set=model_overrides.num_hidden_layers=1",
    "--set=model_overrides.hidden_size=32",
    "--set=model_overrides.intermediate_size=64",
    "--set=sequence_length=32",
    "--set=max_eval_samples=4",
    "--set=warmup_steps=1",
    "--set=save_steps=1",
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project without what runs leave in it."""
    copy = tmp_path / "project"
    ignore = shutil.ignore_patterns("venv*", "bucket", "cache", ".git", "__pycache__", ".*_cache")
    shutil.copytree(PROJECT_DIRECTORY, copy, ignore=ignore)
    for folder in ("checkpoints", "logs"):
        shutil.rmtree(copy / folder, ignore_errors=True)
    return copy


def bash(project: Path, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "VENV": str(ENVIRONMENT), **variables}
    return subprocess.run(
        ["bash", str(project / script), *words],
        cwd=project.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,  # to end a test that hangs
    )


def write_program(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@needs_environment
def test_run_test_trains_saves_uploads_and_says_how_to_look_at_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bash(project, "run.sh", "test", "2", *SMALL)
    assert first.returncode == 0, first.stderr
    saved = find_checkpoints(project / "checkpoints")
    assert [name.step for name in saved] == [1, 2]
    for name in saved:
        assert (project / "bucket" / "Checkpoints" / f"{name}.tar.gz").is_file()
    shown = [line.strip() for line in first.stdout.splitlines() if line.startswith("  ")]
    assert "tensorboard --logdir logs" in shown

    monkeypatch.chdir(project)
    for line in shown:  # every command that it names works
        words = shlex.split(line)
        if words[0] == "python":
            script = importlib.import_module(f"scripts.{Path(words[1]).stem}")
            assert script.main(words[2:]) == 0, line


@pytest.mark.parametrize("words", [["twenty"], ["20", "twenty"]])
def test_a_word_that_is_no_number_is_refused_before_the_set_up(
    project: Path, words: list[str]
) -> None:
    (project / "setup.sh").unlink()
    result = bash(project, "run.sh", "test", *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "run.sh: twenty is no number of steps and no option. "
        "Write: bash run.sh test [MAX_STEPS] [--OPTION ...]\n"
    )


@needs_environment
def test_setup_is_quick_when_nothing_is_to_do(project: Path) -> None:
    result = bash(project, "setup.sh")
    assert result.returncode == 0, result.stderr
    assert "is up to date" in result.stdout


def test_setup_on_windows_says_where_it_runs(project: Path, tmp_path: Path) -> None:
    uname = Path(write_program(tmp_path / "windows/uname", "echo MINGW64_NT-10.0-22631"))
    result = bash(project, "setup.sh", PATH=f"{uname.parent}:{os.environ['PATH']}")
    assert (result.returncode, result.stdout) == (2, "")
    assert "On Windows use WSL (wsl --install)" in result.stderr


PIP = """case "$*" in
*pip*install*) [ -t 1 ] && echo "a bar"
cat <<END
Collecting torch
  Downloading https://index/torch-2.13.0-cp311-cp311-linux_x86_64.whl (888.1 MB)
Processing /wheels/numpy-2.3.1-cp311-cp311-linux_x86_64.whl (from transformers)
  Using cached https://index/rich-15.0-py3-none-any.whl (96 kB)
Installing collected packages: a, b
END
;;
*compileall*) ;;
*) exec "{python}" "$@" ;;
esac"""


def test_setup_shows_what_pip_does(project: Path) -> None:
    new = project / "new"
    write_program(new / "bin/python", PIP.replace("{python}", sys.executable))
    write_program(new / "bin/gsutil", "")
    (new / "pyvenv.cfg").touch()
    result = bash(project, "setup.sh", VENV=str(new), TORCH_INDEX_URL="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1:-1] == [
        "setup.sh:   torch 2.13.0 (888.1 MB)",
        "setup.sh:   numpy 2.3.1",
        "setup.sh:   rich 15.0 (96 kB)",
        "setup.sh: unpacking 2 packages.",
    ]
    (project / "new/.installed-requirements.txt").unlink()
    words = ["bash", str(project / "setup.sh")]
    command = f"import os; os.execvp('bash', {words})"
    shown = run_in_terminal("-c", command, cwd=project, VENV=str(new), TORCH_INDEX_URL="")
    assert "a bar" in shown
    assert "Collecting torch" in shown


def fake_python(directory: Path, refuse: str) -> str:
    """Return an interpreter that fails where its arguments hold `refuse`."""
    script = f'case "$*" in *{refuse}*) exit 1 ;; esac\nexec "{sys.executable}" "$@"'
    return write_program(directory / "python-without", script)


def test_a_missing_venv_module_gets_the_one_command_that_mends_it(project: Path) -> None:
    python = fake_python(project, "ensurepip")
    result = bash(project, "setup.sh", PYTHON=python, VENV=str(project / "new"))
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert result.returncode == 2
    assert f"sudo apt-get install -y python{version}-venv" in result.stderr


def test_an_old_python_is_refused(project: Path) -> None:
    python = fake_python(project, "version_info")
    result = bash(project, "setup.sh", PYTHON=python, VENV=str(project / "new"))
    assert result.returncode == 2
    assert "Python 3.11 to 3.14 is needed" in result.stderr


def stand_in(path: Path, version: str) -> None:
    """Write an interpreter that cannot make environments; one of no version does not run."""
    numbers = version.replace(".", ", ")
    script = f"""case "{version} $*" in
" "*) echo "not selected" >&2; exit 127 ;;
*ensurepip*) exit 1 ;;
*--version) echo "Python {version}" ;;
*) exec "{sys.executable}" -c "import sys; sys.version_info = ({numbers})
$2" ;;
esac"""
    write_program(path, script)


@pytest.fixture
def machine(project: Path) -> dict[str, str]:
    """The variables of a machine whose Pythons, and nothing else, are in project/programs."""
    tools = project / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "grep", "sed"):
        (tools / name).symlink_to(shutil.which(name) or name)
    (project / "programs").mkdir()
    return {
        "PATH": f"{project / 'programs'}:{tools}",
        "PYTHON": "",
        "VENV": str(project / "new"),
        "HOME": str(project / "home"),
    }


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": "3.10.1", "python3.11": "3.11.1", "python3.12": "3.12.1"}, "3.12"),
        ({"python3": "", "python3.14": "", "python3.13": "3.13.1"}, "3.13"),
        ({"python3": "3.11.1", "python3.13": "3.13.1"}, "3.11"),
        ({"python3": "3.15.1", "../home/.local/bin/python3.13": "3.13.1"}, "3.13"),
    ],
)
def test_python3_is_taken_or_else_the_newest_python_that_works(
    project: Path, machine: dict[str, str], pythons: dict[str, str], chosen: str
) -> None:
    for name, version in pythons.items():
        stand_in(project / "programs" / name, version)
    result = bash(project, "setup.sh", **machine)
    assert f"making {project / 'new'} with Python {chosen}.1." in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("tool", "command"),
    [
        ("uv", "uv python install 3.13"),
        ("brew", "brew install python@3.13"),
        ("apt-cache", "sudo apt-get install -y python3.12-venv"),
        (None, "~/.local/bin/uv python install 3.13"),
    ],
)
def test_without_a_newer_python_the_command_that_installs_one_is_named(
    project: Path, machine: dict[str, str], tool: str | None, command: str
) -> None:
    stand_in(project / "programs" / "python3", "3.10.1")
    stand_in(project / "programs" / "python3.10", "3.10.1")
    if tool is not None:
        script = '[ "$2" = python3.12-venv ] && echo "Package: $2"'
        write_program(project / "programs" / tool, script)
    result = bash(project, "setup.sh", **machine)
    assert result.returncode == 2
    assert "python3 cannot be used (Python 3.10.1)" in result.stderr
    assert result.stderr.endswith(f"{command}\n")
    assert not (project / "new").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_an_environment_of_an_older_or_lost_python_is_named_and_left_as_it_is(
    project: Path, machine: dict[str, str], is_there: bool
) -> None:
    python = project / "new" / "bin" / "python"
    stand_in(python, "3.10.1") if is_there else python.parent.mkdir(parents=True)
    (project / "new" / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.10.1\n")
    stand_in(project / "programs" / "python3", "3.12.1")
    result = bash(project, "setup.sh", **machine)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{project / 'new'} cannot be used (made with Python 3.10.1)" in result.stderr
    assert result.stderr.endswith(f"rm -r {project / 'new'}\n")
    assert (project / "new" / "pyvenv.cfg").is_file()


@pytest.fixture
def two_gpus(project: Path) -> dict[str, str]:
    """An environment whose python sees two GPUs and writes down how it is called."""
    (project / "setup.sh").write_text("exit 0\n")
    binaries = project / "fake" / "bin"
    note = f'echo "$(basename "$0") $*" >> {project}/calls\n'
    answer = (
        'case "$*" in *device_count*) echo 2 ;; *--dry-run*) exit "${DRY_RUN_CODE:-0}" ;;\n'
        '*--json*) for step in ${STEPS-}; do echo "  \\"name\\": \\"$step\\","; done ;; esac'
    )
    write_program(binaries / "python", note + answer)
    write_program(binaries / "accelerate", f"{note}exit 75")
    return {"VENV": str(project / "fake"), "HF_HOME": str(project / "hf")}


def test_two_gpus_get_one_process_each_through_accelerate(
    project: Path, two_gpus: dict[str, str]
) -> None:
    result = bash(project, "run.sh", "production", "5000", "--debug", **two_gpus)
    assert result.returncode == 75, result.stderr
    launched = (project / "calls").read_text().splitlines()
    assert (
        "accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 "
        "train.py --config production --max-steps 5000 --resume latest --debug"
    ) in launched


def test_a_users_own_accelerate_configuration_wins_and_is_named(
    project: Path, two_gpus: dict[str, str]
) -> None:
    own = project / "hf" / "accelerate" / "default_config.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("num_processes: 2\n")
    result = bash(project, "run.sh", "production", **two_gpus)
    assert str(own) in result.stdout
    assert "view latest --config production\n" in result.stdout
    assert "compare" not in result.stdout  # there are no two
    result = bash(project, "run.sh", "production", **two_gpus, STEPS="10 20")
    assert "checkpoint_viewer.py compare --config production\n" in result.stdout
    launched = (project / "calls").read_text().splitlines()
    assert "accelerate launch train.py --config production --resume latest" in launched


def test_what_the_preflight_refuses_is_not_launched_on_every_gpu(
    project: Path, two_gpus: dict[str, str]
) -> None:
    result = bash(project, "run.sh", "production", **two_gpus, DRY_RUN_CODE="3")
    assert result.returncode == 3
    assert "accelerate" not in (project / "calls").read_text()
