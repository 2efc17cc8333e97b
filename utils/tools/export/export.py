"""A trained model written for others: a folder of Hugging Face files, or one GGUF file.

    loaded model -> padding rows removed -> files -> read back, compared

What is written is loaded again by stock transformers, without a network: every tensor has to be
the same bit for bit, and the logits of a fixed batch too. Only then anybody may take it. The model
is in memory once, not twice: checksums of the tensors and the logits stand for the first one. The
same model gives the same bytes.
"""

from __future__ import annotations

import functools
import logging
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from configs.model_config import UNPADDED_KEY, known_vocab_size, with_older_keys
from utils.base.errors import SaveError, UsageError
from utils.base.progress import OnProgress
from utils.base.text import format_bytes, printable, reason_of
from utils.checkpoints.files import sync_files
from utils.checkpoints.layout import FileEntry, write_json
from utils.checkpoints.views import read_json_object
from utils.models.tokenizer import (
    build_files,
    find_misreading,
    read_tokenizer_json,
    with_template_of,
    write_tokenizer_files,
)
from utils.remote.loading import LoadedModel
from utils.storage.bucket import crc32c_of_bytes, fsync_directory
from utils.tools.export.gguf import compare_gguf, write_gguf
from utils.tools.export.model_card import build_card

CARD_FILE = "README.md"
CHECK_SEQUENCES, CHECK_TOKENS = 2, 32
PROBE_TEXT = "The quick brown fox: 3.14,  two spaces\tand\na na\u00efve line."
# What other programs read in place of a tokenizer.json.
_OTHER_FORMS = ("tokenizer.model", "vocab.json", "merges.txt")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOptions:
    """How a model is written.

    Attributes:
        dtype: Data type of the weights; auto keeps the one they have. Of a folder the model has it
            already, of a GGUF file only the matrices are cast.
        max_shard_size: Bytes of a weights file, as `5GB`; a larger model has several.
        is_checked: Read back what was written, and compare.
        tokenizer: Another one than the model's own.
        gguf_name: Name of the GGUF file; None for a folder.
    """

    dtype: str = "auto"
    max_shard_size: str = "5GB"
    is_checked: bool = True
    tokenizer: str | None = None
    gguf_name: str | None = None


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        files: Size and checksum of each.
        parameters: Weights, tied ones once.
        dtype: Data type of the weights.
        vocab_size: Rows of the embedding.
        removed_rows: Rows that had only padded it and were left out.
        compared_tensors: That were read back and are the same; None: not checked.
        max_logit_difference: Between the files' logits and the model's: 0, as anything else is an
            error; None: not computed.
    """

    files: Mapping[str, FileEntry]
    parameters: int
    dtype: str
    vocab_size: int
    removed_rows: int
    compared_tensors: int | None = None
    max_logit_difference: float | None = None


def export_model(
    loaded: LoadedModel, staged: Path, options: ExportOptions, on_progress: OnProgress
) -> ExportReport:
    """Write a model into an empty directory, synced and checked.

    Args:
        loaded: The model, which is changed; after the check it has no weights any more.
        staged: The directory.
        options: How it is written.
        on_progress: Told of bytes written and compared.

    Raises:
        UsageError: The model cannot be written like that.
        SaveError: The disk is full, or what was written is not the model.
    """
    model = loaded.model
    removed = remove_padding(model)
    dtype = _dtype_name(model) if options.dtype == "auto" else options.dtype
    _require_finite(loaded, dtype)
    _set_special_ids(model, loaded.tokenizer)
    _require_space(staged, model, dtype)
    try:
        if options.gguf_name is None:
            compared = _export_folder(loaded, staged, options, on_progress)
        else:
            path = staged / options.gguf_name
            compared = _export_gguf(loaded, path, options, dtype, on_progress)
        files = sync_files(staged, [path.name for path in staged.iterdir()])
        fsync_directory(staged)
    except (OSError, SafetensorError) as exc:
        raise SaveError(f"{loaded.source.name} was not exported: {_reason(exc)}.") from exc
    return ExportReport(
        files=files,
        parameters=model.num_parameters(),
        dtype=dtype,
        vocab_size=model.config.vocab_size,
        removed_rows=removed,
        compared_tensors=compared,
        max_logit_difference=None if options.gguf_name or compared is None else 0.0,
    )


def remove_padding(model: Any) -> int:
    """Remove the rows of embedding and output above the vocabulary; return how many.

    Tied weights stay tied.
    """
    if not hasattr(model.config, UNPADDED_KEY):
        return 0
    known = known_vocab_size(model.config)
    removed: int = model.config.vocab_size - known
    if removed > 0:
        model.resize_token_embeddings(known, mean_resizing=False)
    delattr(model.config, UNPADDED_KEY)
    return removed


def _export_folder(
    loaded: LoadedModel, staged: Path, options: ExportOptions, on_progress: OnProgress
) -> int | None:
    model = loaded.model
    size = _num_bytes(model, _dtype_name(model))
    on_progress("Writing", 0, size)
    try:
        model.save_pretrained(str(staged), max_shard_size=options.max_shard_size)
    except ValueError as exc:  # also a generation config that contradicts itself
        raise UsageError(f"{loaded.source.name} cannot be exported: {_reason(exc)}") from exc
    on_progress("Writing", size, size)
    config = staged / CONFIG_NAME
    write_json(config, with_older_keys(read_json_object(config)), indent=2)
    _write_tokenizer(loaded, staged, options.tokenizer)
    card = staged / CARD_FILE
    card.write_text(build_card(loaded), "utf-8")
    for path in staged.iterdir():  # safetensors lets nobody but the owner read its files
        path.chmod(stat.S_IMODE(card.stat().st_mode))
    if not options.is_checked:
        return None
    attention = model.config._attn_implementation
    checksums, logits = checksum_tensors(model, on_progress, "Reading"), compute_logits(model)
    if not logits.isfinite().all():
        raise UsageError(
            f"{loaded.source.name} computes logits that are no numbers in {_dtype_name(model)}. "
            "Choose another --dtype."
        )
    device = loaded.device
    model.to_empty(device="meta")  # its memory is the other one's now
    on_progress("Comparing", 0, size)
    return compare_folder(
        staged, checksums, logits, device, attention, loaded.tokenizer, on_progress
    )


def compare_folder(
    folder: Path,
    checksums: Mapping[str, str],
    logits: torch.Tensor,
    device: torch.device,
    attention: str,
    tokenizer: Any,
    on_progress: OnProgress,
) -> int:
    """Load a folder as anybody would; return how many tensors are those it was written from.

    Args:
        folder: What `save_pretrained` wrote.
        checksums: Of `checksum_tensors`.
        logits: Of `compute_logits`, on this device and with this attention.
        device: For the logits.
        attention: For the logits.
        tokenizer: The one that has to come out; None for none.
        on_progress: Told of bytes compared.

    Raises:
        SaveError: It is another model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, dtype="auto", attn_implementation=attention
        )
        model = model.to(device).eval()
        found = checksum_tensors(model, on_progress, "Comparing")
        difference = float((compute_logits(model) - logits).abs().max())
        read = None
        if tokenizer is not None:
            read = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as exc:  # whatever a wrong file meets first
        raise SaveError(f"What was written cannot be loaded: {_reason(exc)}.") from exc
    if found != checksums:
        names = sorted(name for name, _ in found.items() ^ checksums.items())
        raise SaveError(
            f"What was written is not the model: {printable(names[0])} differs ({len(names)} "
            "tensors in all)."
        )
    if difference != 0:
        raise SaveError(
            f"What was written is not the model: its logits differ by up to {difference:.3g}."
        )
    if tokenizer is not None:
        _compare_tokenizer(folder, read, tokenizer)
    return len(found)


