"""ZeRO's partitions as rows of named tensors, and back; what DeepSpeed cannot do is refused."""

from __future__ import annotations

import importlib.metadata
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.training_config import TrainingConfig
from utils.base.errors import ConfigError
from utils.training import deepspeed
from utils.training.deepspeed import require_deepspeed
from utils.training.flat_partition import FlatGroup
from utils.training.sharding import Sharding

ZERO2 = Sharding(False, "sharding=zero2", zero_stage=2)
SHAPES = st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=6).map(
    tuple
)


@given(SHAPES, st.integers(1, 16))
def test_partitions_become_rows_and_rows_partitions(
    shapes: tuple[tuple[int, ...], ...], count: int
) -> None:
    lengths = [math.prod(shape) for shape in shapes]
    total = sum(lengths)
    size = -(-total // (2 * count)) * 2  # padded to twice the ranks, as DeepSpeed does
    flat = torch.full((size * count,), -1.0)
    flat[:total] = torch.arange(float(total))  # each element has a number of its own
    tensors = [
        part.view(shape) for part, shape in zip(flat[:total].split(lengths), shapes, strict=True)
    ]
    layout = FlatGroup(shapes, size, count)
    partitions = flat.split(size)
    heads = [partition[: layout.longest_head] for partition in partitions]
    rows: list[list[torch.Tensor]] = [[] for _ in shapes]
    for rank, partition in enumerate(partitions):
        for index in layout.own_rows(rank):
            rows[index].append(deepspeed._cut_rows(partition, heads, layout, rank, index))
    for index, tensor in enumerate(tensors):
        joined = torch.cat(rows[index]) if tensor.dim() else rows[index][0]
        assert torch.equal(joined, tensor)

    for rank, partition in enumerate(partitions):
        again = torch.full((size,), -1.0)
        for fragment in layout.fragments(rank):
            begin, end = layout.covering_rows(rank)[fragment.index]
            tensor = tensors[fragment.index]
            covering = tensor[begin:end] if tensor.dim() else tensor
            elements = deepspeed._elements(covering, layout, fragment)
            deepspeed._place(again, fragment, elements)
        assert torch.equal(again, partition)


def test_rows_of_another_model_are_refused() -> None:
    layout = FlatGroup(((5, 3),), 8, 2)
    (fragment,) = layout.fragments(0)
    with pytest.raises(ValueError, match=r"rows of shape \[3, 4\] for 3 of \[5, 3\]"):
        deepspeed._elements(torch.zeros(3, 4), layout, fragment)


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "which is not installed"), ("0.16.9", "0.16.9 is installed")]
)
def test_a_package_that_is_missing_or_old_is_named(
    monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str
) -> None:
    def find(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    expected = rf"sharding=zero2 needs DeepSpeed, {reason}: pip install 'deepspeed>="
    with pytest.raises(ConfigError, match=expected):
        require_deepspeed(TrainingConfig(), ZERO2, "no")


@pytest.mark.parametrize(
    ("settings", "precision", "message"),
    [
        ({}, "fp16", "does not go with fp16"),
        ({"fp8": True}, "bf16", "does not go with fp8"),
    ],
)
def test_what_it_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], precision: str, message: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0+cu128")
    with pytest.raises(ConfigError, match=message):
        require_deepspeed(TrainingConfig(**settings), ZERO2, precision)
    require_deepspeed(TrainingConfig(), ZERO2, "bf16")


def test_another_layout_than_the_known_one_is_refused() -> None:
    """What DeepSpeed says of each weight's place has to agree with what is counted here."""
    engine = deepspeed.ZeroPartitioned.__new__(deepspeed.ZeroPartitioned)
    engine._rank, engine._groups = 0, [FlatGroup(((5, 3), (7,)), 12, 2)]

    def held(numel: int | None) -> SimpleNamespace:
        address = SimpleNamespace(start=0, numel=numel)
        mapping = None if numel is None else SimpleNamespace(lp_fragment_address=address)
        return SimpleNamespace(_hp_mapping=mapping)

    engine._parameters = [[held(12), held(None)]]
    engine._require_known_layout()
    for other in ([held(8), held(None)], [held(12), held(4)]):
        engine._parameters = [other]
        with pytest.raises(ConfigError, match="divides weights in a way that is not known here"):
            engine._require_known_layout()
