"""What is imported at once is not looked at by the garbage collector, then or later."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest

from utils.base.startup import no_collections


@pytest.fixture
def collector() -> Iterator[None]:
    """Leave the collector of the other tests as it was."""
    was_enabled = gc.isenabled()
    yield
    (gc.enable if was_enabled else gc.disable)()


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("is_enabled", [True, False])
def test_nothing_is_collected_within_and_what_is_there_is_left_alone(is_enabled: bool) -> None:
    (gc.enable if is_enabled else gc.disable)()
    before = gc.get_freeze_count()
    with contextlib.suppress(ModuleNotFoundError), no_collections():
        assert not gc.isenabled()
        kept = [[number] for number in range(100_000)]
        raise ModuleNotFoundError
    assert gc.isenabled() == is_enabled
    assert gc.get_freeze_count() >= before + len(kept)
