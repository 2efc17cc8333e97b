"""Two machines that share no disk: three real processes, each machine in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sample_checkpoints import make_checkpoint
from utils.checkpoints.layout import SAVING_PREFIX, read_manifest
from utils.start.machine_sharing import on_every_machine

PROJECT = Path(__file__).resolve().parents[3]
NAME = "checkpoint-epoch0-step50-files0"
# Rank -> (machine, rank within it).
PLACES = {0: ("a", 0), 1: ("b", 0), 2: ("b", 1)}
CASES = ("lacking", "there", "damaged", "other", "unwritable", "vanished", "altered")

PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from utils.checkpoints import store as checkpoint_store
from utils.start import machine_sharing
from utils.base import ranks
from utils.base.errors import CheckpointError
from utils.checkpoints.layout import read_manifest

rank = int(os.environ["RANK"])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}/meeting", rank=rank, world_size=3
)
ranks.connect_host_group()
machine_sharing.CHUNK_BYTES = 1000  # several to a file
found = {}
for case in sys.argv[3:]:
    checkpoint = Path(case) / sys.argv[2]
    manifest = ranks.compute_on_main(lambda: read_manifest(checkpoint))
    if case == "vanished" and rank == 0:
        (checkpoint / "model.safetensors").unlink()
    if case == "altered" and rank == 0:
        (checkpoint / "model.safetensors").write_bytes(b"WEIGHTS" * 100)
    try:
        with machine_sharing.on_every_machine(checkpoint, manifest, Path(case)) as here:
            checkpoint_store.verify_checkpoint(here)
            found[case] = [str(here.parent), {file.name: file.read_bytes().hex()
                           for file in sorted(here.iterdir())}]
    except CheckpointError as exc:
        found[case] = str(exc)
torch.distributed.destroy_process_group()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of both machines, and what each rank saw in each case."""
    base = tmp_path_factory.mktemp("machines")
    for machine in "ab":
        (base / machine).mkdir()
    for case in CASES:
        checkpoint = make_checkpoint(base / "a" / case, 50)
        if case in ("there", "damaged"):
            shutil.copytree(checkpoint, base / "b" / case / checkpoint.name)
    damaged = base / "b" / "damaged" / NAME / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    make_checkpoint(base / "b" / "other", 50, run_id="20260101-ffffffff")
    (base / "b" / "unwritable").write_text("a file where a folder should be")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(base), NAME, *CASES],
            cwd=base / machine,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "3",
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(sum(m == machine for m, _ in PLACES.values())),
                "GLOO_SOCKET_IFNAME": "lo",
                "PYTHONPATH": str(PROJECT),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (machine, local) in PLACES.items()
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    return base, [json.loads((base / f"{rank}.json").read_text()) for rank in PLACES]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lacking", "damaged", "other"])
def test_a_machine_without_the_checkpoint_gets_it_whole(
    case: str, found: tuple[Path, list[dict[str, Any]]]
) -> None:
    base, seen = found
    contents = {file.name: file.read_bytes().hex() for file in (base / "a" / case / NAME).iterdir()}
    assert seen[0][case] == [case, contents]
    for rank in (1, 2):  # both ranks of the machine read what its first one received
        assert seen[rank][case] == [f"{case}/{SAVING_PREFIX}from-main-1", contents]


@pytest.mark.slow
def test_a_machine_that_has_the_same_reads_its_own_and_nothing_is_left_of_what_was_received(
    found: tuple[Path, list[dict[str, Any]]],
) -> None:
    base, seen = found
    assert [one["there"][0] for one in seen] == ["there"] * 3
    assert list(base.glob(f"?/*/{SAVING_PREFIX}*")) == []


@pytest.mark.slow
def test_what_does_not_arrive_is_an_error_on_every_rank(
    found: tuple[Path, list[dict[str, Any]]],
) -> None:
    for seen in found[1]:
        assert "could not be brought to every machine: rank 1: the directory" in seen["unwritable"]
        assert "rank 0: model.safetensors: No such file" in seen["vanished"]
        assert "rank 1: " + NAME + ": model.safetensors is damaged" in seen["altered"]


def test_one_machine_reads_where_it_is(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 50)
    with on_every_machine(checkpoint, read_manifest(checkpoint), tmp_path / "other") as here:
        assert here == checkpoint
    assert not (tmp_path / "other").exists()
