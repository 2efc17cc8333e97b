"""put, get, list, remove: verified, again at will, and nothing outside."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.gcs_server import FakeGcsServer, Fault
from tests.sample_json import UNREADABLE
from tests.sample_shards import flip_bit
from utils.base.errors import DataError, ExitCode, StorageError, TransientStorageError, UsageError
from utils.data.transfer import (
    Found,
    find_objects,
    get_tree,
    put_tree,
    remove_objects,
    require_safe_name,
)
from utils.storage.bucket import Bucket, ObjectInfo, crc32c_of_file
from utils.storage.directory import DirectoryBucket
from utils.storage.open import open_bucket

HOSTILE = ["../a", "a/../../b", "/etc/a", "-rf", "a/-rf", "a*b", "$(x)", "a\nb", "a\x1b[2Jb"]
HOSTILE += ["a//b", "", ".", "a\\b", "a;b", "a`b`", "\ud800", "a/" * 512 + "a"]
HOSTILE += ["a#1", "a?b", "a[1]", "a/", "//a", "a/" + "x" * 256, "\u6587" * 86]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "index.json").write_text("{}")
    (root / "a.npz").write_bytes(os.urandom(100_000))
    (root / "sub" / "d\u00e9j\u00e0 vu.txt").write_text("text")
    (root / "sub" / "deep" / "empty").touch()
    (root / ".tmp-1234").write_bytes(b"left by a crash")
    return root


@pytest.fixture(params=["directory", "gcs"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "directory":
        return str(tmp_path / "target")
    request.getfixturevalue("gcs")
    return "gs://runs/some/data"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".tmp-")
    }


def put(source: Path, uri: str, **options: object) -> tuple[int, int]:
    with closing(open_bucket(uri)) as bucket:
        report = put_tree(source, bucket, **options)
    return report.files, report.skipped_files


def get(uri: str, directory: Path) -> tuple[int, int]:
    found = find_objects(uri)
    with closing(found.bucket):
        report = get_tree(found, directory)
    return report.files, report.skipped_files


def test_there_and_back_again_is_the_same_and_only_what_differs_is_copied_again(
    tree: Path, target: str, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int | None]] = []
    assert put(tree, target, on_progress=lambda *values: seen.append(values)) == (4, 0)
    total = sum(map(len, contents(tree).values()))
    assert seen[-1] == ("Uploading", total, total)
    assert get(target, tmp_path / "back") == (4, 0)
    assert contents(tmp_path / "back") == contents(tree)
    assert put(tree, target) == (4, 4)
    assert get(target, tmp_path / "back") == (4, 4)
    flip_bit(tree / "a.npz")  # the same size
    assert put(tree, target) == (4, 3)
    assert get(target, tmp_path / "back") == (4, 3)
    assert contents(tmp_path / "back") == contents(tree)


def test_one_file_goes_and_comes_by_its_name(tree: Path, target: str, tmp_path: Path) -> None:
    assert put(tree / "a.npz", target) == (1, 0)
    assert get(f"{target}/a.npz", tmp_path / "back") == (1, 0)
    assert (tmp_path / "back" / "a.npz").read_bytes() == (tree / "a.npz").read_bytes()


def test_removing_leaves_nothing_but_the_neighbours(
    tree: Path, target: str, tmp_path: Path
) -> None:
    put(tree, f"{target}/one")
    put(tree, f"{target}/oneself")
    found = find_objects(f"{target}/one")
    with closing(found.bucket):
        remove_objects(found)

    with pytest.raises(UsageError, match="nothing is there"):
        find_objects(f"{target}/one")
    assert get(f"{target}/oneself", tmp_path / "back") == (4, 0)
    assert not (Path(target) / "one").exists()


class RecordingBucket(DirectoryBucket):
    """A bucket that remembers what was done in which order, and may fail."""

    def __init__(self, root: Path, fails_at: str | None = None) -> None:
        super().__init__(root)
        self.fails_at = fails_at
        self.done: list[str] = []

    def put_file(self, name: str, path: Path) -> ObjectInfo:
        if name == self.fails_at:
            raise StorageError(f"{name}: connection lost.")
        self.done.append(name)
        return super().put_file(name, path)

    def delete(self, name: str) -> None:
        self.done.append(name)
        super().delete(name)


def test_the_index_is_put_last_and_removed_first(tree: Path, tmp_path: Path) -> None:
    bucket = RecordingBucket(tmp_path / "b")
    put_tree(tree, bucket)
    remove_objects(Found(bucket, tuple(bucket.list())))
    assert bucket.done[3] == bucket.done[4] == "index.json"


def test_a_file_that_its_index_does_not_vouch_for_stays_where_it_is(
    tree: Path, target: str, tmp_path: Path
) -> None:
    folder = "sub/"
    said = crc32c_of_file(tree / "a.npz")
    index = {"shards": [{"name": "deep/x.npz", "crc32c": said}, {"name": "y", "crc32c": None}]}
    (tree / folder / "deep").mkdir(exist_ok=True)
    shutil.copy(tree / "a.npz", tree / folder / "deep" / "x.npz")
    (tree / folder / "index.json").write_text(json.dumps(index))
    put(tree, target)
    flip_bit(tree / folder / "deep" / "x.npz")
    with pytest.raises(
        DataError, match=rf"{folder}deep/x.npz is damaged or was replaced"
    ) as caught:
        put(tree, target)
    assert caught.value.exit_code == ExitCode.USAGE
    with closing(open_bucket(target)) as bucket:
        bucket.put_file(f"{folder}deep/x.npz", tree / folder / "deep" / "x.npz")
    with pytest.raises(DataError, match=f"{folder}deep/x.npz is damaged or was replaced"):
        get(target, tmp_path / "back")
    assert not (tmp_path / "back" / folder / "index.json").exists()
    assert not (tmp_path / "back" / folder / "deep" / "x.npz").exists()


def test_an_index_that_cannot_be_read_is_not_copied_over_a_good_one(
    tree: Path, target: str, tmp_path: Path
) -> None:
    put(tree, target)
    get(target, tmp_path / "back")
    before = contents(tmp_path / "back")
    (tree / "index.json").write_bytes(UNREADABLE["torn"])
    with pytest.raises(DataError, match="index.json is not usable"):
        put(tree, target)
    with closing(open_bucket(target)) as bucket:
        bucket.put_file("index.json", tree / "index.json")
    with pytest.raises(DataError, match="index.json is not usable"):
        get(target, tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_an_interrupted_upload_has_no_index_and_goes_on(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="connection lost"):
        put_tree(tree, RecordingBucket(tmp_path / "b", "a.npz"))
    assert not (tmp_path / "b" / "index.json").exists()
    put_tree(tree, DirectoryBucket(tmp_path / "b"))
    assert contents(tmp_path / "b") == contents(tree)


def test_a_large_upload_goes_on_inside_the_file_after_a_lost_connection(
    tmp_path: Path, gcs: FakeGcsServer
) -> None:
    data = os.urandom(12 * 2**20)
    (tmp_path / "large.npz").write_bytes(data)
    fault = gcs.add_fault(Fault("reset", times=1, operation="upload.chunk", after_bytes=9 * 2**20))
    put(tmp_path / "large.npz", "gs://runs/x")

    assert fault.fired == 1
    assert gcs.read_object("runs", "x/large.npz") == data
    assert len(gcs.requests("upload.start")) == 1  # the same session


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        require_safe_name(name)
    assert str(caught.value).isprintable()


def test_plain_names_are_not() -> None:
    for name in ("a", "a.b-c_d/e f", "d\u00e9j\u00e0/\u4f60.npz", ".hidden", "a=1,b@2"):
        assert require_safe_name(name) == name


def test_hostile_objects_are_refused_with_nothing_written(
    tmp_path: Path, gcs: FakeGcsServer
) -> None:
    gcs.put_object("runs", "x/fine", b"1")
    gcs.put_object("runs", "x/ok/../../out", b"2")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="is not a name to copy"):
        get("gs://runs/x", tmp_path / "back")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_both_file_and_directory_is_refused_with_nothing_written(
    tmp_path: Path, gcs: FakeGcsServer
) -> None:
    for name in ("x/a", "x/a/b/c.npz", "x/fine"):
        gcs.put_object("runs", name, b"1")
    with pytest.raises(UsageError, match="has 'a' and 'a/b/c.npz', and a file cannot be"):
        get("gs://runs/x", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_folders_of_the_cloud_console_are_no_files(tmp_path: Path, gcs: FakeGcsServer) -> None:
    for name, data in {"": b"", "sub/": b"", "sub/a.npz": b"1", "sub/deep/": b""}.items():
        gcs.put_object("runs", f"x/{name}", data)
    assert get("gs://runs/x", tmp_path / "back") == (1, 0)
    assert contents(tmp_path / "back") == {"sub/a.npz": b"1"}
    assert get("gs://runs/x/sub/a.npz", tmp_path / "one") == (1, 0)
    gcs.put_object("runs", "y/", b"")
    with pytest.raises(UsageError, match="nothing is there"):
        find_objects("gs://runs/y")


def test_hostile_files_are_refused_with_nothing_put(tree: Path, target: str) -> None:
    (tree / "$(touch x)").touch()
    with pytest.raises(UsageError, match="is not a name to copy"):
        put(tree, target)
    with pytest.raises(UsageError, match="nothing is there"):
        find_objects(target)


def test_a_link_that_leads_out_of_the_directory_is_not_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "back" / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="leads out"):
        get(str(tree), tmp_path / "back")
    assert list((tmp_path / "outside").iterdir()) == []


def test_linked_folders_are_copied_and_never_emptied(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "more").mkdir(parents=True)
    (tmp_path / "disk" / "more" / "b.npz").write_bytes(b"b")
    (tree / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "more" / "circle").symlink_to(tree)
    put(tree, str(tmp_path / "target"))
    names = [
        "a.npz",
        "index.json",
        "linked/more/b.npz",
        "sub/deep/empty",
        "sub/d\u00e9j\u00e0 vu.txt",
    ]
    assert sorted(contents(tmp_path / "target")) == names
    found = find_objects(str(tree))
    assert [info.name for info in found.objects] == names
    with pytest.raises(UsageError, match=r"linked/more/b\.npz leads out"):
        remove_objects(found)
    assert (tree / "index.json").exists()
    assert (tmp_path / "disk" / "more" / "b.npz").exists()


def test_a_download_that_was_killed_leaves_nothing_after_the_next(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """As a SIGKILL: nobody cleans up."""

    def killed(self: Path, target: Path) -> Path:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            get(str(tree), tmp_path / "back")
    assert any(path.name.startswith(".tmp-") for path in (tmp_path / "back").rglob("*"))
    get(str(tree), tmp_path / "back")
    assert not [path for path in (tmp_path / "back").rglob("*") if path.name.startswith(".tmp-")]


class Flipping(DirectoryBucket):
    """Gets files of the right size with another last byte."""

    def put_file(self, name: str, path: Path) -> ObjectInfo:
        super().put_file(name, path)
        data = self.read_bytes(name)
        return self.put_bytes(name, bytes(byte ^ 1 for byte in data))


def test_an_object_that_is_not_the_file_is_an_error_and_gets_no_index(
    tree: Path, tmp_path: Path
) -> None:
    bucket = Flipping(tmp_path / "bucket")
    with pytest.raises(StorageError, match="is not what .* was: .* Run the same command again"):
        put_tree(tree, bucket)
    assert bucket.stat("index.json") is None


def test_what_changes_while_it_is_copied_is_an_error(tree: Path, tmp_path: Path) -> None:
    bucket = DirectoryBucket(tree)
    found = Found(bucket, (ObjectInfo("a.npz", 100_000, "AAAAAA=="),))
    with pytest.raises(StorageError, match="changed while it was copied"):
        get_tree(found, tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []


@pytest.mark.parametrize(
    "use",
    [
        lambda path: put_tree(path / "none", DirectoryBucket(path / "b")),
        lambda path: put_tree(path / "empty", DirectoryBucket(path / "b")),
        lambda path: get(str(path / "tree"), path / "tree" / "a.npz"),
        lambda path: find_objects(str(path / "none")),
    ],
)
def test_what_is_not_there_or_in_the_way_is_a_usage_error(
    tree: Path, tmp_path: Path, use: Callable[[Path], object]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        use(tmp_path)


def test_the_current_directory_is_not_removed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "sub")
    bucket: Bucket = DirectoryBucket(tree)
    with pytest.raises(UsageError, match="not removed"):
        remove_objects(Found(bucket, tuple(bucket.list())))
    assert (tree / "index.json").exists()


class FullDisk(DirectoryBucket):
    """Writes a part of a download, as a full disk does."""

    def get_file(self, name: str, path: Path) -> str:
        path.write_bytes(b"a part")
        raise TransientStorageError("No space left on device")


def test_a_download_that_fails_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    found = Found(FullDisk(tree), find_objects(str(tree)).objects)
    with pytest.raises(TransientStorageError, match="No space left"):
        get_tree(found, tmp_path / "back")
    assert not [path for path in (tmp_path / "back").rglob("*") if path.is_file()]


def test_a_disk_that_is_full_here_is_not_told_of_the_bucket(target: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"bytes")
    put_tree(tmp_path / "a", open_bucket(target))
    digest = hashlib.sha256(b"a").hexdigest()[:16]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f".tmp-{digest}").symlink_to("/dev/full")
    with pytest.raises(StorageError) as caught:
        get_tree(find_objects(target), tmp_path / "new")
    assert str(caught.value) == f"{tmp_path}/new/a: No space left on device."
    assert not list((tmp_path / "new").iterdir())


def test_names_of_any_language_go_and_come(target: str, tmp_path: Path) -> None:
    names = ["\u6587" * 85, "\u00e4 \u00f6 b", "x" * 255]
    for name in names:
        (tmp_path / "from" / name).mkdir(parents=True)
        (tmp_path / "from" / name / name).write_bytes(name.encode())
    put_tree(tmp_path / "from", open_bucket(target))
    get_tree(find_objects(target), tmp_path / "to")
    assert contents(tmp_path / "to") == contents(tmp_path / "from")
