"""The tokenizer of a model, of data or of a name, as its `tokenizer.json` has it.

    files, folder or Hub name -> tokenizer of transformers -> prompts
                              `-> tokenizer_config.json with which anybody gets the same one

The file decides: from `tokenizer_class` or from the model's type, `AutoTokenizer` of transformers 5
may build a tokenizer that cuts texts at other places than the `tokenizer.json` beside it.
`find_misreading` tells where it does. Only what has no `tokenizer.json` is left to `AutoTokenizer`.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.model_config import CONFIG_FILE
from utils.base.errors import UsageError
from utils.data.shard_index import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    find_tokenizer_files,
)

# The class that both transformers 4 and 5 build from a tokenizer.json alone.
PLAIN_CLASS = "PreTrainedTokenizerFast"
END_OF_TEXT = "<|endoftext|>"
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


PROBES = (
    "The quick brown fox, number 12345, doesn't jump over the lazy dog's 3.14 tails!",
    "two  spaces, three   spaces,\ttabs\tand\n\nnew lines\r\n  indented\n",
    "D\u00e9j\u00e0 vu: na\u00efve \u00c5ngstr\u00f6m, \u00df, \ufb01ne, \u2460 and \u00bd.",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u041f\u0440\u0438\u0432\u0435\u0442! "
    "\u0627\u0644\u0633\u0644\u0627\u0645 \U0001f600\U0001f680",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # I'LL SEE, IT'S\n",
    " leading and trailing ",
    "trailing newline and spaces \n  ",
    "x\n ",
    "",
    " ",
    "a",
)
NUM_RANDOM_PROBES = 300
# Larger ones mean "no limit" to transformers.
LARGEST_CONTEXT = 10**9
_PROBE_WORDS = 1000


def load_tokenizer(files: Mapping[str, bytes]) -> Any:
    """Return the tokenizer that files hold: file name -> bytes."""
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        write_tokenizer_files(files, Path(folder))
        return load_tokenizer_from(Path(folder))


def write_tokenizer_files(files: Mapping[str, bytes], directory: Path) -> None:
    """Write files by their names, wherever they lay before."""
    for name, data in files.items():
        (directory / Path(name).name).write_bytes(data)


def load_tokenizer_from(directory: Path) -> Any | None:
    """Return the tokenizer in a directory; None where there is none.

    Raises:
        Exception: Of any family: a file is broken.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = find_tokenizer_files(path.name for path in directory.iterdir())
    if not found:
        return None
    kind: Any = PreTrainedTokenizerFast if TOKENIZER_FILE in found else AutoTokenizer
    # Left out, transformers asks on a terminal whether to run a folder's code.
    return kind.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)


def find_tokenizer(name: str) -> Any | None:
    """Return the tokenizer of a directory, of a `tokenizer.json` alone, or of a name on the Hub.

    Raises:
        Exception: Of any family: it is not there, or broken.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return load_tokenizer({TOKENIZER_FILE: path.read_bytes()})
    return load_tokenizer_from(find_tokenizer_folder(name))


def find_tokenizer_folder(name: str) -> Path:
    """Return a directory, or the one in which the Hub's client keeps a tokenizer's files.

    Raises:
        Exception: Of any family of the Hub's client: it does not give it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    # config.json tells of which class a tokenizer without a tokenizer.json is.
    return Path(snapshot_download(name, allow_patterns=[*TOKENIZER_FILES, CONFIG_FILE]))


def begin_like_data(tokenizer: Any, begin_id: int | None) -> Any:
    """Let a tokenizer begin texts as the model's data do, and end none; return it.

    In the data a text stands after the token that ends the one before it. What a post-processor
    puts around a text (`<s> $A </s>`) was never seen there, and an end token ends a prompt.

    The tokenizer is changed in place, and None stays None. `begin_id` is the token before a text in
    the data; None leaves the tokenizer's own.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    begin = None if begin_id is None else tokenizer.convert_ids_to_tokens(begin_id)
    if begin is not None:
        tokenizer.bos_token = begin
    bare, whole = (
        tokenizer("a", add_special_tokens=is_whole).input_ids for is_whole in (False, True)
    )
    if bare != whole:
        tokenizer.add_bos_token = bare[:1] != whole[:1]
        tokenizer.add_eos_token = False
    return tokenizer


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids that a model continues; for an empty prompt, `begin_of_text`.

    One token stands before the text where the tokenizer marks begins.

    Raises:
        UsageError: There is no text, and the tokenizer has no token that stands before one.
    """
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(prompt)["input_ids"])
    if whole[:1] != ids[:1]:
        ids = [*whole[:1], *ids]
    begin = begin_of_text(tokenizer)
    if not ids and begin is None:
        raise UsageError("an empty prompt needs a tokenizer with an end-of-text token")
    return ids or [begin]


def begin_of_text(tokenizer: Any) -> Any:
    """Return the id of the token that stands before a text in the data; None without one."""
    begin = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


