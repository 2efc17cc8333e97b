r"""SentencePiece models and tiktoken encodings as files that `AutoTokenizer` loads.

    x.model, tiktoken:NAME, x.tiktoken --> tokenizer.json, tokenizer_config.json

transformers builds the Unigram or BPE of `tokenizers` (its convert_slow_tokenizer.py). Here it gets
what that leaves out: SentencePiece's normalization, control and byte pieces that no text can match,
ids without a token, and tiktoken's pattern for the regular expressions of `tokenizers` (Oniguruma).

Guarantee: the ids stay as they are. What comes out encodes a few hundred probe texts as the
original does; where it does not, the conversion is refused. One difference remains, in unigram
models: SentencePiece adds scores in 32 bits and `tokenizers` in 64. Of two cuts that are as good as
each other, such as `--- --` and `-- ---` for a run of dashes, each may take another one, and so may
SentencePiece in texts of thousands of words, where its sums are off by some thousandths.
"""

from __future__ import annotations

import base64
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_UNIGRAM, _BPE = 1, 2
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


Conversion = tuple[dict[str, bytes], int, int]
"""Files, size of the vocabulary, id of the end token."""


def is_convertible(name: str) -> bool:
    """Tell whether `--tokenizer NAME` means a SentencePiece model or a tiktoken encoding."""
    if name.startswith(TIKTOKEN_PREFIX):
        return True
    return Path(name).suffix in (SENTENCEPIECE_SUFFIX, TIKTOKEN_SUFFIX) and Path(name).is_file()


def convert_tokenizer(name: str) -> Conversion:
    """Return `tiktoken:NAME`, a .tiktoken file or a SentencePiece model as fast tokenizer files.

    Raises:
        UsageError: It is none or has no end token, the library that reads it is missing, or
            nothing would encode exactly as it does.
    """
    if name.startswith(TIKTOKEN_PREFIX):
        return _convert_encoding(_load_encoding(name), name)
    path = Path(name)
    content = path.read_bytes()
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


