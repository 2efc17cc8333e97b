"""How many bytes of text tokens stand for: figures per byte compare across tokenizers.

    tokenizer -> bytes of each token -> bits per byte

A byte-level tokenizer has so many bytes for each token, and the sum is exact wherever a text is
cut. With any other one the tokens are turned into text. A special token is no text: 0 bytes. No
torch here.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

_UNKNOWN = -1


class ByteCounter:
    """Counts the UTF-8 bytes of text that tokens of a transformers tokenizer stand for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._sizes = _byte_level_sizes(tokenizer)

    def count(self, before: int, tokens: np.ndarray[Any, Any]) -> int | None:
        """Return the bytes of some tokens that follow another one.

        Args:
            before: The token before them, without which a tokenizer may drop their first space.
            tokens: int [any number].

        Returns:
            None where a token is not one of the tokenizer's.
        """
        if self._sizes is not None:
            if tokens.size and int(tokens.max()) >= len(self._sizes):
                return None
            sizes = self._sizes[tokens]
            return None if (sizes == _UNKNOWN).any() else int(sizes.sum())
        if tokens.size and int(tokens.max()) >= len(self._tokenizer):
            return None
        return self._text_bytes([before, *tokens.tolist()]) - self._text_bytes([before])

    def _text_bytes(self, tokens: list[int]) -> int:
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return len(text.encode("utf-8", "surrogatepass"))


def _byte_level_sizes(tokenizer: Any) -> np.ndarray[Any, Any] | None:
    """Return the bytes of each token id: int64 [ids]; None where bytes are not its letters."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not _is_byte_level(json.loads(backend.to_str()).get("decoder")):
        return None
    from tokenizers.pre_tokenizers import ByteLevel

    letters = set(ByteLevel.alphabet())
    pieces: dict[str, int] = tokenizer.get_vocab()
    sizes = np.full(max(pieces.values()) + 1, _UNKNOWN, dtype=np.int64)
    for piece, token in pieces.items():
        # A letter stands for a byte; the decoder takes anything else as it is.
        is_plain = letters.issuperset(piece)
        sizes[token] = len(piece) if is_plain else len(piece.encode("utf-8", "surrogatepass"))
    for token, added in tokenizer.added_tokens_decoder.items():
        sizes[token] = 0 if added.special else len(added.content.encode("utf-8"))
    return sizes


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or []
        return bool(parts) and all(_is_byte_level(part) for part in parts)
    return decoder.get("type") == "ByteLevel"
