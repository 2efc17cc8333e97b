"""A third kind of bucket, from one file and one line: what works in gs:// works in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import evaluate, export_model, prepare_data, upload_manager
from tests.memory_bucket import STORED
from utils.base.errors import ExitCode, StorageError, UsageError
from utils.base.uri import BUCKETS, find_mistake, local_path, require_path, split_uri
from utils.checkpoints.layout import find_checkpoints
from utils.checkpoints.store import verify_checkpoint
from utils.uploads import uploader
from utils.uploads.job import UploadProgress, run_job
from utils.uploads.transport_choice import open_transport
from utils.uploads.transports import TransportOptions

Train = Callable[..., int]
SETTINGS = ("data_uri=mem://corpus/data", "checkpoint_uri=mem://runs/a", "save_steps=2")
WORDS = [word for setting in SETTINGS for word in ("--set", setting)]
NAMES = [f"checkpoint-epoch0-step{step}-files0" for step in (2, 4)]


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register it. An upload stays in this process, whose memory no other has."""
    STORED.clear()
    monkeypatch.setitem(BUCKETS, "mem", "tests.memory_bucket:MemoryBucket")
    monkeypatch.setattr(uploader, "run_in_process", lambda job, *_: run_job(job, UploadProgress()))


@pytest.fixture
def corpus(sample_data: Path) -> None:
    assert prepare_data.main(["put", str(sample_data), "mem://corpus/data"]) == 0


def test_a_run_reads_uploads_resumes_exports_and_gives_back(
    run_train: Train, corpus: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train("--max-steps", "4", settings=SETTINGS) == 0
    assert sorted(STORED["runs"]) == sorted(
        f"a/Checkpoints/{name}{suffix}" for name in NAMES for suffix in (".json", ".tar.gz")
    )
    assert upload_manager.main(["verify", "--deep", *WORDS]) == 0
    assert upload_manager.main(["download", "latest", "--to", "back", *WORDS]) == 0
    assert verify_checkpoint(tmp_path / "run" / "back" / NAMES[1]).step == 4
    command = ["mem://runs/a/latest", "--output", "mem://runs/exports/small", "--device", "cpu"]
    assert export_model.main(command) == 0
    assert export_model.main(command) == ExitCode.USAGE
    for model in ("mem://runs/exports/small", "mem://runs/a/latest"):
        options = ["--data", "mem://corpus/data", "--max-tokens", "200", "--device", "cpu"]
        assert evaluate.main([model, *options, "--json"]) == 0
    capsys.readouterr()
    words = ("--max-steps", "6", "--accept-config-change", "--resume", "mem://runs/a/latest")
    assert run_train(*words, folder="new", settings=SETTINGS) == 0
    assert f"Resumed from checkpoints/{NAMES[1]}" in capsys.readouterr().out
    steps = [name.step for name in find_checkpoints(tmp_path / "new" / "checkpoints")]
    assert steps == [4, 6]
    assert upload_manager.main(["prune", "--remote", "--keep", "1", "--yes", *WORDS]) == 0
    assert not [name for name in STORED["runs"] if NAMES[0] in name]
    archive = "a/Checkpoints/checkpoint-epoch0-step6-files0.tar.gz"
    data, generation = STORED["runs"][archive]
    STORED["runs"][archive] = (data[:-1] + b"?", generation)
    assert upload_manager.main(["verify", *WORDS]) == ExitCode.NOT_VERIFIED


def test_its_addresses_are_checked_as_others_are(tmp_path: Path) -> None:
    assert find_mistake("mem://bucket/a") is None
    for text in ("mem:/bucket/a", "MEM://bucket/a", "mem//bucket/a"):
        assert (find_mistake(text) or "").startswith(f"{text}: did you mean mem://bucket/a?")
    assert find_mistake("s3://bucket/a") is not None
    with pytest.raises(UsageError, match="give a path on this machine"):
        require_path("mem://bucket/a")
    assert local_path("mem://bucket/a") is None
    assert split_uri("mem://bucket/a/b/") == ("mem://bucket/a", "b")
    assert split_uri("mem://bucket") is None
    assert split_uri(str(tmp_path / "x")) == (str(tmp_path), "x")
    assert split_uri("/") is None


def test_it_is_written_through_its_own_methods() -> None:
    for name in ("auto", "python"):
        assert open_transport(TransportOptions("mem://runs", name)).name == "python"
    for name in ("gsutil", "gcloud", "directory"):
        with pytest.raises(StorageError, match=f"upload_transport {name} needs a"):
            open_transport(TransportOptions("mem://runs", name))
