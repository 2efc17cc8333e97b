"""The real TensorBoard on what the tracker writes: labels, the order of charts, the two losses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from configs.training_config import TrainingConfig
from tests.conftest import save_picture
from utils.checkpoints.layout import RunIdentity
from utils.tracking.tensorboard import TensorBoardTracker
from utils.tracking.tracker import RunStart

RECORD = dict.fromkeys(
    ("epoch", "loss", "perplexity", "learning_rate", "grad_norm", "tokens_seen", "mfu"), 1.0
)
VALIDATION = dict.fromkeys(
    ("validation_loss", "validation_perplexity", "best_validation_loss"), 2.0
)
RUN_ID = "20260101-0a1b2c3d"
WAIT_SECONDS = 120.0  # to end a test that hangs


@contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """The address of a TensorBoard that has read all of `logs`."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs, "--port", "0"]
    process = subprocess.Popen([*command, "--host", "127.0.0.1"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)
        yield next(found[0] for found in lines if found)
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)
        process.stderr.close()


def ask(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=WAIT_SECONDS) as answer:
        return json.load(answer)


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets of selenium's client
def test_a_board_shows_the_losses_first_and_in_one_chart(tmp_path: Path, browser: Any) -> None:
    from accelerate.state import PartialState
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    PartialState(cpu=True)  # trackers ask it whether they are on the main process
    for name in ("", "deeper"):
        tracker = TensorBoardTracker(tmp_path / name)
        config = TrainingConfig(run_name=name)
        tracker.begin(RunStart(RunIdentity(RUN_ID), 0, config, {}, {"learning_rate": 1.0}))
        for step in (10, 20):
            tracker.log({**RECORD, **VALIDATION}, step=step)
        tracker.end("done")
    PartialState._reset_state()

    wait = WebDriverWait(browser, WAIT_SECONDS)
    with tensorboard(tmp_path) as address:
        browser.get(f"{address}/#timeseries")
        cards = wait.until(
            lambda page: [
                card.get_attribute("title")
                for card in page.find_elements(By.CSS_SELECTOR, "tb-truncated-path")
            ]
        )
        save_picture(browser, tmp_path, "tensorboard-timeseries")
        assert cards[:2] == ["loss/train", "loss/validation"]
        # The page is there: so is what it was made of.
        assert ask(f"{address}/data/runs") == [RUN_ID, f"deeper/{RUN_ID}"]
        (category,) = ask(f"{address}/data/plugin/custom_scalars/layout")["category"]
        (chart,) = category["chart"]
        drawn = [
            tag
            for pattern in chart["multiline"]["tag"]
            for tag in ask(
                f"{address}/data/plugin/custom_scalars/scalars?"
                + urllib.parse.urlencode({"run": f"deeper/{RUN_ID}", "tag": pattern})
            )["tag_to_events"]
        ]
        assert drawn == ["loss/train", "loss/validation"]