def _compare_tokenizer(folder: Path, read: Any, tokenizer: Any) -> None:
    if _behaviour(read) != _behaviour(tokenizer):
        raise SaveError("What was written is not the tokenizer: it has other tokens.")
    text = find_misreading(folder) if getattr(tokenizer, "is_fast", False) else None
    if text is not None:
        raise SaveError(
            f"What was written is not the tokenizer: for this type of model, transformers reads "
            f"{printable(repr(text), 80)} in another way."
        )


def _behaviour(tokenizer: Any) -> tuple[Any, ...]:
    special = [getattr(tokenizer, key, None) for key in _SPECIAL[:2]]
    return (len(tokenizer), tokenizer(PROBE_TEXT).input_ids, *special)


def checksum_tensors(model: Any, on_progress: OnProgress, stage: str) -> dict[str, str]:
    """Return the crc32c of the bytes of each tensor, with its data type and shape."""
    found, done = {}, 0
    tensors = model.state_dict()
    total = sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {crc32c_of_bytes(data)}"
        done += tensor.nbytes
        on_progress(stage, done, total)
    return found


def compute_logits(model: Any) -> torch.Tensor:
    """Return the logits of a fixed batch, [sequences, tokens, vocabulary] in float32."""
    positions = getattr(model.config, "max_position_embeddings", None) or CHECK_TOKENS
    shape = (CHECK_SEQUENCES, min(CHECK_TOKENS, positions))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits.float().cpu()


