"""train.py with gs:// on both ends, against the project's own fake server on 127.0.0.1."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.training_config import get_training_config
from tests.gcs_server import FakeGcsServer, Fault
from utils.base.errors import ExitCode
from utils.checkpoints.store import verify_checkpoint
from utils.start import forecast
from utils.tracking.metrics_log import read_metrics
from utils.uploads.command_transports import find_gsutil

Train = Callable[..., int]
GCS = ("data_uri=gs://corpus/data", "checkpoint_uri=gs://runs/a")


@pytest.fixture
def server(
    tmp_path: Path,
    sample_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    unclosed_sockets: None,
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


def test_data_and_checkpoints_travel_through_gcs_over_a_bad_line(
    run_train: Train,
    server: FakeGcsServer,
    trained_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.create_bucket("runs", requester_pays=True)
    settings = (*GCS, "upload_transport=python", "save_steps=2", "gcs_user_project=payer")
    server.add_fault(Fault("status", operation="object.download", status=503, times=2))
    server.add_fault(Fault("status", operation="upload", status=503, times=2, skip=1))
    words = ("--max-steps", "4", "--stop-after", "2")
    assert run_train(*words, settings=settings) == 0
    capsys.readouterr()
    assert run_train(*words, folder="another", settings=settings) == ExitCode.PREFLIGHT
    assert "holds checkpoints of another run" in capsys.readouterr().err

    # A new machine goes on where that one ended, as if nothing had happened between.
    cut = server.add_fault(Fault("reset", operation="object.download", name="*.tar.gz"))
    words = ("--max-steps", "4", "--resume", "gs://runs/a/latest")
    assert run_train(*words, folder="new", settings=settings) == 0
    assert cut.fired == 1
    assert "Resumed from checkpoints/checkpoint-epoch0-step2-files0" in capsys.readouterr().out
    here, there = (
        dict(zip(*read_metrics(folder / "logs/metrics.jsonl").series("loss"), strict=True))
        for folder in (tmp_path / "new", trained_run)
    )
    assert here
    assert here.items() <= there.items()
    names = [f"checkpoint-epoch0-step{step}-files0" for step in (2, 4)]
    for name in names:
        unpack_and_verify(server, name, tmp_path / f"unpacked-{name}")
    left = set(server.list_objects("runs"))
    assert left == {f"a/Checkpoints/{n}{s}" for n in names for s in (".tar.gz", ".json")}


def test_a_bucket_that_refuses_writes_is_a_preflight_failure(
    run_train: Train, server: FakeGcsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        "data_uri=gs://corpus/data",
        "checkpoint_uri=gs://corpus/mine",
        "upload_transport=python",
    )
    assert run_train("--max-steps", "2", settings=settings) == ExitCode.PREFLIGHT
    errors = capsys.readouterr().err
    assert "Ask for the right to write gs://corpus/mine" in errors
    assert "buckets of your own" not in errors
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_production_in_a_foreign_bucket_shows_a_file_that_names_ones_own(
    run_train: Train,
    server: FakeGcsServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    is_there: bool,
) -> None:
    production = get_training_config("production")
    if is_there:
        server.create_bucket("refocused-ai", writable=False, without=["storage.objects.list"])
    settings = (
        f"data_uri={production.data_uri}",
        f"checkpoint_uri={production.checkpoint_uri}",
        "upload_transport=python",
    )
    assert run_train("--max-steps", "2", settings=settings) == ExitCode.PREFLIGHT
    errors = capsys.readouterr().err
    assert ("Ask for the right to read" if is_there else "Check the name of the bucket") in errors
    assert errors.count("python train.py --config mine") == 1
    shown = errors[errors.index("{\n") :]
    assert len(shown.strip().splitlines()) == 6
    (tmp_path / "mine.json").write_text(shown)
    mine = get_training_config(str(tmp_path / "mine.json"))
    places = {
        "run_name": "mine",
        "data_uri": "gs://MY-BUCKET/data",
        "checkpoint_uri": "gs://MY-BUCKET",
    }
    assert mine == replace(production, **places)


@pytest.mark.gsutil
@pytest.mark.skipif(find_gsutil() is None, reason="gsutil is not installed")
def test_real_gsutil_uploads_what_a_long_run_saved(
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
    # It is measured before there is any directory, and leaves none.
    assert run_train("--max-steps", "2", "--dry-run", settings=settings) == 0
    told = capsys.readouterr().out
    assert "could not be measured" not in told
    assert "of the time between two" in " ".join(told.split())
    assert server.list_objects("runs") == []
    assert not (tmp_path / "run" / "checkpoints").exists()

    assert run_train("--max-steps", "2", settings=settings) == 0
    unpack_and_verify(server, "checkpoint-epoch0-step2-files0", tmp_path / "unpacked")
