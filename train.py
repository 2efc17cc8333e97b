"""Pre-train a causal language model from NPZ token shards in a bucket.

    bucket -> shard index -> sample order -> batches -> train step -> checkpoint -> bucket

This file is the run, top to bottom: build, loop, close. Each part has its room in utils/.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from configs.training_config import TrainingConfig, get_training_config, parse_assignment
from utils.base.console import configure_logging, run_command
from utils.base.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from utils.checkpoints.layout import RunPaths
    from utils.checkpoints.writer import WriterProcess
    from utils.run.run import TrainingRun
    from utils.start.checks import Check
    from utils.start.preflight import StartChecks
    from utils.start.resume import Plan
    from utils.uploads.lease import PrefixLease

# Training opens no connection but to its bucket.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait for each other spin for a moment and then sleep. Spinning as long as is the
# default makes steps on a CPU several times slower where another process wants their cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

LEASE_RETRY_SECONDS = 10.0
COMPILED_FOLDER = "torch_compile"

EPILOG = """exit codes:
  0      done and all verified in the bucket (also after --stop-after and --dry-run)
  1      unexpected error
  2      wrong usage, configuration or data
  3      preflight refused: the machine or the bucket cannot do this run
  4      trained and saved, but not everything is verified in the bucket
  75     stopped by a signal, state saved: start again with --resume latest
  128+n  second signal n: left at once
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line of train.py."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Pre-train a causal language model from NPZ token shards in a bucket.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--config",
        default="test",
        metavar="{test,production,NAME,FILE.json}",
        help="configs/NAME.json or a path that ends in .json (default: test)",
    )
    add("--max-steps", type=int, metavar="N", help="length of the run and of its schedule")
    add("--stop-after", type=int, metavar="N", help="save and end this start after step N")
    add("--hourly-price", type=float, metavar="X", help="dollars an hour of all machines together")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="WHICH",
        help="NAME, latest, best, a step, a path, or gs://BUCKET[/PREFIX]/latest or /NAME",
    )
    start.add_argument("--fresh", action="store_true", help="set an old run aside, begin anew")
    add(
        "--accept-data-change",
        action="store_true",
        help="resume although the shards changed: go on at the next epoch of the new ones",
    )
    add(
        "--accept-config-change",
        action="store_true",
        help="resume although the configuration trains something else than the checkpoint's",
    )
    add(
        "--accept-missing-random-state",
        action="store_true",
        help="resume although the random states are damaged: they are seeded anew",
    )
    add("--no-background-upload", action="store_true", help="upload while training waits")
    add("--dry-run", action="store_true", help="show and check everything, train nothing")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set any configuration key; model_overrides.KEY for the model's",
    )
    add("--quiet", action="store_true", help="warnings and errors only")
    add("--debug", action="store_true", help="debug log lines, and the traceback of an error")
    return parser.parse_args(argv)


def load_config(args: argparse.Namespace) -> TrainingConfig:
    """Return the configuration of a command line."""
    if args.stop_after is not None and args.stop_after < 1:
        raise UsageError(f"--stop-after must be at least 1, got {args.stop_after}.")
    overrides = dict(parse_assignment(text) for text in args.set)
    if args.max_steps is not None:
        overrides["max_steps"] = args.max_steps
    if args.hourly_price is not None:
        overrides["hourly_price"] = args.hourly_price
    if args.debug:
        overrides["log_level"] = "debug"
    return get_training_config(args.config, overrides)


def train(args: argparse.Namespace) -> int:
    """Do what the command line asks for; return the exit code."""
    config = load_config(args)
    configure_logging(config.log_level, quiet=args.quiet)
    # torch and transformers take seconds to load: what needs neither does not wait for them.
    from utils.base.startup import load_libraries
    from utils.checkpoints.layout import RunPaths
    from utils.checkpoints.writer import starting_early
    from utils.start import resume

    paths = RunPaths.of(config)
    if not args.dry_run:
        resume.require_startable(paths, resume=args.resume, fresh=args.fresh)
    if config.torch_compile and not args.dry_run:
        keep_compiled(config)
    is_main_rank = os.environ.get("RANK", "0") == "0"
    writes = config.background_save and is_main_rank and not args.dry_run
    with starting_early(is_wanted=writes) as writer:
        load_libraries()
        return start(args, config, paths, writer)


