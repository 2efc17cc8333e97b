"""Commands that only read load nothing that takes seconds, or that needs a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_python
from tests.sample_checkpoints import make_checkpoint


@pytest.mark.parametrize(
    ("script", "calls", "heavy"),
    [
        (
            "checkpoint_viewer",
            [["list"], ["view", "latest"], ["compare"]],
            {"torch", "transformers", "numpy", "matplotlib", "rich", "google.cloud"},
        ),
        ("checkpoint_viewer", [["report"]], {"torch", "google.cloud"}),
        ("monitor_training", [["--once"]], {"torch", "transformers", "numpy", "rich"}),
        ("upload_manager", [["status"], ["list"]], {"torch", "google.cloud"}),
    ],
)
def test_what_only_reads_loads_nothing_heavy(
    tmp_path: Path, script: str, calls: list[list[str]], heavy: set[str]
) -> None:
    for step in (50, 100):
        make_checkpoint(tmp_path / "checkpoints", step)
    code = (
        f"import sys; from scripts.{script} import main\n"
        f"assert [main(words) for words in {calls}] == {[0] * len(calls)}\n"
        f"assert not {heavy} & sys.modules.keys(), sys.modules.keys()"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
