"""The checkpoint directory: what is complete is right, what is not is out of the way, one owner."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.training_config import TrainingConfig
from tests.sample_checkpoints import RUN_ID, change_manifest, make_checkpoint
from tests.sample_shards import flip_bit
from tests.utils.uploads.waiting import started
from utils.base.errors import CheckpointError, ExitCode, LockedError
from utils.checkpoints import store
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import (
    RunPaths,
    find_checkpoints,
    local_archive,
    upload_lock,
)
from utils.checkpoints.store import (
    apply_retention,
    delete_checkpoint,
    hold_output_directory,
    hold_upload,
    remove_leftovers,
    set_aside,
    verify_checkpoint,
)


def name(step: int) -> str:
    return f"checkpoint-epoch0-step{step}-files0"


def steps(directory: Path) -> list[int]:
    return [found.step for found in find_checkpoints(directory)]


def append_space(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def replace_by_link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda c: os.truncate(c / "model.safetensors", 5), "has 5 bytes, its manifest says"),
    "flipped": (lambda c: flip_bit(c / "model.safetensors"), "model.safetensors is damaged"),
    "longer": (lambda c: append_space(c / "metadata.json"), "metadata.json has"),
    "missing": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
    "link": (lambda c: replace_by_link(c / "model.safetensors"), "model.safetensors is missing"),
    "other step": (lambda c: change_manifest(c, step=51), "its manifest is of step 51"),
    "no files": (lambda c: change_manifest(c, files={}), "names no files"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "is incomplete"),
    "broken manifest": (lambda c: os.truncate(c / "manifest.json", 20), "cannot be read"),
    "infinite manifest": (
        lambda c: (c / "manifest.json").write_text('{"format": 1, "step": 1e999, "files": {}}'),
        "not a usable manifest",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_named(tmp_path: Path, case: str) -> None:
    checkpoint = make_checkpoint(tmp_path, 50)
    assert verify_checkpoint(checkpoint).step == 50
    damage, message = DAMAGE[case]
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify_checkpoint(checkpoint)
    assert name(50) in str(caught.value)


def test_set_aside_loses_nothing_although_the_name_is_taken(tmp_path: Path) -> None:
    kept = []
    for _ in range(3):
        kept.append(set_aside(make_checkpoint(tmp_path, 50), tmp_path).name)
    assert kept == [name(50), f"{name(50)}.2", f"{name(50)}.3"]
    for folder in kept:
        verify_checkpoint(tmp_path / "set-aside" / folder)


# What crashes leave.


def test_what_a_crash_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 50)
    make_checkpoint(tmp_path, 60).rename(tmp_path / f".saving-{name(60)}")
    (tmp_path / f".saving-deleted-{name(10)}").mkdir()
    (tmp_path / f".saving-{name(50)}.tar.gz").write_bytes(b"half an archive")
    (tmp_path / f"{name(40)}.tar.gz").write_bytes(b"fetched by hand")
    incomplete = make_checkpoint(tmp_path, 70)
    (incomplete / "manifest.json").unlink()
    others = ["uploads.jsonl", ".lock", "notes.txt", "mine.tar.gz", "set-aside/x"]
    for other in others:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("kept")

    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        checkpoint.name,
        f"{name(40)}.tar.gz",
        "uploads.jsonl",
        ".lock",
        "notes.txt",
        "mine.tar.gz",
        "set-aside",
    }
    verify_checkpoint(checkpoint)
    assert {path.name for path in (tmp_path / "set-aside").iterdir()} == {"x", name(70)}
    remove_leftovers(tmp_path / "none")


class Crash(BaseException):
    """The process ends here."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> list[str]:
    """Let the process end before its n-th change of the file system; return what it changed."""
    done: list[str] = []

    def wrap(function: str) -> None:
        original = getattr(os, function)

        def changed(path: object, *args: object, **kwargs: object) -> object:
            if len(done) == call:
                raise Crash
            done.append(f"{function} {Path(str(path)).name}")
            return original(path, *args, **kwargs)

        monkeypatch.setattr(os, function, changed)

    for function in ("unlink", "rename", "rmdir"):
        wrap(function)
    return done


