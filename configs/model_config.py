"""A model's name or file, and overrides -> a transformers config object.

    preset or JSON file -> model type and values -> overrides, padded vocabulary -> config object

A file is any `config.json` of transformers. It is data: what it says is taken if the model type's
config class has a field of that name; code that it refers to is never run. transformers is imported
only when a config object is built.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from configs.model_presets import PRESETS, ModelPreset
from utils.base.errors import ConfigError, first_line
from utils.base.files import read_regular_file
from utils.base.text import did_you_mean, parse_json_object, printable, unique_keys

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

FILE_SUFFIX = ".json"
MAX_FILE_BYTES = 2**20
_SHOWN_CHARACTERS = 60
# Of a strict dataclass of transformers: field, types.
_WRONG_TYPE = re.compile(
    r"Field '(\w+)' (?:with value .* doesn't match any type in |expected (?:an? )?)"
    r"(.*?)(?:, got|\. Errors|$)"
)
_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "dict": "an object",
    "list": "a list",
    "NoneType": "null",
}
CONFIG_FILE = "config.json"  # of a model, as transformers has it

UNPADDED_KEY = "unpadded_vocab_size"
"""In the config of a model whose vocabulary is padded: the number of ids that mean something."""

PLAIN_HEADS = ("gpt2", "gpt_neox", "llama", "mistral", "olmo2", "qwen2", "qwen3")
"""Model types whose logits are `last_hidden_state @ output weights`, and nothing more."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)
"""Keys of a model config that are counts; transformers itself lets 0 and less pass."""

LARGEST = {"num_hidden_layers": 10_000}
LARGEST_SIZE = 2**31 - 1
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers")

# Common names of what some types call otherwise, besides those of their own `attribute_map`.
OTHER_NAMES = {"intermediate_size": "n_inner"}

# Older names -> where they lie in `rope_parameters`.
ROPE_KEYS = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}

# Of a saved model, not of its shape; some would have another dtype, or other outputs than a loss.
IGNORED_KEYS = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "trust_remote_code",
    "use_cache",
)

# What the data decide (`set_special_tokens`), besides.
DATA_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_model_file(name: str) -> bool:
    """Tell whether a `model` is a file and no preset."""
    return name.endswith(FILE_SUFFIX)


