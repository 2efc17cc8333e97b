"""What a start looks at before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils import ranks
from utils.errors import CheckpointError
from utils.run_start import require_shared_directory


def test_one_process_shares_its_directory_with_itself(tmp_path: Path) -> None:
    require_shared_directory(tmp_path / "checkpoints", "0a1b")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_rank_that_does_not_see_the_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "gather_to_main", lambda seen: [seen, True, False])
    with pytest.raises(CheckpointError, match="Rank 2 does not see output_dir .* of rank 0"):
        require_shared_directory(tmp_path, "0a1b")
    assert not list(tmp_path.iterdir())
