"""The real TensorBoard on the logs of real runs: its data API, and its page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
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
WAIT_SECONDS = 60.0
CHROMIUM_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1800",
    "--disable-3d-apis",  # without WebGL TensorBoard draws its lines as SVG, which can be read
)


@pytest.fixture(scope="module")
def logs(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logs of a run that was resumed five times, and of a second run with another rate."""
    folder = tmp_path_factory.mktemp("boards")

    def train(*words: str, settings: tuple[str, ...] = ()) -> None:
        values = (f"data_uri={sample_data}", *SETTINGS, *settings)
        command = launch(folder, *words)
        command += [f"--set={value}" for value in values]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env=environment
        )
        assert result.returncode == 0, result.stdout + result.stderr

    words: list[str] = []
    for stop in range(2, LAST + 1, 2):
        train("--max-steps", str(LAST), "--stop-after", str(stop), *words)
        words = ["--resume", "latest"]
        if stop == 8:  # a start that was killed behind its checkpoint
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
        metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
        assert metrics == ["validation/best_loss", "validation/loss", "train/loss"]
        request = {
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
            "colParams": [{"metric": info["name"]} for info in experiment["metricInfos"]],
            "startIndex": 0,
            "sliceSize": 10,
        }
        answer = ask(address, "plugin/hparams/session_groups", body=request)
        groups = {group["name"]: group for group in answer["sessionGroups"]}
        assert set(groups) == set(runs)
        rates = {round(group["hparams"]["learning_rate"], 6) for group in groups.values()}
        assert rates == {4e-3, 1e-3}
        best = read_metrics(logs / "metrics.jsonl").series("best_validation_loss")[1][-1]
        (value,) = (
            item["value"]
            for item in groups[name]["metricValues"]
            if item["name"]["tag"] == "validation/best_loss"
        )
        assert value == pytest.approx(best, rel=1e-6)
        (session,) = groups[name]["sessions"]
        assert session["status"] == "STATUS_SUCCESS"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless chromium with a profile of its own."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    page = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield page
    finally:
        page.quit()


LINES = (
    "//card-view[.//tb-truncated-path[@title='train/loss']]"
    "//line-chart//div[contains(@class, 'series-view')]"
    "/*[local-name()='svg']/*[local-name()='path']"
)


ALL_TEXT = """
const read = node => [...node.childNodes].map(child =>
    child.nodeType === Node.TEXT_NODE ? child.data : read(child)
).join(" ") + (node.shadowRoot ? read(node.shadowRoot) : "");
return read(document.body);
"""  # page_source leaves out what lies in shadow roots


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets of selenium's client
def test_a_browser_draws_one_line_for_a_run_and_shows_its_texts(
    logs: Path, browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.common.by import By

    def drawn() -> list[list[float]]:
        """Return where each line of the card has its points, from left to right."""
        paths = [path.get_attribute("d") for path in browser.find_elements(By.XPATH, LINES)]
        return [[float(x) for x in re.findall(r"[ML]([-\d.e]+),", path or "")] for path in paths]

    with tensorboard(logs) as address:
        wait_for(lambda: len(ask(address, "runs")) == 2)
        browser.get(f"{address}/?tagFilter=train%2Floss&smoothing=0#timeseries")
        lines = wait_for(lambda: sorted(map(len, drawn())) == [4, LAST] and drawn())
        assert all(line == sorted(set(line)) for line in lines)  # no way back, no step twice
        assert main_run(logs).split("-")[-1] in browser.find_element(By.TAG_NAME, "body").text
        assert save(browser, tmp_path, "timeseries")

        browser.get("about:blank")
        browser.get(f"{address}/#text")
        saved = "checkpoint-epoch0-step12-files0 saved: "
        wait_for(lambda: saved in browser.execute_script(ALL_TEXT))
        assert save(browser, tmp_path, "text")

        browser.get("about:blank")
        browser.get(f"{address}/#hparams")
        wait_for(lambda: "learning_rate" in browser.execute_script(ALL_TEXT))
        assert save(browser, tmp_path, "hparams")


def save(browser: Any, folder: Path, name: str) -> bool:
    """Keep a picture of the page; BOARD_SHOTS names a folder to look at them in."""
    target = Path(os.environ.get("BOARD_SHOTS") or folder)
    target.mkdir(parents=True, exist_ok=True)
    taken: bool = browser.save_screenshot(str(target / f"tensorboard-{name}.png"))
    return taken
