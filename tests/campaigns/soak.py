"""A campaign of crashes: kill train.py hundreds of times, resume each time, find nothing lost.

    straight run ----------------------------------------------------> every checkpoint, every loss
    round 1: start, SIGKILL, start, SIGKILL, ..., to the end --------> the same
    round 2: ...

A very small model saves every second step and uploads into a directory, so that most kills meet a
save, a commit, a deletion or an upload. Random kills come at any instant of a start and take either
every process of it or the main process alone, whose children then have to end by themselves.
System call kills (strace) come at a chosen call on a file of a chosen checkpoint. After each kill:

    corrupt     a committed checkpoint that does not verify, or whose tensors are not the straight
                run's at that step
    lost        a committed checkpoint that is gone without keep_checkpoints newer ones and an
                upload; or a start that does not go on from the newest committed one
    different   a step whose loss or batch is not the straight run's, a round that ends in other
                weights, optimizer, schedule or random states, an archive that is not as its sidecar
    leftover    what the killed start left unfinished and the next one did not remove
    failed      a start that ends by itself with an error, hangs, or leaves processes behind

A checkpoint is committed when its directory holds manifest.json. Exit code 0 means none of these.
Starts are forks of a process that has imported torch (Linux); under strace they are launched as a
user does.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.config_files import PROJECT_DIRECTORY, parse_assignment
from configs.training_config import get_training_config
from tests.campaigns.crash_witness import CrashWitness, Round
from tests.campaigns.findings import (
    CampaignResults,
    Wrong,
    build_parser,
    conclude,
    print_counts,
)
from tests.campaigns.fork_server import ForkServer
from utils.base.console import configure_logging, run_command
from utils.base.errors import ExitCode, PretrainError, UsageError
from utils.base.tables import print_table
from utils.base.text import format_duration, printable
from utils.checkpoints.layout import (
    ARCHIVE_SUFFIX,
    SAVING_PREFIX,
    CheckpointName,
    RunPaths,
    find_checkpoints,
)
from utils.storage.directory import TEMPORARY_PREFIX
from utils.tools.proofs.started_runs import (
    RUN_POLL_SECONDS,
    CommandLauncher,
    Launcher,
    Running,
    StepWatch,
    find_family,
    kill_processes,
    kill_tree,
    killed_at_exit,
    open_work_folder,
    phase_of,
    tail,
    wait_until_gone,
)

SAVE_STEPS, KEEP_CHECKPOINTS = 2, 3
# Small enough for some 20 ms a step; an epoch is 40 steps, so a round sees several.
SETTINGS = (
    "warmup_steps=2",
    "model_overrides.num_hidden_layers=1",
    "model_overrides.hidden_size=32",
    "model_overrides.intermediate_size=64",
    "model_overrides.vocab_size=512",
    "model_overrides.hidden_dropout=0.1",
    "sequence_length=128",
    "per_device_train_batch_size=8",
    "global_batch_size=32",
    "max_files=1",
    "max_eval_samples=2",
    "logging_steps=1",
    "eval_steps=null",
    f"save_steps={SAVE_STEPS}",
    "report_to=[]",
    "sample_tokens=0",
    "use_cpu=true",
)
# One thread each: starts of a tiny model gain nothing from more, and share the machine better.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
SYSTEM_CALLS = (
    "rename,renameat,renameat2,fsync,fdatasync,openat,write,pwrite64,ftruncate,unlink,unlinkat,"
    "rmdir,close,mkdir,mkdirat"
)
FINDINGS = ("corrupt", "lost", "different", "leftover", "failed")

WATCH_SECONDS = 0.001  # some of what is waited for lasts a few milliseconds
START_LIMIT_SECONDS = 300.0
# A child that was only just started may notice the end of its parent after its imports.
ORPHAN_GRACE_SECONDS, ORPHAN_SECONDS = 0.05, 30.0
# A kill waits for the launch of its start, its first step or its first commit, then a random time;
# or for its first, second, ... save or archive, then a shorter one.
ANCHORS = {"launch": 0.1, "step": 0.15, "commit": 0.2, "saving": 0.4, "archive": 0.15}
FILES = {"saving": f"{SAVING_PREFIX}*", "archive": f"*{ARCHIVE_SUFFIX}"}
MAX_DELAY_STEPS = 8
TRACED_STEPS = 8
# A kill at a system call has been missed when the run is so far past its checkpoint.
PASSED_STEPS = 3 * SAVE_STEPS
MISSES_ALLOWED = 30
FAILURES_ALLOWED = 3

log = logging.getLogger("soak")


@dataclass
class Kill:
    """One kill that happened.

    Attributes:
        kind: random or syscall.
        target: processes (every one of the start) or main (the main process alone).
        phase: What the start was doing.
        begin: Steps done before the start.
        last: The last step it logged.
        newest: Step of the newest committed checkpoint after the kill, 0 where there is none.
        seconds: From the launch to the kill.
        call: The system call, empty for random kills.
    """

    number: int
    kind: str
    target: str
    phase: str
    round: int
    begin: int | None
    last: int | None
    newest: int
    seconds: float
    call: str = ""


@dataclass
class Results(CampaignResults):
    """What a campaign has done and found.

    Attributes:
        starts: Starts of train.py in the rounds.
        resumed: Starts that went on from a checkpoint.
        rounds: Rounds that came to their end and were compared with the straight run.
        verified: Checkpoints that were verified after kills.
        missed: System call kills that never came; the start was killed all the same, as a
            random kill, and the system call is tried again.
        set_aside: Deletions that a kill cut in half, which the next start set aside.
        stray_objects: Unfinished files that kills have left in the bucket's directory.
        cycle_seconds: From one launch to the next.
        skipped: Why system call kills were left out, empty where they were not.
    """

    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    resumed: int = 0
    rounds: int = 0
    verified: int = 0
    missed: int = 0
    set_aside: int = 0
    stray_objects: int = 0
    cycle_seconds: list[float] = field(default_factory=list)
    skipped: str = ""


@dataclass(frozen=True)
class Plan:
    """When the next kill comes: random, or at a syscall.

    A random one waits for its anchor, then for a `share` of the longest delay. `skipped` steps of
    the start pass before a save or archive counts. `main_only` takes the main process alone.
    """

    kind: str
    anchor: str = "step"
    share: float = 0.0
    skipped: int = 0
    main_only: bool = False


def plan_kills(random_kills: int, syscall_kills: int, source: random.Random) -> list[Plan]:
    """Return the kills of a campaign in a random order."""
    anchors = source.choices(list(ANCHORS), weights=list(ANCHORS.values()), k=random_kills)
    plans = [
        Plan("random", anchor, source.random(), source.randrange(8), source.random() < 0.5)
        for anchor in anchors
    ]
    plans += [Plan("syscall")] * syscall_kills
    source.shuffle(plans)
    return plans


@dataclass(frozen=True)
class TracedSave:
    """The system calls of one save, as strace saw them.

    `counts` says how often one thread made each on the checkpoint's files, because strace counts by
    thread, too. `paths` are those that it touched, with `{name}` for the checkpoint's name.
    """

    counts: dict[str, int]
    paths: tuple[str, ...]


def parse_trace(text: str, work: Path, name: str) -> TracedSave:
    """Return what a trace (`strace -f -y`) says about the save and upload of one checkpoint."""
    by_thread: Counter[tuple[str, str]] = Counter()
    paths = set()
    for thread, call, arguments in re.findall(r"^(\d+) +(\w+)\((.*)", text, re.MULTILINE):
        touched = re.findall(rf'["<]({re.escape(str(work))}/[^">]*)[">]', arguments)
        own = {path.replace(name, "{name}") for path in touched if name in path}
        if own:
            by_thread[call, thread] += 1
            paths |= own
    counts: dict[str, int] = {}
    for (call, _), count in by_thread.items():
        counts[call] = max(count, counts.get(call, 0))
    return TracedSave(counts, tuple(sorted(paths)))


def find_strace() -> tuple[list[str], str]:
    """Return the first words of an strace command, and why there is none; one of them is empty.

    No --seccomp-bpf, which would cost far less: strace 6.1 injects no signals with it.
    """
    program = shutil.which("strace")
    if program is None:
        return [], "strace is not installed"
    probe = [program, "-f", "-qq", "-o", os.devnull, "-e", "trace=rename", sys.executable, "-c", ""]
    result = subprocess.run(  # noqa: S603
        probe, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if result.returncode:
        return [], f"strace is not permitted here: {printable(result.stderr.strip())}"
    return [program, "-f", "-y", "-qq"], ""


class Campaign:
    """Carries a campaign out in an empty folder, with the shards of a directory.

    A round has `steps`. `launcher` starts train.py where no strace is needed; `extra` are key=value
    words for every start.
    """

    def __init__(
        self,
        work: Path,
        data: Path,
        steps: int,
        launcher: Launcher,
        seed: int = 0,
        extra: Sequence[str] = (),
    ) -> None:
        self._work, self._data, self._steps, self._launcher = work, data, steps, launcher
        self._extra = extra
        self._random = random.Random(seed)
        self.results = Results(seed)
        self._straight = self._paths("straight")
        self._startup_seconds = self._step_seconds = 0.0
        self._strace: list[str] = []
        self._trace = TracedSave({}, ())
        self._orphans: list[psutil.Process] = []
        self._outputs = self._rounds = 0

    def run(self, plans: Sequence[Plan]) -> Results:
        """Kill as planned; then train the last round to its end."""
        self._train_straight()
        waiting = list(plans)
        if any(plan.kind == "syscall" for plan in plans):
            self._strace, self.results.skipped = find_strace()
            if self._strace:
                self._trace_a_save()
            else:
                log.warning("No system call kills: %s.", self.results.skipped)
                waiting = [plan for plan in plans if plan.kind != "syscall"]
        planned, began = len(waiting), time.monotonic()
        current = self._new_round()
        while waiting and self.results.count("failed") <= FAILURES_ALLOWED:
            started, before = time.monotonic(), len(self.results.kills)
            orphans, self._orphans = self._orphans, []
            goes_on = self._cycle(current, waiting[0])
            self._require_gone(orphans)
            self.results.cycle_seconds.append(round(time.monotonic() - started, 3))
            if len(self.results.kills) > before:
                if self._was_carried_out(waiting[0]):
                    del waiting[0]
                self._show_progress(planned, len(waiting), time.monotonic() - began)
            if not goes_on:
                current = self._new_round()
        self._train_to_the_end(current)
        self._require_gone(self._orphans)
        self.results.verified = self._witness.verified
        return self.results

    def _was_carried_out(self, plan: Plan) -> bool:
        """Tell whether the last kill was the planned one; a system call is tried again."""
        if plan.kind == self.results.kills[-1].kind:
            return True
        self.results.missed += 1
        return self.results.missed > MISSES_ALLOWED

    # What every start has in common.

    def _paths(self, name: str) -> RunPaths:
        return RunPaths.of(get_training_config("test", self._overrides(name)))

    def _settings(self, name: str) -> list[str]:
        is_straight = name == "straight"
        return [
            *SETTINGS,
            *self._extra,
            f"data_uri={self._data}",
            f"output_dir={self._work / 'checkpoints'}",
            f"logging_dir={self._work / 'logs'}",
            f"cache_dir={self._work / 'cache'}",
            f"run_name={name}",
            f"keep_checkpoints={self._steps if is_straight else KEEP_CHECKPOINTS}",
            f"checkpoint_uri={'' if is_straight else self._work / 'bucket'}",
            "record_batches=true",
        ]

    def _overrides(self, name: str) -> dict[str, Any]:
        overrides = dict(parse_assignment(text) for text in self._settings(name))
        return {**overrides, "max_steps": self._steps}

    def _launch(
        self, name: str, *words: str, launcher: Launcher | None = None
    ) -> tuple[Running, Path]:
        self._outputs += 1
        output = self._work / f"start-{self._outputs % 100}.log"
        command = ["--config", "test", "--max-steps", str(self._steps), *words]
        for setting in self._settings(name):
            command += ["--set", setting]
        return (launcher or self._launcher).start(command, output), output

    # Before the kills.

    def _train_straight(self) -> None:
        """Train without a kill: what every checkpoint and every logged value must be."""
        log.info("Straight run of %d steps in %s.", self._steps, self._work)
        watch, started, seen = StepWatch(self._straight.metrics), time.monotonic(), 0.0
        running, output = self._launch("straight")
        with killed_at_exit(running):
            while running.poll() is None:
                watch.read()
                if watch.last is not None and not seen:
                    seen = time.monotonic()
                time.sleep(RUN_POLL_SECONDS)
        if running.wait() != ExitCode.DONE:
            raise PretrainError(f"The straight run failed:\n{tail(output)}")
        self._startup_seconds = seen - started
        self._step_seconds = (time.monotonic() - seen) / self._steps
        self._witness = CrashWitness(self._straight, KEEP_CHECKPOINTS)
        log.info(
            "%s to the first step, %.0f ms a step with its saves.",
            format_duration(self._startup_seconds),
            self._step_seconds * 1e3,
        )

    def _trace_a_save(self) -> None:
        """Learn which system calls a save makes, on which paths."""
        trace = self._work / "trace.log"
        prefix = [*self._strace, "-o", str(trace), "-e", f"trace={SYSTEM_CALLS}"]
        launcher = CommandLauncher(1, prefix, ENVIRONMENT)
        running, output = self._launch(
            "traced", "--stop-after", str(TRACED_STEPS), launcher=launcher
        )
        with killed_at_exit(running):
            code = running.wait()
        name = str(self._witness.names[TRACED_STEPS - SAVE_STEPS])
        text = trace.read_text("utf-8", errors="replace").replace("/traced/", "/{run}/")
        self._trace = parse_trace(text, self._work, name)
        trace.unlink()
        if code != ExitCode.DONE or not self._trace.counts:
            raise PretrainError(f"strace shows no save (exit code {code}):\n{tail(output)}")
        counts = ", ".join(f"{n} {call}" for call, n in sorted(self._trace.counts.items()))
        log.info("A save and its upload: %s.", counts)

    def _new_round(self) -> Round:
        self._rounds += 1
        name = f"round-{self._rounds}"
        return Round(self._rounds, self._paths(name), self._work / "bucket" / name)

    # One cycle: start, kill, look.

    def _cycle(self, current: Round, plan: Plan) -> bool:
        """Start and kill once; tell whether the round goes on."""
        watch = StepWatch(current.paths.metrics)
        if plan.kind == "random":
            is_due = random_alarm(plan, current, watch, self._startup_seconds, self._step_seconds)
            return self._start_and_kill(current, watch, is_due, main_only=plan.main_only)
        target = self._choose_target(current)
        if target is None:  # too near to the end of the round
            self._train_to_the_end(current)
            return False
        trace = self._work / "kill.log"
        trace.unlink(missing_ok=True)

        def hit() -> str:
            return target.text if strace_has_killed(trace) else ""

        def is_over() -> bool:
            """Tell whether the rest of the start is to be killed, also where no kill came."""
            passed = (watch.last or 0) > target.checkpoint.step + PASSED_STEPS
            return passed or bool(hit())

        launcher = CommandLauncher(1, self._inject(current, target, trace), ENVIRONMENT)
        return self._start_and_kill(current, watch, is_over, launcher, hit=hit)

    def _choose_target(self, current: Round) -> Target | None:
        """Return a call on a checkpoint that the next start will save, None where it saves none."""
        steps = [current.newest + SAVE_STEPS * ahead for ahead in (1, 2, 3)]
        steps = [step for step in steps if step < self._steps - PASSED_STEPS]
        if not steps:
            return None
        call = self._random.choice(sorted(self._trace.counts))
        number = self._random.randint(1, self._trace.counts[call])
        return Target(call, number, self._witness.names[self._random.choice(steps)])

    def _inject(self, current: Round, target: Target, trace: Path) -> list[str]:
        """Return the words of an strace that kills at a call on one checkpoint's files."""
        fault = f"inject={target.call}:signal=SIGKILL:when={target.number}"
        prefix = [*self._strace, "-o", str(trace), "-e", f"trace={target.call}", "-e", fault]
        for template in self._trace.paths:
            path = template.replace("{name}", str(target.checkpoint))
            prefix += ["-P", path.replace("{run}", current.paths.checkpoints.name)]
        return prefix

    def _start_and_kill(
        self,
        current: Round,
        watch: StepWatch,
        is_due: Callable[[], bool],
        launcher: Launcher | None = None,
        main_only: bool = False,
        hit: Callable[[], str] = lambda: "",
    ) -> bool:
        """Start, kill when that is due, look at what is left; tell whether the round goes on.

        `hit` returns the system call at which strace has killed, where it has.
        """
        started, name = time.monotonic(), current.paths.checkpoints.name
        running, output = self._launch(name, "--resume", "latest", launcher=launcher)
        self.results.starts += 1
        was_killed = self._watch_and_kill(current, running, watch, is_due, main_only)
        code, seconds = running.wait(), round(time.monotonic() - started, 2)
        watch.read()
        if code == ExitCode.DONE:  # also where the kill met a process that had ended
            self._finish(current)
            return False
        call = hit()
        if not was_killed and not call:
            self._find("failed", f"A start ended with exit code {code}:\n{tail(output)}")
            return False
        if was_killed and seconds > START_LIMIT_SECONDS:
            self._find("failed", f"A start hung after step {watch.last}:\n{tail(output)}")
        self._find_all(current, self._witness.look(current))
        is_there = current.paths.checkpoints.is_dir()
        self.results.kills.append(
            Kill(
                number=len(self.results.kills) + 1,
                kind="syscall" if call else "random",
                target="main" if main_only else "processes",
                phase=phase_of(current.paths, watch) if is_there else "starting",
                round=current.number,
                begin=watch.begin,
                last=watch.last,
                newest=current.newest,
                seconds=seconds,
                call=call,
            )
        )
        return True

    def _watch_and_kill(
        self,
        current: Round,
        running: Running,
        watch: StepWatch,
        is_due: Callable[[], bool],
        main_only: bool,
    ) -> bool:
        """Follow a start until its kill or its end; tell whether it was killed here."""
        limit = time.monotonic() + START_LIMIT_SECONDS
        was_checked = False
        with killed_at_exit(running):
            while running.poll() is None:
                watch.read()
                if watch.last is not None and not was_checked:
                    was_checked = True
                    self._check_start(current, watch)
                if is_due() or time.monotonic() > limit:
                    self._kill(running, main_only=main_only)
                    return True
                time.sleep(WATCH_SECONDS)
        return False

    def _kill(self, running: Running, *, main_only: bool) -> None:
        if not main_only:
            kill_tree(running.pid)
            return
        family = find_family(running.pid)
        kill_processes(family[:1])
        # The next start does not wait for a child that has not noticed yet: nor would a user.
        self._orphans += wait_until_gone(family, ORPHAN_GRACE_SECONDS)

    def _require_gone(self, orphans: Sequence[psutil.Process]) -> None:
        """Find processes that live on although their trainer was killed a while ago."""
        left = wait_until_gone(orphans, ORPHAN_SECONDS)
        if left:
            names = ", ".join(str(process.pid) for process in left)
            self._find("failed", f"Processes {names} outlive their killed trainer.")
            kill_processes(left)

    # What is looked at.

    def _find(self, kind: str, text: str) -> None:
        assert kind in FINDINGS
        self.results.add(kind, len(self.results.kills), text)

    def _find_all(self, current: Round, wrong: Iterable[Wrong]) -> None:
        for kind, text in wrong:
            self._find(kind, f"round {current.number}: {text}")

    def _check_start(self, current: Round, watch: StepWatch) -> None:
        self.results.resumed += bool(watch.begin)
        self._find_all(current, self._witness.look_at_start(current, watch.begin))

    def _train_to_the_end(self, current: Round) -> None:
        """Bring a round to its end without a kill."""
        watch = StepWatch(current.paths.metrics)
        running, output = self._launch(current.paths.checkpoints.name, "--resume", "latest")
        self.results.starts += 1
        with killed_at_exit(running):
            code = running.wait()
        watch.read()
        self._check_start(current, watch)
        if code == ExitCode.DONE:
            self._finish(current)
        else:
            self._find("failed", f"The last start ended with exit code {code}:\n{tail(output)}")

    def _finish(self, current: Round) -> None:
        """Look at a round that came to its end."""
        paths = current.paths
        self._find_all(current, self._witness.look_at_the_end(current))
        self.results.rounds += 1
        self.results.set_aside += len(list(paths.set_aside.glob("*")))
        self.results.stray_objects += sum(
            path.name.startswith(TEMPORARY_PREFIX) for path in current.bucket.rglob("*")
        )
        if not self.results.findings:  # what was found is to be looked at
            for folder in (paths.checkpoints, paths.logs, paths.cache, current.bucket):
                shutil.rmtree(folder, ignore_errors=True)

    def _show_progress(self, planned: int, waiting: int, seconds: float) -> None:
        kill, done = self.results.kills[-1], planned - waiting
        remaining = format_duration(seconds / done * waiting) if done else "?"
        findings = len(self.results.findings)
        log.info(
            "Kill %d (%s) while %s in round %d: steps %s to %s, newest committed %d, %s. %d kills "
            "and %s to go.",
            kill.number,
            kill.call or kill.target,
            kill.phase,
            kill.round,
            kill.begin,
            kill.last,
            kill.newest,
            f"{findings} findings" if findings else "all well",
            waiting,
            remaining,
        )