def test_a_deletion_that_ends_anywhere_never_leaves_a_half_that_looks_whole(
    tmp_path: Path,
) -> None:
    outcomes = []
    for call in range(30):
        directory = tmp_path / str(call)
        kept = make_checkpoint(directory, 40)
        checkpoint = make_checkpoint(directory, 50)
        with pytest.MonkeyPatch.context() as monkeypatch:
            done = crash_at(monkeypatch, call)
            try:
                delete_checkpoint(checkpoint)
            except Crash:
                outcomes.append("crash")
            else:
                outcomes.append("done")
        if done:
            assert done[0] == f"rename {name(50)}"
        # What is found is whole; what is not goes out of the way, and the name is free again.
        for step in steps(directory):
            verify_checkpoint(directory / name(step))
        remove_leftovers(directory)
        expected = [40, 50] if call == 0 else [40]
        assert steps(directory) == expected
        assert not [p for p in directory.iterdir() if p.name.startswith(".saving-")]
        if call:
            make_checkpoint(directory, 50)
        verify_checkpoint(kept)
    assert outcomes.index("done") == outcomes.count("crash") >= 8


def test_a_name_that_goes_is_synced_before_anything_is_removed(
    tmp_path: Path, disk_calls: list[str]
) -> None:
    doomed, bad = make_checkpoint(tmp_path, 40), make_checkpoint(tmp_path, 50)
    disk_calls.clear()
    delete_checkpoint(doomed)
    renamed, synced, *removed = disk_calls
    assert (renamed, synced) == (f"rename {doomed.name}", f"fsync {tmp_path.name}")
    assert {call.split()[0] for call in removed} == {"unlink"}
    disk_calls.clear()
    aside = set_aside(bad, tmp_path)
    assert disk_calls == [
        f"rename {bad.name}",
        f"fsync {aside.parent.name}",
        f"fsync {tmp_path.name}",
    ]


def test_a_link_is_deleted_and_what_it_points_to_stays(tmp_path: Path) -> None:
    elsewhere = make_checkpoint(tmp_path / "elsewhere", 50)
    (tmp_path / "here").mkdir()
    link = tmp_path / "here" / elsewhere.name
    link.symlink_to(elsewhere)
    delete_checkpoint(link)
    assert list((tmp_path / "here").iterdir()) == []
    verify_checkpoint(elsewhere)


# One owner.

HOLDER = """
import sys
from pathlib import Path
from utils.checkpoints.store import hold_output_directory
from utils.checkpoints.layout import RunPaths
directory = Path(sys.argv[1])
with hold_output_directory(RunPaths(directory, directory, directory)):
    print("held", flush=True)
    sys.stdin.read()
"""


def paths_in(directory: Path) -> RunPaths:
    return RunPaths(directory, directory, directory)


def test_a_directory_that_a_live_process_holds_is_refused_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "OUTPUT_LOCK_SECONDS", 0.0)
    paths = paths_in(tmp_path / "checkpoints")
    with started(HOLDER, paths.checkpoints) as (holder, line):
        assert line == "held\n"
        with (
            pytest.raises(LockedError, match=rf"in use by .*process {holder.pid} on ") as caught,
            hold_output_directory(paths),
        ):
            pytest.fail("two trainers hold one directory")
        assert str(paths.checkpoints) in str(caught.value)
        assert "run_name" in str(caught.value)
        assert caught.value.exit_code is ExitCode.USAGE
        holder.kill()
        holder.wait()
    monkeypatch.setattr(store, "OUTPUT_LOCK_SECONDS", 60.0)
    # The kernel has let go: a killed trainer needs no cleaning up.
    with hold_output_directory(paths):
        pass


def test_a_directory_is_free_again_after_an_error(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    with pytest.raises(RuntimeError), hold_output_directory(paths):
        raise RuntimeError
    with hold_output_directory(paths):
        pass


# Retention on disk.


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "uploads.jsonl")


def retain(directory: Path, journal: Journal, max_unverified: int = 2) -> list[str]:
    config = TrainingConfig(keep_checkpoints=1, max_unverified=max_unverified)
    return apply_retention(directory, journal, config, run_id=RUN_ID, is_uploading_on=True)


