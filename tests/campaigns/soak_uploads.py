"""A campaign of uploads: hundreds of saves, a bucket that fails, kills; nothing lost or unverified.

    round: start, kill, start, ..., start without faults --> all verified, nothing left
    another round, another way to the bucket: python in parts, python as one stream, a directory,
    gcloud, gsutil

Each start is a process that saves small checkpoints and uploads them as train.py does
(`tests/campaigns/stand_in_trainer.py`). gs:// is the tests' fake server, in this process: it
answers 503, 429 and 403, resets, stalls, truncates, flips bits, loses answers, slows down, goes
down, and holds another object than it held before. SIGKILL and SIGTERM come at any instant, or at a
chosen request. After each start, and at the end of each round, `tests/campaigns/upload_witness.py`
looks for:

    corrupt     a checkpoint, or an archive beside its sidecar, that is not what was saved
    lost        neither on the disk, nor whole in the bucket, nor given up by the rules
    unverified  said to be in the bucket without being there; or owed, or half, at the end
    leftover    what an upload, a save or a start has left behind: files, parts, processes
    growth      of memory, threads, files or the journal, over one long start
    failed      a start that ended as it must not, or hung

Exit code 0 means none of these. It needs what the tests need (`make setup`), on Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.config_files import PROJECT_DIRECTORY
from tests.campaigns.findings import CampaignResults, build_parser, conclude, print_counts
from tests.campaigns.fork_server import find_marked
from tests.campaigns.stand_in_trainer import (
    Sizes,
    TrainerPlan,
    build_entries,
    build_files,
    loss_at,
    read_ledger,
)
from tests.campaigns.upload_witness import KINDS, Saved, UploadWitness
from tests.disturbed_buckets import (
    BRIEF_TROUBLES,
    BUCKET,
    REQUESTS,
    TROUBLES,
    DirectoryStage,
    ServerStage,
    Stage,
    Trouble,
    draw_trouble,
)
from tests.gcs_server import FakeGcsServer
from utils.base.console import LiveLine, configure_logging, run_command
from utils.base.errors import ExitCode, UsageError
from utils.base.tables import print_table
from utils.base.text import format_bytes, format_duration
from utils.checkpoints.journal import UploadState
from utils.checkpoints.layout import new_run_id, parse_checkpoint_name
from utils.tools.proofs.started_runs import (
    Running,
    find_family,
    kill_processes,
    kill_tree,
    killed_at_exit,
    open_work_folder,
    tail,
    wait_until_gone,
)
from utils.uploads import process as upload_process
from utils.uploads.command_transports import find_gsutil

KEEP_CHECKPOINTS = MAX_UNVERIFIED = 3
MARK = "SOAK_UPLOADS_START"
MEGABYTE = 2**20
# Below 8 MiB in one request; then as a stream; above 32 MiB in several parts.
TINY = (MEGABYTE // 10, MEGABYTE // 2)  # the memory of whoever saves it is not what is measured
SMALL = (MEGABYTE // 10, 4 * MEGABYTE)
STREAMED = (9 * MEGABYTE, 20 * MEGABYTE)
PARTS = (36 * MEGABYTE, 68 * MEGABYTE)

MIN_CYCLES = 5
ROUND_CYCLES = 20
LONG_SHARE = 5  # one cycle in so many belongs to the long start
SETTLED_UPLOADS, SIZE_SAMPLES = 20, 5
GROWTH_BYTES = 4 * MEGABYTE
POLL_SECONDS = 0.005
SHOW_SECONDS = 0.5
ORPHAN_SECONDS = 5.0
SLACK_SECONDS = 90.0
MAX_STARTS_PER_CYCLE = 8
FAILURES_ALLOWED = 3
NUM_TROUBLES = (0.25, 0.4, 0.25, 0.1)  # how likely 0, 1, 2 and 3 of them are in a start
KILL_SHARE, OUTAGE_SHARE, HASTY_SHARE, EVENT_SHARE = 0.8, 0.05, 0.25, 0.7
OUTAGE_SAVES = 9
TARGETS = {"worker": 0.3, "group": 0.1, "tree": 0.2, "upload": 0.25, "SIGTERM": 0.15}

log = logging.getLogger("soak")


@dataclass(frozen=True)
class Way:
    """A way to the bucket, by the configuration's transport, streams and stall limit.

    One of the ranges of `sizes` is drawn for each checkpoint. `share` is its part of the cycles,
    `seconds` what an upload takes, roughly.
    """

    name: str
    transport: str
    streams: int
    sizes: Sizes
    share: float
    seconds: float
    stall_seconds: float = 2.0


WAYS = (
    Way("python, 4 streams", "python", 4, (SMALL, PARTS, PARTS), 0.28, 2.0),
    Way("python, 1 stream", "python", 1, (SMALL, STREAMED, PARTS), 0.2, 1.5),
    Way("directory", "directory", 1, (SMALL, STREAMED), 0.3, 0.5),
    Way("gcloud", "gcloud", 1, (SMALL, STREAMED), 0.07, 8.0, 8.0),
    Way("gsutil", "gsutil", 1, (SMALL, STREAMED), 0.15, 14.0, 10.0),
)
LONG_WAY = Way("python, long start", "python", 4, (TINY,), 0.0, 1.0)


@dataclass(frozen=True)
class RoundPlan:
    """One run from its first start to its last.

    It saves a checkpoint a cycle, the last one in a start without faults; where it `is_long`, all
    others in one start.
    """

    number: int
    way: Way
    cycles: int
    is_long: bool = False


def plan_rounds(cycles: int, ways: Sequence[Way], source: random.Random) -> list[RoundPlan]:
    """Return the rounds of a campaign in a random order."""
    long_cycles = max(2, cycles // LONG_SHARE)
    rest, total = cycles - long_cycles, sum(way.share for way in ways)
    chunks = [(LONG_WAY, long_cycles)]
    for way in ways:
        own = max(1, round(rest * way.share / total))
        pieces = -(-own // ROUND_CYCLES)
        chunks += [(way, own // pieces + (n < own % pieces)) for n in range(pieces)]
    source.shuffle(chunks)
    return [RoundPlan(n, way, count, way is LONG_WAY) for n, (way, count) in enumerate(chunks, 1)]


@dataclass(frozen=True)
class KillPlan:
    """Which of TARGETS to kill, so many seconds after the launch.

    With an `event`, one of REQUESTS, they begin when it has come `count` times.
    """

    target: str
    seconds: float
    event: str = ""
    count: int = 1


@dataclass(frozen=True)
class StartPlan:
    """What one start does and suffers."""

    saves: int
    pause_seconds: float
    drain_seconds: float
    is_paced: bool = False
    troubles: tuple[Trouble, ...] = ()
    kill: KillPlan | None = None


def draw_start(way: Way, left: int, source: random.Random) -> StartPlan:
    """Return a start that saves at most `left` checkpoints."""
    patient = 20.0 + 6 * way.seconds
    if way.transport in ("python", "directory") and source.random() < OUTAGE_SHARE:
        saves = min(left, OUTAGE_SAVES)  # more than may wait: some are given up
        outage = Trouble("down", 0.0, 1e9)
        return StartPlan(saves, 0.05, source.uniform(0.0, 1.0), troubles=(outage,))
    saves = min(left, source.choice((1, 1, 1, 2, 2, 3)))
    kinds = source.choices(list(TROUBLES), list(TROUBLES.values()), k=3)
    count = source.choices(range(4), NUM_TROUBLES)[0]
    troubles = tuple(
        draw_trouble(kind, source, way.seconds, way.stall_seconds) for kind in kinds[:count]
    )
    kill = None
    if source.random() < KILL_SHARE:
        target = source.choices(list(TARGETS), list(TARGETS.values()))[0]
        event, nth = source.choice(REQUESTS), source.randint(1, 2 * saves)
        if source.random() < EVENT_SHARE:
            kill = KillPlan(target, source.uniform(0.0, 0.05), event, nth)
        else:
            kill = KillPlan(target, source.uniform(0.3, 0.4 + saves * way.seconds))
    is_hasty = source.random() < HASTY_SHARE
    drain = source.uniform(0.0, 2 * way.seconds) if is_hasty else patient
    pause = source.choice((0.0, 0.2, way.seconds))
    return StartPlan(saves, pause, drain, troubles=troubles, kill=kill)


def draw_long_start(way: Way, cycles: int, source: random.Random) -> StartPlan:
    """Return the long start: brief troubles all along, one upload after the other."""
    troubles = []
    for _ in range(cycles // 3):
        kind = source.choice(BRIEF_TROUBLES)
        trouble = draw_trouble(kind, source, way.seconds, way.stall_seconds)
        assert trouble.fault is not None
        trouble.fault.operation = "*"
        trouble.fault.skip = source.randrange(5 * cycles)
        troubles.append(trouble)
    return StartPlan(cycles, 0.0, 60.0, is_paced=True, troubles=tuple(troubles))


@dataclass
class StartRecord:
    """One start that is over.

    `kill` is the target of its kill, empty where none came, `phase` what was going on in the bucket
    at that moment. `troubles` says how often each kind was met.
    """

    number: int
    round: int
    way: str
    saves: int
    kill: str
    phase: str
    troubles: dict[str, int]
    code: int
    seconds: float


@dataclass
class Tally:
    """What became of the checkpoints of one way."""

    cycles: int = 0
    verified: int = 0
    failed_attempts: int = 0
    given_up: int = 0
    orphans: int = 0


@dataclass
class Results(CampaignResults):
    """What a campaign has done and found.

    `sizes` are those of the process of the long start, after each upload; `skipped` says which ways
    were left out, and why.
    """

    starts: list[StartRecord] = field(default_factory=list)
    ways: dict[str, Tally] = field(default_factory=dict)
    sizes: list[dict[str, int]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Round:
    """A run that goes on from start to start."""

    plan: RoundPlan
    folder: Path
    stage: Stage
    seed: int
    witness: UploadWitness
    run_id: str = field(default_factory=new_run_id)
    starts: int = 0

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.folder / "checkpoints"


Launch = Callable[[Path, Path, Mapping[str, str]], Running]
"""Starts the stand-in trainer: plan, output, environment."""


def launch(plan: Path, output: Path, environment: Mapping[str, str]) -> Running:
    """Start it in a session of its own."""
    with output.open("wb") as file:
        return subprocess.Popen(  # noqa: S603 - our own program, no shell
            [sys.executable, "-m", "tests.campaigns.stand_in_trainer", str(plan)],
            cwd=PROJECT_DIRECTORY,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )


class Campaign:
    """Carries a campaign out in an empty folder; `live` shows where it is.

    `seed` decides everything but the instants at which processes meet.
    """

    def __init__(
        self, work: Path, seed: int, live: LiveLine | None = None, launch: Launch = launch
    ) -> None:
        self._work, self._seed, self._launch = work, seed, launch
        self._live = live or LiveLine(enabled=False)
        self._planned = self._done = 0
        self._began = time.monotonic()
        self.results = Results(seed)

    def run(self, plans: Sequence[RoundPlan]) -> Results:
        """Carry out the rounds."""
        self._planned = sum(plan.cycles for plan in plans)
        for plan in plans:
            if self.results.count("failed") > FAILURES_ALLOWED:
                break
            self._run_round(plan)
        self.results.seconds = round(time.monotonic() - self._began, 1)
        return self.results

    # A round.

    def _run_round(self, plan: RoundPlan) -> None:
        folder = self._work / f"round-{plan.number}"
        folder.mkdir()
        before = len(self.results.findings)
        with self._open_stage(plan, folder) as stage:
            seed = random.Random(f"{self._seed}/{plan.number}").randrange(2**32)
            saved_at = functools.lru_cache(None)(
                lambda step: Saved(
                    loss_at(seed, step), build_entries(build_files(seed, step, plan.way.sizes))
                )
            )
            witness = UploadWitness(
                folder / "checkpoints",
                stage.objects,
                saved_at,
                keep_checkpoints=KEEP_CHECKPOINTS,
                max_unverified=MAX_UNVERIFIED,
            )
            current = Round(plan, folder, stage, seed, witness)
            self._go_through(current)
            self._count(current)
        if len(self.results.findings) == before:  # what was found is to be looked at
            shutil.rmtree(folder)

    @contextlib.contextmanager
    def _open_stage(self, plan: RoundPlan, folder: Path) -> Iterator[Stage]:
        if plan.way.transport == "directory":
            yield DirectoryStage(folder)
            return
        has_tls = plan.way.transport == "gsutil"
        with FakeGcsServer(folder / "server", tls=has_tls) as server:
            server.create_bucket(BUCKET)
            yield ServerStage(server, folder, f"round-{plan.number}", has_tls=has_tls)

    def _go_through(self, current: Round) -> None:
        plan, number = current.plan, 0
        while (left := plan.cycles - 1 - len(current.witness.saved)) > 0:
            source = random.Random(f"{self._seed}/{plan.number}/{number}")
            draw = draw_long_start if plan.is_long else draw_start
            self._start(current, draw(plan.way, left, source))
            number += 1
            if number > MAX_STARTS_PER_CYCLE * plan.cycles:
                self._find("failed", f"round {plan.number} saves nothing any more.")
                break
        patient = 30.0 + 5 * plan.way.seconds * (2 * KEEP_CHECKPOINTS + MAX_UNVERIFIED)
        record = self._start(current, StartPlan(1, 0.0, patient), is_last=True)
        if record.code != ExitCode.DONE:
            self._find("failed", f"The last start of round {plan.number} ended with {record.code}.")

    def _count(self, current: Round) -> None:
        tally = self.results.ways.setdefault(current.plan.way.name, Tally())
        witness = current.witness
        states = Counter(witness.states.values())
        tally.cycles += len(witness.saved)
        tally.verified += states[UploadState.VERIFIED]
        tally.failed_attempts += witness.lines[UploadState.FAILED]
        tally.given_up += len(witness.given_up)
        tally.orphans += len(witness.orphans)
        self._done += current.plan.cycles

    # A start.

    def _start(self, current: Round, plan: StartPlan, *, is_last: bool = False) -> StartRecord:
        """Start once, disturb and kill as planned, look at what is left."""
        number, mark = len(self.results.starts) + 1, f"{os.getpid()}/{current.folder}"
        current.starts += 1
        ledger = current.folder / f"ledger-{current.starts}.jsonl"
        saved_before = len(current.witness.saved)
        file, output = current.folder / "plan.json", current.folder / f"start-{current.starts}.log"
        self._build_trainer_plan(current, plan, ledger).write(file)
        current.stage.disturb(list(plan.troubles))
        began = time.monotonic()
        mark = f"{mark}/{current.starts}"
        running = self._launch(file, output, {**current.stage.environment, MARK: mark})
        with killed_at_exit(running):
            killed, phase = self._watch(current, running, plan, began, output)
        code, seconds = running.wait(), time.monotonic() - began
        troubles = {kind: n for kind, n in current.stage.calm().items() if n}
        self._require_gone(mark)
        self._require_code(code, killed, output)
        self._look(current, is_last=is_last)
        self._judge_growth(ledger)
        saves = len(current.witness.saved) - saved_before
        record = StartRecord(
            number,
            current.plan.number,
            current.plan.way.name,
            saves,
            killed,
            phase,
            troubles,
            code,
            round(seconds, 2),
        )
        self.results.starts.append(record)
        self._report(current, record)
        return record

    def _build_trainer_plan(self, current: Round, plan: StartPlan, ledger: Path) -> TrainerPlan:
        way, folder = current.plan.way, current.folder
        newest = max((name.step for name in current.witness.saved), default=0)
        settings: dict[str, Any] = {
            "output_dir": str(folder / "checkpoints"),
            "logging_dir": str(folder / "logs"),
            "cache_dir": str(folder / "cache"),
            "run_name": "",
            "checkpoint_uri": current.stage.uri,
            "upload_transport": way.transport,
            "upload_streams": way.streams,
            "upload_stall_seconds": way.stall_seconds,
            "keep_checkpoints": KEEP_CHECKPOINTS,
            "max_unverified": MAX_UNVERIFIED,
        }
        return TrainerPlan(
            settings,
            current.run_id,
            current.seed,
            way.sizes,
            first_step=newest + 1,
            saves=plan.saves,
            ledger=str(ledger),
            pause_seconds=plan.pause_seconds,
            is_paced=plan.is_paced,
            drain_seconds=plan.drain_seconds,
        )

    def _watch(
        self, current: Round, running: Running, plan: StartPlan, began: float, output: Path
    ) -> tuple[str, str]:
        """Disturb a start until its end; return whom a kill hit, and in which phase."""
        way, stage, kill = current.plan.way, current.stage, plan.kill
        pace = plan.saves * (plan.pause_seconds + 4 * way.seconds)
        limit = SLACK_SECONDS + pace + (plan.saves if plan.is_paced else 1) * plan.drain_seconds
        due = kill.seconds if kill and not kill.event else None
        killed, phase, shown = "", "", 0.0
        while running.poll() is None:
            seconds = time.monotonic() - began
            stage.tick(seconds)
            if kill and not killed:
                if due is None and stage.count_events(kill.event) >= kill.count:
                    due = seconds + kill.seconds
                before = stage.phase()
                if due is not None and seconds >= due and kill_target(running.pid, kill.target):
                    killed, phase = kill.target, before
            if seconds > limit:
                self._find("failed", f"A start hung ({way.name}):\n{tail(output)}")
                kill_tree(running.pid)
            if seconds - shown > SHOW_SECONDS:
                shown = seconds
                self._live.show(self._describe(current))
            time.sleep(POLL_SECONDS)
        return killed, phase

    def _require_gone(self, mark: str) -> None:
        """Find processes that live on although the start that began them is over."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (left := find_marked(MARK, mark)) and time.monotonic() < deadline:
            wait_until_gone(left, 0.2)
        if left:
            words = "; ".join(map(_command_of, left))
            self._find("leftover", f"Processes outlive their start by {ORPHAN_SECONDS} s: {words}.")
            kill_processes(left)

    def _require_code(self, code: int, killed: str, output: Path) -> None:
        allowed: set[int] = {ExitCode.DONE, ExitCode.NOT_VERIFIED}
        if killed == "SIGTERM":  # by the signal itself while it was starting
            allowed |= {ExitCode.STOPPED, -signal.SIGTERM}
        elif killed in ("worker", "group", "tree"):
            allowed.add(-signal.SIGKILL)
        if code not in allowed:
            self._find("failed", f"A start ended with exit code {code}:\n{tail(output)}")

    # What is looked at.

    def _find(self, kind: str, text: str) -> None:
        assert kind in KINDS
        self.results.add(kind, len(self.results.starts) + 1, text)

    def _look(self, current: Round, *, is_last: bool) -> None:
        witness = current.witness
        for ledger in current.folder.glob("ledger-*.jsonl"):
            for line in read_ledger(ledger):
                name = parse_checkpoint_name(f"checkpoint-epoch0-step{line.get('step')}-files0")
                witness.saved |= {name} if name else set()
        for kind, text in witness.look_at_the_end() if is_last else witness.look():
            self._find(kind, f"round {current.plan.number} ({current.plan.way.name}): {text}")

    def _judge_growth(self, ledger: Path) -> None:
        sizes = [line for line in read_ledger(ledger) if line["event"] == "size"]
        if not sizes:
            return
        self.results.sizes = [
            {key: n for key, n in line.items() if key != "event"} for line in sizes
        ]
        for text in find_growth(self.results.sizes):
            self._find("growth", text)

    def _report(self, current: Round, record: StartRecord) -> None:
        killed = f", killed: {record.kill} {record.phase}" if record.kill else ""
        troubles = ", ".join(f"{kind} {n}" for kind, n in sorted(record.troubles.items()))
        log.info(
            "Start %d: %d saved in %.1f s, exit code %d%s%s. %s",
            record.number,
            record.saves,
            record.seconds,
            record.code,
            killed,
            f"; {troubles}" if troubles else "",
            self._describe(current),
        )

    def _describe(self, current: Round) -> str:
        done = self._done + len(current.witness.saved)
        seconds = time.monotonic() - self._began
        remaining = format_duration(seconds / done * (self._planned - done)) if done else "?"
        findings = len(self.results.findings)
        return (
            f"Round {current.plan.number} ({current.plan.way.name}): {done} of {self._planned} "
            f"cycles, {f'{findings} findings' if findings else 'all well'}, {remaining} to go."
        )


