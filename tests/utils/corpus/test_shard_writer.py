import weakref
from pathlib import Path

import numpy as np
import pytest

from utils.base.errors import StorageError
from utils.corpus.shard_writer import ShardWriter, write_shard
from utils.storage.bucket import ObjectInfo, crc32c_of_file
from utils.storage.directory import DirectoryBucket


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.uint16)


def load(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["input_ids"]
        return archive["input_ids"]


@pytest.mark.parametrize("compress", [False, True])
def test_shard_loads_with_numpy_and_is_the_same_bytes_each_time(
    tmp_path: Path, compress: bool
) -> None:
    tokens = np.arange(50_000, dtype=np.uint32) % 70_000
    for name in ("a.npz", "b.npz"):
        write_shard(tmp_path / name, tokens, compress)

    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert load(tmp_path / "a.npz").dtype == np.uint32
    assert np.array_equal(load(tmp_path / "a.npz"), tokens)


def test_shards_end_with_the_document_that_fills_them(tmp_path: Path) -> None:
    writer = ShardWriter(DirectoryBucket(tmp_path), vocab_size=10, shard_tokens=4)
    for document, split in [
        (ids(1, 2, 0), "train"),
        (ids(9, 0), "val"),
        (ids(3, 4, 5, 6, 0), "train"),
        (ids(7, 0), "train"),
    ]:
        writer.add(document, split)
    progress = writer.finish()

    assert load(tmp_path / "train_00000.npz").tolist() == [1, 2, 0, 3, 4, 5, 6, 0]
    assert load(tmp_path / "train_00001.npz").tolist() == [7, 0]
    assert load(tmp_path / "val_00000.npz").tolist() == [9, 0]
    assert progress.token_counts.tolist() == [3, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert {(shard.name, shard.documents, shard.tokens) for shard in progress.shards} == {
        ("train_00000.npz", 2, 8),
        ("train_00001.npz", 1, 2),
        ("val_00000.npz", 1, 2),
    }
    for shard in progress.shards:
        path = tmp_path / shard.name
        assert (shard.size, shard.crc32c) == (path.stat().st_size, crc32c_of_file(path))


class LosingBucket(DirectoryBucket):
    """A bucket that stores something else than it was given."""

    def put_file(self, name: str, path: Path) -> ObjectInfo:
        path.write_bytes(path.read_bytes()[:-1])
        return super().put_file(name, path)


def test_a_shard_that_waits_keeps_nothing_but_its_own_documents(tmp_path: Path) -> None:
    """Documents come as slices of all that was tokenized at a time."""
    batch = ids(*range(1000))
    kept, writer = weakref.ref(batch), ShardWriter(DirectoryBucket(tmp_path), 1000, 100)
    writer.add(batch[10:12], "val")
    del batch
    assert kept() is None
    writer.finish()
    assert load(tmp_path / "val_00000.npz").tolist() == [10, 11]


def test_shard_that_arrives_changed_is_an_error(tmp_path: Path) -> None:
    writer = ShardWriter(LosingBucket(tmp_path), vocab_size=10, shard_tokens=1)

    with pytest.raises(StorageError, match=r"train_00000\.npz is not what was written"):
        writer.add(ids(1), "train")
