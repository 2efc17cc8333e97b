"""A snapshot is the state at its moment, in memory that is reused and that a process shares."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from utils.checkpoints.snapshot import HostBlock, Snapshot, TensorSlot, map_leaves

CPU = torch.device("cpu")


def make_tree() -> dict[str, Any]:
    weights = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "weights": weights,
        "tied": weights,
        "part": [weights[1:], weights.t()],
        "square": [weights[:, :3], weights[:, :3].t()],  # one place and shape, another order
        "counts": (torch.tensor(7), torch.tensor([True, False])),
        "half": torch.full((5,), 1.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "text": "unchanged",
    }


def read(block: HostBlock, slotted: Any) -> Any:
    return map_leaves(slotted, TensorSlot, block.tensor)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected)
        for left, right in zip(found, expected, strict=True):
            assert_same(left, right)
    else:
        assert found == expected


@pytest.fixture(params=["memory", "file"])
def block(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    size = Snapshot.size_of(make_tree())
    block = HostBlock.allocate(size, tmp_path if request.param == "file" else None)
    assert block.kind == request.param
    yield block
    block.close()


def test_a_snapshot_stays_when_the_state_moves_on(block: HostBlock, tmp_path: Path) -> None:
    tree = make_tree()
    snapshot = Snapshot(block, CPU)
    slotted = snapshot.stage(tree)
    snapshot.fence()
    tree["weights"].zero_()
    tree["half"].zero_()
    snapshot.wait()
    assert_same(read(block, slotted), make_tree())
    assert list(tmp_path.iterdir()) == []  # a file has no name: no crash leaves one


def test_tied_tensors_are_copied_once_and_stay_tied(block: HostBlock) -> None:
    slotted = Snapshot(block, CPU).stage(make_tree())
    assert slotted["weights"] is slotted["tied"]
    assert slotted["part"][0] != slotted["weights"]


def test_each_tensor_brings_its_own_bytes_alone(block: HostBlock) -> None:
    """torch.save writes the whole storage behind a tensor."""
    slotted = Snapshot(block, CPU).stage(make_tree())
    for slot in (slotted["weights"], slotted["part"][0], slotted["half"]):
        tensor = block.tensor(slot)
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_too_small_a_block_is_refused_before_anything_is_copied() -> None:
    block = HostBlock.allocate(1)
    assert block.size == mmap.PAGESIZE
    block.warm()
    with pytest.raises(ValueError, match="does not fit"):
        Snapshot(block, CPU).stage({"big": torch.ones(mmap.PAGESIZE)})
    assert not block.tensor(TensorSlot(torch.uint8, (mmap.PAGESIZE,), 0)).any()
    block.close()


def test_a_file_stands_in_where_memory_cannot_be_shared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str, flags: int = 0) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    caplog.set_level("INFO")
    block = HostBlock.allocate(100_000)
    assert block.kind == "file"
    assert "using a file for snapshots" in caplog.text
    slotted = Snapshot(block, CPU).stage(make_tree())
    assert_same(read(block, slotted), make_tree())
    block.close()


def test_closing_gives_descriptor_and_memory_back() -> None:
    process = psutil.Process()
    before = process.num_fds()
    for _ in range(20):
        block = HostBlock.allocate(4 * 2**20)
        block.warm()
        block.close()
    assert process.num_fds() == before
    maps = [entry.path for entry in process.memory_maps() if "memfd:snapshot" in entry.path]
    assert maps == []


@pytest.mark.gpu
def test_on_a_gpu_the_copy_is_fenced_before_the_state_changes() -> None:
    device = torch.device("cuda")
    tree = {"weights": torch.ones(64 * 2**20, device=device)}
    block = HostBlock.allocate(Snapshot.size_of(tree))
    block.pin()
    snapshot = Snapshot(block, device)
    for round_number in range(5):
        expected = float(tree["weights"][0].item())
        slotted = snapshot.stage(tree)
        snapshot.fence()
        tree["weights"] += 1
        snapshot.wait()
        found = block.tensor(slotted["weights"])
        assert found.is_pinned()
        assert bool((found == expected).all()), round_number
    block.close()
