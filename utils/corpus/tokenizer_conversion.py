r"""SentencePiece models and tiktoken encodings as files that `AutoTokenizer` loads.

    x.model, tiktoken:NAME, x.tiktoken --> tokenizer.json, tokenizer_config.json

The ids stay as they are. SentencePiece: pieces, scores and normalization of the model become a
Unigram or BPE of `tokenizers`; control and byte pieces can never be matched by text, as in
SentencePiece itself. tiktoken: every way to build a token from two others becomes a merge, and
the pattern is rewritten for the regular expressions of `tokenizers` (Oniguruma), which read
`$` and `{1,3}+` in another way. The rules follow transformers' convert_slow_tokenizer.py.

Guarantee: what comes out encodes a few hundred probe texts as the original does; where it does
not, the conversion is refused. One difference remains, in unigram models: SentencePiece adds
scores in 32 bits and `tokenizers` in 64. Of two cuts that are as good as each other, such as
`--- --` and `-- ---` for a run of dashes, each may take another one, and so may SentencePiece in
texts of thousands of words, where its sums are off by some thousandths.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.base.errors import UsageError
from utils.data.shard_index import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from utils.models.tokenizer import END_OF_TEXT, END_TOKENS, PLAIN_CLASS, PROBES, random_probes

if TYPE_CHECKING:
    import tokenizers

TIKTOKEN_PREFIX = "tiktoken:"  # noqa: S105 - not a password
TIKTOKEN_SUFFIX = ".tiktoken"
SENTENCEPIECE_SUFFIX = ".model"
SPACE = "\u2581"
# Types of pieces in sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
UNIGRAM, BPE = 1, 2
# Of pieces that no text may match; far below every real score, so that no path contains one.
IMPOSSIBLE_SCORE = -1e6

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# A .tiktoken file holds neither its pattern nor its special tokens: those of OpenAI's by name.
KNOWN_ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": (GPT2_PATTERN, {END_OF_TEXT: 50256}),
    "r50k_base": (GPT2_PATTERN, {END_OF_TEXT: 50256}),
    "p50k_base": (GPT2_PATTERN, {END_OF_TEXT: 50256}),
    "cl100k_base": (
        CL100K_PATTERN,
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (O200K_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}


class Conversion(NamedTuple):
    """A converted tokenizer."""

    files: dict[str, bytes]
    vocab_size: int
    eos_token_id: int


def is_convertible(name: str) -> bool:
    """Tell whether `--tokenizer NAME` means a SentencePiece model or a tiktoken encoding."""
    if name.startswith(TIKTOKEN_PREFIX):
        return True
    return Path(name).suffix in (SENTENCEPIECE_SUFFIX, TIKTOKEN_SUFFIX) and Path(name).is_file()


def convert_tokenizer(name: str) -> Conversion:
    """Return `tiktoken:NAME`, a .tiktoken file or a SentencePiece model as fast tokenizer files.

    Raises:
        UsageError: It cannot be read or has no end token, the library that reads it is missing,
            or nothing would encode exactly as it does.
    """
    if name.startswith(TIKTOKEN_PREFIX):
        return _convert_encoding(_load_encoding(name), name)
    path = Path(name)
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise UsageError(f"--tokenizer {name}: cannot be read ({exc.strerror}).") from exc
    # Some tiktoken files, as Llama 3's, are called tokenizer.model.
    if path.suffix == TIKTOKEN_SUFFIX or re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return _convert_encoding(_read_encoding(path, content), name)
    return _convert_sentencepiece(content, name)


def _import(module: str, name: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise UsageError(
            f"--tokenizer {name} needs {package}, which is not installed. "
            f"Run: {sys.executable} -m pip install {package}"
        ) from exc


def _finish(backend: tokenizers.Tokenizer, settings: dict[str, str], eos_token: str) -> Conversion:
    config = {
        "clean_up_tokenization_spaces": False,
        "pad_token": eos_token,
        "tokenizer_class": PLAIN_CLASS,
        **settings,
        "bos_token": eos_token,  # what stands before a text in the data
        "eos_token": eos_token,
    }
    files = {
        TOKENIZER_FILE: backend.to_str(pretty=True).encode("utf-8"),
        TOKENIZER_CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    eos_token_id = backend.token_to_id(eos_token)
    assert eos_token_id is not None
    return Conversion(files, vocab_size, eos_token_id)


def _find_difference(
    backend: tokenizers.Tokenizer,
    encode: Callable[[str], list[int]],
    probes: Iterable[str],
    *,
    ignore_order: bool = False,
) -> str | None:
    """Return the first probe that the two encode differently."""
    for text in probes:
        ids, expected = backend.encode(text, add_special_tokens=False).ids, list(encode(text))
        if ids != expected and not (ignore_order and sorted(ids) == sorted(expected)):
            return text
    return None


def _refuse(name: str, kind: str, text: str) -> UsageError:
    return UsageError(
        f"--tokenizer {name}: this {kind} cannot be converted exactly; it would encode {text!r} in "
        "another way. Convert it by other means, and give the tokenizer.json or its directory."
    )


# tiktoken.


def _load_encoding(name: str) -> Any:
    tiktoken = _import("tiktoken", name)
    try:
        return tiktoken.get_encoding(name.removeprefix(TIKTOKEN_PREFIX))
    except ValueError as exc:
        known = ", ".join(tiktoken.list_encoding_names())
        raise UsageError(f"--tokenizer {name}: no such encoding. There are: {known}.") from exc
    except Exception as exc:  # the download raises what requests raises
        raise UsageError(
            f"--tokenizer {name}: cannot be loaded ({type(exc).__name__}). tiktoken downloads an "
            "encoding once; without a network give its .tiktoken file."
        ) from exc


def _read_encoding(path: Path, content: bytes) -> Any:
    tiktoken = _import("tiktoken", str(path))
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as exc:
            raise UsageError(
                f"--tokenizer {path}: line {number} is not a base64 token and its rank."
            ) from exc
    if len(ranks) < 256 or min(ranks.values()) < 0 or len(set(ranks.values())) != len(ranks):
        raise UsageError(f"--tokenizer {path}: not a whole tiktoken file ({len(ranks)} tokens).")
    pattern, special = KNOWN_ENCODINGS.get(
        path.stem, (CL100K_PATTERN, {END_OF_TEXT: max(ranks.values()) + 1})
    )
    return tiktoken.Encoding(
        path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )


def _convert_encoding(encoding: Any, name: str) -> Conversion:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    special: dict[str, int] = encoding._special_tokens
    eos_token = next((token for token in END_TOKENS if token in special), None)
    if eos_token is None:
        raise UsageError(f"--tokenizer {name}: has none of the end tokens {', '.join(END_TOKENS)}.")
    vocab, merges = _vocabulary_of(encoding._mergeable_ranks, special)
    backend = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_to_oniguruma(encoding._pat_str)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    words = [token.decode("utf-8", "ignore") for token in encoding._mergeable_ranks]
    probes = [*PROBES, *random_probes(words)]
    different = _find_difference(backend, encoding.encode_ordinary, probes)
    if different is not None:
        raise _refuse(name, "encoding", different)
    return _finish(backend, {"unk_token": eos_token}, eos_token)


def _vocabulary_of(
    ranks: dict[bytes, int], special: dict[str, int]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.__getitem__)
    merges = []
    for token in ordered:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    vocab = {spell(token): ranks[token] for token in ordered} | special
    # Ids without a token, as cl100k_base's 100256, would move those after them.
    for unused in set(range(max(vocab.values()))) - set(vocab.values()):
        vocab[f"<|unused_{unused}|>"] = unused
    return vocab, [(spell(left), spell(right)) for left, right in merges]


def _byte_letters() -> list[str]:
    """Return the letter that byte-level tokenizers write for each byte (as GPT-2 does)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _to_oniguruma(pattern: str) -> str:
    """Return a pattern of tiktoken (fancy-regex) that means the same to Oniguruma."""
    result, depth, position = "", 0, 0
    while position < len(pattern):
        repeat = re.compile(r"\{\d+(?:,\d*)?\}\+").match(pattern, position)
        if pattern[position] == "\\":
            piece = pattern[position : position + 2]
        elif depth == 0 and repeat:
            piece = repeat[0]
        else:
            piece = pattern[position]
        position += len(piece)
        depth += (piece == "[") - (piece == "]")
        if depth == 0 and repeat and piece == repeat[0]:
            piece = piece[:-1]  # x{1,3}+ would repeat the whole x{1,3}
        elif depth == 0:
            piece = {"$": r"\z", "^": r"\A"}.get(piece, piece)  # else ends and starts of lines
        result += piece
    return result


