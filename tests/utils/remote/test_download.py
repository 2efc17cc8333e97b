"""A checkpoint from the bucket is the one that was uploaded, or nothing at all is left of it."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from isal import igzip

from tests.processes import run_python
from tests.sample_checkpoints import RUN_ID, make_checkpoint, publish, seal
from utils.base.archive_formats import ARCHIVE_SUFFIXES, COMPRESSIONS
from utils.base.errors import (
    AccessDeniedError,
    CheckpointError,
    StorageError,
    TransientStorageError,
    UsageError,
)
from utils.base.uri import local_path
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import archive_object, read_json, read_manifest, sidecar_object
from utils.checkpoints.store import remove_leftovers, verify_checkpoint
from utils.checkpoints.views import is_verified_in
from utils.remote import archive_reading
from utils.remote.archive_reading import MAX_ATTEMPTS
from utils.remote.download import download_checkpoint
from utils.storage.bucket import Bucket, ObjectInfo
from utils.storage.directory import DirectoryBucket
from utils.uploads.archive import write_archive
from utils.uploads.job import UploadProgress, run_job
from utils.uploads.transports import TransportOptions
from utils.uploads.uploader import Uploader, find_unfinished

NAME = "checkpoint-epoch0-step50-files0"
OTHER = "checkpoint-epoch0-step60-files0"


class ScriptedBucket(DirectoryBucket):
    """A directory whose reads of one object go wrong as scripted: one entry a read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.faults: dict[str, list[Exception | Callable[[bytes], bytes]]] = {}
        self.reads: list[tuple[str, int]] = []

    def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self.reads.append((name, start))
        faults = self.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, Exception):
            raise fault
        data = super().read_bytes(name, start, length)
        return data if fault is None else fault(data)


class VouchingBucket(ScriptedBucket):
    """It knows the checksums of its objects, as gs:// does."""

    def stat(self, name: str) -> ObjectInfo | None:
        info = super().stat(name)
        return info and ObjectInfo(name, info.size, self.crc32c(name))


@dataclass
class Here:
    """A checkpoint where it was written, a bucket, and a machine that has neither of them."""

    source: Path
    bucket: ScriptedBucket
    directory: Path

    def upload(self, bucket: Bucket | None = None) -> None:
        """Upload as the trainer does, but in this process."""
        bucket = bucket or self.bucket
        journal = Journal(self.source.parent / "uploads.jsonl")
        options = TransportOptions(bucket.uri, "directory" if local_path(bucket.uri) else "python")
        with Uploader(
            options, journal, perform=lambda job, *_: run_job(job, UploadProgress())
        ) as uploader:
            uploader.submit(self.source)
            uploader.drain(60, lambda _: None)
        assert uploader.verified == [self.source.name]
        self.bucket.reads.clear()

    def fetch(self, name: str = NAME, using: Bucket | None = None, **options: Any) -> Path:
        journal = Journal(self.directory / "uploads.jsonl")
        return download_checkpoint(using or self.bucket, name, self.directory, journal, **options)

    def refuse(self, message: str, **options: Any) -> CheckpointError:
        """Fetch it, which is refused and leaves nothing."""
        with pytest.raises(CheckpointError, match=message) as caught:
            self.fetch(**options)
        assert_nothing_was_left(self.directory)
        return caught.value


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setattr(archive_reading, "FIRST_RETRY_SECONDS", 0.001)
    checkpoint = make_checkpoint(tmp_path / "source", 50)
    (checkpoint / "optimizer.bin").write_bytes(os.urandom(50_000))
    (checkpoint / "empty.json").write_bytes(b"")
    seal(checkpoint, 50)
    return Here(checkpoint, ScriptedBucket(tmp_path / "bucket"), tmp_path / "checkpoints")


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def assert_nothing_was_left(directory: Path) -> None:
    assert not directory.exists() or list(directory.iterdir()) == []


# What comes back.


