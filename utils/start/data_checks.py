"""What a run's data must be like for its model: shards, vocabulary, tokenizer, how many tokens."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.model_config import CONFIG_FILE, known_vocab_size
from configs.training_config import TrainingConfig
from utils.base.errors import AccessDeniedError, DataError, ObjectNotFoundError, StorageError
from utils.base.files import near_directory
from utils.base.text import count_of, printable, two_digits
from utils.base.uri import local_path, scheme_of
from utils.data.shard_index import (
    TOKENIZER_FILE,
    DataSource,
    build_shard_index,
    read_tokenizer_files,
)
from utils.models.tokenizer import find_misreading, load_tokenizer, write_tokenizer_files
from utils.remote.base import Base
from utils.start.checks import Check
from utils.start.facts import RunFacts
from utils.storage.open import open_bucket

PROBE_RETRY_SECONDS = 4.0
USUAL_TOKENS_PER_PARAMETER = 20
# Up to here, tokens that are seen again are worth nearly as much (Muennighoff et al. 2023).
MANY_EPOCHS = 4
LEAST_VOCABULARY_SHARE = 0.5  # of the model's that the data's is
SERIOUS_PARAMETERS = 10_000_000  # smaller models are for trying things out
EXAMPLE_BUCKET = "gs://refocused-ai"  # of configs/production.json
OWN_BUCKETS = """\
To use buckets of your own, save six lines like these as configs/mine.json, with the names of your
buckets, and run: python train.py --config mine
{
  "base": "production",
  "run_name": "mine",
  "data_uri": "gs://MY-BUCKET/data",
  "checkpoint_uri": "gs://MY-BUCKET"
}"""


def read_data(config: TrainingConfig) -> tuple[list[DataSource], list[Check]]:
    """Return the sources of a run, and a finding about each; those that failed are left out.

    Raises:
        DataError: The data are there but cannot be used, or their directory does not exist.
    """
    sources, findings = [], []
    for uri, weight in config.data_sources:
        if not uri:
            raise DataError(
                "data_uri is not set: --set data_uri=gs://bucket/prefix or a directory."
            )
        directory = local_path(uri)
        if directory is not None and not directory.is_dir():
            raise DataError(
                f"data_uri {uri} does not exist.{near_directory(directory)} To prepare text of "
                f"your own: python scripts/prepare_data.py --input TEXTS --output {uri}; for "
                "sample text, --sample in place of --input TEXTS."
            )
        try:
            bucket = open_bucket(uri, config.gcs_user_project, PROBE_RETRY_SECONDS)
            with contextlib.closing(bucket):
                index = build_shard_index(
                    bucket, config.file_limit, skip_bad_shards=config.bad_shard == "skip"
                )
        except StorageError as exc:
            findings.append(refuse_bucket("data", exc, "read", uri))
            continue
        sources.append(DataSource(uri, weight, index))
        shards, tokens = len(index.training), index.training_tokens
        text = f"{count_of(shards, 'training shard')} with {tokens:,} tokens in {bucket.uri}"
        findings.append(Check("data", "ok", text))
    return sources, findings


def require_vocabulary(
    sources: Sequence[DataSource], model_config: Any, init_from: str = ""
) -> None:
    """Raise when the data have token ids that the model does not know, or that differ in meaning.

    `init_from` is where the model comes from, whose vocabulary is as it is.

    Raises:
        DataError: The tokenizer's vocabulary is larger than the model's, or sources were made
            with different tokenizers.
    """
    for source in sources:
        vocab_size, known = source.index.vocab_size, known_vocab_size(model_config)
        if vocab_size is not None and vocab_size > known:
            advice = (
                f"Prepare the data with the tokenizer of {init_from} (--tokenizer)."
                if init_from
                else f"Set model_overrides.vocab_size={vocab_size}, or prepare the data with a "
                "smaller vocabulary."
            )
            raise DataError(
                f"The data were made with a vocabulary of {vocab_size}, the model has {known}. "
                f"{advice}"
            )
    hashes = {s.uri: s.index.tokenizer_hash for s in sources if s.index.tokenizer_hash}
    if len(set(hashes.values())) > 1:
        raise DataError(
            f"The sources were made with different tokenizers: {', '.join(hashes)}. Prepare them "
            "with the same one (--tokenizer)."
        )


def read_tokenizers(config: TrainingConfig, sources: Sequence[DataSource]) -> dict[str, bytes]:
    """Return the tokenizer that checkpoints get: the first source's, file name -> bytes.

    Raises:
        DataError: It is damaged, was replaced, or is gone.
    """
    found = []
    for source in sources:
        bucket = open_bucket(source.uri, config.gcs_user_project, PROBE_RETRY_SECONDS)
        with contextlib.closing(bucket):
            found.append(read_tokenizer_files(bucket, source.index))
    return found[0] if found else {}


def set_special_tokens(config: TrainingConfig, sources: Sequence[DataSource], model: Any) -> None:
    """Give the model config the data's end-of-text id, unless the configuration has its own.

    Where the data do not say it, there is none: a class default is an ordinary token of theirs.

    Raises:
        DataError: `mask_documents` is on and nobody knows that id.
    """
    known = next((s.index.eos_token_id for s in sources if s.index.eos_token_id is not None), None)
    for key in ("bos_token_id", "eos_token_id"):
        if key not in config.model_overrides:
            setattr(model, key, known)
    if config.mask_documents and known is None and "eos_token_id" not in config.model_overrides:
        raise DataError(
            "mask_documents needs the id between documents, and the data have no index.json that "
            "says it. Set model_overrides.eos_token_id."
        )


def check_tokenizer(files: Mapping[str, bytes], model_config: Any) -> list[Check]:
    """Say whether `AutoTokenizer` would read a new run's tokenizer differently from its file.

    For some types of model, transformers builds a tokenizer by rules of its own.
    """
    if TOKENIZER_FILE not in files:
        return []
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        config = model_config.to_json_string().encode("utf-8")
        write_tokenizer_files({**files, CONFIG_FILE: config}, Path(folder))
        try:
            text = find_misreading(Path(folder))
        except Exception as exc:  # noqa: BLE001 - tokenizers raises bare Exception for a bad file
            return [Check("tokenizer", "warn", f"It cannot be loaded: {printable(exc)}")]
    if text is None:
        return []
    return [
        Check(
            "tokenizer",
            "fail",
            f"For a model of type {model_config.model_type}, transformers reads "
            f"{printable(repr(text), 80)} in another way than the data's {TOKENIZER_FILE}: nobody "
            "who loads a checkpoint would get the ids that it was trained with. Train another type "
            "of model (llama, gpt_neox), or prepare the data with the model's own tokenizer.",
        )
    ]


def check_base(files: Mapping[str, bytes], base: Base | None) -> list[Check]:
    """Say whether the ids of the data mean to the model of `init_from` what they were made from."""
    if base is None or base.source is None:
        return []
    name = printable(base.record["name"])
    try:
        if not files:
            raise LookupError("the data have no tokenizer")
        difference = base.find_other_tokens(load_tokenizer(files))
    except Exception as exc:  # noqa: BLE001 - tokenizers raises bare Exception for a bad file
        text = f"{printable(exc)}: make sure that the data were made with the tokenizer of {name}"
        return [Check("init_from", "warn", text)]
    if difference is None:
        return [Check("init_from", "ok", f"{name}, with the tokenizer of the data")]
    return [
        Check(
            "init_from",
            "fail",
            f"The data were made with another tokenizer than {name}: {printable(difference)} (the "
            "data's first). Prepare them with the model's: prepare_data.py --tokenizer "
            f"{printable(base.source.location)}.",
        )
    ]


def check_tokens(facts: RunFacts) -> Check:
    """Compare the tokens of the run with those of the data and with the model's size."""
    wanted = facts.tokens_per_step * facts.config.max_steps
    available = sum(source.index.training_tokens for source in facts.sources)
    epochs, share = wanted / max(1, available), wanted / facts.counts.total
    text = (
        f"{wanted:,} wanted, {available:,} there: {two_digits(epochs)} epochs; "
        f"{two_digits(share)} tokens per parameter, about {USUAL_TOKENS_PER_PARAMETER} are usual "
        "(Hoffmann et al. 2022)"
    )
    needed = facts.counts.total * USUAL_TOKENS_PER_PARAMETER / 10
    if wanted < needed and facts.counts.total >= SERIOUS_PARAMETERS:
        more = "raise max_steps" if available * MANY_EPOCHS >= needed else "add text"
        return Check(
            "tokens", "warn", f"{text}. Far too few for this model: {more}, or take a smaller model"
        )
    if epochs > MANY_EPOCHS:
        text += f". Beyond {MANY_EPOCHS} epochs a model learns little; add text"
        return Check("tokens", "warn", text)
    return Check("tokens", "ok", text)


