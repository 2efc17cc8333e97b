"""Token ids from files, which need no tokenizer run: those of other tools, and bare arrays.

    train.npy, tokens.bin, a.ds, ... --> reader of the format --> stretches of ids
                                                    documents() --> corpus

The files are read a block at a time. Every id is compared with the vocabulary as it stands in the
file, before any cast could fold it. Where the format says which ids are a document, that is
followed. Where it does not, a file falls into its documents by the end-of-text id, each with its
end token; without one it is a single document, handed on in parts, because nothing says where it
could be cut better.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.base.errors import DataError, UsageError
from utils.corpus.documents import TokenArray
from utils.corpus.file_kinds import (
    BIN_SUFFIX,
    COMPRESSION_SUFFIXES,
    DEFAULT_COLUMN,
    cut_files,
    file_sizes,
    read_errors,
)
from utils.corpus.token_files import kinds
from utils.corpus.token_files.flat import RawArray, Stretch, read_flat, read_llmc, read_npy
from utils.corpus.token_files.indexed import read_datatrove, read_megatron
from utils.corpus.token_files.mds import mds_files, read_mds
from utils.corpus.token_files.tables import read_arrow, read_parquet, read_saved, saved_files
from utils.data.shard_cache import token_dtype

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64")
BLOCK_TOKENS = 2**20
# What is high in ids of a type twice as wide is below this, for vocabularies below 4 x 65,536.
MOST_HIGH = 4
LEAST_JUDGED = 32

Reader = Callable[[Path, str, str | None], Iterator[Stretch]]
READERS: dict[str, Reader] = {
    kinds.NPY: read_npy,
    kinds.FLAT: read_flat,
    kinds.LLMC: read_llmc,
    kinds.MEGATRON: read_megatron,
    kinds.DATATROVE: read_datatrove,
    kinds.PARQUET: read_parquet,
    kinds.ARROW: read_arrow,
    kinds.SAVED: read_saved,
    kinds.MDS: read_mds,
}
WITH_COLUMNS = (kinds.PARQUET, kinds.ARROW, kinds.SAVED, kinds.MDS)


class _Block(NamedTuple):
    ids: TokenArray
    ends: list[int]
    """Where documents end in it."""
    are_known: bool
    """Whether anything says where documents end."""


@dataclass(frozen=True)
class TokenFileSource:
    """Token ids from files, in the order of the paths."""

    paths: tuple[Path, ...]
    """Files, and folders of saved datasets or MDS."""

    token_dtype: str | None = None
    """Type of the ids in .bin files, little-endian."""

    eos_token_id: int | None = None
    """Id that ends each document where the format does not say; None: a file is one document."""

    vocab_size: int | None = None
    """Every id must be below; None while it is not known, then ids are not checked."""

    part_tokens: int = BLOCK_TOKENS
    """A document of more tokens is handed on in parts of this many."""

    column: str = DEFAULT_COLUMN
    """Column of the ids in tables."""

    holds_tokens = True

    def __post_init__(self) -> None:
        """Refuse packed files, and .bin files whose type nobody told."""
        packed = [path for path in self.paths if path.suffix.lower() in COMPRESSION_SUFFIXES]
        if packed:
            raise UsageError(f"--input {packed[0]}: token files are read as they lie. Unpack it.")
        if self.token_dtype not in (None, *TOKEN_DTYPES):
            raise UsageError(
                f"--token-dtype {self.token_dtype}: one of {', '.join(TOKEN_DTYPES)} is needed."
            )
        unknown = [path for path, kind in self._kinds.items() if kind == kinds.FLAT]
        if unknown and self.token_dtype is None:
            raise UsageError(
                f"--input {unknown[0]}: a .bin file without header and .idx does not say the type "
                f"of its ids. Give --token-dtype, one of {', '.join(TOKEN_DTYPES)}; nanoGPT writes "
                "uint16."
            )

    def documents(self) -> Iterator[TokenArray]:
        """Yield the documents' ids in the smallest type that holds the vocabulary.

        Raises:
            DataError: A file is no flat array of integers, or an id is outside the vocabulary.
        """
        for path in self.paths:
            yield from self._split(self._blocks(path))

    def check(self) -> None:
        """Read everything once.

        Raises:
            DataError: As `documents`.
        """
        for path in self.paths:
            for _ in self._blocks(path):
                pass

    def fingerprint(self) -> str:
        """Return a hash over the bytes of the files and how they are read."""
        options = [self.token_dtype, self.eos_token_id, self.part_tokens]
        digest = hashlib.sha256(json.dumps(["tokens", *options]).encode())
        for path, kind in self._kinds.items():
            # Of the first two kinds as ever, so that what was prepared of them is recognized.
            is_flat = kind in (kinds.NPY, kinds.FLAT)
            label = path.suffix.lower() if is_flat else json.dumps([kind, self.column])
            content = hashlib.sha256(label.encode())
            for file in _files_of(path, kind):
                with read_errors(file), file.open("rb") as opened:
                    while block := opened.read(BLOCK_TOKENS):
                        content.update(block)
            digest.update(content.digest())
        return digest.hexdigest()

    def uses(self, option: str) -> bool:
        """As `Source` says."""
        found = set(self._kinds.values())
        return {
            "eos_id": True,
            "text_column": not found.isdisjoint(WITH_COLUMNS),
            "token_dtype": kinds.MDS in found
            or any(path.suffix.lower() == BIN_SUFFIX for path in self.paths),
        }.get(option, False)

    def part(self, number: int, count: int) -> TokenFileSource:
        """As `Source` says: whole files and folders."""
        paths, _ = cut_files(self.paths, number, count, lambda path, at: None)
        return dataclasses.replace(self, paths=paths)

    def outline(self) -> list[Any]:
        """As `Source` says."""
        how = [self.token_dtype, self.eos_token_id, self.part_tokens, self.column]
        return [*how, *file_sizes(self.paths)]

    @cached_property
    def _kinds(self) -> dict[Path, str]:
        return {path: kinds.token_kind(path, self.column) or kinds.NPY for path in self.paths}

    def _split(self, blocks: Iterator[_Block]) -> Iterator[TokenArray]:
        rest: list[TokenArray] = []
        for block, ends, are_known in blocks:
            if not are_known:
                yield from self._parts(block)
                continue
            start = 0
            for end in ends:
                yield np.concatenate([*rest, block[start:end]]) if rest else block[start:end]
                rest, start = [], end
            if start < len(block):
                rest.append(block[start:])
            if sum(map(len, rest)) >= BLOCK_TOKENS:
                yield from self._parts(np.concatenate(rest))
                rest = []
        if rest:
            yield np.concatenate(rest)

    def _parts(self, ids: TokenArray) -> Iterator[TokenArray]:
        for start in range(0, len(ids), self.part_tokens):
            yield ids[start : start + self.part_tokens]

    def _blocks(self, path: Path) -> Iterator[_Block]:
        dtype = np.uint64 if self.vocab_size is None else token_dtype(self.vocab_size)
        num_documents, begun = 0, 0  # documents that ended, ids of the one that did not
        for ids, ends in self._stretches(path):
            num_taken = 0
            for start in range(0, len(ids) or 1, BLOCK_TOKENS):
                # A copy: the memory map's pages are given back with it.
                block = np.array(ids[start : start + BLOCK_TOKENS])
                found: RawArray
                if ends is None:
                    found = np.flatnonzero(block == self.eos_token_id) + 1
                else:
                    stop = int(np.searchsorted(ends, start + len(block), "right"))
                    found, num_taken = ends[num_taken:stop] - start, stop
                if self.vocab_size is not None and len(block):
                    self._check_ids(path, block, found, (num_documents, begun))
                num_documents += len(found)
                begun = len(block) - int(found[-1]) if len(found) else begun + len(block)
                are_known = ends is not None or self.eos_token_id is not None
                yield _Block(block.astype(dtype), found.tolist(), are_known)

    def _check_ids(
        self, path: Path, block: RawArray, ends: RawArray, before: tuple[int, int]
    ) -> None:
        assert self.vocab_size is not None
        for position in (int(block.argmin()), int(block.argmax())):
            token_id = int(block[position])
            if not 0 <= token_id < self.vocab_size:
                number = int(np.searchsorted(ends, position, "right"))
                begin = int(ends[number - 1]) if number else -before[1]
                raise DataError(
                    f"{path}: token id {token_id} at position {position - begin} of document "
                    f"{before[0] + number + 1} is outside the vocabulary of {self.vocab_size}. "
                    "Give the --vocab-size or --tokenizer that the file was made with, and for "
                    ".bin its --token-dtype."
                )

    def _stretches(self, path: Path) -> Iterator[Stretch]:
        kind = self._kinds[path]
        try:
            for stretch in READERS[kind](path, self.column, self.token_dtype):
                own = stretch.ids.dtype.name
                if kind in (kinds.LLMC, kinds.MEGATRON) and self.token_dtype not in (None, own):
                    raise DataError(
                        f"{path}: {'its header' if kind == kinds.LLMC else 'the .idx beside it'} "
                        f"says {own}, --token-dtype {self.token_dtype}. Leave the option out."
                    )
                if kind in (kinds.FLAT, kinds.MDS) and own == self.token_dtype:
                    _require_own_type(path, stretch.ids, own)
                yield stretch
        except (OSError, ValueError, KeyError, TypeError, EOFError, SyntaxError) as exc:
            raise DataError(f"{path}: not a readable token file ({exc}).") from exc


def _require_own_type(path: Path, ids: RawArray, dtype: str) -> None:
    """Refuse ids that were written in a wider type: every second one is what is high in them."""
    low, high = ids[:BLOCK_TOKENS:2], ids[1:BLOCK_TOKENS:2]
    if len(high) >= LEAST_JUDGED and high.max() < MOST_HIGH <= np.median(low):
        raise DataError(
            f"{path}: every second id is below {MOST_HIGH}: the ids seem to be wider than {dtype}. "
            "Give their own --token-dtype."
        )


def _files_of(path: Path, kind: str) -> list[Path]:
    """Return the files that a path of a kind stands for."""
    if kind == kinds.MEGATRON:
        return [path, path.with_suffix(".idx")]
    if kind == kinds.DATATROVE:
        return [path, *(file for file in [Path(f"{path}.index")] if file.is_file())]
    if kind == kinds.MDS:
        return [file for file in mds_files(path) if file.is_file()]
    if kind == kinds.SAVED:
        return [file for file in saved_files(path) if file.is_file()]
    return [path]
