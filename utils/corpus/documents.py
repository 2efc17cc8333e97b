"""What a document is on its way from a source to a shard.

    source --> str (also OpenText, NullText) or token ids --> Document (with its split)
           --> token ids --> shard

Nothing is read or written here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