def test_a_download_is_what_was_uploaded_known_as_verified_and_not_uploaded_again(
    here: Here,
) -> None:
    here.upload()
    progress: list[tuple[str, int, int]] = []
    found = here.fetch(on_progress=lambda *report: progress.append(report))

    assert found == here.directory / NAME
    assert contents(found) == contents(here.source)
    assert verify_checkpoint(found) == read_manifest(here.source)
    left = {path.name for path in here.directory.iterdir()}
    assert left == {NAME, "uploads.jsonl", "uploads.jsonl.lock"}
    archive_bytes = (here.bucket.root / archive_object(NAME)).stat().st_size
    total = read_manifest(here.source).total_bytes
    assert progress[0] == ("downloading", archive_bytes, archive_bytes)
    assert progress[-1] == ("unpacking", total, total)

    journal = Journal(here.directory / "uploads.jsonl")
    entry = journal.latest()[NAME]
    uploaded = Journal(here.source.parent / "uploads.jsonl").latest()[NAME]
    assert (entry.run_id, entry.state) == (RUN_ID, UploadState.VERIFIED)
    assert entry.details.items() <= uploaded.details.items()
    assert is_verified_in(here.bucket.uri, found, entry)
    assert find_unfinished(here.directory, journal, here.bucket.uri) == []


def test_a_journal_that_cannot_be_written_costs_only_a_second_upload(
    here: Here, caplog: pytest.LogCaptureFixture
) -> None:
    here.upload()
    here.directory.mkdir()
    found = download_checkpoint(here.bucket, NAME, here.directory, Journal(here.directory / NAME))
    assert verify_checkpoint(found)
    assert "will be uploaded again" in caplog.text


# What is there already.


def test_the_same_checkpoint_on_this_machine_is_left_as_it_is(here: Here) -> None:
    here.upload()
    found = here.fetch()
    here.bucket.reads.clear()
    assert here.fetch() == found
    assert here.bucket.reads == [(sidecar_object(NAME), 0)]


@pytest.mark.parametrize("damage", ["other", "file", "manifest", "link"])
def test_another_or_a_damaged_checkpoint_of_that_name_is_never_replaced(
    here: Here, damage: str
) -> None:
    here.upload()
    found = here.fetch()
    if damage == "other":
        shutil.rmtree(found)
        make_checkpoint(here.directory, 50, current_loss=1.0)
    elif damage == "link":
        found.rename(here.directory / "elsewhere")
        found.symlink_to(here.directory / "nowhere")
    elif damage == "file":
        os.truncate(found / "model.safetensors", 5)
    else:
        (found / "manifest.json").unlink()
    left = {path: path.lstat().st_ino for path in here.directory.rglob("*")}
    message = "but another one. Noth" if damage == "other" else "not a whole one.*Move it away"
    with pytest.raises(CheckpointError, match=f"exists and is not what .*{message}"):
        here.fetch()
    assert {path: path.lstat().st_ino for path in here.directory.rglob("*")} == left


def test_a_checkpoint_that_appears_meanwhile_is_not_replaced(here: Here) -> None:
    here.upload()

    def save(stage: str, done: int, total: int) -> None:
        if stage == "unpacking" and not (here.directory / NAME).exists():
            make_checkpoint(here.directory, 50, current_loss=1.0)

    with pytest.raises(CheckpointError, match="cannot be written"):
        here.fetch(on_progress=save)
    assert read_json(here.directory / NAME / "metadata.json")["current_loss"] == 1.0
    assert [path.name for path in here.directory.iterdir()] == [NAME]


# The name and the sidecar.


@pytest.mark.parametrize("name", ["", "..", "../x", f"../{NAME}", f"{NAME}/", f"{NAME}\n", "-rf"])
def test_what_is_no_checkpoint_name_is_refused_before_anything_is_read(
    here: Here, name: str
) -> None:
    with pytest.raises(UsageError, match="not a checkpoint name"):
        here.fetch(name)
    assert here.bucket.reads == []
    assert_nothing_was_left(here.directory)


