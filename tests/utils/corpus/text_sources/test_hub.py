import json
from pathlib import Path

import datasets
import pytest

from utils.base.errors import DataError
from utils.corpus.documents import NullText
from utils.corpus.text_sources.hub import HubSource


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_hugging_face_dataset_gives_the_column_of_its_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", {"text": "a", "n": 1}, {"text": None, "n": 2})
    name = str(tmp_path / "data")

    text, null = HubSource(name).documents()
    assert text == "a"
    assert isinstance(null, NullText)
    assert "--split train, row 2: column 'text' is null" in null
    with pytest.raises(DataError, match="no column 'body'. Columns: text, n"):
        list(HubSource(name, text_column="body").documents())
    with pytest.raises(DataError, match="cannot be loaded"):
        list(HubSource(name, split="nowhere", streaming=True).documents())


def test_a_stream_that_does_not_know_its_columns_is_read_and_a_wrong_one_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a", "n": 1}]))
    assert stream.column_names is None
    monkeypatch.setattr(HubSource, "_open", lambda self: stream)

    assert list(HubSource("web").documents()) == ["a"]
    with pytest.raises(DataError, match="train: no column 'body'. Columns: text, n"):
        list(HubSource("web", text_column="body").documents())


def test_fingerprint_of_a_local_dataset_follows_linked_folders(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "a.txt").write_text("a")
    before = HubSource(str(tmp_path / "data")).fingerprint()
    (tmp_path / "disk" / "a.txt").write_text("b")
    assert HubSource(str(tmp_path / "data")).fingerprint() != before
