"""What trackers are given: names, steps that only grow, no failure that reaches the run."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.training_config import TrainingConfig
from utils.base.errors import ConfigError
from utils.checkpoints.layout import RunIdentity
from utils.tracking import tracking
from utils.tracking.event_file import EventFile
from utils.tracking.metrics_log import read_metrics
from utils.tracking.tensorboard import TensorBoardTracker, describe_configuration
from utils.tracking.tracker import RunStart, RunTracker, group_metrics
from utils.tracking.tracking import Notes, build_trackers, find_hyperparameters, metrics_of
from utils.tracking.wandb import WandbTracker

IDENTITY = RunIdentity("20260102-0a1b2c3d")
FULL = OSError(errno.ENOSPC, "No space left on device")


class Recorder(RunTracker):
    """Keeps what it is given, and fails when it is told to."""

    name = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, list[str], int]] = []
        self.steps: list[int] = []
        self.error: Exception | None = None

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if self.error is not None:
            raise self.error
        self.steps.append(step)

    def _log_lines(self, title: str, lines: Sequence[str], step: int) -> None:
        self.lines.append((title, list(lines), step))


def start_of(step: int = 0, branch: int = 0, **values: Any) -> RunStart:
    config = TrainingConfig(**values)
    facts = {"run_id": IDENTITY.run_id, "tokens_per_step": 128, "precision": "bf16"}
    identity = RunIdentity(IDENTITY.run_id, branch)
    return RunStart(identity, step, config, facts, find_hyperparameters(config, facts))


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def texts(directory: Path, tag: str) -> dict[int, str]:
    """Return texts as TensorBoard's own loader has them: `EventAccumulator` purges scalars only."""
    events = plugin_event_accumulator.EventAccumulator(str(directory))
    events.Reload()
    found: dict[int, str] = {}
    for event in events.Tensors(f"{tag}/text_summary"):
        assert event.step not in found
        found[event.step] = event.tensor_proto.string_val[0].decode()
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(autouse=True)
def partial_state() -> Any:
    """Trackers ask Accelerate whether they are on the main process."""
    from accelerate.state import PartialState

    PartialState(cpu=True)
    yield
    PartialState._reset_state()


def test_metrics_have_groups_on_boards_and_flat_names_in_the_file() -> None:
    record = {
        "loss": 1,
        "validation_loss": 3.0,
        "best_validation_loss": 4.0,
        "validation_perplexity": 5.0,
        "learning_rate": 0.1,
        "mfu": 0.5,
        "something_new": 7,
        "note": "text",
    }
    assert sorted(group_metrics(record).items()) == [  # as a board sorts them
        ("loss/train", 1.0),
        ("loss/validation", 3.0),
        ("loss/validation_best", 4.0),
        ("optimizer/learning_rate", 0.1),
        ("speed/mfu", 0.5),
        ("train/something_new", 7.0),
        ("validation/perplexity", 5.0),
    ]


def test_hyperparameters_are_flat_and_their_types_are_what_a_board_takes() -> None:
    config = TrainingConfig(model_overrides={"hidden_size": 64, "rope": {"a": 1}}, bf16=True)
    found = find_hyperparameters(config, {"tokens_per_step": 99, "pid": 1})
    assert found["model_overrides.hidden_size"] == 64
    assert found["model_overrides.rope"] == '{"a": 1}'
    assert (found["bf16"], found["fp16"], found["tokens_per_step"]) == ("true", "null", 99)
    assert "pid" not in found
    assert {type(value) for value in found.values()} <= {int, float, str}


def test_a_tracker_is_made_once_and_its_package_must_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(report_to=["tensorboard", "tensorboard"])
    names = [tracker.name for tracker in build_trackers(config, tmp_path / "metrics.jsonl")]
    assert names == ["jsonl", "tensorboard"]
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to names wandb, which is not installed"):
        build_trackers(TrainingConfig(report_to=["wandb"]), tmp_path / "metrics.jsonl")


# Notes: events of any thread, steps that only grow.


def notes_for(step: int = 0) -> tuple[Notes, Recorder]:
    recorder = Recorder()
    accelerator: Any = SimpleNamespace(trackers=[recorder])
    return Notes(accelerator, step), recorder


def test_what_was_noted_since_the_last_step_is_one_text() -> None:
    notes, recorder = notes_for()
    notes.write(1)
    notes.add("uploads", "a verified")
    notes.add("uploads", "b\nfailed\x1b[2J")
    notes.add("checkpoints", "step 2 saved", 2)
    notes.write(4)
    notes.write(5)
    assert recorder.lines == [
        ("uploads", ["a verified", "b?failed?[2J"], 4),
        ("checkpoints", ["step 2 saved"], 2),
    ]


