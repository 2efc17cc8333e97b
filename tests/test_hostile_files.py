"""Files that are something else than their names promise: every tool shows the rest, none waits."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts import checkpoint_viewer, monitor_training, upload_manager
from tests.sample_checkpoints import RUN_ID, make_checkpoint
from tests.sample_logs import write_start, write_step
from utils.checkpoints.journal import Journal, UploadState

GOOD = "checkpoint-epoch0-step20-files0"
BAD = "checkpoint-epoch0-step10-files0"
LIMIT_SECONDS = 300  # to end a test that hangs

TOOLS: dict[str, Callable[[], int]] = {
    "list": lambda: checkpoint_viewer.main(["list"]),
    "status": lambda: upload_manager.main(["status"]),
    "monitor": lambda: monitor_training.main(["--once"]),
}


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 * 2**30)


def make_garbage(path: Path) -> None:
    path.write_bytes(b'\xff\x1b[31m{"step": 1e999}\n[[[[\x00' * 20)


KINDS = [os.mkfifo, make_loop, make_device, Path.mkdir, make_huge, make_garbage]


@pytest.fixture(autouse=True)
def _run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two checkpoints, a journal and a log; what takes too long is ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.base.machine.FIRST_CPU_SECONDS", 0.001)
    for step in (10, 20):
        path = make_checkpoint(tmp_path / "checkpoints", step)
        journal = Journal(tmp_path / "checkpoints" / "uploads.jsonl")
        journal.record(path.name, RUN_ID, UploadState.QUEUED)
    (tmp_path / "checkpoints" / "run.json").write_text(f'{{"run_id": "{RUN_ID}", "branch": 0}}')
    write_start(tmp_path / "logs" / "metrics.jsonl")
    write_step(tmp_path / "logs" / "metrics.jsonl", 20)

    def end(signum: int, frame: object) -> None:
        raise TimeoutError(f"it took more than {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


NAMES = ["checkpoints/uploads.jsonl", "checkpoints/run.json", "logs/metrics.jsonl"]
CASES = [
    (name, kind, tool)
    for name, kind, tool in itertools.product(NAMES, KINDS, TOOLS)
    # The monitor reads a log and a journal of that size, which takes as long as that takes.
    if kind is not make_huge or tool != "monitor" or name == "checkpoints/run.json"
]


@pytest.mark.parametrize(("name", "kind", "tool"), CASES)
def test_a_file_that_is_none_hides_nothing_else(
    name: str,
    kind: Callable[[Path], None],
    tool: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).unlink()
    kind(tmp_path / name)
    code = TOOLS[tool]()
    captured = capsys.readouterr()
    told = captured.out + captured.err
    assert code == 0, told
    assert GOOD in captured.out
    assert BAD in captured.out
    assert "\x1b" not in told
    assert "Traceback" not in told


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", [make_loop, os.mkfifo, make_garbage])
def test_a_checkpoint_that_is_none_hides_no_other(
    kind: Callable[[Path], None], tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints" / BAD).rename(tmp_path / "elsewhere")
    kind(tmp_path / "checkpoints" / BAD)
    assert TOOLS[tool]() == 0
    assert GOOD in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["status", "monitor"])
@pytest.mark.parametrize("kind", [make_loop, make_garbage, os.mkfifo])
def test_a_checkpoints_directory_that_is_none_is_said(
    kind: Callable[[Path], None], tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    kind(tmp_path / "checkpoints")
    assert TOOLS[tool]() == 0
    told = capsys.readouterr().out
    assert "checkpoints" in told
    assert "cannot be read" in told or "no directory" in told