def random_alarm(
    plan: Plan, current: Round, watch: StepWatch, startup_seconds: float, step_seconds: float
) -> Callable[[], bool]:
    """Return what tells when a random kill is due.

    A save or an archive takes about as long as a step with its saves: that is the longest delay
    after its beginning. After the first step or commit it is some more.
    """
    directory, due = current.paths.checkpoints, math.inf
    longest = {"launch": startup_seconds, **dict.fromkeys(FILES, step_seconds)}
    delay = plan.share * longest.get(plan.anchor, step_seconds * MAX_DELAY_STEPS)

    def has_come() -> bool:
        if plan.anchor == "step":
            return watch.last is not None
        if plan.anchor == "commit":
            names = find_checkpoints(directory)
            return bool(names) and names[-1].step > current.newest
        if plan.anchor in FILES:
            last = -1 if watch.last is None else watch.last
            is_there = any(directory.glob(FILES[plan.anchor]))
            return is_there and last >= current.newest + plan.skipped
        return True

    def is_due() -> bool:
        nonlocal due
        if due == math.inf and has_come():
            due = time.monotonic() + delay
        return time.monotonic() >= due

    return is_due


@dataclass(frozen=True)
class Target:
    """A system call to kill at: which one of a thread's on the checkpoint's files, from 1."""

    call: str
    number: int
    checkpoint: CheckpointName

    @property
    def text(self) -> str:
        """The call as results have it."""
        return f"{self.call} {self.number}"


