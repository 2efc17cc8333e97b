import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from utils.base.errors import UsageError
from utils.corpus import tokenization
from utils.corpus.documents import OpenText
from utils.corpus.token_cache import TokenCache
from utils.corpus.tokenization import (
    Document,
    Tokenizer,
    build_tokenizer,
    encode_documents,
    fingerprint_tokenizer,
    resolve_tokenizer,
)
from utils.models.tokenizer import END_OF_TEXT, write_tokenizer_files

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
    write_tokenizer_files(tokenizer.files, directory)
    return directory


def encode(tokenizer: Tokenizer, *texts: str, cache: TokenCache | None = None) -> list[list[int]]:
    documents = (Document(text, "train") for text in texts)
    return [document.ids.tolist() for document in encode_documents(tokenizer, documents, cache)]


def test_one_cache_never_gives_the_ids_of_another_tokenizer_text_or_version(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TokenCache(tmp_path)
    other = build_tokenizer([" ".join(TEXTS)[::-1]], 400)
    wide = replace(tokenizer, vocab_size=2**17)  # the same ids, in four bytes each
    cases = [
        (one, texts)
        for one in (tokenizer, other, wide)
        for texts in (TEXTS[:3], TEXTS[3:6], ["The quick", " fox"], ["The", " quick fox"])
    ]
    for used, texts in [*cases, *cases]:
        assert encode(used, *texts, cache=cache) == encode(used, *texts)
    assert (cache.num_hits, cache.num_misses) == (len(cases), len(cases))
    for module, name in ((tokenization, "ENCODING_FORMAT"), (tokenizers, "__version__")):
        monkeypatch.setattr(module, name, "next")
        encode(tokenizer, *TEXTS[:3], cache=cache)
    assert (cache.num_hits, cache.num_misses) == (len(cases), len(cases) + 2)


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


def marking_backend(kind: str) -> tokenizers.Tokenizer:
    """Return a small tokenizer that begins each text with a space of its own."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?", byte_fallback=True))
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    if kind == "byte-level":
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["</s>", "?", *(alphabet if kind != "byte-level" else [])],
        initial_alphabet=alphabet if kind == "byte-level" else [],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if kind == "first":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    if kind == "llama":
        replace = tokenizers.normalizers.Replace(" ", "\u2581")
        prepend = tokenizers.normalizers.Prepend("\u2581")
        backend.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
        backend.pre_tokenizer = None
    backend.encode_special_tokens = True
    return backend


@pytest.mark.parametrize("part_characters", [37, 1_000])
@pytest.mark.parametrize("kind", ["always", "first", "llama", "byte-level"])
def test_a_long_text_in_parts_begins_only_once_for_a_tokenizer_that_marks_beginnings(
    monkeypatch: pytest.MonkeyPatch, kind: str, part_characters: int
) -> None:
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", 100)
    backend = marking_backend(kind)
    marking = Tokenizer({"tokenizer.json": backend.to_str().encode()}, 700, 0)
    text = "".join(TEXTS) + " d\u00e9j\u00e0 \u4e2d\u6587  two" * 50
    cuts = range(0, len(text), part_characters)
    parts = [OpenText(text[cut : cut + part_characters]) for cut in cuts]
    parts[-1:] = [str(parts[-1])]
    cutter = tokenization._Cutter(marking.build_backend())

    documents = list(encode_documents(marking, (Document(part, "train") for part in parts)))

    assert np.concatenate([one.ids for one in documents]).tolist() == [*backend.encode(text).ids, 0]
    # Documents that are finished are counted by part, and memory holds no whole text.
    assert len(documents) == len(parts)
    assert len(list(cutter.pieces(Document(part, "train") for part in parts))) > len(parts) + 20


def test_parts_of_a_long_text_in_two_splits_stay_in_their_splits_and_end_there() -> None:
    marking = Tokenizer({"tokenizer.json": marking_backend("llama").to_str().encode()}, 700, 0)
    parts = [Document(OpenText("The quick"), "train"), Document(OpenText(" fox"), "val")]
    documents = encode_documents(marking, [*parts, Document(" red", "train")])

    texts = [(marking.build_backend().encode(part).ids) for part in ("The quick", " fox", " red")]
    assert [one.ids.tolist() for one in documents] == [[*text, 0] for text in texts]


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
