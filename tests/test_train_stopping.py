"""A train.py that is stopped: what it saves, what it says, and that the next attempt goes on.

Attempts are forks of a process that has imported torch: real processes with real signals, in a
fraction of the time. Hooks run in the fork before train.py does: most of them hold it at a place
(a gate) until the test lets it go, so that a signal arrives exactly there.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import json
import os
import re
import resource
import select
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.config_files import PROJECT_DIRECTORY
from tests.conftest import TINY
from tests.processes import load_train, run_train_file
from tests.sample_shards import save_shard
from tests.utils.training.test_preemption import Serve, say, serve
from utils.base.errors import ExitCode
from utils.checkpoints.layout import ARCHIVE_SUFFIX, RunPaths, find_checkpoints, read_json
from utils.checkpoints.store import verify_checkpoint
from utils.data.mixture import build_order
from utils.tools.monitor.state import RunState, judge_run
from utils.tracking.metrics_log import read_metrics

__all__ = ["serve"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks train.py")

ERASE_LINE = "\x1b[2K"  # of a terminal, which shows another there
SEQUENCE, SAMPLES_PER_STEP = 32, 4
STEPS, STEPS_PER_SHARD, NUM_SHARDS, SEED = 10, 5, 3, 42
TOKENS_PER_SHARD = STEPS_PER_SHARD * SAMPLES_PER_STEP * SEQUENCE
SETTINGS = (
    *TINY,
    "model_overrides.hidden_dropout=0.1",  # the losses show whether random states came back
    f"sequence_length={SEQUENCE}",
    f"global_batch_size={SAMPLES_PER_STEP}",
    f"max_steps={STEPS}",
    f"seed={SEED}",
    "shuffle_window_shards=1",
    "record_batches=true",
    "logging_steps=1",
    "save_steps=4",
    "keep_checkpoints=9",
    "report_to=[]",
    "use_cpu=true",
    "grace_seconds=300",
)
GO_ON = ("--resume", "latest")
PATIENCE_SECONDS = 300.0  # to end a test that hangs

Hook = tuple[Any, ...]
HOLD_UPLOAD = ("hold_call", "upload", "utils.uploads.uploader", "run_in_process")
HOLD_DIRECTORY = ("hold_call", "directory", "utils.checkpoints.store", "hold_output_directory")
HOLD_LEASE = ("hold_call", "lease", "utils.uploads.lease", "hold_prefix")
# A heart that does not beat within a test, and others that are watched closely.
BEAT_RARELY = [("beat", 300), ("put", "utils.uploads.lease", "POLLS_PER_WATCH", 10_000)]
HOLD_EVALUATION = ("hold_call", "evaluation", "utils.run.evaluation", "forward_loss")


def name_of(step: int) -> str:
    return f"checkpoint-epoch0-step{step}-files{step // STEPS_PER_SHARD}"


# In the fork.


class Gate:
    """A place where a fork waits; the files that tell are in its directory."""

    def __init__(self, name: str) -> None:
        self._reached = Path.cwd() / f"at-{name}"
        self._open = Path.cwd() / f"go-{name}"

    @property
    def is_reached(self) -> bool:
        return self._reached.exists()

    @property
    def is_open(self) -> bool:
        return self._open.exists()

    def reach(self) -> None:
        self._reached.touch()

    def __call__(self) -> None:
        self.reach()
        while not self.is_open:
            time.sleep(0.005)


def replace(module: str, name: str, wrap: Callable[[Any], Any]) -> None:
    """Put a wrapper in place of a function, or of a method where the name has a dot."""
    owner: Any = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, last, wrap(getattr(owner, last)))


def before_step(number: int, act: Callable[[], None]) -> None:
    """Call a function when a step is about to begin."""

    def wrap(train_step: Any) -> Any:
        def acting(state: Any, *arguments: Any) -> None:
            if state.progress.step + 1 == number:
                act()
            train_step(state, *arguments)

        return acting

    replace("utils.run.run", "train_step", wrap)


def hold_step(number: int) -> None:
    before_step(number, Gate("step"))


def hang_in_step(number: int) -> None:
    gate = Gate("hanging-step")

    def hang() -> None:
        gate.reach()
        time.sleep(3600)  # in C, as compiling is

    before_step(number, hang)


def limit_memory(number: int, spare_bytes: int, gate: str) -> None:
    """Let the process have only so much more memory from a step on, once a gate is reached."""
    taken: list[bytearray] = []

    def limit() -> None:
        while not Gate(gate).is_reached:
            time.sleep(0.005)
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        most = pages * resource.getpagesize() + spare_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        # What earlier steps have left free within the process is taken too.
        with contextlib.suppress(MemoryError):
            while True:
                taken.append(bytearray(2**20))
        del taken[-(spare_bytes // 2**20) :]

    before_step(number, limit)


def hold_save() -> None:
    """Wait where all is written and nothing is committed."""
    gate = Gate("save")

    def wrap(write_files: Any) -> Any:
        def held(*arguments: Any) -> Any:
            manifest = write_files(*arguments)
            gate()
            return manifest

        return held

    replace("utils.checkpoints.saver", "write_files", wrap)


def hold_call(gate_name: str, module: str, name: str) -> None:
    gate = Gate(gate_name)

    def wrap(function: Any) -> Any:
        def held(*arguments: Any) -> Any:
            gate()
            return function(*arguments)

        return held

    replace(module, name, wrap)


def hang_in_bucket(answered: str) -> None:
    """Let the bucket give one training shard, and never answer for the others."""
    gate = Gate("bucket")

    def wrap(fetch: Any) -> Any:
        def hang(bucket: Any, name: str, scratch: Path) -> Any:
            if name.startswith("train") and name != answered:
                gate.reach()
                time.sleep(3600)
            return fetch(bucket, name, scratch)

        return hang

    replace("utils.storage.open", "DirectoryBucket.fetch", wrap)


def put(module: str, name: str, value: object) -> None:
    replace(module, name, lambda _: value)


def beat(seconds: float) -> None:
    """Hold the bucket with a heart that beats so often."""
    held = functools.partial(functools.partial, heartbeat_seconds=seconds)
    replace("utils.uploads.lease", "hold_prefix", held)


def run_out_of_gpu_memory(number: int) -> None:
    calls: list[None] = []

    def wrap(forward_loss: Any) -> Any:
        def fail(*arguments: Any) -> Any:
            import torch

            calls.append(None)
            if len(calls) == number * SAMPLES_PER_STEP:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward_loss(*arguments)

        return fail

    replace("utils.training_utils", "forward_loss", wrap)


def without_writer() -> None:
    """Have a thread write checkpoints: the writer process takes seconds of two cores to start."""

    def wrap(start: Any) -> Any:
        from utils.checkpoints.writer import WriterGoneError

        def refuse(*arguments: Any) -> None:
            raise WriterGoneError("not in this test")

        return refuse

    replace("utils.checkpoints.writer", "WriterProcess.__init__", wrap)


def use_terminal() -> None:
    """Take a terminal as input and output, one that goes away at the gate `hang-up`."""
    master, slave = os.openpty()
    gate = Gate("hang-up")
    if os.fork() == 0:
        with open(1, "wb", buffering=0) as output:
            os.close(slave)
            os.set_blocking(master, False)
            while not gate.is_open:
                if select.select([master], [], [], 0.01)[0]:
                    output.write(os.read(master, 65536))
        os._exit(0)
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for target in range(3):
        os.dup2(slave, target)
    os.close(master)
    os.close(slave)


def leave_quickly() -> None:
    """End without the interpreter's own tidying, a second of a run that is not looked at."""

    def wrap(run_command: Any) -> Any:
        def run(*arguments: Any) -> None:
            code = run_command(*arguments)
            sys.stdout.flush()
            os._exit(code)

        return run

    replace("utils.base.console", "run_command", wrap)