def get_preset(name: str) -> ModelPreset:
    """Return the preset of a name.

    Raises:
        ConfigError: There is none; the message lists the known ones.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not name:
        raise ConfigError("model is empty, which it may be only with init_from.")
    raise ConfigError(
        f"model {name!r} is not a known preset ({', '.join(PRESETS)}), and no path that ends in "
        f"{FILE_SUFFIX}.{did_you_mean(name, PRESETS)}"
    )


def is_loss_chunked(model_type: str, loss_implementation: str) -> bool:
    """Tell whether a run of `loss_implementation` has the logits of a chunk of tokens only."""
    if loss_implementation == "auto":
        return model_type in PLAIN_HEADS
    return loss_implementation == "chunked"


def known_vocab_size(model_config: Any) -> int:
    """Return how many token ids mean something; those above only pad the vocabulary."""
    size: int = model_config.vocab_size
    unpadded: Any = getattr(model_config, UNPADDED_KEY, None)  # a foreign file may say anything
    return unpadded if type(unpadded) is int and 0 < unpadded <= size else size


def find_dropouts(model_config: Any) -> dict[str, float]:
    """Return what a model drops while it is trained: key -> share, none of 0."""
    return {
        key: float(value)
        for key, value in sorted(model_config.to_dict().items())
        if ("dropout" in key or "pdrop" in key or "drop_rate" in key)
        and not key.startswith(("classifier", "summary"))
        and isinstance(value, (int, float))
        and value > 0
    }


def require_few_layers(model_config: Any) -> None:
    """Refuse a config that counts layers up to what no machine ends to build.

    Raises:
        ConfigError: It has more than any model.
    """
    for key, largest in LARGEST.items():
        size = getattr(model_config, key, None)
        if isinstance(size, int) and size > largest:
            raise ConfigError(f"{key} must be at most {largest}, got {_shown(str(size))}.")


def build_model_config(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    sequence_length: int | None = None,
    pad_vocab_to_multiple_of: int | None = None,
    found: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """Return the transformers config of a preset or a file.

    `name` is a key of `PRESETS`, or a path that ends in .json, relative to the current directory;
    or only says whose the values of a `config.json` are that were `found` already. `overrides`
    replace its values. The model's positions must hold `sequence_length` tokens. A
    vocabulary that is rounded up also gets `unpadded_vocab_size`.

    Raises:
        ConfigError: An unknown preset or key, a file that is no causal language model's, or values
            that do not fit each other.
    """
    overrides = overrides or {}
    if found is not None:
        model_type, values = _checked_values(name, dict(found))
    elif is_model_file(name):
        model_type, values = read_model_file(name)
    else:
        preset = get_preset(name)
        model_type, values = preset.model_type, dict(preset.values)
    values = _named_by_class(model_type, values, name)
    changed = _named_by_class(model_type, overrides, "model_overrides")
    _require_known(model_type, overrides)
    for key, part in ROPE_KEYS.items():
        if key in changed and isinstance(values.get("rope_parameters"), Mapping):
            values["rope_parameters"] = {**values["rope_parameters"], part: changed.pop(key)}
    values |= changed
    unpadded = values.pop(UNPADDED_KEY, None)
    config = _build(model_type, values, name, overrides)
    if isinstance(unpadded, int) and "vocab_size" not in changed:
        setattr(config, UNPADDED_KEY, unpadded)
    positions = getattr(config, "max_position_embeddings", None)
    if sequence_length and positions and sequence_length > positions:
        raise ConfigError(
            f"sequence_length {sequence_length} is above the {positions} positions of {name}. "
            f"Lower it, or set model_overrides.max_position_embeddings={sequence_length}."
        )
    size, multiple = config.vocab_size, pad_vocab_to_multiple_of
    if multiple and size % multiple:
        setattr(config, UNPADDED_KEY, known_vocab_size(config))
        config.vocab_size = -(-size // multiple) * multiple
    return config


def read_model_file(path: str) -> tuple[str, dict[str, Any]]:
    """Return (model type, values) of a `config.json`; values that no model type of it has are gone.

    Raises:
        ConfigError: It cannot be read, is no JSON object, needs code of its own, or its type is no
            causal language model of transformers.
    """
    try:
        text = read_regular_file(path, MAX_FILE_BYTES)
        found = parse_json_object(
            text,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=unique_keys,
        )
    except OSError as exc:
        reason = exc.strerror or exc
        raise ConfigError(
            f"model {path}: cannot be read: {reason}. To go on with a run whose file is gone, name "
            "the config.json of its newest checkpoint."
        ) from exc
    except ValueError as exc:
        raise ConfigError(f"model {path}: not valid JSON: {_shown(first_line(exc))}.") from exc
    return _checked_values(path, found)


def _checked_values(path: str, found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    model_type = found.pop("model_type", None)
    if found.get("auto_map") or found.get("trust_remote_code"):
        raise ConfigError(
            f"model {path}: it needs code of its own (auto_map), which is never run. Only models "
            "that transformers has itself can be trained."
        )
    if not isinstance(model_type, str):
        raise ConfigError(f"model {path}: it has no model_type, such as llama or gpt2.")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    if model_type not in known:
        raise ConfigError(
            f"model {path}: model_type {_shown(model_type)} is no causal language model of "
            f"transformers.{did_you_mean(model_type, known)}"
        )
    fields = _known_keys(model_type) | {UNPADDED_KEY}
    unknown = sorted(key for key in found if key not in fields and key not in IGNORED_KEYS)
    if unknown and os.environ.get("RANK", "0") == "0":
        names = ", ".join(_shown(key) for key in unknown[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        log.warning(
            "model %s: %s are not keys of %s and left out%s.", path, names, model_type, more
        )
    kept = {k: v for k, v in found.items() if k in fields and k not in IGNORED_KEYS}
    _drop_older_keys(kept)
    # A padding id's row of the embedding would never be trained, and in other data it is a word.
    kept.pop("pad_token_id", None)
    return model_type, kept


def with_older_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `config.json` with the keys by which transformers 4 knows rotary embeddings, too.

    Without them it takes a model for one with the default base and share, and says nothing.
    """
    rope = values.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return dict(values)
    is_neox = str(values.get("model_type")).startswith("gpt_neox")
    base, share = (
        ("rotary_emb_base", "rotary_pct") if is_neox else ("rope_theta", "partial_rotary_factor")
    )
    older = {base: rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        older[share] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        moved = ROPE_KEYS.values()
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in moved}
    return {**values, **older}


def _drop_older_keys(values: dict[str, Any]) -> None:
    """Remove what `with_older_keys` adds: `rope_parameters` say the same."""
    if isinstance(values.get("rope_parameters"), Mapping):
        for key in (*ROPE_KEYS, "rope_scaling"):
            values.pop(key, None)


def find_model_changes(before: Any, config: Any) -> dict[str, str] | None:
    """Return how a model differs from that of a checkpoint: key -> `old -> new`.

    What a version of transformers adds, and what the data decide, is no difference. `before` is the
    checkpoint's `config.json`; None where it cannot be understood.
    """
    if not isinstance(before, Mapping):
        return None
    after, values = config.to_dict(), dict(before)
    unpadded = values.pop(UNPADDED_KEY, None)
    model_type = values.pop("model_type", None)
    if model_type != config.model_type:
        return {"model_type": f"{_shown(str(model_type))} -> {config.model_type}"}
    fields = _known_keys(model_type)
    values = {k: v for k, v in values.items() if k in fields and k not in IGNORED_KEYS}
    _drop_older_keys(values)
    try:
        old = _build(model_type, values, "the checkpoint's model", {}).to_dict()
    except ConfigError:
        return None
    old[UNPADDED_KEY], after[UNPADDED_KEY] = unpadded, after.get(UNPADDED_KEY)
    passed = {*IGNORED_KEYS, *DATA_KEYS}
    return {
        key: f"{_shown(json.dumps(old[key], default=str))} -> "
        f"{_shown(json.dumps(after[key], default=str))}"
        for key in sorted(old.keys() & after.keys() - passed)
        if old[key] != after[key]
    }


