"""A byte-level BPE tokenizer as the fields of a GGUF file.

    tokenizer of transformers -> tokens, their types, merges, pre-tokenizer, special ids

llama.cpp has its pre-tokenizers built in, by name: a tokenizer whose rules are none of those known
here is refused rather than written under a name that cuts text in another way. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.base.errors import UsageError
from utils.corpus.tokenizer_conversion import GPT2_PATTERN

# Of `tokenizer.ggml.token_type`.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

GPT2, LLAMA3, QWEN2 = "gpt-2", "llama-bpe", "qwen2"
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
    # As prepare_data writes tiktoken's.
    GPT2_PATTERN.replace("$", r"\z"): GPT2,
    _LLAMA3_PATTERN: LLAMA3,
    _LLAMA3_PATTERN.replace("{1,3}", ""): QWEN2,
}
IGNORES_MERGES = frozenset({LLAMA3})
"""Pre-tokenizers for which llama.cpp takes a word of the vocabulary as it is."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What `tokenizer.ggml.*` says.

    Attributes:
        pre: Name of the pre-tokenizer.
        tokens: Text of each id; byte-level ones spelled in byte letters.
        merges: `left right`, in order.
        special: `bos_token_id` and so on, for those that there are.
        add_bos: Texts begin with the first token of `special`.
    """

    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_tokenizer(tokenizer: Any, vocab_size: int) -> GgufTokenizer:
    """Return the fields of a tokenizer; ids below `vocab_size` without a token are unused ones.

    Raises:
        UsageError: GGUF cannot express what it does.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _refuse("it has no tokenizer.json")
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = find_pre_tokenizer(settings)
    if settings.get("normalizer"):
        raise _refuse("it changes texts before it cuts them (a normalizer)")
    model = settings["model"]
    if model.get("ignore_merges") and pre not in IGNORES_MERGES:
        _require_reachable(model, {token["content"] for token in settings["added_tokens"]})
    tokens, types = _tokens_of(settings, vocab_size)
    add_bos, add_eos = _added_ends(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    return GgufTokenizer(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        special=_special_ids(tokenizer, vocab_size),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template if isinstance(template, str) else None,
    )


def find_pre_tokenizer(settings: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the rules by which a `tokenizer.json` cuts texts.

    Raises:
        UsageError: They are none of those known, or it is no byte-level BPE.
    """
    model = settings["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _refuse("it is no byte-level BPE")
    steps = _steps_of(settings.get("pre_tokenizer"))
    kinds = [step.get("type") for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise _refuse("its pre-tokenizer is none that llama.cpp has")
    if steps[-1].get("add_prefix_space"):
        raise _refuse("it puts a space before each text")
    uses_own_pattern = bool(steps[-1].get("use_regex", True))
    if kinds == ["ByteLevel"] and uses_own_pattern:
        return GPT2
    pattern = (steps[0].get("pattern") or {}).get("Regex")
    is_plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
    if uses_own_pattern or not is_plain or pattern not in _PATTERNS:
        raise _refuse("its pattern is none that llama.cpp has under a name")
    return _PATTERNS[pattern]


def _steps_of(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if not isinstance(pre_tokenizer, dict):
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return list(pre_tokenizer.get("pretokenizers", ()))
    return [pre_tokenizer]


def _require_reachable(model: Mapping[str, Any], added: Collection[str]) -> None:
    """Refuse words that merges do not make: llama.cpp would cut them where this one does not."""
    from tokenizers import models

    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in model["merges"]]
    bpe = models.BPE(model["vocab"], [(left, right) for left, right in merges])
    for word in model["vocab"]:
        if word not in added and len(bpe.tokenize(word)) > 1:
            raise _refuse(f"its merges do not make its token {word!r}")


def _tokens_of(settings: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    named = [(number, text, NORMAL) for text, number in settings["model"]["vocab"].items()]
    named += [
        (token["id"], token["content"], CONTROL if token["special"] else USER_DEFINED)
        for token in settings["added_tokens"]
    ]
    for number, text, kind in named:
        if number >= vocab_size:
            raise UsageError(
                f"--format gguf: the tokenizer's id {number} is outside the model's vocabulary of "
                f"{vocab_size}."
            )
        tokens[number], types[number] = text, kind
    return tokens, types


def _special_ids(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is not None and number < vocab_size:
            found[f"{field}_token_id"] = number
    if "eos_token_id" not in found:  # llama.cpp would take id 11 for it
        raise _refuse("it has no end-of-text token")
    found.setdefault("bos_token_id", found["eos_token_id"])
    return found


def _added_ends(tokenizer: Any) -> tuple[bool, bool]:
    """Tell whether it puts its begin and its end token around a text.

    Raises:
        UsageError: It puts anything else there.
    """
    plain = tokenizer("a", add_special_tokens=False).input_ids
    added = tokenizer("a").input_ids
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for add_bos in (False, True):
        for add_eos in (False, True):
            if added == [*begin * add_bos, *plain, *end * add_eos]:
                return add_bos, add_eos
    raise _refuse("it puts more around a text than its begin and end tokens")


def _refuse(reason: str) -> UsageError:
    return UsageError(
        f"--format gguf: the tokenizer cannot be written, because {reason}. Supported: byte-level "
        "BPE with the pre-tokenizer of GPT-2 (as prepare_data.py trains it), Llama 3 or Qwen 2. "
        "--format hf takes any."
    )