def serve_forks() -> None:
    """Fork a train.py for each request on standard input; tell exit codes when asked."""
    load_train()
    print("ready", flush=True)
    children = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            children.discard(request["reap"])
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become_train(request)
        children.add(pid)
        print(pid, flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def become_train(request: dict[str, Any]) -> None:
    os.setsid()
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    files = [os.open(os.devnull, os.O_RDONLY)]
    for path in (request["output"], request["errors"]):
        files.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
    for target, source in enumerate(files):
        os.dup2(source, target)
        os.close(source)
    for name, *arguments in request["hooks"]:
        globals()[name](*arguments)
    run_train_file(request["words"])


# In the test.


def wait_until(condition: Callable[[], bool], explain: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.005)


class Forks:
    """The process whose forks run train.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from tests.test_train_stopping import serve_forks; serve_forks()",
            ],
            cwd=PROJECT_DIRECTORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._read() == "ready"

    def ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Trainer:
    """One attempt of train.py in a folder."""

    def __init__(
        self,
        forks: Forks,
        folder: Path,
        data: Path,
        words: Sequence[str],
        settings: Sequence[str] | None,
        hooks: Sequence[Hook],
        environment: dict[str, str],
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self._forks = folder, forks
        self.paths = RunPaths(folder / "checkpoints", folder / "logs", folder / "cache")
        number = len(list(folder.glob("*.out")))
        self._output, self._errors = folder / f"{number}.out", folder / f"{number}.err"
        words = list(words)
        told = () if settings is None else (*SETTINGS, f"data_uri={data}", *settings)
        for setting in told:
            words += ["--set", setting]
        request = {
            "folder": str(folder),
            "words": words,
            "hooks": hooks,
            "environment": environment,
            "output": str(self._output),
            "errors": str(self._errors),
        }
        self.pid = forks.ask(request)
        self._descriptor = os.pidfd_open(self.pid)
        self._code: int | None = None

    @property
    def output(self) -> str:
        return self._output.read_text("utf-8") if self._output.exists() else ""

    @property
    def errors(self) -> str:
        return self._errors.read_text("utf-8") if self._errors.exists() else ""

    @property
    def steps(self) -> list[int]:
        return [name.step for name in find_checkpoints(self.paths.checkpoints)]

    @property
    def uploaded(self) -> list[int]:
        """Steps of the checkpoints that are in the bucket with their sidecars."""
        folder = self.folder / "bucket" / "Checkpoints"
        names = [path.name.removesuffix(ARCHIVE_SUFFIX) for path in folder.glob("*.tar.gz")]
        steps = sorted(int(name.split("-")[2].removeprefix("step")) for name in names)
        assert all((folder / f"{name}.json").is_file() for name in names)
        return steps

    @property
    def leftovers(self) -> list[str]:
        found = self.paths.checkpoints.iterdir()
        return [p.name for p in found if p.name.startswith(".saving") or ".tar" in p.name]

    @property
    def lease(self) -> Path:
        return self.folder / "bucket" / "Checkpoints" / ".lease.json"

    def wait_at(self, gate: str) -> None:
        self._wait_until((self.folder / f"at-{gate}").exists, f"gate {gate}")

    def let_go(self, gate: str) -> None:
        (self.folder / f"go-{gate}").touch()

    def wait_for(self, text: str) -> None:
        self._wait_until(lambda: text in self.output + self.errors, text)

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        def check() -> bool:
            assert condition() or not self.has_ended(), f"ended without {what}: {self}"
            return condition()

        wait_until(check, lambda: f"no {what}: {self}")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask for a stop and wait until it has been heard."""
        self.send(number)
        self.wait_for(f"{number.name}: finishing this step, then saving.")

    def has_ended(self, seconds: float = 0.0) -> bool:
        return bool(select.select([self._descriptor], [], [], seconds)[0])

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        if self._code is not None:
            return self._code
        ended = self.has_ended(PATIENCE_SECONDS)
        if not ended:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._descriptor)
        self._code = self._forks.ask({"reap": self.pid})
        assert ended, f"still there after {PATIENCE_SECONDS} s: {self}"
        assert "Traceback" not in self.output + self.errors, str(self)
        return self._code

    def __str__(self) -> str:
        return f"{self.folder.name}\n{self.output}\n{self.errors}"


