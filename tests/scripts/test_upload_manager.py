"""The upload manager as a user calls it: what it shows, uploads, checks, brings and deletes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from configs.config_files import PROJECT_DIRECTORY
from scripts import upload_manager
from scripts.upload_manager import main
from tests.gcs_server import FakeGcsServer, Fault
from tests.sample_checkpoints import RUN_ID, change_manifest, make_checkpoint, publish, seal
from utils.base.errors import ExitCode
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import (
    RunIdentity,
    RunPaths,
    archive_object,
    read_manifest,
    sidecar_object,
)
from utils.checkpoints.run_record import RunRecord, write_run_record
from utils.checkpoints.store import hold_output_directory
from utils.remote.pruning import delete_all
from utils.storage.bucket import Bucket, crc32c_of_bytes, crc32c_of_file
from utils.storage.open import open_bucket
from utils.tools.uploads import transfer
from utils.uploads.archive import write_archive
from utils.uploads.lease import LEASE_OBJECT

SCRIPT = PROJECT_DIRECTORY / "scripts" / "upload_manager.py"
OTHER_RUN = "20250101-ffffffff"
ESCAPE = "\x1b[2J"

pytestmark = pytest.mark.usefixtures("logging_as_before")


def name(step: int) -> str:
    return f"checkpoint-epoch0-step{step}-files0"


def make_archive(checkpoint: Path) -> bytes:
    """Return a checkpoint as the uploader archives it."""
    sink = io.BytesIO()
    write_archive(checkpoint, read_manifest(checkpoint), sink)
    return sink.getvalue()


@dataclass
class Place:
    """A directory with a run's checkpoints, and its bucket."""

    checkpoints: Path
    bucket: Bucket
    capsys: pytest.CaptureFixture[str]
    stderr: str = ""

    @property
    def journal(self) -> Journal:
        return Journal(self.checkpoints / "uploads.jsonl")

    def words(self, *arguments: str) -> list[str]:
        transport = "python" if self.bucket.uri.startswith("gs://") else "directory"
        settings = (f"checkpoint_uri={self.bucket.uri}", f"upload_transport={transport}")
        return [*arguments, *(word for setting in settings for word in ("--set", setting))]

    def call(self, *arguments: str) -> tuple[int, str]:
        """Run a command; return its exit code and its output."""
        code = main(self.words(*arguments))
        output, self.stderr = self.capsys.readouterr()
        return code, output

    def read(self, *arguments: str) -> tuple[int, Any]:
        """Run a command with --json; return its exit code and its result."""
        code, output = self.call(*arguments, "--json")
        return code, json.loads(output) if output else None

    def done(self, *arguments: str) -> Any:
        """Run a command that ends well; return its result."""
        code, result = self.read(*arguments)
        assert code == ExitCode.DONE, self.stderr
        return result

    def wrong(self, *arguments: str) -> Any:
        """Run a command that finds something not verified; return its result."""
        code, result = self.read(*arguments)
        assert code == ExitCode.NOT_VERIFIED, self.stderr
        return result

    def save(self, step: int, loss: float | None = None, run_id: str = RUN_ID) -> Path:
        metrics = {} if loss is None else {"validation_metrics": {"validation_loss": loss}}
        checkpoint = make_checkpoint(self.checkpoints, step, **metrics)
        if run_id != RUN_ID:
            change_manifest(checkpoint, run_id=run_id)
        return checkpoint

    def publish(self, checkpoint: Path, archive: bytes | None = None) -> None:
        """Put archive and sidecar into the bucket, and the journal entry that says so."""
        archive = archive or make_archive(checkpoint)
        publish(self.bucket, checkpoint, archive)
        self.journal.record(
            checkpoint.name,
            read_manifest(checkpoint).run_id,
            UploadState.VERIFIED,
            bytes=len(archive),
            crc32c=crc32c_of_bytes(archive),
            bucket=self.bucket.uri,
            manifest_crc32c=crc32c_of_file(checkpoint / "manifest.json"),
        )

    def publish_only(
        self, step: int, loss: float | None = None, run_id: str = RUN_ID, **manifest: Any
    ) -> None:
        """Put a checkpoint into the bucket that is on no machine any more."""
        checkpoint = self.save(step, loss, run_id)
        change_manifest(checkpoint, **manifest)
        self.publish(checkpoint)
        shutil.rmtree(checkpoint)

    def forget(self) -> None:
        """Be another machine, which has nothing but the bucket."""
        shutil.rmtree(self.checkpoints)

    def change_archive(self, step: int, data: bytes) -> None:
        self.bucket.put_bytes(archive_object(name(step)), data)

    def archive(self, step: int) -> bytes:
        return self.bucket.read_bytes(archive_object(name(step)))

    def objects(self) -> list[str]:
        return [info.name.removeprefix("Checkpoints/") for info in self.bucket.list("Checkpoints/")]


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    """A run whose bucket is a directory."""
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path / "checkpoints", open_bucket(str(tmp_path / "bucket")), capsys)