@functools.cache
def _known_keys(model_type: str) -> frozenset[str]:
    """Return what a config of that type may say."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    keys = {key for key in config.to_dict() if not key.startswith("_")}
    keys |= set(_own_names(model_type))
    if "rope_parameters" in keys:
        keys |= {*ROPE_KEYS, "rope_scaling"}
    return frozenset(keys - {"model_type"})


@functools.cache
def _own_names(model_type: str) -> dict[str, str]:
    """Return common name -> name in the config class, where they are not the same."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    own = config.to_dict()
    others = {key: name for key, name in OTHER_NAMES.items() if name in own and key not in own}
    return {**config.attribute_map, **others}


def _named_by_class(model_type: str, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return values by the names of the config class itself."""
    names = _own_names(model_type)
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(key, key)
        if name in found and found[name] != value:
            common = next(common for common, own in names.items() if own == name)
            raise ConfigError(
                f"model {source}: {common} and {name} mean the same and have two values."
            )
        found[name] = value
    return found


def _require_known(model_type: str, overrides: Mapping[str, Any]) -> None:
    known = _known_keys(model_type)
    for key in overrides:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"model_overrides.{key} is not a key of {model_type}.{hint}")


def _build(
    model_type: str, values: dict[str, Any], name: str, overrides: Mapping[str, Any]
) -> PretrainedConfig:
    from transformers import AutoConfig

    source = "model_overrides do not fit" if overrides else "its values do not fit each other in"
    _require_sizes(model_type, values, name, overrides)
    try:
        defaults = AutoConfig.for_model(model_type)
        vocabulary = values.get("vocab_size", getattr(defaults, "vocab_size", None)) or 0
        for key in DATA_KEYS[:2]:  # those of another vocabulary mean nothing in this one
            known = values.get(key, getattr(defaults, key, None))
            if key not in overrides and isinstance(known, int) and known >= vocabulary:
                values[key] = None
        config: PretrainedConfig = AutoConfig.for_model(model_type, **values)
        config.use_cache = True
        config.dtype = None
        if getattr(config, "pad_token_id", None) is not None and "pad_token_id" not in overrides:
            with contextlib.suppress(Exception):  # of the few types that must have one
                config.pad_token_id = None
    except Exception as exc:  # strict dataclasses of transformers raise their own family
        raise ConfigError(f"{source} {name}: {_describe_misfit(exc, values)}") from exc
    for key in NEEDED:
        if not isinstance(getattr(config, key, None), int):
            raise ConfigError(
                f"model {name}: {model_type} has no {key}. Only models of text alone are trained."
            )
    heads, pairs = (
        getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value")
    )
    if isinstance(heads, int) and isinstance(pairs, int) and heads % pairs:
        raise ConfigError(
            f"model {name}: num_attention_heads {heads} is no multiple of num_key_value_heads "
            f"{pairs}."
        )
    return config


def _describe_misfit(exc: Exception, values: Mapping[str, Any]) -> str:
    """Return what transformers has against values, without the names of its checks."""
    from huggingface_hub.errors import StrictDataclassError

    found = exc.__cause__ if isinstance(exc, StrictDataclassError) and exc.__cause__ else exc
    text = " ".join(str(found.args[0] if found.args else type(found).__name__).split())
    match = _WRONG_TYPE.match(text)
    if match is None:
        return printable(text)
    types = [_TYPE_WORDS[word] for word in re.findall(r"\w+", match[2]) if word in _TYPE_WORDS]
    value = _shown(json.dumps(values.get(match[1]), default=str))
    wanted = " or ".join(dict.fromkeys(types)) or printable(match[2])
    return f"{match[1]} must be {wanted}, got {value}."


def _require_sizes(
    model_type: str, values: Mapping[str, Any], name: str, overrides: Mapping[str, Any]
) -> None:
    """Refuse sizes that no model has, before a config class counts up to one."""
    names = _own_names(model_type)
    for key in SIZES:
        own = names.get(key, key)
        size = values.get(own)
        if not isinstance(size, int) or 1 <= size <= LARGEST.get(key, LARGEST_SIZE):
            continue
        word = f"at most {LARGEST.get(key, LARGEST_SIZE)}" if size > 0 else "at least 1"
        said = next((k for k in (key, own) if k in overrides), None)
        where = f"model_overrides.{said}" if said else f"model {name}: {own}"
        raise ConfigError(f"{where} must be {word}, got {_shown(str(size))}.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _shown(text: str) -> str:
    """Return a text of a file as a terminal may see it."""
    return printable(text, _SHOWN_CHARACTERS)
