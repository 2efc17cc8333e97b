"""A trained model, from a checkpoint, a folder or the Hugging Face Hub, ready to be used.

    model source -> weights (verified where a manifest vouches for them), tokenizer -> loaded model

Of a checkpoint only the files are read that make the model: whole ones, `pytorch_model.bin`, or
the parts of sharded ranks. Code that comes with a model is never run. No torch here before a model
is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.model_config import known_vocab_size, require_few_layers
from utils.base.console import without_control_characters
from utils.base.errors import CheckpointError, UsageError
from utils.base.startup import load_libraries
from utils.base.text import printable, reason_of
from utils.checkpoints.layout import RANDOM_STATES_PREFIX, Manifest
from utils.checkpoints.store import require_recorded_tokenizer, verify_checkpoint
from utils.models.parts import OPTIMIZER_PREFIX
from utils.models.tokenizer import begin_like_data, find_tokenizer

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
_TABLE_TITLE = "LOAD REPORT"
_NOT_OF_THE_MODEL = (OPTIMIZER_PREFIX, RANDOM_STATES_PREFIX)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: `location` is what transformers loads, a directory or a name on the Hub.

    A checkpoint has its manifest, and one that was downloaded the bucket's URI. Its weights are the
    mean of those of the checkpoints `averaged`, where there are some.
    """

    name: str
    location: str
    manifest: Manifest | None = None
    bucket_uri: str = ""
    averaged: tuple[Path, ...] = ()

    @property
    def directory(self) -> Path | None:
        """Where it is on this machine; None for a name on the Hub."""
        path = Path(self.location)
        return path if path.is_dir() else None

    @property
    def step(self) -> int | None:
        """Optimizer updates up to a checkpoint."""
        return self.manifest.step if self.manifest is not None else None


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready for use.

    Attributes:
        source: Where it comes from.
        model: A causal language model of transformers, in eval mode, on `device`.
        tokenizer: Its tokenizer of transformers; None where none came along.
    """

    source: ModelSource
    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def vocab_size(self) -> int:
        """Token ids that mean something; those above only pad the vocabulary."""
        return known_vocab_size(self.model.config)

    @property
    def context(self) -> int | None:
        """Tokens that the model can see at once; None where its config does not say."""
        size: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return size

    def require_tokenizer(self) -> Any:
        """Return the tokenizer.

        Raises:
            UsageError: There is none.
        """
        if self.tokenizer is None:
            raise UsageError(
                f"{self.source.name} has no tokenizer, because its data had none. Name one with "
                "--tokenizer: a directory, a tokenizer.json or a name on the Hub."
            )
        return self.tokenizer


def load_model(
    source: ModelSource,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "sdpa",
    tokenizer: str | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        source: Where it is.
        device: auto takes the GPU where there is one; else as torch names it.
        dtype: One of `DTYPES`; auto keeps what the files have.
        attention: `attn_implementation` of transformers.
        tokenizer: Another tokenizer than the one that is there: a directory, a `tokenizer.json`,
            or a name on the Hub.

    Raises:
        CheckpointError: The checkpoint is damaged, or its weights do not fit its config.
        UsageError: There is no such model, device or tokenizer.
    """
    load_libraries()
    _quiet_transformers()
    target = choose_device(device)
    model = _load_weights(source, dtype, attention)
    try:
        model = model.to(target).eval()
    except RuntimeError as exc:  # also out of memory
        raise UsageError(f"{source.name} cannot be put on {target}: {reason_of(exc)}") from exc
    found = load_named_tokenizer(tokenizer) if tokenizer else _load_own_tokenizer(source)
    return LoadedModel(source, model, begin_like_data(found, _begin_id(model)))