def start(
    args: argparse.Namespace,
    config: TrainingConfig,
    paths: RunPaths,
    writer: WriterProcess | None,
) -> int:
    """Build a run and let it loop; return the exit code."""
    from configs.model_config import build_model_config, is_model_file
    from utils.base import ranks
    from utils.base.startup import keep_freed_memory
    from utils.costs.prices import find_hourly_price
    from utils.models.building import count_parameters, require_kernels
    from utils.models.check import require_language_model
    from utils.run.run import TrainingRun
    from utils.start import preflight
    from utils.start.forecast import RunFacts
    from utils.start.micro_batch import resolve_micro_batch
    from utils.start.restore import Consent
    from utils.tracking import tracking
    from utils.training.preemption import PreemptionWatch, metadata_address
    from utils.training.stopping import StopRequest
    from utils.training_utils import build_accelerator, resolve_precision

    precision = resolve_precision(config)
    world_size = ranks.launched_world_size()
    config.resolve_batch(world_size)
    hourly_price = find_hourly_price(config, world_size)
    model_config = build_model_config(
        config.model,
        config.model_overrides,
        config.sequence_length,
        config.pad_vocab_to_multiple_of,
    )
    counts = count_parameters(model_config)
    if is_model_file(config.model):
        require_language_model(
            model_config,
            attention=config.attn_implementation,
            mask_documents=config.mask_documents,
        )
    with contextlib.ExitStack() as stack:
        trackers = tracking.build_trackers(config, paths.metrics)
        accelerator = build_accelerator(config, precision, trackers, paths.logs)
        require_kernels(config, model_config, precision, accelerator.device)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        ranks.connect_host_group()
        config = resolve_micro_batch(
            config, model_config, counts, precision, accelerator.device, world_size
        )
        _, accelerator.gradient_accumulation_steps = config.resolve_batch(world_size)
        found = ranks.compute_on_main(
            lambda: preflight.check_start(
                config,
                paths,
                model_config,
                counts,
                accelerator,
                args.resume,
                fresh=args.fresh,
                measures=args.dry_run and not args.quiet,
            )
        )
        preflight.set_special_tokens(config, found.sources, model_config)

        def describe(step: int) -> tuple[dict[str, str], list[Check]]:
            facts = RunFacts(
                config,
                model_config,
                counts,
                accelerator.mixed_precision,
                accelerator.device,
                world_size,
                step,
                found.sources,
            )
            checks = ranks.compute_on_main(lambda: preflight.complete_checks(facts, found))
            return preflight.describe_run(facts), checks

        if args.dry_run or any(check.status == "fail" for check in found.checks):
            return preflight.report(config, *describe(found.step), dry_run=args.dry_run)

        if not accelerator.is_main_process:
            configure_logging("warning", quiet=True, main_process=False)
        plan = ranks.compute_on_main(lambda: hold_and_plan(stack, args, config, paths, found))
        preflight.log_facts(*describe(plan.step))
        stop = stack.enter_context(StopRequest())
        if accelerator.is_local_main_process:
            stack.enter_context(PreemptionWatch(stop.request, metadata_address()))
        consent = Consent(
            args.accept_data_change, args.accept_config_change, args.accept_missing_random_state
        )
        run = TrainingRun(
            config,
            paths,
            model_config,
            found.sources,
            plan,
            accelerator,
            stop,
            consent,
            transport=found.transport,
            background_upload=not args.no_background_upload,
            hourly_price=hourly_price,
            writer=writer,
        )
        stack.enter_context(run)
        return loop(run, config, args.stop_after)


def keep_compiled(config: TrainingConfig) -> None:
    """Have torch.compile keep its results in `cache_dir`, where the user has not said otherwise.

    It has to be said before transformers is loaded, which settles on a folder of its own.

    Raises:
        ConfigError: The folder cannot be made.
    """
    folder = Path(config.cache_dir).resolve() / COMPILED_FOLDER
    folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            f"torch.compile cannot keep its results in {folder}: {exc.strerror}. Set cache_dir "
            "elsewhere, or torch_compile=false."
        ) from exc


def hold_and_plan(
    stack: contextlib.ExitStack,
    args: argparse.Namespace,
    config: TrainingConfig,
    paths: RunPaths,
    found: StartChecks,
) -> Plan:
    """Hold the run's directory and bucket, then decide where to begin; for the main process.

    In this order: until both are held, another trainer may save, upload or finish there. What
    `found` says of that was true before the wait, and decides nothing.
    """
    from utils.checkpoints import store
    from utils.start import preflight

    stack.enter_context(store.hold_output_directory(paths))
    configure_logging(config.log_level, quiet=args.quiet, file=paths.train_log)
    store.remove_leftovers(paths.checkpoints)
    lease = hold_bucket(stack, config, found.run_id)
    plan = preflight.decide_start(config, paths, args.resume, fresh=args.fresh)
    if lease is not None:
        lease.run_id = plan.identity.run_id
    return plan


def hold_bucket(
    stack: contextlib.ExitStack, config: TrainingConfig, run_id: str
) -> PrefixLease | None:
    """Hold the run's bucket prefix, so that a second trainer refuses; None without a bucket."""
    from utils.base.uri import join_uri
    from utils.storage.open import open_bucket
    from utils.uploads.lease import hold_prefix

    if not config.checkpoint_uri:
        return None
    uri = join_uri(config.checkpoint_uri, config.run_name)
    bucket = open_bucket(uri, config.gcs_user_project or None, LEASE_RETRY_SECONDS)
    stack.callback(bucket.close)
    return stack.enter_context(hold_prefix(bucket, run_id))


def loop(run: TrainingRun, config: TrainingConfig, stop_after: int | None) -> int:
    """Train to the end, to `stop_after` or to a request to stop; return the exit code."""
    last_step = min(config.max_steps, stop_after or config.max_steps)
    for batches in run.batches(last_step):  # a request to stop ends it between two steps
        step = run.train_step(batches)
        if step % config.logging_steps == 0 or step == config.max_steps:
            run.log_metrics()
        saving = step % config.save_steps == 0 or step == last_step or run.is_save_due()
        if saving or (config.eval_steps and step % config.eval_steps == 0):
            improved = run.evaluate()
            saving = saving or (config.save_on_best and improved)
        if saving:
            run.save()
    return run.finish()


def main(argv: list[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    return run_command(train, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
