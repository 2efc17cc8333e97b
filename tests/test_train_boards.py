"""What people watch a run by: one curve over all its starts, texts, events. It changes nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_train import differences, launch, load
from tests.test_train_recovery import BadLosses
from utils.checkpoints.layout import find_checkpoints
from utils.run.sample_texts import Sample, Sampler
from utils.tracking.event_file import EventFile
from utils.tracking.metrics_log import read_metrics

Train = Callable[..., int]
EVERY_STEP = ("logging_steps=1",)
SAMPLES = ("sample_tokens=6", 'sample_prompts=["","The"]')
SCALARS = ("train/loss", "train/learning_rate", "train/grad_norm", "speed/tokens_per_second")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def curves(tmp_path: Path, folder: str = "run") -> list[Path]:
    return sorted((tmp_path / folder / "logs" / "tensorboard").iterdir())


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
    weights = [load_file(end / "model.safetensors") for end in ends]
    assert not differences(*weights)
    for name in ("optimizer.bin", "random_states_0.pkl"):
        one, other = load(ends[0] / name), load(ends[1] / name)
        one.pop("step", None), other.pop("step", None)  # micro-steps of a process
        assert not differences(one, other), name
    for key in ("loss", "validation_loss"):
        one, other = (
            read_metrics(tmp_path / folder / "logs/metrics.jsonl").series(key)
            for folder in (left, right)
        )
        assert one == other


def test_a_run_of_three_starts_is_one_curve(run_train: Train, tmp_path: Path) -> None:
    settings = (*EVERY_STEP, *SAMPLES, "save_steps=100", "checkpoint_uri=")
    words: list[str] = []
    for stop in (2, 4, 6):
        assert (
            run_train("--max-steps", "6", "--stop-after", str(stop), *words, settings=settings) == 0
        )
        words = ["--resume", "latest"]
    (folder,) = curves(tmp_path)
    assert len(list(folder.iterdir())) == 3
    events = read(folder)
    assert set(SCALARS) < set(events.Tags()["scalars"])
    for tag in SCALARS:
        assert steps_of(events, tag) == list(range(1, 7))
    assert steps_of(events, "validation/loss") == [2, 4, 6]
    logged = read_metrics(tmp_path / "run/logs/metrics.jsonl").series("loss")[1]
    np.testing.assert_allclose([e.value for e in events.Scalars("train/loss")], logged, rtol=1e-6)

    saved = texts(folder, "checkpoints")
    assert [step for step, _ in saved] == [2, 4, 6]
    assert re.fullmatch(
        r" {4}checkpoint-epoch0-step2-files0 saved: [\d.]+ KiB in [\d.]+s", saved[0][1]
    )
    written = texts(folder, "samples")
    assert [step for step, _ in written] == [2, 4, 6]
    assert [sample["step"] for sample in samples(tmp_path)] == [
        step for step, _ in written for _ in range(2)
    ]
    assert "| max_steps | `6` |" in texts(folder, "configuration")[0][1]


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_sample_texts_leave_the_run_bit_identical(
    run_train: Train, tmp_path: Path, precision: str
) -> None:
    plain = (*EVERY_STEP, "eval_steps=2", "model_overrides.hidden_dropout=0.1", "use_cpu=true")
    plain += ("bf16=true",) if precision == "bf16" else ()
    assert run_train("--max-steps", "6", folder="without", settings=plain) == 0
    assert run_train("--max-steps", "6", folder="with", settings=(*plain, *SAMPLES)) == 0
    assert_same_training(tmp_path, "without", "with")
    assert [sample["step"] for sample in samples(tmp_path, "with")] == [2, 2, 4, 4, 6, 6]
    assert not (tmp_path / "without/logs/samples.jsonl").exists()


def test_the_time_of_texts_is_no_part_of_the_speed(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.5

    def write(*_: Any) -> list[Sample]:
        time.sleep(seconds)
        return []

    monkeypatch.setattr(Sampler, "write", write)
    settings = (*EVERY_STEP, *SAMPLES, "eval_steps=1", "checkpoint_uri=")
    assert run_train("--max-steps", "3", settings=settings) == 0
    metrics = read_metrics(tmp_path / "run/logs/metrics.jsonl")
    assert max(metrics.series("step_seconds")[1][1:]) < seconds


def test_a_fresh_run_begins_a_curve_of_its_own(run_train: Train, tmp_path: Path) -> None:
    assert run_train("--max-steps", "6", settings=EVERY_STEP) == 0
    (old,) = curves(tmp_path)
    settings = ("logging_steps=2", "checkpoint_uri=")
    assert run_train("--max-steps", "4", "--fresh", settings=settings) == 0
    (new,) = (folder for folder in curves(tmp_path) if folder != old)
    assert steps_of(read(old), "train/loss") == [1, 2, 3, 4, 5, 6]
    assert steps_of(read(new), "train/loss") == [2, 4]


def test_a_branch_has_the_curve_up_to_where_it_began(run_train: Train, tmp_path: Path) -> None:
    settings = (*EVERY_STEP, "save_steps=2", "checkpoint_uri=")
    assert run_train("--max-steps", "6", settings=settings) == 0
    words = ("--max-steps", "6", "--resume", "4")
    assert run_train(*words, settings=(*settings, "logging_steps=2")) == 0
    old, new = curves(tmp_path)
    assert new.name == f"{old.name}-branch1"
    assert steps_of(read(old), "train/loss") == [1, 2, 3, 4, 5, 6]
    for tag, steps in (("train/loss", [1, 2, 3, 4, 6]), ("validation/loss", [2, 4, 6])):
        assert steps_of(read(new), tag) == steps
    before = [
        [event.value for event in read(folder).Scalars("train/loss")[:4]] for folder in (old, new)
    ]
    assert before[0] == before[1]


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


def test_boards_that_cannot_be_written_never_stop_a_run(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = (*EVERY_STEP, *SAMPLES)
    assert run_train("--max-steps", "4", folder="whole", settings=settings) == 0
    written = 0
    whole = EventFile.write

    def write(self: EventFile, record: bytes) -> None:
        nonlocal written
        written += 1
        if written > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(self, record)

    monkeypatch.setattr(EventFile, "write", write)
    capsys.readouterr()
    assert run_train("--max-steps", "4", folder="full", settings=settings) == 0
    told = capsys.readouterr()
    message = "TensorBoard cannot be written: No space left on device. Training goes on."
    assert (told.out + told.err).count(message) == 1
    assert "Traceback" not in told.out + told.err
    assert_same_training(tmp_path, "whole", "full")


def test_data_without_a_tokenizer_have_no_texts_and_say_so_once(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    tokens = np.arange(2000, dtype=np.uint16) % 500
    for name in ("train_0", "val_0"):
        np.savez(data / f"{name}.npz", input_ids=tokens)
    settings = (f"data_uri={data}", "eval_steps=1", *SAMPLES)
    assert run_train("--max-steps", "3", settings=settings) == 0
    told = capsys.readouterr().out
    assert told.count("No sample texts in this attempt: the data come without a tokenizer.") == 1
    assert not (tmp_path / "run/logs/samples.jsonl").exists()


# With processes of their own.


def start(
    tmp_path: Path,
    data: Path,
    *words: str,
    program: tuple[str, ...] = (sys.executable,),
    settings: tuple[str, ...] = (),
) -> subprocess.Popen[str]:
    values = (f"data_uri={data}", *EVERY_STEP, *SAMPLES, *settings)
    command = launch(tmp_path / "run", *words, program=program)
    command += [f"--set={value}" for value in values]
    return subprocess.Popen(
        command, cwd=tmp_path / "run", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_one_curve(
    run_train: Train, tmp_path: Path, sample_data: Path
) -> None:
    settings = ("save_steps=3", "use_cpu=true")
    words: list[str] = []
    for num_steps in (4, 5, 3, 5, 4):
        with start(tmp_path, sample_data, "--max-steps", "60", *words, settings=settings) as run:
            assert run.stdout is not None
            done, saved = 0, False
            for line in run.stdout:
                done += "/60  loss" in line
                # Not before the first checkpoint: without one, the next start is another run.
                saved = saved or "Saved checkpoint-" in line
                if done >= num_steps and saved:
                    run.send_signal(signal.SIGKILL)
                    break
            run.stdout.read()
        assert run.returncode == -signal.SIGKILL
        words = ["--resume", "latest"]
    (folder,) = curves(tmp_path)
    torn = sorted(folder.iterdir())[2]
    os.truncate(torn, torn.stat().st_size - 11)
    with start(tmp_path, sample_data, "--max-steps", "60", *words, settings=settings) as run:
        assert run.stdout is not None
        told = run.stdout.read()
    assert run.returncode == 0, told
    assert len(list(folder.iterdir())) == 6
    events = read(folder)
    for tag in SCALARS:
        assert steps_of(events, tag) == list(range(1, 61))
    for tag in ("samples", "checkpoints", "configuration"):
        steps = [step for step, _ in texts(folder, tag)]
        assert steps == sorted(set(steps)), tag
    # Killed or not, with texts or without: the same losses.
    straight = (f"data_uri={sample_data}", *EVERY_STEP, *settings)
    assert run_train("--max-steps", "60", folder="straight", settings=straight) == 0
    one, other = (
        read_metrics(tmp_path / name / "logs/metrics.jsonl").series("loss")
        for name in ("run", "straight")
    )
    assert one == other


@pytest.mark.slow
def test_several_ranks_write_one_set_of_texts(tmp_path: Path, sample_data: Path) -> None:
    settings = ("eval_steps=2", "save_steps=3", "use_cpu=true")
    with start(
        tmp_path, sample_data, "--max-steps", "6", program=TORCHRUN, settings=settings
    ) as run:
        assert run.stdout is not None
        told = run.stdout.read()
    assert run.returncode == 0, told
    found = samples(tmp_path)
    assert [(sample["step"], sample["prompt"]) for sample in found] == [
        (step, prompt) for step in (2, 3, 4, 6) for prompt in ("", "The")
    ]
    assert len(list(curves(tmp_path)[0].iterdir())) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler
def test_a_compiled_run_writes_texts_and_stays_the_same(run_train: Train, tmp_path: Path) -> None:
    settings = (*EVERY_STEP, "torch_compile=true", "eval_steps=1")
    assert run_train("--max-steps", "3", folder="without", settings=settings) == 0
    assert run_train("--max-steps", "3", folder="with", settings=(*settings, *SAMPLES)) == 0
    assert_same_training(tmp_path, "without", "with")
    assert len(samples(tmp_path, "with")) == 6
