"""What train.py does with its data: mixtures, bad and changed shards, documents, the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.model_config import build_model_config
from configs.training_config import get_training_config
from tests.sample_json import UNREADABLE
from tests.sample_shards import flip_bit, save_shard
from tests.test_train import state_differences
from utils.base.errors import ExitCode
from utils.checkpoints.layout import find_checkpoints, read_json
from utils.models.building import LossModel, build_model
from utils.tracking.metrics_log import read_metrics
from utils.training_utils import document_positions, forward_loss

Train = Callable[..., int]


@pytest.fixture
def own_data(sample_data: Path, tmp_path: Path) -> Path:
    """A copy of the sample data that a test may change."""
    copy = tmp_path / "own-data"
    shutil.copytree(sample_data, copy)
    return copy


def newest_state(tmp_path: Path) -> dict:
    directory = tmp_path / "run" / "checkpoints"
    return read_json(directory / str(find_checkpoints(directory)[-1]) / "data_state.json")


def drop_shard(data: Path, name: str) -> None:
    """Remove a shard as its owner would: the file and its line in the index."""
    (data / name).unlink()
    index = json.loads((data / "index.json").read_text())
    index["shards"] = [shard for shard in index["shards"] if shard["name"] != name]
    (data / "index.json").write_text(json.dumps(index))


def test_a_mixture_resumes_bit_identically(
    run_train: Train, tmp_path: Path, sample_data: Path, own_data: Path
) -> None:
    drop_shard(own_data, "train_00000.npz")
    sources = [{"uri": str(sample_data), "weight": 3}, {"uri": str(own_data), "weight": 1}]
    settings = (f"data_uri={json.dumps(sources)}", "logging_steps=1", "save_steps=3")
    assert run_train("--max-steps", "6", folder="straight", settings=settings) == 0
    assert run_train("--max-steps", "6", "--stop-after", "2", settings=settings) == 0
    assert run_train("--max-steps", "6", "--resume", "latest", settings=settings) == 0
    last = "checkpoints/checkpoint-epoch0-step6-files0"
    assert not state_differences(tmp_path / "straight" / last, tmp_path / "run" / last)
    state = newest_state(tmp_path)
    assert state["weights"] == [3.0, 1.0]
    assert len(state["shards"]) == sum(state["source_sizes"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", "empty list"),
        ('[{"uri": "a"}]', '{"uri": "...", "weight": number}'),
        ('[{"uri": "a", "weight": 0}]', "weight of a must be above 0"),
        ('[{"uri": "a", "weight": 1, "share": 2}]', '{"uri": "...", "weight": number}'),
        ('["a", "b"]', "a string or a list of objects"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_one_message(
    run_train: Train, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(settings=(f"data_uri={value}",)) == 2
    assert message in capsys.readouterr().err


def test_sources_of_different_tokenizers_are_refused(
    run_train: Train, sample_data: Path, own_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((own_data / "index.json").read_text())
    (own_data / "index.json").write_text(json.dumps({**index, "tokenizer_sha256": "other"}))
    sources = [{"uri": str(sample_data), "weight": 1}, {"uri": str(own_data), "weight": 1}]
    assert run_train(settings=(f"data_uri={json.dumps(sources)}",)) == 2
    assert "different tokenizers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("is_mixed", "name"), [(False, "tokenizer_config.json"), (True, "tokenizer.json")]
)
def test_a_damaged_tokenizer_is_refused_before_anything_is_written(
    run_train: Train,
    tmp_path: Path,
    sample_data: Path,
    own_data: Path,
    is_mixed: bool,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flip_bit(own_data / name)
    sources = [{"uri": str(sample_data), "weight": 1}, {"uri": str(own_data), "weight": 1}]
    uri = json.dumps(sources) if is_mixed else str(own_data)
    assert run_train("--max-steps", "2", settings=(f"data_uri={uri}",)) == 2
    message = capsys.readouterr().err
    assert f"{own_data}/{name} is damaged or was replaced: it has crc32c" in message
    assert "Put back the file that the data were made with" in message
    assert "Traceback" not in message
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_tokenizer_that_is_damaged_after_the_checks_is_in_no_checkpoint(
    run_train: Train,
    tmp_path: Path,
    own_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "utils.start.preflight.read_tokenizers",
        lambda *_: flip_bit(own_data / "tokenizer.json") or {},
    )
    assert run_train("--max-steps", "2", settings=(f"data_uri={own_data}",)) == 2
    assert f"{own_data}/tokenizer.json is damaged" in capsys.readouterr().err
    assert not find_checkpoints(tmp_path / "run" / "checkpoints")


def test_an_index_with_the_sha256_alone_is_held_against_the_tokenizer(
    run_train: Train, own_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((own_data / "index.json").read_text())
    del index["tokenizer_crc32c"]
    (own_data / "index.json").write_text(json.dumps(index))
    settings = (f"data_uri={own_data}",)
    assert run_train("--dry-run", "--fresh", settings=settings) == 0
    flip_bit(own_data / "tokenizer.json")
    assert run_train("--dry-run", settings=settings) == 2
    assert "tokenizer.json is damaged or was replaced: it has sha256" in capsys.readouterr().err
    (own_data / "tokenizer.json").unlink()
    assert run_train("--dry-run", settings=settings) == 2
    assert f"{own_data}/tokenizer.json is missing, although" in capsys.readouterr().err


def test_an_index_that_cannot_be_read_is_an_error(
    run_train: Train, own_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_data / "index.json").write_bytes(UNREADABLE["torn"])
    assert run_train("--dry-run", settings=(f"data_uri={own_data}",)) == 2
    assert f"{own_data}/index.json is not usable" in capsys.readouterr().err


def test_a_bad_shard_can_be_skipped_and_the_checkpoint_remembers_it(
    run_train: Train, tmp_path: Path, own_data: Path
) -> None:
    flip_bit(own_data / "train_00002.npz")
    settings = (f"data_uri={own_data}", "bad_shard=skip", "logging_steps=1")
    assert run_train("--max-steps", "20", folder="straight", settings=settings) == 0
    assert run_train("--max-steps", "20", "--stop-after", "11", settings=settings) == 0
    assert newest_state(tmp_path)["bad_shards"] == [2]
    assert run_train("--max-steps", "20", "--resume", "latest", settings=settings) == 0
    straight, resumed = (
        read_metrics(tmp_path / folder / "logs/metrics.jsonl").series("loss")
        for folder in ("straight", "run")
    )
    assert straight == resumed


def test_changed_data_are_refused_or_begun_at_their_next_epoch(
    run_train: Train, tmp_path: Path, own_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (f"data_uri={own_data}", "save_steps=2")
    assert run_train("--max-steps", "4", "--stop-after", "2", settings=settings) == 0
    drop_shard(own_data, "train_00001.npz")
    resume = ("--max-steps", "4", "--resume", "latest")
    assert run_train(*resume, settings=settings) == 2
    message = capsys.readouterr().err
    assert "1 missing (train_00001.npz)" in message
    assert "--accept-data-change" in message
    assert run_train(*resume, "--accept-data-change", settings=settings) == 0
    state = newest_state(tmp_path)
    per_epoch = sum(tokens for _, tokens, _, _ in state["shards"]) // 32
    assert (state["epoch"], state["sample_index"]) == (1, per_epoch + 2 * 4)


def test_a_cache_smaller_than_a_window_is_refused(
    run_train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train("--max-steps", "2", settings=("cache_limit_bytes=100000",)) == 2
    message = capsys.readouterr().err
    assert "cache_limit_bytes 100000 is below the" in message
    assert "one shuffle window of 8 shards" in message


def test_documents_do_not_see_each_other_when_they_are_masked() -> None:
    config = get_training_config("test", {"model_overrides.num_hidden_layers": 2})
    torch.manual_seed(0)
    model = build_model(build_model_config(config.model, config.model_overrides), config).eval()
    lengths = (9, 1, 14, 8)
    documents = [torch.randint(1, 4096, (1, length)) for length in lengths]
    for document in documents[:-1]:
        document[0, -1] = 0  # the end-of-text id; the last document goes on in the next sample
    packed = torch.cat(documents, dim=1)
    assert document_positions(packed, 0).tolist() == [[n for m in lengths for n in range(m)]]
    two_rows = torch.cat([packed, packed.roll(5, dims=1)])
    with torch.no_grad():
        alone = torch.cat([model(input_ids=document).logits for document in documents], dim=1)
        positions = document_positions(two_rows, 0)
        masked = model(input_ids=two_rows, position_ids=positions, use_cache=False).logits[:1]
        plain = model(input_ids=packed, use_cache=False).logits
    torch.testing.assert_close(masked, alone, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, alone, atol=1e-3)
    loss_model = LossModel(model)
    masked_loss = forward_loss(loss_model, packed, 0).item()
    assert masked_loss != forward_loss(loss_model, packed, None).item()


def test_masked_training_runs_and_needs_an_end_of_text_id(
    run_train: Train, tmp_path: Path, own_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("mask_documents=true", "logging_steps=1")
    assert run_train("--max-steps", "12", folder="masked", settings=settings) == 0
    assert run_train("--max-steps", "12", folder="plain", settings=settings[1:]) == 0
    masked, plain = (
        read_metrics(tmp_path / folder / "logs/metrics.jsonl").series("loss")[1]
        for folder in ("masked", "plain")
    )
    assert masked != plain
    (own_data / "index.json").unlink()
    assert run_train(settings=(*settings, f"data_uri={own_data}")) == 2
    assert "mask_documents needs the id between documents" in capsys.readouterr().err


@pytest.mark.parametrize("lengths", [(), (20,)])  # tokens of the validation shards; 32 a sample
def test_data_without_a_validation_sample_train_with_a_warning_and_have_no_best(
    run_train: Train, tmp_path: Path, lengths: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, length in (("train_0", 2000), *((f"val_{n}", n) for n in lengths)):
        save_shard(tmp_path / "data" / f"{name}.npz", input_ids=np.arange(length) % 512)
    settings = (f"data_uri={tmp_path / 'data'}", "checkpoint_uri=", "save_steps=2")
    assert run_train("--max-steps", "2", settings=(*settings, "eval_steps=1")) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "validation:" in line]
    assert len(warnings) == 1
    found = "20 validation tokens, less than one sample of 32" if lengths else "no validation shard"
    assert found in warnings[0]

    words = ("--max-steps", "2", "--fresh")
    assert run_train(*words, settings=(*settings, "eval_steps=null")) == 0
    assert "validation:" not in capsys.readouterr().out
    assert run_train(*words, settings=(*settings, "save_on_best=true")) == ExitCode.PREFLIGHT
    assert "set save_on_best=false" in capsys.readouterr().err