def test_no_title_gets_a_step_twice_until_the_end() -> None:
    notes, recorder = notes_for(step=10)
    notes.add("uploads", "of the attempt before")
    notes.write(10)  # that one may have a text at its last step
    assert recorder.lines == []
    notes.write(11)
    notes.add("uploads", "late")
    notes.write(11)
    notes.write(12)
    notes.add("uploads", "at the end")
    notes.write(12, is_last=False)
    notes.write(13, is_last=True)
    assert [step for _, _, step in recorder.lines] == [11, 12, 13]
    notes.add("uploads", "nothing was trained")
    notes.write(13, is_last=True)
    assert recorder.lines[-1] == ("uploads", ["nothing was trained"], 13)


def test_notes_of_many_threads_all_arrive() -> None:
    notes, recorder = notes_for()
    threads = [
        threading.Thread(target=lambda: [notes.add("uploads", str(i)) for i in range(200)])
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    step = 0
    while any(thread.is_alive() for thread in threads):
        notes.write(step := step + 1)
    notes.write(step + 1)
    assert sum(len(lines) for _, lines, _ in recorder.lines) == 1200


# A tracker that fails.


def test_a_tracker_that_fails_says_so_once_until_it_works_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Recorder()
    for step, error in enumerate([None, FULL, FULL, None, RuntimeError("gone\x1b")]):
        recorder.error = error
        recorder.log({"loss": 1.0}, step=step)
    assert recorder.steps == [0, 3]
    assert warnings(caplog) == [
        "recorder cannot be written: No space left on device. Training goes on.",
        "recorder cannot be written: gone?. Training goes on.",
    ]


def test_a_board_that_could_not_begin_begins_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / IDENTITY.run_id).write_text("in the way")
    tracker = TensorBoardTracker(tmp_path)
    tracker.begin(start_of())
    tracker.log({"loss": 1.0}, step=1)
    assert len(warnings(caplog)) == 1
    assert "TensorBoard cannot be written" in warnings(caplog)[0]
    (tmp_path / IDENTITY.run_id).unlink()
    tracker.log({"loss": 2.0}, step=2)
    tracker.end("done")
    tracker.end("done")
    tracker.log({"loss": 3.0}, step=3)
    events = read(tmp_path / IDENTITY.run_id)
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(2, 2.0)]