@pytest.fixture
def gcs_place(gcs: FakeGcsServer, place: Place) -> Iterator[Place]:
    """A run whose bucket is gs://runs/team."""
    place.bucket = open_bucket("gs://runs/team", retry_seconds=5)
    yield place
    place.bucket.close()


@pytest.fixture(params=["directory", "gs"])
def either(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue("place" if request.param == "directory" else "gcs_place")
    return found


# status, list


def test_status_says_where_each_checkpoint_stands(either: Place) -> None:
    either.publish_only(10)
    either.publish(either.save(20))
    for step in (30, 40, 50, 60):
        either.save(step)
    failed = {"attempts": 5, "permanent": False, "next_try": "2026-01-01T00:00:00+00:00"}
    speed = {"bytes_per_second": 2**20, "eta_seconds": 90}
    record = either.journal.record
    record(name(30), RUN_ID, UploadState.FAILED, error="503", **failed)
    record(name(40), RUN_ID, UploadState.UPLOADING, attempt=2, read=250, total=1000, **speed)
    record(name(50), RUN_ID, UploadState.QUEUED)

    status = either.done("status")
    rows = {row["step"]: row for row in status["checkpoints"]}
    assert [rows[step]["state"] for step in sorted(rows)] == [
        "verified",
        "verified",
        "failed",
        "uploading",
        "queued",
        "not queued",
    ]
    assert [row["local"] for row in status["checkpoints"]] == ["no", *["yes"] * 5]
    assert [row["bucket"] for row in status["checkpoints"]] == ["yes", "yes", *["no"] * 4]
    assert rows[40]["progress"] == "25%, 1.0 MiB/s, 1m30s left"
    assert rows[40]["upload"]["percent"] == 25
    assert rows[60]["kept"] == "latest"
    assert rows[20]["kept"] == "goes: verified in the bucket"
    assert rows[30]["kept"] == "not verified in the bucket yet"
    assert [(row["checkpoint"], row["state"], row["attempts"]) for row in status["queue"]] == [
        (name(40), "uploading", 2),
        (name(30), "failed", 5),
        (name(50), "queued", 0),
        (name(60), "not queued", 0),
    ]
    assert status["queue"][1]["next try"] == "2026-01-01T00:00:00+00:00"
    (error,) = status["errors"]
    assert (error["checkpoint"], error["error"]) == (name(30), "503")

    code, text = either.call("status")
    assert code == ExitCode.DONE
    assert "25%, 1.0 MiB/s, 1m30s left" in text
    assert "4 not verified in the bucket." in text
    assert f"{name(30)} (5 attempts): 503" in text


def test_status_on_a_machine_that_has_only_the_bucket_changes_nothing(either: Place) -> None:
    either.publish_only(10)
    either.publish_only(20)
    either.forget()
    status = either.done("status")
    assert [row["state"] for row in status["checkpoints"]] == ["verified", "verified"]
    assert status["checkpoints"][1]["note"] == "latest, best"
    assert "All are verified in the bucket." in either.call("status")[1]
    assert not either.checkpoints.exists()


def test_where_no_run_is_nothing_looks_like_success(place: Place) -> None:
    places = [f"{place.checkpoints} does not exist.", f"{Path(place.bucket.uri).absolute()} "]
    assert place.call("list") == (ExitCode.USAGE, "")
    for command in ("status", "verify", "upload-all", "retry"):
        assert place.call(command) == (ExitCode.USAGE, "")
        assert all(text in place.stderr for text in places)
        assert place.stderr.count("\n") == 1
    place.checkpoints.mkdir()  # a run that has saved nothing yet
    for command in ("list", "status", "upload-all"):
        place.done(command)
    assert place.call("verify") == (ExitCode.USAGE, "")
    assert "Nothing was verified." in place.stderr


@pytest.mark.parametrize("is_here", [True, False])
@pytest.mark.parametrize(
    ("either", "damage"),
    [
        ("directory", "another size"),  # it keeps no checksums that a list could compare
        ("gs", "another size"),
        ("gs", "the same size"),
        ("gs", "another upload"),
    ],
    indirect=["either"],
)
def test_an_archive_that_is_not_the_one_of_its_sidecar_is_shown_as_damaged_and_not_taken(
    either: Place, damage: str, is_here: bool
) -> None:
    for step in (10, 20):
        either.publish(either.save(step))
    whole = either.archive(20)
    if damage == "another upload":  # archive and sidecar agree, the journal knows another archive
        publish(either.bucket, either.checkpoints / name(20), whole + bytes(512))
    else:
        wrong = whole[:-5] if damage == "another size" else whole[:-1] + bytes([whole[-1] ^ 1])
        either.change_archive(20, wrong)
    if not is_here:
        either.forget()
    is_good = damage == "another upload" and not is_here
    expected = ["verified", "verified" if is_good else "damaged in bucket"]
    rows = either.done("status")["checkpoints"]
    assert [row["state"] for row in rows] == expected
    listed = [row["state"] for row in either.done("list", "--remote")]
    assert (listed[0], listed[1] == "verified") == ("verified", damage == "another upload")
    if not is_here:
        taken = either.done("download", "latest")["checkpoint"]
        assert taken == name(20 if is_good else 10)


def test_without_its_bucket_status_and_upload_all_trust_the_journal(
    gcs_place: Place, gcs: FakeGcsServer
) -> None:
    gcs_place.publish(gcs_place.save(10))
    gcs.add_fault(Fault("status", None, "object.list", status=403))
    assert gcs_place.done("upload-all")["verified"] == []
    assert "the journal alone decides" in gcs_place.stderr
    status = gcs_place.done("status")
    assert "403" in status["bucket_problem"]
    assert [(row["bucket"], row["state"]) for row in status["checkpoints"]] == [
        ("unknown", "verified")
    ]


def test_list_shows_what_is_here_or_in_the_bucket(either: Place) -> None:
    either.publish_only(10)
    either.save(20)
    either.bucket.put_bytes(archive_object(name(30)), b"an upload without its sidecar")
    _, here = either.read("list")
    _, there = either.read("list", "--remote")
    assert [row["step"] for row in here] == [20]
    assert [row["step"] for row in there] == [10]
    assert name(10) in either.call("list", "--remote")[1]


def test_a_list_of_a_bucket_that_is_not_there_is_an_error(
    gcs_place: Place, gcs: FakeGcsServer
) -> None:
    gcs.add_fault(Fault("status", None, "object.list", status=404))
    code, output = gcs_place.call("list", "--remote")
    assert (code, output) == (ExitCode.UNEXPECTED, "")
    assert gcs_place.stderr.startswith("Error: gs://runs/team")


# upload, upload-all, retry


def test_upload_all_brings_what_is_owed(either: Place) -> None:
    either.publish(either.save(10))
    either.save(20)
    result = either.done("upload-all")
    assert result == {"verified": [name(20)], "failed": {}}
    either.done("verify")
    _, result = either.read("upload-all")
    assert result == {"verified": [], "failed": {}}


def test_upload_takes_the_one_that_is_named(place: Place) -> None:
    for step in (10, 20):
        place.save(step)
    assert place.read("upload", "10")[1] == {"verified": [name(10)], "failed": {}}
    assert place.call("upload", "../../etc")[0] == ExitCode.USAGE
    assert "There is no checkpoint '../../etc'" in place.stderr


def test_a_damaged_checkpoint_is_said_and_does_not_stop_the_others(place: Place) -> None:
    damaged = place.save(10)
    place.save(20)
    (damaged / "model.safetensors").write_bytes(b"short")
    result = place.wrong("upload-all")
    assert result["verified"] == [name(20)]
    assert list(result["failed"]) == [name(10)]
    assert "1 of 2 checkpoints were not uploaded" in place.stderr


def test_archives_of_both_formats_lie_beside_each_other(place: Place) -> None:
    for step, compression in ((10, "fast"), (20, "zstd")):
        place.save(step)
        place.done("upload-all", "--set", f"upload_compression={compression}")
    archives = [f"{name(10)}.tar.gz", f"{name(20)}.tar.zst"]
    assert place.objects() == sorted([*archives, f"{name(10)}.json", f"{name(20)}.json"])
    assert place.read("upload-all")[1] == {"verified": [], "failed": {}}
    place.done("verify", "--deep")
    place.done("prune", "--remote", "--keep", "1", "--yes")
    assert place.objects() == [f"{name(20)}.json", archives[1]]


def test_retry_takes_what_failed_alone(place: Place) -> None:
    for step in (10, 20):
        place.save(step)
    place.journal.record(name(20), RUN_ID, UploadState.FAILED, error="403", permanent=True)
    place.journal.record(name(30), RUN_ID, UploadState.FAILED, error="403")
    assert place.read("retry")[1] == {"verified": [name(20)], "failed": {}}
    assert f"{name(30)} failed and is no longer here" in place.stderr


def test_uploads_without_a_bucket_are_a_usage_error(place: Place) -> None:
    place.save(10)
    for command in (["upload-all"], ["verify"], ["download", "latest"]):
        code = main([*command, "--set", "checkpoint_uri="])
        assert code == ExitCode.USAGE
        assert "checkpoint_uri is empty" in place.capsys.readouterr().err


# verify


@pytest.mark.parametrize("deep", [[], ["--deep"]])
def test_verify_of_what_is_well(
    either: Place, deep: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.base.progress.LINE_SECONDS", 0.0)
    either.publish_only(10)
    either.publish(either.save(20))
    either.bucket.put_bytes(LEASE_OBJECT, b"{}")
    result = either.done("verify", *deep)
    assert result["orphans"] == []
    assert [row["wrong"] for row in result["checkpoints"]] == [[], []]
    assert ("every byte" in " ".join(result["checkpoints"][1]["right"])) is bool(deep)
    output = either.call("verify", *deep)[1]
    assert "2 verified, 0 not." in output
    assert (output.count("step20-files0 here: ") > 2) is bool(deep)  # not at its ends alone
    assert ("step20-files0 there: " in output) is bool(deep)


def change_sidecar(place: Place, part: str = "manifest", **changes: Any) -> None:
    sidecar = json.loads(place.bucket.read_bytes(sidecar_object(name(10))))
    sidecar[part] |= changes
    place.bucket.put_bytes(sidecar_object(name(10)), json.dumps(sidecar).encode())


def remove(place: Place, *objects: str) -> None:
    for one in objects:
        place.bucket.delete(one)


def forget_first(place: Place) -> None:
    place.journal.path.unlink()
    place.publish(place.checkpoints / name(20))


ARCHIVE, SIDECAR, WEIGHTS = archive_object(name(10)), sidecar_object(name(10)), "model.safetensors"
DAMAGES: dict[str, tuple[Callable[[Place, Path], object], str]] = {
    "no archive": (lambda place, _: remove(place, ARCHIVE), "a sidecar without its archive"),
    "no sidecar": (lambda place, _: remove(place, SIDECAR), "no sidecar beside its archive"),
    "nothing": (lambda place, _: remove(place, ARCHIVE, SIDECAR), "bucket: not there"),
    "truncated": (
        lambda place, _: place.change_archive(10, place.archive(10)[:-5]),
        "its archive is damaged (it has ",
    ),
    "another archive in the journal": (
        lambda place, checkpoint: place.journal.record(
            name(10),
            RUN_ID,
            UploadState.VERIFIED,
            bytes=len(place.archive(10)),
            crc32c="AAAAAA==",
            bucket=place.bucket.uri,
            manifest_crc32c=crc32c_of_file(checkpoint / "manifest.json"),
        ),
        "sidecar: its archive is not the one in the journal",
    ),
    "bad sidecar": (
        lambda place, _: place.bucket.put_bytes(SIDECAR, b'{"manifest": 5}'),
        "is not a usable manifest",
    ),
    "another sidecar": (
        lambda place, _: change_sidecar(place, world_size=8),
        "sidecar: its manifest is not that of the files here",
    ),
    "another sidecar, nothing here": (
        lambda place, checkpoint: (
            change_sidecar(place, world_size=8),
            shutil.rmtree(checkpoint),
        ),
        "sidecar: its manifest is not the one in the journal",
    ),
    "other metadata": (
        lambda place, _: change_sidecar(place, "metadata", best_loss=0.1),
        "its metadata are not those that its manifest vouches for",
    ),
    "another run": (
        lambda place, _: change_sidecar(place, run_id=OTHER_RUN),
        f"sidecar: it is of run {OTHER_RUN}",
    ),
    "failed": (
        lambda place, _: place.journal.record(name(10), RUN_ID, UploadState.FAILED, error="503"),
        "journal: failed: 503",
    ),
    "unknown": (lambda place, _: forget_first(place), "journal: nothing of it"),
    "file truncated": (
        lambda _, checkpoint: (checkpoint / WEIGHTS).write_bytes(b"short"),
        "here: model.safetensors is missing or not of ",
    ),
    "file gone": (
        lambda _, checkpoint: (checkpoint / WEIGHTS).unlink(),
        "here: model.safetensors is missing or not of ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_says_what_is_wrong(either: Place, damage: str) -> None:
    checkpoint = either.save(10)
    either.publish(checkpoint)
    either.publish(either.save(20))
    do_damage, expected = DAMAGES[damage]
    do_damage(either, checkpoint)
    result = either.wrong("verify")
    bad, good = result["checkpoints"]
    assert (bad["checkpoint"], bad["verified"]) == (name(10), False)
    assert any(expected in line for line in bad["wrong"]), bad["wrong"]
    assert (good["wrong"], good["verified"]) == ([], True)
    either.done("verify", "20", "step20-files0")  # a name may be its end, as a table shows it
    either.wrong("verify", name(10))


def test_verify_misses_what_the_journal_has_as_verified_though_it_is_not_here(
    either: Place,
) -> None:
    either.publish_only(10)
    either.bucket.delete(archive_object(name(10)))
    either.bucket.delete(sidecar_object(name(10)))
    result = either.wrong("verify")
    assert result["checkpoints"][0]["wrong"] == ["bucket: not there"]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("archive", "is damaged (it has crc32c"),
        ("file", "model.safetensors is damaged"),
        ("archive and sidecar", "cannot be unpacked"),
    ],
)
def test_verify_sees_bytes_without_a_known_checksum_only_when_deep(
    either: Place, damaged: str, message: str
) -> None:
    checkpoint = either.save(10)
    either.publish(checkpoint, b"none" if damaged == "archive and sidecar" else None)
    if damaged == "archive":
        either.change_archive(10, flip(either.archive(10)))
    elif damaged == "file":
        (checkpoint / WEIGHTS).write_bytes(flip((checkpoint / WEIGHTS).read_bytes()))
    is_known = damaged == "archive" and either.bucket.uri.startswith("gs://")
    code, result = either.read("verify")
    assert code == (ExitCode.NOT_VERIFIED if is_known else ExitCode.DONE)
    assert not is_known or message in result["checkpoints"][0]["wrong"][0]
    result = either.wrong("verify", "--deep")
    assert message in result["checkpoints"][0]["wrong"][0]


@pytest.mark.parametrize(
    "damage", ["no archive", "no sidecar", "truncated", "other bytes", "another sidecar"]
)
def test_upload_all_does_not_trust_the_journal_alone(place: Place, damage: str) -> None:
    place.publish(place.save(10))
    place.publish(place.save(20))
    if damage == "other bytes":
        place.change_archive(10, flip(place.archive(10)))
    else:
        DAMAGES[damage][0](place, place.checkpoints / name(10))
    result = place.done("upload-all")
    assert result["verified"] == [name(10)]
    assert f"{name(10)} is uploaded again" in place.stderr
    place.done("verify", "--deep")


def test_verify_deep_writes_nothing_and_outlives_a_broken_line(
    gcs_place: Place, gcs: FakeGcsServer, tmp_path: Path
) -> None:
    gcs_place.publish_only(10)
    gcs_place.forget()
    gcs.add_fault(Fault("status", name=f"team/{archive_object(name(10))}", status=503))
    before = set(tmp_path.rglob("*"))
    result = gcs_place.done("verify", "--deep")
    assert result["checkpoints"][0]["wrong"] == []
    assert set(tmp_path.rglob("*")) == before


def test_verify_lists_what_belongs_to_no_checkpoint_of_the_run(either: Place) -> None:
    either.publish(either.save(10))
    either.publish_only(20, run_id=OTHER_RUN)
    for other, data in {
        archive_object(name(30)): b"12345",
        sidecar_object(name(40)): b"{}",
        f"Checkpoints/.parts/{name(50)}.tar.gz/00001": b"123",
        f"Checkpoints/.parts/{name(50)}.tar.gz/00002": b"45",
        "Checkpoints/.upload-1": b"1",
        f"Checkpoints/set-aside/branch-0/{name(10)}.json": b"{}",
        "Checkpoints/notes.txt": b"1",
        LEASE_OBJECT: b"{}",
    }.items():
        either.bucket.put_bytes(other, data)
    code, result = either.read("verify")
    orphans = {one["object_name"]: one["problem"] for one in result["orphans"]}
    interrupted = "of an upload that was interrupted or goes on"
    assert orphans == {
        sidecar_object(name(20)): f"of run {OTHER_RUN}",
        archive_object(name(30)): "an archive without its sidecar",
        sidecar_object(name(40)): "a sidecar without its archive",
        f"Checkpoints/.parts/{name(50)}.tar.gz/": f"{interrupted}: 2 objects, 5 bytes",
        "Checkpoints/set-aside/branch-0/": "set aside, of an older branch: 1 objects, 2 bytes",
        "Checkpoints/.upload-1": f"{interrupted}: 1 objects, 1 bytes",
        "Checkpoints/notes.txt": "not ours: 1 objects, 1 bytes",
    }
    # A sidecar claims a checkpoint that is not there.
    assert code == ExitCode.NOT_VERIFIED
    assert [row["checkpoint"] for row in result["checkpoints"]] == [name(10), name(40)]
    either.bucket.delete(sidecar_object(name(40)))
    either.done("verify")


# Hostile names and contents.


def test_nothing_from_outside_steers_the_terminal(place: Place) -> None:
    checkpoint = place.save(10)
    hostile = f"model{ESCAPE}.bin"
    (checkpoint / hostile).write_bytes(b"1")
    seal(checkpoint, 10)
    place.publish(checkpoint)
    (checkpoint / hostile).unlink()
    foreign = place.save(20, run_id=f"run{ESCAPE}")
    place.publish(foreign)
    shutil.rmtree(foreign)
    place.bucket.put_bytes(f"Checkpoints/{ESCAPE}.txt", b"1")
    place.bucket.put_bytes(sidecar_object(name(30)), json.dumps({"manifest": ESCAPE}).encode())
    place.journal.record(f"c{ESCAPE}", RUN_ID, UploadState.FAILED, error=f"e{ESCAPE}")
    place.journal.record(name(10), RUN_ID, UploadState.FAILED, error=f"e{ESCAPE}", next_try=ESCAPE)
    for command in (
        ["status"],
        ["list"],
        ["list", "--remote"],
        ["retry"],
        ["upload-all"],
        ["verify"],
        ["verify", "--deep"],
        ["download", name(10)],
        ["download", "20"],
        ["prune", "--remote", "--keep", "1", "--dry-run"],
    ):
        _, output = place.call(*command)
        assert "\x1b" not in output + place.stderr, command
        assert output + place.stderr


@pytest.mark.parametrize("text", ["../x", "/etc/passwd", f"{name(10)}/..", f"x{ESCAPE}", "-1", ""])
def test_names_that_are_none_are_refused(place: Place, text: str) -> None:
    place.publish_only(10)
    for command in ("download", "upload", "verify"):
        code = main([*place.words(command), "--", text])
        output, stderr = place.capsys.readouterr()
        assert (code, output) == (ExitCode.USAGE, ""), command
        assert "\x1b" not in stderr
    assert not list(place.checkpoints.glob("checkpoint*"))


# download


@pytest.mark.parametrize(
    ("text", "step"), [("latest", 30), ("best", 20), ("10", 10), (name(10), 10)]
)
def test_download_brings_the_one_that_is_meant(either: Place, text: str, step: int) -> None:
    for saved, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        either.publish_only(saved, loss)
    either.forget()
    result = either.done("download", text)
    assert result == {
        "checkpoint": name(step),
        "path": f"checkpoints/{name(step)}",
        "downloaded": True,
    }
    assert either.journal.latest()[name(step)].state is UploadState.VERIFIED
    either.done("verify", "--deep", str(step))
    code, output = either.call("download", text)
    assert code == ExitCode.DONE
    assert "is already here" in output


def test_download_reads_only_the_sidecars_that_it_needs(
    gcs_place: Place, gcs: FakeGcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.remote.listing.NEWEST_SIDECARS", 2)
    for step in (10, 20, 30):
        gcs_place.publish_only(step)
    gcs_place.save(5)  # says which run is meant
    for text, steps in ((name(10), [10]), ("20", [20]), ("latest", [20, 30])):
        gcs.clear_requests()
        gcs_place.done("download", text)
        read = {record.name for record in gcs.requests("object.download")}
        sidecars = {f"team/{sidecar_object(name(step))}" for step in steps}
        assert {one for one in read if one.endswith(".json")} == sidecars


def test_latest_is_of_the_newest_branch_in_the_bucket_whatever_this_machine_has(
    place: Place,
) -> None:
    for step, branch in ((10, 0), (20, 1), (30, 1)):
        place.publish_only(step, branch=branch, forks=[[0, 0], [1, 10]] if branch else [])
    place.done("download", name(10))
    assert place.read("download", "latest")[1]["checkpoint"] == name(30)


def test_download_beside_a_trainer_goes_to_another_directory(place: Place) -> None:
    place.publish_only(10)
    with hold_output_directory(RunPaths(*[place.checkpoints] * 3)):
        assert place.call("status")[0] == ExitCode.DONE
        assert place.call("download", "latest")[0] == ExitCode.USAGE
        assert f"in use by another process (process {os.getpid()}" in place.stderr
        assert "--to DIR" in place.stderr
        assert place.call("download", "latest", "--to", "elsewhere")[0] == ExitCode.DONE
    assert place.call("download", "latest")[0] == ExitCode.DONE


def test_a_refused_download_leaves_no_folder(place: Place) -> None:
    place.publish_only(10)
    place.forget()
    for words in ((), ("--to", "x/y")):
        assert place.call("download", name(999), *words)[0] != ExitCode.DONE
    assert not place.checkpoints.exists()
    assert not (place.checkpoints.parent / "x").exists()


def test_download_does_not_mix_runs_or_replace_what_is_there(place: Place) -> None:
    place.publish_only(20, run_id=OTHER_RUN)
    place.save(10)
    assert place.call("download", name(20))[0] == ExitCode.USAGE
    assert f"is of run {OTHER_RUN}" in place.stderr

    place.publish(place.checkpoints / name(10))
    (place.checkpoints / name(10) / "model.safetensors").write_bytes(b"changed")
    assert place.call("download", name(10))[0] == ExitCode.USAGE
    assert "exists and is not what" in place.stderr


def test_download_that_waited_for_a_trainer_does_not_mix_its_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.publish_only(20)
    place.forget()

    @contextlib.contextmanager
    def wait_for_trainer(paths: RunPaths) -> Iterator[None]:
        place.save(10, run_id=OTHER_RUN)
        with hold_output_directory(paths):
            yield

    monkeypatch.setattr(transfer, "hold_output_directory", wait_for_trainer)
    assert place.call("download", name(20))[0] == ExitCode.USAGE
    assert f"is of run {RUN_ID}, the run here is {OTHER_RUN}" in place.stderr
    assert not (place.checkpoints / name(20)).exists()


def test_download_of_one_of_several_runs_wants_a_name(place: Place) -> None:
    place.publish_only(10)
    place.publish_only(20, run_id=OTHER_RUN)
    place.forget()
    assert place.call("download", "latest")[0] == ExitCode.USAGE
    assert RUN_ID in place.stderr
    assert OTHER_RUN in place.stderr
    assert place.call("download", name(20))[0] == ExitCode.DONE


# prune


def fill(place: Place) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)):
        place.publish_only(step, loss)


PRUNE = ("prune", "--remote", "--keep", "2")


def test_prune_deletes_what_its_plan_says(either: Place) -> None:
    fill(either)
    either.publish_only(5, run_id=OTHER_RUN)
    either.save(60)  # says which run is meant
    actions = {
        name(5): ("keep", f"of another run, {OTHER_RUN}"),
        name(10): ("delete", "older than the newest 2"),
        name(20): ("keep", "best"),
        name(30): ("keep", "every 30 steps"),
        name(40): ("keep", "newest 2"),
        name(50): ("keep", "latest"),
    }
    before = either.objects()
    result = either.done(*PRUNE, "--keep-every", "30", "--dry-run")
    rows = result["checkpoints"]
    assert {row["checkpoint"]: (row["action"], row["reason"]) for row in rows} == actions
    assert (result["deleted"], either.objects()) == ([], before)

    result = either.done(*PRUNE, "--keep-every", "30", "--yes")
    assert result["deleted"] == [name(10)]
    gone = {f"{name(10)}.json", f"{name(10)}.tar.gz"}
    assert set(before) - set(either.objects()) == gone
    entry = either.journal.latest()[name(10)]
    assert (entry.state, entry.run_id) == (UploadState.REMOVED, RUN_ID)
    result = either.done(*PRUNE, "--keep-every", "30", "--yes")
    assert (result["deleted"], result["notes"]) == ([], [])


def test_prune_shows_its_plan_before_it_asks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(place)
    place.forget()
    before = place.objects()
    assert place.call(*PRUNE)[0] == ExitCode.USAGE
    assert "add --yes, or --dry-run to see what would go" in place.stderr
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    for answer in ("no", ""):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        code, output = place.call(*PRUNE)
        assert (code, place.objects()) == (ExitCode.DONE, before)
        assert "2 to delete" in output
        assert "A directory: what is deleted is gone at once." in output
        assert "Nothing was deleted." in output
    monkeypatch.setattr("builtins.input", lambda question: "yes")
    assert place.call(*PRUNE)[0] == ExitCode.DONE
    assert len(place.objects()) == len(before) - 4


def test_prune_plans_again_after_the_answer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(place)
    place.forget()
    before = place.objects()

    def resume_from_30_and_answer(question: str) -> str:
        identity = RunIdentity(RUN_ID).fork(30, [0])
        paths = RunPaths(*[place.checkpoints] * 3)
        place.checkpoints.mkdir()
        write_run_record(paths, RunRecord(identity))
        return "yes"

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", resume_from_30_and_answer)
    code, output = place.call(*PRUNE)
    assert code == ExitCode.DONE
    # The branch that begins there has nothing newer than 30.
    assert f"{name(30)} is kept after all: latest." in output
    assert set(before) - set(place.objects()) == {f"{name(10)}.json", f"{name(10)}.tar.gz"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--keep", "2", "--yes"],
        ["--remote", "--keep", "0", "--yes"],
        ["--remote", "--keep", "-1", "--yes"],
        ["--remote", "--keep", "1", "--keep-every", "0", "--yes"],
        ["--remote", "--keep", "1"],
        ["--remote", "--keep", "1", "--yes", "--set", "checkpoint_uri="],
    ],
)
def test_prune_refuses_what_is_not_clear(place: Place, arguments: list[str]) -> None:
    fill(place)
    before = place.objects()
    code = main([*place.words("prune"), *arguments])
    assert (code, place.objects()) == (ExitCode.USAGE, before)