Start = Callable[..., Trainer]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    served = Forks()
    yield served
    served.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of five steps each, so that a window of one shard ends in the middle of a run."""
    directory = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    for name in (*(f"train_{number:05}" for number in range(NUM_SHARDS)), "val_00000"):
        tokens = random.randint(0, 512, TOKENS_PER_SHARD)
        save_shard(directory / f"{name}.npz", input_ids=tokens.astype(np.uint16))
    return directory


@pytest.fixture(scope="module")
def begin(forks: Forks, data: Path) -> Start:
    """Start a run in a folder; by default a thread writes its checkpoints."""

    def start(
        folder: Path,
        *words: str,
        settings: Sequence[str] | None = (),
        hooks: Sequence[Hook] = (),
        environment: dict[str, str] | None = None,
        writer: bool = False,
    ) -> Trainer:
        hooks = [*hooks, *([] if writer else [("without_writer",)])]
        return Trainer(forks, folder, data, words, settings, hooks, environment or {})

    return start


@pytest.fixture
def start(begin: Start, tmp_path: Path) -> Start:
    """Start a run in a folder of this test."""

    def start_here(*words: str, folder: str = "run", **options: Any) -> Trainer:
        return begin(tmp_path / folder, *words, **options)

    return start_here


@pytest.fixture(scope="module")
def straight(begin: Start, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run from the first to the last step without a stop."""
    trainer = begin(tmp_path_factory.mktemp("straight"), hooks=[("leave_quickly",)])
    assert trainer.end() == 0, str(trainer)
    assert trainer.uploaded == [4, 8, 10]
    return trainer


