"""Preflight: can this machine do this run with these buckets? All reasons at once, in seconds.

Each check returns findings instead of raising, so that one problem does not hide the next; each
finding says what to do. Checks that wait for a network have short limits.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from configs.training_config import TrainingConfig
from utils.console import format_bytes
from utils.errors import (
    AccessDeniedError,
    DataError,
    ExitCode,
    ObjectNotFoundError,
    PreflightError,
    StorageError,
)
from utils.estimates import estimate_checkpoint_bytes, estimate_training_memory
from utils.layout import REMOTE_FOLDER, RunIdentity, RunPaths, new_run_id
from utils.machine import available_memory
from utils.metadata import read_remote_checkpoints
from utils.resume import READ_CARDS, Plan, plan_start
from utils.shard_index import DataSource, build_shard_index
from utils.storage import is_gcs_uri, join_uri, open_bucket
from utils.training_utils import ParameterCounts
from utils.transports import TransportOptions, probe_transport

PROBE_RETRY_SECONDS = 4.0
MEMORY_RESERVE = 0.95

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was checked.
        status: ok, warn or fail.
        message: What was found, and what to do where it is not ok.
    """

    check: str
    status: str
    message: str


def read_data(config: TrainingConfig) -> tuple[list[DataSource], list[Finding]]:
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
        if not is_gcs_uri(uri) and not Path(uri).is_dir():
            raise DataError(
                f"data_uri {uri} does not exist. For sample data run: "
                f"python scripts/prepare_data.py --sample --output {uri}"
            )
        try:
            bucket = open_bucket(uri, config.gcs_user_project or None, PROBE_RETRY_SECONDS)
            index = build_shard_index(
                bucket, config.file_limit, skip_bad_shards=config.bad_shard == "skip"
            )
        except StorageError as exc:
            findings.append(Finding("data", "fail", _advise(exc, "read", uri)))
            continue
        sources.append(DataSource(uri, weight, index))
        shards, tokens = len(index.training), index.training_tokens
        text = f"{shards} training shards with {tokens:,} tokens in {bucket.uri}"
        findings.append(Finding("data", "ok", text))
        bucket.close()
    return sources, findings


def require_vocabulary(sources: Sequence[DataSource], model_config: Any) -> None:
    """Raise when the data have token ids that the model does not know, or that differ in meaning.

    Raises:
        DataError: The tokenizer's vocabulary is larger than the model's, or sources were made
            with different tokenizers.
    """
    for source in sources:
        vocab_size = source.index.vocab_size
        if vocab_size is not None and vocab_size > model_config.vocab_size:
            raise DataError(
                f"The data were made with a vocabulary of {vocab_size}, the model has "
                f"{model_config.vocab_size}. Set model_overrides.vocab_size={vocab_size}, or "
                "prepare the data with a smaller vocabulary."
            )
    hashes = {s.uri: s.index.tokenizer_hash for s in sources if s.index.tokenizer_hash}
    if len(set(hashes.values())) > 1:
        raise DataError(
            f"The sources were made with different tokenizers: {', '.join(hashes)}. Prepare them "
            "with the same one (--tokenizer)."
        )


def set_special_tokens(config: TrainingConfig, sources: Sequence[DataSource], model: Any) -> None:
    """Give the model config the data's end-of-text id, unless the configuration has its own.

    Raises:
        DataError: `mask_documents` is on and nobody knows that id.
    """
    known = next((s.index.eos_token_id for s in sources if s.index.eos_token_id is not None), None)
    for key in ("bos_token_id", "eos_token_id"):
        if known is not None and key not in config.model_overrides:
            setattr(model, key, known)
    if config.mask_documents and known is None and "eos_token_id" not in config.model_overrides:
        raise DataError(
            "mask_documents needs the id between documents, and the data have no index.json that "
            "says it. Set model_overrides.eos_token_id."
        )


