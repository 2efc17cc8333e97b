"""`export_model.py` as a user runs it: what it says, its exit codes, nothing half done."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts import export_model
from tests.gcs_server import FakeGcsServer
from utils.base.errors import ExitCode


@pytest.fixture
def words(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that name the trained run, from an empty directory."""
    monkeypatch.chdir(tmp_path)
    return [
        "--output-dir",
        str(trained_run / "checkpoints"),
        "--set",
        "cache_dir=cache",
        "--device",
        "cpu",
    ]


def test_a_checkpoint_becomes_a_folder(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("utils.base.progress.LINE_SECONDS", 0.0)
    assert export_model.main(["latest", "--output", "small", *words]) == 0
    out, errors = capsys.readouterr()
    for stage in ("Writing", "Reading", "Comparing"):
        assert re.search(rf" {stage}: .* \(100%\)", errors)
    assert f"checkpoint-epoch0-step4-files0 -> {tmp_path / 'small'}" in out
    assert "tensors, every bit the same" in out
    assert "largest difference 0" in out
    AutoModelForCausalLM.from_pretrained(tmp_path / "small", local_files_only=True)
    # What is there stays; the one that replaces it is another one.
    assert export_model.main(["2", "--output", "small", *words]) == ExitCode.USAGE
    assert "is there already" in capsys.readouterr().err
    assert "step4" in (tmp_path / "small" / "README.md").read_text()
    assert export_model.main(["2", "--output", "small", "--overwrite", "--json", *words]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["model"], record["max_logit_difference"]) == (
        "checkpoint-epoch0-step2-files0",
        0,
    )
    assert set(record["files"]) == {path.name for path in (tmp_path / "small").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_an_export_that_fails_its_check_is_nowhere(
    words: list[str],
    tmp_path: Path,
    gcs: FakeGcsServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = map(str, range(4))
    monkeypatch.setattr(
        "utils.tools.export.export.checksum_tensors", lambda *_: {"a": next(numbers)}
    )
    for output in ("small", "gs://runs/exports/small"):
        assert export_model.main(["latest", "--output", output, *words]) == ExitCode.UNEXPECTED
        assert "What was written is not the model: a differs" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
    assert not gcs.requests("upload")
    assert not [path for path in tmp_path.rglob("*") if "safetensors" in path.name]


def test_a_gguf_file(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf", reason="needs gguf (requirements-dev.txt)")
    command = ["latest", "--format", "gguf", "--dtype", "float16", "--output", "small.gguf"]
    assert export_model.main([*command, *words]) == 0
    assert "in float16, 1 file," in capsys.readouterr().out
    assert (tmp_path / "small.gguf").read_bytes()[:4] == b"GGUF"
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]
    assert export_model.main([*command, *words]) == ExitCode.USAGE


def test_a_missing_package_is_named_with_what_to_do(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    command = ["no-such-model", "--format", "gguf", "--output", "small.gguf"]
    assert export_model.main([*command, *words]) == ExitCode.USAGE
    assert "-m pip install gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "x.gguf"), "wants --format gguf"),
        (("--output", "x", "--format", "gguf"), "a name that ends in .gguf"),
        (("--output", "x", "--max-shard-size", "0GB"), "give a number and KB, MB or GB"),
        (("--output", "x", "--max-shard-size", "five"), "give a number and KB, MB or GB"),
        (("--output", "x", "--private"), "--private is for --output hub:"),
        (("--output", "hub:small"), "give hub:OWNER/NAME"),
        (("--output", "s3://bucket/x"), "give a folder, a .gguf file, gs://"),
    ],
)
def test_what_does_not_fit_is_one_message(
    arguments: tuple[str, ...],
    message: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export_model.main(["latest", *arguments, *words]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_hub_gets_what_was_checked(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its protocol: tests/utils/tools/export/test_hub_target.py."""
    got: dict[str, Any] = {}

    def publish(target: Any, staged: Path, on_progress: Any) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(staged, dtype="auto")
        got.update(repository=target.repository, private=target.is_private, dtype=model.dtype)

    monkeypatch.setattr("utils.tools.export.hub_target.HubTarget.require_free", lambda target: None)
    monkeypatch.setattr("utils.tools.export.hub_target.HubTarget.publish", publish)
    command = ["latest", "--output", "hub:me/small", "--private", "--dtype", "float16"]
    assert export_model.main([*command, *words]) == 0
    assert got == {"repository": "me/small", "private": True, "dtype": torch.float16}
    assert "-> hub:me/small" in capsys.readouterr().out
