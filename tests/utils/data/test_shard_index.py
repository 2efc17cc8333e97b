"""What a shard holds is known from a few KB of it, and a bad one is named with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gcs_server import FakeGcsServer
from tests.sample_shards import CountingBucket, save_shard, save_shards, saved
from utils.base.errors import DataError, ShardError, TransientStorageError
from utils.data.shard_index import (
    ShardFacts,
    build_shard_index,
    describe_shard_changes,
    fingerprint_shards,
    read_shard_facts,
)
from utils.storage.bucket import ObjectInfo
from utils.storage.directory import DirectoryBucket
from utils.storage.open import open_bucket


def facts_of(directory: Path, data: bytes, name: str = "train_00000.npz") -> ShardFacts:
    (directory / name).write_bytes(data)
    bucket = DirectoryBucket(directory)
    info = bucket.stat(name)
    assert info is not None
    return read_shard_facts(bucket, info)


@settings(max_examples=50)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_bad_shard(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    with pytest.raises(ShardError):
        facts_of(tmp_path_factory.getbasetemp(), b"PK\x03\x04" + data)


def test_a_storage_error_is_not_mistaken_for_a_bad_shard(tmp_path: Path) -> None:
    class Failing(DirectoryBucket):
        def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> bytes:
            raise TransientStorageError("down")

    with pytest.raises(TransientStorageError):
        read_shard_facts(Failing(tmp_path), ObjectInfo("a.npz", 1000))


@pytest.mark.parametrize("compress", [False, True])
def test_facts_of_a_big_shard_cost_a_few_kilobytes(tmp_path: Path, compress: bool) -> None:
    ids = np.random.default_rng(0).integers(0, 50257, 5_000_000).astype(np.uint16)
    (np.savez_compressed if compress else np.savez)(tmp_path / "train_00000.npz", input_ids=ids)
    bucket = CountingBucket(tmp_path)
    info = next(bucket.list())
    assert info.size > 8_000_000
    assert read_shard_facts(bucket, info).tokens == 5_000_000
    assert bucket.bytes_read < 64 * 1024


def test_the_index_and_the_headers_tell_the_same(gcs: FakeGcsServer, sample_data: Path) -> None:
    for path in sample_data.iterdir():
        if path.name != "index.json":
            gcs.put_object("runs", f"data/{path.name}", path.read_bytes())
    bucket = open_bucket("gs://runs/data")
    read = build_shard_index(bucket)
    bucket.close()
    prepared = build_shard_index(DirectoryBucket(sample_data))

    assert prepared.training
    assert (read.training, read.validation) == (prepared.training, prepared.validation)
    assert read.tokenizer_files == prepared.tokenizer_files
    assert "tokenizer.json" in read.tokenizer_files
    assert (prepared.vocab_size, read.vocab_size) == (512, None)
    assert prepared.training_tokens == sum(shard.tokens for shard in prepared.training)


def test_validation_shards_are_held_back_and_max_files_takes_the_first(tmp_path: Path) -> None:
    for name in ("b.npz", "val_0.npz", "a.npz", "val_1.npz"):
        save_shard(tmp_path / name, input_ids=np.arange(3))
    (tmp_path / "c.npz").write_bytes(b"")  # bad, and past max_files not even read
    (tmp_path / "README.md").write_text("not a shard")
    bucket = DirectoryBucket(tmp_path)

    with pytest.raises(ShardError, match="c.npz"):
        build_shard_index(bucket)
    for options, names in (
        ({"skip_bad_shards": True}, ["a.npz", "b.npz"]),
        ({"max_files": 1}, ["a.npz"]),
    ):
        index = build_shard_index(bucket, **options)
        assert [shard.name for shard in index.training] == names
        assert [shard.name for shard in index.validation] == ["val_0.npz", "val_1.npz"]
        assert index.training_tokens == 3 * len(names)


def test_linked_shards_and_folders_count_and_a_link_to_nothing_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_shard(tmp_path / "disk" / "b.npz", input_ids=[1, 2])
    save_shard(tmp_path / "hash.npz", input_ids=[3, 4, 5])
    (tmp_path / "hash.npz").rename(tmp_path / "hash")
    (tmp_path / "data").mkdir()
    for name, target in (("a.npz", "hash"), ("part", "disk"), ("gone", "unmounted")):
        (tmp_path / "data" / name).symlink_to(tmp_path / target)
    bucket = DirectoryBucket(tmp_path / "data")
    for _ in range(2):
        shards = build_shard_index(bucket).training
        assert [(shard.name, shard.tokens) for shard in shards] == [("a.npz", 3), ("part/b.npz", 2)]
    assert caplog.text.count("data/gone is a link to nothing: left out") == 1


def index_of(*shards: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"format": 1, "shards": list(shards), **changes}


SHARD = {"name": "b.npz", "tokens": 5, "size": 300, "crc32c": "AAAAAA=="}


def test_an_index_is_believed_without_reading_shards(tmp_path: Path) -> None:
    value = index_of(
        SHARD,
        {**SHARD, "name": "a.npz"},
        {**SHARD, "name": "val_a.npz"},
        vocab_size=77,
        summary={"unigram_entropy_nats": 6.5},
    )
    (tmp_path / "index.json").write_text(json.dumps(value))
    index = build_shard_index(DirectoryBucket(tmp_path))
    assert index.training == (
        ShardFacts("a.npz", 5, 300, "AAAAAA=="),
        ShardFacts("b.npz", 5, 300, "AAAAAA=="),
    )
    assert [shard.name for shard in index.validation] == ["val_a.npz"]
    assert (index.vocab_size, index.unigram_entropy) == (77, 6.5)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "null",
        json.dumps(index_of(SHARD, format=2)),
        json.dumps({"format": 1}),
        json.dumps(index_of({"name": "a.npz"})),
        json.dumps(index_of({**SHARD, "tokens": "many"})),
        json.dumps(index_of({**SHARD, "tokens": float("inf")})),
        json.dumps(index_of(SHARD, summary=[])),
    ],
)
def test_a_damaged_index_is_one_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json is not usable"):
        build_shard_index(DirectoryBucket(tmp_path))


@pytest.mark.parametrize("names", [[], ["val_a.npz"], ["readme.txt"]])
def test_a_bucket_without_training_shards_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(saved(input_ids=np.arange(3)))
    with pytest.raises(DataError, match="holds no training shards"):
        build_shard_index(DirectoryBucket(tmp_path))


def test_an_unfinished_preparation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task-00000").mkdir()
    (tmp_path / "task-00000" / "train_0.npz").write_bytes(saved(input_ids=np.arange(3)))
    (tmp_path / "index.partial.json").write_text("{}")
    with pytest.raises(DataError, match=r"a preparation that is not finished.* merge"):
        build_shard_index(DirectoryBucket(tmp_path))


def test_a_fingerprint_changes_with_every_fact(tmp_path: Path) -> None:
    shards = save_shards(tmp_path, [5, 6])
    known = {fingerprint_shards(shards), fingerprint_shards(shards[::-1])}
    first = shards[0]
    for changed in (
        ShardFacts("x.npz", first.tokens, first.size, first.crc32c),
        ShardFacts(first.name, 4, first.size, first.crc32c),
        ShardFacts(first.name, first.tokens, 1, first.crc32c),
        ShardFacts(first.name, first.tokens, first.size, None),
    ):
        known.add(fingerprint_shards([changed, shards[1]]))
    known.add(fingerprint_shards(shards[:1]))
    assert len(known) == 7


def test_a_changed_list_is_described_in_one_line() -> None:
    old = [ShardFacts(f"{n}.npz", 5, 9, None) for n in range(8)]
    new = [ShardFacts("0.npz", 6, 9, None), ShardFacts("9.npz", 5, 9, None)]
    assert describe_shard_changes(old, new) == (
        "7 missing (1.npz, 2.npz, 3.npz, 4.npz, 5.npz, ...); 1 new (9.npz); 1 changed (0.npz)"
    )
    assert describe_shard_changes(old, old) == ""
