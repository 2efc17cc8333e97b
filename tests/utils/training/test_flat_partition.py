"""Flat partitions: every element is in one, every row is one rank's, whole once heads are there."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from utils.training.flat_partition import FlatGroup

Shapes = st.lists(
    st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6
).map(tuple)


def divide(shapes: tuple[tuple[int, ...], ...], count: int) -> FlatGroup:
    """Return the division that DeepSpeed makes: padded to twice the ranks."""
    total = sum(math.prod(shape) for shape in shapes)
    return FlatGroup(shapes, -(-total // (2 * count)) * 2, count)


@given(Shapes, st.integers(1, 9))
def test_fragments_are_all_elements_once(shapes: tuple[tuple[int, ...], ...], count: int) -> None:
    group = divide(shapes, count)
    found: dict[int, list[int]] = {index: [] for index in range(len(shapes))}
    for rank in range(count):
        end = 0
        for fragment in group.fragments(rank):
            assert fragment.offset == end
            end += fragment.end - fragment.begin
            found[fragment.index] += range(fragment.begin, fragment.end)
        assert end <= group.partition_size
    assert found == {index: list(range(math.prod(shape))) for index, shape in enumerate(shapes)}


@given(Shapes, st.integers(1, 9))
def test_every_row_is_one_ranks_and_heads_complete_it(
    shapes: tuple[tuple[int, ...], ...], count: int
) -> None:
    group = divide(shapes, count)
    rows: dict[int, list[int]] = {index: [] for index in range(len(shapes))}
    given_away = [0] * count
    for rank in range(count):
        fragments = {fragment.index: fragment for fragment in group.fragments(rank)}
        for index, (begin, end) in group.own_rows(rank).items():
            rows[index] += range(begin, end)
            length, fragment = group.row_length(index), fragments[index]
            needed = max(0, end * length - fragment.end)
            heads = group.following_heads(rank, needed)
            assert sum(taken for _, taken in heads) == needed
            for behind, taken in heads:
                given_away[behind] += taken
        covered = group.covering_rows(rank)
        assert covered.keys() == fragments.keys()
        for index, (begin, end) in covered.items():
            length = group.row_length(index)
            assert begin * length <= fragments[index].begin < (begin + 1) * length
            assert (end - 1) * length < fragments[index].end <= end * length
    assert given_away == [group.head(rank) for rank in range(count)]
    assert rows == {index: list(range((*shape, 1)[0])) for index, shape in enumerate(shapes)}
