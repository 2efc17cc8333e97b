"""What a run is expected to take against what it takes: before it begins, and after 20 steps.

The test configuration, with evaluations, saves and uploads to a directory, as a user starts it.
"""

from __future__ import annotations

import re
import subprocess
import time
from datetime import datetime
from pathlib import Path

from benchmarks.figures import TRAIN, prepare_sample, spread
from utils.tracking.metrics_log import read_metrics

ASKED_STEP = 20
FORECAST = re.compile(r"^ +run +ok +about (?:(\d+)h)?(?:(\d+)m)?(?:([\d.]+)s)? for steps", re.M)


def measure_forecast(folder: Path, runs: int) -> dict[str, str]:
    """Run the test configuration a few times, each after a dry run."""
    settings = ["--config", "test", "--set", f"data_uri={prepare_sample(folder)}"]
    before, after, checking = [], [], []
    for number in range(min(3, runs)):
        work = folder / f"run-{number}"
        work.mkdir()
        begin = time.perf_counter()
        told = subprocess.run(  # noqa: S603
            [*TRAIN, *settings, "--dry-run"], check=True, cwd=work, capture_output=True, text=True
        ).stdout
        checking.append(time.perf_counter() - begin)
        found = FORECAST.search(told)
        if found is None:
            raise RuntimeError(f"no forecast in: {told}")
        hours, minutes, seconds = (float(text or 0) for text in found.groups())
        expected = 3600 * hours + 60 * minutes + seconds
        subprocess.run([*TRAIN, *settings, "--quiet"], check=True, cwd=work)  # noqa: S603
        log = read_metrics(work / "logs" / "metrics.jsonl")
        start, end = (datetime.fromisoformat(log.events[place]["time"]) for place in (0, -1))
        asked = next(record for record in log.records if record["step"] == ASKED_STEP)
        left = (end - datetime.fromisoformat(asked["time"])).total_seconds()
        before.append(expected / (end - start).total_seconds())
        after.append(asked["eta_seconds"] / left)
    return {
        f"expected / real time to the end, at step {ASKED_STEP}": spread(after),
        "expected / real time of the run, dry run": spread(before),
        "a dry run, with imports": spread(checking, " s"),
    }
