"""A checkpoint that several savers write together: whole, or not there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from utils.checkpoints import saver as checkpoint_saver
from utils.checkpoints.files import CheckpointFiles
from utils.checkpoints.layout import CheckpointName, Manifest, find_checkpoints, read_manifest
from utils.checkpoints.saver import CheckpointSaver, Rendezvous
from utils.checkpoints.store import remove_leftovers, verify_checkpoint

CPU = torch.device("cpu")
PLENTY = 2**40
TOKEN = "0a1b2c3d"
PATIENCE_SECONDS = 300.0  # to end a test that hangs


def part_of(rank: int, step: int, value: float) -> CheckpointFiles:
    """Return what a rank writes; rank 0 also what belongs to no rank."""
    file = f"model-part-{rank}.safetensors"
    return CheckpointFiles(
        CheckpointName(step, 0, 0),
        Manifest("20260101-0a1b2c3d", step, 0, 2),
        weights={file: {"rows": torch.full((500,), value + rank)}},
        raw={"config.json": b"{}"} if rank == 0 else {},
        headers={file: {"rank": str(rank)}},
        is_part=True,
    )


@dataclass
class Ranks:
    """Two savers in one process, which meet as those of two ranks do."""

    savers: list[CheckpointSaver]
    committed: list[str]

    def save(self, step: int, value: float) -> None:
        parts = [part_of(rank, step, value) for rank in range(2)]
        for saver, part in zip(self.savers, parts, strict=True):
            saver.save(part, PLENTY)
        for saver, part in zip(self.savers, parts, strict=True):
            saver.fence()
            (tensors,) = part.weights.values()
            tensors["rows"].fill_(-1)  # training goes on
        for saver in self.savers:
            assert saver.wait(PATIENCE_SECONDS)


def gathers(count: int) -> list[Callable[[Any], list[Any] | None]]:
    barrier, brought = threading.Barrier(count, timeout=PATIENCE_SECONDS), {}

    def gather(rank: int, answer: Any) -> list[Any] | None:
        brought[rank] = answer
        barrier.wait()
        found = [brought[number] for number in range(count)]
        barrier.wait()
        return found if rank == 0 else None

    return [lambda answer, rank=rank: gather(rank, answer) for rank in range(count)]  # type: ignore[misc]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    committed: list[str] = []
    savers = [
        CheckpointSaver(
            tmp_path / "checkpoints",
            CPU,
            lambda checkpoint: committed.append(checkpoint.name),
            rendezvous=Rendezvous(TOKEN, gather),
        )
        for gather in gathers(2)
    ]
    for saver in savers:
        saver.prepare(10_000, PLENTY)
    yield Ranks(savers, committed)
    for saver in savers:
        saver.close()


def test_all_parts_and_then_the_manifest(ranks: Ranks, tmp_path: Path) -> None:
    for step in (1, 2):
        ranks.save(step, step / 2)
    assert [saver.failure for saver in ranks.savers] == [None, None]
    folder = tmp_path / "checkpoints"
    assert [str(name) for name in find_checkpoints(folder)] == ranks.committed
    assert len(ranks.committed) == 2  # by the main rank alone
    for number, name in enumerate(ranks.committed, 1):
        manifest = verify_checkpoint(folder / name)
        assert manifest.world_size == 2
        assert sorted(manifest.files) == [
            "config.json",
            "model-part-0.safetensors",
            "model-part-1.safetensors",
        ]
        for rank in range(2):
            rows = load_file(folder / name / f"model-part-{rank}.safetensors")["rows"]
            assert set(rows.tolist()) == {number / 2 + rank}
    assert sorted(path.name for path in folder.iterdir()) == sorted(ranks.committed)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_part_that_cannot_be_written_is_no_checkpoint(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    write_files = checkpoint_saver.write_files

    def fail(files: CheckpointFiles, directory: Path) -> Manifest:
        if f"model-part-{broken}.safetensors" in files.weights and files.name.step == 2:
            raise OSError(28, "No space left on device")
        return write_files(files, directory)

    monkeypatch.setattr(checkpoint_saver, "write_files", fail)
    monkeypatch.setattr(checkpoint_saver.WriterProcess, "is_ready", lambda self: False)
    ranks.save(1, 1.0)
    ranks.save(2, 2.0)
    assert f"rank {broken}: No space left on device" in str(ranks.savers[0].failure)
    assert "Older checkpoints are intact" in str(ranks.savers[0].failure)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ranks.committed
    ranks.save(3, 3.0)
    assert ranks.savers[0].failure is None
    assert [name.step for name in find_checkpoints(tmp_path / "checkpoints")] == [1, 3]


def test_a_part_that_the_main_rank_does_not_see_is_no_checkpoint(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a disk of its own on each machine."""
    monkeypatch.setattr(checkpoint_saver, "VISIBLE_SECONDS", 0.1)
    ranks.savers[1]._directory = tmp_path / "elsewhere"
    ranks.save(1, 1.0)
    assert "model-part-1.safetensors, which another rank" in str(ranks.savers[0].failure)
    assert "all ranks need the same output_dir" in str(ranks.savers[0].failure)
    assert not find_checkpoints(tmp_path / "checkpoints")


def test_a_rank_that_has_gone_leaves_no_checkpoint(tmp_path: Path) -> None:
    def gather(answer: Manifest | str) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    saver = CheckpointSaver(tmp_path, CPU, pytest.fail, rendezvous=Rendezvous(TOKEN, gather))
    saver.save(part_of(0, 1, 1.0), PLENTY)
    saver.close()
    assert "Connection closed by peer" in str(saver.failure)
    assert not list(tmp_path.iterdir())


def test_a_writer_of_an_attempt_that_has_ended_writes_beside_and_is_cleaned_up(
    ranks: Ranks, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    late = CheckpointSaver(  # of rank 1, on a machine that was cut off
        folder,
        CPU,
        pytest.fail,
        background=False,
        rendezvous=Rendezvous("99999999", lambda answer: None),
    )
    gather = ranks.savers[1]._rendezvous.gather  # type: ignore[union-attr]

    def gather_late(answer: Manifest | str) -> Any:
        late.save(part_of(1, 1, 50.0), PLENTY)  # when this attempt's rank 1 has written
        return gather(answer)

    ranks.savers[1]._rendezvous = Rendezvous(TOKEN, gather_late)
    ranks.save(1, 1.0)
    late.close()
    (committed,) = find_checkpoints(folder)
    rows = load_file(folder / str(committed) / "model-part-1.safetensors")["rows"]
    assert set(rows.tolist()) == {2.0}
    remove_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == [str(committed)]
    assert read_manifest(folder / str(committed)).files
