"""Real W&B runs, offline: all is in their files, nothing leaves the machine, nobody is asked.

Each process here runs in a network namespace without a way out, under strace: a try to reach
anything is seen, and goes nowhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from tests.processes import run_python
from tests.test_train import TRAIN
from tests.test_train_boards import assert_same_training

SETTINGS = (
    "logging_steps=1",
    "save_steps=2",
    "sample_tokens=6",
    'sample_prompts=["The"]',
    "model_overrides.hidden_dropout=0.1",
    "use_cpu=true",
    'report_to=["tensorboard","wandb"]',
)
# A .wandb file is a log of LevelDB after 7 bytes: blocks of 32 KiB, in them pieces of records,
# each with crc (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last).
READ = """
import json, struct, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2

def records(data):
    at, begun = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        begun += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(begun)
            begun = b""

found = {"config": {}, "history": []}
for record in records(Path(sys.argv[1]).read_bytes()):
    kind = record.WhichOneof("record_type")
    if kind == "run":
        found["id"] = record.run.run_id
    for item in [*record.config.update, *record.run.config.update]:
        found["config"][item.key or item.nested_key[0]] = json.loads(item.value_json)
    if kind == "history":
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
               for item in record.history.item}
        found["history"].append(row)
print(json.dumps(found))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def tools() -> None:
    pytest.importorskip("wandb", reason="needs wandb (requirements-dev.txt)")
    for name in ("strace", "unshare"):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}")
    if subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("this machine allows no network namespaces")


# Runs a command at a terminal whose user says nothing.
TERMINAL = """
import os, pty, sys
status = pty.spawn(sys.argv[1:], stdin_read=lambda fd: os.read(fd, 0) or b"")
sys.exit(os.waitstatus_to_exitcode(status))
"""
AT_TERMINAL = (sys.executable, "-c", TERMINAL)


def train(
    folder: Path,
    data: Path,
    *words: str,
    settings: tuple[str, ...] = (),
    prefix: tuple[str, ...] = (),
    **environment: str,
) -> str:
    """Train without a network; return what was told. No attempt to reach anything is forgiven."""
    trace = folder.with_suffix(".trace")
    watched = ("unshare", "-rn", "strace", "-f", "-qq", "-o", str(trace), "-e", "trace=connect")
    folder.mkdir(exist_ok=True)
    values = (*TINY, f"data_uri={data}", *SETTINGS, *settings)
    options = [f"--set={value}" for value in values]
    command = [*watched, *prefix, sys.executable, str(TRAIN), *words, *options]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    clean |= {"HOME": str(home), "NETRC": str(home / "none"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
    )
    told = result.stdout + result.stderr
    assert result.returncode == 0, told
    assert "Traceback" not in told
    tried = [line for line in trace.read_text().splitlines() if "AF_INET" in line]
    if "WANDB_BASE_URL" not in environment:
        assert tried == []
    return told


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return what each attempt has kept, in their order."""
    found = []
    for file in sorted((folder / "logs" / "wandb").glob("offline-run-*/run-*.wandb")):
        result = run_python("-c", READ, file, WANDB_MODE="offline", WANDB_ERROR_REPORTING="false")
        found.append({**json.loads(result.stdout), "folder": file.parent})
    return found


def test_a_machine_without_a_login_keeps_its_run_offline_and_changes_nothing(
    tmp_path: Path, sample_data: Path
) -> None:
    folder = tmp_path / "run"
    told = train(folder, sample_data, "--max-steps", "6", "--stop-after", "4")
    assert "No login for W&B was found" in told
    (kept,) = re.findall(r"W&B is offline\. To send this attempt later: wandb sync (\S+)", told)
    assert (folder / kept).is_dir()
    train(folder, sample_data, "--max-steps", "6", "--resume", "latest", WANDB_MODE="offline")

    runs = read_runs(folder)
    identity = json.loads((folder / "checkpoints/run.json").read_text())
    assert [run["id"] for run in runs] == [identity["run_id"]] * 2
    steps = [[row["_step"] for row in run["history"] if "loss/train" in row] for run in runs]
    assert steps == [[1, 2, 3, 4], [5, 6]]
    losses = [row["loss/train"] for run in runs for row in run["history"] if "loss/train" in row]
    records = (folder / "logs/metrics.jsonl").read_text().splitlines()
    logged = [record["loss"] for record in map(json.loads, records) if "loss" in record]
    assert losses == pytest.approx(logged)
    assert runs[0]["config"]["learning_rate"] == 4e-3
    assert runs[1]["config"]["start"]["world_size"] == 1
    rows = [row for run in runs for row in run["history"] if "loss/validation" in row]
    assert [row["_step"] for row in rows] == [2, 4, 6]
    samples = json.loads((folder / "logs/samples.jsonl").read_text().splitlines()[-1])
    for name, text in (("samples", samples["text"]), ("uploads", "uploaded and verified")):
        tables = list((runs[1]["folder"] / "files/media/table").glob(f"{name}_*.table.json"))
        assert any(
            text in json.dumps(json.loads(t.read_text()), ensure_ascii=False)
            or text in str(json.loads(t.read_text())["data"][0][-1])
            for t in tables
        ), name

    # With W&B or without: the same bits.
    without = ("report_to=[]", "sample_tokens=0")
    train(tmp_path / "without", sample_data, "--max-steps", "6", settings=without)
    assert_same_training(tmp_path, "run", "without")


def test_a_service_that_cannot_be_reached_is_waited_for_but_not_long(
    tmp_path: Path, sample_data: Path
) -> None:
    told = train(
        tmp_path / "run",
        sample_data,
        "--max-steps",
        "4",
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
    )
    assert "W&B cannot be reached (" in told
    assert "this attempt is kept offline" in told
    (run,) = read_runs(tmp_path / "run")
    assert [row["_step"] for row in run["history"] if "loss/train" in row] == [1, 2, 3, 4]


def test_nobody_is_asked_for_a_key_at_a_terminal(tmp_path: Path, sample_data: Path) -> None:
    words = ("--max-steps", "2")
    told = train(tmp_path / "run", sample_data, *words, prefix=AT_TERMINAL, WANDB_MODE="online")
    assert "W&B is offline" in told
    assert "API key" not in told.replace("WANDB_API_KEY", "")
