"""How many bytes of text tokens stand for: figures per byte compare across tokenizers.

    tokenizer -> bytes of each token -> bits per byte

Each token has so many bytes, and one less at the beginning of a text where its first space is the
tokenizer's own (`add_prefix_space`, SentencePiece's dummy prefix). So the sum is that of the text,
wherever the tokens are cut. A special token is no text: 0 bytes. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

_UNKNOWN = -1


class ByteCounter:
    """Counts the UTF-8 bytes of text that tokens of a transformers tokenizer stand for."""

    def __init__(self, tokenizer: Any) -> None:
        pieces: dict[str, int] = tokenizer.get_vocab()
        # Bytes of each id: [within a text, at the beginning of one].
        self._sizes = np.full((2, max(pieces.values()) + 1), _UNKNOWN, dtype=np.int64)
        sizes_of = _byte_level_sizes if _has_byte_level(tokenizer) else _text_sizes
        for token, size, has_space in sizes_of(tokenizer, pieces):
            self._sizes[:, token] = size, size - has_space
        added = tokenizer.added_tokens_decoder.items()
        special = {token for token, one in added if one.special} | {*tokenizer.all_special_ids}
        self._sizes[:, list(special)] = 0
        # A text begins after a special token, but not after what the vocabulary lacks.
        ends = special - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})
        self._is_end = np.isin(np.arange(self._sizes.shape[1]), list(ends)).astype(np.int64)

    def count(self, before: int, tokens: np.ndarray[Any, Any]) -> int | None:
        """Return the bytes of some tokens that follow another one.

        Args:
            before: The token before them, after which a text may begin.
            tokens: int [any number].

        Returns:
            None where a token is not one of the tokenizer's, or no text by itself.
        """
        ids = np.array([before, *tokens.tolist()])
        if int(ids.max()) >= len(self._is_end):
            return None
        sizes = self._sizes[self._is_end[ids[:-1]], ids[1:]]
        return None if (sizes == _UNKNOWN).any() else int(sizes.sum())


def _text_sizes(tokenizer: Any, pieces: dict[str, int]) -> Iterator[tuple[int, int, bool]]:
    """Yield (token id, bytes, whether it has one less at the beginning), as decoding tells."""
    once, twice = (
        tokenizer.batch_decode(
            [[token] * count for token in pieces.values()], clean_up_tokenization_spaces=False
        )
        for count in (1, 2)
    )
    for (piece, token), first, both in zip(pieces.items(), once, twice, strict=True):
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            yield token, 1, False
        elif both and ("\ufffd" not in both or "\ufffd" in piece):
            size = len(both.encode()) - len(first.encode())
            yield token, size, len(first.encode()) < size


def _byte_level_sizes(tokenizer: Any, pieces: dict[str, int]) -> Iterator[tuple[int, int, bool]]:
    """As `_text_sizes`, where the letters of a piece stand for bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = set(ByteLevel.alphabet())
    ids = tokenizer.encode("a", add_special_tokens=False)
    adds_space = tokenizer.decode(ids, clean_up_tokenization_spaces=False) == " a"
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for piece, token in pieces.items():
        # The decoder takes anything else as it is.
        is_plain = letters.issuperset(piece) and piece not in added
        size = len(piece) if is_plain else len(piece.encode("utf-8", "surrogatepass"))
        yield token, size, adds_space and piece.startswith("\u0120")


def _has_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and _is_byte_level(json.loads(backend.to_str()).get("decoder"))


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or []
        return bool(parts) and all(_is_byte_level(part) for part in parts)
    return decoder.get("type") == "ByteLevel"
