"""A run trained straight and once more with kills, and what both are compared by.

    settings -> straight run, killed and resumed run -> comparisons -> report

`scripts/prove_resume.py` is its command line and says what it proves.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from configs.config_files import parse_assignment
from configs.training_config import TrainingConfig, get_training_config
from utils.base.errors import CheckpointError, ExitCode, PretrainError
from utils.base.progress import ProgressDisplay
from utils.base.text import format_duration, printable
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import (
    SAVING_PREFIX,
    RunPaths,
    find_checkpoints,
    parse_checkpoint_name,
)
from utils.tools.proofs.run_comparison import (
    INTERRUPTED,
    STRAIGHT,
    Comparison,
    compare_checkpoints,
    compare_logs,
)
from utils.tools.proofs.started_runs import (
    RUN_POLL_SECONDS,
    Launcher,
    Running,
    StepWatch,
    kill_tree,
    killed_at_exit,
    phase_of,
    tail,
)

# What the proof decides itself.
OWN_KEYS = (
    "checkpoint_uri",
    "max_steps",
    "output_dir",
    "logging_dir",
    "run_name",
    "logging_steps",
    "log_level",
    "record_batches",
)
MAX_TRIES = 4
# What a kill waits for once its instant has come.
ANYTIME, SAVING, UPLOADED = "anytime", "saving", "uploaded"
FIRST_INSTANT, LAST_INSTANT = 0.02, 0.95

log = logging.getLogger("prove_resume")


@dataclass
class Attempt:
    """One attempt of the interrupted run, as the report shows it.

    It could resume from a `source` (nothing, directory or bucket), `begin` is the steps done before
    it, `last` the last step that it logged, `ended` whether and where it was killed.
    """

    number: int
    source: str
    resumed: str = ""
    begin: int | None = None
    last: int | None = None
    ended: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """What a proof has found; `problems` kept it from being carried out, or contradict it."""

    seed: int
    steps: int
    starts: list[Attempt] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether everything was compared and nothing differs."""
        return not self.problems and not any(c.differences for c in self.comparisons)


@dataclass(frozen=True)
class RunningAttempt:
    """A train.py that was started, at `began` seconds of the monotonic clock."""

    shown: Attempt
    watch: StepWatch
    running: Running
    output: Path
    began: float


class TooLateError(Exception):
    """An attempt ended before its kill came."""


class ProofError(PretrainError):
    """An attempt did what it must not do; the proof ends there."""


