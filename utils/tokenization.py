"""Tokenizers: train one or take one, keep it as files, and turn documents into token ids.

    documents --> build_tokenizer --.
    directory, file or hub name ----+--> Tokenizer (files + backend) --> encode_documents --> ids

A `Tokenizer` is the files that `AutoTokenizer.from_pretrained(DIRECTORY)` loads, plus what the
preparation needs of it. The same documents give the same bytes. Encoding gives back the text
exactly with byte-level tokenizers: what looks like a special token inside a document is encoded
as ordinary text, so no document can forge an end of text.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from utils.errors import UsageError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
OTHER_END_TOKENS = ("<|end_of_text|>", "</s>", "<eos>")
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
NUM_BYTE_TOKENS = 256

BATCH_CHARACTERS = 2**21
BATCH_DOCUMENTS = 4096
# A longer document is encoded in pieces: an encoding takes about 100 times the text's memory,
# and one piece keeps one core busy only.
PIECE_CHARACTERS = 2**16
PROBE_HEADS = ("One, two.\n", "  three\n  four\n", "it's\n", "\t{7}\n", "\u00e9t\u00e9\n")
PROBE_TAILS = ("One, two.\n", "'s it\n", "7", "{\n\n", "\u00e9t\u00e9")


class Document(NamedTuple):
    """One document on its way to a shard."""

    text: str
    split: str


class TokenizedDocument(NamedTuple):
    """The ids of one document, its end token included."""

    ids: npt.NDArray[np.unsignedinteger[Any]]
    split: str


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as files, with what is needed to write shards with it."""

    files: dict[str, bytes]
    """File name -> content; `tokenizer.json` is always one of them."""

    vocab_size: int
    """Highest token id + 1."""

    eos_token_id: int
    """Id that ends every document."""

    @property
    def sha256(self) -> str:
        """Hash of `tokenizer.json`."""
        return hashlib.sha256(self.files[TOKENIZER_FILE]).hexdigest()

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Smallest little-endian type that holds every id: uint16 or uint32."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def build_backend(self) -> tokenizers.Tokenizer:
        """Return a backend that encodes whole documents, special tokens in the text as text."""
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self.files[TOKENIZER_FILE].decode("utf-8"))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer (as GPT-2's) whose token 0 is `<|endoftext|>`.

    Args:
        texts: The documents to learn from.
        vocab_size: Tokens wanted; fewer come out where the text has no more pairs to merge.

    Raises:
        UsageError: `vocab_size` does not hold the 256 bytes and the end token.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size <= NUM_BYTE_TOKENS:
        raise UsageError(
            f"--vocab-size must be at least {NUM_BYTE_TOKENS + 1} (every byte, and "
            f"{END_OF_TEXT}), got {vocab_size}."
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Written here and not by save_pretrained: the bytes then depend on the text alone, not on
    # the version of transformers, and its import of 3 s is saved.
    settings = {
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": END_OF_TEXT,
    }
    files = {
        TOKENIZER_FILE: backend.to_str(pretty=True).encode("utf-8"),
        TOKENIZER_CONFIG_FILE: (json.dumps(settings, indent=2) + "\n").encode("utf-8"),
    }
    return Tokenizer(files, backend.get_vocab_size(), eos_token_id=0)


def load_tokenizer(name: str) -> Tokenizer:
    """Return an existing tokenizer, as `AutoTokenizer` understands it.

    Args:
        name: A directory, a `tokenizer.json`, or a name on the Hugging Face hub.

    Raises:
        UsageError: There is none, it has no `tokenizer.json`, or no end token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded: Any
    fast_class: Any = PreTrainedTokenizerFast
    path = Path(name).expanduser()
    try:
        if path.is_file():
            loaded = fast_class(tokenizer_file=str(path))
        else:
            loaded = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except Exception as exc:  # noqa: BLE001 - tokenizers raises bare Exception for a bad file
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise UsageError(f"--tokenizer {name}: cannot be loaded ({reason}).") from exc
    if not getattr(loaded, "is_fast", False):
        raise UsageError(f"--tokenizer {name}: has no tokenizer.json (a slow tokenizer).")
    eos_token = loaded.eos_token or _find_end_token(loaded.get_vocab(), name)
    loaded.eos_token = eos_token
    vocab_size = max(loaded.get_vocab().values()) + 1
    return Tokenizer(_saved_files(loaded), vocab_size, loaded.convert_tokens_to_ids(eos_token))


def fingerprint_tokenizer(name: str) -> str:
    """Return a hash of a tokenizer's local files; of its name where it comes from the hub."""
    path = Path(name).expanduser()
    digest = hashlib.sha256()
    if path.is_file():
        digest.update(path.read_bytes())
    elif path.is_dir():
        for file in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
            digest.update((path / file).read_bytes() if (path / file).is_file() else b"")
    else:
        digest.update(name.encode())
    return digest.hexdigest()


def _find_end_token(vocabulary: dict[str, int], name: str) -> str:
    for token in (END_OF_TEXT, *OTHER_END_TOKENS):
        if token in vocabulary:
            return token
    raise UsageError(
        f"--tokenizer {name}: no end-of-text token, which separates the documents. Set eos_token "
        f"in its {TOKENIZER_CONFIG_FILE}, or add {END_OF_TEXT} to it."
    )


def _saved_files(loaded: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        loaded.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[Document]
) -> Iterator[TokenizedDocument]:
    """Yield each document's ids followed by the end token, in order, encoded on all cores."""
    backend = tokenizer.build_backend()
    piece_characters = PIECE_CHARACTERS if _can_encode_in_pieces(backend) else None
    end = np.array([tokenizer.eos_token_id], tokenizer.dtype)
    parts: list[npt.NDArray[np.unsignedinteger[Any]]] = []
    for batch in _batches(_pieces(documents, piece_characters)):
        encodings = backend.encode_batch_fast(
            [piece.text for piece in batch], add_special_tokens=False
        )
        for piece, encoding in zip(batch, encodings, strict=True):
            parts.append(np.array(encoding.ids, tokenizer.dtype))
            if piece.is_last:
                yield TokenizedDocument(np.concatenate([*parts, end]), piece.split)
                parts = []


class _Piece(NamedTuple):
    text: str
    split: str
    is_last: bool


def _pieces(documents: Iterable[Document], piece_characters: int | None) -> Iterator[_Piece]:
    for text, split in documents:
        start = 0
        while piece_characters is not None and len(text) - start > piece_characters:
            end = _line_start(text, start + piece_characters)
            if end is None:
                break
            yield _Piece(text[start:end], split, is_last=False)
            start = end
        yield _Piece(text[start:] if start else text, split, is_last=True)


def _line_start(text: str, position: int) -> int | None:
    """Return where the next line begins, with no other white space around: no word is cut there."""
    while (newline := text.find("\n", position)) != -1:
        around = text[newline - 1] + text[newline + 1 : newline + 2]
        if len(around) == 2 and not any(character.isspace() for character in around):
            return newline + 1
        position = newline + 1
    return None


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _can_encode_in_pieces(backend: tokenizers.Tokenizer) -> bool:
    """Tell whether cutting where a line begins leaves the ids as they are.

    True of the byte-level pre-tokenizers in use, whose patterns end a word at a newline; not of
    those that mark the start of each text.
    """

    def encode(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    return all(
        encode(head + tail) == encode(head) + encode(tail)
        for head in PROBE_HEADS
        for tail in PROBE_TAILS
    )
