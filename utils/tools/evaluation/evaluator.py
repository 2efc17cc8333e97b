"""What is measured of a trained model, and on which data.

    plan, loaded model -> text (perplexity.py), tasks (harness.py) -> evaluations

Data are opened once for all models that are measured on them. A model's own run says which data it
was validated on, unless the plan says it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.training_config import TrainingConfig
from utils.base.errors import CheckpointError, ConfigError, DataError, UsageError
from utils.base.files import near_directory
from utils.base.progress import OnProgress
from utils.base.text import printable
from utils.base.uri import local_path
from utils.checkpoints.layout import RunPaths
from utils.checkpoints.run_record import read_checkpoint_values
from utils.data.shard_cache import ShardCache
from utils.data.shard_index import (
    ShardFacts,
    ShardIndex,
    build_shard_index,
    fingerprint_shards,
    read_tokenizer_files,
)
from utils.data.token_stream import TokenStream, covering_windows, training_windows
from utils.models.tokenizer import load_tokenizer
from utils.remote.loading import LoadedModel, ModelSource
from utils.storage.bucket import Bucket
from utils.storage.open import open_bucket
from utils.tools.evaluation.harness import run_harness, task_of
from utils.tools.evaluation.log import Evaluation, weights_id
from utils.tools.evaluation.questions import Questions
from utils.tools.evaluation.token_bytes import ByteCounter

LONGEST_WINDOW = 2048
FORWARD_TOKENS = {"cpu": 8192}
MAX_FORWARD_TOKENS = 32768
# The harness holds the logits of all tokens of a batch.
HARNESS_ANSWERS = 8
MEASURED_SPLITS = ("validation", "training")

log = logging.getLogger(__name__)

Measure = Callable[[LoadedModel, OnProgress], list[Evaluation]]


@dataclass(frozen=True)
class TextPlan:
    """How text is measured.

    Attributes:
        data_uri: Shards; None for those of the model's run.
        split: One of `MEASURED_SPLITS`.
        sequence_length: Tokens that the model sees at once; None for those of its run.
        stride: As `covering_windows` takes it.
        max_tokens: Only so many, the first; None for all.
        mask_documents: Whether attention stays within documents, as in the model's run.
        is_like_training: The samples of the evaluations during training.
        max_samples: Of these only so many, as its run; None for all.
    """

    data_uri: str | None = None
    split: str = MEASURED_SPLITS[0]
    sequence_length: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    mask_documents: bool = False
    is_like_training: bool = False
    max_samples: int | None = None


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured.

    Attributes:
        text: None leaves loss and perplexity out.
        questions: By task; None for those on the Hub.
        tasks: Names of tasks of lm-evaluation-harness.
        tasks_path: A directory with more of its tasks.
        limit: Questions of each task, None for all.
        batch_size: Samples or continuations in one forward; None for as many as are quick.
    """

    text: TextPlan | None = None
    questions: Mapping[str, Questions | None] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    tasks_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = None


