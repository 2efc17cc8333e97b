"""The viewer on 1,000 checkpoints of 10,000 logged points: list and compare, from start to end.

Each is a process of its own, as a user starts it; the peer is the interpreter that does nothing, in
the same run. `list` is measured into a pipe and into a terminal.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures import interleave, spread, timed
from configs.config_files import PROJECT_DIRECTORY
from tests.processes import run_in_terminal
from tests.sample_checkpoints import RUN_ID, make_history, make_metadata, seal
from utils.storage.bucket import crc32c_of_file

NUM_CHECKPOINTS = 1000
NUM_POINTS = 10_000
SAVE_STEPS = 100
WEIGHTS = (
    "model.safetensors",
    "optimizer.bin",
    "scheduler.bin",
    "scheduler_state.pt",
    "random_states_0.pkl",
)
DOCUMENTS: dict[str, Any] = {
    "training_config.json": {"learning_rate": 1e-4, "sequence_length": 2048},
    "data_state.json": {"format": 1, "sample_index": 5, "shards": [], "fingerprint": "a"},
    "config.json": {"hidden_size": 2048, "num_hidden_layers": 24},
}
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
    in_pipe = partial(subprocess.run, cwd=folder, check=True, capture_output=True)
    ways = {name: partial(timed, partial(in_pipe, words)) for name, words in COMMANDS.items()}
    in_terminal = partial(run_in_terminal, *COMMANDS["list"][1:], cwd=folder)
    ways["list in a terminal"] = partial(timed, in_terminal)
    seconds = interleave(ways, runs)
    title = f"{NUM_CHECKPOINTS:,} x {NUM_POINTS:,} points"
    return {f"{title}: {name}": spread(values, " s") for name, values in seconds.items()}


def write_checkpoints(directory: Path) -> None:
    """Write checkpoints as a run leaves them, with small files for weights, and a journal.

    All share one file with the whole history, by hard links: no command here reads more than two.
    """
    shared = directory.parent / "shared"
    shared.mkdir(parents=True)
    for name in WEIGHTS:
        (shared / name).write_text("x", "utf-8")
    for name, value in DOCUMENTS.items():
        (shared / name).write_text(json.dumps(value), "utf-8")
    history = json.dumps(make_history(10 * NUM_POINTS))
    (shared / "training_metrics.json").write_text(history, "utf-8")
    journal = []
    for number in range(1, NUM_CHECKPOINTS + 1):
        step = number * SAVE_STEPS
        path = directory / f"checkpoint-epoch0-step{step}-files{number // 20}"
        path.mkdir(parents=True)
        for file in shared.iterdir():
            (path / file.name).hardlink_to(file)
        (path / "metadata.json").write_text(json.dumps(make_metadata(step), indent=1), "utf-8")
        seal(path, step)
        journal.append(_journal_line(path))
    (directory / "uploads.jsonl").write_text("".join(journal), "utf-8")


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
