"""The real TensorBoard reads the logs of real runs, through its data API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.test_train import launch
from utils.tracking.metrics_log import read_metrics

LAST = 12
SETTINGS = (
    "logging_steps=1",
    "save_steps=2",
    "sample_tokens=8",
    "checkpoint_uri=bucket",
    "use_cpu=true",
)
WAIT_SECONDS = 600.0  # of a test that hangs


@pytest.fixture(scope="module")
def logs(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logs of a run that was resumed twice, and of a second run with another rate."""
    folder = tmp_path_factory.mktemp("boards")

    def train(*words: str, settings: tuple[str, ...] = ()) -> None:
        command = launch(folder, *words)
        values = (f"data_uri={sample_data}", *SETTINGS, *settings)
        command += [f"--set={value}" for value in values]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env=environment
        )
        assert result.returncode == 0, result.stdout + result.stderr

    words: list[str] = []
    for stop in (4, 8, LAST):
        train("--max-steps", str(LAST), "--stop-after", str(stop), *words)
        words = ["--resume", "latest"]
        if stop == 8:  # an attempt that was killed after its checkpoint
            (curve,) = (folder / "logs/tensorboard").iterdir()
            newest = sorted(curve.iterdir())[-1]
            os.truncate(newest, newest.stat().st_size - 7)
    train("--max-steps", "4", settings=("run_name=second", "learning_rate=1e-3"))
    return folder / "logs"


@contextmanager
def tensorboard(logs: Path, *words: str) -> Iterator[str]:
    """Serve logs on a free port of 127.0.0.1; yields the address."""
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logs),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--reload_interval",
        "1",
        *words,
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                break
        else:
            raise AssertionError("".join(told))
        yield found.group()
    finally:
        process.terminate()
        process.communicate()


def ask(address: str, path: str, body: Any = None, **query: str) -> Any:
    url = f"{address}/data/{path}?{urllib.parse.urlencode(query)}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def wait_for(find: Callable[[], Any]) -> Any:
    """Return what is found once there is something: the server tells nobody when it has read on."""
    end = time.monotonic() + WAIT_SECONDS
    while not (found := find()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def main_run(logs: Path) -> str:
    (curve,) = (logs / "tensorboard").iterdir()
    return f"tensorboard/{curve.name}"


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["true", "false"])
def test_both_loaders_show_one_curve_texts_and_hyperparameters(logs: Path, loader: str) -> None:
    name = main_run(logs)
    with tensorboard(logs, "--load_fast", loader) as address:

        def curve(tag: str) -> list[list[float]]:
            found: list[list[float]] = ask(address, "plugin/scalars/scalars", run=name, tag=tag)
            return found

        def texts(tag: str) -> dict[int, str]:
            found = ask(address, "plugin/text/text", run=name, tag=f"{tag}/text_summary")
            steps = [entry["step"] for entry in found]
            assert steps == sorted(set(steps)), tag
            return {entry["step"]: entry["text"] for entry in found}

        runs = wait_for(lambda: len(ask(address, "runs")) == 2 and ask(address, "runs"))
        assert sorted(runs) == sorted({name, *runs})
        assert [run for run in runs if run.startswith("second/tensorboard/")]
        wait_for(lambda: len(curve("train/loss")) == LAST and max(texts("uploads")) == LAST)
        for tag in ("train/loss", "train/learning_rate", "speed/tokens_per_second"):
            assert [step for _, step, _ in curve(tag)] == list(range(1, LAST + 1))
        logged = read_metrics(logs / "metrics.jsonl").series("loss")[1]
        shown = [value for _, _, value in curve("train/loss")]
        assert shown == pytest.approx(logged, rel=1e-6)
        assert list(texts("samples")) == list(range(2, LAST + 1, 2))
        assert list(texts("checkpoints")) == list(range(2, LAST + 1, 2))
        uploads = "".join(texts("uploads").values())
        assert f"checkpoint-epoch0-step{LAST}-files0 uploaded and verified" in uploads
        assert "<td>learning_rate</td>" in texts("configuration")[1]

        experiment = ask(address, "plugin/hparams/experiment", body={"experimentName": ""})
        metrics = [{"metric": info["name"]} for info in experiment["metricInfos"]]
        request = {
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
            "colParams": metrics,
            "startIndex": 0,
            "sliceSize": 10,
        }
        answer = ask(address, "plugin/hparams/session_groups", body=request)
        groups = {group["name"]: group for group in answer["sessionGroups"]}
        assert set(groups) == set(runs)
        rates = {round(group["hparams"]["learning_rate"], 6) for group in groups.values()}
        assert rates == {4e-3, 1e-3}
        values = {item["name"]["tag"]: item["value"] for item in groups[name]["metricValues"]}
        best = read_metrics(logs / "metrics.jsonl").series("best_validation_loss")[1][-1]
        assert values["validation/best_loss"] == pytest.approx(best, rel=1e-6)
        (session,) = groups[name]["sessions"]
        assert session["status"] == "STATUS_SUCCESS"