def curves_of(trainer: Trainer) -> list[object]:
    """Return losses, gradient norms and tokens of every step, and the weights at the end."""
    metrics = read_metrics(trainer.paths.metrics)
    batches: dict[int, str] = {}
    for line in trainer.paths.batches.read_text("utf-8").splitlines():
        record = json.loads(line)
        # A step that is trained again after a kill sees the same tokens.
        assert batches.setdefault(record["step"], record["crc32c"]) == record["crc32c"]
    weights = trainer.paths.checkpoints / name_of(STEPS) / "model.safetensors"
    curves = [metrics.series(key) for key in ("loss", "grad_norm", "learning_rate")]
    return [*curves, batches, weights.read_bytes()]


def assert_goes_on(start: Start, straight: Trainer, **options: Any) -> Trainer:
    """Start again with `--resume latest`: to the end, bit for bit as without the stop."""
    trainer = start(*GO_ON, hooks=[("leave_quickly",)], **options)
    assert trainer.end() == 0, str(trainer)
    for ours, theirs in zip(curves_of(trainer), curves_of(straight), strict=True):
        assert ours == theirs
    assert trainer.steps == trainer.uploaded
    assert trainer.leftovers == []
    assert not trainer.lease.exists()
    return trainer


def assert_stopped(
    trainer: Trainer, steps: list[int], *, by: str = "SIGTERM", uploaded: list[int] | None = None
) -> None:
    """Check an attempt that ended with its state saved: exit code, files, last line."""
    assert trainer.end() == ExitCode.STOPPED, str(trainer)
    assert trainer.steps == steps
    for step in steps:
        assert verify_checkpoint(trainer.paths.checkpoints / name_of(step)).step == step
    assert trainer.uploaded == (steps if uploaded is None else uploaded)
    last = f"Stopped by {by} at step {steps[-1]}, saved. Go on with:"
    assert find_line(trainer, "^Stopped by") == last
    assert not trainer.lease.exists()


def find_line(trainer: Trainer, pattern: str) -> str:
    """Return the one line of the log that matches, without its time."""
    lines = [line[20:] for line in trainer.output.splitlines()]
    (found,) = (line for line in lines if re.search(pattern, line))
    return found


def state_of(trainer: Trainer) -> RunState:
    """Return what the monitor takes an attempt for that is gone."""
    events = read_metrics(trainer.paths.metrics).events
    return judge_run(events, is_alive=False, silent_seconds=1.0, stall_seconds=60.0)[0]


def next_words(trainer: Trainer) -> list[str]:
    """Return the words for train.py in the command that an attempt has printed last."""
    program, file, *words = shlex.split(trainer.output.splitlines()[-1])  # in a pipe: no time
    assert [program, file] == [sys.executable, str(PROJECT_DIRECTORY / "train.py")]
    return words


def plan_of(trainer: Trainer) -> str:
    return find_line(trainer, r"s of grace: ")