def check_validation(facts: RunFacts) -> list[Check]:
    """Say that there is nothing to evaluate on where the configuration counts on evaluations."""
    config = facts.config
    is_wanted = config.save_on_best or config.eval_steps is not None
    if not facts.sources or facts.evaluation_samples or not is_wanted:
        return []
    source, length = facts.sources[0], config.sequence_length
    tokens = sum(shard.tokens for shard in source.index.validation)
    lack = f"{tokens} validation tokens, less than one sample of {length}"
    text = (
        f"{source.uri} holds {lack if source.index.validation else 'no validation shard'}: nothing "
        "is evaluated, and no checkpoint is the best. prepare_data.py --validation-fraction makes "
        "validation shards"
    )
    if config.save_on_best:
        return [Check("validation", "fail", f"{text}; without them set save_on_best=false.")]
    return [Check("validation", "warn", text)]


def check_vocabulary(
    sources: Sequence[DataSource], model_config: Any, base: Base | None = None
) -> Check:
    """Say how the ids of the data fit the model, which `require_vocabulary` has made sure of.

    The vocabulary of a `base` is as it is.
    """
    sizes = {source.index.vocab_size for source in sources}
    known = ", ".join(f"{size:,}" for size in sorted(size for size in sizes if size is not None))
    size, padded = known_vocab_size(model_config), model_config.vocab_size
    padding = f" (padded to {padded:,})" if padded > size else ""
    text = f"{size:,} in the model{padding}, {known or 'an unknown number'} in the data"
    if None in sizes:
        text += "; each id is checked when it is read"
    largest = max((size for size in sizes if size is not None), default=0)
    if None in sizes or base is not None or largest >= size * LEAST_VOCABULARY_SHARE:
        return Check("vocabulary", "ok", text)
    return Check(
        "vocabulary",
        "warn",
        f"{text}. The other ids never come: model_overrides.vocab_size={largest} makes the model "
        "smaller and faster",
    )


def refuse_bucket(name: str, exc: StorageError, action: str, uri: str) -> Check:
    """Return the failed check of a bucket that cannot be used."""
    is_foreign = uri.startswith(EXAMPLE_BUCKET)
    if isinstance(exc, AccessDeniedError):
        advice = f"Ask for the right to {action} {uri}, or run: gcloud auth login."
    elif isinstance(exc, ObjectNotFoundError):
        advice = f"Check the name of the {'bucket' if scheme_of(uri) else 'directory'}."
    else:
        advice, is_foreign = "Check the network and the name of the bucket.", False
    return Check(name, "fail", f"{exc} {advice}", OWN_BUCKETS if is_foreign else "")
