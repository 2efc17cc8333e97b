"""What the tests of scripts/ share: train.py in forks, and logging left as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.campaigns.fork_server import ForkServer
from tests.conftest import _forget_log_handlers


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """Starts train.py in forks of one process that has loaded torch."""
    with ForkServer({"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """Take away what a command has set up for its log lines."""
    yield
    _forget_log_handlers()