def kill_target(pid: int, target: str) -> bool:
    """Kill whom a plan names; False where there is no such process at the moment."""
    with contextlib.suppress(ProcessLookupError):
        if target == "SIGTERM":
            os.kill(pid, signal.SIGTERM)
        elif target == "worker":
            os.kill(pid, signal.SIGKILL)
        elif target == "group":
            os.killpg(pid, signal.SIGKILL)
        elif target == "tree":
            kill_tree(pid)
        else:
            children = [
                p for p in find_family(pid)[1:] if upload_process.__name__ in _command_of(p)
            ]
            kill_processes(children[:1])
            return bool(children)
        return True
    return False


def _command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def find_growth(sizes: Sequence[Mapping[str, int]]) -> list[str]:
    """Return what grew between the first uploads of a long start and its end."""
    settled = min(SETTLED_UPLOADS, len(sizes))
    first, last = sizes[settled - 1], sizes[-1]
    grown = [
        f"{key} of the process: {first[key]} after {first['uploads']} uploads, {last[key]} after "
        f"{last['uploads']}."
        for key in ("threads", "files", "children")
        if last[key] > first[key]
    ]
    if len(sizes) >= SETTLED_UPLOADS + 2 * SIZE_SAMPLES:
        windows = sizes[settled : settled + SIZE_SAMPLES], sizes[-SIZE_SAMPLES:]
        before, after = (statistics.median(line["rss"] for line in part) for part in windows)
        if after - before > GROWTH_BYTES:
            grown.append(f"memory of the process grew by {format_bytes(after - before)}.")
    return grown


