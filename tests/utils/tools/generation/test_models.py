"""A model is found wherever it is, and loaded as it was trained."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig

from configs.model_config import known_vocab_size
from configs.training_config import TrainingConfig, get_training_config
from tests.gcs_server import FakeGcsServer
from tests.sample_checkpoints import make_checkpoint
from utils.base.errors import CheckpointError, UsageError
from utils.checkpoints.layout import read_manifest
from utils.models.tokenizer import load_tokenizer_from
from utils.remote.archive_reading import read_sidecar
from utils.remote.download import download_checkpoint
from utils.remote.loading import ModelSource, load_model
from utils.storage.directory import DirectoryBucket
from utils.tools.generation.finding import find_model
from utils.uploads.job import UploadJob, UploadProgress, run_job
from utils.uploads.transports import TransportOptions


@pytest.fixture
def config(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingConfig:
    """The configuration of the run, and an empty current directory."""
    monkeypatch.chdir(tmp_path)
    return get_training_config("test", {"output_dir": str(trained_run / "checkpoints")})


def newest(trained_run: Path) -> Path:
    return max((trained_run / "checkpoints").glob("*step4-*"))


@pytest.mark.parametrize("text", ["latest", "best", "4", "name", "path", "ending"])
def test_a_checkpoint_is_found_by_every_name(
    text: str, trained_run: Path, config: TrainingConfig
) -> None:
    path = newest(trained_run)
    words = {"name": path.name, "path": str(path), "ending": path.name[-12:]}
    found = find_model(words.get(text, text), config)
    assert (found.name, found.step, found.location) == (path.name, 4, str(path))


@pytest.mark.parametrize("text", ["latest", "2", "bucket/latest", "bucket/Checkpoints/NAME.tar.gz"])
def test_what_is_in_the_bucket_alone_is_downloaded_once(
    text: str, trained_run: Path, config: TrainingConfig, tmp_path: Path
) -> None:
    bucket = trained_run / "bucket"
    config = replace(config, output_dir="nothing", checkpoint_uri=str(bucket))
    text = text.replace("bucket", str(bucket)).replace("NAME", newest(trained_run).name)
    stages: list[str] = []
    found = find_model(text, config, lambda stage, done, total: stages.append(stage))
    assert found.step == (2 if text == "2" else 4)
    assert found.directory is not None
    assert found.directory.is_relative_to("cache/models")
    assert stages
    stages.clear()
    assert find_model(text, config, lambda stage, done, total: stages.append(stage)) == found
    assert not stages
    assert not (tmp_path / "nothing").exists()


def find_after_a_wait(text: str, lock: Path, meanwhile: Callable[[], None]) -> Path:
    """Find a model in another thread, which waits for this one's lock; return where it is."""
    is_waiting = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert record.getMessage().startswith("Another command downloads the same model")
            is_waiting.set()

    listener, logger = Listener(), logging.getLogger("utils.remote.finding")
    logger.addHandler(listener)
    level = logger.level
    logger.setLevel(logging.INFO)
    lock.parent.mkdir(parents=True)
    try:
        with ThreadPoolExecutor() as pool, FileLock(lock) as held:
            found = pool.submit(find_model, text, get_training_config("test"))
            assert is_waiting.wait(60), "it does not wait"
            meanwhile()
            held.release()
            return Path(found.result(60).location)
    finally:
        logger.setLevel(level)
        logger.removeHandler(listener)


def test_who_waited_for_a_download_looks_again_what_the_bucket_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri, models = str(tmp_path / "bucket"), tmp_path / "cache/models"
    bucket = DirectoryBucket(tmp_path / "bucket")
    old, new = (
        make_checkpoint(tmp_path / folder, 10, current_loss=loss)
        for folder, loss in (("old", 2.0), ("new", 1.0))
    )

    def upload(checkpoint: Path) -> None:
        job = UploadJob(str(checkpoint), TransportOptions(uri, "directory"))
        run_job(job, UploadProgress())

    upload(old)
    checksum = read_sidecar(bucket, old.name).archive.crc32c
    key = hashlib.sha256(f"{uri}\n{checksum}".encode()).hexdigest()[:16]

    def replace_archive() -> None:
        download_checkpoint(bucket, old.name, models / key, None)
        upload(new)

    found = find_after_a_wait(f"{uri}/latest", models / f".{key}.lock", replace_archive)
    assert read_manifest(found) == read_manifest(new)
    assert read_manifest(models / key / old.name) == read_manifest(old)