def test_a_stop_during_a_step_saves_that_step(start: Start, straight: Trainer) -> None:
    trainer = start(hooks=[("hold_step", 6)], writer=True)
    trainer.wait_at("step")
    trainer.wait_for(f"Verified {name_of(4)}")
    trainer.stop()
    trainer.let_go("step")
    assert_stopped(trainer, [4, 6])
    assert trainer.leftovers == []
    plan = r"\d+ s of grace: save checkpoint \(about \d+ s\), then upload it \(1\.\d MiB at "
    plan += r".*/s, about \d+ s\): it reaches the bucket in time\."
    assert re.fullmatch(plan, plan_of(trainer))
    assert f"Saved {name_of(6)}, verified in the bucket." in trainer.output
    (finishing,) = (
        one for one in read_metrics(trainer.paths.metrics).events if one["event"] == "finishing"
    )
    assert finishing["reason"] == "SIGTERM"  # the monitor tells a stop from a crash by it
    assert_goes_on(start, straight)


def test_each_end_prints_the_command_that_goes_on_bit_for_bit(
    start: Start, straight: Trainer
) -> None:
    trainer = start("--stop-after=3", "--fresh", "--no-background-upload")
    assert trainer.end() == 0, str(trainer)
    words = next_words(trainer)
    assert words[0] == "--no-background-upload"
    assert words[-4:] == ["--resume", "latest", "--max-steps", "10"]
    assert find_line(trainer, "^Ended") == "Ended after step 3 as asked. Go on with:"

    # Without --config, the configuration is that of the run.
    trainer = start("--resume", "latest", settings=None, hooks=[("hold_step", 6)])
    trainer.wait_at("step")
    trainer.stop(signal.SIGINT)
    trainer.let_go("step")
    assert trainer.end() == ExitCode.STOPPED, str(trainer)
    assert next_words(trainer) == ["--resume", "latest"]

    trainer = start(*next_words(trainer), settings=None)
    assert trainer.end() == 0, str(trainer)
    assert curves_of(trainer) == curves_of(straight)
    assert next_words(trainer) == ["--resume", "latest", "--max-steps", "20"]
    assert find_line(trainer, "^To train") == "To train on to step 20:"


def test_a_stop_during_a_save_commits_that_save(start: Start, straight: Trainer) -> None:
    trainer = start(hooks=[("hold_save",), ("hold_step", 6)])
    trainer.wait_at("save")
    trainer.wait_at("step")  # training has gone on
    trainer.stop()
    trainer.let_go("step")
    trainer.wait_for("s of grace: ")
    assert trainer.steps == []
    trainer.let_go("save")
    assert_stopped(trainer, [4, 6])
    assert trainer.output.count("Saving checkpoint at step") == 2
    assert find_line(trainer, "^Saved .* in the bucket").startswith(f"Saved {name_of(6)}")
    assert_goes_on(start, straight)


def test_an_upload_in_progress_is_finished_within_the_grace_period(start: Start) -> None:
    trainer = start(hooks=[HOLD_UPLOAD, ("hold_step", 6)])
    trainer.wait_at("upload")
    trainer.wait_at("step")
    trainer.stop()
    trainer.let_go("step")
    trainer.wait_for("Waiting up to")
    assert trainer.uploaded == []
    trainer.let_go("upload")
    assert_stopped(trainer, [4, 6])
    plan = plan_of(trainer)
    assert "at an unknown speed): whether it reaches the bucket in time is unknown" in plan
    assert plan.endswith(f"Pending, end unknown: {name_of(4)}.")
    outcome = f"Saved {name_of(6)}, verified in the bucket. Verified in the bucket: {name_of(4)}."
    assert find_line(trainer, "^Saved .* in the bucket") == outcome


def test_an_upload_beyond_the_grace_period_goes_up_at_the_next_attempt(
    start: Start, straight: Trainer
) -> None:
    trainer = start(hooks=[HOLD_UPLOAD, ("hold_step", 6)], settings=("grace_seconds=1",))
    trainer.wait_at("upload")
    trainer.wait_at("step")
    trainer.stop()
    trainer.let_go("step")
    assert_stopped(trainer, [4, 6], uploaded=[])
    expected = f"Saved {name_of(6)} on this disk. Not in the bucket, up at the next start: "
    assert find_line(trainer, "up at the next start: ch").startswith(expected)
    assert "ERROR" not in trainer.output
    again = assert_goes_on(start, straight)
    for step in (4, 6):
        assert f"Verified {name_of(step)} in the bucket" in again.output