def strace_has_killed(trace: Path) -> bool:
    """Tell whether a kill is in what strace has written so far."""
    with contextlib.suppress(FileNotFoundError):
        return "killed by SIGKILL" in trace.read_text("utf-8", errors="replace")
    return False


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    quick = "10 random kills and 2 at system calls"
    parser = build_parser("soak.py", __doc__, quick)
    add = parser.add_argument
    add("--kills", type=int, default=300, metavar="N", help="at random instants (default: 300)")
    add("--syscall-kills", type=int, default=60, metavar="N", help="by strace (default: 60)")
    add("--steps", type=int, default=100, metavar="N", help="length of a round (default: 100)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as train.py has it")
    add("--data", type=Path, metavar="DIR", help="shards of the sample text (default: made)")
    add("--launch", action="store_true", help="launch each start; no forks of a loaded process")
    return parser.parse_args(argv)


def prepare_sample(directory: Path) -> Path:
    """Make the shards of the sample text."""
    script = PROJECT_DIRECTORY / "scripts" / "prepare_data.py"
    command = [sys.executable, str(script), "--sample", "--vocab-size", "512", "--quiet"]
    subprocess.run([*command, "--output", str(directory)], check=True)  # noqa: S603
    return directory


def run(args: argparse.Namespace) -> int:
    """Carry the campaign out and print it; 0 where nothing was found, else 1."""
    if args.quick:
        args.kills, args.syscall_kills = 10, 2
    if args.kills < 0 or args.syscall_kills < 0 or args.kills + args.syscall_kills < 1:
        raise UsageError("--kills and --syscall-kills must not be negative, nor both 0.")
    if args.steps < 20 or args.steps % SAVE_STEPS:
        raise UsageError(f"--steps must be at least 20 and even, got {args.steps}.")
    configure_logging("debug" if args.debug else "info", stderr=True)
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(open_work_folder(args))
        data = args.data.resolve() if args.data else prepare_sample(work / "data")
        launcher: Launcher = CommandLauncher(1, (), ENVIRONMENT)
        if sys.platform == "linux" and not args.launch:
            launcher = stack.enter_context(ForkServer(ENVIRONMENT))
        campaign = Campaign(work, data, args.steps, launcher, args.seed, args.set)
        plans = plan_kills(args.kills, args.syscall_kills, random.Random(args.seed))
        results = campaign.run(plans)
        args.keep = args.keep or bool(results.findings)
    print_results(results)
    return conclude(results, args.json, "kill")


def print_results(results: Results) -> None:
    phases = Counter(kill.phase for kill in results.kills)
    calls = Counter(kill.call.split(" ")[0] for kill in results.kills if kill.call)
    kinds = Counter(kill.kind for kill in results.kills)
    figures: dict[str, object] = {
        "kills": f"{len(results.kills)} ({kinds['random']} random, {kinds['syscall']} syscall)",
        "starts": results.starts,
        "resumed": results.resumed,
        "rounds compared": results.rounds,
        "checkpoints verified": results.verified,
        **{kind: results.count(kind) for kind in FINDINGS},
        "syscall kills that never came": results.missed,
        "deletions cut in half, set aside": results.set_aside,
        "unfinished files in the bucket": results.stray_objects,
    }
    if results.cycle_seconds:
        figures["seconds a cycle, median"] = round(statistics.median(results.cycle_seconds), 2)
    print_table("Campaign", [{"figure": key, "value": value} for key, value in figures.items()])
    print_counts("Phases", "killed while", phases)
    print_counts("System calls", "killed at", calls)
    if results.skipped:
        print(f"No system call kills: {results.skipped}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