def test_verified_checkpoints_go_and_the_rest_waits(tmp_path: Path, journal: Journal) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.0, 50: 2.0}
    for step, loss in losses.items():
        make_checkpoint(
            tmp_path, step, validation_metrics={"validation_loss": loss}, current_loss=loss
        )
    for step in (10, 20, 40):
        journal.record(name(step), RUN_ID, UploadState.VERIFIED)
    assert retain(tmp_path, journal) == [name(10), name(40)]
    assert steps(tmp_path) == [20, 30, 50]  # the best, the unverified, the newest


def test_a_dead_bucket_cannot_fill_the_disk(tmp_path: Path, journal: Journal) -> None:
    for step in range(10, 70, 10):
        make_checkpoint(tmp_path, step, validation_metrics={"validation_loss": 1.0 / step})
        journal.record(name(step), RUN_ID, UploadState.FAILED, error="503")
    journal.record(name(10), RUN_ID, UploadState.UPLOADING)
    assert retain(tmp_path, journal) == [name(20), name(30)]
    assert steps(tmp_path) == [10, 40, 50, 60]
    latest = journal.latest()
    assert [latest[name(step)].state for step in (20, 30)] == [UploadState.SUPERSEDED] * 2
    assert latest[name(40)].state is UploadState.FAILED


def test_checkpoints_of_another_run_are_never_deleted(tmp_path: Path, journal: Journal) -> None:
    for step in range(10, 60, 10):
        make_checkpoint(tmp_path, step)
        journal.record(name(step), RUN_ID, UploadState.VERIFIED)
    for step in (20, 500):
        foreign = tmp_path / name(step) if step == 20 else make_checkpoint(tmp_path, step)
        change_manifest(foreign, run_id="20250101-ffffffff")
    retain(tmp_path, journal)
    assert steps(tmp_path) == [20, 50, 500]


def test_what_is_uploaded_at_this_moment_is_not_given_up(tmp_path: Path, journal: Journal) -> None:
    paths = [make_checkpoint(tmp_path, step) for step in (10, 20, 30, 40)]
    for path in paths[:2]:  # the best is the newest
        (path / "metadata.json").write_text("{}", "utf-8")
    with hold_upload(paths[0]) as is_alone:
        assert is_alone
        with hold_upload(paths[0]) as is_second:
            assert not is_second
        deleted = retain(tmp_path, journal, max_unverified=1)
    assert paths[0].name not in deleted
    assert paths[0].is_dir()
    assert paths[1].name in deleted
    assert paths[0].name not in journal.latest()
    assert not list(tmp_path.glob(".uploading-*"))


def test_what_was_verified_while_another_was_deleted_is_not_given_up(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30, 40, 50):
        make_checkpoint(tmp_path, step, validation_metrics={"validation_loss": 1.0 / step})

    def delete(checkpoint: Path) -> None:
        delete_checkpoint(checkpoint)
        journal.record(name(20), RUN_ID, UploadState.VERIFIED)  # by another process

    monkeypatch.setattr(store, "delete_checkpoint", delete)
    assert retain(tmp_path, journal) == [name(10)]
    assert journal.latest()[name(20)].state is UploadState.VERIFIED
    assert retain(tmp_path, journal) == [name(20)]
    assert journal.latest()[name(20)].state is UploadState.VERIFIED
    assert steps(tmp_path) == [30, 40, 50]


def test_the_archive_of_an_upload_that_goes_on_is_no_leftover(tmp_path: Path) -> None:
    used, left = (make_checkpoint(tmp_path, step) for step in (10, 20))
    for path in (used, left):
        local_archive(path).write_bytes(b"archive")
    with hold_upload(used):
        remove_leftovers(tmp_path)
        assert local_archive(used).exists()
        assert upload_lock(used).exists()
    assert not local_archive(left).exists()
    remove_leftovers(tmp_path)
    assert not local_archive(used).exists()


def test_what_was_removed_from_the_bucket_on_purpose_takes_no_place_of_those_that_wait(
    tmp_path: Path, journal: Journal
) -> None:
    paths = [make_checkpoint(tmp_path, step) for step in (10, 20, 30, 40, 50)]
    for path in paths[:2]:
        journal.record(path.name, RUN_ID, UploadState.REMOVED)
    assert retain(tmp_path, journal, max_unverified=3) == [path.name for path in paths[:2]]
