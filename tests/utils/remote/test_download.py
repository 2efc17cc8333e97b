"""A checkpoint from the bucket is the one that was uploaded, or nothing at all is left of it."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import signal
import subprocess
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

from tests.gcs_server import FakeGcsServer, Fault
from tests.sample_checkpoints import RUN_ID, make_checkpoint, seal
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
from utils.storage.bucket import Bucket, ObjectInfo, crc32c_of_bytes, crc32c_of_file
from utils.storage.directory import DirectoryBucket
from utils.storage.open import open_bucket
from utils.uploads.archive import write_archive
from utils.uploads.job import UploadProgress, run_job
from utils.uploads.transports import TransportOptions
from utils.uploads.uploader import Uploader, find_unfinished

NAME = "checkpoint-epoch0-step50-files0"
OTHER = "checkpoint-epoch0-step60-files0"
PROJECT = Path(__file__).resolve().parents[3]


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


def make_sidecar(checkpoint: Path, archive: bytes, **more: str) -> dict[str, Any]:
    return {
        "manifest": read_json(checkpoint / "manifest.json"),
        "metadata": read_json(checkpoint / "metadata.json"),
        "archive": {"size": len(archive), "crc32c": crc32c_of_bytes(archive), **more},
    }


def publish(bucket: Bucket, checkpoint: Path, archive: bytes, suffix: str = ".tar.gz") -> None:
    """Put an archive of any content, with a sidecar that vouches for its bytes."""
    bucket.put_bytes(archive_object(NAME, suffix), archive)
    more = {} if suffix == ".tar.gz" else {"format": suffix}
    sidecar = make_sidecar(checkpoint, archive, **more)
    bucket.put_bytes(sidecar_object(NAME), json.dumps(sidecar).encode())


def archive_of(checkpoint: Path) -> bytes:
    sink = io.BytesIO()
    write_archive(checkpoint, read_manifest(checkpoint), sink)
    return sink.getvalue()


def change_sidecar(bucket: Bucket, **changes: Any) -> None:
    sidecar = json.loads(bucket.read_bytes(sidecar_object(NAME)))
    bucket.put_bytes(sidecar_object(NAME), json.dumps({**sidecar, **changes}).encode())


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def assert_nothing_was_left(directory: Path) -> None:
    assert not directory.exists() or list(directory.iterdir()) == []


# What comes back.


def test_a_download_is_the_checkpoint_that_was_uploaded(here: Here) -> None:
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


def test_a_download_is_known_as_verified_and_not_uploaded_again(here: Here) -> None:
    here.upload()
    found = here.fetch()
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


def test_a_download_from_gs_survives_faults_and_is_the_same(
    gcs: FakeGcsServer, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_reading, "DOWNLOAD_BLOCK_BYTES", 20_000)
    remote = open_bucket("gs://runs/team/a", retry_seconds=5)
    here.upload(remote)
    busy = gcs.add_fault(Fault("status", times=2, operation="object.download", status=503))
    cut = gcs.add_fault(
        Fault("reset", operation="object.download", name="*.tar.gz", after_bytes=5_000)
    )
    journal = Journal(here.directory / "uploads.jsonl")
    found = download_checkpoint(remote, NAME, here.directory, journal)
    assert (busy.fired, cut.fired) == (2, 1)
    assert contents(found) == contents(here.source)
    assert is_verified_in(remote.uri, found, journal.latest()[NAME])

    shutil.rmtree(here.directory)
    damaged = gcs.read_object("runs", f"team/a/{archive_object(NAME)}")
    damaged = damaged[:-9] + bytes([damaged[-9] ^ 1]) + damaged[-8:]
    gcs.put_object("runs", f"team/a/{archive_object(NAME)}", damaged)
    gcs.clear_requests()
    with pytest.raises(CheckpointError, match="is damaged"):
        download_checkpoint(remote, NAME, here.directory, journal)
    # The bucket's own checksum tells, before 3 GB are downloaded for nothing.
    assert len(gcs.requests("object.download")) == 1
    remote.close()


# What is there already.


def test_the_same_checkpoint_on_this_machine_is_left_as_it_is(here: Here) -> None:
    here.upload()
    found = here.fetch()
    here.bucket.reads.clear()
    assert here.fetch() == found
    assert here.bucket.reads == [(sidecar_object(NAME), 0)]


def test_another_checkpoint_of_that_name_is_never_replaced(here: Here) -> None:
    here.upload()
    own = make_checkpoint(here.directory, 50, current_loss=1.0)
    before = contents(own)
    with pytest.raises(CheckpointError, match=r"exists and is not what .* but another one\. Noth"):
        here.fetch()
    assert contents(own) == before


@pytest.mark.parametrize("damage", ["file", "manifest", "link"])
def test_a_damaged_checkpoint_of_that_name_is_never_replaced(here: Here, damage: str) -> None:
    here.upload()
    found = here.fetch()
    if damage == "link":
        found.rename(here.directory / "elsewhere")
        found.symlink_to(here.directory / "nowhere")
    elif damage == "file":
        os.truncate(found / "model.safetensors", 5)
    else:
        (found / "manifest.json").unlink()
    left = sorted(here.directory.rglob("*"))
    with pytest.raises(CheckpointError, match="not a whole one.*Move it away"):
        here.fetch()
    assert sorted(here.directory.rglob("*")) == left


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


def manifest_with(sidecar: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**sidecar, "manifest": {**sidecar["manifest"], **changes}}


def archive_with(sidecar: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**sidecar, "archive": {**sidecar["archive"], **changes}}


def files_with(sidecar: dict[str, Any], **files: Any) -> dict[str, Any]:
    return manifest_with(sidecar, files={**sidecar["manifest"]["files"], **files})


BAD_SIDECARS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "empty": (lambda sidecar: b"", "not a usable sidecar"),
    "cut": (lambda sidecar: json.dumps(sidecar).encode()[:-20], "not a usable sidecar"),
    "html": (lambda sidecar: b"<html>", "not a usable sidecar"),
    "deep": (lambda sidecar: b"[" * 100_000, "not a usable sidecar"),
    "list": (lambda sidecar: [sidecar], "not a usable sidecar"),
    "nothing in it": (lambda sidecar: {}, "no 'manifest'"),
    "no archive": (lambda sidecar: {"manifest": sidecar["manifest"]}, "no 'archive'"),
    "archive a list": (lambda sidecar: {**sidecar, "archive": [1]}, "not a usable sidecar"),
    "unknown format": (
        lambda sidecar: archive_with(sidecar, format=".tar.xz"),
        "archive of the unknown format '.tar.xz'",
    ),
    "archive negative": (lambda sidecar: archive_with(sidecar, size=-1), "archive of -1 bytes"),
    "archive true": (lambda sidecar: archive_with(sidecar, size=True), "archive of True bytes"),
    "no checksum": (lambda sidecar: archive_with(sidecar, crc32c=None), "crc32c None"),
    "other format": (lambda sidecar: manifest_with(sidecar, format=2), "format 1 expected"),
    "of another checkpoint": (lambda sidecar: manifest_with(sidecar, step=60), "it is of step 60"),
    "path in a file name": (
        lambda sidecar: files_with(sidecar, **{"../x": {"size": 1, "crc32c": ""}}),
        "'../x'",
    ),
    "negative size": (
        lambda sidecar: files_with(sidecar, x={"size": -9, "crc32c": ""}),
        "negative",
    ),
    "no files": (lambda sidecar: manifest_with(sidecar, files={}), "names no files"),
    "manifest in itself": (
        lambda sidecar: files_with(sidecar, **{"manifest.json": {"size": 1, "crc32c": ""}}),
        "names manifest.json itself",
    ),
}


@pytest.mark.parametrize("case", BAD_SIDECARS)
def test_a_bad_sidecar_is_refused_and_no_archive_is_read(here: Here, case: str) -> None:
    here.upload()
    change, message = BAD_SIDECARS[case]
    sidecar = change(json.loads(here.bucket.read_bytes(sidecar_object(NAME))))
    data = sidecar if isinstance(sidecar, bytes) else json.dumps(sidecar).encode()
    here.bucket.put_bytes(sidecar_object(NAME), data)
    here.bucket.reads.clear()
    with pytest.raises(CheckpointError, match=message) as caught:
        here.fetch()
    assert str(caught.value).startswith(f"{NAME} cannot be used: ")
    assert here.bucket.reads == [(sidecar_object(NAME), 0)]
    assert_nothing_was_left(here.directory)


def test_an_upload_that_lacks_a_half_is_refused(here: Here) -> None:
    here.upload()
    here.bucket.delete(archive_object(NAME))
    here.refuse("its archive is not in")
    here.bucket.delete(sidecar_object(NAME))
    here.refuse(f"{NAME} is ignored: .*not uploaded to its end")


def test_a_sidecar_without_end_is_not_read_to_its_end(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.upload()
    monkeypatch.setattr(archive_reading, "MAX_SIDECAR_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than 100 bytes"):
        here.fetch()


# The archive as bytes: nothing is opened that is not what the sidecar says.


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def cut_at_a_member_boundary(data: bytes) -> bytes:
    """Return an archive that tar extracts without an error, one file short."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        last = archive.getmembers()[-1]
    return compress(igzip.decompress(data)[: last.offset])