@pytest.mark.parametrize(
    ("words", "save_steps", "saved"),
    [(["--no-background-upload"], 4, 4), ([], 100, STEPS)],
    ids=["a wait in training", "the wait at the end"],
)
def test_a_stop_while_uploads_are_waited_for_keeps_the_grace_period(
    start: Start, words: list[str], save_steps: int, saved: int
) -> None:
    settings = ("grace_seconds=0.1", f"save_steps={save_steps}")
    trainer = start(*words, hooks=[HOLD_UPLOAD], settings=settings)
    trainer.wait_at("upload")
    if not words:
        trainer.wait_for("Waiting up to 10m00s for 1 upload.")
    trainer.stop()
    assert_stopped(trainer, [saved], uploaded=[])  # the upload is held for ever
    assert "up at the next start: ch" in trainer.output


def test_a_stop_during_an_evaluation_ends_it_without_a_result_and_saves(
    start: Start, straight: Trainer
) -> None:
    trainer = start(hooks=[HOLD_EVALUATION], settings=("eval_steps=3",))
    trainer.wait_at("evaluation")
    trainer.stop()
    trainer.let_go("evaluation")
    assert_stopped(trainer, [3])
    assert "Validation at step" not in trainer.output
    metadata = read_json(trainer.paths.checkpoints / name_of(3) / "metadata.json")
    assert metadata["validation_metrics"]["validation_loss"] is None
    assert "save checkpoint (unknown time)" in plan_of(trainer)
    assert_goes_on(start, straight)


def test_a_stop_while_waiting_for_data_saves_what_was_trained(
    start: Start, straight: Trainer
) -> None:
    order = build_order([[TOKENS_PER_SHARD] * NUM_SHARDS], [1.0], SEQUENCE, SEED, 1)
    (first,), _ = order.upcoming_shards(0)
    hooks = [("hang_in_bucket", f"train_{first:05}.npz")]
    trainer = start(hooks=hooks, settings=("save_steps=100",))
    trainer.wait_at("bucket")
    trainer.wait_for(f"Step {STEPS_PER_SHARD}/")
    trainer.stop()
    assert_stopped(trainer, [STEPS_PER_SHARD])
    assert_goes_on(start, straight)


def test_a_stop_during_the_first_step_loses_nothing_and_leaves(start: Start) -> None:
    trainer = start(hooks=[("hang_in_step", 1)])
    trainer.wait_at("hanging-step")
    trainer.stop()
    assert trainer.end() == ExitCode.STOPPED
    assert "Nothing was trained since the start, so nothing is lost: leaving." in trainer.errors
    assert trainer.steps == []
    assert state_of(trainer) is RunState.STOPPED


@pytest.mark.parametrize(
    ("gate", "hook", "first", "second"),
    [
        ("hanging-step", ("hang_in_step", 6), signal.SIGINT, signal.SIGINT),
        ("save", ("hold_save",), signal.SIGTERM, signal.SIGINT),
        ("save", ("hold_save",), None, signal.SIGKILL),
    ],
)
def test_a_second_signal_leaves_at_once_and_the_next_attempt_recovers(
    start: Start,
    straight: Trainer,
    gate: str,
    hook: Hook,
    first: signal.Signals | None,
    second: signal.Signals,
) -> None:
    """What holds it never lets go: it ends only because it waits for nothing."""
    trainer = start(hooks=[hook, ("hold_step", 7)])
    trainer.wait_at(gate)
    is_saved = gate == "hanging-step"
    if is_saved:
        trainer.wait_for(f"Verified {name_of(4)}")
    if first is not None:
        trainer.stop(first)
    trainer.send(second)
    code = trainer.end()
    if first is None:
        assert code == -second
    else:
        assert code == ExitCode.SIGNAL_BASE + second
        kept = (
            f"{name_of(4)} is kept, later steps are lost" if is_saved else "Nothing was saved yet"
        )
        told = f"\nSecond {second.name}: leaving at once.\n{kept}. Go on with:\n"
        _, _, command = trainer.errors.partition(told)
        assert " --resume latest" in command
        assert state_of(trainer) is RunState.STOPPED
    assert trainer.leftovers == ([] if is_saved else [f".saving-{name_of(4)}"])
    assert trainer.steps == ([4] if is_saved else [])
    assert trainer.lease.exists()
    again = assert_goes_on(start, straight)
    assert not list(again.paths.checkpoints.glob(".uploading-*"))
    told = f"Removing .saving-{name_of(4)}, left by an interrupted"
    assert (told in again.output) != is_saved
    # The dead trainer's hold on the bucket is not waited for.
    assert "from a trainer of this machine that is gone" in again.output