UNUSABLE = "not a usable sidecar"
BAD_SIDECARS: list[tuple[str | None, Any, str]] = [
    (None, b"", UNUSABLE),
    (None, b'{"manifest": {', UNUSABLE),
    (None, b"[" * 100_000, UNUSABLE),
    (None, b"[1]", UNUSABLE),
    ("manifest", None, "no 'manifest'"),
    ("manifest", {"step": 60}, "it is of step 60"),
    ("manifest", {"files": {"../x": {"size": 1, "crc32c": ""}}}, "'../x'"),
    ("manifest", {"files": {"x": {"size": -9, "crc32c": ""}}}, "negative"),
    ("manifest", {"files": {}}, "names no files"),
    ("manifest", {"files": {"manifest.json": {"size": 1, "crc32c": ""}}}, "names manifest.json"),
    ("metadata", {"current_loss": 0.1}, "its metadata are not those"),
    ("metadata", None, "are not those that its manifest vouches for"),
    ("archive", None, "no 'archive'"),
    ("archive", [1], UNUSABLE),
    ("archive", {"format": ".tar.xz"}, "archive of the unknown format '.tar.xz'"),
    ("archive", {"size": -1}, "archive of -1 bytes"),
    ("archive", {"size": True}, "archive of True bytes"),
    ("archive", {"crc32c": None}, "crc32c None"),
]


@pytest.mark.parametrize(
    ("part", "change", "message"), BAD_SIDECARS, ids=[row[2] for row in BAD_SIDECARS]
)
def test_a_bad_sidecar_is_refused_and_no_archive_is_read(
    here: Here, part: str | None, change: Any, message: str
) -> None:
    here.upload()
    sidecar = json.loads(here.bucket.read_bytes(sidecar_object(NAME)))
    if part is not None:
        sidecar[part] = {**sidecar[part], **change} if isinstance(change, dict) else change
        if change is None:
            del sidecar[part]
    data = change if part is None else json.dumps(sidecar).encode()
    here.bucket.put_bytes(sidecar_object(NAME), data)
    here.bucket.reads.clear()
    error = here.refuse(message)
    assert str(error).startswith(f"{NAME} cannot be used: ")
    assert here.bucket.reads == [(sidecar_object(NAME), 0)]


def test_an_upload_that_lacks_a_half_is_refused(here: Here) -> None:
    here.upload()
    here.bucket.delete(archive_object(NAME))
    here.refuse("its archive is not in")
    here.bucket.delete(sidecar_object(NAME))
    here.refuse(f"{NAME} cannot be used: .*upload was not finished")


def test_a_sidecar_without_end_is_not_read_to_its_end(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.upload()
    monkeypatch.setattr(archive_reading, "MAX_SIDECAR_BYTES", 100)
    here.refuse("more than 100 bytes")


# The archive as bytes: nothing is opened that is not what the sidecar says.


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGED_ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "flipped": (flip, "is damaged .*it has crc32c"),
    "cut": (lambda data: data[:-100], "is damaged .*it has"),
    "longer": (lambda data: data + b"\0" * 100_000, "is damaged .*it has"),
    "empty": (lambda data: b"", "is damaged .*it has 0 bytes"),
}


@pytest.mark.parametrize("case", DAMAGED_ARCHIVES)
@pytest.mark.parametrize("kind", [ScriptedBucket, VouchingBucket])
def test_a_damaged_archive_is_never_opened(
    tmp_path: Path,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[ScriptedBucket],
    case: str,
) -> None:
    bucket = kind(tmp_path / "bucket")
    here.upload(bucket)
    damage, message = DAMAGED_ARCHIVES[case]
    bucket.put_bytes(archive_object(NAME), damage(bucket.read_bytes(archive_object(NAME))))
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("it was opened"))
    monkeypatch.setattr(igzip, "open", lambda *_, **__: pytest.fail("it was opened"))
    bucket.reads.clear()
    error = here.refuse(message, using=bucket)
    # A bucket's own checksum tells, before 3 GB are downloaded for nothing.
    is_read = (archive_object(NAME), 0) in bucket.reads
    assert not (is_read and kind is VouchingBucket)
    assert f"{NAME} cannot be used" in str(error)
    assert "its sidecar says" in str(error)


