"""How far weights moved: figures by hand, every format and type, and what must not be loaded."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from configs.training_config import PROJECT_DIRECTORY
from tests.sample_checkpoints import seal
from utils.base.errors import CheckpointError
from utils.checkpoints.layout import FileEntry
from utils.models.parts import Part, part_file, part_header
from utils.tools.viewer import weight_drift
from utils.tools.viewer.weight_drift import WEIGHT_FILES, layer_of, measure_drift

SAFE, PICKLE = WEIGHT_FILES


def write(folder: Path, step: int, tensors: Any, file: str = SAFE) -> tuple[Path, Any]:
    path = folder / f"checkpoint-epoch0-step{step}-files0"
    path.mkdir(parents=True)
    if file == SAFE:
        save_file(tensors, path / SAFE)
    else:
        torch.save(tensors, path / PICKLE)
    return path, seal(path, step)


def measure(folder: Path, older: Any, newer: Any, file: str = SAFE) -> dict[str, Any]:
    return measure_drift(*write(folder, 1, older, file), *write(folder, 2, newer, file)).to_json()


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("gpt_neox.layers.10.attention.dense.weight", "gpt_neox.layers.10"),
        ("model.layers.3.mlp.experts.7.w", "model.layers.3"),
        ("gpt_neox.embed_in.weight", "gpt_neox.embed_in"),
        ("bias", "bias"),
    ],
)
def test_tensors_belong_to_layers(tensor: str, layer: str) -> None:
    assert layer_of(tensor) == layer


@pytest.mark.parametrize("file", WEIGHT_FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
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
        rows = {name: t[slice(*part.rows(len(t)))].contiguous() for name, t in newer.items()}
        header = part_header({name: tuple(t.shape) for name, t in newer.items()}, part)
        save_file(rows, path / part_file("model", part), header)
    manifest = seal(path, 2)
    before = write(tmp_path / "one", 1, older)
    assert measure_drift(*before, path, manifest).to_json() == whole
    damaged = path / part_file("model", Part(1, 2))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="part-00002-of-00002.safetensors is not what its"):
        measure_drift(*before, path, manifest)
    del manifest.files[damaged.name]
    with pytest.raises(CheckpointError, match="of 2 parts of model there are only"):
        measure_drift(*before, path, manifest)


def test_small_steps_of_float64_are_seen(tmp_path: Path) -> None:
    older = {"w": torch.ones(4, dtype=torch.float64)}
    total = measure(tmp_path, older, {"w": older["w"] + 1e-12})["total"]
    assert total["change"] == pytest.approx(1e-12, rel=1e-3, abs=0)


def test_blocks_add_up_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    older = {"l.1.w": torch.randn(37, 11, generator=generator)}
    newer = {"l.1.w": older["l.1.w"] + 0.1 * torch.randn(37, 11, generator=generator)}
    monkeypatch.setattr(weight_drift, "BLOCK_ELEMENTS", 10)
    found = measure(tmp_path, older, newer)["total"]
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


def test_zeros_and_empty_tensors_have_no_ratio(tmp_path: Path) -> None:
    tensors = {"a.w": torch.zeros(3), "b.w": torch.zeros(0), "c": torch.tensor(2.0)}
    layers = measure(tmp_path, tensors, tensors)["layers"]
    assert (layers["a"]["change"], layers["a"]["cosine"]) == (None, None)
    assert layers["b"]["num_elements"] == 0
    assert layers["c"]["norm"] == 2


def test_other_shapes_and_missing_tensors_are_named(tmp_path: Path) -> None:
    older = {"l.2.w": torch.ones(2), "l.10.w": torch.ones(2), "old": torch.ones(1)}
    newer = {"l.2.w": torch.ones(3), "l.10.w": torch.ones(2), "new": torch.ones(1)}
    report = measure(tmp_path, older, newer)
    assert list(report["layers"]) == ["l.10"]
    assert report["problems"] == [
        "l.2.w has other shapes: [2] and [3]",
        "old is only in checkpoint-epoch0-step1-files0",
        "new is only in checkpoint-epoch0-step2-files0",
    ]


def test_formats_can_be_mixed(tmp_path: Path) -> None:
    older = write(tmp_path, 1, {"w.w": torch.ones(2)})
    newer = write(tmp_path, 2, {"w.w": torch.ones(2), "step": 7}, PICKLE)
    report = measure_drift(*older, *newer).to_json()
    assert report["total"]["change"] == 0
    assert report["problems"] == []


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("owned"),))


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin cannot be read"):
        measure(tmp_path, {"w": Evil()}, {"w": torch.ones(1)}, PICKLE)
    assert not Path("owned").exists()


@pytest.mark.parametrize("value", [[1, 2], 7, torch.ones(2)])
def test_a_pickle_without_a_state_dict_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="no state dict"):
        measure(tmp_path, value, value, PICKLE)


def test_a_view_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    endless = {"w": torch.zeros(1).expand(10**12)}
    with pytest.raises(CheckpointError, match="w is no plain tensor"):
        measure(tmp_path, endless, endless, PICKLE)


@pytest.mark.parametrize("file", WEIGHT_FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "foreign", "link"])
def test_only_intact_files_are_loaded(tmp_path: Path, file: str, damage: str) -> None:
    older = write(tmp_path, 1, {"w": torch.ones(9)}, file)
    newer = write(tmp_path, 2, {"w": torch.ones(9)}, file)
    path = newer[0] / file
    data = path.read_bytes()
    path.unlink()
    if damage == "link":
        path.symlink_to("/dev/zero")
    elif damage != "gone":
        changed = {
            "cut": data[:-1],
            "flipped": bytes([data[0] ^ 1]) + data[1:],
            "foreign": pickle.dumps({"w": 1}),
        }
        path.write_bytes(changed[damage])
    reason = "cannot be read" if damage == "gone" else "not what its manifest says"
    with pytest.raises(CheckpointError, match=f"step2-files0: {file} .*{reason}"):
        measure_drift(*older, *newer)
    if damage == "foreign":  # sealed, it is what the manifest says, and still no weights
        with pytest.raises(CheckpointError, match=f"step2-files0: {file} cannot be read"):
            measure_drift(*older, newer[0], seal(newer[0], 2))


def test_a_pipe_in_place_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    path, manifest = write(tmp_path, 1, {"w": torch.ones(9)})
    (path / SAFE).unlink()
    os.mkfifo(path / SAFE)
    empty = replace(manifest, files={SAFE: FileEntry(0, "AAAAAA==")})
    with pytest.raises(CheckpointError, match="not what its manifest says"):
        measure_drift(path, empty, path, empty)


def test_a_checkpoint_without_weights_says_so(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-epoch0-step1-files0"
    path.mkdir()
    manifest = seal(path, 1)
    with pytest.raises(CheckpointError, match="has no weights"):
        measure_drift(path, manifest, path, manifest)


@pytest.mark.parametrize(
    "file", ["model.safetensors", pytest.param("pytorch_model.bin", marks=pytest.mark.slow)]
)
def test_memory_is_bounded_by_one_tensor_of_each(tmp_path: Path, file: str) -> None:
    tensors = {f"l.{number}.w": torch.ones(2**20) for number in range(24)}  # 4 MiB each
    paths = [write(tmp_path, step, tensors, file)[0] for step in (1, 2)]
    code = (
        "import sys; from pathlib import Path; from utils.checkpoints.layout import read_manifest\n"
        "import torch\n"
        "from benchmarks.figures import anonymous_bytes\n"
        "from utils.tools.viewer import weight_drift\n"
        "paths = [Path(text) for text in sys.argv[1:]]; peak = 0\n"
        "original = weight_drift._drift_of\n"
        "def watched(*sides):\n"
        "    global peak\n"
        "    drift = original(*sides); peak = max(peak, anonymous_bytes()); return drift\n"
        "weight_drift._drift_of = watched\n"
        "torch.ones(2**21).double().sum(); before = anonymous_bytes()\n"
        "weight_drift.measure_drift(paths[0], read_manifest(paths[0]), paths[1], "
        "read_manifest(paths[1]))\n"
        "print((peak - before) / 2**20)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)],
        cwd=PROJECT_DIRECTORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(result.stdout) < 48  # all of them are 192 MiB