def test_the_live_line_goes_before_the_last_messages(start: Start) -> None:
    trainer = start("--stop-after", "3", hooks=[("use_terminal",), ("leave_quickly",)])
    assert trainer.end() == 0
    trainer.wait_for("--resume latest")
    trainer.let_go("hang-up")
    before, _, last = trainer.output.partition("Ended after step 3 as asked")
    assert last
    assert ERASE_LINE in before
    assert ERASE_LINE not in last


@pytest.mark.parametrize("words", [(), ("--quiet",)])
def test_a_terminal_that_goes_away_stops_the_run_saved(start: Start, words: tuple[str]) -> None:
    trainer = start(*words, hooks=[("use_terminal",), ("hold_step", 6)])
    trainer.wait_at("step")
    trainer.let_go("hang-up")
    output = Path(f"/proc/{trainer.pid}/fd/1")  # the terminal, and then nowhere
    wait_until(lambda: output.readlink() == Path(os.devnull), lambda: str(trainer))
    trainer.send(signal.SIGHUP)  # as a shell passes it on
    trainer.let_go("step")
    assert trainer.end() == ExitCode.STOPPED
    assert trainer.steps == trainer.uploaded == [4, 6]
    assert trainer.leftovers == []
    assert "Stopped by SIGHUP" in trainer.paths.train_log.read_text()


def test_a_preemption_notice_saves_and_a_signal_after_it_is_no_second_one(
    start: Start, serve: Serve
) -> None:
    metadata_server = serve(say("FALSE"))
    environment = {"GCE_METADATA_HOST": metadata_server.address}
    trainer = start(hooks=[("hold_step", 3)], environment=environment)
    trainer.wait_at("step")
    assert metadata_server.asked.wait(PATIENCE_SECONDS)
    metadata_server.answers[:] = [say("TRUE")]
    trainer.wait_for("This machine is being preempted.")
    trainer.send(signal.SIGTERM)  # as the machine's own shutdown does
    trainer.wait_for("SIGTERM: stopping already (preemption notice).")
    trainer.let_go("step")
    assert_stopped(trainer, [3], by="preemption notice")
    assert f"Saved {name_of(3)}, verified in the bucket." in trainer.output


def test_of_two_trainers_on_one_prefix_one_trains_and_the_other_names_it(
    start: Start, tmp_path: Path
) -> None:
    settings = (f"checkpoint_uri={tmp_path / 'shared'}", "max_steps=3")
    hooks = [("beat", 0.3), HOLD_LEASE, ("hold_step", 2)]
    pair = [start(folder=name, settings=settings, hooks=hooks) for name in ("left", "right")]
    for trainer in pair:
        trainer.wait_at("lease")
    for trainer in pair:
        trainer.let_go("lease")
    wait_until(lambda: any(t.has_ended() for t in pair), lambda: f"{pair[0]}\n{pair[1]}")
    loser, winner = sorted(pair, key=lambda trainer: not trainer.has_ended())
    assert loser.end() == ExitCode.USAGE
    assert "shared is in use by another trainer (run 2" in loser.errors
    assert f", process {winner.pid} on " in loser.errors
    assert len(loser.errors.strip().splitlines()) == 1
    assert loser.steps == []
    assert "Step 1/" not in loser.output
    winner.wait_at("step")
    winner.let_go("step")
    assert winner.end() == 0
    assert winner.steps == [3]


def test_a_new_run_that_waited_for_the_bucket_is_refused_what_came_there(
    start: Start, tmp_path: Path
) -> None:
    settings = (f"checkpoint_uri={tmp_path / 'shared'}", "max_steps=3")
    first = start(folder="first", settings=settings, hooks=[*BEAT_RARELY, ("hold_step", 2)])
    first.wait_at("step")
    second = start(folder="second", settings=settings, hooks=BEAT_RARELY)
    second.wait_for("Waiting up to 600 s to see whether that trainer is alive.")
    first.let_go("step")
    assert first.end() == 0
    assert second.end() == ExitCode.PREFLIGHT, str(second)
    assert "shared/Checkpoints holds checkpoints of another run" in second.errors
    assert "Step 1/" not in second.output
    assert second.steps == []
    assert [path.suffix for path in (tmp_path / "shared/Checkpoints").iterdir()].count(".gz") == 1


