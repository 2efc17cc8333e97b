"""Flat token files: what comes out, and what is refused before any cast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utils.base.errors import DataError, UsageError
from utils.corpus.token_files.source import TokenFileSource


def documents(path: Path, **options: object) -> list[list[int]]:
    source = TokenFileSource((path,), **{"vocab_size": 1000, **options})
    return [document.tolist() for document in source.documents()]


def test_files_of_any_integer_type_are_one_document_in_parts(tmp_path: Path) -> None:
    for dtype in ("uint8", "uint16", "int32", "uint64", ">i4"):
        np.save(tmp_path / "a.npy", np.arange(10, dtype=dtype))
        parts = documents(tmp_path / "a.npy", part_tokens=4)
        assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for dtype in ("uint16", "uint32", "int64"):
        np.arange(500, dtype=dtype).tofile(tmp_path / "a.bin")
        assert documents(tmp_path / "a.bin", token_dtype=dtype) == [list(range(500))]


@pytest.mark.parametrize("bad", [1000, 2**32 + 5, -1])
def test_an_id_that_a_cast_would_fold_is_named_with_its_place(tmp_path: Path, bad: int) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 2, bad, 3], np.int64))
    with pytest.raises(DataError, match=rf"a\.npy: token id {bad} at position 2 .*of 1000"):
        documents(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(4), "float64"),
        (np.ones((2, 2), np.int32), r"shape \(2, 2\)"),
        (np.array([{}], object), "Python objects"),
        (np.zeros(0, np.int32), "no tokens"),
    ],
)
def test_what_is_no_flat_array_of_integers_is_refused(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"<html>", r"a\.npy: not a readable"),
        ("a.npy", b"\x93NUMPY\x01\x00", r"a\.npy: not a readable"),
        ("a.npy", bytes(8), r"bare ids are named \.bin"),
        ("a.bin", b"LITPKDS\0" + bytes(24), "LitGPT.*24 bytes.*tail -c [+]25"),
        ("a.bin", b"PK\x03\x04", "zip archive .*models"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / name, token_dtype="uint16")


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("a.bin", "float32", "--token-dtype float32"),
        ("a.npy.gz", None, "Unpack it"),
    ],
)
def test_how_a_file_is_read_must_be_known(
    tmp_path: Path, name: str, dtype: str | None, message: str
) -> None:
    (tmp_path / name).write_bytes(bytes(8))
    with pytest.raises(UsageError, match=message):
        TokenFileSource((tmp_path / name,), dtype)


def test_the_fingerprint_follows_content_and_reading(tmp_path: Path) -> None:
    for name in ("a.bin", "b.bin"):
        np.arange(8, dtype=np.uint16).tofile(tmp_path / name)

    def fingerprint(name: str, *options: object) -> str:
        return TokenFileSource((tmp_path / name,), *options).fingerprint()

    assert fingerprint("a.bin", "uint16") == fingerprint("b.bin", "uint16")
    assert fingerprint("a.bin", "uint16") != fingerprint("a.bin", "uint32")
    assert fingerprint("a.bin", "uint16") != fingerprint("a.bin", "uint16", 3)
    (tmp_path / "b.bin").write_bytes(bytes(16))
    assert fingerprint("a.bin", "uint16") != fingerprint("b.bin", "uint16")
