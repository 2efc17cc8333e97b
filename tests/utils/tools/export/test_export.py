"""An exported model is the model: every bit of it, and nothing that padded it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from utils.base.errors import SaveError, UsageError
from utils.checkpoints.layout import read_manifest
from utils.models.tokenizer import write_tokenizer_files
from utils.remote.loading import ModelSource, load_model
from utils.tools.export.export import ExportOptions, ExportReport, compute_logits, export_model

OPTIONS = ExportOptions()
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL, bos_token_id=0, eos_token_id=0),
    "gpt2": lambda: GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": lambda: LlamaConfig(**SMALL, num_key_value_heads=2, bos_token_id=0, eos_token_id=0),
    "gpt_neox, tied": lambda: GPTNeoXConfig(
        **SMALL, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0
    ),
    "llama, tied": lambda: LlamaConfig(
        **SMALL, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0
    ),
}


def make_model(kind: str, folder: Path, *, unpadded: int | None = None) -> ModelSource:
    """Save a model with random weights; its vocabulary is padded from `unpadded` ids."""
    torch.manual_seed(7)
    config = CONFIGS[kind]()
    if unpadded is not None:
        config.unpadded_vocab_size = unpadded
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # as biases and norms are after training: not 0 and 1
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return ModelSource(folder.name, str(folder))


def newest(trained_run: Path) -> ModelSource:
    path = max((trained_run / "checkpoints").glob("*step4-*"))
    return ModelSource(path.name, str(path), read_manifest(path))


def export(source: ModelSource, folder: Path, options: ExportOptions = OPTIONS) -> ExportReport:
    folder.mkdir(exist_ok=True)
    dtype = "auto" if options.gguf_name else options.dtype
    loaded = load_model(source, device="cpu", dtype=dtype, tokenizer=options.tokenizer)
    return export_model(loaded, folder, options, lambda stage, done, total: None)


def test_an_exported_checkpoint_is_the_checkpoint(trained_run: Path, tmp_path: Path) -> None:
    source = newest(trained_run)
    report = export(source, tmp_path / "out")
    loaded = load_model(source, device="cpu")
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    ids = torch.arange(64).reshape(2, 32)
    assert torch.equal(stock(ids).logits, loaded.model(ids).logits)
    assert (report.dtype, report.max_logit_difference, report.removed_rows) == ("float32", 0.0, 0)
    assert report.compared_tensors == len(stock.state_dict())
    assert set(report.files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    one, other = (tmp_path / "out" / "tokenizer.json", Path(source.location) / "tokenizer.json")
    assert one.read_bytes() == other.read_bytes()
    one, other = (folder / "tokenizer_config.json" for folder in (tmp_path / "out", other.parent))
    context = {"model_max_length": loaded.context}
    assert json.loads(one.read_text()) == json.loads(other.read_text()) | context
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    # transformers 5 calls it lm_head in memory.
    assert "embed_out.weight" in load_file(tmp_path / "out" / "model.safetensors")
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert str(trained_run) not in text + (tmp_path / "out" / "README.md").read_text()


def test_the_same_model_gives_the_same_bytes(trained_run: Path, tmp_path: Path) -> None:
    first = export(newest(trained_run), tmp_path / "1")
    second = export(newest(trained_run), tmp_path / "2", replace(OPTIONS, is_checked=False))
    assert first.files == second.files
    assert (second.compared_tensors, second.max_logit_difference) == (None, None)


def test_what_is_exported_survives_a_power_cut(tmp_path: Path, disk_calls: list[str]) -> None:
    source = make_model("gpt_neox", tmp_path / "model")
    disk_calls.clear()
    report = export(source, tmp_path / "out", replace(OPTIONS, is_checked=False))
    *files, folder = (call for call in disk_calls if call.startswith("fsync"))
    assert set(files) == {f"fsync {name}" for name in report.files}
    assert folder == "fsync out"


def test_an_exported_folder_takes_another_data_type(trained_run: Path, tmp_path: Path) -> None:
    export(newest(trained_run), tmp_path / "32")
    source = ModelSource("32", str(tmp_path / "32"))
    half = export(source, tmp_path / "16", replace(OPTIONS, dtype="bfloat16"))
    assert half.max_logit_difference == 0
    assert json.loads((tmp_path / "16" / "config.json").read_text())["dtype"] == "bfloat16"
    cast = load_model(newest(trained_run), device="cpu", dtype="bfloat16").model
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "16", dtype="auto")
    assert torch.equal(compute_logits(stock), compute_logits(cast))
    # By itself it stays as it is.
    assert export(ModelSource("16", str(tmp_path / "16")), tmp_path / "again").dtype == "bfloat16"


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt2", "gpt_neox, tied"])
def test_rows_that_padded_the_vocabulary_are_left_out(kind: str, tmp_path: Path) -> None:
    source = make_model(kind, tmp_path / "padded", unpadded=90)
    padded = load_model(source, device="cpu").model
    report = export(source, tmp_path / "out")
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(64).reshape(2, 32)
    assert torch.equal(stock(ids).logits, padded(ids).logits[..., :90])
    assert (report.vocab_size, report.removed_rows, report.max_logit_difference) == (90, 6, 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 90
    assert "unpadded_vocab_size" not in config
    # Tied weights are in the file once and stay tied.
    is_tied = kind in ("gpt2", "gpt_neox, tied")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert bool({"lm_head.weight", "embed_out.weight"} & set(file.keys())) is not is_tied
    same = stock.get_output_embeddings().weight is stock.get_input_embeddings().weight
    assert same is is_tied


def test_a_llama_model_is_a_llama_folder_with_its_tokenizer_model(tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "made")
    write_tokenizer(tmp_path / "made", "PreTrainedTokenizerFast")
    (tmp_path / "made" / "tokenizer.model").write_bytes(b"pieces")
    export(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert torch.equal(compute_logits(model), compute_logits(load_model(source).model.cpu()))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]


def write_tokenizer(folder: Path, kind: str | None) -> None:
    from tests.utils.tools.export.test_gguf import make_tokenizer

    make_tokenizer().save(str(folder / "tokenizer.json"))
    if kind:
        settings = {"tokenizer_class": kind, "eos_token": "<|end|>", "pad_token": "<|pad|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_configs_name_the_special_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    source = make_model("gpt_neox", tmp_path / "made")
    write_tokenizer(tmp_path / "made", "PreTrainedTokenizerFast")
    path = tmp_path / "made" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 5}))
    export(source, tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (1, 5)  # less than the model's
    assert (generation.eos_token_id, generation.pad_token_id) == (0, 1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, 1)


def test_ids_outside_the_vocabulary_are_not_named(tmp_path: Path) -> None:
    make_model("gpt2", tmp_path / "made")
    path = tmp_path / "made" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [50256, 3], "bos_token_id": 50256}))
    export(ModelSource("made", str(tmp_path / "made")), tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.bos_token_id) == (3, None)


def test_a_tokenizer_that_says_no_class_gets_one(tmp_path: Path) -> None:
    source = make_model("gpt2", tmp_path / "made")  # AutoTokenizer would add GPT-2's end token
    write_tokenizer(tmp_path / "made", None)
    export(source, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    own = load_model(source, device="cpu").tokenizer
    assert (len(tokenizer), tokenizer("the the").input_ids) == (len(own), own("the the").input_ids)


def test_a_large_model_has_several_files(trained_run: Path, tmp_path: Path) -> None:
    report = export(newest(trained_run), tmp_path / "out", replace(OPTIONS, max_shard_size="100KB"))
    parts = [name for name in report.files if name.endswith(".safetensors")]
    assert len(parts) > 1
    assert "model.safetensors.index.json" in report.files
    assert report.max_logit_difference == 0


@pytest.mark.parametrize("damage", ["weights", "config", "tokenizer", "missing"])
def test_an_export_that_is_not_the_model_fails(
    damage: str, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is made on the files: whatever goes wrong while they are written is seen."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def save_damaged(self: Any, directory: str, **options: Any) -> None:
        save(self, directory, **options)
        folder = Path(directory)
        if damage in ("weights", "missing"):
            weights = load_file(folder / "model.safetensors")
            name = "gpt_neox.final_layer_norm.bias"
            if damage == "missing":
                del weights[name]
            else:
                weights[name][0] += 1e-7
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        elif damage == "config":
            config = json.loads((folder / "config.json").read_text())
            config["layer_norm_eps"] = 1e-4
            (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_damaged)
    if damage == "tokenizer":

        def write_damaged(files: dict[str, bytes], folder: Path) -> None:
            settings = json.loads(files["tokenizer.json"])
            settings["model"]["merges"] = settings["model"]["merges"][:10]
            write_tokenizer_files(
                {**files, "tokenizer.json": json.dumps(settings).encode()}, folder
            )

        monkeypatch.setattr("utils.tools.export.export.write_tokenizer_files", write_damaged)
    words = {"config": "its logits differ by up to", "tokenizer": "not the tokenizer"}
    with pytest.raises(SaveError, match=words.get(damage, r"final_layer_norm\.bias differs")):
        export(newest(trained_run), tmp_path / "out")


def test_weights_that_are_no_numbers_of_the_data_type_are_refused(tmp_path: Path) -> None:
    source = make_model("gpt_neox", tmp_path / "made")
    weights = load_file(tmp_path / "made" / "model.safetensors")
    weights["gpt_neox.final_layer_norm.bias"][3] = 1e5
    save_file(weights, tmp_path / "made" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"final_layer_norm\.bias that are no numbers of float16"):
        export(source, tmp_path / "16", replace(OPTIONS, dtype="float16"))
    assert export(source, tmp_path / "32").max_logit_difference == 0
    weights["gpt_neox.final_layer_norm.bias"][3] = float("nan")
    save_file(weights, tmp_path / "made" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="no numbers of float32"):
        export(source, tmp_path / "nan")


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model("gpt2", tmp_path / "made")
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
    ):
        failing = Mock(side_effect=error)
        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", failing)
        with pytest.raises(SaveError, match="was not exported: .*No space left on device"):
            export(source, tmp_path / "out")
    space = SimpleNamespace(free=1000)
    monkeypatch.setattr("utils.tools.export.export.shutil.disk_usage", lambda path: space)
    with pytest.raises(SaveError, match=r"takes .* KiB and .* has 1000 B free"):
        export(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
