"""train.py with gs:// on both ends, against the project's own fake server on 127.0.0.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts import upload_manager
from tests.gcs_server import FakeGcsServer, Fault
from utils.base.errors import ExitCode
from utils.checkpoints.layout import find_checkpoints
from utils.checkpoints.store import verify_checkpoint
from utils.start import forecast
from utils.tracking.metrics_log import read_metrics
from utils.uploads.transports import find_gsutil

Train = Callable[..., int]
GCS = ("data_uri=gs://corpus/data", "checkpoint_uri=gs://runs/a")
STAND_IN = f"""#!{sys.executable} -SE
import os, sys, urllib.parse
verb = next(word for word in sys.argv if word in ("cp", "cat", "stat", "rm"))
place = os.path.join({{folder!r}}, urllib.parse.quote(sys.argv[-1], safe=""))
if verb == "cp":
    source = sys.stdin.buffer if sys.argv[-2] == "-" else open(sys.argv[-2], "rb")
    with open(place, "wb") as file:
        file.write(source.read())
elif not os.path.exists(place):
    sys.exit("CommandException: No URLs matched")
elif verb == "cat":
    with open(place, "rb") as file:
        sys.stdout.buffer.write(file.read())
elif verb == "stat":
    print("Content-Length: 1", "Hash (crc32c): AAAAAA==", "Generation: 1", sep="\\n")
else:
    os.remove(place)
