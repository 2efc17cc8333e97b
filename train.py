"""Pre-train a causal language model from NPZ token shards in a bucket.

    bucket -> shard index -> sample order -> batches -> train step -> checkpoint -> bucket

This file is the run, top to bottom: configuration, libraries, build, check, hold and plan, restore,
loop, close. Each part has its room in utils/.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.training_config import TrainingConfig
from utils.base.console import configure_logging, run_command
from utils.command_line.arguments import parse_arguments
from utils.command_line.next_command import next_command
from utils.command_line.run_config import load_config

if TYPE_CHECKING:
    from utils.checkpoints.writer import WriterProcess
    from utils.run.run import TrainingRun

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait for each other spin for a moment and then sleep. Spinning as long as is the
# default makes steps on a CPU several times slower where another process wants their cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def train(args: argparse.Namespace) -> int:
    """Do what the command line asks for; return the exit code."""
    config = load_config(args)
    configure_logging(config.log_level, quiet=args.quiet, stderr=args.json)
    # Training opens no connection but to its bucket; the model of init_from may be on the Hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if config.init_from else "1")
    is_main_rank = os.environ.get("RANK", "0") == "0"
    if args.config_source and is_main_rank:
        logging.getLogger("train").info("Configuration of the run: %s.", args.config_source)
    # torch and transformers take seconds to load: what needs neither does not wait for them.
    from utils.base.startup import keep_compiled, load_libraries
    from utils.checkpoints.writer import starting_early
    from utils.start.hold import leaving_no_empty_folders
    from utils.start.resume import require_startable

    if not args.dry_run:  # which shows its checks first
        require_startable(config, resume=args.resume, fresh=args.fresh)
    is_writing = config.background_save and is_main_rank and not args.dry_run
    with leaving_no_empty_folders(config), starting_early(is_wanted=is_writing) as writer:
        if config.torch_compile and not args.dry_run:
            keep_compiled(Path(config.cache_dir))
        load_libraries()
        return start(args, config, writer)


def start(args: argparse.Namespace, config: TrainingConfig, writer: WriterProcess | None) -> int:
    """Build a run and let it loop; return the exit code."""
    from utils.base import ranks
    from utils.checkpoints.layout import RunPaths
    from utils.data_utils import TrainingData
    from utils.run.run import TrainingRun
    from utils.run.saving import SavingOptions
    from utils.start import preflight, restore
    from utils.start.data_checks import set_special_tokens
    from utils.start.facts import build
    from utils.start.hold import hold_and_plan
    from utils.start.micro_batch import resolve_micro_batch
    from utils.training.preemption import PreemptionWatch, metadata_address
    from utils.training.stopping import StopRequest
    from utils.training_utils import build_train_state, set_determinism

    facts, accelerator = build(config, args.resume)
    facts = resolve_micro_batch(facts)
    config, accelerator.gradient_accumulation_steps = facts.config, facts.accumulation

    should_measure = args.dry_run and not args.quiet
    found = ranks.compute_on_main(
        lambda: preflight.check_start(facts, args, should_measure=should_measure)
    )
    config = found.config
    facts = replace(facts, config=config, step=found.step, sources=found.sources)
    set_special_tokens(config, facts.sources, facts.model_config)
    if args.dry_run or found.has_failed:
        return preflight.report(facts, found, args)
    if not accelerator.is_main_process:
        configure_logging("warning", quiet=True, main_process=False)

    with contextlib.ExitStack() as stack:
        plan = ranks.compute_on_main(lambda: hold_and_plan(stack, args, config, found.run_id))
        preflight.log_start(replace(facts, step=plan.step), found)
        stop = stack.enter_context(StopRequest())
        if accelerator.is_local_main_process:
            stack.enter_context(PreemptionWatch(stop.request, metadata_address()))

        set_determinism(config)
        base = None if plan.candidates else facts.base
        load_into = base.load_into if base else None
        state = build_train_state(accelerator, facts.model_config, config, load_into)
        state.progress.base = base.record if base else None
        data = TrainingData(config, facts.sources, RunPaths.of(config).cache, facts.vocab_size)
        begun = restore.begin(plan, config, state, data, args)

        options = SavingOptions(found.transport, not args.no_background_upload, writer)
        run = TrainingRun(config, state, data, begun, stop, options, next_command(args, config))
        stack.enter_context(run)
        return loop(run, config, args.stop_after)


def loop(run: TrainingRun, config: TrainingConfig, stop_after: int | None) -> int:
    """Train to the end, to `stop_after` or to a request to stop; return the exit code."""
    last_step = min(config.max_steps, stop_after or config.max_steps)
    if config.init_from and run.state.progress.step == 0:
        run.evaluate()  # what the model can do already
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
