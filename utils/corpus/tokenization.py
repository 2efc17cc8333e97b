"""Tokenizers: train one or take one, keep it as files, and turn documents into token ids.

    documents --> build_tokenizer --.
    directory, file or hub name ----+--> Tokenizer (files + backend) --> encode_documents --> ids
    SentencePiece, tiktoken --------'                                          ^-- token cache

A `Tokenizer` is the files that `AutoTokenizer.from_pretrained(DIRECTORY)` loads, plus what the
preparation needs of it. The same documents give the same bytes. Encoding gives back the text
exactly with byte-level tokenizers: what looks like a special token inside a document is encoded
as ordinary text, so no document can forge an end of text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from utils.base.errors import UsageError, first_line
from utils.base.text import printable
from utils.corpus.documents import Document, OpenText, TokenArray, TokenizedDocument
from utils.corpus.token_cache import TokenCache
from utils.corpus.tokenizer_conversion import (
    IMPOSSIBLE_SCORE,
    build_own_files,
    convert_tokenizer,
    is_convertible,
)
from utils.data.shard_cache import token_dtype
from utils.data.shard_index import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, find_tokenizer_files
from utils.models.tokenizer import (
    END_OF_TEXT,
    END_TOKENS,
    begin_like_data,
    build_files,
    find_misreading,
    find_tokenizer,
    read_tokenizer_json,
    write_tokenizer_files,
)

if TYPE_CHECKING:
    import tokenizers

NUM_BYTE_TOKENS = 256

# Two batches are in work at a time.
BATCH_CHARACTERS = 2**20
BATCH_PIECES = 2**14
# Part of every key of the token cache: raise it when the same text would get other ids.
ENCODING_FORMAT = 2
# Part of a given tokenizer's fingerprint: raise it when the same files would give other ids.
READING = b"tokenizer.json decides"
# A longer document is encoded in pieces: an encoding takes about 100 times the text's memory,
# and one piece keeps one core busy only.
PIECE_CHARACTERS = 2**16
# So much of a document without a place to cut is kept for the next part of it.
UNCUT_CHARACTERS = 2**20
# Where to try, best first: where a line begins, before a word, anywhere; none beside more space.
CUTS = (r"(?<=\S\n)(?=\S)", r"(?<=\S)(?= \S)", r"(?<=\S)(?=\S)")
CUT_SEARCH_CHARACTERS = 2**12
CUT_TRIES = 8
CUT_CONTEXT_CHARACTERS = 128


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as files, with what is needed to write shards with it."""

    files: dict[str, bytes]
    """File name -> content, `tokenizer.json` among them; none where ids come from elsewhere."""

    vocab_size: int
    """Highest token id + 1."""

    eos_token_id: int | None
    """Id that ends every document; None where it is not known."""

    @property
    def sha256(self) -> str | None:
        """Hash of `tokenizer.json`, None where there is none."""
        content = self.files.get(TOKENIZER_FILE)
        return None if content is None else hashlib.sha256(content).hexdigest()

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Smallest type that holds every id: uint16 or uint32."""
        return np.dtype(token_dtype(self.vocab_size))

    def build_backend(self) -> tokenizers.Tokenizer:
        """Return a backend that encodes whole documents, special tokens in the text as text."""
        import tokenizers

        content = _shield_special_pieces(self.files[TOKENIZER_FILE].decode("utf-8"))
        backend = tokenizers.Tokenizer.from_str(content)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend


def _shield_special_pieces(content: str) -> str:
    """Return a tokenizer.json in which no text matches a special piece of a Unigram model.

    Such a model looks up any text in its vocabulary, `</s>` too.
    """
    settings = json.loads(content)
    if settings["model"].get("type") != "Unigram":
        return content
    special = {token["content"] for token in settings["added_tokens"] if token["special"]}
    for piece in settings["model"]["vocab"]:
        if piece[0] in special:
            piece[1] = min(piece[1], IMPOSSIBLE_SCORE)
    return json.dumps(settings)


def check_special_tokens(special_tokens: Sequence[str], vocab_size: int) -> None:
    """Refuse a vocabulary that cannot be trained.

    Raises:
        UsageError: It does not hold the bytes and the special tokens, or these are not usable.
    """
    names = [END_OF_TEXT, *special_tokens]
    for name in special_tokens:
        if not name.strip() or names.count(name) > 1:
            what = "is there more than once" if name.strip() else "is empty"
            raise UsageError(f"--special-token {name!r} {what} ({END_OF_TEXT} always is one).")
        if len(name) == 1:
            raise UsageError(f"--special-token {name!r} must have at least two characters.")
    if vocab_size < NUM_BYTE_TOKENS + len(names):
        raise UsageError(
            f"--vocab-size must be at least {NUM_BYTE_TOKENS + len(names)} (every byte, and "
            f"{', '.join(names)}), got {vocab_size}."
        )


def build_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Train a byte-level BPE tokenizer (as GPT-2's) whose token 0 is `<|endoftext|>`.

    Fewer than `vocab_size` tokens come out where the text has no more pairs to merge. No text is
    ever encoded to one of `special_tokens`, which get 1, 2, ...
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    settings: dict[str, Any] = {"unk_token": END_OF_TEXT}
    if special_tokens:
        settings["additional_special_tokens"] = list(special_tokens)
    files = build_own_files(backend, settings, END_OF_TEXT)
    return Tokenizer(files, backend.get_vocab_size(), eos_token_id=0)


def resolve_tokenizer(name: str) -> Tokenizer:
    """Return an existing tokenizer: its `tokenizer.json` byte for byte, and settings for it.

    `name` is a directory, a `tokenizer.json`, a name on the Hugging Face hub, a SentencePiece model
    (.model), `tiktoken:NAME` or a .tiktoken file.

    Raises:
        UsageError: There is none, it has no `tokenizer.json` or no end token, or `AutoTokenizer`
            would read what is written in another way.
    """
    path = Path(name).expanduser()
    if is_convertible(str(path)):
        return Tokenizer(*convert_tokenizer(str(path)))
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UsageError(f"--tokenizer {name}: no such file or directory.")
    # Its retries without a network, each said twice: the error at the end says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    loaded: Any
    try:
        loaded, content = find_tokenizer(name), read_tokenizer_json(name)
    except Exception as exc:  # noqa: BLE001 - tokenizers raises bare Exception for a bad file
        hint = "" if path.exists() else " There is no such file or directory here either."
        raise UsageError(
            f"--tokenizer {name}: cannot be loaded ({first_line(exc)}).{hint}"
        ) from exc
    if not getattr(loaded, "is_fast", False):
        raise UsageError(f"--tokenizer {name}: has no tokenizer.json.")
    loaded.eos_token = loaded.eos_token or _find_end_token(loaded.get_vocab(), name)
    end = loaded.convert_tokens_to_ids(loaded.eos_token)
    files = build_files(begin_like_data(loaded, end), content)
    _require_read_alike(files, name)
    return Tokenizer(files, max(loaded.get_vocab().values()) + 1, end)


def _require_read_alike(files: dict[str, bytes], name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        write_tokenizer_files(files, Path(folder))
        text = find_misreading(Path(folder))
    if text is not None:
        raise UsageError(
            f"--tokenizer {name}: transformers reads {printable(repr(text), 80)} in another way "
            f"than its {TOKENIZER_FILE}. A model trained on those ids would be given others later."
        )


def fingerprint_tokenizer(name: str) -> str:
    """Return a hash of a tokenizer's local files; of its name where it comes from the hub."""
    path = Path(name).expanduser()
    digest = hashlib.sha256()
    if not is_convertible(str(path)):
        digest.update(READING)
    if path.is_file():
        digest.update(path.read_bytes())
    elif path.is_dir():
        for file in find_tokenizer_files(one.name for one in path.iterdir()):
            digest.update((path / file).read_bytes())
    else:
        digest.update(name.encode())
    return digest.hexdigest()


