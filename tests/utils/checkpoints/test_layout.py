"""Names from outside are checked, manifests are read strictly, paths follow the run's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.training_config import TrainingConfig
from tests.sample_checkpoints import make_checkpoint
from utils.base.errors import CheckpointError, UsageError
from utils.checkpoints.layout import (
    CheckpointName,
    FileEntry,
    Manifest,
    RunPaths,
    find_checkpoints,
    parse_checkpoint_name,
    read_json,
    read_manifest,
    require_checkpoint_name,
    validate_run_name,
    write_json,
)

MANIFEST = Manifest("20260101-0a1b2c3d", 50, 2, 4, {"a.bin": FileEntry(3, "AAAAAA==")})


@given(
    step=st.integers(0, 10**12 - 1),
    epoch=st.integers(0, 10**9 - 1),
    files=st.integers(0, 10**9 - 1),
)
def test_a_checkpoint_name_keeps_its_numbers(step: int, epoch: int, files: int) -> None:
    name = CheckpointName(step=step, epoch=epoch, files=files)
    assert str(name) == f"checkpoint-epoch{epoch}-step{step}-files{files}"
    assert parse_checkpoint_name(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "latest",
        "-rf",
        "a*b",
        "$(touch x)",
        "checkpoint-epoch0-step1-files0\n",
        "\ncheckpoint-epoch0-step1-files0",
        "checkpoint-epoch0-step1-files0/..",
        "../checkpoint-epoch0-step1-files0",
        "/checkpoint-epoch0-step1-files0",
        "checkpoint-epoch0-step1-files0.tar.gz",
        "checkpoint-epoch0-step01-files0",
        "checkpoint-epoch0-step-1-files0",
        "checkpoint-epoch0-step\u0661-files0",
        "checkpoint-epoch0-step1-files0\0",
        "checkpoint-epoch0-step1",
        "Checkpoint-epoch0-step1-files0",
        "checkpoint-epoch0-step" + "9" * 13 + "-files0",
    ],
)
def test_anything_else_is_no_checkpoint_name(text: str) -> None:
    assert parse_checkpoint_name(text) is None
    with pytest.raises(UsageError, match="is not a checkpoint name"):
        require_checkpoint_name(text)


@pytest.mark.parametrize(
    "name",
    ["..", ".hidden", "-rf", "a/b", "a b", "a*", "$(x)", "a\n", "\u00e4", "A" * 101, "a\0", "~"],
)
def test_run_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="run_name"):
        validate_run_name(name)
    with pytest.raises(UsageError, match="run_name"):
        RunPaths.of(TrainingConfig(run_name=name))
    assert validate_run_name("run-2.1_b") == "run-2.1_b"


def test_a_run_name_adds_a_folder_to_every_path() -> None:
    paths = RunPaths.of(TrainingConfig(output_dir="out", logging_dir="log", run_name="a"))
    assert (paths.checkpoints, paths.logs, paths.cache) == (
        Path("out/a"),
        Path("log/a"),
        Path("cache/a"),
    )
    assert paths.journal == Path("out/a/uploads.jsonl")
    assert paths.lock == Path("out/a/.lock")
    assert paths.set_aside == Path("out/a/set-aside")
    assert paths.metrics == Path("log/a/metrics.jsonl")
    assert paths.train_log == Path("log/a/train.log")
    assert RunPaths.of(TrainingConfig()).checkpoints == Path("checkpoints")


def changed(**changes: Any) -> dict[str, Any]:
    return {**MANIFEST.to_json(), **changes}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in MANIFEST.to_json().items() if name != key}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        changed(format=2),
        without("run_id"),
        without("step"),
        without("files"),
        changed(step="x"),
        changed(step=float("inf")),
        changed(files=[]),
        changed(files={"a": 5}),
        changed(files={"a": {"size": 1}}),
        changed(files={"a": {"size": float("nan"), "crc32c": "x"}}),
        changed(files={"../a": {"size": 1, "crc32c": "x"}}),
        changed(files={"/etc/passwd": {"size": 1, "crc32c": "x"}}),
        changed(files={"..": {"size": 1, "crc32c": "x"}}),
        changed(files={"": {"size": 1, "crc32c": "x"}}),
        changed(files={"a\0": {"size": 1, "crc32c": "x"}}),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="not a usable manifest"):
        read_manifest(tmp_path)


def test_committed_checkpoints_are_found_by_step_and_nothing_else_is(tmp_path: Path) -> None:
    for step in (100, 9, 10):
        make_checkpoint(tmp_path, step)
    (make_checkpoint(tmp_path, 200) / "manifest.json").unlink()
    make_checkpoint(tmp_path, 300).rename(tmp_path / ".saving-checkpoint-epoch0-step300-files0")
    make_checkpoint(tmp_path, 400).rename(tmp_path / "checkpoint-epoch0-step400-files0.2")
    (tmp_path / "checkpoint-epoch0-step500-files0").write_text("a file")
    (tmp_path / "checkpoint-epoch0-step600-files0").symlink_to("checkpoint-epoch0-step600-files0")
    assert [name.step for name in find_checkpoints(tmp_path)] == [9, 10, 100]
    assert find_checkpoints(tmp_path / "none") == []
    assert find_checkpoints(tmp_path / "checkpoint-epoch0-step500-files0") == []


def test_json_is_synced_before_the_writer_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(
        "os.fsync", lambda _: synced.append((tmp_path / "a.json").read_text("utf-8"))
    )
    write_json(tmp_path / "a.json", {"\u00e4": [1.5, None]})
    assert read_json(tmp_path / "a.json") == {"\u00e4": [1.5, None]}
    assert [json.loads(text) for text in synced] == [{"\u00e4": [1.5, None]}]