def _quiet_transformers() -> None:
    """Leave out what transformers says itself where we say it, and make the rest harmless.

    Its progress bars are finished in a moment; its table of weights that do not fit has names as a
    file gives them, control characters too.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_make_harmless)  # a second time changes nothing


def _make_harmless(record: logging.LogRecord) -> bool:
    """Take control characters from a log line that quotes a model's files; tell whether to show it.

    The logger's level would leave out the table too, but some of its code asks for that level.
    """
    record.msg, record.args = without_control_characters(record.getMessage()), ()
    return _TABLE_TITLE not in record.msg


def choose_device(name: str) -> torch.device:
    """Return the device of a name; auto is the GPU where there is one.

    Raises:
        UsageError: It is not there.
    """
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((device for device, is_there in has.items() if is_there), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise UsageError(f"--device {printable(name)}: {reason_of(exc)}") from exc
    if not has.get(device.type, device.type == "cpu"):
        raise UsageError(f"--device {name}: torch finds no such device. debug_gpu.py says why.")
    return device


def load_named_tokenizer(name: str) -> Any:
    """Return the tokenizer of a directory, a `tokenizer.json`, or a name on the Hub.

    Raises:
        UsageError: There is none.
    """
    require_recorded_tokenizer(name)
    try:
        found = find_tokenizer(name)
    except Exception as exc:  # noqa: BLE001 - tokenizers raises bare Exception for a bad file
        raise UsageError(f"--tokenizer {printable(name)}: {reason_of(exc)}") from exc
    if found is None:
        raise UsageError(f"--tokenizer {printable(name)}: no tokenizer is there.")
    return found


def _begin_id(model: Any) -> int | None:
    """Return the token before a text, as the model's config has it from the data."""
    found = getattr(model.config, "bos_token_id", None)
    return found if isinstance(found, int) else None


def _load_own_tokenizer(source: ModelSource) -> Any:
    try:
        return find_tokenizer(source.location)
    except Exception as exc:  # noqa: BLE001 - tokenizers raises bare Exception for a bad file
        log.warning("The tokenizer of %s cannot be loaded: %s", source.name, reason_of(exc))
        return None


def _load_weights(source: ModelSource, dtype: str, attention: str) -> Any:
    if source.manifest is not None and source.directory is not None:
        return _load_checkpoint(source.directory, source.averaged, dtype, attention)
    from transformers import AutoConfig, AutoModelForCausalLM

    # Its retries without a network, each said twice: the error at the end says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        require_few_layers(AutoConfig.from_pretrained(source.location, trust_remote_code=False))
        model, report = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            trust_remote_code=False,  # left out, transformers asks on a terminal
        )
    except Exception as exc:  # transformers, safetensors and huggingface_hub raise many families
        if source.directory is None:
            raise UsageError(
                f"{source.name} is no checkpoint or directory here, and the Hugging Face Hub does "
                f"not give it: {reason_of(exc)}"
            ) from exc
        raise UsageError(f"{source.name} cannot be loaded: {_why(exc)}") from exc
    # Foreign folders may hold buffers that newer versions of a model no longer have.
    return _require_all_weights(source.name, model, {**report, "unexpected_keys": ()})


def _load_checkpoint(checkpoint: Path, averaged: Sequence[Path], dtype: str, attention: str) -> Any:
    """Return the model of a checkpoint; what is read of it is verified first."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from utils.checkpoints.state_files import read_average, read_weights

    manifest = verify_checkpoint(checkpoint, is_wanted=_is_of_the_model)
    if averaged:
        verified = [
            (path, verify_checkpoint(path, is_wanted=_is_of_the_model)) for path in averaged
        ]
        weights = read_average(verified)
    else:
        weights = read_weights(checkpoint, manifest)
    try:
        config = AutoConfig.from_pretrained(
            str(checkpoint), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            kind: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention,
            output_loading_info=True,
        )
        # A checkpoint has the names that weights have in memory. With this note, transformers would
        # save them so again, and not under the names by which every version of it knows them.
        vars(model).pop("_weight_conversions", None)
    except Exception as exc:  # whatever a wrong config meets first
        raise CheckpointError(f"{checkpoint.name} cannot be loaded: {_why(exc)}") from exc
    return _require_all_weights(checkpoint.name, model, report)


def _is_of_the_model(name: str) -> bool:
    return not name.startswith(_NOT_OF_THE_MODEL)


def _require_all_weights(name: str, model: Any, report: dict[str, Any]) -> Any:
    """Return the model, refusing one that transformers completed with random weights."""
    for key, problem in (
        ("missing_keys", "has no weights for"),
        ("mismatched_keys", "has weights of another shape for"),
        ("unexpected_keys", "has weights that its config has no place for:"),
    ):
        found: Sequence[Any] = sorted(report.get(key) or (), key=str)
        if found:
            shown = ", ".join(printable(str(one)) for one in found[:3])
            raise CheckpointError(f"{name} {problem} {shown} ({len(found)} in all).")
    return model


def _why(exc: BaseException) -> str:
    if "ignore_mismatched_sizes" in str(exc):  # it refers to the table that is left out
        return "its weights have other shapes than its config says."
    return reason_of(exc)