def read_tokenizer_json(name: str) -> bytes | None:
    """Return the `tokenizer.json` of which `find_tokenizer` makes a tokenizer; None without one."""
    path = Path(name).expanduser()
    path = path if path.is_file() else find_tokenizer_folder(name) / TOKENIZER_FILE
    return path.read_bytes() if path.is_file() else None


def with_template_of(tokenizer: Any, content: bytes) -> bytes:
    """Return a `tokenizer.json` that adds the same tokens around a text as a tokenizer does.

    Where it does so already, its bytes stay as they are.
    """
    import tokenizers

    own = tokenizers.Tokenizer.from_buffer(content)
    if own.encode("a").ids == tokenizer("a").input_ids:
        return content
    template = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
    values = {**json.loads(content), "post_processor": template}
    return json.dumps(values, indent=2, ensure_ascii=False).encode()


def build_files(tokenizer: Any, content: bytes | None) -> dict[str, bytes]:
    """Return the files of which anybody gets the tokenizer: file name -> bytes.

    `content` is its `tokenizer.json`, kept byte for byte; None where it was made of other files.
    """
    content = content or tokenizer.backend_tokenizer.to_str(pretty=True).encode("utf-8")
    settings = _build_settings(tokenizer, content)
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    return {TOKENIZER_FILE: content, TOKENIZER_CONFIG_FILE: f"{text}\n".encode()}


def _build_settings(tokenizer: Any, content: bytes) -> dict[str, Any]:
    """Return a `tokenizer_config.json` with which transformers 4 and 5 load the file as it is.

    It names no class but the plain one, only values that both know, and a token for padding: the
    end token where there is no other.
    """
    import tokenizers

    own = tokenizers.Tokenizer.from_buffer(content)
    settings: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "tokenizer_class": PLAIN_CLASS,
    }
    settings.setdefault("pad_token", tokenizer.eos_token)
    if extra := [str(token) for token in tokenizer.extra_special_tokens]:
        settings["additional_special_tokens"] = extra
    if tokenizer.model_max_length < LARGEST_CONTEXT:
        settings["model_max_length"] = tokenizer.model_max_length
    if tokenizer.chat_template:
        settings["chat_template"] = _stored_template(tokenizer.chat_template)
    # transformers 4 sets the file's own value to this one, which is false where it is not named.
    if (json.loads(content).get("pre_tokenizer") or {}).get("add_prefix_space"):
        settings["add_prefix_space"] = True
    if added := _tokens_besides(own, tokenizer):
        settings["added_tokens_decoder"] = added
    return settings


def _tokens_besides(own: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Return the tokens that only the settings of a tokenizer name, in their form there."""
    traits = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        str(token_id): {trait: getattr(token, trait) for trait in traits}
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if own.id_to_token(token_id) is None
    }


def _stored_template(template: str | Mapping[str, str]) -> Any:
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def find_misreading(directory: Path) -> str | None:
    """Return a text that `AutoTokenizer` reads in another way than the `tokenizer.json` beside it.

    A `config.json` there has its say, as in a checkpoint. None: both give the same ids for every
    probe, and the same text of them.
    """
    import tokenizers
    from transformers import AutoTokenizer

    backend = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    backend.no_truncation()
    backend.no_padding()
    read = AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False
    )
    for text in _probes_of(backend, read):
        ids = backend.encode(text, add_special_tokens=False).ids
        if list(read(text, add_special_tokens=False, verbose=False).input_ids) != ids:
            return text
        shown = read.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if shown != backend.decode(ids, skip_special_tokens=False):
            return text
    return None


def find_difference(one: Any, other: Any) -> str | None:
    """Say in what a tokenizer gives other ids than another one; None where nothing shows it.

    Pieces that only one of them has are no difference as long as texts have the same ids.
    """
    pieces, others = (
        {token: piece for piece, token in tokenizer.get_vocab().items()}
        for tokenizer in (one, other)
    )
    for token in sorted(pieces.keys() & others.keys()):
        if pieces[token] != others[token]:
            return f"token {token} is {pieces[token]!r} in one, {others[token]!r} in the other"
    step = max(1, len(pieces) // _PROBE_WORDS)
    words = [one.decode([token]) for token in sorted(pieces)[::step]]
    for text in (*PROBES, *random_probes(words)):
        ids, found = (
            list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            for tokenizer in (one, other)
        )
        if ids != found:
            return f"{text!r} is {len(ids)} tokens in one, {len(found)} others in the other"
    return None


def random_probes(words: Sequence[str]) -> Iterator[str]:
    """Yield texts of up to 12 of these words, the same ones each time."""
    generator = random.Random(0)
    for _ in range(NUM_RANDOM_PROBES):
        yield "".join(generator.choices(words, k=generator.randint(1, 12)))


def _probes_of(backend: Any, read: Any) -> list[str]:
    step = max(1, backend.get_vocab_size() // _PROBE_WORDS)
    words = [backend.decode([token]) for token in range(0, backend.get_vocab_size(), step)]
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    added |= {str(token) for token in read.added_tokens_decoder.values() if not token.special}
    return [*PROBES, *random_probes(words), *(f"a {token}b {token}" for token in sorted(added))]
