"""Preflight: can this machine do this run with these buckets? All reasons at once, in seconds.

    check_start -> directory and bucket are held -> resume.decide_start -> restore

Each check returns findings instead of raising, so that one problem does not hide the next; each
finding says what to do. Checks that wait for a network have short limits.

`check_start` comes first and reads all that can refuse a run; another trainer may still work there.
Where the run begins is decided once directory and bucket are held (`utils/start/hold.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.model_config import CONFIG_FILE, find_dropouts, known_vocab_size
from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.console import print_wrapped
from utils.base.errors import (
    AccessDeniedError,
    DataError,
    ExitCode,
    ObjectNotFoundError,
    StorageError,
)
from utils.base.files import near_directory
from utils.base.text import count_of, format_bytes, printable, to_json_text
from utils.base.uri import local_path, scheme_of
from utils.checkpoints.layout import REMOTE_FOLDER, RunIdentity, RunPaths, new_run_id
from utils.data.shard_index import (
    TOKENIZER_FILE,
    DataSource,
    build_shard_index,
    read_tokenizer_files,
)
from utils.models.tokenizer import find_misreading, load_tokenizer, write_tokenizer_files
from utils.remote.base import Base
from utils.start.checks import Check, print_checks, require_all
from utils.start.facts import RunFacts
from utils.start.forecast import check_times, is_long_run
from utils.start.machine_checks import (
    check_cache,
    check_disk,
    check_folders,
    check_memory,
    check_snapshot,
    estimate_memory,
    find_free_memory,
)
from utils.start.restore import require_same_training
from utils.start.resume import Plan, finished_length, look_for_start, require_startable
from utils.start.step_probe import StepProbe, measure_step
from utils.storage.open import open_bucket
from utils.training.sharding import resolve_sharding
from utils.training_utils import device_name
from utils.uploads.transports import TransportOptions, probe_transport, tool_words

PROBE_RETRY_SECONDS = 4.0
USUAL_TOKENS_PER_PARAMETER = 20
# Up to here, tokens that are seen again are worth nearly as much (Muennighoff et al. 2023).
MANY_EPOCHS = 4
LEAST_VOCABULARY_SHARE = 0.5  # of the model's that the data's is
SERIOUS_PARAMETERS = 10_000_000  # smaller models are for trying things out
LOGGED_CHECKS = ("memory", "run", "uploading", "cost")
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

log = logging.getLogger(__name__)


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
            findings.append(_refusal("data", exc, "read", uri))
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


def check_upload(
    config: TrainingConfig, scratch: Path
) -> tuple[TransportOptions | None, list[Check]]:
    """Return the transport that can write, read and delete a small object, and what was found.

    `scratch` is a directory for a local archive, where the transport needs one.
    """
    if not config.checkpoint_uri:
        return None, [Check("upload", "warn", "checkpoint_uri is empty: nothing is uploaded")]
    wanted = TransportOptions.of(config, scratch)
    try:
        found, warning = probe_transport(wanted, REMOTE_FOLDER, PROBE_RETRY_SECONDS)
    except StorageError as exc:
        return None, [_refusal("upload", exc, "write", wanted.uri)]
    return found, [
        Check("upload", "ok", f"{wanted.uri} can be written to{tool_words(found.name)}"),
        *([Check("upload", "warn", warning)] if warning else []),
    ]


def _refusal(name: str, exc: StorageError, action: str, uri: str) -> Check:
    """Return the failed check of a bucket that cannot be used."""
    is_foreign = uri.startswith(EXAMPLE_BUCKET)
    if isinstance(exc, AccessDeniedError):
        advice = f"Ask for the right to {action} {uri}, or run: gcloud auth login."
    elif isinstance(exc, ObjectNotFoundError):
        advice = f"Check the name of the {'bucket' if scheme_of(uri) else 'directory'}."
    else:
        advice, is_foreign = "Check the network and the name of the bucket.", False
    return Check(name, "fail", f"{exc} {advice}", OWN_BUCKETS if is_foreign else "")


@dataclass(frozen=True)
class StartChecks:
    """What is known before a run begins, while another trainer may still work there.

    `run_id`, `config` and `step` are those it would begin with now. `checks` hold at whichever step
    it begins. `transport` is the way to the bucket that works, `probe` a small step if one was
    measured.
    """

    run_id: str
    config: TrainingConfig
    step: int
    sources: list[DataSource]
    checks: list[Check]
    transport: TransportOptions | None
    probe: StepProbe | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the run cannot begin here."""
        return any(check.status == "fail" for check in self.checks)


