"""Bytes of text behind tokens: those of the text itself, wherever it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from utils.tools.evaluation.token_bytes import ByteCounter
from utils.tools.generation.loading import load_named_tokenizer

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


def test_a_tokenizer_without_bytes_is_asked_for_its_text() -> None:
    pieces = ["<unk>", "</s>", "\u2581the", "\u2581caf\u00e9", "s", "\u2581"]
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    counter = ByteCounter(tokenizer)
    # The space before a word counts, though a decoded text does not begin with it.
    assert counter.count(2, np.array([3, 4])) == len(" caf\u00e9s".encode())
    assert counter.count(2, np.array([1])) == 0
    assert counter.count(2, np.array([99])) is None
