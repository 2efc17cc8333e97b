"""What a source is, and what a document is on its way from there to a shard.

    source --> str (also OpenText, NullText) or token ids --> Document (with its split)
           --> token ids --> shard

Nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

TRAINING = "train"
VALIDATION = "val"
SPLITS = (TRAINING, VALIDATION)

TokenArray = npt.NDArray[np.unsignedinteger[Any]]


class OpenText(str):
    """Part of a very long document that goes on with the next one: no end token follows it."""

    __slots__ = ()


class NullText(str):
    """In place of a text that is null or missing: a sentence that says where."""

    __slots__ = ()


Content = str | TokenArray
"""Text, or the ids of what is tokenized already."""


class Document(NamedTuple):
    """One document on its way to a shard."""

    content: Content
    split: str
    is_wanted: bool = True
    """False for what an earlier, interrupted preparation has finished."""


class TokenizedDocument(NamedTuple):
    """The ids of one document, its end token included."""

    ids: TokenArray
    split: str


class Source(Protocol):
    """A stream of documents that can be read any number of times, the same each time.

    What cannot be read is a `DataError` that names the file and the place.
    """

    @property
    def holds_tokens(self) -> bool:
        """Whether the documents are token ids already."""

    def documents(self) -> Iterator[Content]:
        """Yield the documents, always in the same order."""

    def fingerprint(self) -> str:
        """Return a hash that changes when the documents do; much cheaper than reading them."""

    def uses(self, option: str) -> bool:
        """Tell whether an option of prepare_data.py changes how something here is read."""

    def part(self, number: int, count: int) -> Source:
        """Return one of `count` parts, from 0; each document is in exactly one of them."""

    def outline(self) -> list[Any]:
        """Return what decides how parts are cut, such as sizes; cheap, and fit for JSON."""