class Evaluator:
    """Measures models, one after the other.

    The run's configuration says where the cache is, and the data where no model says it.
    """

    def __init__(self, plan: EvaluationPlan, config: TrainingConfig) -> None:
        self._plan, self._config = plan, config
        self._opened: dict[str, tuple[Bucket, ShardIndex]] = {}
        self._pieces: dict[str, dict[int, str]] = {}

    def measures(self) -> list[tuple[str, Measure]]:
        """Return (name, function) of each measure; each can fail without the others."""
        found: list[tuple[str, Measure]] = []
        if self._plan.text is not None:
            found.append((self._plan.text.split, self._measure_text))
        found += [(task, self._measurer(task, one)) for task, one in self._plan.questions.items()]
        if self._plan.tasks:
            found.append(("lm_eval", self._measure_harness))
        return found

    def close(self) -> None:
        """Close what was opened."""
        for bucket, _ in self._opened.values():
            bucket.close()
        self._opened.clear()

    # Text

    def _measure_text(self, loaded: LoadedModel, on_progress: OnProgress) -> list[Evaluation]:
        from utils.tools.evaluation.perplexity import score_text  # loads torch

        plan = complete_plan(self._plan.text or TextPlan(), loaded.source, self._config)
        length = choose_length(plan, loaded.context)
        uri, shards = self._find_shards(plan)
        self._require_same_tokens(uri, loaded)
        at_once = FORWARD_TOKENS.get(loaded.device.type, MAX_FORWARD_TOKENS)
        with self._open_cache(uri, shards, loaded) as cache:
            stream = TokenStream(cache, shards, plan.max_tokens)
            if plan.is_like_training:
                chosen = [*training_windows(stream.num_tokens, length, plan.max_samples)]
                windows, total = iter(chosen), sum(window.targets for window in chosen)
            else:
                windows = covering_windows(stream.num_tokens, length, plan.stride)
                total = stream.num_tokens - 1
            values = score_text(
                loaded.model,
                stream,
                windows,
                batch_size=self._plan.batch_size or max(1, at_once // length),
                document_end=_document_end(loaded) if plan.mask_documents else None,
                counter=None if loaded.tokenizer is None else ByteCounter(loaded.tokenizer),
                on_progress=lambda done: on_progress(loaded.source.name, done, total),
            )
            if values is None:
                raise DataError(f"{uri} has too few {plan.split} tokens ({stream.num_tokens}).")
        what = {
            "data": fingerprint_shards(shards)[:16],
            "samples": "training" if plan.is_like_training else "covering",
            "sequence_length": length,
            "stride": plan.stride or length,
            "max_tokens": plan.max_tokens,
            "spread_samples": plan.max_samples if plan.is_like_training else None,
            "mask_documents": plan.mask_documents,
        }
        return [self._evaluation(loaded, plan.split, values, what, data_uri=uri)]

    def _find_shards(self, plan: TextPlan) -> tuple[str, Sequence[ShardFacts]]:
        uri = plan.data_uri
        if not uri:
            raise UsageError("It is not known what the model was trained on: name data, --data.")
        _, index = self._open(uri)
        if not (index.validation or index.training):
            raise DataError(f"{uri} holds no shards (*.npz).")
        if plan.split == MEASURED_SPLITS[0]:
            shards, other = index.validation, MEASURED_SPLITS[1]
            make = " prepare_data.py --validation-fraction makes some."
        else:
            shards, other, make = index.training, MEASURED_SPLITS[0], ""
        if not shards:
            raise DataError(
                f"{uri} holds no {plan.split} shards; --split {other} takes the others.{make}"
            )
        return uri, shards

    def _require_same_tokens(self, uri: str, loaded: LoadedModel) -> None:
        """Refuse shards of another tokenizer than the model's: their ids mean other texts.

        Raises:
            UsageError: They are.
        """
        pieces = self._find_pieces(uri)
        if loaded.tokenizer is None or not pieces:
            return
        own = {token: piece for piece, token in loaded.tokenizer.get_vocab().items()}
        other = next((token for token in own.keys() & pieces if own[token] != pieces[token]), None)
        if other is not None:
            raise UsageError(
                f"{uri} was made with another tokenizer than {loaded.source.name}: token {other} "
                f"is {printable(repr(pieces[other]), 40)} there, and "
                f"{printable(repr(own[other]), 40)} to the model. Prepare the text with the "
                "model's tokenizer."
            )

    def _find_pieces(self, uri: str) -> dict[int, str]:
        """Return the pieces of the tokenizer that shards bring along; empty where there is none."""
        if uri not in self._pieces:
            bucket, index = self._open(uri)
            files = read_tokenizer_files(bucket, index)
            try:
                vocabulary = load_tokenizer(files).get_vocab() if files else {}
            except Exception as exc:  # noqa: BLE001 - tokenizers raises bare Exception
                log.warning("The tokenizer of %s cannot be read: %s", uri, printable(exc))
                vocabulary = {}
            self._pieces[uri] = {token: piece for piece, token in vocabulary.items()}
        return self._pieces[uri]

    def _open(self, uri: str) -> tuple[Bucket, ShardIndex]:
        if uri not in self._opened:
            directory = local_path(uri)
            if directory is not None and not directory.is_dir():
                raise DataError(f"{uri} does not exist.{near_directory(directory)}")
            bucket = open_bucket(uri, self._config.gcs_user_project)
            try:
                index = build_shard_index(bucket, is_trained=False)
            except BaseException:
                bucket.close()
                raise
            self._opened[uri] = bucket, index
        return self._opened[uri]

    def _open_cache(
        self, uri: str, shards: Sequence[ShardFacts], loaded: LoadedModel
    ) -> contextlib.closing[ShardCache]:
        bucket, _ = self._open(uri)
        directory, limit = RunPaths.of(self._config).cache, self._config.cache_limit_bytes
        return contextlib.closing(
            ShardCache([(bucket, shards)], directory, loaded.vocab_size, limit)
        )

    # Tasks

    def _measurer(self, task: str, questions: Questions | None) -> Measure:
        def measure(loaded: LoadedModel, on_progress: OnProgress) -> list[Evaluation]:
            ((_, values, what),) = run_harness(
                loaded,
                [task_of(task, questions)],
                limit=self._plan.limit,
                batch_size=self._plan.batch_size or HARNESS_ANSWERS,
                softmax_dtype="float32",
            )
            if questions is None:
                return [self._evaluation(loaded, task, values, what)]
            what = {"data": questions.fingerprint, **what}
            return [self._evaluation(loaded, task, values, what, questions.source)]

        return measure

    def _measure_harness(self, loaded: LoadedModel, on_progress: OnProgress) -> list[Evaluation]:
        plan = self._plan
        results = run_harness(
            loaded,
            plan.tasks,
            tasks_path=plan.tasks_path,
            num_fewshot=plan.num_fewshot,
            limit=plan.limit,
            batch_size=plan.batch_size or HARNESS_ANSWERS,
        )
        return [self._evaluation(loaded, *result) for result in results]

    def _evaluation(
        self,
        loaded: LoadedModel,
        task: str,
        values: Mapping[str, float | None],
        what: Mapping[str, Any],
        data_uri: str | None = None,
    ) -> Evaluation:
        import torch
        import transformers

        source, manifest = loaded.source, loaded.source.manifest
        how = {
            "data": data_uri,
            "device": str(loaded.device),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "attention": getattr(loaded.model.config, "_attn_implementation", None),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        found = Evaluation(source.name, task, values, what, how, source.step)
        if manifest is None:
            return found
        if source.averaged:  # weights that no manifest vouches for
            return replace(found, how={**how, "averaged": [path.name for path in source.averaged]})
        return replace(found, run_id=manifest.run_id, weights=weights_id(manifest))


def complete_plan(plan: TextPlan, source: ModelSource, config: TrainingConfig) -> TextPlan:
    """Return a plan with what it leaves open as in the model's own run.

    A checkpoint has its run's configuration; `config` says where the data of other models are.
    """
    values: Mapping[str, Any] = {}
    if source.manifest is not None and source.directory is not None:
        with contextlib.suppress(CheckpointError, ConfigError):
            values = read_checkpoint_values(source.directory).values
    uri = values.get("data_uri")
    if isinstance(uri, list) and uri and isinstance(uri[0], dict):
        uri = uri[0].get("uri")  # of a mixture the first source, which has the validation shards
    length, samples = values.get("sequence_length"), values.get("max_eval_samples")
    return replace(
        plan,
        data_uri=plan.data_uri
        or (uri if isinstance(uri, str) and uri else config.data_sources[0][0]),
        sequence_length=plan.sequence_length
        or (length if isinstance(length, int) and length > 1 else None),
        mask_documents=values.get("mask_documents") is True,
        max_samples=samples if isinstance(samples, int) and samples > 0 else None,
    )


def choose_length(plan: TextPlan, context: int | None) -> int:
    """Return how many tokens the model sees at once.

    Raises:
        UsageError: More than it can see, or a stride that leaves tokens out.
    """
    length = plan.sequence_length or min(context or LONGEST_WINDOW, LONGEST_WINDOW)
    if context is not None and length > context:
        raise UsageError(f"--sequence-length {length}: the model sees {context} tokens at once.")
    if plan.stride is not None and plan.stride > length:
        raise UsageError(f"--stride {plan.stride} would leave tokens out: {length} is the most.")
    return length


def _document_end(loaded: LoadedModel) -> int:
    """Return the end-of-text id that training used.

    Raises:
        UsageError: The model's config has none.
    """
    end = getattr(loaded.model.config, "eos_token_id", None)
    if not isinstance(end, int):
        raise UsageError(
            "Documents were masked in training, and the model's config has no single end-of-text "
            "token."
        )
    return end
