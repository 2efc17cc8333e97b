"""Fixtures that several folders of tests share."""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from tests.gcs_server import FakeGcsServer

# All that the tests see of the user's environment. Proxies, credentials, caches, languages and
# launchers of other programs change what is tested.
KEPT_VARIABLES = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|TMPDIR|LD_LIBRARY_PATH|CC|CXX|CUDA_HOME|CUDA_VISIBLE_DEVICES|"
    "PYTHON(PATH|PYCACHEPREFIX|DONTWRITEBYTECODE)|BOARD_SHOTS|"
    "CONSTRAINTS|(PYTEST|HYPOTHESIS|COVERAGE|PIP|UV|PLAYWRIGHT)_.*"
)
CHROMIUM_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--window-size=1400,1600",
)
TINY = (
    "warmup_steps=2",
    "model_overrides.num_hidden_layers=1",
    "model_overrides.hidden_size=32",
    "model_overrides.intermediate_size=64",
    "model_overrides.vocab_size=512",
    "sequence_length=32",
    "max_eval_samples=6",
    "sample_tokens=0",
    "checkpoint_uri=bucket",
)


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests one environment, whatever the user's is, before they are imported."""
    os.umask(0o022)
    for name in ("COLUMNS", "LINES"):  # readline, which pytest imports, sets them for children
        os.environ.pop(name, None)
    if not hasattr(config, "workerinput"):  # processes of pytest-xdist inherit it
        for name in list(os.environ):
            if not KEPT_VARIABLES.fullmatch(name):
                del os.environ[name]
        empty = tempfile.mkdtemp(prefix="tests-")
        config.add_cleanup(lambda: shutil.rmtree(empty, ignore_errors=True))
        os.environ.update(
            LANG="C.UTF-8",
            TERM="xterm-256color",
            TZ="UTC",
            OMP_NUM_THREADS="1",  # the models are too small to gain from threads
            HF_HOME=f"{empty}/huggingface",  # also where `accelerate config` writes
            CLOUDSDK_CONFIG=f"{empty}/gcloud",
        )
    time.tzset()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA GPU")


def pytest_runtest_teardown() -> None:
    """Leave no log handler of a command to the next test, nor objects that no collection sees."""
    _forget_log_handlers()
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _signals() -> Iterator[None]:
    """Let child processes hear the signals that nohup and `&` in a script have ignored.

    This process goes on not to care: what has a handler is reset in a child, what is ignored is
    not.
    """
    ignored = [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda *_: None)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced, renamed and removed from now on, in order, by the last part of its name."""
    calls: list[str] = []

    def watch(operation: str, name_of: Callable[[Any], Path]) -> None:
        real = getattr(os, operation)

        def call(what: Any, *arguments: Any, **options: Any) -> Any:
            calls.append(f"{operation} {name_of(what).name}")
            return real(what, *arguments, **options)

        monkeypatch.setattr(os, operation, call)

    watch("fsync", lambda descriptor: Path(f"/proc/self/fd/{descriptor}").readlink())
    for operation in ("rename", "replace", "link", "unlink"):
        watch(operation, Path)
    return calls


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory bucket with the sample text, tokenized with a small vocabulary."""
    from scripts import prepare_data

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # once for all processes of the tests
        base = base.parent
    directory = base / "bucket" / "data"
    with FileLock(base / "bucket.lock"):
        if not (directory / "index.json").exists():
            arguments = ["--sample", "--vocab-size", "512", "--output", str(directory), "--quiet"]
            assert prepare_data.main(arguments) == 0
    return directory


@pytest.fixture
def run_train(
    sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Call train.py in this process, in a directory of its own, with a very small model."""

    def run(*arguments: str, folder: str = "run", settings: tuple[str, ...] = ()) -> int:
        directory = tmp_path / folder
        directory.mkdir(exist_ok=True)
        monkeypatch.chdir(directory)
        return _train(sample_data, arguments, settings)

    return run


@pytest.fixture(scope="session")
def trained_run(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of 4 steps, a checkpoint every 2; tests leave it as it is.

    Its bucket is the folder `bucket` in it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    directory = base / "trained"
    with FileLock(base / "trained.lock"):
        if not (directory / "done").exists():
            directory.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(directory)
                words = ("--config", "test", "--max-steps", "4", "--quiet")
                assert _train(sample_data, words, ("save_steps=2", "report_to=[]")) == 0
            _forget_log_handlers()
            (directory / "done").touch()
    return directory


def _train(sample_data: Path, arguments: Sequence[str], settings: Sequence[str]) -> int:
    return call_train(arguments, (*TINY, f"data_uri={sample_data}", *settings))


def call_train(arguments: Sequence[str], settings: Sequence[str] = ()) -> int:
    """Call train.py in this process, with these words and no others."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    import train

    words = list(arguments)
    for setting in settings:
        words += ["--set", setting]
    try:
        return train.main(words)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()


def _forget_log_handlers() -> None:
    for handler in list(logging.getLogger().handlers):
        if type(handler).__module__.startswith(("logging", "rich", "utils")):
            logging.getLogger().removeHandler(handler)
            handler.close()
    logging.captureWarnings(capture=False)


@pytest.fixture
def gcs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unclosed_sockets: None
) -> Iterator[FakeGcsServer]:
    """A server with the bucket `runs`, which the google-cloud-storage client talks to."""
    from google.cloud.storage import retry

    from tests.gcs_server import FakeGcsServer

    # The client's own pauses between attempts are 1, 2, 4, ... s.
    fast = retry.DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.05)
    monkeypatch.setattr(retry, "DEFAULT_RETRY", fast)
    with FakeGcsServer(tmp_path / "gcs") as server:
        for key, value in server.client_environment().items():
            monkeypatch.setenv(key, value)
        server.create_bucket("runs")
        yield server


@pytest.fixture
def unclosed_sockets() -> Iterator[None]:
    """Forgive the client that after an error it leaves sockets to the garbage collector.

    They are collected here, so that no later test gets the warning. A marker would come too late:
    pytest reads them before it sets fixtures up.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unclosed <socket", ResourceWarning)
        gc.disable()  # all that the test makes stays in the youngest generation, quick to collect
        yield
        gc.collect(2 if gc.isenabled() else 0)  # a training enables it, and objects grow older
        gc.enable()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless chromium with a profile of its own, which notes its requests."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield window
    finally:
        window.quit()


def save_picture(browser: Any, folder: Path, name: str) -> None:
    """Keep a picture of the window; BOARD_SHOTS names a folder to look at them in."""
    target = Path(os.environ.get("BOARD_SHOTS") or folder)
    assert browser.save_screenshot(str(target / f"{name}.png"))
