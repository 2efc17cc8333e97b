"""Flat partitions: where the rows of tensors lie when ranks divide them end to end, by elements.

    tensors of a group, laid end to end -> equal partitions, one a rank -> whole rows of tensors

DeepSpeed's ZeRO optimizer lays the weights of a parameter group end to end, pads the end, and gives
each rank an equal part, so that a rank may begin or end in the middle of a row. Checkpoints are
made of rows (`utils/models/parts.py`): a row belongs to the rank that has its first element, and
the next rank gives it the rest, its `head`. This module knows indices alone, no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

RowRange = tuple[int, int]


@dataclass(frozen=True)
class Fragment:
    """Elements of one tensor that lie in a rank's partition.

    `index` is the tensor's place in the group. Its elements from `begin` up to `end`, flattened,
    lie from `offset` on in the partition.
    """

    index: int
    begin: int
    end: int
    offset: int


@dataclass(frozen=True)
class FlatGroup:
    """Tensors that lie end to end, divided into equal partitions.

    There are `count` of them; what follows the last tensor is padding.
    """

    shapes: tuple[tuple[int, ...], ...]
    partition_size: int
    count: int

    @cached_property
    def _begins(self) -> tuple[int, ...]:
        begins, end = [], 0
        for shape in self.shapes:
            begins.append(end)
            end += math.prod(shape)
        return tuple(begins)

    def row_length(self, index: int) -> int:
        """Return the elements in a row of a tensor: all dimensions but the first."""
        return math.prod(self.shapes[index][1:])

    def fragments(self, rank: int) -> list[Fragment]:
        """Return what lies in a rank's partition, in its order."""
        first, after = rank * self.partition_size, (rank + 1) * self.partition_size
        found = []
        for index, (begin, shape) in enumerate(zip(self._begins, self.shapes, strict=True)):
            end = begin + math.prod(shape)
            if max(begin, first) < min(end, after):
                low, high = max(begin, first), min(end, after)
                found.append(Fragment(index, low - begin, high - begin, low - first))
        return found

    def covering_rows(self, rank: int) -> dict[int, RowRange]:
        """Return, by tensor, the rows that a rank has any element of."""
        rows = {}
        for fragment in self.fragments(rank):
            length = self.row_length(fragment.index)
            rows[fragment.index] = (fragment.begin // length, -(-fragment.end // length))
        return rows

    def own_rows(self, rank: int) -> dict[int, RowRange]:
        """Return, by tensor, the rows that a rank has the first element of; each row is one's."""
        rows = {}
        for fragment in self.fragments(rank):
            length = self.row_length(fragment.index)
            begin, end = -(-fragment.begin // length), -(-fragment.end // length)
            if begin < end:
                rows[fragment.index] = (begin, end)
        return rows

    def head(self, rank: int) -> int:
        """Return how many elements a partition begins with that belong to another rank's row."""
        fragments = self.fragments(rank)
        if not fragments:
            return 0
        first, length = fragments[0], self.row_length(fragments[0].index)
        return min(-first.begin % length, first.end - first.begin)

    @property
    def longest_head(self) -> int:
        """The longest of all heads; 0 where no row is divided."""
        return max(self.head(rank) for rank in range(self.count))

    def following_heads(self, rank: int, needed: int) -> list[tuple[int, int]]:
        """Return (rank, elements) of the heads that complete a rank's last row.

        `needed` elements are what it lacks.
        """
        found = []
        for following in range(rank + 1, self.count):
            taken = min(needed, self.head(following))
            if not taken:
                break
            found.append((following, taken))
            needed -= taken
        return found
