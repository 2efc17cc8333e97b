"""Tokens to text as they come: no half characters, nothing of a stop text.

    token ids -> pieces of text (`TextStream`) -> pieces before a stop text (`StopFinder`)

A piece that has been given out is never taken back. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 8
MAX_WINDOW_TOKENS = 40
MAX_CHARACTER_TOKENS = 4  # UTF-8 has at most so many bytes in a character, a token at least one


class TextStream:
    """Makes text of tokens one by one.

    The tokens before decide how the first ones read (a tokenizer of words drops the space at the
    begin of what it decodes), so a few of them are decoded along. The last character is held back
    while it may be the begin of one whose bytes are not all there.

    Args:
        tokenizer: Has `decode`.
        prompt: Token ids that the text follows; empty at the begin of a text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._forget()
        self._given = len(self._decode())  # characters of what `_ids` decode to
        self._incomplete = 0  # tokens since the text last ended with a whole character

    def push(self, token: int) -> str:
        """Return the text that a token adds, as far as it is certain."""
        self._ids.append(token)
        text = self._decode()
        whole = text.rstrip(REPLACEMENT)
        self._incomplete = self._incomplete + 1 if whole != text else 0
        if self._incomplete >= MAX_CHARACTER_TOKENS:
            whole = text[:-1]  # bytes that are no character; only the last may still become one
        piece = whole[self._given :]
        self._given = max(self._given, len(whole))
        # Where bytes lack that make a character, some tokenizers do not read those before either.
        patience = MAX_WINDOW_TOKENS * (2 if self._incomplete else 1)
        if len(self._ids) > patience:
            held = max(0, len(text) - self._given)
            self._forget()
            self._given = len(self._decode()) - held
        return piece

    def close(self) -> str:
        """Return what was held back; there will be no more tokens."""
        return self._decode()[self._given :]

    def _forget(self) -> None:
        """Keep the last tokens only, from the begin of a character where one is near."""
        longest = CONTEXT_TOKENS + MAX_CHARACTER_TOKENS
        kept = self._ids[-longest:]
        for begin in range(len(kept) - CONTEXT_TOKENS, -1, -1):
            self._ids = kept[begin:]
            if not self._decode().startswith(REPLACEMENT):
                return
        self._ids = kept

    def _decode(self) -> str:
        if not self._ids:
            return ""
        # What the tokenizer would tidy up it would tidy up differently once more tokens are there.
        text: str = self._tokenizer.decode(self._ids, clean_up_tokenization_spaces=False)
        return text


class StopFinder:
    """Ends a text before the first of several texts in it.

    The text that is complete first counts (of those that end together the longest), so the result
    is the same whatever pieces the text comes in.

    Args:
        stops: Texts, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Return what may be shown; nothing more once `found` is set."""
        if self.found is not None:
            return ""
        text = self._held + piece
        begin = self._find(text)
        if begin is None:
            begin = len(text) - self._open_end(text)
        shown, self._held = text[:begin], text[begin:]
        return shown

    def close(self) -> str:
        """Return what was held back, because a stop text might have begun with it."""
        return "" if self.found is not None else self._held

    def _find(self, text: str) -> int | None:
        """Return where the stop text begins that is complete first, None where there is none."""
        first: tuple[int, int] | None = None
        for stop in self._stops:
            begin = text.find(stop)
            if begin >= 0 and (first is None or (begin + len(stop), begin) < first):
                first, self.found = (begin + len(stop), begin), stop
        return None if first is None else first[1]

    def _open_end(self, text: str) -> int:
        """Return the length of the longest end of the text that a stop text begins with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
