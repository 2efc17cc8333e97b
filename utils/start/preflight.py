"""Preflight: can this machine do this run with these buckets? All reasons at once, in seconds.

    check_start -> directory and bucket are held -> resume.decide_start -> restore

Each check returns findings instead of raising, so that one problem does not hide the next; each
finding says what to do. Checks that wait for a network have short limits.

`check_start` comes first and reads all that can refuse a run; another trainer may still work there.
Where the run begins is decided once directory and bucket are held (`utils/start/hold.py`).
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from configs.model_config import find_dropouts
from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.console import print_wrapped
from utils.base.errors import ExitCode, StorageError
from utils.base.text import count_of, format_bytes, to_json_text, two_digits
from utils.checkpoints.layout import REMOTE_FOLDER, RunIdentity, RunPaths, new_run_id
from utils.data.shard_index import DataSource
from utils.start.checks import Check, print_checks, require_all
from utils.start.data_checks import (
    PROBE_RETRY_SECONDS,
    check_base,
    check_tokenizer,
    check_tokens,
    check_validation,
    check_vocabulary,
    read_data,
    read_tokenizers,
    refuse_bucket,
    require_vocabulary,
    set_special_tokens,
)
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
from utils.training.sharding import resolve_sharding
from utils.training_utils import device_name
from utils.uploads.transport_choice import configured_transport, probe_transport, tool_words
from utils.uploads.transports import TransportOptions

LOGGED_CHECKS = ("memory", "run", "uploading", "cost")

log = logging.getLogger(__name__)


def check_upload(
    config: TrainingConfig, scratch: Path
) -> tuple[TransportOptions | None, list[Check]]:
    """Return the transport that can write, read and delete a small object, and what was found.

    `scratch` is a directory for a local archive, where the transport needs one.
    """
    if not config.checkpoint_uri:
        return None, [Check("upload", "warn", "checkpoint_uri is empty: nothing is uploaded")]
    wanted = configured_transport(config, scratch)
    try:
        found, warning = probe_transport(wanted, REMOTE_FOLDER, PROBE_RETRY_SECONDS)
    except StorageError as exc:
        return None, [refuse_bucket("upload", exc, "write", wanted.uri)]
    return found, [
        Check("upload", "ok", f"{wanted.uri} can be written to{tool_words(found.name)}"),
        *([Check("upload", "warn", warning)] if warning else []),
    ]


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
        f"{two_digits(total / counts.total)} tokens per parameter",
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
        facts["data"] = f"{available:,} tokens, {two_digits(total / max(1, available))} epochs"
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
