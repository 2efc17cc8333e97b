"""Flat files of token ids, which need no tokenizer run: `.npy` (1-D) and `.bin` with a dtype.

    train.npy, tokens.bin --> documents() --> corpus

The files are memory-mapped and read a block at a time. Every id is compared with the vocabulary
as it stands in the file, before any cast could fold it. With an end-of-text id the file falls
into its documents, each with its end token; without one it is a single document, handed on in
parts, because nothing says where it could be cut better.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from utils.base.errors import DataError, UsageError
from utils.corpus.documents import TokenArray
from utils.corpus.file_kinds import (
    BIN_SUFFIX,
    HEAD_BYTES,
    NPY_SUFFIX,
    TOKEN_SUFFIXES,
    cut_files,
    file_sizes,
    require_no_signature,
)
from utils.data.shard_cache import token_dtype
from utils.data.shard_index import NPY_MAGIC

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64")
BLOCK_TOKENS = 2**20
MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

RawArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class TokenFileSource:
    """Token ids from files, in the order of the paths."""

    paths: tuple[Path, ...]
    """Files that end in .npy or .bin."""

    token_dtype: str | None = None
    """Type of the ids in .bin files, little-endian."""

    eos_token_id: int | None = None
    """Id that ends each document; None: a file is one document."""

    vocab_size: int | None = None
    """Every id must be below; None while it is not known, then ids are not checked."""

    part_tokens: int = BLOCK_TOKENS
    """A document of more tokens is handed on in parts of this many."""

    holds_tokens = True

    def __post_init__(self) -> None:
        """Refuse packed files, and .bin files whose type nobody told."""
        packed = [path for path in self.paths if path.suffix.lower() not in TOKEN_SUFFIXES]
        if packed:
            raise UsageError(f"--input {packed[0]}: token files are read as they lie. Unpack it.")
        if self.token_dtype not in (None, *TOKEN_DTYPES):
            raise UsageError(
                f"--token-dtype {self.token_dtype}: one of {', '.join(TOKEN_DTYPES)} is needed."
            )
        unknown = [path for path in self.paths if path.suffix.lower() == BIN_SUFFIX]
        if unknown and self.token_dtype is None:
            raise UsageError(
                f"--input {unknown[0]}: a .bin file does not say the type of its ids. Give "
                f"--token-dtype, one of {', '.join(TOKEN_DTYPES)}."
            )

    def documents(self) -> Iterator[TokenArray]:
        """Yield the documents' ids in the smallest type that holds the vocabulary.

        Raises:
            DataError: A file is no flat array of integers, or an id is outside the vocabulary.
        """
        for path in self.paths:
            blocks = self._blocks(path)
            yield from self._parts(blocks) if self.eos_token_id is None else self._split(blocks)

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
        for path in self.paths:
            content = hashlib.sha256(path.suffix.lower().encode())
            try:
                with path.open("rb") as file:
                    while block := file.read(BLOCK_TOKENS):
                        content.update(block)
            except OSError as exc:
                raise DataError(f"{path}: cannot be read ({exc}).") from exc
            digest.update(content.digest())
        return digest.hexdigest()

    def uses(self, option: str) -> bool:
        """As `Source` says."""
        has_bin = any(path.suffix.lower() == BIN_SUFFIX for path in self.paths)
        return option == "eos_id" or (option == "token_dtype" and has_bin)

    def part(self, number: int, count: int) -> TokenFileSource:
        """As `Source` says: whole files."""
        paths, _ = cut_files(self.paths, number, count, lambda path, at: None)
        return dataclasses.replace(self, paths=paths)

    def outline(self) -> list[Any]:
        """As `Source` says."""
        return [self.token_dtype, self.eos_token_id, self.part_tokens, *file_sizes(self.paths)]

    def _parts(self, blocks: Iterator[TokenArray]) -> Iterator[TokenArray]:
        for block in blocks:
            for start in range(0, len(block), self.part_tokens):
                yield block[start : start + self.part_tokens]

    def _split(self, blocks: Iterator[TokenArray]) -> Iterator[TokenArray]:
        rest: list[TokenArray] = []
        for block in blocks:
            start = 0
            for end in (np.flatnonzero(block == self.eos_token_id) + 1).tolist():
                yield np.concatenate([*rest, block[start:end]]) if rest else block[start:end]
                rest, start = [], end
            if start < len(block):
                rest.append(block[start:])
            if sum(map(len, rest)) >= BLOCK_TOKENS:
                yield from self._parts(iter([np.concatenate(rest)]))
                rest = []
        if rest:
            yield np.concatenate(rest)

    def _blocks(self, path: Path) -> Iterator[TokenArray]:
        array = self._open(path)
        dtype = np.uint64 if self.vocab_size is None else token_dtype(self.vocab_size)
        for start in range(0, len(array), BLOCK_TOKENS):
            # A copy: the memory map's pages are given back with it.
            block = np.array(array[start : start + BLOCK_TOKENS])
            if self.vocab_size is not None:
                self._check_ids(path, block, start)
            yield block.astype(dtype)

    def _check_ids(self, path: Path, block: RawArray, start: int) -> None:
        assert self.vocab_size is not None
        for position in (int(block.argmin()), int(block.argmax())):
            token_id = int(block[position])
            if not 0 <= token_id < self.vocab_size:
                raise DataError(
                    f"{path}: token id {token_id} at position {start + position} is outside the "
                    f"vocabulary of {self.vocab_size}. Give the --vocab-size or --tokenizer that "
                    "the file was made with, and for .bin its --token-dtype."
                )

    def _open(self, path: Path) -> RawArray:
        try:
            if path.suffix.lower() == NPY_SUFFIX:
                if _read_head(path, len(NPY_MAGIC)) != NPY_MAGIC:
                    raise ValueError("no .npy header; bare ids are named .bin, see --token-dtype")
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            else:
                array = self._open_flat(path)
        except (OSError, ValueError, EOFError, SyntaxError) as exc:
            raise DataError(f"{path}: not a readable token file ({exc}).") from exc
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim != 1:
            what = (
                f"{array.dtype}, shape {array.shape}" if hasattr(array, "dtype") else "an archive"
            )
            raise DataError(f"{path}: holds {what}; a 1-D array of integers is needed.")
        if not len(array):
            raise DataError(f"{path}: holds no tokens.")
        return array

    def _open_flat(self, path: Path) -> RawArray:
        require_no_signature(path, _read_head(path, HEAD_BYTES))
        _require_index_dtype(path, self.token_dtype)
        dtype = np.dtype(str(self.token_dtype)).newbyteorder("<")
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise DataError(
                f"{path}: {size} bytes are no whole number of {self.token_dtype} ids. "
                "Is --token-dtype right, and the file whole?"
            )
        if size == 0:
            raise DataError(f"{path}: holds no tokens.")
        return np.memmap(path, dtype, mode="r")


def _read_head(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _require_index_dtype(path: Path, token_dtype: str | None) -> None:
    """Compare the type with what a Megatron index beside the file says: after magic and version."""
    index = path.with_suffix(".idx")
    head = _read_head(index, 18) if index.is_file() else b""
    dtype = MEGATRON_DTYPES.get(head[-1]) if head.startswith(MEGATRON_MAGIC) else token_dtype
    if dtype != token_dtype:
        raise DataError(
            f"{path}: {index.name} beside it says {dtype}, --token-dtype {token_dtype}. Give "
            f"--token-dtype {dtype}, and --eos-id where documents end with an id."
        )