def _find_end_token(vocabulary: dict[str, int], name: str) -> str:
    for token in END_TOKENS:
        if token in vocabulary:
            return token
    raise UsageError(
        f"--tokenizer {name}: no end-of-text token, which separates the documents. Set eos_token "
        f"in its {TOKENIZER_CONFIG_FILE}, or add {END_OF_TEXT} to it."
    )


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[Document], cache: TokenCache | None = None
) -> Iterator[TokenizedDocument]:
    """Yield each wanted document's ids followed by the end token, in order.

    Texts are encoded on all cores, the next batch while the last one is taken; what the cache
    holds is not encoded again. Documents that are ids already pass as they are.
    """
    encoder: _Encoder | None = None
    for is_text, group in itertools.groupby(documents, lambda item: isinstance(item.content, str)):
        if is_text:
            encoder = encoder or _Encoder(tokenizer, cache)
            yield from encoder.encode(group)
            continue
        for document in group:
            if document.is_wanted:
                assert not isinstance(document.content, str)
                yield TokenizedDocument(document.content, document.split)


class _Piece(NamedTuple):
    text: str
    split: str
    is_wanted: bool
    is_last: bool
    """Whether it is the last piece of what came as one document."""
    has_end: bool
    """The end token follows."""
    num_dropped: int = 0
    """How many of its first ids are those of the character before the cut."""


