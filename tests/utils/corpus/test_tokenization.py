import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from utils.base.errors import UsageError
from utils.corpus import tokenization
from utils.corpus.tokenization import (
    Document,
    Tokenizer,
    build_tokenizer,
    encode_documents,
    fingerprint_tokenizer,
    resolve_tokenizer,
)
from utils.models.tokenizer import END_OF_TEXT

TEXTS = [
    f"The {adjective} fox, number {n}, doesn't jump.\n\n    return {n}\n"
    for n, adjective in enumerate(["quick", "brown", "lazy", "red", "old"] * 20)
]
AWKWARD = [
    " leading and trailing \t\r\n\n",
    "d\u00e9j\u00e0 vu \U0001f600 \u4f60\u597d \x00\x7f",
    "a <|endoftext|> inside <|endoftext|>",
    "x" * 1_000,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(TEXTS, 400)


def write(tokenizer: Tokenizer, directory: Path) -> Path:
    directory.mkdir()
    for name, content in tokenizer.files.items():
        (directory / name).write_bytes(content)
    return directory


def encode(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    documents = (Document(text, "train") for text in texts)
    return [document.ids.tolist() for document in encode_documents(tokenizer, documents)]


@pytest.mark.parametrize("model_type", [None, "gpt_neox", "llama"])
def test_auto_tokenizer_loads_the_files_offline_and_agrees(
    tokenizer: Tokenizer, tmp_path: Path, model_type: str | None
) -> None:
    directory = write(tokenizer, tmp_path / "t")
    if model_type:
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))

    loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)

    assert loaded.eos_token == END_OF_TEXT
    assert loaded.eos_token_id == tokenizer.eos_token_id == 0
    assert len(loaded) == tokenizer.vocab_size == 400
    for text in TEXTS[:3] + AWKWARD:
        *ids, end = encode(tokenizer, text)[0]
        assert end == 0
        assert 0 not in ids
        assert loaded.decode(ids) == text
        if END_OF_TEXT not in text:
            assert loaded(text).input_ids == ids


@pytest.mark.parametrize("piece_characters", [1, 10, 1_000])
def test_long_documents_in_pieces_get_the_ids_of_the_whole(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, piece_characters: int
) -> None:
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", piece_characters)
    lines = ["word  \n", "\n", "  indented\n", "'s it\n", "x = {1}\r\n", "7\n", "\t\n", "end.\n"]
    text = "".join(np.random.default_rng(0).choice(lines, 2_000))

    first, second = encode(tokenizer, text, "next")

    assert first[:-1] == tokenizer.build_backend().encode(text).ids
    assert second[:-1] == tokenizer.build_backend().encode("next").ids


def test_tokenizer_that_marks_the_start_of_a_text_gets_long_documents_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", 10)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "_a": 1}, "_a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("_", prepend_scheme="first")
    marking = Tokenizer({"tokenizer.json": backend.to_str().encode()}, 2, 0)
    text = "a b\n" * 100

    assert encode(marking, text)[0][:-1] == backend.encode(text).ids


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_smallest_type_that_holds_the_vocabulary_is_taken(vocab_size: int, dtype: str) -> None:
    assert Tokenizer({}, vocab_size, 0).dtype.name == dtype


def test_existing_tokenizer_gives_the_same_ids_and_files_wherever_it_lies(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    one, two = write(tokenizer, tmp_path / "one"), write(tokenizer, tmp_path / "two")
    loaded = resolve_tokenizer(str(one))

    assert loaded.files == resolve_tokenizer(str(two)).files
    assert fingerprint_tokenizer(str(one)) == fingerprint_tokenizer(str(two))
    assert loaded.eos_token_id == 0
    assert encode(loaded, *AWKWARD) == encode(tokenizer, *AWKWARD)
    assert encode(resolve_tokenizer(str(one / "tokenizer.json")), *AWKWARD) == encode(
        loaded, *AWKWARD
    )


def test_start_token_truncation_and_padding_of_an_existing_tokenizer_are_left_out(
    tmp_path: Path,
) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))

    assert encode(resolve_tokenizer(str(path)), "a a a a") == [[2, 2, 2, 2, 1]]


def test_tokenizer_that_is_broken_or_has_no_end_token_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    no_end = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).to_str()
    for content, message in (
        ("no json", r"--tokenizer .*cannot be loaded"),
        ("{}", r"--tokenizer .*cannot be loaded"),
        (no_end, "no end-of-text token"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            resolve_tokenizer(str(path))


def test_no_text_forges_a_special_piece_of_a_unigram_model(tmp_path: Path) -> None:
    pieces = [("<unk>", -9.0), ("</s>", 0.0), *((letter, -1.0) for letter in "a</s>")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    backend.add_special_tokens(["</s>"])
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))

    assert encode(resolve_tokenizer(str(path)), "a</s>") == [[2, 3, 4, 5, 6, 1]]
