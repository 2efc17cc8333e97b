"""train.py after faults: what was lost is told, what is left is exact, nothing else is touched."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.sample_checkpoints import seal
from tests.sample_shards import flip_bit
from tests.small_models import training_state
from tests.test_train import differences, state_differences
from utils import training_utils
from utils.base.errors import ExitCode, TransientStorageError
from utils.checkpoints import saver
from utils.checkpoints.layout import find_checkpoints, read_json, read_manifest, write_json
from utils.checkpoints.snapshot import Snapshot
from utils.checkpoints.store import verify_checkpoint
from utils.data.mixture import build_order
from utils.tracking.metrics_log import read_metrics
from utils.training.division import SNAPSHOT_MARGIN_BYTES

Train = Callable[..., int]
EVERY_STEP = ("logging_steps=1", "record_batches=true")
OPTIMIZERS = [
    "adamw_torch_fused",
    pytest.param(
        "adamw_bnb_8bit",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("bitsandbytes") is None,
            reason="an optional package: pip install bitsandbytes",
        ),
    ),
    "adafactor",
    "muon",
]


def name(step: int, epoch: int = 0, files: int = 0) -> str:
    return f"checkpoint-epoch{epoch}-step{step}-files{files}"


def directory(tmp_path: Path, folder: str = "run") -> Path:
    return tmp_path / folder / "checkpoints"


def steps(tmp_path: Path, folder: str = "run") -> list[int]:
    return [found.step for found in find_checkpoints(directory(tmp_path, folder))]


def losses(tmp_path: Path, folder: str = "run") -> tuple[list[int], list[float]]:
    return read_metrics(tmp_path / folder / "logs/metrics.jsonl").series("loss")


def batches(tmp_path: Path, folder: str = "run") -> dict[int, set[str]]:
    """Return the checksums of each step's tokens; a step that was done twice may have two."""
    found: dict[int, set[str]] = {}
    for line in (tmp_path / folder / "logs/batches.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], set()).add(record["crc32c"])
    return found


def assert_same_end(tmp_path: Path, left: str, right: str) -> None:
    """The last checkpoints of two folders are bit-identical in all that training depends on."""
    first, second = (
        directory(tmp_path, folder) / str(find_checkpoints(directory(tmp_path, folder))[-1])
        for folder in (left, right)
    )
    assert first.name == second.name
    assert not state_differences(first, second)
    random_states = "random_states_0.pkl"
    assert (first / random_states).read_bytes() == (second / random_states).read_bytes()


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """Two training shards of 12 samples each: an epoch is six steps."""
    folder = tmp_path / "small-data"
    folder.mkdir()
    random = np.random.default_rng(5)
    for number in range(2):
        tokens = random.integers(0, 512, 12 * 32, dtype=np.uint16)
        np.savez(folder / f"train_{number:05d}.npz", input_ids=tokens)
    np.savez(folder / "val_00000.npz", input_ids=random.integers(0, 512, 200, dtype=np.uint16))
    return folder


# The same tokens and losses, however often it is interrupted.


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resumed_any_number_of_times_also_in_the_second_epoch(
    run_train: Train, tmp_path: Path, small_data: Path, optim: str
) -> None:
    # Dropout: what is done after a stop depends on the random states. Stops lie between log lines.
    settings = (f"data_uri={small_data}", *EVERY_STEP, "logging_steps=3", f"optim={optim}")
    settings += ("model_overrides.hidden_dropout=0.1",)
    words = ("--max-steps", "15", "--resume", "latest")
    assert run_train(*words, folder="straight", settings=settings) == 0
    for stop in ("1", "7", "13", "15"):
        assert run_train(*words, "--stop-after", stop, settings=settings) == 0
    assert batches(tmp_path) == batches(tmp_path, "straight")
    assert all(len(found) == 1 for found in batches(tmp_path).values())
    assert losses(tmp_path) == losses(tmp_path, "straight")
    assert losses(tmp_path)[0] == [3, 6, 9, 12, 15]
    assert read_json(directory(tmp_path) / name(15, 2) / "data_state.json")["epoch"] == 2
    assert_same_end(tmp_path, "straight", "run")


# Damaged, foreign and lost checkpoints.


def test_when_nothing_can_be_used_it_does_not_begin_anew_by_itself(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("save_steps=2", "checkpoint_uri=")
    assert run_train("--max-steps", "4", settings=settings) == 0
    for step in (2, 4):
        flip_bit(directory(tmp_path) / name(step) / "model.safetensors")
    assert run_train("--max-steps", "6", "--resume", "latest", settings=settings) == 2
    assert "None of the 2 checkpoints of this run can be used" in capsys.readouterr().err


def test_a_checkpoint_that_is_whole_but_does_not_load_is_set_aside(
    run_train: Train, tmp_path: Path
) -> None:
    """Its hashes are right: it was written so."""
    settings = ("save_steps=2", "checkpoint_uri=")
    assert run_train("--max-steps", "4", settings=settings) == 0
    newest = directory(tmp_path) / name(4)
    (newest / "optimizer.bin").write_bytes(b"this is no optimizer")
    run_id = read_manifest(newest).run_id
    seal(newest, 4)
    path = newest / "manifest.json"
    write_json(path, {**read_json(path), "run_id": run_id})
    assert run_train("--max-steps", "6", "--resume", "latest", settings=settings) == 0
    assert (directory(tmp_path) / "set-aside" / name(4)).is_dir()
    assert steps(tmp_path) == [2, 4, 6]


def test_a_checkpoint_that_does_not_fit_is_refused_and_none_is_moved(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("save_steps=2", "checkpoint_uri=")
    assert run_train("--max-steps", "4", settings=settings) == 0
    other = (*settings, "model_overrides.hidden_size=64")
    words = ("--max-steps", "6", "--resume", "latest")
    assert run_train(*words, settings=other) == 2
    assert "--accept-config-change" in capsys.readouterr().err
    assert run_train(*words, "--accept-config-change", settings=other) == 2
    told = capsys.readouterr().err
    assert f"{name(4)} does not fit this model" in told
    assert "size mismatch for " in told
    assert steps(tmp_path) == [2, 4]
    assert not (directory(tmp_path) / "set-aside").exists()


@pytest.mark.parametrize("fault", ["corrupt", "unlisted"])
def test_lost_random_states_are_refused_unless_accepted(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    settings = ("save_steps=2", "checkpoint_uri=")
    assert run_train("--max-steps", "6", "--stop-after", "2", settings=settings) == 0
    newest = directory(tmp_path) / name(2)
    if fault == "corrupt":
        flip_bit(newest / "random_states_0.pkl")
    else:
        (newest / "random_states_0.pkl").unlink()
        manifest = read_json(newest / "manifest.json")
        del manifest["files"]["random_states_0.pkl"]
        write_json(newest / "manifest.json", manifest)
    words = ("--max-steps", "6", "--resume", "2")
    assert run_train(*words, settings=settings) == 2
    assert "random_states_0.pkl" in capsys.readouterr().err
    assert steps(tmp_path) == [2]
    assert run_train(*words, "--accept-missing-random-state", settings=settings) == 0
    assert "random states are seeded anew from (seed, step, rank)" in capsys.readouterr().out


# Saving and uploading under difficulties.


class FailingSave:
    """torch.save as on a disk that is full at some saves: the second call fails, say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: set[int]) -> None:
        self._save, self._failing, self.saves = torch.save, failing, 0
        monkeypatch.setattr("torch.save", self)

    def __call__(self, value: Any, *args: Any, **options: Any) -> None:
        if "param_groups" in value:
            self.saves += 1
            if self.saves in self._failing:
                raise OSError(28, "No space left on device")
        self._save(value, *args, **options)


def test_a_save_that_fails_does_not_end_the_run(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    FailingSave(monkeypatch, {2, 3})  # that of step 4, and the last one, which is tried once more
    settings = ("save_steps=2", "background_save=false")
    assert run_train("--max-steps", "6", settings=settings) == 0
    assert steps(tmp_path) == [2, 6]
    told = capsys.readouterr().out
    assert f"{name(4)} could not be saved: No space left on device" in told
    assert not list(directory(tmp_path).glob(".saving-*"))


def test_a_failed_save_is_tried_again_in_a_minute(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FailingSave(monkeypatch, {1})
    monkeypatch.setattr("utils.run.saving.SAVE_RETRY_SECONDS", 0.0)
    settings = ("save_steps=2", "background_save=false")
    assert run_train("--max-steps", "4", settings=settings) == 0
    assert steps(tmp_path) == [3, 4]


def test_a_failed_save_may_stop_the_run(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    FailingSave(monkeypatch, {2, 3, 4})
    settings = ("save_steps=2", "background_save=false", "failed_save=stop")
    assert run_train("--max-steps", "20", settings=settings) == ExitCode.UNEXPECTED
    assert steps(tmp_path) == [2]
    assert "could not be saved" in capsys.readouterr().err
    events = read_metrics(tmp_path / "run/logs/metrics.jsonl").events
    assert events[-1]["outcome"] == "failed"
    assert events[-1]["step"] < 6


def test_a_save_that_is_due_while_one_is_written_is_skipped_or_waited_for(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each save is written once training waits for it, and not before."""
    write, wait, is_waited_for = saver.write_files, saver.CheckpointSaver.wait, threading.Event()

    def write_late(*args: Any) -> Any:
        is_waited_for.clear()
        assert is_waited_for.wait(300)
        return write(*args)

    def note_wait(self: saver.CheckpointSaver, seconds: float | None = None) -> bool:
        if self.is_busy:
            is_waited_for.set()
        return wait(self, seconds)

    monkeypatch.setattr(saver, "write_files", write_late)
    monkeypatch.setattr(saver.CheckpointSaver, "wait", note_wait)
    monkeypatch.setattr(saver.WriterProcess, "is_ready", lambda self: False)
    settings = ("save_steps=1", "keep_checkpoints=9", "checkpoint_uri=")
    assert run_train("--max-steps", "4", folder="wait", settings=settings) == 0
    assert steps(tmp_path, "wait") == [1, 2, 3, 4]
    skip = (*settings, "save_overlap=skip")
    words = ("--max-steps", "9", "--stop-after", "4")
    assert run_train(*words, folder="skip", settings=skip) == 0
    assert steps(tmp_path, "skip") == [1, 4]  # the end is never skipped
    told = capsys.readouterr().out
    assert "is not saved: the save before it is still being written" in told


def test_a_bad_shard_in_the_middle_costs_no_step(
    run_train: Train, tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = np.full(12 * 32, 600, dtype=np.uint16)  # beyond the vocabulary
    (first,), _ = build_order([[12 * 32] * 2], [1.0], 32, 1, 1).upcoming_shards(0)
    np.savez(small_data / f"train_{1 - first:05d}.npz", input_ids=damaged)
    settings = (f"data_uri={small_data}", "shuffle_window_shards=1", "logging_steps=1", "seed=1")
    assert run_train("--max-steps", "6", settings=settings) == ExitCode.USAGE
    assert f"train_{1 - first:05d}.npz" in capsys.readouterr().err
    assert steps(tmp_path) == [3]  # all that the good shard gives
    verify_checkpoint(directory(tmp_path) / str(find_checkpoints(directory(tmp_path))[0]))


# Bad steps.


class BadLosses:
    """Makes the loss of chosen steps bad: four micro-steps a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
        importlib.import_module("utils.run.evaluation")  # it keeps the function that it finds
        self._forward, self._factors, self.calls = training_utils.forward_loss, factors, 0
        monkeypatch.setattr(training_utils, "forward_loss", self)

    def __call__(self, *args: Any) -> torch.Tensor:
        self.calls += 1
        return self._forward(*args) * self._factors.get((self.calls + 3) // 4, 1.0)


def test_a_bad_step_stops_the_run_saved_and_it_goes_on_after_it(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    BadLosses(monkeypatch, {3: float("nan")})
    assert run_train("--max-steps", "6", settings=EVERY_STEP) == ExitCode.UNEXPECTED
    told = capsys.readouterr()
    assert "Step 3 is bad: non-finite" in told.out
    assert "Step 3 was bad" in told.err
    assert "--set bad_step=skip" in told.err
    assert steps(tmp_path) == [3]
    (bad,) = read_json(directory(tmp_path) / name(3) / "metadata.json")["bad_steps"]
    assert (bad["step"], bad["kind"], bad["loss"], bad["policy"]) == (3, "non-finite", None, "stop")
    weights = load_file(directory(tmp_path) / name(3) / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert run_train("--max-steps", "6", "--resume", "latest", settings=EVERY_STEP) == 0
    assert sorted(batches(tmp_path)) == [1, 2, 3, 4, 5, 6]
    assert len({crc for found in batches(tmp_path).values() for crc in found}) == 6


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_bad_step_changes_nothing_but_the_schedule(
    monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
    generator = torch.Generator().manual_seed(1)
    batch = [torch.randint(0, 4096, (1, 64), generator=generator) for _ in range(4)]
    with training_state({"model_overrides": shape, "optim": optim}) as state:
        state.guard.is_on_device = optim == "adamw_torch_fused"  # as on a GPU
        BadLosses(monkeypatch, {2: float("inf")})
        training_utils.train_step(state, batch, 1.0)

        def capture() -> Any:
            moments = state.optimizer.state_dict()["state"]
            return copy.deepcopy([list(state.core_model.parameters()), moments])

        held = state.division.held_state()
        size = Snapshot.size_of([held.weights, held.optimizer])
        assert size <= state.division.snapshot_bytes() < size + 1.1 * SNAPSHOT_MARGIN_BYTES
        before, rate = capture(), state.learning_rate
        training_utils.train_step(state, batch, 1.0)
        assert not differences(capture(), before)
        assert state.learning_rate != rate
        training_utils.train_step(state, batch, 1.0)
        assert differences(capture(), before)
        assert [v.code for v in state.guard.take(newest=True)] == [0, 1, 0]
        assert state.interval[1].item() == 2
        assert state.progress.step == 3


def read_strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_skip_leaves_bad_steps_out_and_the_window_of_spikes_comes_back(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BadLosses(monkeypatch, {3: float("nan"), 5: 1e6})
    settings = (*EVERY_STEP, "bad_step=skip", "spike_sigma=20", "spike_window=3")
    words = ("--max-steps", "8", "--resume", "latest", "--stop-after")
    for last in (3, 8):  # the first attempt ends with a bad step
        assert run_train(*words, str(last), settings=settings) == 0
        checkpoint = directory(tmp_path) / name(last)
        history = read_strict_json((checkpoint / "training_metrics.json").read_text())
        metadata = read_strict_json((checkpoint / "metadata.json").read_text())
        for known in (history, metadata):
            bad = [step for step, loss in enumerate(known["loss_history"], 1) if loss is None]
            assert (bad, len(known["loss_history"])) == ([3, 5][: 1 + (last == 8)], last)
        assert history["grad_norms"][2] is None
        assert (metadata["current_loss"] is None) == (last == 3)
    found = [(bad["step"], bad["kind"]) for bad in metadata["bad_steps"]]
    assert found == [(3, "non-finite"), (5, "spike")]
    curve = dict(zip(*losses(tmp_path), strict=True))
    assert set(curve) == {1, 2, 4, 6, 7, 8}  # a bad step has no loss
    assert max(curve.values()) < 10
    log = tmp_path / "run/logs/metrics.jsonl"
    for line in log.read_text().splitlines():
        read_strict_json(line)
    events = read_metrics(log).events
    assert [event["step"] for event in events if event["event"] == "bad_step"] == [3, 5]


def test_rollback_goes_back_and_on_after_the_bad_samples(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a GPU: the host learns of a bad step one step later."""
    BadLosses(monkeypatch, {6: float("nan")})
    init = training_utils.StepGuard.__init__

    def build(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "is_on_device": True})

    monkeypatch.setattr(training_utils.StepGuard, "__init__", build)
    # Where metrics are logged, the host waits for the verdict.
    settings = (*EVERY_STEP, "logging_steps=5", "bad_step=rollback", "save_steps=4")
    assert run_train("--max-steps", "10", settings=settings) == 0
    told = capsys.readouterr().out
    assert f"Rolled back to {name(4)} (step 4); 8 samples are left out" in told
    final = read_json(directory(tmp_path) / name(10) / "metadata.json")
    assert [bad["step"] for bad in final["bad_steps"]] == [6]
    assert final["training_progress"]["samples_seen"] == (10 + 2) * 4
    assert losses(tmp_path)[0] == [5, 10]  # the curve has one value for each step
    found = batches(tmp_path)
    assert [step for step in found if len(found[step]) == 2] == [5, 6, 7]
    assert not found[5] & found[6]
    # Steps 5 and 6 saw, the second time, what 7 and 8 would have seen.
    state = read_json(directory(tmp_path) / name(10) / "data_state.json")
    assert state["sample_index"] == 48


def test_a_rollback_sets_a_damaged_checkpoint_aside(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = BadLosses(monkeypatch, {6: float("nan")})
    forward = bad.__call__

    def damage_first(*args: Any) -> torch.Tensor:
        if bad.calls == 5 * 4:
            flip_bit(directory(tmp_path) / name(4) / "model.safetensors")
        return forward(*args)

    monkeypatch.setattr(training_utils, "forward_loss", damage_first)
    settings = (*EVERY_STEP, "bad_step=rollback", "save_steps=2", "background_save=false")
    assert run_train("--max-steps", "8", settings=settings) == 0
    assert (directory(tmp_path) / "set-aside" / name(4)).is_dir()
    assert steps(tmp_path)[-3:] == [4, 6, 8]
    for step in steps(tmp_path):
        verify_checkpoint(directory(tmp_path) / name(step))


def test_rollback_and_skip_are_bounded(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    always = dict.fromkeys(range(3, 1000), float("nan"))
    for policy in ("rollback", "skip"):
        BadLosses(monkeypatch, always)
        settings = (
            *EVERY_STEP,
            f"bad_step={policy}",
            "save_steps=2",
            "max_bad_steps=3",
            "checkpoint_uri=",
        )
        code = run_train("--max-steps", "50", folder=policy, settings=settings)
        assert code == ExitCode.UNEXPECTED
        assert "4 of the last 1000 steps were bad" in capsys.readouterr().err
        monkeypatch.undo()
        weights = load_file(
            directory(tmp_path, policy) / name(steps(tmp_path, policy)[-1]) / "model.safetensors"
        )
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_without_a_checkpoint_a_rollback_stops(
    run_train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    BadLosses(monkeypatch, {2: float("nan")})
    assert run_train("--max-steps", "6", settings=("bad_step=rollback",)) == 1
    assert "There is no checkpoint to roll back to" in capsys.readouterr().err


def test_a_bucket_that_is_down_fills_no_disk_and_loses_neither_newest_nor_best(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def down(*_: object) -> None:
        raise TransientStorageError("503 Service Unavailable")

    settings = (
        "save_steps=1",
        "keep_checkpoints=2",
        "max_unverified=3",
        "upload_deadline_seconds=0",
    )
    with monkeypatch.context() as patch:
        patch.setattr("utils.uploads.uploader.run_in_process", down)
        assert run_train("--max-steps", "12", settings=settings) == ExitCode.NOT_VERIFIED
    kept = steps(tmp_path)
    assert kept[-2:] == [11, 12]
    assert 5 <= len(kept) <= 7  # 2 newest, 3 that wait, at most the best and the one in flight
    views = {step: read_json(directory(tmp_path) / name(step) / "metadata.json") for step in kept}
    best = views[12]["validation_metrics"]["best_validation_loss"]
    assert best in [view["validation_metrics"]["validation_loss"] for view in views.values()]
    assert "without an upload: more than 3 wait for the bucket" in capsys.readouterr().out
    # All else is as the run recorded it; the save at step 13 may not give up what still waits.
    more = ("upload_deadline_seconds=600", "max_unverified=9")
    assert run_train("--max-steps", "13", "--resume", "latest", settings=more) == 0
    sidecars = {
        path.stem for path in (tmp_path / "run/bucket/Checkpoints").glob("checkpoint-*.json")
    }
    assert {name(step) for step in kept} <= sidecars


def test_logs_on_a_full_disk_are_told_once_each_and_training_goes_on(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    for file in ("train.log", "metrics.jsonl", "batches.jsonl", "samples.jsonl"):
        (logs / file).symlink_to("/dev/full")
    settings = (*EVERY_STEP, "checkpoint_uri=", "sample_tokens=2", "report_to=[]")
    assert run_train("--max-steps", "4", settings=settings) == 0
    assert steps(tmp_path)[-1] == 4
    text = "cannot be written: No space left on device."
    output = capsys.readouterr().out
    for file in ("train.log", "metrics.jsonl", "batches.jsonl"):
        assert output.count(f"{file} {text}") == 1, output
    assert output.count("could not be written") == 1  # the events
