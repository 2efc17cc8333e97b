"""What people watch a run by: curves over all its attempts, texts, events. They change nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_train import state_differences
from tests.test_train_recovery import BadLosses
from utils.checkpoints.layout import find_checkpoints
from utils.run.sample_texts import Sample, Sampler
from utils.tracking.event_file import EventFile
from utils.tracking.metrics_log import read_metrics

Train = Callable[..., int]
EVERY_STEP = ("logging_steps=1",)
SAMPLES = ("sample_tokens=6", 'sample_prompts=["","The"]')
SCALARS = (
    "loss/train",
    "optimizer/learning_rate",
    "optimizer/grad_norm",
    "speed/tokens_per_second",
)


def curves(tmp_path: Path, folder: str = "run") -> list[Path]:
    return sorted(path for path in (tmp_path / folder / "logs").iterdir() if path.is_dir())


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def steps_of(events: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in events.Scalars(tag)]


def texts(directory: Path, tag: str) -> list[tuple[int, str]]:
    events = plugin_event_accumulator.EventAccumulator(str(directory))
    events.Reload()
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events.Tensors(f"{tag}/text_summary")
    ]


def samples(tmp_path: Path, folder: str = "run") -> list[dict[str, Any]]:
    path = tmp_path / folder / "logs" / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_training(tmp_path: Path, left: str, right: str) -> None:
    """Two folders have the same losses and the same last checkpoint, bit for bit."""
    ends = []
    for folder in (left, right):
        directory = tmp_path / folder / "checkpoints"
        ends.append(directory / str(find_checkpoints(directory)[-1]))
    assert ends[0].name == ends[1].name
    assert not state_differences(*ends)
    for key in ("loss", "validation_loss"):
        one, other = (
            read_metrics(tmp_path / folder / "logs/metrics.jsonl").series(key)
            for folder in (left, right)
        )
        assert one == other


def test_attempts_share_a_curve_and_branches_and_fresh_runs_have_their_own(
    run_train: Train, tmp_path: Path
) -> None:
    settings = (*EVERY_STEP, *SAMPLES, "save_steps=100", "checkpoint_uri=")
    words: list[str] = []
    for stop in ("2", "4", "6"):
        assert run_train("--max-steps", "6", "--stop-after", stop, *words, settings=settings) == 0
        words = ["--resume", "latest"]
    (folder,) = curves(tmp_path)
    assert len(list(folder.iterdir())) == 3
    events = read(folder)
    for tag in SCALARS:
        assert steps_of(events, tag) == list(range(1, 7))
    assert steps_of(events, "loss/validation") == [2, 4, 6]
    logged = read_metrics(tmp_path / "run/logs/metrics.jsonl").series("loss")[1]
    np.testing.assert_allclose([e.value for e in events.Scalars("loss/train")], logged, rtol=1e-6)
    saved = texts(folder, "checkpoints")
    assert [step for step, _ in saved] == [2, 4, 6]
    assert re.fullmatch(
        r" {4}checkpoint-epoch0-step2-files0 saved: [\d.]+ KiB in [\d.]+s", saved[0][1]
    )
    assert [step for step, _ in texts(folder, "samples")] == [2, 4, 6]
    assert [sample["step"] for sample in samples(tmp_path)] == [2, 2, 4, 4, 6, 6]
    assert "| max_steps | `6` |" in texts(folder, "configuration")[0][1]

    # A branch has the curve up to where it began, under its own name.
    sparse = ("logging_steps=2", "checkpoint_uri=")
    assert run_train("--max-steps", "6", "--resume", "4", settings=sparse) == 0
    (branch,) = (path for path in curves(tmp_path) if path != folder)
    assert branch.name == f"{folder.name}-branch1"
    for tag, steps in (("loss/train", [1, 2, 3, 4, 6]), ("loss/validation", [2, 4, 6])):
        assert steps_of(read(branch), tag) == steps
    shared = [[e.value for e in read(path).Scalars("loss/train")[:4]] for path in (folder, branch)]
    assert shared[0] == shared[1]

    assert run_train("--max-steps", "4", "--fresh", settings=sparse) == 0
    (fresh,) = (path for path in curves(tmp_path) if path not in (folder, branch))
    assert steps_of(read(fresh), "loss/train") == [2, 4]
    assert steps_of(read(folder), "loss/train") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_texts_and_boards_that_fail_leave_the_run_bit_identical(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
) -> None:
    plain = (*EVERY_STEP, "eval_steps=2", "model_overrides.hidden_dropout=0.1", "use_cpu=true")
    plain += ("bf16=true",) if precision == "bf16" else ()
    assert run_train("--max-steps", "6", folder="without", settings=plain) == 0
    assert not (tmp_path / "without/logs/samples.jsonl").exists()

    clock, write_texts = time.perf_counter, Sampler.write
    texts_seconds = 0.0

    def write_slowly(*args: Any) -> list[Sample]:
        nonlocal texts_seconds
        texts_seconds += 1000.0
        return write_texts(*args)

    write_record, num_records = EventFile.write, 0

    def write_some(self: EventFile, record: bytes) -> None:
        nonlocal num_records
        num_records += 1
        if num_records > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_record(self, record)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + texts_seconds)
    monkeypatch.setattr(Sampler, "write", write_slowly)
    monkeypatch.setattr(EventFile, "write", write_some)
    capsys.readouterr()
    assert run_train("--max-steps", "6", folder="with", settings=(*plain, *SAMPLES)) == 0
    assert_same_training(tmp_path, "without", "with")
    assert [sample["step"] for sample in samples(tmp_path, "with")] == [2, 2, 4, 4, 6, 6]
    # The time of the texts is no part of the speed.
    metrics = read_metrics(tmp_path / "with/logs/metrics.jsonl")
    assert texts_seconds == 3000.0
    assert max(metrics.series("step_seconds")[1]) < 1000.0
    told = "".join(capsys.readouterr())
    message = "TensorBoard cannot be written: No space left on device. Training goes on."
    assert told.count(message) == 1
    assert "Traceback" not in told


def test_after_a_rollback_no_step_is_there_twice(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BadLosses(monkeypatch, {6: float("nan")})
    settings = (*EVERY_STEP, *SAMPLES, "bad_step=rollback", "save_steps=4", "eval_steps=1")
    assert run_train("--max-steps", "8", settings=settings) == 0
    (folder,) = curves(tmp_path)
    events = read(folder)
    for tag in SCALARS:
        assert steps_of(events, tag) == list(range(1, 9))
    for tag in ("samples", "checkpoints", "uploads"):
        steps = [step for step, _ in texts(folder, tag)]
        assert steps == sorted(set(steps)), tag
    uploads = "\n".join(text for _, text in texts(folder, "uploads"))
    for step in (4, 8):
        assert f"checkpoint-epoch0-step{step}-files0 uploaded and verified: " in uploads
    assert texts(folder, "uploads")[-1][0] == 8
