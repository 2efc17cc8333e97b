"""Saves in the background: exactly the state of the step, whole or not at all, nothing growing."""

from __future__ import annotations

import json
import os
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.processes import run_python
from tests.utils.uploads.waiting import started
from utils.base.child_process import NICENESS
from utils.checkpoints import saver as checkpoint_saver
from utils.checkpoints.files import CheckpointFiles
from utils.checkpoints.layout import CheckpointName, Manifest, find_checkpoints, read_json
from utils.checkpoints.saver import CheckpointSaver
from utils.checkpoints.snapshot import HostBlock, Snapshot
from utils.checkpoints.store import remove_leftovers, verify_checkpoint
from utils.checkpoints.writer import starting_early

CPU = torch.device("cpu")
PLENTY = 2**40
PATIENCE_SECONDS = 300.0  # to end a test that hangs


def make_files(step: int, value: float, numbers: int = 1000) -> CheckpointFiles:
    weights = torch.full((numbers,), value)
    return CheckpointFiles(
        CheckpointName(step, 0, 0),
        Manifest("20260101-0a1b2c3d", step, 0, 1),
        weights={"model.safetensors": {"weights": weights}},
        pickles={"optimizer.bin": {"state": {0: {"exp_avg": weights * 2}}, "lr": 0.5}},
        documents={"metadata.json": {"step": step, "mean": weights[:2]}},
        raw={"config.json": b"{}"},
    )


class Recorder:
    def __init__(self) -> None:
        self.committed: list[str] = []

    def __call__(self, checkpoint: Path) -> None:
        verify_checkpoint(checkpoint)
        self.committed.append(checkpoint.name)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def saver(tmp_path: Path, recorder: Recorder) -> Iterator[CheckpointSaver]:
    saver = CheckpointSaver(tmp_path, CPU, recorder)
    yield saver
    saver.close()


def wait_for_writer(saver: CheckpointSaver) -> psutil.Process:
    """Wait until the writer process has loaded torch; until then a thread writes."""
    writer = saver._writer
    assert writer is not None
    if not writer.is_ready():
        assert writer._connection.poll(PATIENCE_SECONDS)
        assert writer.is_ready()
    return psutil.Process(writer.pid)


def value_of(checkpoint: Path) -> float:
    weights = load_file(checkpoint / "model.safetensors")["weights"]
    moments = torch.load(checkpoint / "optimizer.bin")["state"][0]["exp_avg"]
    (value,) = set(weights.tolist())
    assert set(moments.tolist()) == {value * 2}
    assert read_json(checkpoint / "metadata.json")["mean"] == [value, value]
    return float(value)


@pytest.mark.parametrize("writer", ["process", "thread", "foreground"])
def test_what_is_saved_is_the_state_of_the_step(
    tmp_path: Path, recorder: Recorder, writer: str
) -> None:
    saver = CheckpointSaver(tmp_path, CPU, recorder, background=writer != "foreground")
    # Too small for the thread: its first save makes the block larger.
    saver.prepare(100_000 if writer == "process" else 1000, PLENTY)
    if writer == "process":
        wait_for_writer(saver)
    for step in (1, 2, 3):
        files = make_files(step, value=step / 2)
        saver.save(files, PLENTY)
        for tensor in (
            files.weights["model.safetensors"]["weights"],
            files.pickles["optimizer.bin"]["state"][0]["exp_avg"],
        ):
            if writer != "foreground":
                saver.fence()
                tensor.fill_(-1)  # training goes on
        assert saver.wait(PATIENCE_SECONDS)
        assert saver.failure is None
    saver.close()
    assert [value_of(tmp_path / name) for name in recorder.committed] == [0.5, 1.0, 1.5]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(recorder.committed)
    assert saver.last_committed == CheckpointName(3, 0, 0)
    assert saver.last_seconds is not None


