"""Where an attempt begins: refused where it would mix runs, exact where it goes on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.sample_checkpoints import RUN_ID, change_manifest, make_checkpoint
from tests.sample_json import UNREADABLE
from utils.base.errors import (
    CheckpointError,
    ExitCode,
    StorageError,
    TransientStorageError,
    UsageError,
)
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import RunIdentity, RunPaths, find_checkpoints, read_json, write_json
from utils.checkpoints.run_record import RunRecord, read_run_identity
from utils.checkpoints.store import verify_checkpoint
from utils.start.restore import bring, commit_start
from utils.start.resume import (
    Plan,
    Start,
    fresh_start,
    plan_start,
    resolve_start,
)
from utils.storage.directory import DirectoryBucket
from utils.uploads.job import UploadJob, UploadProgress, run_job
from utils.uploads.transports import TransportOptions

OTHER_RUN = "20260202-ffffffff"


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


def damage(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"zeroes")


def upload_all(directory: Path, root: Path) -> None:
    """Bring every checkpoint of a directory into a directory bucket, as the trainer does."""
    for found in find_checkpoints(directory):
        run_job(
            UploadJob(str(directory / str(found)), TransportOptions(str(root))), UploadProgress()
        )


def plan(paths: RunPaths, resume: str | None = "latest", **options: Any) -> Plan:
    return plan_start(paths, resume=resume, **options)


def begin(plan: Plan, paths: RunPaths) -> Start:
    """Do what an attempt does with its plan, without a model."""
    start = None if plan.candidates else fresh_start(plan, paths)
    for candidate in plan.candidates:
        found = bring(plan, candidate, paths)
        if found is not None:
            start = resolve_start(plan, paths, *found)
            break
    assert start is not None, "no candidate could be used"
    commit_start(start, paths, RunRecord(start.identity))
    return start


def test_a_first_start_begins_at_step_0_of_a_new_run(paths: RunPaths) -> None:
    first, second = plan(paths, None), plan(paths, None)
    assert (first.step, first.candidates) == (0, ())
    assert first.identity.run_id != second.identity.run_id
    assert not paths.checkpoints.exists()  # a plan changes nothing
    assert begin(first, paths) == Start(RunIdentity(first.identity.run_id))
    assert read_run_identity(paths) == first.identity


@pytest.mark.parametrize("value", [b'{"run_id": "x", "branch": Infinity}', *UNREADABLE.values()])
def test_a_hint_that_cannot_be_read_is_ignored_and_said(
    old_run: RunPaths, value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    old_run.run_file.write_bytes(value)
    assert read_run_identity(old_run) is None
    assert "run.json cannot be read" in caplog.text
    assert plan(old_run).step == 30


def test_fresh_sets_the_old_run_aside_and_loses_nothing(old_run: RunPaths) -> None:
    planned = plan(old_run, None)
    assert planned.identity.run_id != RUN_ID
    assert steps(old_run.checkpoints) == [10, 20, 30]  # a plan changes nothing

    begin(planned, old_run)
    assert steps(old_run.checkpoints) == []
    for step in (10, 20, 30):
        verify_checkpoint(old_run.set_aside / name(step))
    # The states of the old run's uploads are not taken for the new run's.
    assert Journal(old_run.journal).latest() == {}
    (kept,) = old_run.set_aside.glob("uploads-before-*.jsonl")
    assert set(Journal(kept).latest()) == {name(10)}


def test_latest_goes_on_with_the_same_run_and_branch(old_run: RunPaths) -> None:
    planned = plan(old_run)
    assert planned.step == 30
    start = begin(planned, old_run)
    assert start.checkpoint == old_run.checkpoints / name(30)
    assert (start.identity, start.obsolete) == (RunIdentity(RUN_ID), {})
    verify_checkpoint(old_run.checkpoints / name(30))
    assert steps(old_run.checkpoints) == [10, 20, 30]
    assert set(Journal(old_run.journal).latest()) == {name(10)}


def test_latest_where_there_is_none_begins_at_0_and_says_so(
    paths: RunPaths, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    planned = plan(paths, bucket_uri=str(tmp_path / "bucket"))
    assert planned.candidates == ()
    assert not caplog.text  # an attempt may plan twice
    begin(planned, paths)
    assert re.search(r"no checkpoint in .*checkpoints or .*bucket yet: starting at", caplog.text)


def test_latest_is_the_highest_step_whatever_clock_and_hints_say(paths: RunPaths) -> None:
    for age, step in enumerate([100, 9, 10]):
        checkpoint = make_checkpoint(paths.checkpoints, step, timestamp=f"20{30 - age}-01-01")
        for path in (*checkpoint.iterdir(), checkpoint):
            os.utime(path, (age * 1000, age * 1000))  # the highest step is the oldest
    (paths.checkpoints / "latest").write_text(name(9))
    (paths.checkpoints / "latest.json").write_text("{")
    assert [one.name.step for one in plan(paths).candidates] == [100, 10, 9]


def test_latest_passes_over_a_damaged_checkpoint(
    old_run: RunPaths, caplog: pytest.LogCaptureFixture
) -> None:
    damage(old_run.checkpoints / name(30))
    planned = plan(old_run)
    assert steps(old_run.checkpoints) == [10, 20, 30]  # a plan changes nothing
    start = begin(planned, old_run)
    assert start.checkpoint == old_run.checkpoints / name(20)
    # It was not asked for: the run goes on as the same branch.
    assert start.identity == RunIdentity(RUN_ID)
    assert (old_run.set_aside / name(30)).is_dir()
    assert "model.safetensors has 6 bytes" in caplog.text
    assert "set aside" in caplog.text


def test_a_checkpoint_without_a_readable_manifest_is_set_aside(old_run: RunPaths) -> None:
    (old_run.checkpoints / name(30) / "manifest.json").write_text("{")
    start = begin(plan(old_run), old_run)
    assert start.obsolete == {name(30): "its manifest cannot be read"}
    assert steps(old_run.checkpoints) == [10, 20]


@pytest.mark.parametrize("resume", ["20", name(20), "best", "PATH/"])
def test_an_older_checkpoint_begins_a_branch_and_later_ones_are_set_aside(
    old_run: RunPaths, resume: str
) -> None:
    resume = resume.replace("PATH", str(old_run.checkpoints / name(20)))
    planned = plan(old_run, resume)
    assert steps(old_run.checkpoints) == [10, 20, 30]
    start = begin(planned, old_run)
    assert start.checkpoint == old_run.checkpoints / name(20)
    assert start.identity == RunIdentity(RUN_ID, 1, ((0, 0), (1, 20)))
    assert start.obsolete == {name(30): "it is not part of this branch"}
    assert steps(old_run.checkpoints) == [10, 20]
    verify_checkpoint(old_run.set_aside / name(30))
    # The branch is remembered although nothing was saved on it yet.
    again = begin(plan(old_run), old_run)
    assert (again.identity, again.obsolete) == (start.identity, {})


def test_a_branch_that_was_left_is_not_the_latest_although_its_steps_are_higher(
    old_run: RunPaths, tmp_path: Path
) -> None:
    upload_all(old_run.checkpoints, tmp_path / "bucket")
    begin(plan(old_run, "10"), old_run)
    checkpoint = make_checkpoint(old_run.checkpoints, 15)
    change_manifest(checkpoint, branch=1, forks=[[0, 0], [1, 10]])
    planned = plan(old_run, bucket_uri=str(tmp_path / "bucket"))
    assert [(one.name.step, one.path is None) for one in planned.candidates] == [
        (15, False),
        (10, False),
        (10, True),
    ]
    # Also where a crash came before the later ones were moved, and on a machine with the bucket.
    (old_run.set_aside / name(30)).rename(old_run.checkpoints / name(30))
    assert begin(plan(old_run), old_run).obsolete == {name(30): "it is not part of this branch"}
    upload_all(old_run.checkpoints, tmp_path / "bucket")
    elsewhere = RunPaths(tmp_path / "else", tmp_path / "logs", tmp_path / "cache")
    assert plan(elsewhere, bucket_uri=str(tmp_path / "bucket")).step == 15


def test_two_branches_from_the_same_place_are_two(old_run: RunPaths, tmp_path: Path) -> None:
    first = begin(plan(old_run, "20"), old_run).identity
    left = make_checkpoint(old_run.checkpoints, 25)
    change_manifest(left, **first.to_json())
    upload_all(old_run.checkpoints, tmp_path / "bucket")
    second = begin(plan(old_run, "20"), old_run).identity
    assert (first.branch, second.branch) == (1, 2)
    planned = plan(old_run, bucket_uri=str(tmp_path / "bucket"))
    assert planned.step == 20  # not 25, which belongs to the branch that was left
    # The branch that was left goes on from its end when that is asked for.
    assert begin(plan(old_run, str(old_run.set_aside / name(25))), old_run).identity == first


def test_a_checkpoint_may_be_named_by_its_whole_path(old_run: RunPaths) -> None:
    path = (old_run.checkpoints / name(30)).absolute()
    start = begin(plan(old_run, str(path)), old_run)
    assert (start.identity, start.obsolete) == (RunIdentity(RUN_ID), {})
    elsewhere = old_run.checkpoints.parent / "elsewhere" / name(30)
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    make_checkpoint(old_run.checkpoints, 30)
    start = begin(plan(old_run, str(elsewhere)), old_run)
    assert start.obsolete == {name(30): "the one that is resumed has its step"}


def test_newer_ones_in_the_bucket_alone_make_a_branch_too(
    old_run: RunPaths, tmp_path: Path
) -> None:
    upload_all(old_run.checkpoints, tmp_path / "bucket")
    (old_run.checkpoints / name(30)).rename(tmp_path / "gone")
    bucket_uri = str(tmp_path / "bucket")
    start = begin(plan(old_run, "20", bucket_uri=bucket_uri), old_run)
    assert start.identity == RunIdentity(RUN_ID, 1, ((0, 0), (1, 20)))
    assert plan(old_run, bucket_uri=bucket_uri).step == 20


def test_resume_from_another_directory_goes_on_with_that_run(
    paths: RunPaths, tmp_path: Path
) -> None:
    elsewhere = make_checkpoint(tmp_path / "elsewhere", 50)
    start = begin(plan(paths, str(elsewhere)), paths)
    assert (start.checkpoint, start.identity) == (elsewhere, RunIdentity(RUN_ID))
    damage(elsewhere)
    with pytest.raises(CheckpointError):
        begin(plan(paths, str(elsewhere)), paths)
    assert elsewhere.is_dir()  # what lies elsewhere is never moved


# Checkpoints of another run in the directory.


def test_a_foreign_checkpoint_is_not_chosen_not_deleted_and_out_of_the_way(
    old_run: RunPaths,
) -> None:
    begin(plan(old_run), old_run)
    foreign = make_checkpoint(old_run.checkpoints, 90)
    change_manifest(foreign, run_id=OTHER_RUN)
    start = begin(plan(old_run), old_run)
    assert start.checkpoint == old_run.checkpoints / name(30)
    assert start.obsolete == {name(90): f"it is of another run, {OTHER_RUN}"}
    assert verify_checkpoint(old_run.set_aside / name(90)).run_id == OTHER_RUN
    assert steps(old_run.checkpoints) == [10, 20, 30]


@pytest.mark.parametrize("is_noted", [True, False])
def test_best_and_a_step_are_those_of_the_run_that_latest_goes_on_with(
    old_run: RunPaths, is_noted: bool
) -> None:
    if is_noted:
        begin(plan(old_run), old_run)
    own = old_run.checkpoints / "checkpoint-epoch0-step20-files7"
    (old_run.checkpoints / name(20)).rename(own)
    for step in (5, 20):  # better, and one of them at the same step
        foreign = make_checkpoint(
            old_run.checkpoints, step, validation_metrics={"validation_loss": 0.1}
        )
        change_manifest(foreign, run_id=OTHER_RUN)
    for resume in ("best", "20"):
        assert [one.path for one in plan(old_run, resume).candidates] == [own]
    with pytest.raises(UsageError, match="There is no checkpoint '5'"):
        plan(old_run, "5")
    assert plan(old_run, name(5)).identity == RunIdentity(OTHER_RUN)
    by_path = plan(old_run, str(old_run.checkpoints / name(20)))
    assert by_path.identity == RunIdentity(OTHER_RUN)


def test_the_best_of_another_run_in_the_bucket_is_passed_over(
    old_run: RunPaths, bucket: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    for step, loss in ((20, 0.1), (40, 0.2)):
        path = make_checkpoint(foreign, step, validation_metrics={"validation_loss": loss})
        change_manifest(path, run_id=OTHER_RUN)
    (foreign / name(20)).rename(foreign / "checkpoint-epoch0-step20-files7")
    upload_all(foreign, bucket)
    (old_run.checkpoints / name(20)).rename(tmp_path / "gone")
    for resume in ("20", name(20)):
        (found,) = plan(old_run, resume, bucket_uri=str(bucket)).candidates
        assert (str(found.name), found.path) == (name(20), None)
    assert plan(old_run, "best", bucket_uri=str(bucket)).step == 30  # what is here comes first
    with pytest.raises(UsageError, match="There is no checkpoint '40'"):
        plan(old_run, "40", bucket_uri=str(bucket))
    assert plan(old_run, name(40), bucket_uri=str(bucket)).identity == RunIdentity(OTHER_RUN)


# From the bucket.


@pytest.fixture
def bucket(old_run: RunPaths, tmp_path: Path) -> Path:
    """The bucket of `old_run`, whose checkpoints are all in it."""
    upload_all(old_run.checkpoints, tmp_path / "bucket")
    return tmp_path / "bucket"


@pytest.fixture
def empty(tmp_path: Path) -> RunPaths:
    """A machine that has nothing."""
    return RunPaths(tmp_path / "new", tmp_path / "logs", tmp_path / "cache")


@pytest.mark.parametrize(
    ("resume", "step"),
    [
        ("latest", 30),
        ("best", 20),
        (name(20), 20),
        ("BUCKET/latest", 30),
        (f"BUCKET/Checkpoints/{name(20)}.tar.gz", 20),
        ("BUCKET/best", 20),
        ("BUCKET/10", 10),
    ],
)
def test_a_machine_that_has_nothing_resumes_from_the_bucket(
    empty: RunPaths, bucket: Path, resume: str, step: int
) -> None:
    planned = plan(empty, resume.replace("BUCKET", str(bucket)), bucket_uri=str(bucket))
    assert not empty.checkpoints.exists()  # a plan downloads nothing
    assert planned.step == step
    start = begin(planned, empty)
    assert start.checkpoint == empty.checkpoints / name(step)
    assert verify_checkpoint(start.checkpoint).run_id == RUN_ID
    # One that was named and is not the newest of the run begins a branch.
    is_latest = resume.endswith("latest")
    assert start.identity == (
        RunIdentity(RUN_ID) if is_latest else RunIdentity(RUN_ID, 1, ((0, 0), (1, step)))
    )
    assert steps(empty.checkpoints) == [step]
    # What came from the bucket is not owed to it.
    assert Journal(empty.journal).latest()[name(step)].state is UploadState.VERIFIED


@pytest.mark.parametrize("resume", ["latest", "best", "20", None])
def test_a_plan_lists_the_bucket_once(
    old_run: RunPaths, bucket: Path, resume: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def open_bucket(uri: str, *_: object) -> Any:
        opened.append(uri)
        return DirectoryBucket(Path(uri))

    monkeypatch.setattr("utils.start.resume.open_bucket", open_bucket)
    planned = plan(old_run, resume, bucket_uri=str(bucket))
    assert {identity.run_id for identity in planned.in_bucket} == {RUN_ID}
    assert opened == [str(bucket)]


def test_what_is_here_comes_before_what_is_there(old_run: RunPaths, bucket: Path) -> None:
    planned = plan(old_run, bucket_uri=str(bucket))
    assert [(one.name.step, one.path is not None) for one in planned.candidates] == [
        (30, True),
        (30, False),
        (20, True),
        (20, False),
        (10, True),
        (10, False),
    ]


def test_the_bucket_is_nearer_than_the_next_one_here(old_run: RunPaths, bucket: Path) -> None:
    (old_run.checkpoints / name(20)).rename(bucket / "gone")
    (old_run.checkpoints / name(30)).rename(bucket / "gone too")
    damage(make_checkpoint(old_run.checkpoints, 40))
    start = begin(plan(old_run, bucket_uri=str(bucket)), old_run)
    assert start.checkpoint == old_run.checkpoints / name(30)


def test_a_name_that_another_run_has_here_is_freed_for_the_download(
    empty: RunPaths, bucket: Path
) -> None:
    foreign = make_checkpoint(empty.checkpoints, 30)
    change_manifest(foreign, run_id=OTHER_RUN)
    start = begin(plan(empty, f"{bucket}/latest"), empty)
    assert start.checkpoint == empty.checkpoints / name(30)
    assert verify_checkpoint(start.checkpoint).run_id == RUN_ID
    assert verify_checkpoint(empty.set_aside / name(30)).run_id == OTHER_RUN


@pytest.mark.parametrize("lost", ["archive", "sidecar", "hint"])
def test_an_incomplete_upload_is_passed_over(empty: RunPaths, bucket: Path, lost: str) -> None:
    folder = bucket / "Checkpoints"
    if lost == "archive":
        (folder / f"{name(30)}.tar.gz").write_bytes(b"cut")
    elif lost == "sidecar":
        (folder / f"{name(30)}.json").unlink()
    else:
        (folder / "latest").write_text("nonsense")
        (folder / "latest.json").write_text("nonsense")
    start = begin(plan(empty, bucket_uri=str(bucket)), empty)
    assert start.checkpoint == empty.checkpoints / name(30 if lost == "hint" else 20)


def test_a_bucket_of_several_runs_wants_a_name(empty: RunPaths, bucket: Path) -> None:
    sidecar = bucket / "Checkpoints" / f"{name(10)}.json"
    value = read_json(sidecar)
    value["manifest"]["run_id"] = OTHER_RUN
    write_json(sidecar, value)
    for which in ("latest", "best", "20"):
        for resume in (which, f"{bucket}/{which}"):
            with pytest.raises(UsageError, match=f"several runs .*{RUN_ID}, {OTHER_RUN}"):
                plan(empty, resume, bucket_uri=str(bucket))
    for resume in (name(20), f"{bucket}/{name(20)}"):
        assert plan(empty, resume, bucket_uri=str(bucket)).identity == RunIdentity(RUN_ID)


def test_a_bucket_that_is_down_does_not_stop_what_is_here(
    old_run: RunPaths, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Down(DirectoryBucket):
        def list(self, prefix: str = "") -> Any:
            raise TransientStorageError("503")

    monkeypatch.setattr("utils.start.resume.open_bucket", lambda uri, *_: Down(Path(uri)))
    planned = plan(old_run, bucket_uri="/down")
    assert planned.step == 30
    assert "cannot be listed" in caplog.text
    with pytest.raises(StorageError):
        plan(old_run, "gs://down/latest")
    # With nothing here it must not look like a run that has not begun.
    empty = RunPaths(Path("/nowhere"), old_run.logs, old_run.cache)
    with pytest.raises(StorageError):
        plan(empty, bucket_uri="/down")


@pytest.mark.parametrize("resume", ["40", name(40), "", "../checkpoints", "/nowhere", "a/b"])
def test_a_checkpoint_that_does_not_exist_is_refused(old_run: RunPaths, resume: str) -> None:
    with pytest.raises((UsageError, CheckpointError)) as caught:
        plan(old_run, resume)
    assert caught.value.exit_code is ExitCode.USAGE
    assert steps(old_run.checkpoints) == [10, 20, 30]


def test_an_unknown_checkpoint_is_answered_with_the_known_ones(
    old_run: RunPaths, bucket: Path
) -> None:
    with pytest.raises(UsageError, match=rf"no checkpoint '40'.*{name(10)}, {name(20)}"):
        plan(old_run, "40")
    with pytest.raises(UsageError, match=rf"no checkpoint '40'.*{name(10)}, {name(20)}"):
        plan(old_run, f"{bucket}/40")


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error_and_stays(old_run: RunPaths) -> None:
    damage(old_run.checkpoints / name(20))
    with pytest.raises(CheckpointError, match=rf"{name(20)}: model.safetensors"):
        begin(plan(old_run, name(20)), old_run)
    assert steps(old_run.checkpoints) == [10, 20, 30]


def test_an_incomplete_checkpoint_cannot_be_asked_for(old_run: RunPaths) -> None:
    (old_run.checkpoints / name(30) / "manifest.json").unlink()
    with pytest.raises(UsageError, match="There is no checkpoint '30'"):
        plan(old_run, "30")
    assert plan(old_run).step == 20