@pytest.mark.parametrize("moment", ["planned", "looked", "sidecar deleted"])
def test_prune_deletes_nothing_that_is_written_anew_while_it_looks(
    either: Place, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    fill(either)
    either.forget()
    is_gs = either.bucket.uri.startswith("gs://")
    newer, (written, operation) = (
        b"written anew",
        {
            "planned": (SIDECAR, None),
            "looked": (SIDECAR, "stat"),
            "sidecar deleted": (ARCHIVE if is_gs else f"{SIDECAR}.2", "delete_if"),
        }[moment],
    )
    moments, seen = iter([moment]), []

    def overtake() -> None:
        if next(moments, None):
            seen.extend(either.objects())
            either.bucket.put_bytes(written, newer)

    def delete(bucket: Bucket, views: Any, *rest: Any) -> Any:
        if operation is None:
            overtake()
        else:
            real, last = getattr(type(bucket), operation), {"stat": ARCHIVE}.get(operation, SIDECAR)

            def watched(self: Bucket, name: str, *arguments: Any) -> Any:
                result = real(self, name, *arguments)
                if name == last:
                    overtake()
                return result

            monkeypatch.setattr(type(bucket), operation, watched)
        return delete_all(bucket, [view for view in views if view.name.step == 10], *rest)

    monkeypatch.setattr(upload_manager, "delete_all", delete)
    code, _ = either.call(*PRUNE, "--yes")
    names = [one.removeprefix("Checkpoints/") for one in (ARCHIVE, SIDECAR)]
    if moment == "sidecar deleted":  # what is left at any moment is no half that looks whole
        assert (names[0] in seen, names[1] in seen) == (True, False)
    if moment != "sidecar deleted" or is_gs:
        assert code == ExitCode.UNEXPECTED
        assert "was changed" in either.stderr or "412" in either.stderr
        assert set(names) <= set(either.objects())
        assert either.bucket.read_bytes(written) == newer


def test_prune_does_not_count_on_damaged_ones(either: Place) -> None:
    fill(either)
    either.change_archive(50, either.archive(50)[:-1])
    either.bucket.delete(archive_object(name(40)))
    either.forget()
    result = either.done("prune", "--remote", "--keep", "1", "--yes")
    reasons = {row["step"]: row["reason"] for row in result["checkpoints"]}
    assert reasons[30] == "latest"
    assert reasons[50].startswith("damaged, not touched")
    assert reasons[40].startswith("damaged, not touched")
    assert result["deleted"] == [name(10)]


def test_prune_leaves_other_branches_and_what_is_uploaded_now(place: Place) -> None:
    fill(place)
    for step, branch in ((40, 1), (30, 1)):
        sidecar = json.loads(place.bucket.read_bytes(sidecar_object(name(step))))
        sidecar["manifest"] |= {"branch": branch, "forks": [[0, 0], [1, 20]]}
        place.bucket.put_bytes(sidecar_object(name(step)), json.dumps(sidecar).encode())
    place.journal.record(name(10), RUN_ID, UploadState.UPLOADING)
    _, result = place.read("prune", "--remote", "--keep", "1", "--yes")
    assert {row["step"]: row["reason"] for row in result["checkpoints"]} == {
        10: "uploading",
        20: "best",
        30: "older than the newest 1",
        40: "latest",
        50: "of another branch",
    }


def test_prune_of_several_runs_wants_to_know_which(place: Place) -> None:
    fill(place)
    place.publish_only(60, run_id=OTHER_RUN)
    place.publish_only(70, run_id=OTHER_RUN)
    place.forget()
    assert place.call(*PRUNE, "--yes")[0] == ExitCode.USAGE
    assert "--run-id RUN" in place.stderr
    _, result = place.read("prune", "--remote", "--keep", "1", "--yes", "--run-id", OTHER_RUN)
    assert result["deleted"] == [name(60)]
    _, result = place.read("prune", "--remote", "--keep", "1", "--yes", "--run-id", RUN_ID)
    assert result["deleted"] == [name(10), name(30), name(40)]


SETTINGS = {
    "retentionPolicy": {"retentionPeriod": "604800", "isLocked": True},
    "softDeletePolicy": {"retentionDurationSeconds": "1209600"},
    "versioning": {"enabled": True},
}


def test_prune_says_what_the_bucket_does_with_what_is_deleted(
    gcs_place: Place, gcs: FakeGcsServer
) -> None:
    def notes(**settings: Any) -> str:
        gcs.create_bucket("runs", **settings)
        fill(gcs_place)
        gcs_place.forget()
        return " ".join(gcs_place.read(*PRUNE, "--dry-run")[1]["notes"])

    said = notes(fields=SETTINGS)
    for word in ("(locked)", "7 days", "14 days", "versioning"):
        assert word in said
    assert "(not locked)" in notes(fields={"retentionPolicy": {"retentionPeriod": "60"}})
    assert "gone at once" in notes()
    assert "cannot be read" in notes(without=["storage.buckets.get"])


def test_a_prune_that_may_not_delete_changes_nothing(gcs_place: Place, gcs: FakeGcsServer) -> None:
    fill(gcs_place)
    before = gcs_place.objects()
    gcs.add_fault(
        Fault("status", None, "object.delete", name=f"team/{archive_object(name(10))}", status=403)
    )
    code, result = gcs_place.read(*PRUNE, "--yes")
    assert code == ExitCode.UNEXPECTED
    assert result["deleted"] == [name(30)]
    assert list(result["failed"]) == [name(10)]
    assert "1 could not be deleted" in gcs_place.stderr
    assert set(before) - set(gcs_place.objects()) == {f"{name(30)}.json", f"{name(30)}.tar.gz"}
    assert gcs_place.journal.latest()[name(10)].state is UploadState.VERIFIED
    gcs_place.done("verify", "10", "--deep")


# As a command.


def test_as_a_command_it_ends_with_its_exit_code_and_no_traceback(place: Place) -> None:
    place.publish(place.save(10))
    place.bucket.delete(archive_object(name(10)))
    for words, code, message in (
        (["verify"], ExitCode.NOT_VERIFIED, ""),
        (["download", "best"], ExitCode.USAGE, "Error: There is no checkpoint 'best' in"),
    ):
        command = [sys.executable, str(SCRIPT), *place.words(*words)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == code
        assert "Traceback" not in result.stderr
        assert result.stderr.startswith(message)
