"""A mistyped bucket on every command line: refused in one line, and no directory made of it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from utils.base.errors import ExitCode

COMMANDS = [
    "train --set data_uri=@",
    'train --set data_uri=[{"uri":"@","weight":1}]',
    "train --set checkpoint_uri=@",
    "train --set output_dir=@",
    "train --set logging_dir=@",
    "train --set cache_dir=@",
    "train --resume @/latest --set data_uri=data",
    "scripts.prepare_data --input text.txt --vocab-size 300 --output @",
    "scripts.prepare_data --input @ --vocab-size 300 --output out",
    "scripts.prepare_data --input text.txt --validation-input @ --vocab-size 300 --output out",
    "scripts.prepare_data --input text.txt --vocab-size 300 --output out --token-cache @",
    "scripts.prepare_data index @",
    "scripts.prepare_data inspect @",
    "scripts.prepare_data put text.txt @",
    "scripts.prepare_data put @ out",
    "scripts.prepare_data get @ out",
    "scripts.prepare_data get data @",
    "scripts.prepare_data ls @",
    "scripts.prepare_data rm @ --yes",
    "scripts.upload_manager status --set checkpoint_uri=@",
    "scripts.upload_manager download latest --to @",
    "scripts.checkpoint_viewer list --output-dir @",
    "scripts.checkpoint_viewer plot --run @",
    "scripts.checkpoint_viewer plot --remote --run @",
    "scripts.checkpoint_viewer plot --save @.png",
    "scripts.monitor_training --once --output-dir @",
    "scripts.evaluate @/latest",
    "scripts.evaluate latest --data @",
    "scripts.generate @/latest --prompt x",
    "scripts.export_model @/latest --output out",
    "scripts.export_model latest --output @",
    "scripts.consolidate_checkpoint latest --output @",
    "scripts.prove_resume --workdir @",
]


def call(command: str, place: str) -> int:
    """Run a command in this process; @ is the place."""
    module, *words = command.split()
    code: int = importlib.import_module(module).main([word.replace("@", place) for word in words])
    return code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text("some text", encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", ["gs:/bucket/a", "s3:/bucket/a"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_bucket_and_no_path_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, place: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert call(command, place) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert place in told or place.replace("//", "/") in told
    assert "did you mean gs://bucket/a" in told or "give " in told
    assert sorted(folder.rglob("*")) == before


def test_a_directory_with_a_colon_in_its_name_is_a_place(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("./gs:/bucket", "./a:b"):
        assert call("scripts.prepare_data put text.txt @", place) == 0
        assert (folder / place / "text.txt").read_text() == "some text"
        assert call("scripts.prepare_data ls @", place) == 0
    assert "text.txt" in capsys.readouterr().out
    assert call("scripts.prepare_data put text.txt @", "gs:/bucket") == ExitCode.USAGE
    assert "For a directory of that name, write ./gs:/bucket" in capsys.readouterr().err


@pytest.mark.parametrize("command", [line for line in COMMANDS if "@" in line.split()])
def test_an_empty_name_is_no_place(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert call(command, "") == ExitCode.USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(folder.rglob("*")) == before