class _Batch(NamedTuple):
    pieces: list[_Piece]
    digest: str


class _Ids(NamedTuple):
    """The ids of all pieces of a batch, end to end; the token cache keeps both, one after other."""

    lengths: npt.NDArray[np.uint32]
    ids: TokenArray


class _Encoder:
    def __init__(self, tokenizer: Tokenizer, cache: TokenCache | None) -> None:
        import tokenizers

        self._backend = tokenizer.build_backend()
        self._dtype = tokenizer.dtype
        assert tokenizer.eos_token_id is not None
        self._eos_token_id = tokenizer.eos_token_id
        self._cache = cache
        self._key = f"{tokenizer.sha256} {ENCODING_FORMAT} {tokenizers.__version__} {self._dtype}"

    def encode(self, documents: Iterable[Document]) -> Iterator[TokenizedDocument]:
        parts: list[TokenArray] = []
        for batch, ids in self._encoded_batches(documents):
            for piece, part in zip(batch.pieces, self._cut(batch, ids), strict=True):
                if not piece.is_last:
                    parts.append(part)
                    continue
                if piece.is_wanted:
                    yield TokenizedDocument(
                        np.concatenate([*parts, part]) if parts else part, piece.split
                    )
                parts = []

    def _encoded_batches(self, documents: Iterable[Document]) -> Iterator[tuple[_Batch, _Ids]]:
        with ThreadPoolExecutor(1, "tokenizer") as pool:
            waiting: tuple[_Batch, Future[Any]] | None = None
            for batch in _batches(_Cutter(self._backend).pieces(documents)):
                future = pool.submit(self._look_up_or_encode, batch)
                if waiting is not None:
                    yield waiting[0], self._finish(*waiting)
                waiting = (batch, future)
            if waiting is not None:
                yield waiting[0], self._finish(*waiting)

    def _look_up_or_encode(self, batch: _Batch) -> _Ids | list[tokenizers.Encoding]:
        if not any(piece.is_wanted for piece in batch.pieces):
            return _Ids(np.zeros(len(batch.pieces), np.uint32), np.zeros(0, self._dtype))
        content = self._cache.get(self._key_of(batch)) if self._cache else None
        if content is not None:
            lengths = np.frombuffer(content, np.uint32, len(batch.pieces))
            return _Ids(lengths, np.frombuffer(content, self._dtype, offset=lengths.nbytes))
        texts = [piece.text for piece in batch.pieces]
        encodings: list[tokenizers.Encoding] = self._backend.encode_batch_fast(
            texts, add_special_tokens=False
        )
        return encodings

    def _finish(self, batch: _Batch, future: Future[Any]) -> _Ids:
        result: _Ids | list[tokenizers.Encoding] = future.result()
        if isinstance(result, _Ids):
            return result
        lengths = np.fromiter(map(len, result), np.uint32, len(result))
        ids = np.fromiter(
            itertools.chain.from_iterable(encoding.ids for encoding in result),
            self._dtype,
            int(lengths.sum()),
        )
        if self._cache:
            self._cache.put(self._key_of(batch), lengths.tobytes() + ids.tobytes())
        return _Ids(lengths, ids)

    def _key_of(self, batch: _Batch) -> str:
        return hashlib.sha256(f"{self._key} {batch.digest}".encode()).hexdigest()

    def _cut(self, batch: _Batch, encoded: _Ids) -> list[TokenArray]:
        """Return the ids of each piece, with the end token where a document ends."""
        ends = np.fromiter((piece.has_end for piece in batch.pieces), np.int64, len(batch.pieces))
        stops = np.cumsum(encoded.lengths, dtype=np.int64)
        ids = np.insert(encoded.ids, stops[ends == 1], self._eos_token_id)
        cuts = [0, *(stops + np.cumsum(ends)).tolist()]
        return [
            ids[start + piece.num_dropped : stop]
            for piece, (start, stop) in zip(batch.pieces, itertools.pairwise(cuts), strict=True)
        ]


