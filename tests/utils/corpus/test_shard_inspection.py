"""Indexes from headers, and the close look at shards from anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.sample_shards import BAD_HEADERS, BAD_TOKENS, saved
from utils.base.errors import DataError, UsageError
from utils.corpus.shard_inspection import build_index_file, inspect_shards
from utils.corpus.tokenization import build_tokenizer
from utils.data.shard_index import build_shard_index
from utils.models.tokenizer import write_tokenizer_files
from utils.storage.directory import DirectoryBucket

TEXT = "A sentence that comes again and again, about shards. " * 50


@pytest.fixture
def shards(tmp_path: Path) -> DirectoryBucket:
    root = tmp_path / "shards"
    (root / "sub").mkdir(parents=True)
    (root / "a.npz").write_bytes(saved(input_ids=np.arange(100, dtype=np.int64)))
    (root / "b.npz").write_bytes(saved(tokens=np.arange(60, dtype=">u2").reshape(6, 10)))
    mask = np.ones((5, 8, 1), np.uint8)
    mask[0] = 0
    (root / "sub" / "c.npz").write_bytes(
        saved(input_ids=np.ones((5, 8, 1), np.int32), attention_mask=mask)
    )
    (root / "val_a.npz").write_bytes(saved(arr_0=np.arange(7, dtype=np.uint8)))
    return DirectoryBucket(root)


def test_an_index_from_headers_is_the_one_that_training_finds_without_it(
    shards: DirectoryBucket,
) -> None:
    without = build_shard_index(shards)
    looks = {shard.name: shard for shard in inspect_shards(shards).shards}
    arrays = [(array.key, array.shape, array.dtype) for array in looks["sub/c.npz"].arrays]
    assert arrays == [("input_ids", (5, 8, 1), "int32"), ("attention_mask", (5, 8, 1), "uint8")]
    assert looks["sub/c.npz"].tokens == 32
    index = build_index_file(shards, vocab_size=200)
    found = build_shard_index(shards)

    assert (found.training, found.validation) == (without.training, without.validation)
    assert found.vocab_size == 200
    assert {entry["name"]: entry["dtype"] for entry in index["shards"]} == {
        "a.npz": "int64",
        "b.npz": "uint16",
        "sub/c.npz": "int32",
        "val_a.npz": "uint8",
    }
    assert index["summary"] == {
        "tokens": 199,
        "training_tokens": 192,
        "validation_tokens": 7,
    }


def test_an_index_again_is_the_same_and_one_that_was_prepared_is_kept(
    shards: DirectoryBucket,
) -> None:
    build_index_file(shards)
    first = shards.read_bytes("index.json")
    build_index_file(shards)
    assert shards.read_bytes("index.json") == first
    shards.put_bytes("index.json", b'{"source_fingerprint": "x"}')
    with pytest.raises(UsageError, match="--overwrite"):
        build_index_file(shards)
    build_index_file(shards, overwrite=True)
    assert shards.read_bytes("index.json") == first


def test_the_tokenizer_beside_the_shards_is_described(shards: DirectoryBucket) -> None:
    tokenizer = build_tokenizer([TEXT], 300)
    write_tokenizer_files(tokenizer.files, shards.root)
    index = build_index_file(shards)

    assert index["vocab_size"] == tokenizer.vocab_size
    assert (index["eos_token_id"], index["tokenizer_sha256"]) == (0, tokenizer.sha256)
    assert index["tokenizer_files"] == ["tokenizer.json", "tokenizer_config.json"]


def test_bad_shards_are_named_with_the_reason(shards: DirectoryBucket) -> None:
    data, reason = BAD_HEADERS["float array"]
    (shards.root / "bad.npz").write_bytes(data)
    with pytest.raises(DataError) as caught:
        build_index_file(shards)
    inspection = inspect_shards(shards)

    assert "bad.npz: " in str(caught.value)
    assert reason in str(caught.value)

    assert not (shards.root / "index.json").exists()
    (bad,) = inspection.bad
    assert bad.name == "bad.npz"
    assert reason in str(bad.problem)


@pytest.mark.parametrize("name", ["id at the vocabulary", "negative id", "flipped bit"])
def test_bad_tokens_are_found_when_everything_is_read(shards: DirectoryBucket, name: str) -> None:
    build_index_file(shards, vocab_size=100)
    data, reason = BAD_TOKENS[name]
    (shards.root / "a.npz").write_bytes(data)
    (shards.root / "index.json").write_bytes(
        (shards.root / "index.json").read_bytes().replace(b'"name": "a.npz"', b'"name": "gone.npz"')
    )
    assert [shard.name for shard in inspect_shards(shards).bad] == ["gone.npz"]
    problems = {shard.name: shard.problem for shard in inspect_shards(shards, verify=True).bad}
    assert reason in str(problems["a.npz"])
    assert "it is gone" in str(problems["gone.npz"])
    (shards.root / "b.npz").write_bytes(saved(input_ids=np.arange(59)))
    assert "index.json says" in str(inspect_shards(shards).bad[0].problem)


def test_text_is_shown_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    bucket = DirectoryBucket(tmp_path)
    tokenizer = build_tokenizer([TEXT], 300)
    write_tokenizer_files(tokenizer.files, tmp_path)
    ids = np.array(tokenizer.build_backend().encode(TEXT).ids, ">i4")
    np.savez(tmp_path / "a.npz", input_ids=ids)
    np.savez_compressed(tmp_path / "b.npz", input_ids=ids)
    for text in inspect_shards(bucket).samples.values():
        assert len(text) > 60
        assert TEXT.startswith(text)


def test_nothing_there_is_a_data_error(tmp_path: Path) -> None:
    for use in (build_index_file, inspect_shards):
        with pytest.raises(DataError, match="no shards"):
            use(DirectoryBucket(tmp_path / "none"))