"""


@pytest.fixture
def server(
    tmp_path: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeGcsServer]:
    with FakeGcsServer(tmp_path / "gcs", tls=True) as running:
        running.create_bucket("corpus", writable=False)
        running.create_bucket("runs", writable=True)
        for path in sorted(sample_data.iterdir()):
            running.put_object("corpus", f"data/{path.name}", path.read_bytes())
        for name, value in running.client_environment().items():
            monkeypatch.setenv(name, value)
        yield running


def unpack_and_verify(server: FakeGcsServer, name: str, folder: Path) -> None:
    """Check that the archive in the bucket is the checkpoint, as plain tar reads it."""
    folder.mkdir()
    archive = folder / "archive.tar.gz"
    archive.write_bytes(server.read_object("runs", f"a/Checkpoints/{name}.tar.gz"))
    subprocess.run(["tar", "xzf", archive.name], cwd=folder, check=True)
    sidecar = json.loads(server.read_object("runs", f"a/Checkpoints/{name}.json"))
    assert verify_checkpoint(folder / name).to_json() == sidecar["manifest"]


def test_data_and_checkpoints_travel_through_gcs(
    run_train: Train, server: FakeGcsServer, tmp_path: Path
) -> None:
    settings = (*GCS, "upload_transport=python", "save_steps=2")
    assert run_train("--max-steps", "4", settings=settings) == 0
    names = [str(name) for name in find_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["checkpoint-epoch0-step2-files0", "checkpoint-epoch0-step4-files0"]
    for name in names:
        unpack_and_verify(server, name, tmp_path / f"unpacked-{name}")
    left = set(server.list_objects("runs"))
    assert left == {f"a/Checkpoints/{n}{s}" for n in names for s in (".tar.gz", ".json")}


@pytest.mark.parametrize(
    "transport",
    [
        "python",
        pytest.param(
            "gsutil",
            marks=[
                pytest.mark.gsutil,
                pytest.mark.skipif(find_gsutil() is None, reason="gsutil is not installed"),
            ],
        ),
    ],
)
def test_archives_of_both_formats_lie_beside_each_other(
    run_train: Train,
    server: FakeGcsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    transport: str,
) -> None:
    for name, value in server.gsutil_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    settings = (*GCS, f"upload_transport={transport}", "save_steps=2")
    words = ("--max-steps", "6", "--stop-after")
    assert run_train(*words, "2", settings=settings) == 0
    settings = (*settings, "upload_compression=zstd")
    resume = ("4", "--accept-config-change", "--resume", "latest")
    assert run_train(*words, *resume, settings=settings) == 0
    left = set(server.list_objects("runs"))
    names = [f"a/Checkpoints/checkpoint-epoch0-step{step}-files0" for step in (2, 4)]
    archives = {f"{names[0]}.tar.gz", f"{names[1]}.tar.zst"}
    assert left == {*archives, *(f"{name}.json" for name in names)}
    chosen = [word for setting in settings for word in ("--set", setting)]
    assert upload_manager.main(["verify", "--deep", *chosen]) == 0
    capsys.readouterr()
    # A new machine goes on from the newest, whatever its format, and with any setting.
    words = ("--max-steps", "6", "--accept-config-change", "--resume", "gs://runs/a/latest")
    assert run_train(*words, folder="new", settings=(*settings, "upload_compression=none")) == 0
    assert "Resumed from checkpoints/checkpoint-epoch0-step4-files0" in capsys.readouterr().out
    assert upload_manager.main(["prune", "--remote", "--keep", "1", "--yes", *chosen]) == 0
    newest = "a/Checkpoints/checkpoint-epoch0-step6-files0"
    left = {name for name in server.list_objects("runs") if "/." not in name}
    assert left == {f"{newest}.json", f"{newest}.tar.gz"}


def test_a_damaged_tokenizer_in_the_bucket_is_refused(
    run_train: Train, server: FakeGcsServer, sample_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sample_data.iterdir():
        data = path.read_bytes()
        damaged = data.replace(b"a", b"b", 1) if path.name == "tokenizer.json" else data
        server.put_object("runs", f"data/{path.name}", damaged)
    assert run_train("--dry-run", settings=("data_uri=gs://runs/data",)) == 2
    assert "gs://runs/data/tokenizer.json is damaged" in capsys.readouterr().err


def test_a_new_machine_goes_on_from_gs(
    run_train: Train, server: FakeGcsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*GCS, "upload_transport=python", "save_steps=2", "logging_steps=1")
    straight = (*settings, "checkpoint_uri=")
    assert run_train("--max-steps", "6", folder="straight", settings=straight) == 0
    assert run_train("--max-steps", "6", "--stop-after", "4", settings=settings) == 0
    server.add_fault(Fault("reset", operation="download", name="step4", times=1, after_bytes=5000))
    words = ("--max-steps", "6", "--resume", "gs://runs/a/latest")
    capsys.readouterr()
    assert run_train(*words, folder="new", settings=settings) == 0
    assert "Resumed from checkpoints/checkpoint-epoch0-step4-files0" in capsys.readouterr().out
    curves = [
        dict(
            zip(*read_metrics(tmp_path / folder / "logs/metrics.jsonl").series("loss"), strict=True)
        )
        for folder in ("straight", "new")
    ]
    assert curves[1] == {step: curves[0][step] for step in (5, 6)}
    # One that was cut off in the bucket is passed over for the one before.
    name = "a/Checkpoints/checkpoint-epoch0-step6-files0.tar.gz"
    server.put_object("runs", name, server.read_object("runs", name)[:-5000])
    words = ("--max-steps", "6", "--resume", "latest")
    assert run_train(*words, folder="third", settings=settings) == 0
    told = capsys.readouterr().out
    assert "step6-files0" in told
    assert "Resumed from checkpoints/checkpoint-epoch0-step4-files0" in told


def test_a_bucket_whose_requests_the_project_pays_for_gives_back_what_it_has(
    run_train: Train, server: FakeGcsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.create_bucket("paid", writable=True, requester_pays=True)
    settings = (
        "data_uri=gs://corpus/data",
        "checkpoint_uri=gs://paid/a",
        "gcs_user_project=payer",
        "upload_transport=python",
    )
    words = ("--max-steps", "3")
    assert run_train(*words, "--stop-after", "2", settings=settings) == 0
    capsys.readouterr()
    assert run_train(*words, folder="another", settings=settings) == ExitCode.PREFLIGHT
    assert "holds checkpoints of another run" in capsys.readouterr().err
    assert run_train(*words, "--resume", "latest", folder="new", settings=settings) == 0
    told = capsys.readouterr().out
    assert "Resumed from checkpoints/checkpoint-epoch0-step2-files0" in told


def test_transient_errors_of_the_bucket_do_not_stop_the_run(
    run_train: Train, server: FakeGcsServer
) -> None:
    server.add_fault(Fault("status", operation="download", status=503, times=2))
    server.add_fault(Fault("status", operation="upload", status=503, times=2, skip=1))
    assert run_train("--max-steps", "2", settings=(*GCS, "upload_transport=python")) == 0


@pytest.mark.parametrize(("streams", "status"), [(1, 404), (4, 410)])
def test_a_lost_upload_session_does_not_fail_the_run(
    run_train: Train, server: FakeGcsServer, tmp_path: Path, streams: int, status: int
) -> None:
    # A checkpoint of more than 8 MiB, which is sent in a resumable session.
    size = ("model_overrides.hidden_size=256", "model_overrides.intermediate_size=1024")
    settings = (*GCS, *size, "upload_transport=python", f"upload_streams={streams}")
    fault = server.add_fault(Fault("lost_session", status=status))
    assert run_train("--max-steps", "2", settings=settings) == 0
    assert fault.fired == 1
    unpack_and_verify(server, "checkpoint-epoch0-step2-files0", tmp_path / "unpacked")


def test_a_bucket_that_refuses_writes_is_a_preflight_failure(
    run_train: Train, server: FakeGcsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        "data_uri=gs://corpus/data",
        "checkpoint_uri=gs://corpus/mine",
        "upload_transport=python",
    )
    assert run_train("--max-steps", "2", settings=settings) == ExitCode.PREFLIGHT
    assert "Ask for the right to write gs://corpus/mine" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.gsutil
@pytest.mark.skipif(find_gsutil() is None, reason="gsutil is not installed")
def test_real_gsutil_uploads_what_the_run_saved(
    run_train: Train, server: FakeGcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.gsutil_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    settings = (*GCS, "upload_transport=gsutil")
    assert run_train("--max-steps", "2", settings=settings) == 0
    name = "checkpoint-epoch0-step2-files0"
    unpack_and_verify(server, name, tmp_path / "unpacked")
    downloaded = tmp_path / "again.tar.gz"
    program = find_gsutil()
    assert program is not None
    subprocess.run(
        [program, "-q", "cp", f"gs://runs/a/Checkpoints/{name}.tar.gz", str(downloaded)],
        env=os.environ,
        check=True,
    )
    assert downloaded.read_bytes() == server.read_object("runs", f"a/Checkpoints/{name}.tar.gz")
    with tarfile.open(downloaded) as archive:
        assert f"{name}/manifest.json" in archive.getnames()


def test_a_dry_run_measures_gsutil_before_there_is_any_directory(
    run_train: Train,
    server: FakeGcsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, objects = tmp_path / "bin" / "gsutil", tmp_path / "objects"
    for folder in (program.parent, objects):
        folder.mkdir()
    program.write_text(STAND_IN.format(folder=str(objects)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    settings = (*GCS, "upload_transport=gsutil")
    assert run_train("--max-steps", "2", "--dry-run", settings=settings) == 0
    told = capsys.readouterr().out
    assert "could not be measured" not in told
    assert "of the time between two" in " ".join(told.split())
    assert list(objects.iterdir()) == []
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.gsutil
@pytest.mark.skipif(find_gsutil() is None, reason="gsutil is not installed")
def test_a_long_run_by_real_gsutil_begins_in_a_fresh_directory(
    run_train: Train,
    server: FakeGcsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in server.gsutil_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(forecast, "LONG_RUN_SECONDS", 1e-9)  # any run is a long one
    settings = (*GCS, "upload_transport=gsutil")
    assert run_train("--max-steps", "2", settings=settings) == 0
    measured = [line for line in capsys.readouterr().out.splitlines() if "uploading" in line]
    assert measured
    assert not any("could not be measured" in line for line in measured)
    unpack_and_verify(server, "checkpoint-epoch0-step2-files0", tmp_path / "unpacked")
