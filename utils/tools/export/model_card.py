"""The `README.md` of an exported model: what is known of it, and where it comes from.

    loaded model, metadata.json, training_config.json, manifest -> front matter, tables

Only what a reader of the model needs: no paths or buckets, no times, no licence that nobody gave.
What files say is escaped; the same model gives the same text. No torch here.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from configs.config_files import TRAINING_CONFIG_FILE
from utils.base.text import number, printable
from utils.checkpoints.layout import METADATA_FILE, Manifest
from utils.checkpoints.views import read_json_object
from utils.models.parts import OPTIMIZER_PREFIX
from utils.remote.loading import LoadedModel, ModelSource
from utils.tools.viewer.report import section

WEIGHTS_SUFFIXES = (".safetensors", "pytorch_model.bin")
HYPERPARAMETERS = (
    "sequence_length",
    "global_batch_size",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "min_lr_rate",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "mask_documents",
    "seed",
)
"""Keys of the training configuration that shaped the weights."""
BASE_KEYS = ("name", "run_id", "step", "revision")
"""What a checkpoint says of the model that its run began with."""

_PLAIN = frozenset(string.ascii_letters + string.digits + " .,+-_")
_SHAPE = (
    ("layers", "num_hidden_layers"),
    ("hidden size", "hidden_size"),
    ("attention heads", "num_attention_heads"),
    ("key and value heads", "num_key_value_heads"),
    ("intermediate size", "intermediate_size"),
    ("positions", "max_position_embeddings"),
    ("vocabulary", "vocab_size"),
    ("input and output embeddings tied", "tie_word_embeddings"),
)
CONFIG_KEYS = ("model_type", *(key for _, key in _SHAPE))
"""Keys of a model's config that a model card has."""


def build_card(loaded: LoadedModel) -> str:
    """Return the text of a model card.

    Raises:
        CheckpointError: The checkpoint's metadata cannot be read.
    """
    source, model = loaded.source, loaded.model
    config = {key: getattr(model.config, key, None) for key in CONFIG_KEYS}
    kind = str(config["model_type"])
    metadata = _read(source, METADATA_FILE)
    base = section(metadata, "base")
    on_hub = source.location if source.directory is None else None
    size = f"A {escape(kind)} language model of {model.num_parameters():,} parameters"
    data: Any = ModelCardData  # its annotations do not allow that no licence is known
    front = data(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base.get("name") if "revision" in base else on_hub,
        tags=["text-generation", kind],
    )
    rows = [("architecture", kind), *((title, config[key]) for title, key in _SHAPE)]
    rows += [("parameters", model.num_parameters()), ("weights", str(model.dtype)[6:])]
    origin = f"exported from {escape(source.name)}"
    tables = [_table("Model", rows)]
    if source.manifest is not None:
        training = _read(source, TRAINING_CONFIG_FILE)
        if source.averaged:  # the losses are those of one checkpoint
            metadata = {**metadata, "current_loss": None, "validation_metrics": None}
        origin = f"pre-trained for {source.manifest.step:,} steps"
        if "name" in base:
            origin += f", beginning with {escape(base['name'])}"
        tables.append(_table("Training", _training_rows(source.manifest, metadata, training)))
        tables.append(_table("Origin", _origin_rows(source, source.manifest, metadata)))
        tables.append(_NOT_SAID)
    begin = [f"---\n{front.to_yaml()}\n---", f"# {escape(source.name)}", f"{size}, {origin}."]
    return "\n\n".join([*begin, _USE, *tables]) + "\n"


def _read(source: ModelSource, name: str) -> Mapping[str, Any]:
    """Return what a file of a checkpoint says; nothing where the manifest does not vouch for it."""
    if source.manifest is None or source.directory is None or name not in source.manifest.files:
        return {}
    return read_json_object(source.directory / name)


_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is, or the model's name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""

_NOT_SAID = (
    "The checkpoint records neither a licence nor what its training data was: add both before you "
    "publish the model. It was pre-trained only, not tuned to follow instructions or to be safe."
)


def escape(value: object) -> str:
    """Return a value as text that means nothing to Markdown or HTML."""
    text = printable(value)
    return "".join(c if c in _PLAIN or ord(c) > 127 else f"\\{c}" for c in text)


def _training_rows(
    manifest: Manifest, metadata: Mapping[str, Any], training: Mapping[str, Any]
) -> list[tuple[str, object]]:
    progress = section(metadata, "training_progress")
    validation, base = section(metadata, "validation_metrics"), section(metadata, "base")
    return [
        ("preset", training.get("model") or None),
        *((f"begun from: {key}", base[key]) for key in BASE_KEYS if key in base),
        ("steps", manifest.step),
        ("tokens seen", progress.get("tokens_seen")),
        ("training loss", metadata.get("current_loss")),
        ("validation loss", validation.get("validation_loss")),
        ("validation perplexity", validation.get("perplexity")),
        *((key, training.get(key)) for key in HYPERPARAMETERS),
    ]


def _origin_rows(
    source: ModelSource, manifest: Manifest, metadata: Mapping[str, Any]
) -> list[tuple[str, object]]:
    system = section(metadata, "system_info")
    return [
        ("checkpoint", source.name),
        *(("mean of the weights of", path.name) for path in source.averaged),
        ("run", manifest.run_id),
        ("branch", manifest.branch),
        *(
            (f"crc32c of {file}", manifest.files[file].crc32c)
            for file in sorted(manifest.files)
            if not source.averaged
            and file.endswith(WEIGHTS_SUFFIXES)
            and not file.startswith(OPTIMIZER_PREFIX)
        ),
        ("code", metadata.get("git_commit")),
        *((key, system.get(key)) for key in ("torch", "transformers", "accelerate")),
    ]


def _table(title: str, rows: Sequence[tuple[str, object]]) -> str:
    lines = [f"| {escape(key)} | {_cell(value)} |" for key, value in rows if value is not None]
    return "\n".join([f"## {title}", "", "| what | value |", "|---|---|", *lines])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    found = number(value)
    if found is None:
        return escape(value)
    return f"{found:,.0f}" if isinstance(value, int) else f"{found:.6g}"
