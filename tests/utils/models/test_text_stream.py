"""Text as its tokens come: whole characters, right spaces, and nothing of a stop text."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from utils.models.text_stream import REPLACEMENT, StopFinder, TextStream

TEXT = "The end: naïve café, 中文字, 日本語のテキスト, 🎉🚀👩‍🚀 and  spaces\n\ttabs. " * 6


def byte_level() -> Any:
    """Return a tokenizer whose tokens are bytes, and some pairs of them that cross characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )


def like_sentencepiece() -> Any:
    """Return a tokenizer of words that begin with a space, and of bytes, as Llama 2 has it."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += ["▁The", "▁end", ":", "▁and", "▁spaces", ".", "中", *"abcdefghijklmnopqrstuvwxyz,T"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


TOKENIZERS = {"bytes": byte_level(), "words": like_sentencepiece()}


def pieces_of(tokenizer: Any, ids: list[int], prompt: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(token) for token in ids), stream.close()]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("cut", [0, 1, 9, 40, 130])
def test_pieces_together_are_the_text(kind: str, cut: int) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(TEXT)["input_ids"]
    prompt = tokenizer.decode(ids[:cut])
    if REPLACEMENT in prompt:  # the cut goes through a character
        prompt = prompt.rstrip(REPLACEMENT)
        cut = len(tokenizer(prompt)["input_ids"])
    pieces = pieces_of(tokenizer, ids[cut:], ids[:cut])
    assert prompt + "".join(pieces) == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(pieces) / 4  # and not all at the end


def test_a_word_after_a_prompt_keeps_its_space() -> None:
    tokenizer = TOKENIZERS["words"]
    the, end = tokenizer("The end")["input_ids"][:1], tokenizer("end")["input_ids"]
    assert "".join(pieces_of(tokenizer, end, the)) == " end"
    assert "".join(pieces_of(tokenizer, end, [])) == "end"


def test_bytes_that_are_no_character_are_shown_and_the_next_text_is_whole() -> None:
    tokenizer = TOKENIZERS["bytes"]
    source = random.Random(3)
    for _ in range(30):
        ids = [source.randrange(len(tokenizer)) for _ in range(150)]
        pieces = pieces_of(tokenizer, ids, [])
        assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        silent, longest = 0, 0
        for piece in pieces[:-1]:
            silent = 0 if piece else silent + 1
            longest = max(longest, silent)
        assert longest <= 3


def test_a_long_text_is_not_decoded_anew_for_each_token() -> None:
    tokenizer = TOKENIZERS["bytes"]
    lengths: list[int] = []

    class Watched:
        def decode(self, ids: list[int], **options: Any) -> str:
            lengths.append(len(ids))
            return str(tokenizer.decode(ids, **options))

    pieces_of(Watched(), tokenizer(TEXT * 4)["input_ids"], [])
    assert max(lengths) < 50


def test_nothing_is_tidied_up() -> None:
    tokenizer = TOKENIZERS["bytes"]
    text = "a . b , c 's d n't"
    assert "".join(pieces_of(tokenizer, tokenizer(text)["input_ids"], [])) == text


STOPS = [
    (["\n\n"], "one\ntwo\n\nthree\n\n", "one\ntwo", "\n\n"),
    (["END"], "EENDx", "E", "END"),
    (["abab"], "aababab", "a", "abab"),
    (["abc", "b"], "xabcy", "xa", "b"),
    (["bc", "abc"], "xabcy", "x", "abc"),
    (["zz"], "az", "az", None),
    ([], "text", "text", None),
    (["t"], "text", "", "t"),
]


@pytest.mark.parametrize(("stops", "text", "expected", "found"), STOPS)
@pytest.mark.parametrize("size", [1, 2, 3, 99])
def test_a_text_ends_before_a_stop_text(
    stops: list[str], text: str, expected: str, found: str | None, size: int
) -> None:
    finder = StopFinder(stops)
    shown = ""
    for begin in range(0, len(text), size):
        shown += finder.push(text[begin : begin + size])
        assert expected.startswith(shown)  # not even for a moment a part of it
    shown += finder.close()
    assert (shown, finder.found) == (expected, found)
    if found is None:
        assert StopFinder(stops).push(text[:1]) == ("" if text[0] in "z" else text[:1])
