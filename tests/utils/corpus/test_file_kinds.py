import gzip
import json
from pathlib import Path

import pytest

from utils.base.errors import DataError, UsageError
from utils.corpus.file_kinds import find_files
from utils.corpus.text_sources.files import FileSource


def find_paths(*patterns: object) -> list[Path]:
    return [path for path, _ in find_files(map(str, patterns))]


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_directories_and_globs_are_searched_in_sorted_order_and_each_file_is_read_once(
    tmp_path: Path,
) -> None:
    for name in ("b.txt", "a.JSONL.gz", "sub/c.parquet", "picture.png", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*patterns: str) -> list[str]:
        return [path.name for path in find_paths(*patterns)]

    assert names(str(tmp_path)) == ["a.JSONL.gz", "b.txt", "c.parquet"]
    assert names(f"{tmp_path}/*.txt", str(tmp_path)) == ["b.txt", "a.JSONL.gz", "c.parquet"]
    assert names(f"{tmp_path}/**") == ["a.JSONL.gz", "b.txt", "c.parquet"]
    assert names(f"{tmp_path}/**/*.parquet") == ["c.parquet"]
    assert names(str(tmp_path / "picture.png")) == ["picture.png"]


@pytest.mark.parametrize("folder", ["x[1]", "a*b", "what?", "# 1"])
def test_a_name_that_exists_as_written_is_no_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (folder, "x1", "axxb", "what1"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "c.txt").write_text(name)
    wanted = [tmp_path / folder / "sub" / "c.txt"]
    assert find_paths(f"./{folder}/s?b/*.txt") == wanted
    assert find_paths(f"{tmp_path}/{folder}/**/c.[s-u]xt") == wanted


def test_a_path_may_name_its_column_unless_it_exists_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "a.jsonl::old"):
        write_jsonl(tmp_path / name, {"text": "a"})
    found = find_files(["a.jsonl::body", "?.jsonl", "a.jsonl::old", "a.jsonl::body"])
    assert [(path.name, column) for path, column in found] == [
        ("a.jsonl", "body"),
        ("a.jsonl", "text"),
        ("b.jsonl", "text"),
        ("a.jsonl::old", "text"),
    ]
    for pattern in ("nowhere.jsonl::body", "a.jsonl::"):
        with pytest.raises(UsageError, match="no such file or directory"):
            find_files([pattern])


def test_what_a_directory_holds_besides_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "c4.json", {"body": "a"}, {"body": "b"})
    write_jsonl(tmp_path / "one.json", {"text": "a"})
    write_jsonl(tmp_path / "version.json", {"version": 1})
    (tmp_path / "array.json").write_text('[{"text": "a"}]')
    (tmp_path / "dataset_infos.json").write_text('{\n"text": 1}')
    for name in ("a.csv", "a.png", "b.png", "c.png"):
        (tmp_path / name).touch()

    found = [path.name for path in find_paths(tmp_path)]
    assert found == ["array.json", "c4.json", "one.json"]
    assert "6 files not read: " in caplog.text
    assert all(name in caplog.text for name in ("a.csv", "dataset_infos.json", " and 1 more."))
    with caplog.at_level("INFO"):
        FileSource((tmp_path / "a.png", tmp_path / "c4.json"))
    assert f"Taken for text by content: {tmp_path / 'a.png'}." in caplog.text
    (tmp_path / "only").mkdir()
    (tmp_path / "a.csv").rename(tmp_path / "only" / "a.csv")
    with pytest.raises(UsageError, match=r"nothing to read there but \S+a\.csv"):
        find_files([str(tmp_path / "only")])


def test_a_link_is_called_as_the_user_sees_it_and_linked_folders_are_searched(
    tmp_path: Path,
) -> None:
    for folder in ("blobs", "disk/deep", "data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "blobs" / "b1946").write_bytes(gzip.compress(b'{"text": "a"}\n', mtime=0))
    (tmp_path / "disk" / "deep" / "c.txt").write_text("c")
    (tmp_path / "data" / "x.jsonl.gz").symlink_to("../blobs/b1946")
    (tmp_path / "data" / "again.jsonl.gz").symlink_to("../blobs/b1946")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "deep" / "circle").symlink_to(tmp_path / "data")

    for pattern in ("data", "data/**"):
        found = find_paths(tmp_path / pattern)
        assert [str(path.relative_to(tmp_path / "data")) for path in found] == [
            "again.jsonl.gz",
            "linked/deep/c.txt",
        ]
        assert list(FileSource(tuple(found)).documents()) == ["a", "c"]
    (tmp_path / "data" / "part").symlink_to("../unmounted")
    with pytest.raises(DataError, match=r"part: it is a link to \.\./unmounted, which is not"):
        find_files([str(tmp_path / "data")])


@pytest.mark.parametrize("name", ["missing.txt", "*.nothing", "empty"])
def test_input_with_nothing_there_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(UsageError, match="--input"):
        find_files([str(tmp_path / name)])