def _export_gguf(
    loaded: LoadedModel, path: Path, options: ExportOptions, dtype: str, on_progress: OnProgress
) -> int | None:
    total, done = _num_bytes(loaded.model, dtype), {"Writing": 0, "Comparing": 0}

    def on_tensor(stage: str, num_bytes: int) -> None:
        done[stage] += num_bytes
        on_progress(stage, done[stage], max(total, done[stage]))

    if loaded.tokenizer is None:
        log.warning("%s has no tokenizer: the file takes token ids only.", loaded.source.name)
    tell = functools.partial(on_tensor, "Writing")
    write_gguf(loaded.model, loaded.tokenizer, loaded.source.name, dtype, path, tell)
    if not options.is_checked:
        return None
    return compare_gguf(loaded.model, dtype, path, functools.partial(on_tensor, "Comparing"))


def _write_tokenizer(loaded: LoadedModel, staged: Path, name: str | None) -> None:
    """Write the `tokenizer.json`, and settings for it that name the model's context.

    Others put before a prompt, and after it, what the file says: here as the model's data have it.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        return
    if loaded.context is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, loaded.context)
    if not getattr(tokenizer, "is_fast", False):
        tokenizer.save_pretrained(str(staged))
        return
    content = read_tokenizer_json(name or loaded.source.location)
    if content is not None:
        content = with_template_of(tokenizer, content)
    write_tokenizer_files(build_files(tokenizer, content), staged)
    directory = loaded.source.directory
    if name is None and directory is not None:
        for file in _OTHER_FORMS:
            if (directory / file).is_file():
                shutil.copyfile(directory / file, staged / file)


def _set_special_ids(model: Any, tokenizer: Any) -> None:
    """Let configs name the tokenizer's special tokens, and none outside the vocabulary."""
    tokenizer_end = getattr(tokenizer, "eos_token_id", None)
    for config in (model.config, model.generation_config):
        for key in _SPECIAL:
            old = getattr(config, key, None)
            known = [one for one in _as_list(old) if one < model.config.vocab_size]
            own = getattr(tokenizer, key, None)
            if key == "pad_token_id" and config is model.config and own == tokenizer_end:
                own = (
                    None  # an embedding's row of padding is never trained, and this one ends texts
                )
            if own is not None and own < model.config.vocab_size and own not in known:
                setattr(config, key, own)
            elif known != _as_list(old):
                setattr(config, key, known[0] if known else None)


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _require_finite(loaded: LoadedModel, dtype: str) -> None:
    limit = torch.finfo(getattr(torch, dtype)).max
    for name, tensor in loaded.model.named_parameters():
        low, high = (float(one) for one in tensor.detach().aminmax())
        if not (-limit <= low and high <= limit):
            raise UsageError(
                f"{loaded.source.name} has weights in {name} that are no numbers of {dtype} "
                f"(they reach from {low:.3g} to {high:.3g}). Choose another --dtype, or another "
                "checkpoint where they are no numbers at all."
            )


def _require_space(directory: Path, model: Any, dtype: str) -> None:
    needed, free = _num_bytes(model, dtype), shutil.disk_usage(directory).free
    if needed > free:
        raise SaveError(
            f"The export takes {format_bytes(needed)} and {directory.parent} has "
            f"{format_bytes(free)} free. Free some, or choose another --output."
        )


def _num_bytes(model: Any, dtype: str) -> int:
    count: int = model.num_parameters()
    return count * torch.finfo(getattr(torch, dtype)).bits // 8


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _reason(exc: BaseException) -> str:
    if isinstance(exc, OSError):  # NumPy says only how much it could write
        return printable(exc.strerror or f"the disk is full or fails ({exc})")
    return reason_of(exc)
