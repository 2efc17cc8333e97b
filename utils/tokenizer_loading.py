"""The tokenizer that a checkpoint or prepared data bring along.

tokenizer files -> transformers tokenizer; nothing is looked up elsewhere
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UsageError
from utils.shard_index import find_tokenizer_files
from utils.tokenizer_conversion import TOKENIZER_FILE


def load_tokenizer(files: Mapping[str, bytes]) -> Any:
    """Return the tokenizer that files hold: file name -> bytes."""
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        for name, data in files.items():
            (Path(folder) / Path(name).name).write_bytes(data)
        return load_tokenizer_from(Path(folder))


def load_tokenizer_from(directory: Path) -> Any | None:
    """Return the tokenizer in a directory; None where there is none.

    Raises:
        Exception: Of any family: a file is broken.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = find_tokenizer_files(path.name for path in directory.iterdir())
    if not found:
        return None
    fast_class: Any = PreTrainedTokenizerFast
    if found == (TOKENIZER_FILE,):  # nothing says of which class it is
        return fast_class(tokenizer_file=str(directory / TOKENIZER_FILE))
    # Left out, transformers asks on a terminal whether to run a folder's code.
    return AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False
    )


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids that a model goes on from; of no text what stands before a text.

    Raises:
        UsageError: There is no text, and the tokenizer has no token that stands before one.
    """
    return list(tokenizer(prompt)["input_ids"]) or begin_of_text(tokenizer)


def begin_of_text(tokenizer: Any) -> list[int]:
    """Return what stands before a text in the data: the token that ends the one before.

    Raises:
        UsageError: The tokenizer has no such token.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise UsageError("an empty prompt needs a tokenizer with an end-of-text token")
