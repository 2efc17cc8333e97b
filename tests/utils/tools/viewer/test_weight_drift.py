"""How far weights moved: figures by hand, every format and type, and what must not be loaded."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.sample_checkpoints import seal
from utils.base.errors import CheckpointError
from utils.models.parts import Part, WholeFile, part_file, part_header
from utils.tools.viewer import weight_drift
from utils.tools.viewer.weight_drift import WEIGHT_FILES, measure_drift

SAFE, PICKLE = WEIGHT_FILES


def write(folder: Path, step: int, tensors: Any, file: str = SAFE) -> Path:
    path = folder / f"checkpoint-epoch0-step{step}-files0"
    path.mkdir(parents=True)
    if file == SAFE:
        save_file(tensors, path / SAFE)
    else:
        torch.save(tensors, path / PICKLE)
    seal(path, step)
    return path


def measure(folder: Path, older: Any, newer: Any, file: str = SAFE) -> dict[str, Any]:
    return measure_drift(write(folder, 1, older, file), write(folder, 2, newer, file))


@pytest.mark.parametrize("file", WEIGHT_FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_change_and_cosine(tmp_path: Path, file: str, dtype: torch.dtype) -> None:
    older = {"l.0.w": torch.tensor([3.0, 4.0], dtype=dtype), "l.0.b": torch.zeros(3, dtype=dtype)}
    newer = {"l.0.w": torch.tensor([-4.0, 3.0], dtype=dtype), "l.0.b": torch.zeros(3, dtype=dtype)}
    report = measure(tmp_path, older, newer, file)
    layer = report["layers"]["l.0"]
    assert (layer["num_tensors"], layer["num_elements"]) == (2, 5)
    assert (layer["older_norm"], layer["norm"]) == (5, 5)
    assert layer["change"] == pytest.approx(math.sqrt(2))
    assert layer["cosine"] == 0
    assert report["total"] == layer
    assert report["problems"] == []


def test_weights_in_parts_are_compared_with_whole_ones(tmp_path: Path) -> None:
    older = {"l.0.w": torch.arange(10.0).view(5, 2), "l.0.b": torch.ones(3)}
    newer = {name: tensor * 1.5 for name, tensor in older.items()}
    whole = measure(tmp_path / "whole", older, newer)
    path = tmp_path / "parts" / "checkpoint-epoch0-step2-files0"
    path.mkdir(parents=True)
    for part in (Part(0, 2), Part(1, 2)):
        rows = {
            name: t[slice(*part.rows_of(name, len(t)))].contiguous() for name, t in newer.items()
        }
        header = part_header({name: tuple(t.shape) for name, t in newer.items()}, part)
        save_file(rows, path / part_file("model", part), header)
    seal(path, 2)
    before = write(tmp_path / "one", 1, older)
    assert measure_drift(before, path) == whole
    damaged = path / part_file("model", Part(1, 2))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="part-00002-of-00002.safetensors is damaged"):
        measure_drift(before, path)
    damaged.unlink()
    seal(path, 2)
    with pytest.raises(CheckpointError, match="of 2 parts of model there are only"):
        measure_drift(before, path)


def test_small_steps_are_seen_and_blocks_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_drift, "BLOCK_ELEMENTS", 10)
    ones = {"w": torch.ones(44, dtype=torch.float64)}
    total = measure(tmp_path / "small", ones, {"w": ones["w"] + 1e-12})["total"]
    assert total["change"] == pytest.approx(1e-12, rel=1e-3, abs=0)
    generator = torch.Generator().manual_seed(0)
    older = {"l.1.w": torch.randn(37, 11, generator=generator)}
    newer = {"l.1.w": -older["l.1.w"] + 0.1 * torch.randn(37, 11, generator=generator)}
    found = measure(tmp_path / "random", older, newer)["total"]
    left, right = (tensors["l.1.w"].double().flatten() for tensors in (older, newer))
    assert found["norm"] == pytest.approx(float(right.norm()))
    assert found["change"] == pytest.approx(float((right - left).norm() / left.norm()))
    cosine = torch.nn.functional.cosine_similarity(left, right, dim=0)
    assert found["cosine"] == pytest.approx(float(cosine))


def test_what_is_not_finite_is_counted_and_left_out(tmp_path: Path) -> None:
    older = {"l.0.w": torch.tensor([1.0, math.nan, 2.0, 5.0])}
    newer = {"l.0.w": torch.tensor([1.0, 1.0, math.inf, math.nan])}
    total = measure(tmp_path, older, newer)["total"]
    assert (total["older_nan"], total["nan"]) == (1, 2)
    assert (total["norm"], total["change"], total["cosine"]) == (1, 0, 1)


def test_layers_are_named_and_sorted_and_what_has_no_ratio_is_none(tmp_path: Path) -> None:
    names = ("gpt.layers.10.attention.w", "gpt.layers.2.mlp.experts.7.w", "gpt.embed_in.weight")
    tensors = {name: torch.ones(2) for name in names}
    tensors |= {"z.w": torch.zeros(3), "e.w": torch.zeros(0), "c": torch.tensor(2.0)}
    layers = measure(tmp_path, tensors, tensors)["layers"]
    assert list(layers) == ["c", "e", "gpt.embed_in", "gpt.layers.2", "gpt.layers.10", "z"]
    assert (layers["z"]["change"], layers["z"]["cosine"]) == (None, None)
    assert layers["e"]["num_elements"] == 0
    assert layers["c"]["norm"] == 2


def test_other_shapes_and_missing_tensors_are_named_whatever_the_formats(tmp_path: Path) -> None:
    older = {"l.2.w": torch.ones(2), "l.10.w": torch.ones(2), "old": torch.ones(1)}
    newer = {"l.2.w": torch.ones(3), "l.10.w": torch.ones(2), "new": torch.ones(1), "step": 7}
    report = measure_drift(write(tmp_path, 1, older), write(tmp_path, 2, newer, PICKLE))
    assert list(report["layers"]) == ["l.10"]
    assert report["problems"] == [
        "l.2.w has different shapes: [2] and [3]",
        "old is only in checkpoint-epoch0-step1-files0",
        "new is only in checkpoint-epoch0-step2-files0",
    ]


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("owned"),))


@pytest.mark.parametrize(
    "value", [{"w": Evil()}, [1, 2], torch.ones(2), {"w": torch.zeros(1).expand(10**12)}]
)
def test_a_pickle_that_holds_no_plain_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin cannot be read"):
        measure(tmp_path, value, {"w": torch.ones(1)}, PICKLE)
    assert not Path("owned").exists()


@pytest.mark.parametrize("file", WEIGHT_FILES)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("cut", "its manifest says"),
        ("flipped", "is damaged"),
        ("link", "is missing"),
        ("pipe", "is missing"),
        ("foreign", "cannot be read"),
    ],
)
def test_only_intact_files_are_loaded(tmp_path: Path, file: str, damage: str, reason: str) -> None:
    older, newer = (write(tmp_path, step, {"w": torch.ones(9)}, file) for step in (1, 2))
    path = newer / file
    data = path.read_bytes()
    path.unlink()
    if damage == "link":
        path.symlink_to(older / file)
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "foreign":  # sealed, it is what the manifest says, and still no weights
        path.write_bytes(pickle.dumps([Evil()]))
        seal(newer, 2)
    else:
        path.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(CheckpointError, match=f"step2-files0: {file} .*{reason}"):
        measure_drift(older, newer)


def test_a_checkpoint_without_weights_says_so(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-epoch0-step1-files0"
    path.mkdir()
    (path / "config.json").write_text("{}")
    seal(path, 1)
    with pytest.raises(CheckpointError, match="has no weights"):
        measure_drift(path, path)


def test_memory_holds_one_tensor_of_each_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    read, sums_of = WholeFile.read, weight_drift._sums_of
    monkeypatch.setattr(WholeFile, "read", lambda self, name: done.append(name) or read(self, name))
    monkeypatch.setattr(
        weight_drift, "_sums_of", lambda *pair: done.append("sums") or sums_of(*pair)
    )
    tensors = {name: torch.ones(2) for name in ("a", "b")}
    measure(tmp_path, tensors, tensors)
    assert done == ["a", "a", "sums", "b", "b", "sums"]