def check_memory(
    config: TrainingConfig, model_config: Any, counts: ParameterCounts, precision: str
) -> Finding:
    """Compare the estimated memory of training with what the device has."""
    need = estimate_training_memory(
        num_parameters=counts.total,
        model_config=model_config,
        micro_batch=config.per_device_train_batch_size,
        sequence_length=config.sequence_length,
        precision=precision,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    if torch.cuda.is_available() and not config.use_cpu:
        available, where = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    else:
        available, where = psutil.virtual_memory().available, "the CPU's memory (no GPU found)"
    text = (
        f"about {format_bytes(need.total)} needed ({format_bytes(need.state)} model and optimizer, "
        f"{format_bytes(need.activations)} activations), {format_bytes(available)} free in {where}"
    )
    if need.total <= available * MEMORY_RESERVE:
        return Finding("memory", "ok", text)
    advice = "Use a GPU with more memory"
    if need.state < available * MEMORY_RESERVE:
        advice += (
            ", lower per_device_train_batch_size, or set gradient_checkpointing=true "
            "(keep the step's size with global_batch_size)"
        )
    else:
        advice += ", or a smaller model (--set model=..., model_overrides.num_hidden_layers=...)"
    return Finding("memory", "fail", f"{text}. {advice}.")


def check_snapshot(config: TrainingConfig, counts: ParameterCounts) -> Finding:
    """Compare the host memory that a snapshot of the state takes with what is free."""
    need, free = estimate_checkpoint_bytes(counts.total), available_memory()
    text = f"{format_bytes(need)} of host memory for saves in the background, {format_bytes(free)}"
    if not config.background_save:
        return Finding("saving", "ok", "in the foreground: training waits for each checkpoint")
    if need <= free * MEMORY_RESERVE:
        return Finding("saving", "ok", f"{text} free")
    return Finding(
        "saving", "warn", f"{text} free: they go through a file in output_dir, which is slower"
    )


def check_disk(
    config: TrainingConfig, counts: ParameterCounts, transport: TransportOptions | None = None
) -> Finding:
    """Compare the space that checkpoints take with what is free.

    Args:
        config: The run's configuration.
        counts: Its model's parameters.
        transport: The way to the bucket; gsutil's needs room for an archive.
    """
    one = estimate_checkpoint_bytes(counts.total)
    has_archive = transport is not None and transport.name == "gsutil"
    copies = config.keep_checkpoints + 2 + has_archive  # the best, and one being written
    folder = RunPaths.of(config).checkpoints.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("disk", "fail", f"{folder} cannot be written. Set output_dir elsewhere.")
    free = shutil.disk_usage(folder).free
    text = f"{copies} x {format_bytes(one)} for checkpoints, {format_bytes(free)} free in {folder}"
    waiting = config.max_unverified if transport is not None else 0
    if free >= (copies + waiting) * one:
        return Finding("disk", "ok", text)
    if free >= copies * one:
        text += f"; {waiting} more have no room while the bucket cannot be reached"
        return Finding("disk", "warn", text)
    return Finding(
        "disk", "fail", f"{text}. Free some, lower keep_checkpoints, or set output_dir elsewhere."
    )


def check_upload(
    config: TrainingConfig, run_id: str | None, scratch: Path
) -> tuple[TransportOptions | None, list[Finding]]:
    """Return the transport that can write, read and delete a small object, and what was found.

    Args:
        config: The run's configuration.
        run_id: The run that goes on, None for a new one.
        scratch: Directory for a local archive, where the transport needs one.
    """
    if not config.checkpoint_uri:
        return None, [Finding("upload", "warn", "checkpoint_uri is empty: nothing is uploaded")]
    wanted = TransportOptions.of(config, scratch)
    try:
        probe = probe_transport(wanted, REMOTE_FOLDER, PROBE_RETRY_SECONDS)
    except StorageError as exc:
        return None, [Finding("upload", "fail", _advise(exc, "write", wanted.uri))]
    return probe.options, [
        Finding("upload", "ok", f"{wanted.uri} can be written by {probe.options.name}"),
        *(Finding("upload", "warn", warning) for warning in probe.warnings),
        *_check_owner(config, wanted.uri, run_id),
    ]


def _check_owner(config: TrainingConfig, uri: str, run_id: str | None) -> list[Finding]:
    bucket = open_bucket(uri, config.gcs_user_project or None, PROBE_RETRY_SECONDS)
    try:
        remote = read_remote_checkpoints(bucket, newest=READ_CARDS)
    except StorageError as exc:
        log.debug("The bucket's checkpoints cannot be listed: %s", exc)
        return []
    finally:
        bucket.close()
    owners = {view.manifest.run_id for view in remote if view.manifest} - {run_id}
    if not owners:
        return []
    return [
        Finding(
            "upload",
            "fail",
            f"{uri}/{REMOTE_FOLDER} holds checkpoints of another run ({', '.join(sorted(owners))})"
            ", which are never overwritten. Give this run a name of its own: "
            "--set run_name=NAME.",
        )
    ]


def _advise(exc: StorageError, action: str, uri: str) -> str:
    if isinstance(exc, AccessDeniedError):
        return f"{exc} Ask for the right to {action} {uri}, or run: gcloud auth login."
    if isinstance(exc, ObjectNotFoundError):
        return f"{exc} Check the name of the bucket."
    return f"{exc} Check the network and the name of the bucket."


def plan_run(config: TrainingConfig, paths: RunPaths, resume: str | None, *, fresh: bool) -> Plan:
    """Return where a run may begin, from its directory and its bucket; reads only.

    Raises:
        UsageError: There is no such checkpoint to resume from.
        StorageError: The bucket is needed and cannot be read.
    """
    return plan_start(
        paths,
        resume=resume,
        fresh=fresh,
        bucket_uri=config.checkpoint_uri and join_uri(config.checkpoint_uri, config.run_name),
        open_bucket=lambda uri: open_bucket(
            uri, config.gcs_user_project or None, PROBE_RETRY_SECONDS
        ),
    )


@dataclass(frozen=True)
class StartChecks:
    """What is known before a start.

    Attributes:
        plan: Where to begin.
        sources: The sources of data that can be read.
        findings: What was found, good and bad.
        transport: The way to the bucket that works; None for none.
    """

    plan: Plan
    sources: list[DataSource]
    findings: list[Finding]
    transport: TransportOptions | None


def check_start(
    config: TrainingConfig,
    paths: RunPaths,
    model_config: Any,
    counts: ParameterCounts,
    precision: str,
    resume: str | None,
    *,
    fresh: bool,
) -> StartChecks:
    """Return what is known before a start.

    Raises:
        UsageError: There is no such checkpoint to resume from.
        DataError: The data are there but do not fit the model or cannot be used.
    """
    resuming: list[Finding] = []
    try:
        plan = plan_run(config, paths, resume, fresh=fresh)
    except StorageError as exc:
        plan = Plan(RunIdentity(new_run_id()))
        resuming = [Finding("resume", "fail", f"The bucket's checkpoints cannot be read: {exc}")]
    run_id = plan.identity.run_id if plan.candidates else None
    # Data first: what is wrong with them is told before anything is written to the other bucket.
    sources, data = read_data(config)
    require_vocabulary(sources, model_config)
    set_special_tokens(config, sources, model_config)
    transport, uploading = check_upload(config, run_id, paths.checkpoints)
    findings = [
        *resuming,
        *data,
        check_memory(config, model_config, counts, precision),
        check_snapshot(config, counts),
        check_disk(config, counts, transport),
        *uploading,
    ]
    return StartChecks(plan, sources, findings, transport)


def describe_run(
    config: TrainingConfig,
    counts: ParameterCounts,
    sources: Sequence[DataSource],
    accelerator: Accelerator,
    step: int,
) -> dict[str, str]:
    """Return what a start says of itself before it begins."""
    ranks = accelerator.num_processes
    text_of_ranks = f"{ranks} rank{'s' if ranks > 1 else ''}"
    samples, accumulation = config.resolve_batch(ranks)
    tokens = samples * config.sequence_length
    total = tokens * config.max_steps
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = {
        "device": f"{name}, {accelerator.mixed_precision} mixed precision, {text_of_ranks}",
        "model": f"{config.model}: {counts.total:,} parameters, "
        f"{counts.without_embedding:,} without embeddings",
        "step": f"{tokens:,} tokens: {config.per_device_train_batch_size} samples x "
        f"{config.sequence_length} tokens x {accumulation} accumulated x {text_of_ranks}",
        "run": f"steps {step} to {config.max_steps}, {total:,} tokens in all, "
        f"{total / counts.total:.1f} tokens per parameter",
        "checkpoint": f"about {format_bytes(estimate_checkpoint_bytes(counts.total))}, every "
        f"{config.save_steps} steps",
    }
    if sources:
        available = sum(source.index.training_tokens for source in sources)
        facts["data"] = f"{available:,} tokens, {total / max(1, available):.2f} epochs"
        entropy = sources[0].index.unigram_entropy
        if entropy is not None:
            facts["entropy"] = f"{entropy:.2f} nats is the loss of knowing word frequencies alone"
    return facts


def log_facts(facts: dict[str, str], findings: list[Finding]) -> None:
    """Say what is about to begin, one log line a fact."""
    for key, text in facts.items():
        log.info("%-10s %s", key, text)
    for finding in findings:
        if finding.status == "warn":
            log.warning("%s: %s", finding.check, finding.message)


def report(
    config: TrainingConfig, facts: dict[str, str], findings: list[Finding], *, dry_run: bool
) -> int:
    """Print facts and findings; return 0.

    Raises:
        PreflightError: A check failed; the message holds all reasons.
    """
    if dry_run:
        print(json.dumps(config.to_json(), indent=2))
        for key, text in facts.items():
            print(f"{key:<10} {text}")
        for finding in findings:
            print(f"{finding.status:<5}{finding.check:<7} {finding.message}")
    failed = [f"  {finding.check}: {finding.message}" for finding in findings
              if finding.status == "fail"]  # fmt: skip
    if failed:
        raise PreflightError("This run cannot start here:\n" + "\n".join(failed))
    return ExitCode.DONE