def choose_ways(results: Results) -> list[Way]:
    """Return the ways whose programs are here; the others are named in the results."""
    missing = {
        "gsutil": None if find_gsutil() else "gsutil is not installed",
        "gcloud": None if shutil.which("gcloud") else "gcloud is not installed",
    }
    results.skipped += [reason for reason in missing.values() if reason]
    return [way for way in WAYS if not missing.get(way.transport)]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser("soak_uploads.py", __doc__, "about 20 cycles")
    add = parser.add_argument
    add("--cycles", type=int, default=500, metavar="N", help="saves and uploads (default: 500)")
    add("--ways", metavar="A,B", help="only these: python, directory, gcloud, gsutil")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Carry the campaign out and print it; 0 where nothing was found, else 1."""
    cycles = 20 if args.quick else args.cycles
    if cycles < MIN_CYCLES:
        raise UsageError(f"--cycles must be at least {MIN_CYCLES}, got {cycles}.")
    configure_logging("debug" if args.debug else "info", stderr=not sys.stdout.isatty())
    with open_work_folder(args) as work, contextlib.closing(LiveLine()) as live:
        campaign = Campaign(work, args.seed, live)
        ways = choose_ways(campaign.results)
        if args.ways:
            wanted = args.ways.split(",")
            ways = [way for way in ways if way.transport in wanted]
            if not ways:
                raise UsageError(
                    f"--ways {args.ways} leaves none; there are python, directory, "
                    "gcloud and gsutil."
                )
        log.info("Seed %d, in %s.", args.seed, work)
        results = campaign.run(plan_rounds(cycles, ways, random.Random(args.seed)))
        args.keep = args.keep or bool(results.findings)
    print_results(results)
    return conclude(results, args.json, "start")


def print_results(results: Results) -> None:
    rows = [{"way": name, **asdict(tally)} for name, tally in sorted(results.ways.items())]
    starts = Counter(record.way for record in results.starts)
    killed = [record for record in results.starts if record.kill]
    kills = Counter(record.way for record in killed)
    for row in rows:
        row |= {"starts": starts[row["way"]], "kills": kills[row["way"]]}
    print_table("Ways", rows)
    troubles: Counter[str] = Counter()
    for record in results.starts:
        troubles.update(record.troubles)
    print_counts("Troubles", "kind", troubles, "met")
    print_counts("Kills", "of", Counter(record.kill for record in killed))
    print_counts("Phases", "killed", Counter(record.phase for record in killed))
    if results.sizes:
        settled = min(SETTLED_UPLOADS, len(results.sizes))
        shown = results.sizes[settled - 1], results.sizes[-1]
        rows = [{**size, "rss": format_bytes(size["rss"])} for size in shown]
        print_table("Long start", rows)
    print_table("Wrong", [{"kind": kind, "findings": results.count(kind)} for kind in KINDS])
    for reason in results.skipped:
        print(f"Left out: {reason}.")
    print(f"It took {format_duration(results.seconds)}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
