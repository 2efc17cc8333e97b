"""The `README.md` of an exported model: what is known of it, and where it comes from.

    config, metadata.json, training_config.json, manifest -> front matter, tables

Only what a reader of the model needs: no paths or buckets, no times, no licence that nobody gave.
What files say is escaped; the same model gives the same text. No torch here.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.base.text import number, printable
from utils.checkpoints.layout import Manifest
from utils.models.parts import OPTIMIZER_PREFIX

WEIGHTS_SUFFIXES = (".safetensors", "pytorch_model.bin")
HYPERPARAMETERS = (
    "sequence_length",
    "global_batch_size",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "min_lr_rate",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "mask_documents",
    "seed",
)
"""Keys of the training configuration that shaped the weights."""

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


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        name: The model's, as a heading.
        config: Its values of `CONFIG_KEYS`.
        parameters: Number of weights, tied ones once.
        dtype: Data type of the weights.
        manifest: The checkpoint's; None for any other model.
        metadata: Its `metadata.json`.
        training: Its `training_config.json`.
        base_model: Name on the Hub that the model comes from.
    """

    name: str
    config: Mapping[str, Any]
    parameters: int
    dtype: str
    manifest: Manifest | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None


def build_card(facts: CardFacts) -> str:
    """Return the text of a model card."""
    parts = [_front_matter(facts), f"# {escape(facts.name)}", _introduction(facts), _USE]
    parts.append(_table("Model", _model_rows(facts)))
    if facts.manifest is not None:
        parts.append(_table("Training", _training_rows(facts)))
        parts.append(_table("Origin", _origin_rows(facts, facts.manifest)))
        parts.append(_NOT_SAID)
    return "\n\n".join(parts) + "\n"


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


def _front_matter(facts: CardFacts) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if facts.base_model and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", facts.base_model):
        lines.append(f"base_model: {facts.base_model}")
    lines += ["tags:", "- text-generation"]
    model_type = str(facts.config.get("model_type", ""))
    if re.fullmatch(r"[A-Za-z][\w-]*", model_type):
        lines.append(f"- {model_type}")
    return "\n".join(["---", *lines, "---"])


def _introduction(facts: CardFacts) -> str:
    kind = escape(facts.config.get("model_type", "causal"))
    size = f"A {kind} language model of {facts.parameters:,} parameters"
    if facts.manifest is None:
        return f"{size}, exported from {escape(facts.base_model or facts.name)}."
    return f"{size}, pre-trained for {facts.manifest.step:,} steps."


def _model_rows(facts: CardFacts) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("architecture", facts.config.get("model_type"))]
    rows += [(title, facts.config.get(key)) for title, key in _SHAPE]
    return [*rows, ("parameters", facts.parameters), ("weights", facts.dtype)]


def _training_rows(facts: CardFacts) -> list[tuple[str, object]]:
    progress = _mapping(facts.metadata.get("training_progress"))
    validation = _mapping(facts.metadata.get("validation_metrics"))
    rows: list[tuple[str, object]] = [
        ("preset", facts.training.get("model")),
        ("steps", facts.manifest.step if facts.manifest else None),
        ("tokens seen", progress.get("tokens_seen")),
        ("training loss, last logged", facts.metadata.get("current_loss")),
        ("validation loss", validation.get("validation_loss")),
        ("validation perplexity", validation.get("perplexity")),
    ]
    return rows + [(key, facts.training.get(key)) for key in HYPERPARAMETERS]


def _origin_rows(facts: CardFacts, manifest: Manifest) -> list[tuple[str, object]]:
    system = _mapping(facts.metadata.get("system_info"))
    rows: list[tuple[str, object]] = [
        ("checkpoint", facts.name),
        ("run", manifest.run_id),
        ("branch", manifest.branch),
    ]
    rows += [
        (f"crc32c of {name}", manifest.files[name].crc32c)
        for name in sorted(manifest.files)
        if name.endswith(WEIGHTS_SUFFIXES) and not name.startswith(OPTIMIZER_PREFIX)
    ]
    rows.append(("code", facts.metadata.get("git_commit")))
    return rows + [(key, system.get(key)) for key in ("torch", "transformers", "accelerate")]


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


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