def test_the_disk_must_have_room_for_archive_and_files_before_the_download(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.upload()
    archive = (here.bucket.root / archive_object(NAME)).stat().st_size
    files = read_manifest(here.source).total_bytes
    needed = archive + files
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    numbers = f"needs {needed} bytes .*archive {archive}, files {files}.*; {needed - 1} are free"
    here.refuse(numbers)
    assert all(name == sidecar_object(NAME) for name, _ in here.bucket.reads)
    usage.free = needed
    assert here.fetch() == here.directory / NAME


# The archive as files. Its bytes are what the sidecar says, so that only its content can tell.


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = fields.pop("size", len(data))
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


Members = list[tuple[tarfile.TarInfo, bytes]]


def members_of(checkpoint: Path) -> Members:
    return [
        member(f"{NAME}/{path.name}", path.read_bytes()) for path in sorted(checkpoint.iterdir())
    ]


compress = igzip.compress


def pack(members: Members, *, tail: bytes = bytes(1024)) -> bytes:
    raw = io.BytesIO()
    for info, data in members:
        raw.write(info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512))
    return compress(raw.getvalue() + tail)


def without(members: Members, name: str) -> Members:
    return [entry for entry in members if entry[0].name != f"{NAME}/{name}"]


def with_content(members: Members, name: str, data: bytes) -> Members:
    return [*without(members, name), member(f"{NAME}/{name}", data)]


def with_link(members: Members, kind: bytes, target: str) -> Members:
    link = member(f"{NAME}/optimizer.bin", type=kind, linkname=target, size=0)
    return [*without(members, "optimizer.bin"), link]


def with_sparse_file(members: Members) -> Members:
    """Return the same content, told as the parts of a file with holes."""
    data = dict_of(members)["optimizer.bin"]
    parts = {"GNU.sparse.map": f"0,{len(data)}", "GNU.sparse.size": str(len(data))}
    sparse = member(f"{NAME}/optimizer.bin", data, pax_headers=parts)
    return [*without(members, "optimizer.bin"), sparse]


LARGE = 50 * 2**20
HOSTILE: dict[str, tuple[Callable[[Members], bytes], str]] = {
    "parent": (lambda m: pack([*m, member("../evil", b"x")]), "outside the destination"),
    "absolute": (lambda m: pack([*m, member("/evil", b"x")]), "'/?evil' does not belong|absolute"),
    "deeper": (lambda m: pack([*m, member(f"{NAME}/sub/evil", b"x")]), "does not belong"),
    "own parent": (
        lambda m: pack([member(f"{NAME}/x/../{i.name.split('/')[1]}", d) for i, d in m]),
        "does not belong",
    ),
    "all of another checkpoint": (
        lambda m: pack([member(i.name.replace(NAME, OTHER), d) for i, d in m]),
        "does not belong",
    ),
    "extra member": (lambda m: pack([*m, member(f"{NAME}/evil.py", b"x")]), "does not belong"),
    "member twice": (lambda m: pack([*m, m[-1]]), "does not belong"),
    "folder as a file": (
        lambda m: pack(
            [*without(m, "empty.json"), member(f"{NAME}/empty.json", type=tarfile.DIRTYPE)]
        ),
        "no regular file",
    ),
    "symlink": (lambda m: pack(with_link(m, tarfile.SYMTYPE, "model.safetensors")), "no regular"),
    "symlink outside": (lambda m: pack(with_link(m, tarfile.SYMTYPE, "/etc/passwd")), "absolute"),
    "hard link outside": (
        lambda m: pack(with_link(m, tarfile.LNKTYPE, "../../source/secret")),
        "outside",
    ),
    "device": (lambda m: pack(with_link(m, tarfile.CHRTYPE, "")), "special file"),
    "sparse": (lambda m: pack(with_sparse_file(m)), "no regular file"),
    "longer than the manifest says": (
        lambda m: pack(with_content(m, "optimizer.bin", bytes(50_001))),
        "has 50001 bytes, its manifest says 50000",
    ),
    "huge manifest": (
        lambda m: pack(with_content(m, "manifest.json", bytes(LARGE))),
        f"manifest.json has {LARGE} bytes",
    ),
    "huge header": (
        lambda m: pack(
            [member("header", (b"%d a=" % LARGE).ljust(LARGE, b"x"), type=tarfile.XHDTYPE), *m]
        ),
        "unpacks to more",
    ),
    "missing member": (
        lambda m: pack(without(m, "optimizer.bin")),
        "'optimizer.bin' is not in it",
    ),
    "cut in a member": (
        lambda m: pack([(i, d[:9]) for i, d in m if "optim" in i.name], tail=b""),
        "unexpected end",
    ),
    "other bytes": (
        lambda m: pack(with_content(m, "optimizer.bin", bytes(50_000))),
        "'optimizer.bin' in it is not what its manifest says",
    ),
    "other manifest": (
        lambda m: pack(
            with_content(m, "manifest.json", dict_of(m)["manifest.json"].replace(b"2026", b"2027"))
        ),
        "its manifest.json is not that of its sidecar",
    ),
    "manifest that is none": (
        lambda m: pack(with_content(m, "manifest.json", b"{}")),
        "its manifest.json cannot be read",
    ),
    "no tar": (lambda m: compress(os.urandom(5000)), "cannot be unpacked"),
    "no gzip": (lambda m: os.urandom(5000), "cannot be unpacked"),
}