def check_start(facts: RunFacts, args: argparse.Namespace, *, should_measure: bool) -> StartChecks:
    """Return what is known before a run begins; nothing is decided by it but a refusal.

    Step and sources of `facts` are found here. `args` says what to go on from, or `fresh`, and
    whether `accept_config_change`. `should_measure` measures a small step and a short upload, as
    before a long run in any case.

    Raises:
        UsageError: There is no such checkpoint to resume from.
        ConfigError: Another configuration trained it.
        DataError: The data are there but do not fit the model or cannot be used.
    """
    config, model_config = facts.config, facts.model_config
    paths = RunPaths.of(config)
    plan, owning = facts.look or _look_for_start(config, args.resume, fresh=args.fresh)
    # Data first: they are refused before anything is written to the other bucket.
    sources, data = read_data(config)
    require_vocabulary(sources, model_config, config.init_from)
    tokenizer = read_tokenizers(config, sources)
    set_special_tokens(config, sources, model_config)
    facts = facts.with_data(plan.step, sources)
    config = replace(facts.config, max_steps=finished_length(plan, facts.config.max_steps))
    facts = replace(facts, config=config)
    require_same_training(plan, facts, is_accepted=args.accept_config_change)
    transport, uploading = check_upload(config, paths.checkpoints)
    memory, unmeasured, probe = _measure(facts, should_measure=should_measure)
    checks = [
        *data,
        *(
            [check_tokens(facts), check_vocabulary(sources, model_config, facts.base)]
            if sources
            else []
        ),
        *check_validation(facts),
        *([] if plan.step else check_tokenizer(tokenizer, model_config)),
        *(check_base(tokenizer, facts.base) if sources else []),
        memory,
        check_snapshot(facts),
        check_disk(facts, transport),
        *check_folders(config),
        *([check_cache(config, sources, facts.vocab_size)] if sources else []),
        *uploading,
        *owning,
        *unmeasured,
    ]
    run_id = plan.identity.run_id
    return StartChecks(run_id, config, plan.step, sources, checks, transport, probe)


def _look_for_start(
    config: TrainingConfig, resume: str | None, *, fresh: bool
) -> tuple[Plan, list[Check]]:
    """Return where the run would begin now, and what forbids it in the bucket."""
    try:
        return look_for_start(config, resume, fresh=fresh)
    except StorageError as exc:
        text = f"The bucket's checkpoints cannot be read: {exc}"
        return Plan(RunIdentity(new_run_id())), [Check("resume", "fail", text)]


def _measure(
    facts: RunFacts, *, should_measure: bool
) -> tuple[Check, list[Check], StepProbe | None]:
    """Return the memory's check, why no step was measured, and the step that was."""
    need = estimate_memory(facts)
    memory = check_memory(facts.config, need, facts.device)
    if memory.status == "fail":
        text = "not measured: it does not fit into the memory"
        return memory, [Check("step", "warn", text)], None
    if facts.step >= facts.config.max_steps or not (should_measure or is_long_run(facts)):
        return memory, [], None
    log.info("Measuring a small step.")
    probe = measure_step(facts, find_free_memory(facts.device)[0])
    if probe is None:
        text = "unknown: not even a small step fits into the memory, so none was measured"
        return memory, [Check("step", "warn", text)], None
    memory = check_memory(facts.config, need, facts.device, probe.memory_ratio)
    return memory, [], probe


def complete_checks(facts: RunFacts, found: StartChecks) -> list[Check]:
    """Return what was found, and what it means from the step on where the run begins.

    Every rank calls this.
    """

    def complete() -> list[Check]:
        times = []
        if found.probe is not None and facts.step < facts.config.max_steps:
            times = check_times(facts, found.probe, found.transport)
        return [check_settings(facts), *found.checks, *times]

    return ranks.compute_on_main(complete)


def check_settings(facts: RunFacts) -> Check:
    """Say what the steps are, and whether the learning rate has the time to rise."""
    config = facts.config
    text = (
        f"valid; {describe_steps(facts)}, {facts.tokens_per_step:,} tokens a step, a checkpoint "
        f"every {config.save_steps}"
    )
    settings, length = config.lr_scheduler_kwargs, config.max_steps
    stable = settings.get("num_stable_steps")
    parts = config.warmup_steps + (stable or 0) + settings.get("num_decay_steps", 0)
    if config.warmup_steps >= length:
        problem = (
            "The learning rate is still rising when the run ends: warmup_steps is "
            f"{config.warmup_steps}, max_steps {length}"
        )
    elif parts > length or (stable and parts < length):
        problem = (
            "The learning rate cannot follow its schedule: warm-up, stable part and decay are "
            f"{parts} steps, max_steps is {length}"
        )
    else:
        return Check("settings", "ok", text)
    return Check("settings", "warn", f"{text}. {problem}")


