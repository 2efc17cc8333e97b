"""Where a start begins: refused where it would mix runs, exact where it goes on, nothing lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.sample_checkpoints import RUN_ID, make_checkpoint
from utils.checkpoint_store import verify_checkpoint
from utils.errors import CheckpointError, ExitCode, UsageError
from utils.journal import Journal, UploadState
from utils.layout import RunPaths, find_checkpoints, read_json, write_json
from utils.resume import commit_start, plan_start, require_startable


def name(step: int) -> str:
    return f"checkpoint-epoch0-step{step}-files0"


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "checkpoints", tmp_path / "logs", tmp_path / "cache")


@pytest.fixture
def old_run(paths: RunPaths) -> RunPaths:
    """A run with checkpoints at steps 10, 20 and 30, the best of which is 20."""
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0)]:
        make_checkpoint(paths.checkpoints, step, validation_metrics={"validation_loss": loss})
    Journal(paths.journal).record(name(10), RUN_ID, UploadState.VERIFIED)
    return paths


def steps(directory: Path) -> list[int]:
    return [found.step for found in find_checkpoints(directory)]


def test_a_first_start_begins_at_step_0_of_a_new_run(paths: RunPaths) -> None:
    require_startable(paths, resume=None, fresh=False)
    first, second = (plan_start(paths, resume=None, fresh=False) for _ in range(2))
    assert (first.step, first.checkpoint, first.manifest, first.obsolete) == (0, None, None, ())
    assert first.identity.branch == 0
    assert first.identity.run_id != second.identity.run_id
    commit_start(first, paths)
    assert not paths.checkpoints.exists()


def test_a_start_beside_old_checkpoints_is_refused_with_both_ways_out(old_run: RunPaths) -> None:
    with pytest.raises(UsageError) as caught:
        require_startable(old_run, resume=None, fresh=False)
    message = str(caught.value)
    assert "up to step 30" in message
    assert "--resume latest" in message
    assert "--fresh" in message
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(("resume", "fresh"), [("latest", False), (None, True)])
def test_either_flag_lets_it_start(old_run: RunPaths, resume: str | None, fresh: bool) -> None:
    require_startable(old_run, resume=resume, fresh=fresh)


def test_fresh_sets_the_old_run_aside_and_loses_nothing(old_run: RunPaths) -> None:
    start = plan_start(old_run, resume=None, fresh=True)
    assert start.identity.run_id != RUN_ID
    assert start.obsolete == (name(10), name(20), name(30))
    assert steps(old_run.checkpoints) == [10, 20, 30]  # a plan changes nothing

    commit_start(start, old_run)
    assert steps(old_run.checkpoints) == []
    for step in (10, 20, 30):
        verify_checkpoint(old_run.set_aside / name(step))
    # The states of the old run's uploads are not taken for the new run's.
    assert Journal(old_run.journal).latest() == {}
    (kept,) = old_run.set_aside.glob("uploads-before-*.jsonl")
    assert set(Journal(kept).latest()) == {name(10)}


def test_fresh_twice_keeps_both_old_runs(old_run: RunPaths) -> None:
    commit_start(plan_start(old_run, resume=None, fresh=True), old_run)
    make_checkpoint(old_run.checkpoints, 10)
    Journal(old_run.journal).record(name(10), "other", UploadState.QUEUED)
    commit_start(plan_start(old_run, resume=None, fresh=True), old_run)
    kept = sorted(path.name for path in old_run.set_aside.iterdir() if path.is_dir())
    assert kept == [name(10), f"{name(10)}.2", name(20), name(30)]
    assert len(list(old_run.set_aside.glob("uploads-before-*.jsonl"))) == 2


def test_latest_goes_on_with_the_same_run_and_branch(old_run: RunPaths) -> None:
    start = plan_start(old_run, resume="latest", fresh=False)
    assert (start.checkpoint, start.step) == (old_run.checkpoints / name(30), 30)
    assert (start.identity.run_id, start.identity.branch) == (RUN_ID, 0)
    assert start.manifest == verify_checkpoint(old_run.checkpoints / name(30))
    commit_start(start, old_run)
    assert steps(old_run.checkpoints) == [10, 20, 30]
    assert set(Journal(old_run.journal).latest()) == {name(10)}


def test_latest_where_there_is_none_begins_at_0_and_says_so(
    paths: RunPaths, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    start = plan_start(paths, resume="latest", fresh=False)
    assert (start.step, start.checkpoint) == (0, None)
    assert re.search(r"no checkpoint in .*checkpoints yet: starting at step 0", caplog.text)


def test_latest_passes_over_a_damaged_checkpoint(old_run: RunPaths) -> None:
    (old_run.checkpoints / name(30) / "model.safetensors").write_bytes(b"zeroes")
    start = plan_start(old_run, resume="latest", fresh=False)
    assert start.step == 20
    # Nothing later is left on this branch, so it goes on as the same one.
    assert (start.identity.branch, start.obsolete) == (0, ())
    assert (old_run.set_aside / name(30)).is_dir()


@pytest.mark.parametrize("resume", ["20", name(20), "best", "PATH", "PATH/"])
def test_an_older_checkpoint_begins_a_branch_and_later_ones_are_set_aside(
    old_run: RunPaths, resume: str
) -> None:
    resume = resume.replace("PATH", str(old_run.checkpoints / name(20)))
    start = plan_start(old_run, resume=resume, fresh=False)
    assert (start.checkpoint, start.step) == (old_run.checkpoints / name(20), 20)
    assert (start.identity.run_id, start.identity.branch) == (RUN_ID, 1)
    assert start.obsolete == (name(30),)
    assert steps(old_run.checkpoints) == [10, 20, 30]

    commit_start(start, old_run)
    assert steps(old_run.checkpoints) == [10, 20]
    verify_checkpoint(old_run.set_aside / name(30))
    assert plan_start(old_run, resume="latest", fresh=False).step == 20


def test_branches_are_counted_on(old_run: RunPaths) -> None:
    path = old_run.checkpoints / name(20) / "manifest.json"
    write_json(path, {**read_json(path), "branch": 3})
    assert plan_start(old_run, resume="20", fresh=False).identity.branch == 4


def test_resume_from_another_directory_goes_on_with_that_run(
    paths: RunPaths, tmp_path: Path
) -> None:
    elsewhere = make_checkpoint(tmp_path / "elsewhere", 50)
    start = plan_start(paths, resume=str(elsewhere), fresh=False)
    assert (start.checkpoint, start.step) == (elsewhere, 50)
    assert (start.identity.run_id, start.identity.branch) == (RUN_ID, 0)


@pytest.mark.parametrize(
    "resume", ["40", name(40), "nonsense", "", "-rf", "../checkpoints", "/nowhere", "a/b"]
)
def test_a_checkpoint_that_does_not_exist_is_refused(old_run: RunPaths, resume: str) -> None:
    with pytest.raises((UsageError, CheckpointError)) as caught:
        plan_start(old_run, resume=resume, fresh=False)
    assert caught.value.exit_code is ExitCode.USAGE
    assert steps(old_run.checkpoints) == [10, 20, 30]


def test_an_unknown_checkpoint_is_answered_with_the_known_ones(old_run: RunPaths) -> None:
    with pytest.raises(UsageError, match=rf"no checkpoint '40'.*{name(10)}, {name(20)}"):
        plan_start(old_run, resume="40", fresh=False)


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error_and_stays(old_run: RunPaths) -> None:
    (old_run.checkpoints / name(20) / "model.safetensors").write_bytes(b"zeroes")
    with pytest.raises(CheckpointError, match=rf"{name(20)}: model.safetensors"):
        plan_start(old_run, resume=name(20), fresh=False)
    assert steps(old_run.checkpoints) == [10, 20, 30]


def test_an_incomplete_checkpoint_cannot_be_asked_for(old_run: RunPaths) -> None:
    (old_run.checkpoints / name(30) / "manifest.json").unlink()
    with pytest.raises(UsageError, match="There is no checkpoint '30'"):
        plan_start(old_run, resume="30", fresh=False)
    assert plan_start(old_run, resume="latest", fresh=False).step == 20
