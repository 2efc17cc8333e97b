"""Prove on your own configuration that kill -9 and --resume change nothing.

    a short run, straight ------------------------------------------------\
    the same run: killed, resumed, killed, resumed, ..., once from the bucket -> the same bits

The second run is killed by SIGKILL at random instants between its first step and its end, and
started again with `--resume latest`. For one of the kills the whole local checkpoint directory is
deleted after a checkpoint was verified in the bucket, so that the next start has only the bucket.
Then batches, losses, weights, optimizer, schedule, random states and data position of both are
compared bit by bit. Exit code 0 means that there is no difference. Everything happens in a folder
of its own, and in a directory that stands for a bucket unless --use-bucket is given. No torch until
tensors are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import random
import re
import runpy
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import psutil

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.training_config import (
    PROJECT_DIRECTORY,
    TrainingConfig,
    get_training_config,
    parse_assignment,
)
from utils.checkpoint_store import verify_checkpoint
from utils.console import configure_logging, format_duration, get_console, run_command
from utils.errors import CheckpointError, ExitCode, PretrainError, UsageError
from utils.journal import Journal, UploadState
from utils.layout import (
    ARCHIVE_SUFFIX,
    DATA_STATE_FILE,
    MANIFEST_FILE,
    SAVING_PREFIX,
    RunPaths,
    find_checkpoints,
    new_run_id,
    parse_checkpoint_name,
    read_json,
)
from utils.metadata import printable, read_metrics, to_json_text
from utils.storage import is_gcs_uri, join_uri, open_bucket

TRAIN = PROJECT_DIRECTORY / "train.py"
BATCHES_FILE = "batches.jsonl"
STRAIGHT, INTERRUPTED = "straight", "interrupted"

# What the proof decides itself; checkpoint_uri too, but for --use-bucket.
OWN_KEYS = (
    "max_steps",
    "output_dir",
    "logging_dir",
    "run_name",
    "logging_steps",
    "log_level",
    "record_batches",
)
COMPARED_METRICS = ("loss", "grad_norm", "learning_rate", "validation_loss")
TENSOR_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl")
RANDOM_STATES_PREFIX = "random_states_"

POLL_SECONDS = 0.005
KILL_WAIT_SECONDS = 10.0
MAX_TRIES = 4
TAIL_LINES = 8
SHOWN_DIFFERENCES = 5
# What a kill waits for once its instant has come.
ANYTIME, SAVING, UPLOADED = "anytime", "saving", "uploaded"
FIRST_INSTANT, LAST_INSTANT = 0.02, 0.95

log = logging.getLogger("prove_resume")


# Starting train.py, watching it, killing it.


class Running(Protocol):
    """A start of train.py; `subprocess.Popen` is one."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""

    def wait(self) -> int:
        """Wait for its end; return the exit code."""


class Launcher(Protocol):
    """A way to start train.py in the current directory."""

    def start(self, words: Sequence[str], output: Path) -> Running:
        """Start it with these words; standard output and error go to a file."""


