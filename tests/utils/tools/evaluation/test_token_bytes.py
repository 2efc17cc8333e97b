"""Bytes of text behind tokens: those of the text itself, wherever it is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from utils.corpus.prepare import CorpusOptions, prepare_corpus
from utils.corpus.text_sources.files import FileSource
from utils.remote.loading import load_named_tokenizer
from utils.storage.directory import DirectoryBucket
from utils.tools.evaluation.token_bytes import ByteCounter

TEXT = "The caf\u00e9 \u2014 \U0001f40d na\u00efve  spaces\n\tend \u4e2d\u6587."


@pytest.fixture(scope="module")
def tokenizer(sample_data: Path) -> Any:
    return load_named_tokenizer(str(sample_data))


def test_bytes_of_any_cut_add_up(tokenizer: Any) -> None:
    counter = ByteCounter(tokenizer)
    tokens = np.array(tokenizer.encode(TEXT))
    assert counter.count(0, tokens) == len(TEXT.encode())
    for cut in range(len(tokens)):
        parts = counter.count(0, tokens[:cut]), counter.count(0, tokens[cut:])
        assert sum(part or 0 for part in parts) == len(TEXT.encode())


def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    counter, end = ByteCounter(tokenizer), tokenizer.eos_token_id
    tokens = [end, *tokenizer.encode("ab"), end]
    assert counter.count(end, np.array(tokens)) == 2
    assert counter.count(end, np.array([], dtype=np.int64)) == 0


def test_a_token_that_the_tokenizer_lacks_makes_the_bytes_unknown(tokenizer: Any) -> None:
    assert ByteCounter(tokenizer).count(0, np.array([1, 100_000])) is None


def test_added_tokens_have_the_bytes_of_their_text(sample_data: Path) -> None:
    tokenizer = load_named_tokenizer(str(sample_data))
    tokenizer.add_tokens(["\u00e9\u00e9\u00e9"])
    tokens = np.array(tokenizer.encode("x\u00e9\u00e9\u00e9"))
    assert len(tokens) == 2
    assert ByteCounter(tokenizer).count(0, tokens) == 7


TEXTS = ["Once upon a time.", "The caf\u00e9 \u4e2d", "two  spaces   x", "a", "\tTab\nline\n"] * 8
TRAINER = {"show_progress": False, "special_tokens": ["<unk>", "</s>"]}


def byte_level(adds_space: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(initial_alphabet=letters, **TRAINER))
    return made


def metaspace(model: Any, trainer: Any) -> Tokenizer:
    made = Tokenizer(model)
    # Not split, a token may have several spaces.
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(TEXTS, trainer)
    return made


def byte_fallback(prefix: str) -> Tokenizer:
    """Llama's form, and without a prefix Gemma's: a few letters, and bytes for all others."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581aeiontx"]
    pieces += ["\u2581\u2581", "\u2581\u2581\u2581", "\u2581a", "on"]
    merges = [("\u2581", "\u2581"), ("\u2581\u2581", "\u2581"), ("\u2581", "a"), ("o", "n")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend(prefix)] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return made


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(["upon a time thus far"] * 8, trainers.WordPieceTrainer(**TRAINER))
    return made


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(adds_space=False),
    "byte-level with a space": lambda: byte_level(adds_space=True),
    "metaspace": lambda: metaspace(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**TRAINER)),
    "unigram": lambda: metaspace(
        models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **TRAINER)
    ),
    "llama": lambda: byte_fallback("\u2581"),
    "gemma": lambda: byte_fallback(""),
    "wordpiece": wordpiece,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_prepared_tokens_have_the_bytes_of_the_text(name: str, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=BUILDERS[name](), eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = ["upon a time", "far"] if name == "wordpiece" else list(TEXTS)
    if name in ("byte-level", "llama", "gemma"):  # others cannot tell such a space from their own
        texts += [" one", "   more", " "]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bucket = DirectoryBucket(tmp_path / "data")
    options = CorpusOptions(
        tokenizer=str(tmp_path / "tokenizer"), validation_fraction=0.2, shard_tokens=40
    )
    wanted = prepare_corpus([FileSource((path,))], bucket, options).index["summary"]["bytes"]

    shards = [np.load(path)["input_ids"] for path in sorted((tmp_path / "data").glob("*.npz"))]
    tokens = np.concatenate(shards).astype(np.int64)
    counter = ByteCounter(load_named_tokenizer(str(tmp_path / "data")))
    befores = np.concatenate([tokens[-1:], tokens[:-1]])
    assert wanted == sum(len(text.encode()) for text in texts)
    for length in (1, 2, 7, len(tokens)):
        parts = [
            counter.count(int(befores[start]), tokens[start : start + length])
            for start in range(0, len(tokens), length)
        ]
        assert sum(part or 0 for part in parts) == wanted


def test_a_token_that_is_no_text_by_itself_makes_the_bytes_unknown() -> None:
    counter = ByteCounter(ByT5Tokenizer())
    assert counter.count(1, np.array(ByT5Tokenizer().encode("ab"))) == 2
    assert counter.count(1, np.array(ByT5Tokenizer().encode("\u00e9"))) is None


def test_what_the_vocabulary_lacks_begins_no_text() -> None:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "\u2581the": 2}, "<unk>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    assert ByteCounter(tokenizer).count(1, np.array([2, 0, 2])) == len("the the")
