"""GGUF files: the model's numbers under llama.cpp's names, and nothing that it reads otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.utils.tools.export.test_export import export, make_model, newest
from utils.base.errors import SaveError, UsageError
from utils.corpus import tokenizer_conversion
from utils.remote.loading import load_model
from utils.tools.export.export import ExportOptions, compute_logits
from utils.tools.export.gguf_model import require_architecture
from utils.tools.export.gguf_tokenizer import find_pre_tokenizer, read_tokenizer

GGUF = ExportOptions(gguf_name="small.gguf")
TEXTS = (
    "The quick brown fox: 3.14,  two spaces\tand\na na\u00efve line. ",
    "it's we'll  \n\n x 12345 \U0001f600 \u4f60\u597d   ",
)


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE as prepare_data trains it, of fewer bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    backend.train_from_iterator(["the end of the other thing, and the next"] * 20, trainer)
    return backend


def wrap(backend: Tokenizer, **special: str) -> Any:
    fast_class: Any = PreTrainedTokenizerFast
    return fast_class(tokenizer_object=backend, **({"eos_token": "<|end|>"} | special))


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="needs gguf (requirements-dev.txt)")


def test_a_checkpoint_as_gguf_has_its_tokenizer_and_every_tensor(
    gguf: Any, trained_run: Path, tmp_path: Path
) -> None:
    report = export(newest(trained_run), tmp_path / "1", GGUF)
    assert report.compared_tensors == 16
    path = tmp_path / "1" / "small.gguf"
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    settings = json.loads((Path(newest(trained_run).location) / "tokenizer.json").read_text())
    assert fields["general.architecture"] == "gptneox"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    vocabulary = settings["model"]["vocab"]
    assert fields["tokenizer.ggml.tokens"] == sorted(vocabulary, key=vocabulary.__getitem__)
    assert fields["tokenizer.ggml.merges"] == [" ".join(m) for m in settings["model"]["merges"]]
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert fields["gptneox.rope.dimension_count"] == 2
    again = export(newest(trained_run), tmp_path / "2", replace(GGUF, is_checked=False))
    assert again.files == report.files


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_are_cast_and_vectors_stay(gguf: Any, dtype: str, tmp_path: Path) -> None:
    source = make_model("gpt2", tmp_path / "made")
    export(source, tmp_path / "out", replace(GGUF, dtype=dtype))
    kinds = {name: one.tensor_type.name for name, one in tensors_of(gguf, tmp_path / "out").items()}
    short = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert kinds["blk.0.attn_qkv.weight"] == kinds["token_embd.weight"] == short
    assert kinds["blk.0.attn_qkv.bias"] == kinds["position_embd.weight"] == "F32"
    # Of tied weights llama.cpp takes the embedding.
    assert "output.weight" not in kinds


def tensors_of(gguf: Any, folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "small.gguf").tensors}


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt_neox, tied"])
def test_query_key_and_value_of_gpt_neox_stand_one_after_the_other(
    gguf: Any, kind: str, tmp_path: Path
) -> None:
    source = make_model(kind, tmp_path / "made", unpadded=90)
    export(source, tmp_path / "out", GGUF)
    tensors = tensors_of(gguf, tmp_path / "out")
    fused = load_model(source).model.gpt_neox.layers[1].attention.query_key_value.weight
    heads = [rows.chunk(3) for rows in fused.cpu().chunk(4)]
    expected = torch.cat([head[part] for part in range(3) for head in heads])
    assert torch.equal(torch.tensor(tensors["blk.1.attn_qkv.weight"].data), expected)
    # llama.cpp wants the output of a tied one, too.
    for name in ("token_embd.weight", "output.weight"):
        assert tensors[name].data.shape == (90, 32)


def test_a_file_that_is_not_what_was_written_is_refused(
    gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("llama", tmp_path / "made")
    write = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "write_tensor_data",
        lambda self, array: write(self, array + 1e-3 if array.size == 32 else array),
    )
    with pytest.raises(SaveError, match="is not what was written"):
        export(source, tmp_path / "out", GGUF)


def test_a_model_without_a_tokenizer_takes_ids(
    gguf: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(make_model("llama", tmp_path / "made"), tmp_path / "out", GGUF)
    fields = gguf.GGUFReader(tmp_path / "out" / "small.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert fields["llama.vocab_size"].contents() == 96
    assert "made has no tokenizer" in caplog.text


def config_of(kind: str, **changes: Any) -> Any:
    from tests.utils.tools.export.test_export import CONFIGS

    config = CONFIGS[kind]()
    for key, value in changes.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            lambda: SimpleNamespace(model_type="mamba"),
            "type mamba is not supported. Supported: gpt",
        ),
        (lambda: config_of("gpt_neox", hidden_act="relu"), "hidden_act='relu'.*'gelu' only"),
        (lambda: config_of("gpt_neox", attention_bias=False), "attention_bias=False"),
        (lambda: config_of("gpt2", scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx"),
        (lambda: config_of("llama", mlp_bias=True), "mlp_bias=True"),
        (
            lambda: config_of("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}),
            "rotary embeddings of type 'yarn'",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(config: Callable[[], Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        require_architecture(config())


def with_pattern(pattern: str, **changes: Any) -> Tokenizer:
    backend = make_tokenizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False, **changes}),
        ]
    )
    return backend


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (tokenizer_conversion._to_oniguruma(tokenizer_conversion.GPT2_PATTERN), "gpt-2"),
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "llama-bpe",
        ),
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "qwen2",
        ),
    ],
)
def test_a_known_pattern_has_the_name_of_llama_cpp(pattern: str, name: str) -> None:
    assert find_pre_tokenizer(json.loads(with_pattern(pattern).to_str())) == name


def changed(change: Callable[[Tokenizer], None]) -> Tokenizer:
    backend = make_tokenizer()
    change(backend)
    return backend


def add_both_ends(backend: Tokenizer) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single="<|end|> $A <|pad|>", special_tokens=[("<|end|>", 0), ("<|pad|>", 1)]
    )


def set_part(name: str, value: Any) -> Callable[[Tokenizer], None]:
    return lambda backend: setattr(backend, name, value)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (lambda: with_pattern(r"\w+"), "its pattern is none"),
        (lambda: with_pattern(r"\w+", use_regex=True), "its pattern is none"),
        (lambda: changed(set_part("pre_tokenizer", pre_tokenizers.Whitespace())), "pre-tokenizer"),
        (
            lambda: changed(
                set_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))
            ),
            "puts a space",
        ),
        (lambda: changed(set_part("normalizer", normalizers.NFC())), "a normalizer"),
        (lambda: changed(add_both_ends), "puts more around a text"),
        (lambda: Tokenizer(models.Unigram([("a", 0.0)], 0, False)), "no byte-level BPE"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_say_is_refused(
    backend: Callable[[], Tokenizer], words: str
) -> None:
    with pytest.raises(UsageError, match=f"{words}.*--format hf takes any"):
        read_tokenizer(wrap(backend()), 96)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    fast_class: Any = PreTrainedTokenizerFast
    with pytest.raises(UsageError, match="no end-of-text token"):
        read_tokenizer(fast_class(tokenizer_object=make_tokenizer()), 96)


def test_words_that_merges_do_not_make_are_refused_where_they_are_looked_up() -> None:
    settings = json.loads(make_tokenizer().to_str())
    settings["model"]["ignore_merges"] = True
    read_tokenizer(wrap(Tokenizer.from_str(json.dumps(settings))), 96)
    settings["model"]["merges"].pop()
    with pytest.raises(UsageError, match="its merges do not make its token"):
        read_tokenizer(wrap(Tokenizer.from_str(json.dumps(settings))), 96)


def test_tokens_have_their_types_and_ids_without_one_are_unused() -> None:
    backend = make_tokenizer()
    backend.add_tokens([AddedToken("  ", normalized=False)])
    tokenizer = wrap(backend, pad_token="<|pad|>", bos_token="<|end|>")
    tokenizer.chat_template = "{{ messages }}"
    size = backend.get_vocab_size()
    fields = read_tokenizer(tokenizer, size + 2)
    assert (fields.types[0], fields.types[1], fields.types[2]) == (3, 3, 1)
    assert (fields.types[size - 1], fields.tokens[size - 1]) == (4, "  ")
    assert (fields.types[size:], fields.tokens[-1]) == ([5, 5], f"[PAD{size + 1}]")
    assert fields.special == {"bos_token_id": 0, "eos_token_id": 0, "padding_token_id": 1}
    assert fields.chat_template == "{{ messages }}"
    with pytest.raises(UsageError, match="outside the model's vocabulary"):
        read_tokenizer(tokenizer, size - 1)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama, tied"])
def test_transformers_reads_the_same_model(gguf: Any, kind: str, tmp_path: Path) -> None:
    source = make_model(kind, tmp_path / "made")
    make_tokenizer().save(str(tmp_path / "made" / "tokenizer.json"))
    (tmp_path / "made" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )
    export(source, tmp_path / "out", GGUF)
    # It does not read the number of positions of a GPT-2.
    options = {"n_positions": 64} if kind == "gpt2" else {}
    read: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="small.gguf", dtype=torch.float32, **options
    )
    logits = compute_logits(load_model(source, device="cpu").model)
    torch.testing.assert_close(compute_logits(read.eval()), logits, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "gpt_neox", "gpt_neox, tied", "gpt2", "llama"])
def test_llama_cpp_computes_the_same_model(
    gguf: Any, kind: str, trained_run: Path, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    source = newest(trained_run) if kind == "trained" else make_model(kind, tmp_path / "made")
    export(source, tmp_path / "out", GGUF)
    path = str(tmp_path / "out" / "small.gguf")
    llama = runtime.Llama(path, n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    loaded = load_model(source, device="cpu")
    ids = torch.arange(30) * 7 % loaded.vocab_size
    llama.eval(ids.tolist())
    with torch.inference_mode():
        logits = loaded.model(ids[None]).logits[0]
    found = torch.tensor(llama.scores[:30])
    # It computes with tables: GELU is rounded to float16.
    torch.testing.assert_close(found, logits, rtol=0, atol=5e-3)
    assert torch.equal(found.argmax(-1), logits.argmax(-1))
    if loaded.tokenizer is not None:
        for text in TEXTS:
            expected = loaded.tokenizer(text).input_ids
            assert llama.tokenize(text.encode(), add_bos=True) == expected
            assert llama.detokenize(expected).decode() == text