class CommandLauncher:
    """Starts train.py as a user does, each time in a session of its own.

    Args:
        processes: Ranks; more than one start through torch.distributed.run.
        prefix: Words before the Python interpreter, such as those of strace.
        environment: Variables besides those of this process.
    """

    def __init__(
        self,
        processes: int = 1,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._program = [*prefix, sys.executable]
        if processes > 1:
            self._program += ["-m", "torch.distributed.run", "--standalone"]
            self._program += ["--nproc_per_node", str(processes)]
        self._environment = {**os.environ, **(environment or {})}

    def start(self, words: Sequence[str], output: Path) -> Running:
        """Start it with these words; standard output and error go to a file."""
        with output.open("wb") as file:
            return subprocess.Popen(  # noqa: S603 - our own program, no shell
                [*self._program, str(TRAIN), *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )


class ForkServer:
    """Starts train.py in forks of a process that has imported torch already: in 0.1 s (Linux).

    A fork leads a session of its own, runs the file train.py as `__main__` and is killed like any
    other process. One start at a time.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        code = "from scripts.prove_resume import serve_forks; serve_forks()"
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT_DIRECTORY,
            env={**os.environ, **(environment or {})},
            bufsize=0,  # an answer that waits must show in select, not hide in a buffer
            start_new_session=True,
        )
        self._running: ForkedStart | None = None
        self._read_line()

    def __enter__(self) -> ForkServer:
        """Return the server itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the server and what it still runs."""
        self.close()

    def start(self, words: Sequence[str], output: Path) -> Running:
        """Start train.py with these words; standard output and error go to a file."""
        assert self._running is None or self._running.poll() is not None, "one start at a time"
        request = {"words": list(words), "cwd": str(Path.cwd()), "output": str(output.absolute())}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._running = ForkedStart(self, int(self._read_line()))
        return self._running

    def read_answer(self, timeout: float | None) -> int | None:
        """Return the exit code of the fork that runs, None where it still does at the timeout."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        return int(self._read_line()) if ready else None

    def close(self) -> None:
        """End the server and what it still runs."""
        if self._running is not None and self._running.poll() is None:
            kill_tree(self._running.pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PretrainError("The fork server has ended; its error is above.")
        return line


class ForkedStart:
    """A start of train.py by a `ForkServer`."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""
        if self._code is None:
            self._code = self._server.read_answer(timeout=0.0)
        return self._code

    def wait(self) -> int:
        """Wait for its end; return the exit code."""
        if self._code is None:
            self._code = self._server.read_answer(timeout=None)
        assert self._code is not None
        return self._code


def serve_forks() -> None:
    """Fork a train.py for each request on standard input; answer with its id, then its end."""
    sys.path[0] = str(PROJECT_DIRECTORY)
    for module in (
        "train",
        "configs.model_config",
        "utils.preflight",
        "utils.training_run",
        "transformers.models.gpt_neox.modeling_gpt_neox",
    ):
        importlib.import_module(module)
    _answer("ready")
    while line := sys.stdin.readline():
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become_train(request)
        _answer(pid)
        _, status = os.waitpid(pid, 0)
        _answer(os.waitstatus_to_exitcode(status))


def _answer(text: object) -> None:
    print(text, flush=True)


def _become_train(request: dict[str, Any]) -> None:
    """Run train.py in this fork; never returns."""
    os.setsid()
    os.chdir(request["cwd"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    os.close(null)
    sys.argv = [str(TRAIN), *request["words"]]
    runpy.run_path(str(TRAIN), run_name="__main__")
    sys.exit()


def find_family(pid: int) -> list[psutil.Process]:
    """Return a process that this script started and all its descendants."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_processes(family: Sequence[psutil.Process]) -> None:
    """Send SIGKILL to each process, by its id; one that has ended is no error."""
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until_gone(family: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for processes to end; return those that still run at the deadline."""
    deadline = time.monotonic() + seconds
    while left := [process for process in family if _is_running(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return left


def _is_running(process: psutil.Process) -> bool:
    try:
        # A zombie whose other threads still end (one waits for the disk) holds its files and locks.
        is_zombie = process.status() == psutil.STATUS_ZOMBIE and process.num_threads() < 2
        return bool(process.is_running() and not is_zombie)
    except psutil.NoSuchProcess:
        return False


def kill_tree(pid: int) -> None:
    """Kill a process that this script started with all its descendants, and wait for their end."""
    family = find_family(pid)
    kill_processes(family)
    left = wait_until_gone(family, KILL_WAIT_SECONDS)
    if left:
        raise PretrainError(f"Processes {[process.pid for process in left]} outlive SIGKILL.")


def read_records(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects in a file from a byte on, and where its last whole line ends.

    A line that a crash has torn is left out, also where the next writer has gone on in it.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data.rfind(b"\n") + 1
    records = []
    for line in data[:whole].splitlines():
        for text in (line, line[max(0, line.rfind(b'{"')) :]):
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(text)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
                    break
    return records, offset + whole


class StepWatch:
    """Follows what one start adds to metrics.jsonl.

    Attributes:
        begin: Steps done before it, None while it has not said so.
        last: The last step that it logged, None while there is none.
    """

    def __init__(self, metrics: Path) -> None:
        self.begin: int | None = None
        self.last: int | None = None
        self._path = metrics
        self._offset = metrics.stat().st_size if metrics.is_file() else 0

    def read(self) -> None:
        """Take in what is new."""
        records, self._offset = read_records(self._path, self._offset)
        for record in records:
            if record.get("event") in ("start", "resume"):
                self.begin = record["step"]
            elif "loss" in record:
                self.last = record["step"]


def phase_of(paths: RunPaths, watch: StepWatch) -> str:
    """Return what a start was doing when it was killed, by what it has left."""
    if watch.begin is None:
        return "starting"
    names = [path.name for path in paths.checkpoints.iterdir()]
    saving = [name for name in names if name.startswith(SAVING_PREFIX)]
    if any((paths.checkpoints / name / MANIFEST_FILE).is_file() for name in saving):
        return "committing"
    if any("deleted" not in name for name in saving):
        return "saving"
    if saving:
        return "deleting"
    states = {entry.state for entry in Journal(paths.journal).latest().values()}
    archives = any(name.endswith(ARCHIVE_SUFFIX) for name in names)
    if archives or states & {UploadState.ARCHIVING, UploadState.UPLOADING}:
        return "uploading"
    return "training"


def tail(output: Path) -> str:
    """Return the last lines that a start has written."""
    lines = output.read_text("utf-8", errors="replace").splitlines()
    return "\n".join(f"  {printable(line)}" for line in lines[-TAIL_LINES:])


# Comparing two runs.


@dataclass(frozen=True)
class Comparison:
    """What was compared, and every place where the two differ.

    Attributes:
        what: The name of the thing.
        extent: How much of it there was.
        differences: Where they differ; empty: bit by bit the same.
    """

    what: str
    extent: str
    differences: tuple[str, ...] = ()


def values_by_step(path: Path, key: str) -> dict[int, set[str]]:
    """Return every value that a file of JSON lines has for a step, exactly as JSON text.

    What was trained again after a kill occurs more than once; a set with two values is a step that
    did not repeat itself.
    """
    values: dict[int, set[str]] = {}
    for record in read_records(path)[0]:
        if key in record and "event" not in record:
            values.setdefault(record["step"], set()).add(json.dumps(record[key]))
    return values


def compare_values(
    what: str,
    straight: Mapping[int, set[str]],
    other: Mapping[int, set[str]],
    steps: Sequence[int] | None,
) -> Comparison:
    """Compare one value a step.

    Args:
        what: Its name.
        straight: Values of the straight run.
        other: Values of the other run.
        steps: Steps that both must have; None: those that both happen to have.
    """
    wanted = sorted(straight.keys() & other.keys()) if steps is None else steps
    differences = []
    for step in wanted:
        left, right = straight.get(step, set()), other.get(step, set())
        if not left or not right:
            differences.append(f"step {step} is missing in the {INTERRUPTED if left else STRAIGHT}")
        elif left != right or len(left) > 1:
            differences.append(f"step {step}: {_join(left)} and {_join(right)}")
    return Comparison(what, f"{len(wanted)} steps", tuple(differences))


def _join(values: set[str]) -> str:
    return " / ".join(sorted(values))


def compare_logs(straight: Path, other: Path, steps: int) -> list[Comparison]:
    """Compare batches and metrics of two log directories, step by step."""
    every = range(1, steps + 1)
    found = []
    if records_batches():
        left, right = (values_by_step(logs / BATCHES_FILE, "crc32c") for logs in (straight, other))
        found.append(compare_values("batches (crc32c)", left, right, every))
    for key in COMPARED_METRICS:
        left, right = (
            values_by_step(logs / "metrics.jsonl", key) for logs in (straight, other)
        )  # fmt: skip
        wanted = None if key == "validation_loss" else every
        found.append(compare_values(key, left, right, wanted))
    curves = [read_metrics(logs / "metrics.jsonl").series("loss")[0] for logs in (straight, other)]
    wrong = [
        f"the {name} run's curve has steps {steps_of}"
        for name, steps_of in zip((STRAIGHT, INTERRUPTED), curves, strict=True)
        if steps_of != list(every)
    ]
    return [*found, Comparison("curve", "each step once, in order", tuple(wrong))]


def records_batches() -> bool:
    """Tell whether this version of train.py can write down what each step trained on."""
    return any(item.name == "record_batches" for item in dataclasses.fields(TrainingConfig))


def compare_checkpoints(straight: Path, other: Path) -> list[Comparison]:
    """Compare every tensor, number and random state of two checkpoints, and their data positions.

    Raises:
        CheckpointError: One of them does not verify.
    """
    left, right = verify_checkpoint(straight), verify_checkpoint(other)
    names = sorted(
        name for name in left.files.keys() | right.files.keys() if name.endswith(TENSOR_SUFFIXES)
    )
    found = []
    for name in [*names, DATA_STATE_FILE]:
        paths = [checkpoint / name for checkpoint in (straight, other)]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            found.append(Comparison(name, "-", tuple(f"{path} is missing" for path in missing)))
            continue
        values = [_load(path) for path in paths]
        if name.startswith(RANDOM_STATES_PREFIX):
            for value in values:
                # Accelerate's count of micro-steps begins at 0 in each process; nothing needs it.
                value.pop("step", None)
        extent = f"{_count_leaves(values[0])} values"
        found.append(Comparison(name, extent, tuple(_differences(values[0], values[1], ""))))
    return found


def _load(path: Path) -> Any:
    """Return what a file of a verified checkpoint holds."""
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    from accelerate.utils import load

    return load(path, map_location="cpu", mmap=True)


def _count_leaves(value: Any) -> int:
    children = _children(value)
    return 1 if children is None else sum(map(_count_leaves, children.values()))


def _children(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    return dict(enumerate(value)) if isinstance(value, (list, tuple)) else None


def _differences(left: Any, right: Any, where: str) -> Iterator[str]:
    """Name everything in which two nested values differ, bit by bit."""
    parts, others = _children(left), _children(right)
    if parts is not None and others is not None:
        for key in sorted({*parts, *others}, key=str):
            if key not in parts or key not in others:
                yield f"{where}/{key} is only in one of them"
            else:
                yield from _differences(parts[key], others[key], f"{where}/{key}")
    elif type(left) is not type(right) or not _have_same_bits(left, right):
        yield where or "/"


def _have_same_bits(left: Any, right: Any) -> bool:
    """Tell whether two values of one type are the same; NaN is NaN, 0.0 is not -0.0."""
    import numpy as np
    import torch

    if isinstance(left, torch.Tensor):
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        pair = (
            value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (left, right)
        )
        return torch.equal(*pair)
    if isinstance(left, np.ndarray):
        same_kind = (left.dtype, left.shape) == (right.dtype, right.shape)
        return same_kind and left.tobytes() == right.tobytes()
    return repr(left) == repr(right) if isinstance(left, float) else bool(left == right)


# The proof.


@dataclass
class Start:
    """One start of the interrupted run, as the report shows it.

    Attributes:
        number: 1 for the first.
        source: Where it could resume from: nothing, directory or bucket.
        resumed: The checkpoint that it resumed from, empty where it began at step 0.
        begin: Steps done before it.
        last: The last step that it logged.
        ended: killed, with what it was doing, or done.
        seconds: How long it ran.
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
    """What a proof has found.

    Attributes:
        seed: Seed of the instants.
        steps: Length of the run.
        starts: Starts of the interrupted run.
        comparisons: What was compared.
        problems: What kept the proof from being carried out, or contradicts it by itself.
        notes: What was left out, with the reason.
    """

    seed: int
    steps: int
    starts: list[Start] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether everything was compared and nothing differs."""
        return not self.problems and not any(c.differences for c in self.comparisons)


@dataclass(frozen=True)
class Attempt:
    """A start of the interrupted run while it is carried out.

    Attributes:
        start: What the report says of it.
        expected: The step that it has to resume at.
        watch: What it logs.
        running: Its process.
        output: What it prints.
        started: When, in seconds of the monotonic clock.
    """

    start: Start
    expected: int
    watch: StepWatch
    running: Running
    output: Path
    started: float


class TooLateError(Exception):
    """A start ended before its kill came."""


class ProofError(PretrainError):
    """A start did what it must not do; the proof ends there."""


class Proof:
    """One proof in one folder.

    Args:
        args: The command line.
        work: An empty folder.
        launcher: How train.py is started.
    """

    def __init__(self, args: argparse.Namespace, work: Path, launcher: Launcher) -> None:
        self._args, self._work, self._launcher = args, work, launcher
        self._random = random.Random(args.seed)
        self._unique = f"prove-resume-{new_run_id()}-" if args.use_bucket else ""
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
        """Train straight, train with kills, compare; whatever happens, leave no process behind."""
        try:
            self._train_straight()
            self._train_with_kills()
            self._compare()
        except ProofError as exc:
            self._report.problems.append(str(exc))
        finally:
            if self._args.use_bucket and not self._args.keep:
                self._empty_bucket()
        if not records_batches():
            self._report.notes.append("batches: this version has no record_batches; not compared")
        return self._report

    def _settings(self, name: str) -> list[str]:
        """Return the key=value words of a run; what comes later wins."""
        args, work = self._args, self._work
        settings = [
            f"save_steps={max(1, args.steps // 8)}",
            "report_to=[]",
            f"cache_dir={work / 'cache'}",
            *args.set,
            f"output_dir={work / 'checkpoints'}",
            f"logging_dir={work / 'logs'}",
            f"run_name={self._unique}{name}",
            "logging_steps=1",
            "log_level=info",
        ]
        if name == STRAIGHT:
            settings.append("checkpoint_uri=")  # watching changes nothing: nor does uploading
        elif not args.use_bucket:
            settings.append(f"checkpoint_uri={work / 'bucket'}")
        if records_batches():
            settings.append("record_batches=true")
        return settings

    def _build_config(self, name: str) -> TrainingConfig:
        overrides = dict(parse_assignment(text) for text in self._settings(name))
        overrides["max_steps"] = self._args.steps
        return get_training_config(self._args.config, overrides)

    def _launch(self, name: str, *words: str) -> tuple[Running, Path]:
        self._outputs += 1
        output = self._work / f"start-{self._outputs}.log"
        command = ["--config", self._args.config, "--max-steps", str(self._args.steps), *words]
        for setting in self._settings(name):
            command += ["--set", setting]
        return self._launcher.start(command, output), output

    def _train_straight(self) -> None:
        """Train without a kill; take the time from the first step to the end."""
        log.info("Straight run of %d steps in %s.", self._args.steps, self._work)
        watch = StepWatch(self._straight.metrics)
        running, output = self._launch(STRAIGHT)
        seen: dict[int | None, float] = {}
        with killed_at_exit(running):
            while (code := running.poll()) is None:
                watch.read()
                seen.setdefault(watch.last, time.monotonic())
                time.sleep(POLL_SECONDS)
        watch.read()
        if code != ExitCode.DONE or watch.last != self._args.steps:
            raise ProofError(f"The straight run ended with exit code {code}:\n{tail(output)}")
        logged = [moment for step, moment in seen.items() if step is not None]
        self._span_seconds = logged[-1] - logged[0] if logged else 0.0
        log.info("Its steps took %s.", format_duration(self._span_seconds))

    def _train_with_kills(self) -> None:
        scale = 1.0
        for _ in range(MAX_TRIES):
            try:
                self._try_with_kills(scale)
            except TooLateError as exc:
                scale /= 2
                log.info("%s The interrupted run begins anew, with kills twice as early.", exc)
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
        source, before = "nothing", 0.0
        for number, instant in enumerate(instants):
            delay = (instant - before) * self._span_seconds * scale
            before = instant
            aim = UPLOADED if number == self._bucket_kill else ANYTIME if number == 0 else SAVING
            self._start_and_kill(number + 1, source, delay, aim)
            if aim == UPLOADED:
                log.info("Deleting %s: only the bucket is left.", self._paths.checkpoints)
                shutil.rmtree(self._paths.checkpoints)
            source = self._find_source()
        self._start_to_the_end(kills + 1, source)

    def _begin(self, number: int, source: str) -> Attempt:
        words = ("--resume", "latest") if number > 1 else ()
        expected = self._expected_step(source)
        watch = StepWatch(self._paths.metrics)
        running, output = self._launch(INTERRUPTED, *words)
        start = Start(number, source)
        self._report.starts.append(start)
        return Attempt(start, expected, watch, running, output, time.monotonic())

    def _find_source(self) -> str:
        """Return where the next start has to resume from."""
        if find_checkpoints(self._paths.checkpoints):
            return "directory"
        return "bucket" if self._verified_step else "nothing"

    def _expected_step(self, source: str) -> int:
        """Return the step that a start has to resume at; from the bucket: at least."""
        if source == "directory":
            return find_checkpoints(self._paths.checkpoints)[-1].step
        return self._verified_step

    def _start_and_kill(self, number: int, source: str, delay: float, aim: str) -> None:
        """Start, and kill it some seconds after its first step, or as soon then as the aim says.

        Raises:
            TooLateError: It was done before.
            ProofError: It failed, or resumed from the wrong place.
        """
        attempt = self._begin(number, source)
        running, watch = attempt.running, attempt.watch
        due: float | None = None
        was_killed = False
        with killed_at_exit(running):
            while running.poll() is None:
                watch.read()
                if watch.last is not None and due is None:
                    due = time.monotonic() + delay
                if due is not None and self._is_kill_due(due, watch, aim):
                    kill_tree(running.pid)
                    was_killed = True
                    break
                time.sleep(POLL_SECONDS)
        self._note(attempt)
        if running.wait() == ExitCode.DONE:  # also where the kill met a process that had ended
            raise TooLateError(f"Start {number} was done before its kill came.")
        if not was_killed:
            self._fail(attempt)
        attempt.start.ended = f"killed while {phase_of(self._paths, watch)}"
        if aim == UPLOADED:
            self._verified_step = max(self._verified_steps())
        self._show(attempt.start)

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

    def _start_to_the_end(self, number: int, source: str) -> None:
        attempt = self._begin(number, source)
        with killed_at_exit(attempt.running):
            code = attempt.running.wait()
        self._note(attempt)
        if code != ExitCode.DONE:
            self._fail(attempt)
        attempt.start.ended = "done"
        self._show(attempt.start)

    def _fail(self, attempt: Attempt) -> NoReturn:
        code = attempt.running.wait()
        attempt.start.ended = f"exit code {code}"
        output = attempt.output.read_text("utf-8", errors="replace")
        if attempt.start.source == "bucket" and "starting at step 0" in output:
            raise ProofError(self._not_from_bucket(attempt))
        raise ProofError(
            f"Start {attempt.start.number} ended with exit code {code}:\n{tail(attempt.output)}"
        )

    def _not_from_bucket(self, attempt: Attempt) -> str:
        return (
            f"Start {attempt.start.number} began at step 0, although step {attempt.expected} is "
            "verified in the bucket: --resume latest does not look there when the local directory "
            f"is gone.\n{tail(attempt.output)}"
        )

    def _note(self, attempt: Attempt) -> None:
        """Write down where a start began, and refuse a wrong place."""
        start, watch, expected = attempt.start, attempt.watch, attempt.expected
        watch.read()
        start.begin, start.last = watch.begin, watch.last
        start.seconds = round(time.monotonic() - attempt.started, 2)
        text = attempt.output.read_text("utf-8", errors="replace")
        found = re.search(r"Resumed from (\S+) \(step \d+\)", text)
        start.resumed = printable(found[1].rstrip("/").rsplit("/", 1)[-1]) if found else ""
        if watch.begin is None:
            return  # its exit code and last lines say why
        wrong = watch.begin < expected if start.source == "bucket" else watch.begin != expected
        if not wrong:
            return
        start.ended = "began at the wrong step"
        if start.source == "bucket" and watch.begin == 0:
            raise ProofError(self._not_from_bucket(attempt))
        raise ProofError(
            f"Start {start.number} began at step {watch.begin}; the newest checkpoint in its "
            f"{start.source} is of step {expected}."
        )

    def _show(self, start: Start) -> None:
        log.info(
            "Start %d of %d: steps %s to %s, from %s, %s after %s.",
            start.number, self._args.kills + 1, start.begin, start.last, start.source,
            start.ended, format_duration(start.seconds),
        )  # fmt: skip

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
        self._empty_bucket()

    def _empty_bucket(self) -> None:
        """Remove what the interrupted run has put into the bucket."""
        uri = join_uri(self._config.checkpoint_uri, self._config.run_name)
        bucket = open_bucket(uri, self._config.gcs_user_project or None)
        try:
            for info in list(bucket.list()):
                bucket.delete(info.name)
        finally:
            bucket.close()
        if not is_gcs_uri(uri):
            shutil.rmtree(uri, ignore_errors=True)


@contextlib.contextmanager
def killed_at_exit(running: Running) -> Iterator[None]:
    """Leave no process behind, whatever happens in between."""
    try:
        yield
    finally:
        if running.poll() is None:
            kill_tree(running.pid)


# The command.


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="prove_resume.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="test", help="configs/NAME.json or a .json file (default: test)")
    add("--steps", type=int, default=24, metavar="N", help="length of the runs (default: 24)")
    add("--kills", type=int, default=3, metavar="K", help="at least 2 (default: 3)")
    add("--processes", type=int, default=1, metavar="P", help="ranks of each start (default: 1)")
    add("--seed", type=int, default=0, metavar="S", help="decides the instants (default: 0)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as train.py has it")
    add(
        "--use-bucket",
        action="store_true",
        help="the configuration's bucket, under a run_name of its own, removed afterwards",
    )
    add("--workdir", type=Path, metavar="DIR", help="a new or empty folder (default: a temporary)")
    add("--keep", action="store_true", help="keep the folder (and, with --use-bucket, the objects)")
    add("--json", action="store_true", help="print JSON")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def require_usable(args: argparse.Namespace) -> None:
    """Refuse a command line that cannot be carried out.

    Raises:
        UsageError: A number is out of its range, or a key is set that the proof sets itself.
    """
    for key, limit in (("kills", 2), ("steps", 4), ("processes", 1)):
        if getattr(args, key) < limit:
            raise UsageError(f"--{key} must be at least {limit}, got {getattr(args, key)}.")
    for text in args.set:
        key, _ = parse_assignment(text)
        if key in OWN_KEYS:
            raise UsageError(f"--set {key}: the proof decides this itself.")
        if key == "checkpoint_uri" and not args.use_bucket:
            raise UsageError("--set checkpoint_uri takes effect only with --use-bucket.")
    if args.use_bucket:
        overrides = dict(parse_assignment(text) for text in args.set)
        if not get_training_config(args.config, overrides).checkpoint_uri:
            raise UsageError("--use-bucket: the configuration has no checkpoint_uri.")


@contextlib.contextmanager
def open_work_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Give `--workdir` or a temporary folder; remove it unless `--keep` is set by then.

    Raises:
        UsageError: The folder is not empty.
    """
    work: Path = args.workdir or Path(tempfile.mkdtemp(prefix="crashes-"))
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise UsageError(f"{work} is not empty: --workdir wants a folder of its own.")
    try:
        yield work.resolve()
    finally:
        if args.keep:
            log.info("Kept: %s", work)
        else:
            shutil.rmtree(work, ignore_errors=True)


def run(args: argparse.Namespace) -> int:
    """Carry the proof out and print it; 0 without a difference, 1 with any."""
    require_usable(args)
    configure_logging("debug" if args.debug else "info", stderr=True)
    with open_work_folder(args) as work:
        report = Proof(args, work, CommandLauncher(args.processes)).run()
    if args.json:
        print(to_json_text({**asdict(report), "holds": report.holds}))
    else:
        print_report(report)
    return ExitCode.DONE if report.holds else ExitCode.UNEXPECTED


def print_report(report: Report) -> None:
    """Print the starts, what was compared, and the verdict."""
    starts = [
        {
            "start": start.number,
            "resumed from": start.resumed or "step 0",
            "in": start.source,
            "steps": f"{_shown(start.begin)} to {_shown(start.last)}",
            "ended": start.ended,
            "time": format_duration(start.seconds),
        }
        for start in report.starts
    ]
    print_table("Starts of the interrupted run", starts)
    rows = [
        {
            "compared": comparison.what,
            "extent": comparison.extent,
            "result": f"{len(comparison.differences)} differences"
            if comparison.differences
            else "the same",
        }
        for comparison in report.comparisons
    ]
    print_table("Against the straight run", rows)
    for comparison in report.comparisons:
        for difference in comparison.differences[:SHOWN_DIFFERENCES]:
            print(f"{comparison.what}: {printable(difference)}")
    for line in (*report.notes, *report.problems):
        print(line)
    verdict = "no difference" if report.holds else "NOT proven"
    kills = sum(start.ended.startswith("killed") for start in report.starts)
    print(f"{report.steps} steps with {kills} kills (seed {report.seed}): {verdict}.")


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the keys of the first as columns: a table, or plain lines in a pipe."""
    if not rows:
        return
    columns = list(rows[0])
    if not sys.stdout.isatty():
        print(title)
        table_rows = [columns, *([str(row[key]) for key in columns] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table_rows, strict=True)]
        for cells in table_rows:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            print(f"  {'  '.join(padded)}".rstrip())
        return
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    get_console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
