"""A model written as one GGUF file, for llama.cpp and what is built on it, and read back.

    model, tokenizer -> fields, tensors one by one -> NAME.gguf -> every tensor compared

Matrices get the data type that is asked for; vectors and the positions of GPT-2 stay float32, as
llama.cpp wants them. A model without a tokenizer is written without one: it takes token ids only.
The same model gives the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError, SaveError
from utils.tools.export.gguf_model import named_tensors, require_architecture, write_fields
from utils.tools.export.gguf_tokenizer import GgufTokenizer, read_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch

FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
TENSOR_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
STORED_AS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""As NumPy writes it; it has no bfloat16."""

POSITIONS = "position_embd.weight"


def require_gguf() -> None:
    """Refuse a machine without the `gguf` package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as exc:
        raise ConfigError(
            "--format gguf needs the package gguf, which is not installed. Run: "
            f"{sys.executable} -m pip install gguf"
        ) from exc


def write_gguf(
    model: Any, tokenizer: Any, name: str, dtype: str, path: Path, on_tensor: Callable[[int], None]
) -> None:
    """Write a causal language model of transformers, with a tokenizer or None, as a GGUF file.

    `dtype`, one of `TENSOR_TYPES`, is that of the matrices; `on_tensor` is told of the bytes of
    each tensor that is written.

    Raises:
        UsageError: GGUF has no such model or tokenizer.
        OSError: The disk is full.
    """
    import gguf
    import numpy as np

    architecture = require_architecture(model.config)
    fields = read_tokenizer(tokenizer, model.config.vocab_size) if tokenizer else None
    tensors = list(named_tensors(model))
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_fields(writer, model)
        _write_tokenizer(writer, fields)
        for tensor_name, read in tensors:
            tensor = read()
            kind = _kind(tensor_name, tensor, dtype)
            as_stored = np.dtype(STORED_AS[kind])
            writer.add_tensor_info(
                tensor_name,
                tensor.shape,
                as_stored,
                tensor.numel() * as_stored.itemsize,
                gguf.GGMLQuantizationType[kind],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, read in tensors:
            tensor = read()
            array = _stored(tensor, _kind(tensor_name, tensor, dtype))
            writer.write_tensor_data(array)
            on_tensor(array.nbytes)
    finally:
        writer.close()


def compare_gguf(model: Any, dtype: str, path: Path, on_tensor: Callable[[int], None]) -> int:
    """Read a GGUF file back; return how many tensors have every bit of the model's.

    `on_tensor` is told the bytes of each one that was compared.

    Raises:
        SaveError: A tensor is missing, is one too many, or differs.
    """
    import gguf
    import numpy as np

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = list(named_tensors(model))
    if sorted(stored) != sorted(name for name, _ in expected):
        raise SaveError(f"{path.name} does not hold the tensors that were written.")
    for name, read in expected:
        kind = _kind(name, read(), dtype)
        array, found = _stored(read(), kind), stored[name]
        is_same = found.tensor_type.name == kind and tuple(reversed(found.shape)) == read().shape
        if not is_same or not np.array_equal(found.data.reshape(-1).view("u1"), array.view("u1")):
            raise SaveError(f"{path.name}: tensor {name} is not what was written.")
        on_tensor(array.nbytes)
    return len(expected)


def _kind(name: str, tensor: torch.Tensor, dtype: str) -> str:
    is_matrix = tensor.dim() > 1 and name != POSITIONS
    return TENSOR_TYPES[dtype if is_matrix else "float32"]


def _stored(tensor: torch.Tensor, kind: str) -> np.ndarray[Any, Any]:
    """Return the little-endian bytes of a tensor as GGUF stores them, in one dimension."""
    import torch

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    array: np.ndarray[Any, Any] = (
        tensor.to("cpu", types[kind]).reshape(-1).view(torch.uint8).numpy()
    )
    return array.view(STORED_AS[kind])


def _write_tokenizer(writer: Any, fields: GgufTokenizer | None) -> None:
    if fields is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.pre)
    writer.add_token_list(fields.tokens)
    writer.add_token_types(fields.types)
    writer.add_token_merges(fields.merges)
    for key, number in fields.special.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", number)
    writer.add_add_bos_token(fields.add_bos)
    writer.add_add_eos_token(fields.add_eos)
    if fields.chat_template:
        writer.add_chat_template(fields.chat_template)