@pytest.mark.parametrize("records", [0, 2])
def test_a_full_disk_at_the_start_and_the_end_of_a_run_is_told_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, records: int
) -> None:
    def fail(*_: Any) -> None:
        raise FULL

    left = records
    whole = EventFile.write

    def write(self: EventFile, record: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise FULL
        whole(self, record)

    monkeypatch.setattr(tracking, "append_metrics", fail)
    monkeypatch.setattr(EventFile, "write", write)
    config = TrainingConfig()
    accelerator: Any = SimpleNamespace(
        is_main_process=True,
        trackers=build_trackers(config, tmp_path / "metrics.jsonl"),
        init_trackers=lambda name: None,
    )
    tracking.start_trackers(accelerator, config, tmp_path, IDENTITY, {}, 0, {})
    for tracker in accelerator.trackers:
        tracker.log({"loss": 1.0}, step=1)
    tracking.record_rollback(accelerator, tmp_path, 0)
    tracking.record_end(accelerator, tmp_path, 1, "done")
    assert all("No space left" in message for message in warnings(caplog))
    assert len([m for m in warnings(caplog) if "TensorBoard" in m]) == 1
    assert not list(tmp_path.rglob("events.*"))  # nothing half is left for TensorBoard


# TensorBoard.


def test_a_rollback_takes_the_curve_back_and_samples_are_shown_as_they_are(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    tracker.begin(start_of())
    for step, value in [(1, 0), (2, 0), (3, 0), (4, 0)]:
        tracker.log({"loss": value}, step=step)
    tracker.roll_back(2)
    tracker.log({"loss": 1}, step=3)
    tracker.log_samples([("", "a text"), ("In", " the\n*year*")], 3)
    tracker.end("done")
    folder = tmp_path / IDENTITY.run_id
    assert texts(folder, "samples")[3] == (
        "    (end of text)\n\ngoes on with\n\n    a text\n\n---\n\n"
        "    In\n\ngoes on with\n\n     the\n    *year*"
    )
    events = read(folder)
    found = [(e.step, e.value) for e in events.Scalars("loss/train")]
    assert found == [(1, 0), (2, 0), (3, 1)]
    assert set(events.PluginTagToContent("hparams")) == {
        f"_hparams_/{name}" for name in ("experiment", "session_start_info", "session_end_info")
    }


def test_the_configuration_cannot_break_its_table() -> None:
    start = start_of(sample_prompts=["a|b`c\n\x1b"], run_name="x|y")
    shown = describe_configuration(replace(start, facts={"device": "\x1b[2J\n"}))
    rows = [line for line in shown.split("\n") if line.startswith("|")]
    assert all(row.replace("\\|", "").count("|") == 3 for row in rows)
    assert "| run_name | `x\\|y` |" in rows
    assert "\x1b" not in shown


HISTORY = {
    "steps": [2, 4, 6],
    "loss_history": [3.0, None, 1.0],
    "learning_rates": [0.1, 0.2, 0.3],
    "grad_norms": [1.0, 1.0, 1.0],
    "tokens_per_second": [9.0, 9.0, 9.0],
    "validation": [
        {"step": 4, "validation_loss": 2.0},
        {"step": 5, "validation_loss": None},
        {"step": 6, "validation_loss": 2.5},
    ],
}


def test_a_history_becomes_the_metrics_that_were_logged() -> None:
    found = dict(metrics_of(HISTORY))
    assert list(found) == [2, 4, 5, 6]
    assert found[2]["perplexity"] == pytest.approx(20.0855, abs=1e-3)
    assert "loss" not in found[4]
    assert found[5] == {"best_validation_loss": 2.0}
    assert found[6]["best_validation_loss"] == 2.0


@pytest.mark.parametrize(("logged", "expected"), [([], [2, 4, 6]), ([2, 4], [6]), ([2, 4, 6], [])])
def test_another_machine_fills_in_the_part_of_the_curve_that_it_has_not(
    tmp_path: Path, logged: list[int], expected: list[int]
) -> None:
    def start(step: int, history: Mapping[str, Any]) -> list[RunTracker]:
        config = TrainingConfig()
        trackers = build_trackers(config, tmp_path / "metrics.jsonl")
        accelerator: Any = SimpleNamespace(
            is_main_process=True, trackers=trackers, init_trackers=lambda name: None
        )
        tracking.start_trackers(accelerator, config, tmp_path, IDENTITY, {}, step, history)
        return trackers

    if logged:
        for tracker in start(0, {}):
            for step in logged:
                tracker.log({"loss": 0.0, "learning_rate": 0.0}, step=step)
            tracker.end("stopped")
    for tracker in start(6, HISTORY):
        tracker.log({"loss": 0.0, "learning_rate": 0.0}, step=8)
        tracker.end("done")
    events = read(tmp_path / IDENTITY.run_id)
    found = [
        (event.step, round(event.value, 3)) for event in events.Scalars("optimizer/learning_rate")
    ]
    brought = {2: 0.1, 4: 0.2, 6: 0.3}
    steps = sorted({*logged, *expected, 8})
    assert found == [(step, brought[step] if step in expected else 0.0) for step in steps]
    attempts = read_metrics(tmp_path / "metrics.jsonl").events
    kinds = [event["event"] for event in attempts]
    assert kinds == (["start", "resume"] if logged else ["resume"])
    assert [event["config"] for event in attempts] == [TrainingConfig().to_json()] * len(kinds)


# W&B, with Accelerate's tracker taken away.


class Inner:
    """Notes what W&B would get."""

    def __init__(self, step: int) -> None:
        self.steps: list[int] = []
        self.tracker = SimpleNamespace(step=step, offline=False, url=None, dir="", finish=print)

    def store_init_configuration(self, values: Any) -> None:
        pass

    def log(self, values: Any, step: int) -> None:
        self.steps.append(step)

    def log_table(self, name: str, columns: Any, rows: Any, step: int) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.steps.append(step)


@pytest.fixture
def inner(monkeypatch: pytest.MonkeyPatch) -> Inner:
    made = Inner(step=21)
    monkeypatch.setattr("utils.tracking.wandb.find_mode", lambda: "offline")
    monkeypatch.setattr(WandbTracker, "_init", lambda self, start, mode: made)
    return made


def test_wandb_gets_no_step_that_it_has(tmp_path: Path, inner: Inner) -> None:
    tracker = WandbTracker(tmp_path)
    tracker.log({"loss": 1.0}, step=1)  # before it has begun
    tracker.begin(start_of(step=20))
    for step in (20, 21, 22, 22):
        tracker.log({"loss": 1.0}, step=step)
    tracker.roll_back(20)
    tracker.log({"loss": 1.0}, step=21)
    tracker.log_lines("uploads", ["late"], 5)
    tracker.log_samples([("a", "b")], 23)
    tracker.log_lines("uploads", ["later"], 24)
    assert inner.steps == [21, 22, 22, 22, 23, 24]


def test_wandb_that_cannot_be_reached_is_kept_offline(
    tmp_path: Path, inner: Inner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes: list[str | None] = []

    def init(self: WandbTracker, start: RunStart, mode: str | None) -> Inner:
        modes.append(mode)
        if mode is None:
            raise TimeoutError("no answer\x1b[2J in 30 s")
        return inner

    monkeypatch.setattr("utils.tracking.wandb.find_mode", lambda: None)
    monkeypatch.setattr(
        "utils.tracking.wandb._import_wandb", lambda: SimpleNamespace(teardown=lambda: None)
    )
    monkeypatch.setattr(WandbTracker, "_init", init)
    tracker = WandbTracker(tmp_path)
    tracker.begin(start_of())
    tracker.log({"loss": 1.0}, step=30)
    assert modes == [None, "offline"]
    assert inner.steps == [30]
    (message,) = warnings(caplog)
    assert message.startswith("W&B cannot be reached (no answer?[2J in 30 s)")
