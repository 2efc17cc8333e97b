"""The witness of a campaign: what it lets pass, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.campaigns.stand_in_trainer import build_entries, build_files, loss_at, save_checkpoint
from tests.campaigns.upload_witness import JOURNAL_BYTES, Saved, UploadWitness
from utils.checkpoints.layout import CheckpointName

SIZES = ((10, 20),)
SEED = 1  # its best step is neither among the newest nor the oldest


def saved_at(step: int) -> Saved:
    return Saved(loss_at(SEED, step), build_entries(build_files(SEED, step, SIZES)))


def build_witness(directory: Path) -> UploadWitness:
    return UploadWitness(directory, dict, saved_at, keep_checkpoints=3, max_unverified=3)


def save(directory: Path, step: int) -> Path:
    return save_checkpoint(directory, "20260101-0a1b2c3d", step, build_files(SEED, step, SIZES))


def write_journal(directory: Path, *lines: tuple[int, str]) -> None:
    with (directory / "uploads.jsonl").open("a") as file:
        for step, state in lines:
            name = str(CheckpointName(step, 0, 0))
            file.write(json.dumps({"checkpoint": name, "state": state}) + "\n")


def best_of(steps: range) -> int:
    return min(steps, key=lambda step: loss_at(SEED, step))


STEPS = range(1, 11)
OLD = [step for step in STEPS[:-3] if step != best_of(STEPS)]


@pytest.mark.parametrize(
    ("verified", "given_up", "problem"),
    [
        ((), OLD[0], None),
        (OLD[3:], OLD[0], None),  # three of them wait: one may have begun since the decision
        (OLD[2:], OLD[0], "although only 2 waited"),
        ((), OLD[2], f"before checkpoint-epoch0-step{OLD[0]}-files0"),
        ((OLD[0],), OLD[0], "although it was verified"),
        ((), STEPS[-1], "although it was queued"),  # the newest
        ((), best_of(STEPS), "although it was queued"),
    ],
)
def test_giving_up_is_held_against_the_rule(
    verified: tuple[int, ...], given_up: int, problem: str | None, tmp_path: Path
) -> None:
    assert best_of(STEPS) in STEPS[:-3]
    write_journal(tmp_path, *((step, "queued") for step in STEPS))
    write_journal(tmp_path, *((step, "verified") for step in verified), (given_up, "superseded"))
    wrong = [text for kind, text in build_witness(tmp_path).look() if "given up" in text]
    assert bool(wrong) == bool(problem), wrong
    if problem:
        assert problem in wrong[0]


def test_a_line_counts_once_also_after_a_compaction(tmp_path: Path) -> None:
    witness = build_witness(tmp_path)
    write_journal(tmp_path, (1, "queued"), (1, "failed"))
    witness.look()
    (tmp_path / "uploads.jsonl").write_bytes(
        (tmp_path / "uploads.jsonl").read_bytes().splitlines(keepends=True)[1] + b'{"torn'
    )
    write_journal(tmp_path)
    witness.look()
    assert sum(witness.lines.values()) == 2


def test_a_changed_file_here_is_found(tmp_path: Path) -> None:
    witness = build_witness(tmp_path)
    save(tmp_path, 1)
    assert witness.look() == []
    other = save_checkpoint(tmp_path, "20260101-0a1b2c3d", 2, build_files(SEED + 1, 2, SIZES))
    assert ("corrupt", f"{other.name} on the disk is not what was saved.") in witness.look()
    (other / "model.safetensors").write_bytes(b"x")
    assert any(kind == "corrupt" and "model.safetensors" in text for kind, text in witness.look())


def test_the_end_asks_for_more(tmp_path: Path) -> None:
    witness = build_witness(tmp_path)
    name = save(tmp_path, 1).name
    (tmp_path / ".saving-x").mkdir()
    (tmp_path / "uploads.jsonl").write_bytes(b"\n" * (JOURNAL_BYTES * 2))
    assert witness.look() == []
    wrong = witness.look_at_the_end()
    assert [kind for kind, _ in wrong] == ["unverified", "unverified", "leftover", "growth"]
    assert ("unverified", f"{name} is on the disk, and unknown at the end.") in wrong
    assert ("leftover", ".saving-x is left beside the checkpoints.") in wrong