def describe_steps(facts: RunFacts) -> str:
    """Say which steps a run would do."""
    length = facts.config.max_steps
    if facts.step >= length:
        return f"done already: step {facts.step} of {length}"
    return f"steps {facts.step} to {length}"


def check_tokens(facts: RunFacts) -> Check:
    """Compare the tokens of the run with those of the data and with the model's size."""
    wanted = facts.tokens_per_step * facts.config.max_steps
    available = sum(source.index.training_tokens for source in facts.sources)
    epochs, share = wanted / max(1, available), wanted / facts.counts.total
    text = (
        f"{wanted:,} wanted, {available:,} there: {_ratio(epochs)} epochs; {_ratio(share)} tokens "
        f"per parameter, about {USUAL_TOKENS_PER_PARAMETER} are usual (Hoffmann et al. 2022)"
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


def _ratio(value: float) -> str:
    """Return two digits of a ratio: 0.0021, 1.6, 2,700."""
    return f"{float(f'{value:.2g}'):,g}"


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


def describe_run(run: RunFacts) -> dict[str, str]:
    """Return what a run says of itself before it begins."""
    config, counts, world_size = run.config, run.counts, run.world_size
    ranks_text = count_of(world_size, "rank")
    tokens = run.tokens_per_step
    total = tokens * config.max_steps
    facts = {
        "device": f"{device_name(run.device)}, {run.precision} mixed precision, {ranks_text}",
        "model": f"{config.model or config.init_from}: {counts.total:,} parameters, "
        f"{counts.without_embedding:,} without embeddings",
        "step": f"{tokens:,} tokens: {config.per_device_train_batch_size} x "
        f"{config.sequence_length} tokens x {run.accumulation} accumulated x {ranks_text}",
        "run": f"{describe_steps(run)}, {total:,} tokens in all, "
        f"{_ratio(total / counts.total)} tokens per parameter",
        "checkpoint": f"about {format_bytes(run.checkpoint_bytes)}, "
        f"every {config.save_steps} steps",
    }
    dropouts = find_dropouts(run.model_config)
    if dropouts:
        shares = ", ".join(f"{key} {share:g}" for key, share in dropouts.items())
        facts["dropout"] = f"{shares}; pre-training is usually done with 0"
    how = resolve_sharding(config, world_size)
    if how is not None:
        layers = "gathered twice a step" if how.reshard_after_forward else "kept to the backward"
        kind, detail = "FSDP2", f"layers are {layers}"
        if how.zero_stage:
            kind, detail = f"DeepSpeed ZeRO-{how.zero_stage}", "each rank has whole weights"
        facts["sharding"] = f"{kind} over {ranks_text} ({how.source}), {detail}"
    if run.sources:
        available = sum(source.index.training_tokens for source in run.sources)
        facts["data"] = f"{available:,} tokens, {_ratio(total / max(1, available))} epochs"
        entropy = run.sources[0].index.unigram_entropy
        if entropy is not None:
            facts["entropy"] = (
                f"{entropy:.2f} nats: a model that knows only token frequencies has this loss"
            )
    return facts


def log_start(facts: RunFacts, found: StartChecks) -> None:
    """Say what is about to begin, one log line a fact; every rank calls this."""
    for key, text in describe_run(facts).items():
        log.info("%-10s %s", key, text)
    for check in complete_checks(facts, found):
        if check.status == "warn":
            log.warning("%s: %s", check.name, check.message)
        elif check.name in LOGGED_CHECKS:
            log.info("%-10s %s", check.name, check.message)


def report(facts: RunFacts, found: StartChecks, args: argparse.Namespace) -> int:
    """Print checks and facts of a dry run, as JSON the configuration too; return 0.

    Every rank calls this.

    Raises:
        UsageError: There are checkpoints and neither --resume nor --fresh.
        PreflightError: A check failed; the message holds all reasons.
    """
    checks = complete_checks(facts, found)
    described = describe_run(facts)
    if args.json and ranks.is_main_rank():
        shown = [{"name": c.name, "status": c.status, "message": c.message} for c in checks]
        values = {"config": facts.config.to_json(), "run": described, "checks": shown}
        print(to_json_text(values))
    elif args.dry_run and ranks.is_main_rank():
        print_checks(checks)
        for key, text in described.items():
            print_wrapped(f"{key:<10} {text}", hanging=11)
    require_startable(facts.config, resume=args.resume, fresh=args.fresh)
    require_all(checks)
    return ExitCode.DONE
