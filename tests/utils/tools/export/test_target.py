"""Where an exported model goes: whole or not there, and never over something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gcs_server import FakeGcsServer
from utils.base.errors import LockedError, StorageError, UsageError
from utils.storage.directory import DirectoryBucket
from utils.tools.export.target import BucketTarget, DiskTarget, is_export_file, open_target

OLD = {"config.json": "old", "README.md": "old", "model.safetensors": "old"}
NEW = {
    "config.json": "new",
    "model-00001-of-00002.safetensors": "new",
    "model.safetensors.index.json": "new",
}


def export(target: DiskTarget | BucketTarget, files: dict[str, str]) -> None:
    target.require_free()
    with target.staging() as staged:
        for name, text in files.items():
            (staged / name).write_text(text)
        target.publish(staged, lambda stage, done, total: None)


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def disk(path: Path, *, overwrite: bool = False) -> DiskTarget | BucketTarget:
    return open_target(str(path), path.parent / "scratch", overwrite=overwrite)


def test_a_folder_appears_whole_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    target = disk(tmp_path / "far" / "model")

    def fail() -> None:
        with target.staging() as staged:
            (staged / "config.json").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list((tmp_path / "far").iterdir())
    export(target, OLD)
    assert read(tmp_path / "far" / "model") == OLD
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model", "model.gguf"])
def test_the_name_of_an_export_is_on_disk_before_what_it_replaces_is_removed(
    name: str, tmp_path: Path, disk_calls: list[str]
) -> None:
    path, files = tmp_path / name, {"model.gguf": "GGUF"} if "." in name else NEW
    export(disk(path), files)
    disk_calls.clear()
    export(disk(path, overwrite=True), files)
    synced = disk_calls.index(f"fsync {tmp_path.name}")
    kinds = [call.split()[0] for call in disk_calls]
    assert {"rename", "replace"} & set(kinds[:synced])
    assert not {"rename", "replace"} & set(kinds[synced:])
    assert "unlink" not in kinds[:synced]


def test_an_exported_model_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()  # an empty folder is free
    export(disk(path), OLD)
    with pytest.raises(UsageError, match="is there already.*--overwrite"):
        export(disk(path), NEW)
    assert read(path) == OLD
    export(disk(path, overwrite=True), NEW)
    assert read(path) == NEW
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (["config.json", "thesis.txt"], "holds thesis.txt"),
        (["config.json", "manifest.json"], "holds manifest.json"),
        (["config.json", "folder/x"], "has folders"),
        (["README.md"], "holds no config.json"),
        (["config.json", "README.md", "vocab.txt"], "holds no weights of a model"),
    ],
)
def test_what_is_no_exported_model_is_never_replaced(
    there: list[str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    for name in there:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{words}.*not replaced"):
        export(disk(path, overwrite=True), NEW)
    found = [one for one in path.rglob("*") if one.is_file()]
    assert sorted(str(one.relative_to(path)) for one in found) == sorted(there)
    assert {one.read_text() for one in found} == {"mine"}


@pytest.mark.parametrize("name", ["model", "model.gguf"])
def test_what_came_while_the_model_was_written_is_not_replaced(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    target = disk(path)
    target.require_free()
    with target.staging() as staged:
        (staged / ("config.json" if name == "model" else name)).write_text("new")
        if name == "model":
            path.mkdir()
        mine = path / "thesis.txt" if path.is_dir() else path
        mine.write_text("mine")
        with pytest.raises(UsageError, match="is there already"):
            target.publish(staged, lambda stage, done, total: None)
    assert mine.read_text() == "mine"


def test_what_came_into_a_bucket_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    bucket = DirectoryBucket(tmp_path / "bucket")
    target = BucketTarget(bucket, "gs://runs/model", tmp_path / "scratch", None, overwrite=False)
    target.require_free()
    with target.staging() as staged:
        (staged / "config.json").write_text("new")
        (tmp_path / "bucket").mkdir(exist_ok=True)
        (tmp_path / "bucket" / "config.json").write_text("mine")
        with pytest.raises(UsageError, match=r"holds config\.json already"):
            target.publish(staged, lambda stage, done, total: None)
    assert (tmp_path / "bucket" / "config.json").read_text() == "mine"


def test_a_file_is_replaced_only_by_a_file_of_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    export(disk(path), {"small.gguf": "GGUF 1"})
    with pytest.raises(UsageError, match="is there already"):
        disk(path).require_free()
    export(disk(path, overwrite=True), {"small.gguf": "GGUF 2"})
    assert path.read_text() == "GGUF 2"
    path.write_text("a thesis")
    with pytest.raises(UsageError, match="is no GGUF file"):
        disk(path, overwrite=True).require_free()
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(UsageError, match="is no file"):
        disk(tmp_path / "folder.gguf", overwrite=True).require_free()
    (tmp_path / "text").write_text("a file")
    with pytest.raises(UsageError, match="is a file: not replaced"):
        disk(tmp_path / "text", overwrite=True).require_free()
    with pytest.raises(UsageError, match="text is a file"):
        disk(tmp_path / "text" / "model").require_free()


def test_a_checkpoint_is_no_place_for_an_export(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="lies in a checkpoint"):
        disk(tmp_path / "export" / "model").require_free()


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path) -> None:
    target = disk(tmp_path / "model")
    with target.staging() as staged:
        with pytest.raises(LockedError, match="Another export"), target.staging():
            pass
        assert staged.is_dir()
    export(target, NEW)


def test_what_a_killed_export_left_is_cleared(tmp_path: Path) -> None:
    leftover = tmp_path / ".model.exporting" / "model"
    leftover.mkdir(parents=True)
    (leftover / "half.safetensors").write_text("half")
    export(disk(tmp_path / "model"), NEW)
    assert read(tmp_path / "model") == NEW
    assert not leftover.parent.exists()


def test_a_folder_that_was_being_replaced_when_the_process_died_comes_back(tmp_path: Path) -> None:
    export(disk(tmp_path / "model"), OLD)
    (tmp_path / "model").rename(tmp_path / ".model.replaced")
    with pytest.raises(UsageError, match="is there already"):
        disk(tmp_path / "model").require_free()
    assert read(tmp_path / "model") == OLD


def test_a_failed_rename_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(disk(tmp_path / "model"), OLD)
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.parent.name == ".model.exporting":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        export(disk(tmp_path / "model", overwrite=True), NEW)
    assert read(tmp_path / "model") == OLD


def test_a_file_in_a_bucket_is_one_object(gcs: FakeGcsServer, tmp_path: Path) -> None:
    uri = "gs://runs/models/small.gguf"
    gcs.put_object("runs", "models/notes.txt", b"kept")
    export(open_target(uri, tmp_path, overwrite=False), {"small.gguf": "GGUF 1"})
    with pytest.raises(UsageError, match="already"):
        open_target(uri, tmp_path, overwrite=False).require_free()
    export(open_target(uri, tmp_path, overwrite=True), {"small.gguf": "GGUF 2"})
    assert gcs.read_object("runs", "models/small.gguf") == b"GGUF 2"
    assert gcs.read_object("runs", "models/notes.txt") == b"kept"


class Recorder(DirectoryBucket):
    """Notes what is done to it, in order; fails at a name."""

    def __init__(self, root: Path, fail_at: str = "") -> None:
        super().__init__(root)
        self.done: list[str] = []
        self.fail_at = fail_at

    def put_file(self, name: str, path: Path) -> Any:
        if name == self.fail_at:
            raise StorageError("the line is cut")
        self.done.append(f"put {name}")
        return super().put_file(name, path)

    def delete(self, name: str) -> None:
        self.done.append(f"delete {name}")
        super().delete(name)


def test_a_model_in_a_bucket_is_no_model_while_it_is_replaced(tmp_path: Path) -> None:
    bucket = Recorder(tmp_path / "bucket")
    there = tmp_path / "bucket"

    def target(*, overwrite: bool) -> BucketTarget:
        return BucketTarget(bucket, "gs://b/m", tmp_path / "scratch", None, overwrite)

    export(target(overwrite=False), OLD)
    bucket.done.clear()
    bucket.fail_at = "model.safetensors.index.json"
    with pytest.raises(StorageError):
        export(target(overwrite=True), NEW)
    assert bucket.done[0] == "delete config.json"
    assert not {"config.json", "model.safetensors"} & set(read(there))
    # The same command goes on.
    bucket.fail_at = ""
    export(target(overwrite=True), NEW)
    assert read(there) == NEW
    assert bucket.done[-1] == "put config.json"
    (there / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds thesis\.txt"):
        export(target(overwrite=True), NEW)


@pytest.mark.parametrize("output", ["s3://bucket/x", " ", "gs://small.gguf"])
def test_what_is_no_place_is_refused(output: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--output"):
        open_target(output, tmp_path, overwrite=False)


def test_the_files_of_an_export_are_known_by_name() -> None:
    own = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", *OLD, *NEW]
    assert all(map(is_export_file, own))
    assert not any(map(is_export_file, ["optimizer.bin", "manifest.json", "x/config.json", "a.py"]))
