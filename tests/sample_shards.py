"""NPZ shards, good and bad, and buckets that count what is read from them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from utils.data.shard_index import ShardFacts
from utils.storage.bucket import crc32c_of_file
from utils.storage.directory import DirectoryBucket

INTEGER_DTYPES = ["u1", "i1", "<u2", "<i2", ">u2", ">i2", "<u4", "<i4", ">i4", "<u8", "<i8", ">u8"]


class CountingBucket(DirectoryBucket):
    """A directory bucket that counts bytes and downloads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.bytes_read = 0
        self.downloads: list[str] = []

    def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        data = super().read_bytes(name, start, length)
        self.bytes_read += len(data)
        return data

    def fetch(self, name: str, scratch: Path) -> Path:
        self.downloads.append(name)
        scratch.write_bytes(super().read_bytes(name))
        return scratch


def save_shard(path: Path, **arrays: Any) -> ShardFacts:
    """Write the arrays as numpy does; return the facts of a shard without a mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    tokens = sum(np.asarray(array).size for array in arrays.values())
    return ShardFacts(path.name, tokens, path.stat().st_size, crc32c_of_file(path))


def save_shards(directory: Path, lengths: Sequence[int]) -> list[ShardFacts]:
    """Write shards of these lengths whose token ids are 0, 1, 2, ... over all of them."""
    facts, first = [], 0
    for number, length in enumerate(lengths):
        ids = np.arange(first, first + length, dtype=np.uint32)
        facts.append(save_shard(directory / f"train_{number:05}.npz", input_ids=ids))
        first += length
    return facts


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def read_documents(output: Path) -> dict[str, list[list[int]]]:
    """Return the documents of a prepared output, by split, as ids without their end token."""
    index = json.loads((output / "index.json").read_text("utf-8"))
    found = {}
    for split in ("train", "val"):
        names = [one["name"] for one in index["shards"] if Path(one["name"]).name.startswith(split)]
        shards = [np.load(output / name)["input_ids"] for name in names]
        ids = np.concatenate([np.zeros(0, np.uint16), *shards])
        *documents, rest = np.split(ids, np.flatnonzero(ids == index["eos_token_id"]) + 1)
        assert not len(rest)
        found[split] = [document[:-1].tolist() for document in documents]
    return found


def read_files(output: Path) -> dict[str, bytes]:
    """Return what a bucket has of a folder, which is not what was cut off: name -> bytes."""
    bucket = DirectoryBucket(output)
    return {info.name: bucket.read_bytes(info.name) for info in bucket.list()}


def read_texts(output: Path) -> dict[str, list[str]]:
    """Return the documents of a prepared output, by split, with nothing but the files in it."""
    backend = Tokenizer.from_file(str(output / "tokenizer.json"))
    return {
        split: [backend.decode(ids, skip_special_tokens=False) for ids in documents]
        for split, documents in read_documents(output).items()
    }


def npy(header: str, data: bytes = b"") -> bytes:
    """Return a .npy file with a header of one's own."""
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip file of these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def saved(**arrays: Any) -> bytes:
    """Return the bytes of an NPZ file as numpy writes it."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _header(shape: str, descr: str = "<u2") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


def _flagged(offset: int, value: int) -> bytes:
    """Return a good shard with a field of both zip headers replaced."""
    data = bytearray(saved(input_ids=np.arange(9, dtype=np.uint16)))
    for signature, start in ((b"PK\x03\x04", offset), (b"PK\x01\x02", offset + 2)):
        place = data.index(signature) + start
        data[place : place + 2] = value.to_bytes(2, "little")
    return bytes(data)


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _compressed_with_another_checksum(ids: np.ndarray) -> bytes:
    """Return a shard that unpacks without an error to bytes that are not those of its CRC."""
    with zipfile.ZipFile(io.BytesIO(saved(input_ids=ids))) as archive:
        member = archive.read("input_ids.npy")
    data = bytearray(zipped({"input_ids.npy": member}, zipfile.ZIP_DEFLATED))
    for signature, offset in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16)):
        data[data.index(signature) + offset] ^= 1
    return bytes(data)


IDS = np.arange(9, dtype=np.uint16)

# Seen in the zip directory and the .npy headers alone: file -> a part of the reason.
BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "not a whole NPZ file"),
    "HTML": (b"<!DOCTYPE html><html>404 Not Found</html>", "not a whole NPZ file"),
    "cut end": (saved(input_ids=IDS)[:-5], "not a whole NPZ file"),
    "no array": (zipped({}), "its keys are []"),
    "wrong key": (saved(token_ids=IDS), "its keys are ['token_ids']; one of input_ids, tokens"),
    "object array": (saved(input_ids=np.array([{}, 1], object)), "dtype object; integers"),
    "float array": (saved(input_ids=np.ones(9)), "dtype float64; integers are needed"),
    "bool array": (saved(input_ids=np.ones(9, bool)), "dtype bool; integers are needed"),
    "structured array": (saved(input_ids=np.zeros(3, "i4,i4")), "integers are needed"),
    "no dimension": (saved(input_ids=np.int64(3)), "has shape (); 1-D, 2-D or [n, length, 1]"),
    "3-D": (saved(input_ids=np.ones((2, 3, 2), "i4")), "has shape (2, 3, 2); 1-D"),
    "no tokens": (saved(input_ids=np.array([], "i4")), "it holds no tokens"),
    "all masked": (saved(input_ids=IDS, attention_mask=np.zeros(9, "u1")), "it holds no tokens"),
    "no header": (zipped({"input_ids.npy": b""}), "header of input_ids cannot be read"),
    "broken header": (zipped({"input_ids.npy": npy("{'descr': ")}), "header of input_ids cannot"),
    "unknown version": (
        zipped({"input_ids.npy": b"\x93NUMPY\x09\x00" + bytes(100)}),
        "header of input_ids cannot be read",
    ),
    "huge shape": (
        zipped({"input_ids.npy": npy(_header("(1000000000000,)"), bytes(18))}),
        "unpacks to more than",
    ),
    "shape that wraps around": (
        zipped({"input_ids.npy": npy(_header("(4611686018427387904, 4)"), bytes(18))}),
        "unpacks to more than",
    ),
    "negative shape": (
        zipped({"input_ids.npy": npy(_header("(-9,)"), bytes(18))}),
        "has shape (-9,), which is impossible",
    ),
    "two negative lengths": (
        zipped({"input_ids.npy": npy(_header("(-3, -3)"), bytes(18))}),
        "has shape (-3, -3), which is impossible",
    ),
    "shape larger than its data": (
        zipped({"input_ids.npy": npy(_header("(5000000,)"), bytes(18))}),
        "declares 10000000 bytes, its zip entry",
    ),
    "zip bomb behind a small header": (
        zipped({"input_ids.npy": npy(_header("(9,)"), bytes(50_000_000))}, zipfile.ZIP_DEFLATED),
        "declares 18 bytes, its zip entry 500000",
    ),
    "password": (_flagged(6, 0x1), "cannot be read"),
    "unknown compression": (_flagged(8, 99), "cannot be read"),
}

# Seen only when the tokens are read.
BAD_TOKENS: dict[str, tuple[bytes, str]] = {
    "id at the vocabulary": (
        saved(input_ids=np.array([1, 100], "i8")),
        "token id 100 is outside the vocabulary of 100",
    ),
    "id that a cast would fold": (
        saved(input_ids=np.array([1, 65536 + 5], "i4")),
        "token id 65541 is outside the vocabulary of 100",
    ),
    "id beyond 63 bits": (
        saved(input_ids=np.array([1, 2**64 - 1], "u8")),
        "token id 18446744073709551615 is outside the vocabulary",
    ),
    "negative id": (saved(input_ids=np.array([1, -1], "i2")), "token id -1 is negative"),
    "flipped bit": (_flipped(saved(input_ids=np.tile(IDS, 5000))), "input_ids is damaged"),
    "wrong checksum": (
        _compressed_with_another_checksum(np.tile(IDS, 5000)),
        "input_ids is damaged",
    ),
    "mask of another length": (
        saved(input_ids=IDS, attention_mask=np.ones(8, "u1")),
        "attention_mask has another shape",
    ),
    "mask of floats": (
        saved(input_ids=IDS, attention_mask=np.ones(9)),
        "attention_mask has dtype float64",
    ),
}