def dict_of(members: Members) -> dict[str, bytes]:
    return {info.name.partition("/")[2]: data for info, data in members}


@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_leaves_nothing_behind(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, suffix: str
) -> None:
    if suffix == ".tar.zst":
        monkeypatch.setattr(sys.modules[__name__], "compress", zstandard.compress)
    (here.source.parent / "secret").write_bytes(b"x" * 50_000)
    build, message = HOSTILE[case]
    publish(here.bucket, here.source, build(members_of(here.source)), suffix)
    written = [0]
    before = sorted(path for path in tmp_path.rglob("*") if here.directory not in path.parents)

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "unpacking":
            files = [path for path in here.directory.rglob("*") if path.is_file()]
            sizes = [path.stat().st_size for path in files if path.suffix not in (".gz", ".zst")]
            written[0] = max(written[0], sum(sizes))

    error = here.refuse(message, on_progress=watch)
    assert str(error).startswith(f"{NAME} cannot be used: {here.bucket.uri}")
    after = sorted(path for path in tmp_path.rglob("*") if here.directory not in path.parents)
    assert [path for path in after if path != here.directory] == before
    assert written[0] <= read_manifest(here.source).total_bytes + 100_000


@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
def test_each_format_comes_back(here: Here, suffix: str) -> None:
    sink = io.BytesIO()
    chosen = next(key for key, each in COMPRESSIONS.items() if each.suffix == suffix)
    write_archive(here.source, read_manifest(here.source), sink, compression=chosen)
    publish(here.bucket, here.source, sink.getvalue(), suffix)
    assert contents(here.fetch()) == contents(here.source)


def test_a_frame_that_asks_for_much_memory_is_refused(here: Here) -> None:
    raw = igzip.decompress(pack(members_of(here.source)))
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    publish(here.bucket, here.source, packed.compress(raw) + packed.flush(), ".tar.zst")
    here.refuse("cannot be unpacked.*memory")


