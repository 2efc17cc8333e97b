"""One upload: sent once, verified before its sidecar, never over what belongs to somebody else."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gcs_server import FakeGcsServer, Fault
from tests.sample_checkpoints import RUN_ID, change_manifest, make_checkpoint
from utils.base.errors import (
    AccessDeniedError,
    CheckpointError,
    StorageError,
    TransientStorageError,
)
from utils.checkpoints.layout import (
    Manifest,
    archive_object,
    read_json,
    read_manifest,
    sidecar_object,
)
from utils.storage.bucket import Bucket, Meter, crc32c_of_bytes
from utils.storage.open import open_bucket
from utils.uploads import job as job_module
from utils.uploads import transports
from utils.uploads.job import ProgressReport, UploadJob, UploadProgress, UploadResult, run_job
from utils.uploads.parallel_upload import PARTS_FOLDER, parts_prefix
from utils.uploads.transport_choice import open_transport
from utils.uploads.transports import Transport, TransportOptions

NAME = "checkpoint-epoch0-step10-files0"
ARCHIVE, SIDECAR = archive_object(NAME), sidecar_object(NAME)
OTHER_RUN = "20250101-ffffffff"


class Killed(BaseException):
    """The process is gone at this point."""


Hook = Callable[[str, str], None]


def at(operation: str, name: str, act: Callable[[], object]) -> Hook:
    """Return a hook that acts at one operation on one object."""

    def hook(found: str, on: str) -> None:
        if (found, on) == (operation, name):
            act()

    return hook


def fail(error: Exception) -> None:
    raise error


nothing = at("", "", lambda: None)


class Watched:
    """A transport that is looked at, or goes wrong, before and after each operation."""

    def __init__(self, inner: Transport, before: Hook, after: Hook, calls: list[Any]) -> None:
        self.uri, self.close, self.remains = inner.uri, inner.close, inner.remains
        self._inner, self._before, self._after, self._calls = inner, before, after, calls

    def __getattr__(self, operation: str) -> Any:
        def call(name: str, *arguments: Any) -> Any:
            self._calls.append((operation, name, *arguments))
            self._before(operation, name)
            result = getattr(self._inner, operation)(name, *arguments)
            self._after(operation, name)
            return result

        return call


@dataclass
class Place:
    """A bucket: what is uploaded to it, and what is in it."""

    bucket: Bucket
    options: TransportOptions
    calls: list[Any] = field(default_factory=list)

    def upload(
        self,
        checkpoint: Path,
        *,
        before: Hook = nothing,
        after: Hook = nothing,
        progress: UploadProgress | None = None,
        **options: Any,
    ) -> UploadResult:
        def open_way(transport: TransportOptions, meter: Meter) -> Any:
            return Watched(open_transport(transport, meter), before, after, self.calls)

        self.calls.clear()
        job = UploadJob(str(checkpoint), self.options, **options)
        return run_job(job, progress or UploadProgress(), open_way)

    @property
    def puts(self) -> list[str]:
        return [call[1] for call in self.calls if call[0] == "put"]

    def contents(self) -> dict[str, bytes]:
        names = [info.name for info in self.bucket.list() if f"/{PARTS_FOLDER}/" not in info.name]
        return {name: self.bucket.read_bytes(name) for name in names}

    def parts(self) -> set[str]:
        return {info.name for info in self.bucket.list() if f"/{PARTS_FOLDER}/" in info.name}

    def check(self, *_: str) -> None:
        """Every sidecar lies beside the archive that it describes."""
        contents = self.contents()
        for name, data in contents.items():
            if name.endswith(".json"):
                suffix = json.loads(data)["archive"].get("format", ".tar.gz")
                archive = contents.get(f"{name.removesuffix('.json')}{suffix}")
                assert archive is not None, f"{name} without an archive"
                facts = {"size": len(archive), "crc32c": crc32c_of_bytes(archive)}
                if suffix != ".tar.gz":
                    facts["format"] = suffix
                assert json.loads(data)["archive"] == facts, f"{name} of another archive"

    def require_uploaded(self, checkpoint: Path) -> None:
        self.check()
        contents = self.contents()
        sidecar = json.loads(contents[SIDECAR])
        assert Manifest.from_json(sidecar["manifest"], "sidecar") == read_manifest(checkpoint)
        with tarfile.open(fileobj=io.BytesIO(contents[ARCHIVE])) as tar:
            for path in checkpoint.iterdir():
                member = tar.extractfile(f"{NAME}/{path.name}")
                assert member is not None
                assert member.read() == path.read_bytes()


BOTH = pytest.mark.parametrize("place", ["directory", "gs"], indirect=True)
GS = pytest.mark.parametrize("place", ["gs"], indirect=True)


@pytest.fixture(params=["directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    uri = str(tmp_path / "bucket")
    if request.param == "gs":
        request.getfixturevalue("gcs")
        uri = "gs://runs/a"
    options = TransportOptions(uri, "python" if request.param == "gs" else "directory", streams=2)
    bucket = open_bucket(uri)
    yield Place(bucket, options)
    bucket.close()


@pytest.fixture(autouse=True)
def _stream_archives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "SMALL_BYTES", 2**16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoints", 10)


def make_other(tmp_path: Path, **changes: Any) -> Path:
    """Return a checkpoint of the same name with other weights."""
    checkpoint = make_checkpoint(tmp_path / "other", 10, current_loss=1.25)
    change_manifest(checkpoint, **changes)
    return checkpoint


# What there is afterwards.


@BOTH
def test_the_archive_is_verified_and_has_its_sidecar(place: Place, checkpoint: Path) -> None:
    seen: list[tuple[str, list[str]]] = []

    def look(operation: str, name: str) -> None:
        place.check()
        if operation == "put":
            seen.append((name, sorted(place.contents())))

    result = place.upload(checkpoint, before=look, after=place.check)
    place.require_uploaded(checkpoint)
    assert seen == [(ARCHIVE, []), (SIDECAR, [ARCHIVE])]
    asked = [call[:2] for call in place.calls]
    assert ("stat", ARCHIVE) in asked[asked.index(("put", ARCHIVE)) : asked.index(("put", SIDECAR))]
    contents = place.contents()
    assert set(contents) == {ARCHIVE, SIDECAR}
    assert json.loads(contents[SIDECAR]) == {
        "manifest": read_json(checkpoint / "manifest.json"),
        "metadata": read_json(checkpoint / "metadata.json"),
        "config": read_json(checkpoint / "training_config.json"),
        "archive": {"size": result.size, "crc32c": result.crc32c},
    }
    assert result.size == len(contents[ARCHIVE])
    assert result.crc32c == crc32c_of_bytes(contents[ARCHIVE])
    assert result.sent >= result.size
    assert result.seconds > 0


def test_a_sidecar_never_holds_metadata_that_the_manifest_does_not_vouch_for(
    place: Place, checkpoint: Path
) -> None:
    path = checkpoint / "metadata.json"
    damaged = path.read_text("utf-8").replace('"epoch": 0', '"epoch": 1')
    with pytest.raises(CheckpointError, match="metadata.json is damaged"):
        place.upload(checkpoint, after=at("put", ARCHIVE, lambda: path.write_text(damaged)))
    assert SIDECAR not in place.contents()


@BOTH
def test_what_is_there_already_is_not_sent_again(place: Place, checkpoint: Path) -> None:
    first = place.upload(checkpoint)
    again = place.upload(checkpoint)
    assert place.puts == []
    assert (again.size, again.crc32c, again.sent) == (first.size, first.crc32c, 0)
    # Nor is it with another compression or format: the archive that is there is a good one.
    for compression in ("none", "zstd"):
        again = place.upload(checkpoint, compression=compression)
        assert (again.crc32c, again.suffix, place.puts) == (first.crc32c, ".tar.gz", [])


@pytest.mark.parametrize("compression", ["fast", "zstd"])
def test_an_archive_without_its_sidecar_gets_it_and_is_not_sent_again(
    place: Place, checkpoint: Path, caplog: pytest.LogCaptureFixture, compression: str
) -> None:
    caplog.set_level(logging.INFO)
    place.upload(checkpoint, compression=compression)
    place.bucket.delete(SIDECAR)
    assert place.upload(checkpoint, compression=compression).sent == 0
    assert place.puts == [SIDECAR]
    assert "is in the bucket already" in caplog.text
    place.check()


def test_another_archive_without_a_sidecar_is_replaced(place: Place, checkpoint: Path) -> None:
    place.bucket.put_bytes(ARCHIVE, b"half of an archive")
    place.upload(checkpoint, before=place.check, after=place.check)
    assert place.puts == [ARCHIVE, SIDECAR]
    place.require_uploaded(checkpoint)


def flip_last_bit(place: Place) -> None:
    """Damage the archive in the bucket; its size stays."""
    data = place.bucket.read_bytes(ARCHIVE)
    place.bucket.put_bytes(ARCHIVE, data[:-1] + bytes([data[-1] ^ 1]))


@BOTH
@pytest.mark.parametrize(
    "damage",
    [
        lambda place: place.bucket.delete(ARCHIVE),
        lambda place: place.bucket.put_bytes(ARCHIVE, b"damaged"),
        flip_last_bit,
    ],
    ids=["gone", "another size", "the same size"],
)
def test_a_sidecar_whose_archive_is_gone_or_damaged_is_made_good(
    place: Place, checkpoint: Path, damage: Callable[[Place], None]
) -> None:
    place.upload(checkpoint)
    damage(place)
    place.upload(checkpoint)
    place.require_uploaded(checkpoint)


def test_a_sidecar_with_other_metadata_is_written_anew_and_the_archive_left(
    place: Place, checkpoint: Path
) -> None:
    place.upload(checkpoint)
    good = place.contents()
    changed = json.loads(good[SIDECAR])
    changed["metadata"]["current_loss"] = 0.1
    place.bucket.put_bytes(SIDECAR, json.dumps(changed).encode())
    place.upload(checkpoint, before=place.check, after=place.check)
    assert (place.puts, place.contents()) == ([SIDECAR], good)


# Whose it is.


@pytest.mark.parametrize(
    ("sidecar", "owner"),
    [
        (b"\xff", "unknown"),
        (b"[" * 100_000, "unknown"),
        (b'{"manifest": {"run_id": "20260101-0a1b2c3d"}}', "unknown"),
        (None, OTHER_RUN),
    ],
    ids=["bytes", "deep", "half", "run"],
)
def test_the_sidecar_of_another_run_or_of_nobody_is_refused_and_nothing_changes(
    place: Place, checkpoint: Path, tmp_path: Path, sidecar: bytes | None, owner: str
) -> None:
    if sidecar is None:
        place.upload(make_other(tmp_path, run_id=OTHER_RUN))
    else:
        place.bucket.put_bytes(ARCHIVE, b"their archive")
        place.bucket.put_bytes(SIDECAR, sidecar)
    theirs = place.contents()
    with pytest.raises(CheckpointError, match=f"belongs to run {owner}, not {RUN_ID}") as error:
        place.upload(checkpoint)
    assert "--set run_name=" in str(error.value)
    assert place.contents() == theirs
    assert place.puts == []


@pytest.mark.parametrize("archive", [None, {}, {"size": float("inf"), "crc32c": "AAAAAA=="}])
def test_a_sidecar_of_this_run_that_says_nothing_of_its_archive_is_replaced(
    place: Place, checkpoint: Path, archive: object
) -> None:
    place.upload(checkpoint)
    sidecar = json.loads(place.bucket.read_bytes(SIDECAR))
    place.bucket.put_bytes(SIDECAR, json.dumps({**sidecar, "archive": archive}).encode())
    place.upload(checkpoint)
    assert place.puts == [SIDECAR]
    place.require_uploaded(checkpoint)


@pytest.mark.parametrize(
    ("has_archive", "forks"),
    [
        (True, [[0, 0], [1, 5], [2, 8]]),
        (False, [[0, 0], [1, 5], [2, 8]]),
        (True, [[0, 0], [2, 5]]),  # a second one off the same checkpoint
    ],
)
def test_the_checkpoint_of_a_branch_that_was_left_is_set_aside_first(
    place: Place,
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    has_archive: bool,
    forks: list[list[int]],
) -> None:
    caplog.set_level(logging.INFO)
    place.upload(make_other(tmp_path, branch=1, forks=[[0, 0], [1, 5]]))
    if not has_archive:
        place.bucket.delete(ARCHIVE)
    theirs = place.contents()
    change_manifest(checkpoint, branch=2, forks=forks)
    check = place.check if has_archive else nothing
    place.upload(checkpoint, before=check, after=check)
    aside = "Checkpoints/set-aside/branch-1"
    contents = place.contents()
    assert contents.pop(f"{aside}/{NAME}.tar.gz", None) == theirs.get(ARCHIVE)
    assert contents.pop(f"{aside}/{NAME}.json") == theirs[SIDECAR]
    assert set(contents) == {ARCHIVE, SIDECAR}
    assert (
        not has_archive
        or f"of branch 1 of this run. It is copied to {place.options.uri}/{aside}." in caplog.text
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ((1, [[0, 0], [1, 5]]), (0, [])),  # a later one
        ((2, [[0, 0], [1, 5], [2, 8]]), (1, [[0, 0], [1, 5]])),
        ((2, [[0, 0], [2, 3]]), (1, [[0, 0], [1, 5]])),
    ],
)
def test_the_checkpoint_of_a_later_branch_is_refused(
    place: Place, checkpoint: Path, tmp_path: Path, theirs: Any, ours: Any
) -> None:
    place.upload(make_other(tmp_path, branch=theirs[0], forks=theirs[1]))
    before = place.contents()
    change_manifest(checkpoint, branch=ours[0], forks=ours[1])
    with pytest.raises(CheckpointError, match=f"belongs to branch {theirs[0]} of this run"):
        place.upload(checkpoint)
    assert place.contents() == before


@BOTH
def test_the_same_step_saved_again_by_the_same_branch_is_replaced(
    place: Place, checkpoint: Path, tmp_path: Path
) -> None:
    aside = f"Checkpoints/set-aside/branch-0/{NAME}"
    uploads = [make_other(tmp_path), checkpoint, make_other(tmp_path / "again")]
    before = []
    for path in uploads:
        place.upload(path, before=place.check, after=place.check)
        before.append(place.contents())
    place.require_uploaded(uploads[-1])
    copies = {aside: before[0], aside.replace("branch-0", "branch-0-2"): before[1]}
    after = place.contents()
    suffixes = {".tar.gz": ARCHIVE, ".json": SIDECAR}
    assert set(after) == {
        ARCHIVE,
        SIDECAR,
        *(f"{copy}{end}" for copy in copies for end in suffixes),
    }
    for copy, contents in copies.items():
        assert all(after[f"{copy}{end}"] == contents[name] for end, name in suffixes.items())


def test_a_step_saved_again_in_another_format_replaces_the_older_archive(
    place: Place, checkpoint: Path, tmp_path: Path
) -> None:
    aside = f"Checkpoints/set-aside/branch-0/{NAME}"
    place.upload(make_other(tmp_path))
    before = place.contents()
    place.upload(checkpoint, before=place.check, after=place.check, compression="zstd")
    after = place.contents()
    assert set(after) == {
        archive_object(NAME, ".tar.zst"),
        SIDECAR,
        f"{aside}.tar.gz",
        f"{aside}.json",
    }
    assert (after[f"{aside}.tar.gz"], after[f"{aside}.json"]) == (before[ARCHIVE], before[SIDECAR])


@BOTH
def test_a_sidecar_that_is_written_at_this_moment_is_neither_deleted_nor_replaced(
    place: Place, checkpoint: Path, tmp_path: Path
) -> None:
    place.upload(make_other(tmp_path))
    newer = b'{"newer": true}'
    write_newer = at("delete", SIDECAR, lambda: place.bucket.put_bytes(SIDECAR, newer))
    with pytest.raises(TransientStorageError):
        place.upload(checkpoint, before=write_newer)
    assert place.contents()[SIDECAR] == newer


# What goes wrong.


@BOTH
def test_an_object_that_is_not_what_was_sent_is_an_error_and_gets_no_sidecar(
    place: Place, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def damage_and_reset() -> None:
        flip_last_bit(place)
        fail(TransientStorageError("connection reset"))

    caplog.set_level(logging.INFO)
    with pytest.raises(TransientStorageError, match="connection reset"):
        place.upload(checkpoint, after=at("put", ARCHIVE, damage_and_reset))
    assert "arrived" not in caplog.text
    with pytest.raises(TransientStorageError, match="the bucket holds .* instead of"):
        place.upload(checkpoint, after=at("put", ARCHIVE, lambda: flip_last_bit(place)))
    assert set(place.contents()) == {ARCHIVE}
    lose = at("put", ARCHIVE, lambda: place.bucket.delete(ARCHIVE))
    with pytest.raises(TransientStorageError, match="the bucket holds nothing instead of"):
        place.upload(checkpoint, after=lose)
    assert place.contents() == {}


@BOTH
@pytest.mark.parametrize(("had_object", "with_sidecar"), [(True, False), (False, True)])
@pytest.mark.parametrize("moment", [("after", "read", SIDECAR), ("before", "put", ARCHIVE)])
def test_what_another_writer_brought_meanwhile_is_not_overwritten(
    place: Place,
    checkpoint: Path,
    tmp_path: Path,
    had_object: bool,
    with_sidecar: bool,
    moment: tuple[str, str, str],
) -> None:
    other = make_other(tmp_path, run_id=OTHER_RUN)
    if had_object:
        place.bucket.put_bytes(ARCHIVE, b"an archive without a sidecar")
    rival = replace(place, calls=[])

    def overtake() -> None:
        rival.upload(other)
        if not with_sidecar:
            place.bucket.delete(SIDECAR)

    hooks: dict[str, Any] = {moment[0]: at(*moment[1:], overtake)}
    with pytest.raises(TransientStorageError):
        place.upload(checkpoint, **hooks)
    theirs = place.contents()
    assert len(theirs) == 1 + with_sidecar
    # The next attempt looks at what is there now.
    if with_sidecar:
        with pytest.raises(CheckpointError, match=f"belongs to run {OTHER_RUN}"):
            place.upload(checkpoint)
        assert place.contents() == theirs
    else:
        place.upload(checkpoint)
        place.require_uploaded(checkpoint)


@pytest.mark.parametrize("moment", [("after", "put", ARCHIVE), ("before", "put", SIDECAR)])
def test_a_sidecar_that_another_writer_brought_meanwhile_is_not_overwritten(
    place: Place, checkpoint: Path, moment: tuple[str, str, str]
) -> None:
    overtake = at(*moment[1:], lambda: place.bucket.put_bytes(SIDECAR, b"theirs"))
    hooks: dict[str, Any] = {moment[0]: overtake}
    with pytest.raises(TransientStorageError):
        place.upload(checkpoint, **hooks)
    assert place.contents()[SIDECAR] == b"theirs"


@pytest.mark.parametrize("lost", [ARCHIVE, SIDECAR])
def test_an_answer_that_was_lost_does_not_send_the_archive_again(
    place: Place, checkpoint: Path, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reset = at("put", lost, lambda: fail(TransientStorageError("connection reset")))
    if lost == ARCHIVE:
        place.upload(checkpoint, after=reset)
        assert "arrived, though its answer did not: connection reset" in caplog.text
        assert place.puts == [ARCHIVE, SIDECAR]
    else:
        with pytest.raises(TransientStorageError, match="connection reset"):
            place.upload(checkpoint, after=reset)
        place.upload(checkpoint)
        assert place.puts == []
    place.require_uploaded(checkpoint)


@GS
def test_over_a_bad_connection_it_arrives_whole(
    place: Place, gcs: FakeGcsServer, checkpoint: Path
) -> None:
    faults = [
        gcs.add_fault(Fault("status", operation="upload", times=2, status=503)),
        gcs.add_fault(Fault("reset", operation="upload", after_bytes=500)),
        gcs.add_fault(Fault("lost_answer", operation="upload")),
        gcs.add_fault(Fault("lost_answer", operation="object.compose")),
    ]
    place.upload(checkpoint, before=place.check, after=place.check)
    assert [fault.fired for fault in faults] == [2, 1, 1, 1]
    place.require_uploaded(checkpoint)
    assert set(place.contents()) == {ARCHIVE, SIDECAR}
    assert place.parts() == set()
    assert gcs.unfinished_uploads() == []


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EIO, TransientStorageError),
        (errno.ENOSPC, TransientStorageError),
        (errno.EACCES, StorageError),
    ],
)
def test_an_error_of_a_local_file_is_tried_again_where_it_may_pass(
    place: Place, checkpoint: Path, number: int, error: type[StorageError]
) -> None:
    fault = OSError(number, os.strerror(number), "scratch")
    with pytest.raises(StorageError, match=f"scratch: {os.strerror(number)}") as caught:
        place.upload(checkpoint, before=at("put", ARCHIVE, lambda: fail(fault)))
    assert type(caught.value) is error


@BOTH
@pytest.mark.parametrize("change", ["gone", "incomplete", "missing", "damaged"])
def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_is_in_the_bucket(
    place: Place, checkpoint: Path, change: str
) -> None:
    if change == "gone":
        shutil.rmtree(checkpoint)
    elif change == "damaged":
        (checkpoint / "model.safetensors").write_bytes(b"weightz" * 100)
    else:
        name = "manifest.json" if change == "incomplete" else "model.safetensors"
        (checkpoint / name).unlink()
    # Streamed through the client of gs://, its error comes back as one of the bucket.
    with pytest.raises((CheckpointError, StorageError), match=NAME) as error:
        place.upload(checkpoint)
    assert not isinstance(error.value, TransientStorageError)
    assert place.contents() == {}


# Killed anywhere, the next attempt completes it.


def prepare(place: Place, checkpoint: Path, tmp_path: Path, there: str) -> None:
    if there != "nothing":
        place.upload(make_other(tmp_path))
    if there == "branch left":
        change_manifest(checkpoint, branch=1, forks=[[0, 0], [1, 5]])


@pytest.mark.parametrize(
    ("place", "there", "moment"),
    [
        ("directory", "nothing", "before"),
        ("directory", "same branch", "after"),
        ("directory", "branch left", "before"),
        ("directory", "branch left", "after"),
        ("gs", "branch left", "before"),
    ],
    indirect=["place"],
)
def test_killed_at_any_step_the_next_attempt_completes_it(
    place: Place, checkpoint: Path, tmp_path: Path, there: str, moment: str
) -> None:
    prepare(place, checkpoint, tmp_path, there)
    origin = place.contents()
    kills = 0
    while True:
        for info in list(place.bucket.list()):
            place.bucket.delete(info.name)
        for name, data in origin.items():
            place.bucket.put_bytes(name, data)
        steps = iter(range(kills + 1))

        def kill(operation: str, name: str, steps: Iterator[int] = steps) -> None:
            place.check()
            if next(steps, None) is None:
                raise Killed

        next(steps)
        try:
            hooks: dict[str, Any] = {moment: kill}
            place.upload(checkpoint, **hooks)
        except Killed:
            kills += 1
        else:
            break
        place.check()
        place.upload(checkpoint, before=place.check, after=place.check)
        place.require_uploaded(checkpoint)
        assert place.parts() == set()
        if there == "branch left":
            for name in (ARCHIVE, SIDECAR):
                aside = name.replace("Checkpoints/", "Checkpoints/set-aside/branch-0/")
                assert place.contents()[aside] == origin[name]
    assert kills >= 6


# What interrupted uploads left.


@GS
@pytest.mark.parametrize("should_sweep", [True, False])
def test_parts_of_interrupted_uploads_are_removed(
    place: Place, checkpoint: Path, should_sweep: bool
) -> None:
    names = [NAME, "checkpoint-epoch0-step5-files0", "checkpoint-epoch0-step20-files0"]
    parts = {name: f"{parts_prefix(archive_object(name))}00007" for name in names}
    for part in parts.values():
        place.bucket.put_bytes(part, b"x")
    place.upload(checkpoint, should_sweep=should_sweep, owed=(NAME, names[2]))
    assert set(place.contents()) == {ARCHIVE, SIDECAR}
    assert place.parts() == {parts[names[2]]} | (set() if should_sweep else {parts[names[1]]})


def test_remains_that_cannot_be_removed_are_no_failure(
    place: Place, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(operation: str, name: str) -> None:
        if operation == "remove_unfinished":
            fail(AccessDeniedError("403 Forbidden"))

    assert place.upload(checkpoint, before=refuse).size > 0
    [line] = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert line.startswith(f"{NAME} is verified in the bucket.")
    assert "not removed: 403 Forbidden" in line
    assert line.endswith(f": rm {place.bucket.uri}/Checkpoints/.tmp-*.part")
    place.require_uploaded(checkpoint)


@GS
def test_remains_that_a_busy_bucket_does_not_let_go_hold_no_upload_up(
    place: Place,
    checkpoint: Path,
    gcs: FakeGcsServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_module, "TIDY_SECONDS", 0.3)
    place.options = replace(place.options, retry_seconds=8)
    fault = gcs.add_fault(Fault("status", None, "object.delete"))
    over = threading.Event()

    def note_the_end(operation: str, name: str) -> None:
        if operation == "remove_unfinished":
            over.set()

    place.upload(checkpoint, after=note_the_end)
    assert not over.is_set()  # it is still being tried
    gcs.clear_faults()
    assert over.wait(20)
    assert fault.fired
    place.require_uploaded(checkpoint)
    [line] = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert "not removed: no answer for 0 s." in line
    assert line.endswith(": python scripts/prepare_data.py rm gs://runs/a/Checkpoints/.parts")


# Progress.


def test_progress_says_what_is_done_and_how_far_it_is(place: Place, checkpoint: Path) -> None:
    progress = UploadProgress()
    seen: list[tuple[str, str, ProgressReport]] = []

    def look(operation: str, name: str) -> None:
        seen.append((operation, name, progress.report()))

    total = read_manifest(checkpoint).total_bytes
    result = place.upload(checkpoint, before=look, after=look, progress=progress)
    stages = [report.stage for _, _, report in seen]
    assert stages[0] == "checking"
    assert sorted(set(stages), key=stages.index) == [
        "checking",
        "archiving",
        "uploading",
        "verifying",
    ]
    put = [report for operation, name, report in seen if (operation, name) == ("put", ARCHIVE)]
    assert (put[0].read, put[0].sent, put[0].size, put[0].total) == (0, 0, None, total)
    assert put[1].sent >= result.size == put[1].size
    manifest_bytes = (checkpoint / "manifest.json").stat().st_size
    assert put[1].read == total + manifest_bytes


@BOTH
def test_what_is_sent_is_held_to_the_rate(
    place: Place, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr("utils.storage.bucket.time", clock)
    slow = replace(place, options=replace(place.options, streams=1, max_bytes_per_second=100))
    result = slow.upload(checkpoint)
    assert sum(slept) >= result.size / 100