class _Cutter:
    """Cuts long documents into pieces whose ids are those of the whole text.

    The piece after a cut is encoded with the character before it, whose ids are dropped: the
    tokenizer takes it for no start of a text. A cut is made only where this gives the same ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def pieces(self, documents: Iterable[Document]) -> Iterator[_Piece]:
        """Yield the pieces; what is left of a part of a document goes on with the next part."""
        text, num_dropped = "", 0
        following = itertools.chain(documents, [None])
        document = next(following)
        while document is not None:
            content, split, is_wanted = document
            assert isinstance(content, str)
            is_open, text = isinstance(content, OpenText), text + content
            document = next(following)
            start = 0
            while found := self._find_cut(text, start):
                cut, next_dropped = found
                yield _Piece(text[start:cut], split, is_wanted, False, False, num_dropped)
                start, num_dropped = cut - 1, next_dropped
            text = text[start:]
            goes_on = is_open and document is not None and document.split == split
            if goes_on and len(text) <= UNCUT_CHARACTERS:
                yield _Piece("", split, is_wanted, is_last=True, has_end=False)
                continue
            yield _Piece(text, split, is_wanted, True, not goes_on, num_dropped)
            text, num_dropped = "", 0

    def _find_cut(self, text: str, start: int) -> tuple[int, int] | None:
        """Return where a piece ends, and the number of ids that the next one drops."""
        # What follows may change how the last word so far is encoded: no cut near the end.
        end = len(text) - CUT_CONTEXT_CHARACTERS
        for first in range(start + PIECE_CHARACTERS, end, PIECE_CHARACTERS):
            # The character before a cut is the next piece's first: a piece has two at least.
            window = max(first, start + 2), min(first + CUT_SEARCH_CHARACTERS, end)
            for pattern in CUTS:
                for match in itertools.islice(
                    re.compile(pattern).finditer(text, *window), CUT_TRIES
                ):
                    num_dropped = self._try_cut(text, match.start())
                    if num_dropped is not None:
                        return match.start(), num_dropped
        return None

    def _try_cut(self, text: str, cut: int) -> int | None:
        first, last = max(0, cut - CUT_CONTEXT_CHARACTERS), cut + CUT_CONTEXT_CHARACTERS
        repeated = self._encode(text[cut - 1])
        whole, left, right = map(
            self._encode, (text[first:last], text[first:cut], text[cut - 1 : last])
        )
        is_clean = repeated + whole == right[: len(repeated)] + left + right[len(repeated) :]
        return len(repeated) if is_clean else None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def _batches(pieces: Iterable[_Piece]) -> Iterator[_Batch]:
    """Yield batches whose ends follow from the text alone.

    A batch that is at least half full ends with the first piece whose hash says so: after a
    change somewhere the later batches soon are the old ones again, and the token cache has them.
    """
    batch: list[_Piece] = []
    digest = hashlib.blake2b(digest_size=20)
    characters = 0
    for piece in pieces:
        data = piece.text.encode("utf-8")
        digest.update(b"%d " % len(data))
        digest.update(data)
        batch.append(piece)
        characters += len(piece.text)
        fill = max(characters / BATCH_CHARACTERS, len(batch) / BATCH_PIECES)
        if fill >= 1 or (fill >= 0.5 and zlib.crc32(data) % 16 == 0):
            yield _Batch(batch, digest.hexdigest())
            batch, digest, characters = [], hashlib.blake2b(digest_size=20), 0
    if batch:
        yield _Batch(batch, digest.hexdigest())