DAMAGED_ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "flipped": (flip, "is damaged .*it has crc32c"),
    "cut": (lambda data: data[:-100], "is damaged .*it has"),
    "cut at a member": (cut_at_a_member_boundary, "is damaged .*it has"),
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
    with pytest.raises(CheckpointError, match=message) as caught:
        here.fetch(using=bucket)
    assert f"{NAME} cannot be used" in str(caught.value)
    assert "its sidecar says" in str(caught.value)
    assert_nothing_was_left(here.directory)


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
    with pytest.raises(CheckpointError, match=numbers):
        here.fetch()
    assert all(name == sidecar_object(NAME) for name, _ in here.bucket.reads)
    assert_nothing_was_left(here.directory)
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


def renamed(members: Members) -> Members:
    return [member(info.name.replace(NAME, OTHER), data) for info, data in members]


LARGE = 50 * 2**20
HOSTILE: dict[str, tuple[Callable[[Members], bytes], str]] = {
    "parent": (lambda m: pack([*m, member("../evil", b"x")]), "outside the destination"),
    "parent inside": (lambda m: pack([*m, member(f"{NAME}/../../evil", b"x")]), "outside"),
    "absolute": (lambda m: pack([*m, member("/evil", b"x")]), "'/?evil' does not belong|absolute"),
    "deeper": (lambda m: pack([*m, member(f"{NAME}/sub/evil", b"x")]), "does not belong"),
    "own parent": (
        lambda m: pack([member(f"{NAME}/x/../{i.name.split('/')[1]}", d) for i, d in m]),
        "does not belong",
    ),
    "other checkpoint": (lambda m: pack([*m, member(f"{OTHER}/evil", b"x")]), "does not belong"),
    "all of another checkpoint": (lambda m: pack(renamed(m)), "does not belong"),
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
    "hard link": (
        lambda m: pack(with_link(m, tarfile.LNKTYPE, f"{NAME}/model.safetensors")),
        "no regular",
    ),
    "hard link outside": (
        lambda m: pack(with_link(m, tarfile.LNKTYPE, "../../source/secret")),
        "outside",
    ),
    "device": (lambda m: pack(with_link(m, tarfile.CHRTYPE, "")), "special file"),
    "fifo": (lambda m: pack(with_link(m, tarfile.FIFOTYPE, "")), "special file"),
    "sparse": (lambda m: pack(with_sparse_file(m)), "no regular file"),
    "longer than the manifest says": (
        lambda m: pack(with_content(m, "optimizer.bin", bytes(50_001))),
        "has 50001 bytes, its manifest says 50000",
    ),
    "huge member": (
        lambda m: pack(with_content(m, "optimizer.bin", bytes(LARGE))),
        f"has {LARGE} bytes, its manifest says 50000",
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
    "huge long name": (
        lambda m: pack([member("././@LongLink", b"x" * LARGE, type=tarfile.GNUTYPE_LONGNAME), *m]),
        "unpacks to more",
    ),
    "missing member": (
        lambda m: pack(without(m, "optimizer.bin")),
        "'optimizer.bin' is not in it",
    ),
    "missing manifest": (
        lambda m: pack(without(m, "manifest.json")),
        "'manifest.json' is not in it",
    ),
    "cut at a member boundary": (lambda m: pack(m[:2], tail=b""), "is not in it|unexpected end"),
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
    "nothing": (lambda m: compress(b""), "cannot be unpacked"),
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

    with pytest.raises(CheckpointError, match=message) as caught:
        here.fetch(on_progress=watch)
    assert str(caught.value).startswith(f"{NAME} cannot be used: {here.bucket.uri}")
    assert_nothing_was_left(here.directory)
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


@pytest.mark.parametrize("object_name", [sidecar_object(NAME), archive_object(NAME)])
def test_a_bucket_that_stays_down_is_given_up(here: Here, object_name: str) -> None:
    here.upload()
    here.bucket.faults = {object_name: [TransientStorageError("503 Busy")] * 99}
    here.bucket.reads.clear()
    with pytest.raises(StorageError, match=f"{NAME} could not be downloaded .*503 Busy"):
        here.fetch()
    assert [name for name, _ in here.bucket.reads].count(object_name) == MAX_ATTEMPTS
    assert_nothing_was_left(here.directory)


def test_a_refusal_is_not_tried_again(here: Here) -> None:
    here.upload()
    here.bucket.faults = {archive_object(NAME): [AccessDeniedError("403 Forbidden")]}
    with pytest.raises(AccessDeniedError, match="403"):
        here.fetch()
    assert_nothing_was_left(here.directory)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fails_leaves_nothing(
    here: Here, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    here.upload()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match=f"{NAME} cannot be written to .*No space left"):
        here.fetch()
    monkeypatch.undo()
    assert_nothing_was_left(here.directory)
    assert here.fetch() == here.directory / NAME


def test_an_interrupt_leaves_nothing(here: Here) -> None:
    here.upload()

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "unpacking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.fetch(on_progress=interrupt)
    assert_nothing_was_left(here.directory)


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
def test_what_a_killed_download_left_is_removed_at_the_next_start(
    here: Here, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    caplog.set_level(logging.INFO)
    here.upload()
    command = [sys.executable, "-c", KILLED, here.bucket.uri, str(here.directory), NAME, stage]
    result = subprocess.run(command, cwd=PROJECT, check=False)
    assert result.returncode == -signal.SIGKILL
    left = list(here.directory.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".saving-")
    remove_leftovers(here.directory)
    assert_nothing_was_left(here.directory)
    assert crc32c_of_file(here.fetch() / "manifest.json") == crc32c_of_file(
        here.source / "manifest.json"
    )
