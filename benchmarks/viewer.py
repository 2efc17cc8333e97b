"""The viewer on 1,000 checkpoints of 10,000 logged points: list and compare, from start to end.

Each is a process of its own, as a user starts it; the peer is the interpreter that does nothing, in
the same run. `list` is measured into a pipe and into a terminal.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.figures import spread
from configs.training_config import PROJECT_DIRECTORY
from utils.checkpoints.layout import FileEntry, Manifest
from utils.storage.bucket import crc32c_of_file
from utils.tracking.metrics_log import HISTORY_LIMIT

NUM_CHECKPOINTS = 1000
NUM_POINTS = 10_000
SAVE_STEPS = 100
RUN_ID = "20260101-0a1b2c3d"
VIEWER = (sys.executable, str(PROJECT_DIRECTORY / "scripts" / "checkpoint_viewer.py"))
COMMANDS = {
    "the interpreter alone": (sys.executable, "-c", "pass"),
    "list": (*VIEWER, "list"),
    "list --json": (*VIEWER, "list", "--json"),
    "compare": (*VIEWER, "compare"),
    "view latest": (*VIEWER, "view", "latest"),
}


def measure_viewer(folder: Path, runs: int) -> dict[str, str]:
    """Measure the viewer's commands, interleaved."""
    write_checkpoints(folder / "checkpoints")
    seconds: dict[str, list[float]] = {name: [] for name in (*COMMANDS, "list in a terminal")}
    for number in range(runs + 1):
        measured = {name: _time_in_pipe(words, folder) for name, words in COMMANDS.items()}
        measured["list in a terminal"] = _time_in_terminal(COMMANDS["list"], folder)
        if number:  # the first is a warm-up
            for name, value in measured.items():
                seconds[name].append(value)
    title = f"{NUM_CHECKPOINTS:,} x {NUM_POINTS:,} points"
    return {f"{title}: {name}": spread(values, " s") for name, values in seconds.items()}


def _time_in_pipe(words: Sequence[str], folder: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(words, cwd=folder, check=True, capture_output=True)  # noqa: S603
    return time.perf_counter() - begin


def _time_in_terminal(words: Sequence[str], folder: Path) -> float:
    ours, terminal = pty.openpty()
    begin = time.perf_counter()
    with subprocess.Popen(words, cwd=folder, stdout=terminal) as process:  # noqa: S603
        os.close(terminal)
        with suppress(OSError):  # EIO: the process has ended
            while os.read(ours, 2**16):
                pass
    os.close(ours)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return time.perf_counter() - begin


def write_checkpoints(directory: Path) -> None:
    """Write checkpoints as a run leaves them, with small files for weights, and a journal.

    All share one file with the whole history, by hard links: no command here reads more than two.
    """
    shared = directory.parent / "shared"
    shared.mkdir(parents=True)
    for name, value in _shared_files().items():
        (shared / name).write_text(value, "utf-8")
    entries = {
        file.name: FileEntry(file.stat().st_size, crc32c_of_file(file)) for file in shared.iterdir()
    }
    journal = []
    for number in range(1, NUM_CHECKPOINTS + 1):
        step = number * SAVE_STEPS
        path = directory / f"checkpoint-epoch0-step{step}-files{number // 20}"
        path.mkdir(parents=True)
        for name in entries:
            (path / name).hardlink_to(shared / name)
        metadata = path / "metadata.json"
        metadata.write_text(json.dumps(_metadata(step), indent=1), "utf-8")
        entry = FileEntry(metadata.stat().st_size, crc32c_of_file(metadata))
        manifest = Manifest(RUN_ID, step, 0, 1, {**entries, metadata.name: entry})
        (path / "manifest.json").write_text(json.dumps(manifest.to_json(), indent=1), "utf-8")
        journal.append(_journal_line(path))
    (directory / "uploads.jsonl").write_text("".join(journal), "utf-8")


def _shared_files() -> dict[str, str]:
    steps = list(range(10, 10 * NUM_POINTS + 1, 10))
    history = {
        "steps": steps,
        "loss_history": [_loss(step) for step in steps],
        "learning_rates": [1e-4 + step / 1e10 for step in steps],
        "grad_norms": [1 + step / 1e7 for step in steps],
        "tokens_per_second": [3e5 + step / 7 for step in steps],
        "validation": [{"step": step, "validation_loss": _loss(step)} for step in steps[9::10]],
    }
    binary = (
        "model.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "scheduler_state.pt",
        "random_states_0.pkl",
    )
    documents: dict[str, Any] = {
        "training_metrics.json": history,
        "training_config.json": {"learning_rate": 1e-4, "sequence_length": 2048},
        "data_state.json": {"format": 1, "sample_index": 5, "shards": [], "fingerprint": "a"},
        "config.json": {"hidden_size": 2048, "num_hidden_layers": 24},
    }
    return {**dict.fromkeys(binary, "x"), **{k: json.dumps(v) for k, v in documents.items()}}


def _loss(step: int) -> float:
    return 2.5 + 8 / (1 + step / 1000)


def _metadata(step: int) -> dict[str, Any]:
    last = [_loss(step - 10 * past) for past in range(HISTORY_LIMIT, 0, -1) if step > 10 * past]
    return {
        "step": step,
        "epoch": 0,
        "current_loss": _loss(step),
        "best_loss": _loss(step),
        "loss_history": last,
        "learning_rates": [1e-4 + loss / 1e7 for loss in last],
        "validation_metrics": {"validation_loss": _loss(step), "perplexity": 12.182493960703473},
        "training_progress": {
            "tokens_seen": step * 10**6,
            "samples_seen": step * 512,
            "tokens_per_second": 3e5,
        },
        "system_info": {"num_parameters": 1_311_000_000, "device": "cpu", "world_size": 1},
        "timestamp": "2026-01-01T12:30:25.123456+00:00",
        "run_id": RUN_ID,
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
    }


def _journal_line(checkpoint: Path) -> str:
    entry = {
        "time": "2026-01-01T12:31:00+00:00",
        "checkpoint": checkpoint.name,
        "run_id": RUN_ID,
        "state": "verified",
        "bytes": 10**9,
        "bucket": str(checkpoint.parents[1] / "bucket"),
        "manifest_crc32c": crc32c_of_file(checkpoint / "manifest.json"),
    }
    return json.dumps(entry) + "\n"
