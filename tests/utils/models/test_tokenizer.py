"""Tokenizers as their own files have them, for prompts and for those who come after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from utils.base.errors import UsageError
from utils.corpus.tokenization import Document, encode_documents, resolve_tokenizer
from utils.models.tokenizer import (
    begin_like_data,
    encode_prompt,
    find_misreading,
    load_tokenizer_from,
    write_tokenizer_files,
)

TEXT = "It's 12345 and 67 o'clock; the na\u00efve fox doesn't  run \u4f60\u597d.\n" * 20
PROBES = ("12345", "it's doesn't", "  two  spaces\n\n", "\u4f60\u597d, \ufb01ne", "a</s>b <s>")
# As OLMo-2 and phi-4 have: digits by threes, then bytes.
THREES = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def write_tokenizer(
    folder: Path,
    settings: Mapping[str, Any],
    template: str | None = None,
    normalizer: Any = None,
) -> bytes:
    """Write a tokenizer with a rule of its own; return its tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = THREES
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return (folder / "tokenizer.json").read_bytes()


def write_shipped(name: Path, folder: Path, model_type: str | None = None) -> Path:
    """Write what is shipped of a tokenizer, beside a model's config if there is one."""
    folder.mkdir()
    write_tokenizer_files(resolve_tokenizer(str(name)).files, folder)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize(
    "kind", ["GPT2Tokenizer", "LlamaTokenizerFast", "T5TokenizerFast", "Own", None]
)
def test_the_tokenizer_json_decides_whatever_class_its_config_names(
    kind: str | None, tmp_path: Path
) -> None:
    settings = {"eos_token": "</s>", **({"tokenizer_class": kind} if kind else {})}
    content = write_tokenizer(tmp_path / "given", settings, normalizer=normalizers.NFKC())
    own = tokenizers.Tokenizer.from_str(content.decode())
    given = resolve_tokenizer(str(tmp_path / "given"))

    documents = [Document(text, "train") for text in (TEXT, *PROBES[:-1])]
    ids = [found.ids.tolist() for found in encode_documents(given, documents)]

    assert ids == [[*own.encode(str(one.content)).ids, 2] for one in documents]
    assert given.files["tokenizer.json"] == content
    shipped = AutoTokenizer.from_pretrained(write_shipped(tmp_path / "given", tmp_path / "shipped"))
    loaded = load_tokenizer_from(tmp_path / "given")
    assert loaded is not None
    for text in (TEXT, *PROBES):
        plain = own.encode(text, add_special_tokens=False).ids
        assert shipped(text, add_special_tokens=False).input_ids == plain
        assert loaded(text, add_special_tokens=False).input_ids == plain


def test_what_is_shipped_has_nothing_of_one_version_or_machine(tmp_path: Path) -> None:
    settings = {
        "eos_token": "</s>",
        "is_local": True,
        "backend": "tokenizers",
        "legacy": False,
        "name_or_path": "/home/a",
        "local_files_only": True,
        "add_prefix_space": True,
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<x>"],
        "model_max_length": 77,
        "chat_template": "{{ messages }}",
    }
    write_tokenizer(tmp_path / "given", settings)

    found = json.loads(resolve_tokenizer(str(tmp_path / "given")).files["tokenizer_config.json"])

    assert found.pop("added_tokens_decoder").keys() == {"299"}  # only the settings name <x>
    assert found == {
        "additional_special_tokens": ["<x>"],
        "bos_token": "</s>",
        "chat_template": "{{ messages }}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 77,
        "pad_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def test_a_tokenizer_that_transformers_reads_in_another_way_is_refused(tmp_path: Path) -> None:
    token = {"content": "xyz", "special": False, "normalized": False, "lstrip": False}
    token |= {"rstrip": False, "single_word": False}
    write_tokenizer(tmp_path / "given", {"eos_token": "</s>", "added_tokens_decoder": {299: token}})

    with pytest.raises(UsageError, match=r"transformers reads .*xyz.* in another way"):
        resolve_tokenizer(str(tmp_path / "given"))


@pytest.mark.parametrize(
    ("model_type", "is_read_alike"), [("gpt_neox", True), ("llama", True), ("qwen2", False)]
)
def test_a_type_of_model_that_has_its_own_reader_is_found(
    model_type: str, is_read_alike: bool, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path / "given", {"eos_token": "</s>"})
    folder = write_shipped(tmp_path / "given", tmp_path / "shipped", model_type)

    assert (find_misreading(folder) is None) == is_read_alike


@pytest.mark.parametrize(
    ("template", "begin"), [(None, []), ("$A </s>", []), ("<s> $A", [2]), ("<s> $A </s>", [2])]
)
def test_prompts_begin_like_the_data_and_never_end(
    template: str | None, begin: list[int], tmp_path: Path
) -> None:
    settings = {"eos_token": "</s>", "bos_token": "<s>"}
    content = write_tokenizer(tmp_path / "given", settings, template)
    plain = tokenizers.Tokenizer.from_str(content.decode()).encode("fox", add_special_tokens=False)
    write_shipped(tmp_path / "given", tmp_path / "shipped")

    for folder in ("given", "shipped"):
        tokenizer: Any = begin_like_data(load_tokenizer_from(tmp_path / folder), 2)
        assert encode_prompt(tokenizer, "fox") == [*begin, *plain.ids]
        assert encode_prompt(tokenizer, "") == [2]
        assert tokenizer("fox").input_ids == [*begin, *plain.ids]


def test_an_end_that_settings_ask_for_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "given", {"eos_token": "</s>"})
    tokenizer: Any = load_tokenizer_from(tmp_path / "given")
    tokenizer.add_eos_token = True
    assert tokenizer("fox").input_ids[-1] == 2

    assert 2 not in begin_like_data(tokenizer, 2)("fox").input_ids


def test_a_model_that_does_not_say_what_begins_a_text_keeps_its_tokenizers(tmp_path: Path) -> None:
    settings = {"eos_token": "</s>", "bos_token": "<s>"}
    write_tokenizer(tmp_path / "given", settings, "<s> $A </s>")

    tokenizer = begin_like_data(load_tokenizer_from(tmp_path / "given"), None)

    assert encode_prompt(tokenizer, "fox")[0] == 1
    assert 2 not in encode_prompt(tokenizer, "fox")