def build_own_files(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], eos_token: str
) -> dict[str, bytes]:
    """Return the files of a tokenizer that was made here: file name -> bytes.

    Not by save_pretrained: the bytes depend on no version of transformers, and its import of 3 s is
    saved.
    """
    config = {
        "clean_up_tokenization_spaces": False,
        "pad_token": eos_token,  # batches need one
        "tokenizer_class": PLAIN_CLASS,
        **settings,
        "bos_token": eos_token,  # what stands before a text in the data
        "eos_token": eos_token,
    }
    return {
        TOKENIZER_FILE: backend.to_str(pretty=True).encode("utf-8"),
        TOKENIZER_CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


def _finish(backend: tokenizers.Tokenizer, settings: dict[str, str], eos_token: str) -> Conversion:
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    eos_token_id = backend.token_to_id(eos_token)
    assert eos_token_id is not None
    return build_own_files(backend, settings, eos_token), vocab_size, eos_token_id


def _require_same_ids(
    backend: tokenizers.Tokenizer,
    encode: Callable[[str], list[int]],
    words: Sequence[str],
    name: str,
    *,
    ignore_order: bool = False,
) -> None:
    """Refuse a conversion that encodes a probe text in another way than the original."""
    for text in (*PROBES, *random_probes(words)):
        ids, expected = backend.encode(text, add_special_tokens=False).ids, list(encode(text))
        if ids != expected and not (ignore_order and sorted(ids) == sorted(expected)):
            raise UsageError(
                f"--tokenizer {name}: cannot be converted exactly; it would encode {text!r} in "
                "another way. Convert it by other means, and give the tokenizer.json or its "
                "directory."
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
    try:
        lines = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as exc:
        raise UsageError(
            f"--tokenizer {path}: not a tiktoken file: a line is not a base64 token and its rank."
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
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special: dict[str, int] = encoding._special_tokens
    eos_token = next((token for token in END_TOKENS if token in special), None)
    if eos_token is None:
        raise UsageError(f"--tokenizer {name}: has none of the end tokens {', '.join(END_TOKENS)}.")
    converter: Any = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks
    vocab, merges = converter.extract_vocab_merges_from_model("")
    vocab |= special
    # Ids without a token, as cl100k_base's 100256, would move those after them.
    for unused in set(range(max(vocab.values()))) - set(vocab.values()):
        vocab[f"<|unused_{unused}|>"] = unused
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
    _require_same_ids(backend, encoding.encode_ordinary, words, name)
    return _finish(backend, {"unk_token": eos_token}, eos_token)


def _to_oniguruma(pattern: str) -> str:
    """Return a pattern of tiktoken (fancy-regex) that means the same to Oniguruma."""

    def rewrite(match: re.Match[str]) -> str:
        # `$` and `^` would be ends and starts of lines; x{1,3}+ would repeat the whole x{1,3}.
        return {"$": r"\z", "^": r"\A"}.get(match[0], match["repeat"] or match[0])

    escape_or_set = r"\\.|\[(?:\\.|[^\]\\])*\]"
    return re.sub(rf"{escape_or_set}|[$^]|(?P<repeat>\{{\d+(?:,\d*)?\}})\+", rewrite, pattern)


# SentencePiece.


def _convert_sentencepiece(content: bytes, name: str) -> Conversion:
    sentencepiece = _import("sentencepiece", name)
    model = _import("sentencepiece.sentencepiece_model_pb2", name).ModelProto()
    try:
        model.ParseFromString(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as exc:  # protobuf's DecodeError and sentencepiece's RuntimeError
        raise UsageError(f"--tokenizer {name}: not a SentencePiece model ({exc}).") from exc
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise UsageError(f"--tokenizer {name}: only unigram and bpe models can be converted.")
    if processor.eos_id() < 0:
        raise UsageError(
            f"--tokenizer {name}: no end-of-text token, which separates the documents. Train the "
            "model with --eos_id set."
        )
    backend = _build_sentencepiece_backend(model)
    if processor.normalize("a\rb") == processor.normalize("a\nb"):
        from tokenizers import normalizers

        # Precompiled takes the pair for one character, and would make one space of it.
        pair = normalizers.Replace("\r\n", "\n\n")
        backend.normalizer = normalizers.Sequence([pair, backend.normalizer])
    # Those that text can match, as it cannot match `</s>` or `<0x41>`.
    texts = [piece.piece for piece in model.pieces if piece.type in (_NORMAL, _USER_DEFINED)]
    _require_same_ids(
        backend,
        processor.encode,
        [text.replace(SPACE, " ") for text in texts],
        name,
        # Equal scores: see the top.
        ignore_order=model.trainer_spec.model_type == _UNIGRAM,
    )
    roles = {"unk": processor.unk_id(), "pad": processor.pad_id()}
    settings = {f"{role}_token": model.pieces[n].piece for role, n in roles.items() if n >= 0}
    return _finish(backend, settings, model.pieces[processor.eos_id()].piece)


def _build_sentencepiece_backend(model: Any) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import SpmConverter
    from transformers.tokenization_utils_base import generate_merges

    is_unigram = model.trainer_spec.model_type == _UNIGRAM
    symbols = [] if is_unigram else [one.piece for one in model.pieces if one.type == _USER_DEFINED]
    special = [one.piece for one in model.pieces if one.type in (_UNKNOWN, _CONTROL)]
    if is_unigram:
        vocab: Any = _unigram_scores(model.pieces)
        merges = None
    else:
        vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
        others = [piece.piece for piece in model.pieces if piece.type != _NORMAL]
        merges = generate_merges(vocab, skip_tokens=others)
    backend: tokenizers.Tokenizer = SpmConverter.build_tokenizer_from_spm_proto(
        model, vocab, merges
    )
    _set_normalization(backend, model, has_symbols=bool(symbols))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, normalized=True) for text in symbols])
    return backend


def _unigram_scores(pieces: Any) -> list[tuple[str, float]]:
    highest = max((piece.score for piece in pieces if piece.type == _NORMAL), default=0.0)

    def score(piece: Any) -> float:
        if piece.type == _USER_DEFINED:  # as unigram_model.cc: always chosen
            return len(piece.piece) * highest - 0.1
        return piece.score if piece.type == _NORMAL else IMPOSSIBLE_SCORE

    return [(piece.piece, score(piece)) for piece in pieces]


def _set_normalization(backend: tokenizers.Tokenizer, model: Any, *, has_symbols: bool) -> None:
    """Set what stands before and after the model.

    User-defined symbols divide the text: only its first part gets a space.
    """
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix and not has_symbols:
        steps.append(normalizers.Prepend(SPACE))
    if not has_symbols:
        steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    cutters: list[Any] = []
    if has_symbols:
        scheme = "first" if spec.add_dummy_prefix else "never"
        cutters.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False))
    # Where no piece goes on after a space, words are encoded one by one: the same ids, much faster.
    if not any(SPACE in piece.piece.lstrip(SPACE) for piece in model.pieces):
        cutters.append(pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*"), "isolated"))
    if cutters:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cutters)
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)
