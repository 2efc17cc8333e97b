"""`pip install .`: the modules, the shipped configurations and the neox-pretrain command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_installed_copy_trains_in_the_folder_it_is_called_in(
    tmp_path: Path, sample_data: Path
) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", PROJECT, source], check=True)
    library = tmp_path / "library"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(library)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, source], check=True)
    work = tmp_path / "work"
    work.mkdir()
    (work / "bucket").mkdir()
    (work / "bucket" / "data").symlink_to(sample_data)
    command = [library / "bin" / "neox-pretrain", "--config", "test", "--max-steps", "1", "--quiet"]
    small = ["--set", "sequence_length=32", "--set", "sample_tokens=0"]
    environment = {"PYTHONPATH": str(library)}
    subprocess.run([*command, *small], cwd=work, env=environment, check=True)
    assert [path.name for path in (work / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-epoch0-step1-files0"
    ]