def test_a_replacement_that_waited_goes_on_from_what_its_predecessor_saved_last(
    start: Start, straight: Trainer, tmp_path: Path
) -> None:
    settings = (f"checkpoint_uri={tmp_path / 'shared'}",)
    first = start(folder="first", settings=settings, hooks=[*BEAT_RARELY, ("hold_step", 7)])
    first.wait_at("step")
    first.wait_for(f"Verified {name_of(4)}")
    second = start(*GO_ON, folder="second", settings=settings, hooks=BEAT_RARELY)
    second.wait_for("Waiting up to 600 s to see whether that trainer is alive.")
    first.stop()
    first.let_go("step")
    assert first.end() == ExitCode.STOPPED
    assert first.steps == [4, 7]
    assert second.end() == 0, str(second)
    assert second.steps == [7, 8, STEPS]
    assert f"Resumed from checkpoints/{name_of(7)} (step 7)." in second.output
    assert find_line(second, "^run ").startswith(f"run        steps 7 to {STEPS}, ")
    record = json.loads(second.paths.metrics.read_text("utf-8").splitlines()[0])
    assert (record["event"], record["step"]) == ("resume", 7)
    weights = [t.paths.checkpoints / name_of(STEPS) for t in (second, straight)]
    one, other = ((path / "model.safetensors").read_bytes() for path in weights)
    assert one == other


def test_a_new_run_that_waited_for_the_directory_does_not_begin_beside_what_came_there(
    start: Start,
) -> None:
    settings = ("checkpoint_uri=", "max_steps=3")
    first = start(settings=settings, hooks=[("hold_step", 2)])
    first.wait_at("step")
    patient = ("put", "utils.checkpoints.store", "OUTPUT_LOCK_SECONDS", PATIENCE_SECONDS)
    second = start(settings=settings, hooks=[HOLD_DIRECTORY, patient])
    second.wait_at("directory")
    second.let_go("directory")
    first.let_go("step")
    assert first.end() == 0
    assert second.end() == ExitCode.USAGE, str(second)
    assert "checkpoints already holds checkpoints up to step 3." in second.errors
    for way in ("--resume latest", "--fresh"):
        assert way in second.errors
    assert second.steps == [3]
    assert not second.paths.set_aside.exists()


def test_out_of_gpu_memory_is_one_message_after_the_save_and_its_upload(start: Start) -> None:
    trainer = start(hooks=[("hold_save",), ("run_out_of_gpu_memory", 6)])
    trainer.wait_at("save")
    trainer.wait_for("Out of memory: finishing the save and the uploads in progress.")
    assert trainer.steps == []
    trainer.let_go("save")
    assert trainer.end() == ExitCode.UNEXPECTED
    assert trainer.steps == trainer.uploaded == [4]
    assert trainer.errors.startswith("Error: Out of GPU memory. Lower per_device_train_batch_size")
    message, command = trainer.errors.strip().splitlines()
    for advice in ("gradient_checkpointing=true", "smaller model"):
        assert advice in message
    assert re.search(r"--resume latest --max-steps \d+$", command)


def test_out_of_host_memory_is_one_message_after_the_save_and_its_upload(start: Start) -> None:
    settings = ("per_device_train_batch_size=1024", "global_batch_size=1024", "save_steps=2")
    hooks: list[Hook] = [("hold_save",), ("limit_memory", 3, 48 * 2**20, "save")]
    trainer = start(hooks=hooks, settings=settings)
    trainer.wait_for("Out of memory: finishing the save and the uploads in progress.")
    assert trainer.steps == []
    trainer.let_go("save")
    assert trainer.end() == ExitCode.UNEXPECTED, str(trainer)
    assert trainer.errors.startswith("Error: Out of host memory. Lower per_device_train_batch_size")
    assert len(trainer.errors.strip().splitlines()) == 2
    assert trainer.steps == trainer.uploaded == [2]
