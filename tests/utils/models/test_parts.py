"""Tensors in parts: any rows of any division, read back exactly; what does not fit is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from utils.models.parts import (
    OFFSETS_HEADER,
    LoadedTensors,
    Part,
    PartFiles,
    RowRanges,
    WholeFile,
    find_part_files,
    part_file,
    part_header,
    read_tensors,
)

TENSORS = {
    "matrix": torch.arange(26.0).view(13, 2),
    "vector": torch.arange(4, dtype=torch.bfloat16),
    "row": torch.tensor([[1.0, 2.0]]),
    "scalar": torch.tensor(3.0),
}


def write_parts(directory: Path, count: int) -> list[Path]:
    """Write TENSORS as so many ranks would; the scalar is rank 0's."""
    paths = []
    for rank in range(count):
        part = Part(rank, count)
        held = {}
        for name, tensor in TENSORS.items():
            if tensor.dim():
                begin, end = part.rows_of("", len(tensor))
                if begin < end:
                    held[name] = tensor[begin:end].contiguous()
            elif rank == 0:
                held[name] = tensor
        header = part_header({name: tuple(TENSORS[name].shape) for name in held}, part)
        paths.append(directory / part_file("model", part))
        save_file(held, str(paths[-1]), header)
    return paths


@given(st.integers(0, 200), st.integers(1, 20))
def test_parts_are_torchs_chunks_and_cover_all_rows(length: int, count: int) -> None:
    rows = [Part(rank, count).rows_of("", length) for rank in range(count)]
    assert [begin for begin, _ in rows] == [0, *(end for _, end in rows[:-1])]
    assert rows[-1][1] == length
    chunks = [len(chunk) for chunk in torch.arange(length).chunk(count)] if length else []
    assert [end - begin for begin, end in rows if end > begin] == chunks


@pytest.mark.parametrize("written", [1, 3, 16])
@pytest.mark.parametrize("read", [None, 2, 7])
def test_any_division_is_read_as_any_other(tmp_path: Path, written: int, read: int | None) -> None:
    paths = write_parts(tmp_path, written)
    with contextlib.ExitStack() as stack:
        reader = PartFiles(paths, stack)
        assert {name: reader.shape(name) for name in reader.names} == {
            name: tuple(tensor.shape) for name, tensor in TENSORS.items()
        }
        for part in [None] if read is None else [Part(rank, read) for rank in range(read)]:
            found = read_tensors(reader, part)
            for name, tensor in TENSORS.items():
                rows = slice(*part.rows_of("", len(tensor))) if part and tensor.dim() else ...
                assert torch.equal(found[name], tensor[rows])
                assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("kind", ["safetensors", "loaded"])
def test_whole_tensors_are_read_as_rows_too(tmp_path: Path, kind: str) -> None:
    save_file(TENSORS, str(tmp_path / "model.safetensors"))
    with contextlib.ExitStack() as stack:
        whole = WholeFile(tmp_path / "model.safetensors", stack)
        reader = whole if kind == "safetensors" else LoadedTensors(TENSORS)
        for rank in range(4):
            part = Part(rank, 4)
            found = read_tensors(reader, part)
            assert torch.equal(found["matrix"], TENSORS["matrix"][slice(*part.rows_of("", 13))])
            assert torch.equal(found["scalar"], TENSORS["scalar"])
        assert torch.equal(read_tensors(reader, None)["matrix"], TENSORS["matrix"])


def test_any_rows_are_written_and_read(tmp_path: Path) -> None:
    """Ranks whose rows are not those of fully_shard; a tensor that is not named is read whole."""
    ranges = [
        {"matrix": (0, 5), "vector": (0, 4)},
        {"matrix": (5, 13), "row": (0, 1)},
    ]
    paths = []
    for rank, rows in enumerate(ranges):
        held = {name: TENSORS[name][slice(*ends)].contiguous() for name, ends in rows.items()}
        shapes = {name: tuple(TENSORS[name].shape) for name in held}
        paths.append(tmp_path / part_file("model", Part(rank, 2)))
        save_file(held, str(paths[-1]), part_header(shapes, RowRanges(rows)))
    with contextlib.ExitStack() as stack:
        reader = PartFiles(paths, stack)
        found = read_tensors(reader, RowRanges({"matrix": (4, 7), "row": (0, 0)}))
        assert torch.equal(found["matrix"], TENSORS["matrix"][4:7])
        assert torch.equal(found["row"], TENSORS["row"][:0])
        assert torch.equal(found["vector"], TENSORS["vector"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_reads_parts(tmp_path: Path) -> None:
    write_parts(tmp_path, 3)
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)


def test_part_files_are_found_in_order_and_only_all_of_them() -> None:
    names = [part_file("model", Part(rank, 3)) for rank in range(3)]
    others = [part_file("optimizer", Part(0, 2)), "model.safetensors", "manifest.json"]
    assert find_part_files([*reversed(names), *others], "model") == names
    assert find_part_files(others[1:], "model") == []
    for missing in range(3):
        with pytest.raises(ValueError, match="of 3 parts of model there are only"):
            find_part_files(names[:missing] + names[missing + 1 :], "model")
    with pytest.raises(ValueError, match="of 2 parts of optimizer there are only"):
        find_part_files(others, "optimizer")
    with pytest.raises(ValueError, match="there are only"):  # of two divisions
        find_part_files([*names, part_file("model", Part(0, 1))], "model")


@pytest.mark.parametrize(
    ("offsets", "shape", "reason"),
    [
        ([7, 0], [13, 2], "in no part, or twice"),
        ([4, 0], [13, 2], "in no part, or twice"),
        ([5, 0], [11, 2], "has another shape than in other parts"),
        ([5, 0], [13, 3], "has another shape than in other parts"),
    ],
)
def test_rows_that_are_missing_or_twice_are_refused(
    tmp_path: Path, offsets: list[int], shape: list[int], reason: str
) -> None:
    first, *_ = write_parts(tmp_path, 3)  # rows 0 to 5
    rest = {"matrix": TENSORS["matrix"][5:].contiguous()}
    header = {OFFSETS_HEADER: json.dumps({"matrix": {"saved_offsets": offsets, "shape": shape}})}
    save_file(rest, str(tmp_path / "rest.safetensors"), header)
    with contextlib.ExitStack() as stack, pytest.raises(ValueError, match=reason):
        PartFiles([first, tmp_path / "rest.safetensors"], stack)
    with contextlib.ExitStack() as stack, pytest.raises(ValueError, match="rows 5 and more"):
        PartFiles([first], stack)
