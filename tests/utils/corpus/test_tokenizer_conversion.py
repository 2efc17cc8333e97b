"""SentencePiece models and tiktoken encodings, converted, against the originals."""

from __future__ import annotations

import base64
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from utils.base.errors import ExitCode, UsageError
from utils.corpus.documents import Document
from utils.corpus.tokenization import (
    Tokenizer,
    build_tokenizer,
    encode_documents,
    resolve_tokenizer,
)
from utils.corpus.tokenizer_conversion import (
    CL100K_PATTERN,
    GPT2_PATTERN,
    O200K_PATTERN,
    _to_oniguruma,
)
from utils.models.tokenizer import write_tokenizer_files

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")

FORGERIES = "a </s> b <s> <unk> <pad> <0x41> c<|endoftext|>d"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [topics[name] for name in sorted(topics)[::4]]


@pytest.fixture(scope="module")
def train(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Any]]:
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    # Pieces that a control piece could be merged from: "</" and "s>".
    lines += [f"{letter}</ {letter}s>" for letter in "abcdefghij"] * 100

    def build(**options: Any) -> tuple[Path, Any]:
        path = tmp_path_factory.mktemp("models") / "x.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(path.with_suffix("")),
            vocab_size=1000,
            minloglevel=2,
            **options,
        )
        return path, sentencepiece.SentencePieceProcessor(model_file=str(path))

    return build


