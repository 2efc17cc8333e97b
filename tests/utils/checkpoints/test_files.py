"""Files past the page cache: the bytes of the libraries' own, whatever the file system allows."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from utils.base.files import pass_by_cache
from utils.checkpoints import files as checkpoint_files
from utils.checkpoints.files import CheckpointFiles, DurableFile, write_files
from utils.checkpoints.layout import CheckpointName, FileEntry, Manifest
from utils.checkpoints.store import verify_checkpoint
from utils.storage.bucket import crc32c_of_bytes

BLOCK = 4096


class Disk(io.FileIO):
    """Takes at most `most` bytes at once; `refuses` them where they are to go past the cache."""

    refuses, most = False, BLOCK

    def write(self, data: Any) -> int:
        is_direct = bool(fcntl.fcntl(self, fcntl.F_GETFL) & os.O_DIRECT)
        if is_direct and (self.refuses or len(data) % BLOCK):
            raise OSError(errno.EINVAL, "Invalid argument")
        self.writes = [*getattr(self, "writes", []), (len(data), is_direct)]
        return super().write(data[: self.most])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "DIRECT_BLOCK_BYTES", BLOCK)


@pytest.mark.parametrize("disk", ["whole", "refuses the flag", "refuses writes", "short writes"])
@pytest.mark.parametrize("size", [0, 5, 2 * BLOCK, 2 * BLOCK + 5])
def test_whole_blocks_go_past_the_cache_where_they_can_and_all_bytes_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, size: int
) -> None:
    data = bytes(number % 251 for number in range(size))
    with Disk(tmp_path / "file", "wb") as raw:
        raw.refuses = disk == "refuses writes"
        raw.most = 1000 if disk == "short writes" else BLOCK
        can_pass = pass_by_cache(raw)
        if disk == "refuses the flag":
            monkeypatch.setattr(fcntl, "fcntl", _refusing(fcntl.fcntl))
        file = DurableFile(raw)
        for start in range(0, size, 3000):
            assert file.write(memoryview(data)[start : start + 3000]) == len(data[start:][:3000])
        assert file.finish() == FileEntry(size, crc32c_of_bytes(data))
        if disk == "whole":
            blocks = [(BLOCK, can_pass)] * (size // BLOCK)
            assert getattr(raw, "writes", []) == blocks + [(5, False)] * (size % BLOCK == 5)
    assert (tmp_path / "file").read_bytes() == data


def _refusing(real: Any) -> Any:
    def call(file: Any, command: int, argument: int = 0) -> Any:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, command, argument)

    return call


def test_a_checkpoint_has_the_bytes_that_the_libraries_write(tmp_path: Path) -> None:
    weights = {
        "layer.weight": torch.randn(100, 33),
        "layer.bias": torch.randn(7),
        "half \u00e9": torch.randn(2049).to(torch.bfloat16),
        "ids": torch.arange(9),
        "mask": torch.ones(3, dtype=torch.bool),
        "step": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
    }
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.randn(5000)}}, "lr": 0.5}
    files = CheckpointFiles(
        CheckpointName(1, 0, 0),
        Manifest("20260101-0a1b2c3d", 1, 0, 1),
        weights={"model.safetensors": weights, "part.safetensors": {"a": torch.randn(3)}},
        pickles={"optimizer.bin": optimizer},
        documents={"metadata.json": {"name": "\u00e9"}},
        raw={"config.json": b"{}", "nothing": b""},
        headers={"part.safetensors": {"rows": "0-3"}},
    )
    written = tmp_path / "checkpoint-epoch0-step1-files0"
    assert write_files(files, written) == verify_checkpoint(written)
    for name, tensors in files.weights.items():
        save_file(tensors, tmp_path / name, files.headers.get(name, {"format": "pt"}))
        assert (written / name).read_bytes() == (tmp_path / name).read_bytes()
    stream = io.BytesIO()
    torch.save(optimizer, stream)
    assert (written / "optimizer.bin").read_bytes() == stream.getvalue()