class Proof:
    """One proof in one folder, which is empty."""

    def __init__(
        self,
        args: argparse.Namespace,
        work: Path,
        launcher: Launcher,
        progress: ProgressDisplay,
    ) -> None:
        self._args, self._work, self._launcher, self._progress = args, work, launcher, progress
        self._random = random.Random(args.seed)
        self._bucket = work / "bucket"
        self._outputs = 0
        self._span_seconds = 0.0
        self._verified_step = 0
        self._config = self._build_config(INTERRUPTED)
        self._paths = RunPaths.of(self._config)
        self._straight = RunPaths.of(self._build_config(STRAIGHT))
        # Not the last kill where there are three: a local resume then follows that from the bucket.
        self._bucket_kill = args.kills // 2
        self._report = Report(args.seed, args.steps)

    def run(self) -> Report:
        """Train straight, train with kills, compare; leave no process running at the end."""
        try:
            self._train_straight()
            self._train_with_kills()
            self._compare()
        except ProofError as exc:
            self._report.problems.append(str(exc))
        return self._report

    def _settings(self, name: str) -> list[str]:
        """Return the key=value words of a run; what comes later wins."""
        args, work = self._args, self._work
        return [
            f"save_steps={max(1, args.steps // 8)}",
            "report_to=[]",
            "sample_tokens=0",
            f"cache_dir={work / 'cache'}",
            *args.set,
            f"output_dir={work / 'checkpoints'}",
            f"logging_dir={work / 'logs'}",
            f"run_name={name}",
            "logging_steps=1",
            "log_level=info",
            "record_batches=true",
            # The straight run has no bucket: neither watching nor uploading changes a run.
            f"checkpoint_uri={'' if name == STRAIGHT else self._bucket}",
        ]

    def _build_config(self, name: str) -> TrainingConfig:
        overrides = dict(parse_assignment(text) for text in self._settings(name))
        overrides["max_steps"] = self._args.steps
        return get_training_config(self._args.config, overrides)

    def _begin(self, name: str, shown: Attempt) -> RunningAttempt:
        """Start train.py for one of the two runs."""
        self._outputs += 1
        output = self._work / f"start-{self._outputs}.log"
        command = ["--config", self._args.config, "--max-steps", str(self._args.steps)]
        if shown.number > 1:
            command += ["--resume", "latest"]
        for setting in self._settings(name):
            command += ["--set", setting]
        watch = StepWatch((self._straight if name == STRAIGHT else self._paths).metrics)
        running = self._launcher.start(command, output)
        return RunningAttempt(shown, watch, running, output, time.monotonic())

    def _follow(self, attempt: RunningAttempt, should_kill: Callable[[], bool]) -> bool:
        """Wait for an attempt's end, showing its steps, or kill it; tell whether it was killed.

        `should_kill` is asked again and again.
        """
        number, total = attempt.shown.number, self._args.kills + 1
        stage = f"attempt {number} of {total}" if number else "straight run"
        was_killed = False
        with killed_at_exit(attempt.running):
            while attempt.running.poll() is None and not was_killed:
                attempt.watch.read()
                self._progress.update(stage, attempt.watch.last or 0, self._args.steps)
                if should_kill():
                    kill_tree(attempt.running.pid)
                    was_killed = True
                time.sleep(RUN_POLL_SECONDS)
        attempt.watch.read()
        self._progress.update(stage, attempt.watch.last or 0, self._args.steps)
        return was_killed

    def _train_straight(self) -> None:
        """Train without a kill; take the time from the first step to the end."""
        log.info("Working in %s.", self._work)
        attempt = self._begin(STRAIGHT, Attempt(0, "nothing"))
        seen: dict[int, float] = {}

        def note_step() -> bool:
            if attempt.watch.last is not None:
                seen.setdefault(attempt.watch.last, time.monotonic())
            return False

        self._follow(attempt, note_step)
        code = attempt.running.wait()
        if code != ExitCode.DONE or attempt.watch.last != self._args.steps:
            last_lines = tail(attempt.output)
            raise ProofError(f"The straight run ended with exit code {code}:\n{last_lines}")
        moments = list(seen.values())
        self._span_seconds = moments[-1] - moments[0] if moments else 0.0
        log.info("The steps of the straight run took %s.", format_duration(self._span_seconds))

    def _train_with_kills(self) -> None:
        scale = 1.0
        for _ in range(MAX_TRIES):
            try:
                self._try_with_kills(scale)
            except TooLateError as exc:
                scale /= 2
                log.info("%s", exc)
                log.info("The interrupted run begins anew, with kills twice as early.")
                self._report.starts.clear()
                self._remove_run()
                self._verified_step = 0
            else:
                return
        raise ProofError(
            f"{MAX_TRIES} times the run was over before its kill came. Give it more --steps, or "
            "--set save_steps=1."
        )

    def _try_with_kills(self, scale: float) -> None:
        kills = self._args.kills
        instants = sorted(self._random.uniform(FIRST_INSTANT, LAST_INSTANT) for _ in range(kills))
        before = 0.0
        for place, instant in enumerate(instants):
            delay = (instant - before) * self._span_seconds * scale
            before = instant
            aim = UPLOADED if place == self._bucket_kill else ANYTIME if place == 0 else SAVING
            self._attempt(place + 1, delay, aim)
            if aim == UPLOADED:
                log.info("Deleted the local checkpoints: only the bucket is left.")
                shutil.rmtree(self._paths.checkpoints)
        self._attempt(kills + 1, None, "")

    def _attempt(self, number: int, delay: float | None, aim: str) -> None:
        """Start the interrupted run once more, and kill it or wait for its end.

        The kill comes `delay` seconds after its first step (None lets it end), and waits for `aim`.

        Raises:
            TooLateError: It was done before.
            ProofError: It failed, or resumed from the wrong place.
        """
        source, expected = self._find_source()
        shown = Attempt(number, source)
        self._report.starts.append(shown)
        attempt = self._begin(INTERRUPTED, shown)
        due: float | None = None

        def should_kill() -> bool:
            nonlocal due
            if delay is None or attempt.watch.last is None:
                return False
            due = time.monotonic() + delay if due is None else due
            return self._is_kill_due(due, attempt.watch, aim)

        was_killed = self._follow(attempt, should_kill)
        self._note(attempt, expected)
        code = attempt.running.wait()
        is_done = code == ExitCode.DONE  # also where the kill met a process that had ended
        if is_done and delay is not None:
            raise TooLateError(f"Attempt {number} was done before its kill came.")
        if not is_done and not was_killed:
            shown.ended = f"exit code {code}"
            raise ProofError(f"Attempt {number} ended with {shown.ended}:\n{tail(attempt.output)}")
        shown.ended = f"killed while {phase_of(self._paths, attempt.watch)}"
        if delay is None:
            shown.ended = "done"
        if aim == UPLOADED:
            self._verified_step = max(self._verified_steps())
        where = f"from {source}: steps {shown.begin} to {shown.last}"
        log.info("Attempt %d of %d %s, %s.", number, self._args.kills + 1, where, shown.ended)

    def _find_source(self) -> tuple[str, int]:
        """Return where the next attempt resumes from, and at which step; a bucket: at least."""
        local = find_checkpoints(self._paths.checkpoints)
        if local:
            return "directory", local[-1].step
        return ("bucket" if self._verified_step else "nothing"), self._verified_step

    def _is_kill_due(self, due: float, watch: StepWatch, aim: str) -> bool:
        last = watch.last or 0
        # The last step but one is the latest: a run that is faster than before would get away.
        if time.monotonic() < due and last < self._args.steps - 1:
            return False
        if aim == UPLOADED:
            return bool(self._verified_steps())
        if aim == SAVING and last < self._args.steps:
            return any(self._paths.checkpoints.glob(f"{SAVING_PREFIX}*"))
        return True

    def _verified_steps(self) -> list[int]:
        entries = Journal(self._paths.journal).latest().values()
        names = (
            parse_checkpoint_name(entry.checkpoint)
            for entry in entries
            if entry.state is UploadState.VERIFIED
        )
        return [name.step for name in names if name is not None]

    def _note(self, attempt: RunningAttempt, expected: int) -> None:
        """Write down where an attempt began; the wrong step ends the proof."""
        shown, watch = attempt.shown, attempt.watch
        shown.begin, shown.last = watch.begin, watch.last
        shown.seconds = round(time.monotonic() - attempt.began, 2)
        text = attempt.output.read_text("utf-8", errors="replace")
        found = re.search(r"Resumed from (\S+) \(step \d+\)", text)
        shown.resumed = printable(found[1].rstrip("/").rsplit("/", 1)[-1]) if found else ""
        if watch.begin is None:
            return  # its exit code and last lines say why
        wrong = watch.begin < expected if shown.source == "bucket" else watch.begin != expected
        if not wrong:
            return
        shown.ended = "began at the wrong step"
        message = (
            f"Attempt {shown.number} began at step {watch.begin}, although step {expected} is "
        )
        message += "verified in the bucket" if shown.source == "bucket" else "in the directory"
        raise ProofError(f"{message}:\n{tail(attempt.output)}")

    def _compare(self) -> None:
        log.info("Comparing both runs.")
        report, steps = self._report, self._args.steps
        report.comparisons += compare_logs(self._straight.logs, self._paths.logs, steps)
        newest = []
        for paths in (self._straight, self._paths):
            names = find_checkpoints(paths.checkpoints)
            if not names or names[-1].step != steps:
                raise ProofError(f"{paths.checkpoints} holds no checkpoint of step {steps}.")
            newest.append(paths.checkpoints / str(names[-1]))
        if newest[0].name != newest[1].name:
            report.problems.append(f"The last ones are {newest[0].name} and {newest[1].name}.")
        try:
            report.comparisons += compare_checkpoints(*newest)
        except CheckpointError as exc:
            raise ProofError(f"The last checkpoint does not verify: {exc}") from exc

    def _remove_run(self) -> None:
        shutil.rmtree(self._paths.checkpoints, ignore_errors=True)
        shutil.rmtree(self._paths.logs, ignore_errors=True)
        shutil.rmtree(self._bucket, ignore_errors=True)