def test_a_save_waits_for_the_block_and_for_the_save_before_it(
    saver: CheckpointSaver,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    staged, warm, stage = threading.Event(), HostBlock.warm, Snapshot.stage

    def warm_late(block: HostBlock) -> None:
        staged.wait(0.2)  # a save that does not wait for this is written over with zeros
        warm(block)

    def note(snapshot: Snapshot, tree: Any) -> Any:
        found = stage(snapshot, tree)
        staged.set()
        return found

    monkeypatch.setattr(HostBlock, "warm", warm_late)
    monkeypatch.setattr(Snapshot, "stage", note)
    saver.prepare(100_000, PLENTY)
    for step in (1, 2, 3):
        saver.save(make_files(step, value=step / 2), PLENTY)
    assert saver.wait(PATIENCE_SECONDS)
    assert [value_of(tmp_path / name) for name in recorder.committed] == [0.5, 1.0, 1.5]


def test_all_is_synced_before_the_rename_and_the_manifest_is_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    rename = Path.rename

    def note_sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(path.name)
        if path.is_dir() and path != tmp_path:
            assert sorted(p.name for p in path.iterdir()) == sorted(done[:-1])

    def note_rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    saver = CheckpointSaver(tmp_path, CPU, lambda checkpoint: None, background=False)
    saver.save(make_files(1, 1.0), PLENTY)
    assert saver.failure is None
    *files, manifest, folder, renamed, parent = done
    assert sorted(files) == ["config.json", "metadata.json", "model.safetensors", "optimizer.bin"]
    assert (manifest, renamed, parent) == ("manifest.json", "rename", tmp_path.name)
    assert folder == ".saving-checkpoint-epoch0-step1-files0"


def test_a_writer_that_dies_costs_no_checkpoint(
    saver: CheckpointSaver, recorder: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver.prepare(100_000, PLENTY)
    process = wait_for_writer(saver)
    process.kill()
    process.wait()
    for step in (1, 2):
        saver.save(make_files(step, 1.0), PLENTY)
        saver.wait()
        assert saver.failure is None
    assert len(recorder.committed) == 2
    assert "a thread writes" in caplog.text
    assert saver._writer is not None  # the second save has a new one
    assert saver._writer.pid != process.pid


def test_a_writer_that_was_started_early_steps_back_writes_and_ends(
    tmp_path: Path, recorder: Recorder
) -> None:
    with starting_early(is_wanted=True) as writer:
        assert writer is not None
        saver = CheckpointSaver(tmp_path, CPU, recorder, writer=writer)
        saver.prepare(100_000, PLENTY)
        process = wait_for_writer(saver)
        assert process.pid == writer.pid
        assert process.nice() == min(19, os.nice(0) + NICENESS)
        assert os.getsid(process.pid) == process.pid  # Ctrl-C in the terminal does not reach it
        group = Path(f"/proc/{process.pid}/autogroup")
        if group.is_file():  # the session is scheduled as a group, which has a niceness of its own
            assert group.read_text().split()[-1] == str(NICENESS)
        saver.save(make_files(1, 1.0), PLENTY)
        saver.close()
        assert not psutil.pid_exists(process.pid)
    assert value_of(tmp_path / recorder.committed[0]) == 1.0
    with starting_early(is_wanted=True) as writer:  # preflight refuses
        assert writer is not None
        assert psutil.pid_exists(writer.pid)
    assert not psutil.pid_exists(writer.pid)


def test_an_early_writer_that_has_died_is_replaced(tmp_path: Path, recorder: Recorder) -> None:
    with starting_early(is_wanted=True) as writer:
        assert writer is not None
        psutil.Process(writer.pid).kill()
        psutil.wait_procs([psutil.Process(writer.pid)], timeout=PATIENCE_SECONDS)
        saver = CheckpointSaver(tmp_path, CPU, recorder, writer=writer)
        saver.prepare(100_000, PLENTY)
        assert saver._writer is not None
        assert saver._writer.pid != writer.pid
        saver.close()


def test_a_full_disk_is_told_with_numbers_and_leaves_what_was_there(
    tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """RLIMIT_FSIZE makes the writer's large files fail as a full disk does, in a child of ours."""
    code = """
        import json, resource, signal, sys, torch
        from pathlib import Path
        from tests.utils.checkpoints.test_saver import *

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        saver = CheckpointSaver(Path(sys.argv[1]), CPU, lambda checkpoint: None)
        saver.prepare(50_000_000, PLENTY)
        wait_for_writer(saver)
        saver.save(make_files(1, 1.0), PLENTY); saver.wait()
        first = str(saver.failure)
        for pid in (0, saver._writer.pid):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        files, writer = make_files(2, 1.0, numbers=3_000_000), saver._writer.pid
        saver.save(files, PLENTY); saver.wait()
        second = [str(saver.failure)]
        files.weights["model.safetensors"]["weights"] = torch.zeros(5)  # now the optimizer is it
        saver.save(files, PLENTY); saver.wait()
        second.append(str(saver.failure))
        assert saver._writer.pid == writer
        for pid in (0, saver._writer.pid):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        saver.save(make_files(3, 1.0, numbers=3_000_000), PLENTY); saver.wait()
        print(json.dumps([first, second, str(saver.failure)]))
        saver.close()
        """
    result = run_python("-c", textwrap.dedent(code), tmp_path)
    assert result.returncode == 0, result.stderr
    first, second, third = json.loads(result.stdout)
    assert (first, third) == ("None", "None")
    for told in second:
        assert "step2-files0 could not be saved: File too large (" in told
        assert "free in" in told
        assert "Older checkpoints are intact" in told
    assert [name.step for name in find_checkpoints(tmp_path)] == [1, 3]
    for name in find_checkpoints(tmp_path):
        verify_checkpoint(tmp_path / str(name))
    assert not list(tmp_path.glob(".saving-*"))


def test_what_follows_a_commit_may_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(checkpoint: Path) -> None:
        raise OSError("the journal cannot be written")

    saver = CheckpointSaver(tmp_path, CPU, fail)
    saver.save(make_files(1, 1.0), PLENTY)
    saver.close()
    assert saver.failure is None
    verify_checkpoint(tmp_path / "checkpoint-epoch0-step1-files0")
    assert "is saved, but what follows failed: the journal cannot be written" in caplog.text


def test_too_little_memory_takes_a_file_and_says_so(
    saver: CheckpointSaver, recorder: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver.prepare(100_000, free_memory=50_000)
    assert "Snapshots go through a file in" in caplog.text
    saver.save(make_files(1, 3.0), 50_000)
    saver.wait()
    assert value_of(tmp_path / recorder.committed[0]) == 3.0
    assert [path.name for path in tmp_path.iterdir()] == recorder.committed


def test_no_room_at_all_writes_while_training_waits_and_says_so(
    saver: CheckpointSaver,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(size: int, directory: Path | None = None) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_saver.HostBlock, "allocate", refuse)
    saver.prepare(100_000, PLENTY)
    assert "training waits while a checkpoint is written" in caplog.text
    saver.save(make_files(1, 3.0), PLENTY)
    assert not saver.is_busy
    assert len(recorder.committed) == 1


@pytest.mark.slow
def test_memory_and_descriptors_do_not_grow_over_200_saves(tmp_path: Path) -> None:
    """In a process of its own: what other tests leave behind comes and goes."""
    code = """
        import json, shutil, sys
        from tests.utils.checkpoints.test_saver import *

        recorder = Recorder()
        saver = CheckpointSaver(Path(sys.argv[1]), CPU, recorder)
        saver.prepare(20 * 2**20, PLENTY)
        processes = psutil.Process(), wait_for_writer(saver)
        files = make_files(1, 1.0, numbers=2**20)  # 8 MiB

        def save(times):
            for _ in range(times):
                saver.save(files, PLENTY)
                saver.wait()
                shutil.rmtree(Path(sys.argv[1]) / recorder.committed[-1])
            return [(p.memory_full_info().uss / 2**20, p.num_fds()) for p in processes]

        print(json.dumps([save(20), save(200), len(recorder.committed)]))
        saver.close()
        """
    result = run_python("-c", textwrap.dedent(code), tmp_path)
    assert result.returncode == 0, result.stderr
    before, after, count = json.loads(result.stdout)
    assert count == 220
    for (memory, descriptors), (memory_after, descriptors_after) in zip(before, after, strict=True):
        assert memory_after - memory < 4  # MiB; a leak of one save in ten would be 160
        assert descriptors_after == descriptors


class Endless:
    """Takes for ever to be written by another process than its own."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __reduce__(self) -> tuple[type[Endless], tuple[int]]:
        if os.getpid() != self._pid:
            time.sleep(3600)
        return Endless, (self._pid,)


TRAINER = """
import sys
from tests.utils.checkpoints.test_saver import *

saver = CheckpointSaver(Path(sys.argv[1]), CPU, lambda checkpoint: None)
saver.prepare(100_000, PLENTY)
wait_for_writer(saver)
saver.save(make_files(1, 1.0), PLENTY)
saver.wait()
print(saver._writer.pid, flush=True)
files = make_files(2, 2.0)
files.pickles["optimizer.bin"]["endless"] = Endless(os.getpid())
saver.save(files, PLENTY)
saver.wait()
"""


def test_a_trainer_that_is_killed_takes_the_save_in_progress_with_it(tmp_path: Path) -> None:
    with started(TRAINER, tmp_path) as (process, line):
        writer = psutil.Process(int(line))
        while not list(tmp_path.glob(".saving-*/optimizer.bin")):
            assert process.poll() is None
            time.sleep(0.005)
    psutil.wait_procs([writer], timeout=PATIENCE_SECONDS)
    assert not writer.is_running()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-epoch0-step1-files0"]
    assert value_of(tmp_path / "checkpoint-epoch0-step1-files0") == 1.0


def test_every_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    code = (
        "import os; os.umask(0o027)\n"
        "from pathlib import Path\n"
        "from tests.utils.checkpoints.test_saver import make_files\n"
        "from utils.checkpoints.files import write_files\n"
        "write_files(make_files(1, 1.0), Path('made'))\n"
    )
    assert run_python("-c", code, cwd=tmp_path).returncode == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "made").iterdir()}
    assert modes == dict.fromkeys(modes, 0o640)
    assert "model.safetensors" in modes
