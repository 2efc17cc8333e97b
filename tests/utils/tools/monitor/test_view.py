"""The view fits 80 x 24 whatever a run has, keeps what matters, and steers no terminal."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from utils.base.machine import Gpu, MachineLoad
from utils.tools.monitor.log_findings import Metrics
from utils.tools.monitor.state import RunState
from utils.tools.monitor.status import CheckpointStatus, RunStatus
from utils.tools.monitor.view import build_rows, fit_rows, one_line
from utils.tools.monitor.warnings import RunWarning

GIB = 2**30
MACHINE = MachineLoad(45.0, 12 * GIB, 64 * GIB, 500 * GIB, 1800 * GIB, [], None)
METRICS: dict[str, float | None] = {
    "loss": 2.845123,
    "perplexity": 17.2,
    "learning_rate": 2e-4,
    "grad_norm": 0.53,
    "epoch": 0.0,
    "tokens_seen": 10_240_000_000.0,
    "tokens_per_second": 512_345.0,
    "step_seconds": 0.602,
    "mfu": 0.412,
    "data_wait_share": 0.003,
    "validation_loss": 2.912,
    "validation_perplexity": 18.4,
    "best_validation_loss": 2.9012,
}
START = {
    "run_id": "20260101-0a1b2c3d",
    "device": "cuda:0",
    "precision": "bf16",
    "world_size": 8,
    "num_parameters": 1_311_000_000,
}
PROGRESS = {"percent": 43.2, "eta_seconds": 80.0, "text": "43%, 52.1 MiB/s, 1m20s left"}


def gpu(index: int) -> Gpu:
    return Gpu(index, "NVIDIA H100 80GB HBM3", 90.0 + index, 61 * GIB, 80 * GIB, 67.0, 412.0)


def checkpoint(step: int, **changes: Any) -> CheckpointStatus:
    name = f"checkpoint-epoch0-step{step}-files12"
    values = CheckpointStatus(name, step, 2.9, 2.912, 17 * GIB, "verified", {}, None, None)
    return replace(values, **changes)


def status(**changes: Any) -> RunStatus:
    values = RunStatus(
        state=RunState.RUNNING,
        detail="process 123 on host",
        start=START,
        step=5000,
        max_steps=10_000,
        eta_seconds=11_520.0,
        silent_seconds=3.0,
        stall_seconds=60.0,
        metrics=Metrics(**METRICS),
        loss_curve=[3.12, 3.0, 2.9, 2.845],
        checkpoints=[],
        save_interval_seconds=None,
        uploads={},
        machine=MACHINE,
        disk_seconds_left=None,
        costs=None,
        warnings=[],
        problems=[],
    )
    return replace(values, **changes)


FULL = status(
    checkpoints=[
        *(checkpoint(step) for step in (1000, 2000, 3000, 4000)),
        checkpoint(5000, upload="uploading", upload_progress=PROGRESS),
    ],
    uploads={"verified": 4, "uploading": 1},
    machine=replace(MACHINE, gpus=[gpu(index) for index in range(8)]),
    disk_seconds_left=12 * 86400.0,
    warnings=[RunWarning("loss_rising", "the loss rises " * 10, "lower it")],
    problems=["logs/metrics.jsonl: 3 unreadable lines"],
)


def text_of(look: RunStatus, height: int = 100, **more: Any) -> list[str]:
    return [row.text for row in fit_rows(build_rows(look, "utf-8", **more), height)]


def test_a_usual_run_fits_80_by_24_uncropped() -> None:
    look = replace(FULL, machine=replace(MACHINE, gpus=[gpu(0)]), warnings=[], problems=[])
    lines = text_of(look)
    assert len(lines) <= 24
    # Of a checkpoint that is being uploaded, the loss may be cropped.
    assert max(len(line.split("  Val: ")[0] if "%, " in line else line) for line in lines) <= 80
    for part in (
        "Run: 20260101-0a1b2c3d, on cuda:0, precision bf16, 8 ranks, 1,311.0M parameters",
        "ETA: 3h12m",
        "Speed: 512,345 tokens/s  602 ms/step  MFU: 41.2%  Data Wait: 0.3%",
        "Last Record: 3.0s ago  Learning Rate: 2.00e-04  Tokens Seen: 10,240,000,000",
        "  checkpoint-epoch0-step4000-files12  verified  Val: 2.9120",
        "  checkpoint-epoch0-step5000-files12  uploading 43%, 52.1 MiB/s, 1m20s left  Val: ",
        "GPU 0: 90%  61.0 GiB of 80.0 GiB  67 C  412 W  NVIDIA H100 80GB HBM3",
        "CPU: 45%  Memory: 12.0 GiB of 64.0 GiB (19%)",
        "Disk Free: 500.0 GiB of 1.8 TiB (12d00h left)",
    ):
        assert any(part in line for line in lines), part


def test_what_matters_least_is_left_out_where_there_is_no_room() -> None:
    whole = text_of(FULL)
    assert len(whole) > 24
    lines = text_of(FULL, 24)
    assert len(lines) == 24
    assert lines == [line for line in whole if line in lines]  # in their order
    for part in ("State:", "ETA:", "Loss:", "step5000", "8 GPUs:", "the loss rises", "CPU:"):
        assert any(part in line for line in lines), part
    assert not any("GPU 7:" in line for line in lines)
    assert [line.split(":")[0] for line in text_of(FULL, 3)] == ["State", "Step", "Training Loss"]


def test_many_gpus_are_summed_up() -> None:
    assert "8 GPUs: 90 to 97%  up to 61.0 GiB  67 C  3,296 W" in text_of(FULL)
    unknown = Gpu(0, "x", None, None, None, None, None)
    look = status(machine=replace(MACHINE, gpus=[unknown] * 3))
    assert "3 GPUs: -  up to -  - C  - W" in text_of(look)
    assert "GPU 0: -%  - of -  - C  - W  x" in text_of(look)


def test_nothing_steers_a_terminal_and_nothing_is_too_long() -> None:
    bad = "\x1b[2J\x07\n" * 200
    look = status(
        detail=bad,
        start=dict.fromkeys(START, bad),
        problems=[bad],
        metrics=Metrics(**{item.name: 1e308 for item in fields(Metrics)}),
        checkpoints=[
            checkpoint(1, upload_error=bad, problem=bad, upload_progress={**PROGRESS, "text": bad})
        ],
        machine=replace(MACHINE, gpus=[replace(gpu(0), name=bad)], gpu_note=bad),
    )
    for line in [*text_of(look, notes=[bad]), one_line(look), one_line(replace(look, step=None))]:
        assert line.isprintable()
        assert len(line) < 2000


def test_what_is_not_known_is_a_dash() -> None:
    look = status(
        metrics=Metrics(**dict.fromkeys(METRICS)),
        max_steps=None,
        eta_seconds=None,
        silent_seconds=None,
        loss_curve=[],
        start={},
        machine=replace(MACHINE, disk_free_bytes=None, disk_total_bytes=None, gpu_note="none"),
    )
    lines = text_of(look)
    assert "Training Loss: -  Perplexity: -  Gradient Norm: -" in lines
    assert "Disk Free: -" in lines
    assert "GPU: none" in lines
    assert not any("MFU" in line for line in [*lines, one_line(look)])
    nan = status(metrics=Metrics(**{**METRICS, "loss": math.nan}))
    assert "Loss: nan  " in "\n".join(text_of(nan))


@pytest.mark.parametrize("width", [40, 60, 80, None])
def test_the_command_that_goes_on_and_what_to_do_are_there_whole(width: int | None) -> None:
    command = "/home/me/bin/python train.py --config mine --set run_name=of-my-own --resume latest"
    warning = RunWarning("upload_failed", "it is not in the bucket " * 20, "then retry it")
    look = status(state=RunState.FAILED, go_on=command, warnings=[warning])
    lines = text_of(look, width=width)
    told = "\n".join(lines[lines.index("Go on with:") + 1 :]).replace("\\\n", "")
    assert told.splitlines()[0].split() == command.split()  # as a shell reads it
    assert " ".join(" ".join(lines).split()).endswith("Do: then retry it")