def test_who_waited_for_a_folder_looks_again_what_the_bucket_has(
    tmp_path: Path, gcs: FakeGcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def export(text: str) -> None:
        for name in ("config.json", "model.safetensors"):
            gcs.put_object("runs", f"exports/small/{name}", f"{text} {name}".encode())

    export("old")
    uri = "gs://runs/exports/small"
    lock = tmp_path / f"cache/models/.{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock"
    found = find_after_a_wait(uri, lock, lambda: export("new"))
    assert (found / "model.safetensors").read_text() == "new model.safetensors"


def test_a_folder_of_a_bucket_is_downloaded(
    trained_run: Path, config: TrainingConfig, gcs: FakeGcsServer
) -> None:
    for path in newest(trained_run).iterdir():
        if path.name in ("config.json", "model.safetensors", "tokenizer.json"):
            gcs.put_object("runs", f"exports/small/{path.name}", path.read_bytes())
    found = find_model("gs://runs/exports/small", config)
    assert (found.name, found.manifest) == ("small", None)
    loaded = load_model(found, device="cpu")
    assert loaded.tokenizer is not None
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        find_model("gs://runs/exports", config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("7", "no checkpoint '7'"),
        ("no/such/directory", "no such directory"),
        ("../x", "no such directory"),
        ("texts", "neither a checkpoint"),
        ("gs://runs", "say gs://"),
    ],
)
def test_what_is_no_model_is_refused(
    text: str, words: str, config: TrainingConfig, tmp_path: Path
) -> None:
    config = replace(config, checkpoint_uri="")
    (tmp_path / "texts").mkdir()
    with pytest.raises(UsageError, match=words):
        find_model(text, config)


def test_any_other_word_is_a_name_on_the_hub(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = find_model("someone/some-model", config)
    assert found.directory is None
    with pytest.raises(UsageError, match=r"someone/some-model is no checkpoint or directory here"):
        load_model(found, device="cpu")


def copy_of(path: Path, folder: Path) -> ModelSource:
    shutil.copytree(path, folder / path.name)
    return ModelSource(path.name, str(folder / path.name), read_manifest(path))


def test_only_the_files_of_the_model_are_verified(trained_run: Path, tmp_path: Path) -> None:
    source = copy_of(newest(trained_run), tmp_path)
    (tmp_path / source.name / "optimizer.bin").write_bytes(b"damaged")
    load_model(source, device="cpu")
    weights = tmp_path / source.name / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(source, device="cpu")


def test_a_model_that_transformers_would_complete_at_random_is_refused(
    trained_run: Path, tmp_path: Path
) -> None:
    source = copy_of(newest(trained_run), tmp_path)
    folder = tmp_path / source.name
    (folder / "manifest.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="has no weights for"):
        load_model(ModelSource("folder", str(folder)), device="cpu")


def test_more_layers_than_a_model_has_are_not_built(tmp_path: Path) -> None:
    GPTNeoXConfig(num_hidden_layers=10_001).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="num_hidden_layers must be at most 10000, got 10001"):
        load_model(ModelSource("made", str(tmp_path)), device="cpu")


def test_code_that_comes_with_a_model_is_not_run(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(prompt: str = "") -> str:
        raise SystemExit("it was asked")

    monkeypatch.setattr("builtins.input", ask)
    source = copy_of(newest(trained_run), tmp_path)
    folder = tmp_path / source.name
    (folder / "code.py").write_text("raise SystemExit('it was run')")
    values = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer_from(folder)
    assert tokenizer is not None
    assert tokenizer("a").input_ids  # its tokenizer.json needs no code
    values = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(ModelSource("own", str(folder)), device="cpu")
    for name in ("tokenizer.json", "config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="custom code"):
        load_tokenizer_from(folder)


def test_names_of_a_foreign_file_do_not_steer_the_terminal(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_of(newest(trained_run), tmp_path)
    path = tmp_path / source.name / "model.safetensors"
    save_file({**load_file(path), "evil\x1b[31m": torch.zeros(1)}, path, metadata={"format": "pt"})
    handlers = logging.getLogger("transformers").handlers
    handler = next(one for one in handlers if type(one) is logging.StreamHandler)
    shown = io.StringIO()
    monkeypatch.setattr(handler, "stream", shown)
    load_model(ModelSource("folder", str(path.parent)), device="cpu")
    logging.getLogger("transformers").warning("quoted: \x1b[31m")
    assert shown.getvalue().endswith("quoted: ?[31m\n")
    assert "evil" not in shown.getvalue()


@pytest.mark.parametrize("size", ["\x1b[31m", -5, 0, 10**9, 7.5, True])
def test_a_vocabulary_that_cannot_be_is_not_believed(size: object) -> None:
    config = GPTNeoXConfig(vocab_size=512, unpadded_vocab_size=size)
    assert known_vocab_size(config) == 512


def test_a_device_that_is_not_there_is_refused(trained_run: Path) -> None:
    path = newest(trained_run)
    with pytest.raises(UsageError, match="--device warp"):
        load_model(ModelSource(path.name, str(path), read_manifest(path)), device="warp")