# SentencePiece.


class _Piece(NamedTuple):
    text: str
    score: float
    type: int


def _convert_sentencepiece(content: bytes, name: str) -> Conversion:
    from tokenizers import normalizers

    sentencepiece = _import("sentencepiece", name)
    proto = _import("sentencepiece.sentencepiece_model_pb2", name)
    model = proto.ModelProto()
    try:
        model.ParseFromString(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as exc:  # protobuf's DecodeError and sentencepiece's RuntimeError
        raise UsageError(f"--tokenizer {name}: not a SentencePiece model ({exc}).") from exc
    pieces = [_Piece(piece.piece, piece.score, piece.type) for piece in model.pieces]
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise UsageError(f"--tokenizer {name}: only unigram and bpe models can be converted.")
    if processor.eos_id() < 0:
        raise UsageError(
            f"--tokenizer {name}: no end-of-text token, which separates the documents. Train the "
            "model with --eos_id set."
        )
    words = [
        piece.text.replace(SPACE, " ") for piece in pieces if piece.type in (_NORMAL, _USER_DEFINED)
    ]
    probes = [*PROBES, *random_probes(words)]
    different: str | None = ""
    for prepends_first_only in (False, True):
        backend = _build_sentencepiece_backend(model, pieces, prepends_first_only)
        if processor.normalize("a\rb") == processor.normalize("a\nb"):
            # Precompiled takes the pair for one character, and would make one space of it.
            pair = normalizers.Replace("\r\n", "\n\n")
            backend.normalizer = normalizers.Sequence([pair, backend.normalizer])
        # Equal scores: see the top.
        has_ties = model.trainer_spec.model_type == UNIGRAM
        different = _find_difference(backend, processor.encode, probes, ignore_order=has_ties)
        if different is None:
            break
    if different is not None:
        raise _refuse(name, "SentencePiece model", different)
    roles = {"unk": processor.unk_id(), "pad": processor.pad_id()}
    settings = {f"{role}_token": pieces[n].text for role, n in roles.items() if n >= 0}
    return _finish(backend, settings, pieces[processor.eos_id()].text)


def _build_sentencepiece_backend(
    model: Any, pieces: Sequence[_Piece], prepends_first_only: bool
) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Tokenizer

    if model.trainer_spec.model_type == UNIGRAM:
        backend = Tokenizer(_unigram_of(model, pieces))
        added = [piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL)]
    else:
        backend = Tokenizer(_bpe_of(model, pieces))
        added = [piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    _set_normalization(backend, model, pieces, prepends_first_only)
    for piece in added:
        is_special = piece.type != _USER_DEFINED
        normalized = prepends_first_only and not is_special
        token = AddedToken(piece.text, normalized=normalized, special=is_special)
        backend.add_special_tokens([token]) if is_special else backend.add_tokens([token])
    return backend


def _unigram_of(model: Any, pieces: Sequence[_Piece]) -> Any:
    from tokenizers import models

    highest = max((piece.score for piece in pieces if piece.type == _NORMAL), default=0.0)

    def score(piece: _Piece) -> float:
        if piece.type == _NORMAL:
            return piece.score
        if piece.type == _USER_DEFINED:  # as unigram_model.cc: always chosen
            return len(piece.text) * highest - 0.1
        return IMPOSSIBLE_SCORE

    vocab = [(piece.text, score(piece)) for piece in pieces]
    return models.Unigram(vocab, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


def _bpe_of(model: Any, pieces: Sequence[_Piece]) -> Any:
    from tokenizers import models

    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    usable = {piece.text for piece in pieces if piece.type == _NORMAL}
    merges = []
    for piece in sorted(pieces, key=lambda piece: (-piece.score, vocab[piece.text])):
        if piece.type == _NORMAL:
            splits = [(piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text))]
            pairs = [pair for pair in splits if usable.issuperset(pair)]
            merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return models.BPE(
        vocab,
        merges,
        unk_token=model.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _set_normalization(
    backend: tokenizers.Tokenizer, model: Any, pieces: Sequence[_Piece], prepends_first_only: bool
) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix and not prepends_first_only:
        steps.append(normalizers.Prepend(SPACE))
    if not prepends_first_only:
        steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    cutters: list[Any] = []
    if prepends_first_only:
        scheme = "first" if spec.add_dummy_prefix else "never"
        cutters.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False))
    # Where no piece goes on after a space, words are encoded one by one: the same ids, much faster.
    if not any(SPACE in piece.text.lstrip(SPACE) for piece in pieces):
        cutters.append(pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*"), "isolated"))
    if cutters:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cutters)
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)