def save(tokenizer: Tokenizer, directory: Path) -> Any:
    directory.mkdir()
    write_tokenizer_files(tokenizer.files, directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "split_by_unicode_script": False,
    "allow_whitespace_only_pieces": True,
}
SEED_003 = {"model_type": "bpe", "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
SYMBOLS = {"user_defined_symbols": ["<sep>", "[INST]"]}
GEMMA = {**SYMBOLS, "add_dummy_prefix": False, "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "byte_fallback": True},
        LLAMA,
        SEED_003,
        pytest.param({"model_type": "unigram", **SYMBOLS}, marks=pytest.mark.slow),
        {"model_type": "bpe", **GEMMA},
    ],
    ids=["unigram", "llama", "seed_003", "unigram_symbols", "gemma"],
)
def test_sentencepiece_loads_offline_and_encodes_identically(
    train: Callable[..., tuple[Path, Any]],
    texts: list[str],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    path, original = train(**options)
    tokenizer = resolve_tokenizer(str(path))
    loaded = save(tokenizer, tmp_path / "t")
    if options["model_type"] == "unigram":
        texts = [line for text in texts for line in text.splitlines()][:3000]
    samples = [*texts, "two  spaces\r\n\n x ", "d\u00e9j\u00e0 \ufb01 \u4f60 \U0001f600"]
    expected = [original.encode(text) for text in samples]

    found = [loaded(text).input_ids for text in samples]
    if options["model_type"] == "unigram":  # of cuts as good as each other, either: see the module
        assert [sorted(ids) for ids in found] == [sorted(ids) for ids in expected]
        num_other = sum(ids != others for ids, others in zip(found, expected, strict=True))
        assert num_other <= len(samples) // 200
        expected = found
    assert found == expected
    assert tokenizer.vocab_size == original.vocab_size() == len(loaded)
    assert tokenizer.eos_token_id == original.eos_id() == loaded.eos_token_id
    # No text forges a control or byte piece.
    documents = [Document(text, "train") for text in (*samples, FORGERIES)]
    encoded = encode_documents(tokenizer, documents)
    expected = [*expected, original.encode(FORGERIES)]
    assert [document.ids.tolist()[:-1] for document in encoded] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "cannot be converted exactly"),
        ({"model_type": "bpe", "eos_id": -1}, "no end-of-text token"),
        ({"model_type": "char", "hard_vocab_limit": False}, "only unigram and bpe"),
    ],
)
def test_sentencepiece_that_does_not_serve_is_refused(
    train: Callable[..., tuple[Path, Any]], options: dict[str, Any], message: str
) -> None:
    path, _ = train(**options)
    with pytest.raises(UsageError, match=message):
        resolve_tokenizer(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.model", b""),
        ("x.model", b"<html>not a model</html>"),
        ("x.model", bytes(1000)),
        ("x.tiktoken", b"YQ== x\n"),
        ("x.tiktoken", b"!!! 3\n"),
        ("x.tiktoken", b"YQ== 0\n"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        resolve_tokenizer(str(tmp_path / name))


# tiktoken.


@pytest.fixture(scope="module")
def ranks(texts: list[str]) -> dict[bytes, int]:
    """Return ranks that a byte-level BPE of our own gives."""
    trained = json.loads(build_tokenizer(texts, 1500).files["tokenizer.json"])
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in trained["model"]["merges"]:
        tokens.append(bytes(letters[letter] for letter in left + right))
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def registered(
    tmp_path: Path, ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An encoding that tiktoken finds by name: its own way to add one, and no network."""
    plugin = tmp_path / "plugin" / "tiktoken_ext" / "mine.py"
    plugin.parent.mkdir(parents=True)
    file = write_ranks(tmp_path / "mine.tiktoken", ranks)
    top = max(ranks.values())
    plugin.write_text(
        "from tiktoken.load import load_tiktoken_bpe\n"
        "def mine():\n"
        f"    return {{'name': 'mine', 'pat_str': {GPT2_PATTERN!r},\n"
        f"        'mergeable_ranks': load_tiktoken_bpe({str(file)!r}),\n"
        f"        'special_tokens': {{'<|endoftext|>': {top + 2}, '<|x|>': {top + 9}}}}}\n"
        "ENCODING_CONSTRUCTORS = {'mine': mine}\n"
    )
    monkeypatch.syspath_prepend(str(plugin.parents[1]))
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", None)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    tiktoken.registry._available_plugin_modules.cache_clear()
    yield "tiktoken:mine"
    tiktoken.registry._available_plugin_modules.cache_clear()
    for name in [name for name in sys.modules if name.startswith("tiktoken_ext")]:
        del sys.modules[name]


def test_tiktoken_loads_offline_and_encodes_identically(
    registered: str, texts: list[str], tmp_path: Path
) -> None:
    encoding = tiktoken.get_encoding("mine")
    tokenizer = resolve_tokenizer(registered)
    loaded = save(tokenizer, tmp_path / "t")
    samples = [*texts, "trailing \n ", FORGERIES]

    # An id without a token lies before the end token: ids must not move.
    assert tokenizer.eos_token_id == loaded.eos_token_id == encoding.eot_token
    assert tokenizer.vocab_size == len(loaded) == encoding.n_vocab
    assert [loaded(text).input_ids for text in samples[:-1]] == [
        encoding.encode(text) for text in samples[:-1]
    ]
    encoded = encode_documents(tokenizer, [Document(text, "train") for text in samples])
    for text, document in zip(samples, encoded, strict=True):
        assert document.ids.tolist() == [*encoding.encode_ordinary(text), encoding.eot_token]
        assert loaded.decode(document.ids[:-1]) == text


@pytest.mark.parametrize("name", ["other.tiktoken", "tokenizer.model"])
def test_a_tiktoken_file_gets_an_end_token_after_its_own(
    ranks: dict[bytes, int], tmp_path: Path, name: str, texts: list[str]
) -> None:
    tokenizer = resolve_tokenizer(str(write_ranks(tmp_path / name, ranks)))
    encoding = tiktoken.Encoding(
        "x", pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    (document,) = encode_documents(tokenizer, [Document(texts[0], "train")])

    assert tokenizer.eos_token_id == len(ranks)
    assert document.ids.tolist()[:-1] == encoding.encode_ordinary(texts[0])


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN])
def test_the_patterns_cut_as_tiktoken_does(pattern: str, ranks: dict[bytes, int]) -> None:
    from tokenizers import Regex, pre_tokenizers

    # Digits that merge, so that "23456" as one word has other ids than "234" and "56".
    digits = {token: 4000 + n for n, token in enumerate([b"34", b"56", b"3456"])}
    encoding = tiktoken.Encoding(
        "x",
        pat_str=pattern,
        mergeable_ranks=digits | ranks,
        special_tokens={"<|endoftext|>": 5000},
    )
    splitter = pre_tokenizers.Split(Regex(_to_oniguruma(pattern)), "isolated")
    generator = random.Random(0)
    parts = ["a", "B", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "1", "23456", "!", "?!", "/"]
    parts += ["\u00e9", "\u4f60", "\u0300", "don't", " x"]
    for _ in range(500):
        text = "".join(generator.choices(parts, k=generator.randint(1, 15)))
        words = [word.encode() for word, _ in splitter.pre_tokenize_str(text)]
        ids = [token for word in words for token in encoding._encode_single_piece(word)]
        assert encoding.encode_ordinary(text) == ids, text


def test_an_unknown_encoding_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="cl100k_base"):
        resolve_tokenizer("tiktoken:nowhere")


@pytest.mark.parametrize(
    ("name", "package"), [("tiktoken:gpt2", "tiktoken"), ("x.model", "sentencepiece")]
)
def test_a_missing_library_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / "x.model").write_bytes(b"\x0a")
    monkeypatch.chdir(tmp_path)
    for module in [key for key in sys.modules if key.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"-m pip install {package}") as caught:
        resolve_tokenizer(name)
    assert caught.value.exit_code == ExitCode.USAGE