def test_pickles_are_only_bytes(here: Here, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    code = b"cposix\nsystem\n(S'touch %s'\ntR." % str(trap).encode()
    (here.source / "random_states_0.pkl").write_bytes(code)
    seal(here.source, 50)
    here.upload()
    assert (here.fetch() / "random_states_0.pkl").read_bytes() == code
    assert not trap.exists()


# Trouble on the way.


def test_two_transient_errors_are_survived_and_nothing_is_read_twice(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_reading, "DOWNLOAD_BLOCK_BYTES", 20_000)
    here.upload()
    here.bucket.faults = {
        sidecar_object(NAME): [TransientStorageError("503"), TransientStorageError("503")],
        archive_object(NAME): [bytes, TransientStorageError("reset"), lambda data: data[:-1]],
    }
    here.bucket.reads.clear()
    assert contents(here.fetch()) == contents(here.source)
    archive_reads = [start for name, start in here.bucket.reads if name == archive_object(NAME)]
    assert archive_reads == [0, 20_000, 20_000, 20_000, 40_000]


def test_bytes_that_changed_on_the_way_are_fetched_again(tmp_path: Path, here: Here) -> None:
    bucket = VouchingBucket(tmp_path / "bucket")
    here.upload(bucket)
    bucket.faults = {archive_object(NAME): [flip, flip]}
    assert contents(here.fetch(using=bucket)) == contents(here.source)

    shutil.rmtree(here.directory)
    bucket.faults = {archive_object(NAME): [flip] * 99}
    with pytest.raises(StorageError, match=r"changed on the way\. \(3 attempts\)"):
        here.fetch(using=bucket)
    assert_nothing_was_left(here.directory)


@pytest.mark.parametrize(
    ("object_name", "fault", "attempts"),
    [
        (sidecar_object(NAME), TransientStorageError("503 Busy"), MAX_ATTEMPTS),
        (archive_object(NAME), TransientStorageError("503 Busy"), MAX_ATTEMPTS),
        (archive_object(NAME), AccessDeniedError("403 Forbidden"), 1),
    ],
)
def test_a_bucket_that_stays_down_is_given_up_and_a_refusal_at_once(
    here: Here, object_name: str, fault: StorageError, attempts: int
) -> None:
    here.upload()
    here.bucket.faults = {object_name: [fault] * 99}
    with pytest.raises(StorageError, match=str(fault)) as caught:
        here.fetch()
    is_refusal = isinstance(fault, AccessDeniedError)
    assert is_refusal or f"{NAME} could not be downloaded" in str(caught.value)
    assert [name for name, _ in here.bucket.reads].count(object_name) == attempts
    assert_nothing_was_left(here.directory)


@pytest.mark.parametrize("call", ["fsync", "rename", "interrupt"])
def test_a_disk_that_fails_or_an_interrupt_leaves_nothing(
    here: Here, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    here.upload()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "unpacking":
            raise KeyboardInterrupt

    if call == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            here.fetch(on_progress=interrupt)
        assert_nothing_was_left(here.directory)
    else:
        monkeypatch.setattr(os, call, fail)
        here.refuse(f"{NAME} cannot be written to .*No space left")
        monkeypatch.undo()
    assert here.fetch() == here.directory / NAME


def test_files_are_synced_before_the_name_is_given(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.upload()
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    here.fetch()
    files = [path.name for path in here.source.iterdir()]
    assert sorted(synced[: len(files)]) == sorted(files)
    assert synced[len(files) :] == [NAME, here.directory.name, "uploads.jsonl", here.directory.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from utils.remote.download import download_checkpoint
from utils.checkpoints.journal import Journal
from utils.storage.open import open_bucket
def kill(stage, done, total):
    if stage == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
directory = Path(sys.argv[2])
journal = Journal(directory / "uploads.jsonl")
download_checkpoint(open_bucket(sys.argv[1]), sys.argv[3], directory, journal, kill)
"""


@pytest.mark.parametrize("stage", ["downloading", "unpacking"])
def test_what_a_killed_download_left_is_removed_by_the_next_download_or_training(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    here.upload()
    result = run_python("-c", KILLED, here.bucket.uri, here.directory, NAME, stage)
    assert result.returncode == -signal.SIGKILL
    left = {path.name for path in here.directory.iterdir()}
    assert {name[:17] for name in left} == {".saving-download-"}
    shutil.copytree(here.directory, tmp_path / "trained")
    remove_leftovers(tmp_path / "trained")
    assert_nothing_was_left(tmp_path / "trained")

    def free_space(path: Path) -> SimpleNamespace:  # what was left takes no room from what comes
        return SimpleNamespace(free=0 if any((path / one).exists() for one in left) else 2**30)

    monkeypatch.setattr(shutil, "disk_usage", free_space)
    assert here.fetch() == here.directory / NAME
    assert not list(here.directory.glob(".saving-*"))


@pytest.mark.parametrize("stage", ["downloading", "unpacking"])
def test_what_a_download_is_writing_is_no_leftover(here: Here, tmp_path: Path, stage: str) -> None:
    here.upload()
    other = make_checkpoint(tmp_path / "other", 60)
    Here(other, here.bucket, here.directory).upload()
    first: list[str] = []

    def disturb(now: str, done: int, total: int | None) -> None:
        if now == stage and not first:
            first.extend(path.name for path in here.directory.iterdir())
            remove_leftovers(here.directory)
            here.fetch(OTHER)

    here.fetch(on_progress=disturb)
    assert len(first) == 2
    for name in (NAME, OTHER):
        verify_checkpoint(here.directory / name)
    assert not list(here.directory.glob(".saving-*"))
