"""What the tests of utils/ share: how Hypothesis runs, and a Google Cloud Storage of their own."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.cloud.storage import retry
from hypothesis import settings

from tests.gcs_server import FakeGcsServer

# The same examples each time in `make check`; HYPOTHESIS_PROFILE=soak searches for new ones.
settings.register_profile("check", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("soak", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))


@pytest.fixture
def gcs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unclosed_sockets: None
) -> Iterator[FakeGcsServer]:
    """A server with the bucket `runs`, which the google-cloud-storage client talks to."""
    # The client's own pauses between attempts are 1, 2, 4, ... s.
    fast = retry.DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.05)
    monkeypatch.setattr(retry, "DEFAULT_RETRY", fast)
    with FakeGcsServer(tmp_path / "gcs") as server:
        for key, value in server.client_environment().items():
            monkeypatch.setenv(key, value)
        server.create_bucket("runs")
        yield server


@pytest.fixture
def unclosed_sockets(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forgive the client that after an error it leaves sockets to the garbage collector.

    They are collected here, so that no later test gets the warning.
    """
    request.applymarker(pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"))
    gc.disable()  # all that the test makes stays in the youngest generation, quick to collect
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect(0)
    gc.enable()
